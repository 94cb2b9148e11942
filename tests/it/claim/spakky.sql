-- The outbox of spakky-sqlalchemy 6.4.0 as its package makes it (a test compares the two), and a view by which the
-- oracle's writers write to it as they do to postbox.outbox. Its records have an id only if a row's headers do.
CREATE TABLE spakky_event_outbox (
    id uuid PRIMARY KEY,
    event_name text NOT NULL,
    payload bytea NOT NULL,
    headers json NOT NULL,
    created_at timestamptz NOT NULL,
    published_at timestamptz,
    retry_count integer NOT NULL,
    claimed_at timestamptz
);
CREATE INDEX ix_spakky_event_outbox_pending ON spakky_event_outbox (published_at, created_at);

CREATE SCHEMA postbox;
CREATE VIEW postbox.outbox AS
    SELECT id, event_name AS aggregate_type, headers ->> 'key' AS aggregate_id, event_name AS event_type,
        convert_from(payload, 'UTF8')::json AS payload
    FROM spakky_event_outbox;
CREATE FUNCTION postbox.insert() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.id = gen_random_uuid();
    INSERT INTO spakky_event_outbox (id, event_name, payload, headers, created_at, retry_count)
    VALUES (NEW.id, NEW.aggregate_type, convert_to(NEW.payload::text, 'UTF8'),
        json_build_object('id', NEW.id, 'key', NEW.aggregate_id), clock_timestamp(), 0);
    RETURN NEW;
END
$$;
CREATE TRIGGER insert INSTEAD OF INSERT ON postbox.outbox FOR EACH ROW EXECUTE FUNCTION postbox.insert();
