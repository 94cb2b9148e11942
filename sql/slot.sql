-- The replication slot and the checkpoint that names it, for psql:
-- `postbox setup` does the same over the replication protocol, where the server
-- tells exactly which rows lie before the slot.
--
-- psql -v schema=postbox -v slot=postbox -v publication=postbox -v backfill=refuse
--
-- After server.sql, which refuses a slot that is not ours to use.
--
-- Not in one transaction: a slot cannot be made in one that has written. So the
-- checkpoint is written first, without a position, and a run that was cut short
-- is known by that: its slot was never read, and is made anew.
SET search_path = :"schema", pg_temp;
SET postbox.slot = :'slot';
SET postbox.publication = :'publication';
SET postbox.backfill = :'backfill';
-- A policy that hides rows of the outbox must be an error.
SET row_security = off;

DO $$
DECLARE
    wanted CONSTANT text := current_setting('postbox.slot');
    there pg_replication_slots;
    at checkpoint;
BEGIN
    SELECT * INTO there FROM pg_replication_slots WHERE slot_name = wanted;
    SELECT * INTO at FROM checkpoint WHERE name = wanted;
    IF at.mode = 'poll' THEN
        RAISE 'relay "%" was set up with mode poll', wanted
        USING HINT = 'Run postbox setup --mode wal, which changes it and loses nothing.';
    END IF;
    IF at.lsn IS NOT NULL THEN
        IF there.slot_name IS NULL THEN
            RAISE 'replication slot "%" is gone, and is not made again: a new one would skip what was committed since %', wanted, at.lsn
            USING HINT = 'Those rows are still in the outbox. Run postbox recover, which loses none of them.';
        END IF;
        IF there.wal_status = 'lost' OR to_jsonb(there) ->> 'invalidation_reason' IS NOT NULL THEN
            RAISE 'replication slot "%" was invalidated by the server', wanted
            USING HINT = 'Run postbox recover, which makes it anew and loses nothing.';
        END IF;
        IF at.publication_identity IS DISTINCT FROM publication_identity(at.publication::name) THEN
            RAISE 'publication "%" is not what it was when the slot was set up', at.publication
            USING HINT = 'Run postbox setup, which says what changed, and then postbox recover.';
        END IF;
        RETURN;
    END IF;
    IF at.system_identifier IS NOT NULL THEN
        RAISE 'the recovery of replication slot "%" has not finished', wanted
        USING HINT = 'Run postbox recover again.';
    END IF;
    IF at.name IS NULL AND there.slot_name IS NOT NULL THEN
        RAISE 'replication slot "%" exists, but no checkpoint names it', wanted
        USING HINT = 'Run postbox setup, which can take it over, or drop it if nothing else reads it.';
    END IF;
    IF current_setting('postbox.backfill') <> 'none' AND EXISTS (SELECT FROM outbox) THEN
        RAISE 'the outbox has rows that were committed before the slot, which would never be published'
        USING HINT = 'backfill = none leaves them unpublished.';
    END IF;
    IF there.slot_name IS NOT NULL THEN
        PERFORM pg_drop_replication_slot(wanted);
    END IF;
    -- The snapshot is older than the slot: what it sees lies before the slot.
    INSERT INTO checkpoint (name, mode, publication, publication_identity, snapshot)
    VALUES (
        wanted, 'wal', current_setting('postbox.publication'),
        publication_identity(current_setting('postbox.publication')), pg_current_snapshot()
    )
    ON CONFLICT (name) DO UPDATE SET
        publication = excluded.publication,
        publication_identity = excluded.publication_identity,
        snapshot = excluded.snapshot,
        updated_at = now();
END
$$;

SELECT slot_name, lsn
FROM pg_create_logical_replication_slot(:'slot', 'pgoutput')
WHERE EXISTS (SELECT FROM checkpoint WHERE name = :'slot' AND lsn IS NULL);

DO $$
DECLARE
    wanted CONSTANT text := current_setting('postbox.slot');
    own xid8;
    deadline CONSTANT timestamptz := clock_timestamp() + interval '60 seconds';
BEGIN
    PERFORM FROM checkpoint WHERE name = wanted AND lsn IS NULL;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    -- What was committed before the slot is seen only once its transaction has ended,
    -- which may wait for a synchronous standby.
    own := pg_current_xact_id();
    WHILE pg_snapshot_xmin(pg_current_snapshot()) < own LOOP
        IF clock_timestamp() > deadline THEN
            PERFORM pg_drop_replication_slot(wanted);
            RAISE 'transactions that were open when the slot was made have stayed open for 60 s'
            USING HINT = 'pg_stat_activity names them in backend_xid. End them and run this again.';
        END IF;
        PERFORM pg_sleep(0.02);
    END LOOP;
    IF current_setting('postbox.backfill') <> 'none' AND EXISTS (SELECT FROM outbox) THEN
        PERFORM pg_drop_replication_slot(wanted);
        RAISE 'rows were committed to the outbox while the slot was being made, and may lie before it'
        USING HINT = 'Stop the writers and run this again, or run it with backfill = none.';
    END IF;
    -- The name of a WAL file begins with the timeline.
    UPDATE checkpoint SET
        lsn = s.confirmed_flush_lsn,
        system_identifier = c.system_identifier,
        timeline = ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer,
        updated_at = now()
    FROM pg_replication_slots AS s, pg_control_system() AS c
    WHERE name = wanted AND s.slot_name = wanted;
END
$$;

RESET row_security;
RESET search_path;
