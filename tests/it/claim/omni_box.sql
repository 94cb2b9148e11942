-- The outbox of omni-box 0.3.1 as its package makes it (a test compares the two), and a view by which the oracle's
-- writers write to it as they do to postbox.outbox.
CREATE TABLE outbox_events (
    id uuid PRIMARY KEY,
    event_type varchar(100) NOT NULL,
    payload jsonb NOT NULL,
    headers jsonb,
    trace_id varchar(64),
    idempotency_key varchar(128),
    correlation_id varchar(64),
    causation_id varchar(64),
    schema_version varchar(50),
    status varchar(20) NOT NULL,
    attempts_made integer NOT NULL,
    max_attempts integer NOT NULL,
    last_error varchar(2000),
    scheduled_at timestamptz NOT NULL,
    completed_at timestamptz,
    locked_at timestamptz,
    locked_by varchar(255),
    created_at timestamptz NOT NULL DEFAULT timezone('UTC', now()),
    updated_at timestamptz DEFAULT timezone('UTC', now()),
    aggregate_type varchar(50) NOT NULL,
    aggregate_id uuid NOT NULL,
    topic varchar(255) NOT NULL,
    partition_key varchar(255) NOT NULL,
    CONSTRAINT ck_outbox_events_attempts_valid CHECK (attempts_made <= max_attempts),
    CONSTRAINT ck_outbox_events_completed_status_consistency CHECK (
        (status = 'completed' AND completed_at IS NOT NULL) OR (status <> 'completed' AND completed_at IS NULL)),
    CONSTRAINT ck_outbox_events_lock_consistency CHECK (
        (locked_at IS NULL AND locked_by IS NULL) OR (locked_at IS NOT NULL AND locked_by IS NOT NULL))
);
CREATE INDEX idx_outbox_events_pending_fetch ON outbox_events (scheduled_at)
    WHERE status = 'pending' AND locked_at IS NULL AND attempts_made < max_attempts;
CREATE INDEX idx_outbox_events_locked_at ON outbox_events (locked_at) WHERE locked_at IS NOT NULL;
CREATE INDEX idx_outbox_events_completed_cleanup ON outbox_events (completed_at)
    WHERE status = 'completed' AND completed_at IS NOT NULL;
CREATE UNIQUE INDEX idx_outbox_events_idempotency_key ON outbox_events (idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX idx_outbox_events_created_at ON outbox_events (created_at);
CREATE INDEX idx_outbox_events_updated_at ON outbox_events (updated_at);
CREATE INDEX idx_outbox_events_pending_key_order ON outbox_events (topic, partition_key, created_at)
    WHERE status = 'pending';

CREATE SCHEMA postbox;
CREATE VIEW postbox.outbox AS
    SELECT id, topic AS aggregate_type, partition_key AS aggregate_id, event_type, payload::json AS payload
    FROM outbox_events;
-- The writer of a key holds it until it commits: so its times rise.
CREATE FUNCTION postbox.insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.id = gen_random_uuid();
    INSERT INTO outbox_events (id, event_type, payload, status, attempts_made, max_attempts, scheduled_at, created_at,
        aggregate_type, aggregate_id, topic, partition_key)
    SELECT NEW.id, NEW.event_type, NEW.payload, 'pending', 0, 6, now, now, 'order', md5(NEW.aggregate_id)::uuid,
        NEW.aggregate_type, NEW.aggregate_id
    FROM clock_timestamp() AS now;
    RETURN NEW;
END
$$;
CREATE TRIGGER insert INSTEAD OF INSERT ON postbox.outbox FOR EACH ROW EXECUTE FUNCTION postbox.insert();
