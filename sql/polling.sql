-- The checkpoint of a relay that polls, for psql, after xid_index.sql: `postbox setup
-- --mode poll` does the same.
--
-- psql -v schema=postbox -v slot=postbox -v backfill=refuse
SET search_path = :"schema", pg_temp;
SET postbox.slot = :'slot';
SET postbox.backfill = :'backfill';
-- A policy that hides rows of the outbox must be an error.
SET row_security = off;

DO $$
DECLARE
    wanted CONSTANT text := current_setting('postbox.slot');
    backfill CONSTANT text := current_setting('postbox.backfill');
    at checkpoint;
BEGIN
    SELECT * INTO at FROM checkpoint WHERE name = wanted;
    IF at.mode = 'wal' THEN
        RAISE 'relay "%" was set up with mode wal', wanted
        USING HINT = 'Run postbox setup --mode poll, which changes it and loses nothing.';
    END IF;
    IF FOUND THEN
        RETURN;
    END IF;
    -- One statement: what it sees of the outbox is what its snapshot sees.
    INSERT INTO checkpoint (name, mode, snapshot, system_identifier, timeline)
    SELECT wanted, 'poll', CASE backfill WHEN 'pending' THEN '3:3:' ELSE pg_current_snapshot() END,
        c.system_identifier,
        ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer
    FROM pg_control_system() AS c
    WHERE backfill <> 'refuse' OR NOT EXISTS (SELECT FROM outbox);
    IF NOT FOUND THEN
        RAISE 'the outbox has rows already'
        USING HINT = 'backfill = pending has them published, backfill = none leaves them unpublished.';
    END IF;
END
$$;

RESET row_security;
RESET search_path;
