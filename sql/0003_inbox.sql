-- Migration 3: the inbox: which messages were handled, which wait, and how far each partition was read.
--
-- By hand, after 0002: psql -v ON_ERROR_STOP=1 -1 -v schema=postbox -f sql/0003_inbox.sql

-- What a handler is given. Its own type, so that a column more in a table changes no handler.
CREATE TYPE :"schema".message AS (
    consumer_group text,
    message_id text,
    topic text,
    partition integer,
    kafka_offset bigint,
    key text,
    event_type text,
    schema_version text,
    headers jsonb,
    payload jsonb,
    body bytea,
    created_at timestamptz
);
COMMENT ON TYPE :"schema".message IS
    'a message as a handler gets it. created_at: when it was produced, null if it does not say; body: the record''s value, where it is no JSON that payload can hold';

CREATE TABLE :"schema".inbox_source (
    id integer GENERATED ALWAYS AS IDENTITY,
    consumer_group text NOT NULL,
    topic text NOT NULL,
    partitions integer,
    owes_letters boolean NOT NULL DEFAULT false,
    CONSTRAINT inbox_source_pkey PRIMARY KEY (id),
    CONSTRAINT one_number_a_source UNIQUE (consumer_group, topic)
);
COMMENT ON TABLE :"schema".inbox_source IS 'numbers for a group and a topic, for short rows of inbox and inbox_message';
COMMENT ON COLUMN :"schema".inbox_source.topic IS 'empty: all topics of the group, where they share their ids (--dedup-scope group)';
COMMENT ON COLUMN :"schema".inbox_source.partitions IS 'how many the topic had when a consumer of the group first came: the others are new, and are read from their beginning';
COMMENT ON COLUMN :"schema".inbox_source.owes_letters IS 'whether its dead letters are to be copied to a topic (--dead-letter-topic)';

CREATE TABLE :"schema".inbox_offset (
    consumer_group text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    next_offset bigint NOT NULL,
    last_id text,
    last_timestamp bigint,
    cluster_id text,
    epoch bigint NOT NULL,
    owner text,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT inbox_offset_pkey PRIMARY KEY (consumer_group, topic, partition)
);
COMMENT ON TABLE :"schema".inbox_offset IS 'how far a group has read each partition: moved in the transactions that store or handle what was read';
COMMENT ON COLUMN :"schema".inbox_offset.next_offset IS 'offset of the first record that is not dealt with';
COMMENT ON COLUMN :"schema".inbox_offset.last_id IS 'message id of the record before it, by which a log that is no longer the same is told';
COMMENT ON COLUMN :"schema".inbox_offset.last_timestamp IS 'timestamp of that record, in milliseconds since 1970';
COMMENT ON COLUMN :"schema".inbox_offset.cluster_id IS 'the Kafka cluster that counts so';
COMMENT ON COLUMN :"schema".inbox_offset.epoch IS 'raised when a consumer takes the partition: one that has lost it writes nothing more';
COMMENT ON COLUMN :"schema".inbox_offset.owner IS 'the consumer that has taken it; null: given back in order';

CREATE TABLE :"schema".inbox_mark (
    consumer_group text NOT NULL,
    topic text NOT NULL,
    partition integer NOT NULL,
    end_offset bigint NOT NULL,
    marked_at timestamptz NOT NULL,
    read_until timestamptz,
    gone_since timestamptz,
    CONSTRAINT inbox_mark_pkey PRIMARY KEY (consumer_group, topic, partition)
);
COMMENT ON TABLE :"schema".inbox_mark IS 'until when a group has read each partition: rows of inbox go one --dedup-window behind it. By this server''s clock';
COMMENT ON COLUMN :"schema".inbox_mark.end_offset IS 'the end of the partition at marked_at, or behind it';
COMMENT ON COLUMN :"schema".inbox_mark.read_until IS 'all that was in the partition by then is dealt with; null: not known yet';
COMMENT ON COLUMN :"schema".inbox_mark.gone_since IS 'the brokers have not known the partition since then';

-- Columns by size, so that none is padded: 68 bytes a row and about 45 in the index.
CREATE TABLE :"schema".inbox (
    kafka_offset bigint NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    id uuid NOT NULL,
    source integer NOT NULL,
    partition integer NOT NULL,
    CONSTRAINT inbox_pkey PRIMARY KEY (source, id)
);
-- Rows go by their age. Those of a batch have one time, which the index has once: 8 bytes a row in
-- batches of a thousand, 32 where each has one message.
-- A BRIN index would not do: where rows are deleted and others take their place, its ranges only ever grow.
CREATE INDEX inbox_received ON :"schema".inbox (source, received_at);
COMMENT ON TABLE :"schema".inbox IS 'which messages were received: a repeated one is not handled again';
COMMENT ON COLUMN :"schema".inbox.id IS 'the message id, if it is a UUID, else what message_uuid makes of it';
COMMENT ON COLUMN :"schema".inbox.source IS 'group and topic: inbox_source.id';
COMMENT ON COLUMN :"schema".inbox.partition IS '-1: recorded by an application (inbox_record)';

CREATE TABLE :"schema".inbox_message (
    seq bigint GENERATED ALWAYS AS IDENTITY,
    lane bigint NOT NULL,
    kafka_offset bigint NOT NULL,
    due_at timestamptz NOT NULL DEFAULT now(),
    received_at timestamptz NOT NULL DEFAULT now(),
    created_at timestamptz,
    decided_at timestamptz,
    id uuid NOT NULL,
    source integer NOT NULL,
    partition integer NOT NULL,
    attempts integer NOT NULL DEFAULT 0,
    status text NOT NULL,
    message_id text NOT NULL,
    original_id bytea,
    key text,
    event_type text NOT NULL,
    schema_version text,
    headers jsonb NOT NULL,
    payload jsonb,
    body bytea,
    error text,
    owes_letter boolean NOT NULL DEFAULT false,
    is_claimed boolean NOT NULL DEFAULT false,
    decided_by text,
    reason text,
    CONSTRAINT inbox_message_pkey PRIMARY KEY (source, id),
    CONSTRAINT status_is_known CHECK (status IN ('stored', 'waiting', 'dead', 'skipped')),
    CONSTRAINT skipped_by_somebody CHECK (status <> 'skipped' OR decided_by IS NOT NULL)
);
COMMENT ON TABLE :"schema".inbox_message IS 'messages that are still to be handled, and those that were given up; deleted once they are handled';
COMMENT ON COLUMN :"schema".inbox_message.seq IS 'order in which they were received: those of a lane are handled in it';
COMMENT ON COLUMN :"schema".inbox_message.lane IS 'what is handled in order: a hash of partition and key, or as --order says';
COMMENT ON COLUMN :"schema".inbox_message.due_at IS 'when it may be tried next, by this server''s clock; infinity: not before an earlier one of its lane';
COMMENT ON COLUMN :"schema".inbox_message.created_at IS 'when it was produced; null: it does not say';
COMMENT ON COLUMN :"schema".inbox_message.attempts IS 'how often it was begun';
COMMENT ON COLUMN :"schema".inbox_message.status IS
    'stored: for the application, or not tried yet; waiting: failed, or behind one of its lane that did; dead: given up after its attempts; skipped: given up by a person';
COMMENT ON COLUMN :"schema".inbox_message.original_id IS 'the message id, where message_id is a hash of it';
COMMENT ON COLUMN :"schema".inbox_message.body IS 'the record''s value, where it is no JSON that payload can hold';
COMMENT ON COLUMN :"schema".inbox_message.error IS 'why it failed, the last time';
COMMENT ON COLUMN :"schema".inbox_message.owes_letter IS 'a copy is still to be sent to the dead-letter topic';
COMMENT ON COLUMN :"schema".inbox_message.is_claimed IS 'by the application, until due_at: nobody decides about it meanwhile';
COMMENT ON COLUMN :"schema".inbox_message.decided_by IS 'who skipped it, or had it tried again';

CREATE INDEX inbox_message_lane ON :"schema".inbox_message (source, partition, lane, seq)
    WHERE status IN ('stored', 'waiting');
-- Without those that are behind others: it is short, and no plan can take it for the index of lanes.
CREATE INDEX inbox_message_due ON :"schema".inbox_message (source, partition, due_at)
    WHERE status = 'waiting' AND due_at < 'infinity';
CREATE INDEX inbox_message_decided ON :"schema".inbox_message (source, seq) WHERE status IN ('dead', 'skipped');
CREATE INDEX inbox_message_letters ON :"schema".inbox_message (source, seq) WHERE owes_letter;

-- A UUID as it is written by most, in small letters, is itself. Anything else is the first half of its
-- SHA-256, marked as version 8, which is nobody else's.
CREATE FUNCTION :"schema".message_uuid(message_id text) RETURNS uuid
LANGUAGE sql
IMMUTABLE
STRICT
PARALLEL SAFE
RETURN CASE
    WHEN message_id ~ '^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$' THEN message_id::uuid
    ELSE encode(
        set_byte(
            set_byte(
                substr(sha256(convert_to(message_id, 'UTF8')), 1, 16), 6,
                get_byte(sha256(convert_to(message_id, 'UTF8')), 6) & 15 | 128
            ), 8,
            get_byte(sha256(convert_to(message_id, 'UTF8')), 8) & 63 | 128
        ), 'hex'
    )::uuid
END;
COMMENT ON FUNCTION :"schema".message_uuid IS 'what a message is told from others by in inbox and inbox_message';

-- For applications that handle messages by themselves. Each of them has its owner's rights, as the
-- tables are nobody's to change: EXECUTE is all that an application needs.

-- Where a message is named by its id, status || '' keeps the planner from the indexes that hold one status
-- only: before it knows the table, it takes them for as good as the primary key, and reads all that waits
-- for each id.

-- What was claimed before and not done may be what ends its worker: it is given alone, so that nothing
-- else is counted with it. A lane is claimed as a whole, from its first message on, if that is not claimed; and lanes are walked
-- in a circle, from somewhere, so that none waits behind a long one: that costs a look at an index for each.
CREATE FUNCTION :"schema".inbox_claim(
    consumer_group text,
    most integer,
    lease interval DEFAULT '30 seconds',
    attempts_max integer DEFAULT 6
) RETURNS SETOF :"schema".message
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = :"schema", pg_temp
AS $$
DECLARE
    place record;
    head record;
    start bigint;
    at bigint;
    has_wrapped boolean;
    claimed integer := 0;
    got integer;
BEGIN
    FOR place IN
        SELECT s.id AS source, s.topic, o.partition
        FROM inbox_source AS s
        JOIN inbox_offset AS o ON o.consumer_group = s.consumer_group AND o.topic = s.topic
        WHERE s.consumer_group = inbox_claim.consumer_group
        ORDER BY random()
    LOOP
        start := ('x' || encode(uuid_send(gen_random_uuid()), 'hex'))::bit(64)::bigint;
        at := start;
        has_wrapped := false;
        LOOP
            IF claimed >= most THEN
                RETURN;
            END IF;
            SELECT m.id, m.lane, m.due_at, m.attempts, m.status INTO head
            FROM inbox_message AS m
            WHERE m.source = place.source AND m.partition = place.partition AND m.lane >= at
              AND m.status IN ('stored', 'waiting')
            ORDER BY m.lane, m.seq
            LIMIT 1;
            IF NOT FOUND THEN
                EXIT WHEN has_wrapped;
                has_wrapped := true;
                at := -9223372036854775808;
                CONTINUE;
            END IF;
            EXIT WHEN has_wrapped AND head.lane >= start;
            IF head.status = 'stored' AND head.due_at <= clock_timestamp() AND (head.attempts = 0 OR claimed = 0) THEN
                -- Looked at again once it is locked: another may have claimed it, or done it.
                PERFORM FROM inbox_message AS m
                WHERE m.source = place.source AND m.id = head.id AND m.status || '' = 'stored'
                  AND m.due_at <= clock_timestamp()
                FOR UPDATE SKIP LOCKED;
                IF FOUND AND head.attempts >= attempts_max THEN
                    UPDATE inbox_message AS m
                    SET status = 'dead', error = coalesce(m.error, 'claimed, and neither done nor failed within the lease')
                    WHERE m.source = place.source AND m.id = head.id;
                    -- Its lane goes on, with what nobody has tried.
                    UPDATE inbox_message AS m
                    SET attempts = 0
                    WHERE m.source = place.source AND m.partition = place.partition AND m.lane = head.lane
                      AND m.status = 'stored' AND m.attempts > 0;
                    CONTINUE;
                ELSIF FOUND THEN
                    RETURN QUERY
                    WITH run AS (
                        SELECT m.id FROM inbox_message AS m
                        WHERE m.source = place.source AND m.partition = place.partition AND m.lane = head.lane
                          AND m.status IN ('stored', 'waiting')
                        ORDER BY m.seq
                        LIMIT CASE WHEN head.attempts > 0 THEN 1 ELSE most - claimed END
                    ), taken AS (
                        UPDATE inbox_message AS m
                        SET attempts = m.attempts + 1, due_at = clock_timestamp() + lease, is_claimed = true
                        FROM run
                        WHERE m.source = place.source AND m.id = run.id AND m.status || '' = 'stored'
                        RETURNING m.*
                    )
                    SELECT inbox_claim.consumer_group, t.message_id, place.topic, t.partition, t.kafka_offset, t.key,
                        t.event_type, t.schema_version, t.headers, t.payload, t.body, t.created_at
                    FROM taken AS t
                    ORDER BY t.seq;
                    GET DIAGNOSTICS got = ROW_COUNT;
                    claimed := claimed + got;
                    IF head.attempts > 0 THEN
                        RETURN;
                    END IF;
                END IF;
            END IF;
            EXIT WHEN head.lane = 9223372036854775807;
            at := head.lane + 1;
        END LOOP;
    END LOOP;
END
$$;
COMMENT ON FUNCTION :"schema".inbox_claim IS
    'messages to handle, which nobody else is given before the lease ends; those of a key in their order. One that is claimed attempts_max times in vain is dead';

CREATE FUNCTION :"schema".inbox_done(consumer_group text, ids text[]) RETURNS bigint
LANGUAGE sql
SECURITY DEFINER
SET search_path = :"schema", pg_temp
AS $$
    WITH done AS (
        DELETE FROM inbox_message AS m
        USING inbox_source AS s, unnest(inbox_done.ids) AS i (message_id)
        WHERE s.consumer_group = inbox_done.consumer_group AND m.source = s.id
          AND m.id = message_uuid(i.message_id) AND m.status || '' = 'stored'
        RETURNING m.id
    )
    SELECT count(*) FROM done
$$;
COMMENT ON FUNCTION :"schema".inbox_done IS
    'says that messages are handled; in the transaction of what was done for them, that happens once. How many there were';

CREATE FUNCTION :"schema".inbox_fail(
    consumer_group text,
    id text,
    error text,
    attempts_max integer DEFAULT 6,
    backoff_min interval DEFAULT '1 second',
    backoff_max interval DEFAULT '1 hour'
) RETURNS boolean
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = :"schema", pg_temp
AS $$
DECLARE
    failed inbox_message;
BEGIN
    UPDATE inbox_message AS m
    SET error = inbox_fail.error, is_claimed = false,
        status = CASE WHEN m.attempts >= attempts_max THEN 'dead' ELSE m.status END,
        owes_letter = m.attempts >= attempts_max AND s.owes_letters,
        due_at = clock_timestamp() + least(backoff_min * 2 ^ least(greatest(m.attempts - 1, 0), 30), backoff_max)
    FROM inbox_source AS s
    WHERE s.consumer_group = inbox_fail.consumer_group AND m.source = s.id
      AND m.id = message_uuid(inbox_fail.id) AND m.status || '' = 'stored'
    RETURNING m.* INTO failed;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    -- Those that were claimed with it are to be claimed again, and were not tried.
    UPDATE inbox_message AS m
    SET due_at = clock_timestamp(), attempts = greatest(m.attempts - 1, 0), is_claimed = false
    WHERE m.source = failed.source AND m.partition = failed.partition AND m.lane = failed.lane
      AND m.seq > failed.seq AND m.status = 'stored' AND m.due_at > clock_timestamp();
    RETURN true;
END
$$;
COMMENT ON FUNCTION :"schema".inbox_fail IS
    'says why a message was not handled: it is claimed again later, and after attempts_max times it is dead. Those of its key that were claimed after it are not to be handled: they come again. False if it is not there';

-- For applications that consume by themselves: which messages they have handled. Their rows have no place in
-- Kafka: offset 0 of partition -1.

-- Ids that are longer than any that is kept go by their hash, as with those that are received.
CREATE FUNCTION :"schema".received_uuid(id text) RETURNS uuid
LANGUAGE sql
IMMUTABLE
STRICT
PARALLEL SAFE
RETURN :"schema".message_uuid(
    CASE WHEN octet_length(id) > 255 THEN 'sha256:' || encode(sha256(convert_to(id, 'UTF8')), 'hex') ELSE id END
);
COMMENT ON FUNCTION :"schema".received_uuid IS 'what a producer''s id is in inbox';

CREATE FUNCTION :"schema".inbox_record(consumer_group text, topic text, id text) RETURNS boolean
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = :"schema", pg_temp
AS $$
DECLARE
    place integer;
BEGIN
    SELECT s.id INTO place FROM inbox_source AS s
    WHERE s.consumer_group = inbox_record.consumer_group AND s.topic = inbox_record.topic;
    IF NOT FOUND THEN
        INSERT INTO inbox_source (consumer_group, topic) VALUES (inbox_record.consumer_group, inbox_record.topic)
        ON CONFLICT DO NOTHING;
        SELECT s.id INTO place FROM inbox_source AS s
        WHERE s.consumer_group = inbox_record.consumer_group AND s.topic = inbox_record.topic;
    END IF;
    INSERT INTO inbox (kafka_offset, id, source, partition)
    VALUES (0, received_uuid(inbox_record.id), place, -1)
    ON CONFLICT DO NOTHING;
    RETURN FOUND;
END
$$;
COMMENT ON FUNCTION :"schema".inbox_record IS
    'says, in the transaction of what is done for it, that a message is handled. False: it was before. Waits for another transaction that says so, too';

CREATE FUNCTION :"schema".inbox_seen(consumer_group text, topic text, id text) RETURNS boolean
LANGUAGE sql
STABLE
SECURITY DEFINER
SET search_path = :"schema", pg_temp
AS $$
    SELECT EXISTS (
        SELECT FROM inbox AS i
        JOIN inbox_source AS s ON s.id = i.source
        WHERE s.consumer_group = inbox_seen.consumer_group AND s.topic = inbox_seen.topic
          AND i.id = received_uuid(inbox_seen.id)
    )
$$;
COMMENT ON FUNCTION :"schema".inbox_seen IS
    'whether a message was received or recorded. What is not may be at any moment: inbox_record decides';

CREATE FUNCTION :"schema".inbox_forget(consumer_group text, older_than interval, most integer DEFAULT 1000)
RETURNS bigint
LANGUAGE sql
SECURITY DEFINER
SET search_path = :"schema", pg_temp
AS $$
    WITH forgotten AS (
        DELETE FROM inbox WHERE ctid = ANY (ARRAY(
            SELECT i.ctid FROM inbox_source AS s
            CROSS JOIN LATERAL (
                SELECT i.ctid FROM inbox AS i
                WHERE i.source = s.id AND i.partition = -1 AND i.received_at < now() - older_than
                ORDER BY i.received_at
                LIMIT most
            ) AS i
            WHERE s.consumer_group = inbox_forget.consumer_group
            LIMIT most
        ))
        RETURNING 1
    )
    SELECT count(*) FROM forgotten
$$;
COMMENT ON FUNCTION :"schema".inbox_forget IS
    'removes what was recorded by inbox_record for longer than this, at most so many rows: how many. For groups of which no postbox inbox does it';

REVOKE EXECUTE ON FUNCTION :"schema".inbox_claim, :"schema".inbox_done, :"schema".inbox_fail,
    :"schema".inbox_record, :"schema".inbox_seen, :"schema".inbox_forget FROM PUBLIC;

INSERT INTO :"schema".migration (version) VALUES (3);
