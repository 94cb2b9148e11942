-- Migration 1: the outbox, its idempotency keys, and what a relay knows.
--
-- By hand: psql -v ON_ERROR_STOP=1 -1 -v schema=postbox -f sql/schema.sql -f sql/0001_outbox.sql
--
-- psql does not interpolate inside dollar quotes: functions name their schema
-- once, in SET search_path, and use plain names in their bodies.

CREATE TABLE :"schema".migration (
    version integer PRIMARY KEY,
    applied_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE :"schema".migration IS 'which versions of this schema have been applied';

CREATE TABLE :"schema".outbox (
    -- CACHE 1: with a larger cache, sessions take numbers in blocks, and seq no
    -- longer rises with the commits of writers that wait for each other.
    seq bigint GENERATED ALWAYS AS IDENTITY (CACHE 1),
    id uuid NOT NULL DEFAULT gen_random_uuid(),
    aggregate_type text NOT NULL,
    aggregate_id text NOT NULL,
    event_type text NOT NULL,
    topic text,
    partition_key text,
    payload json,
    headers json,
    schema_version text,
    trace_id text,
    correlation_id text,
    causation_id text,
    traceparent text DEFAULT nullif(current_setting('postbox.traceparent', true), ''),
    idempotency_key text,
    scheduled_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(),
    CONSTRAINT outbox_pkey PRIMARY KEY (seq),
    CONSTRAINT headers_is_an_object CHECK (json_typeof(headers) = 'object')
);
COMMENT ON TABLE :"schema".outbox IS 'events to publish, one row each: append-only, never updated';
COMMENT ON COLUMN :"schema".outbox.seq IS 'order of insertion; always given by the table';
COMMENT ON COLUMN :"schema".outbox.id IS 'identity of the event: consumers drop a repeated one';
COMMENT ON COLUMN :"schema".outbox.aggregate_type IS 'kind of the thing the event is about; the topic, unless routed otherwise';
COMMENT ON COLUMN :"schema".outbox.aggregate_id IS 'the thing the event is about; the record key, unless partition_key is set';
COMMENT ON COLUMN :"schema".outbox.event_type IS 'what happened';
COMMENT ON COLUMN :"schema".outbox.topic IS 'topic of this event alone; null: the relay''s route decides';
COMMENT ON COLUMN :"schema".outbox.partition_key IS 'record key; null: aggregate_id. Events of one key keep their order';
COMMENT ON COLUMN :"schema".outbox.payload IS 'sent as it was written, byte for byte; null is a tombstone (a record without a value)';
COMMENT ON COLUMN :"schema".outbox.headers IS 'record headers of the application: a JSON object of strings';
COMMENT ON COLUMN :"schema".outbox.schema_version IS 'version of the payload''s schema; null: the format''s default';
COMMENT ON COLUMN :"schema".outbox.trace_id IS 'trace the event belongs to';
COMMENT ON COLUMN :"schema".outbox.correlation_id IS 'conversation the event belongs to';
COMMENT ON COLUMN :"schema".outbox.causation_id IS 'message or command that caused the event';
COMMENT ON COLUMN :"schema".outbox.traceparent IS 'W3C trace context; SET LOCAL postbox.traceparent fills it for a transaction';
COMMENT ON COLUMN :"schema".outbox.idempotency_key IS 'a row whose key is taken is not inserted; see idempotency';
COMMENT ON COLUMN :"schema".outbox.scheduled_at IS 'not to be sent before; null: at once';
COMMENT ON COLUMN :"schema".outbox.created_at IS 'start of the transaction; the record''s timestamp';
COMMENT ON COLUMN :"schema".outbox.xid IS 'inserting transaction, which recovery compares with snapshots: leave it to its default';

CREATE TABLE :"schema".idempotency (
    key text NOT NULL,
    id uuid NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT idempotency_pkey PRIMARY KEY (key)
);
COMMENT ON TABLE :"schema".idempotency IS
    'keys that are taken. Apart from the outbox, which so needs no unique constraint and can be partitioned';
COMMENT ON COLUMN :"schema".idempotency.id IS 'the event that came first';

CREATE TABLE :"schema".checkpoint (
    name text NOT NULL,
    mode text NOT NULL,
    lsn pg_lsn,
    snapshot pg_snapshot,
    second_snapshot pg_snapshot,
    seq bigint,
    system_identifier text,
    timeline integer,
    publication text,
    publication_identity text,
    owner text,
    epoch bigint NOT NULL DEFAULT 0,
    expires_at timestamptz,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT checkpoint_pkey PRIMARY KEY (name),
    CONSTRAINT mode_is_wal_or_poll CHECK (mode IN ('wal', 'poll')),
    CONSTRAINT lsn_comes_with_its_snapshot CHECK (lsn IS NULL OR snapshot IS NOT NULL)
);
COMMENT ON TABLE :"schema".checkpoint IS 'where each relay is: one row per relay';
COMMENT ON COLUMN :"schema".checkpoint.name IS 'the relay; with mode wal, its replication slot';
COMMENT ON COLUMN :"schema".checkpoint.lsn IS
    'everything that committed before it is delivered. Mode wal and null: set-up or recovery has not finished, and the slot, if it exists, was never read';
COMMENT ON COLUMN :"schema".checkpoint.snapshot IS
    'every row it sees is delivered or given up: recovery publishes the others';
COMMENT ON COLUMN :"schema".checkpoint.second_snapshot IS
    'end of the window being read from the table: with polling, and after a recovery';
COMMENT ON COLUMN :"schema".checkpoint.seq IS 'how far that window has been delivered';
COMMENT ON COLUMN :"schema".checkpoint.system_identifier IS
    'the cluster that lsn and snapshots belong to; in another one they mean nothing. Null: set-up has not finished';
COMMENT ON COLUMN :"schema".checkpoint.publication_identity IS
    'what publication_identity() said when the slot was made: any change since may have hidden rows from it';
COMMENT ON COLUMN :"schema".checkpoint.owner IS 'polling: the process that holds the lease';
COMMENT ON COLUMN :"schema".checkpoint.epoch IS 'rises with each owner, and each write names its own';
COMMENT ON COLUMN :"schema".checkpoint.expires_at IS 'polling: end of the lease, by this server''s clock';

-- Each mark is written to all slices of a relay: pages with room keep that off the index.
CREATE TABLE :"schema".slice (
    name text NOT NULL,
    slice integer NOT NULL,
    snapshot pg_snapshot NOT NULL,
    second_snapshot pg_snapshot,
    seq bigint,
    owner text,
    epoch bigint NOT NULL DEFAULT 0,
    expires_at timestamptz,
    wanted_by text,
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT slice_pkey PRIMARY KEY (name, slice),
    CONSTRAINT slice_is_of_a_relay FOREIGN KEY (name) REFERENCES :"schema".checkpoint (name) ON DELETE CASCADE,
    CONSTRAINT slice_is_one_of_64 CHECK (slice BETWEEN 0 AND 63)
) WITH (fillfactor = 10);
COMMENT ON TABLE :"schema".slice IS
    'polling with --shards: where each slice of the record keys is, and who has it. Where a relay has rows here, they count and not its checkpoint';
COMMENT ON COLUMN :"schema".slice.snapshot IS 'every row of the slice that it sees is delivered or given up';
COMMENT ON COLUMN :"schema".slice.second_snapshot IS 'end of the window being read';
COMMENT ON COLUMN :"schema".slice.seq IS 'how far that window has been delivered';
COMMENT ON COLUMN :"schema".slice.owner IS 'the process that holds the lease';
COMMENT ON COLUMN :"schema".slice.epoch IS 'rises with each owner, and each write names its own';
COMMENT ON COLUMN :"schema".slice.expires_at IS 'end of the lease, by this server''s clock';
COMMENT ON COLUMN :"schema".slice.wanted_by IS 'the process for which the owner is to give the slice up';

-- A taken key is found by ON CONFLICT, which waits for a transaction that has
-- inserted the key and not ended yet. In READ COMMITTED the second writer then
-- inserts nothing, or its own row if the first rolled back. In REPEATABLE READ
-- and SERIALIZABLE it gets a serialization failure (40001), as it cannot see the
-- first event: its transaction must be tried again.
--
-- SECURITY DEFINER: a writer needs no right to write idempotency itself.
CREATE FUNCTION :"schema".take_idempotency_key() RETURNS trigger
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = :"schema", pg_temp
AS $$
BEGIN
    INSERT INTO idempotency (key, id) VALUES (NEW.idempotency_key, NEW.id)
    ON CONFLICT DO NOTHING;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION :"schema".take_idempotency_key() IS 'drops a row whose idempotency key is taken';
REVOKE EXECUTE ON FUNCTION :"schema".take_idempotency_key() FROM PUBLIC;

CREATE TRIGGER take_idempotency_key
    BEFORE INSERT ON :"schema".outbox
    FOR EACH ROW
    WHEN (NEW.idempotency_key IS NOT NULL)
    EXECUTE FUNCTION :"schema".take_idempotency_key();

CREATE FUNCTION :"schema".emit(
    aggregate_type text,
    aggregate_id text,
    event_type text,
    payload json,
    topic text = NULL,
    partition_key text = NULL,
    headers json = NULL,
    schema_version text = NULL,
    trace_id text = NULL,
    correlation_id text = NULL,
    causation_id text = NULL,
    idempotency_key text = NULL,
    scheduled_at timestamptz = NULL,
    id uuid = NULL
) RETURNS uuid
LANGUAGE plpgsql
SET search_path = :"schema", pg_temp
AS $$
DECLARE
    event uuid := coalesce(emit.id, gen_random_uuid());
    inserted bigint;
    first uuid;
BEGIN
    LOOP
        INSERT INTO outbox (
            id, aggregate_type, aggregate_id, event_type, payload, topic, partition_key, headers, schema_version,
            trace_id, correlation_id, causation_id, idempotency_key, scheduled_at
        ) VALUES (
            event, emit.aggregate_type, emit.aggregate_id, emit.event_type, emit.payload, emit.topic,
            emit.partition_key, emit.headers, emit.schema_version, emit.trace_id, emit.correlation_id,
            emit.causation_id, emit.idempotency_key, emit.scheduled_at
        );
        -- Not RETURNING: that would need the right to read the outbox.
        GET DIAGNOSTICS inserted = ROW_COUNT;
        IF inserted > 0 THEN
            RETURN event;
        END IF;

        SELECT idempotency.id INTO first FROM idempotency WHERE idempotency.key = emit.idempotency_key;
        IF FOUND THEN
            RETURN first;
        ELSIF emit.idempotency_key IS NULL THEN
            RAISE EXCEPTION 'another trigger of the outbox dropped the event';
        END IF;
        -- The key was removed just now: it is free again.
    END LOOP;
END
$$;
COMMENT ON FUNCTION :"schema".emit IS
    'writes one event in the caller''s transaction and returns its id; with a taken idempotency key it writes nothing and returns the id of the first event';
REVOKE EXECUTE ON FUNCTION :"schema".emit FROM PUBLIC;

-- A slot skips, without a word, what was committed while its publication did not
-- hold the table, though the publication has the same name before and after. So
-- a relay compares this text and not the name. oid and xmin tell a row that was
-- made again, or changed, from the one that was there before.
CREATE FUNCTION :"schema".publication_identity(publication name) RETURNS text
LANGUAGE plpgsql
STABLE
SET search_path = :"schema", pg_temp
AS $$
DECLARE
    identity text;
    tables text;
    schemas text;
BEGIN
    -- to_jsonb: later versions have more options than earlier ones.
    SELECT format('publication %s@%s %s', p.oid, p.xmin, to_jsonb(p) - '{oid,pubname,pubowner}'::text[])
    INTO identity
    FROM pg_publication AS p
    WHERE p.pubname = publication_identity.publication;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;

    SELECT string_agg(format(' table %s@%s:%s', r.oid, r.xmin, r.prrelid), '' ORDER BY r.oid)
    INTO tables
    FROM pg_publication_rel AS r
    JOIN pg_publication AS p ON p.oid = r.prpubid
    WHERE p.pubname = publication_identity.publication;

    IF current_setting('server_version_num')::integer >= 150000 THEN
        SELECT string_agg(format(' schema %s@%s:%s', n.oid, n.xmin, n.pnnspid), '' ORDER BY n.oid)
        INTO schemas
        FROM pg_publication_namespace AS n
        JOIN pg_publication AS p ON p.oid = n.pnpubid
        WHERE p.pubname = publication_identity.publication;
    END IF;

    RETURN concat(identity, tables, schemas);
END
$$;
COMMENT ON FUNCTION :"schema".publication_identity IS
    'changes when a publication, its tables or its options change, also when they change back; null if there is none';
REVOKE EXECUTE ON FUNCTION :"schema".publication_identity FROM PUBLIC;

INSERT INTO :"schema".migration (version) VALUES (1);
