-- What the server must offer, looked at before anything is made.
SET postbox.slot = :'slot';

DO $$
DECLARE
    wanted CONSTANT text := current_setting('postbox.slot');
    slots CONSTANT bigint := current_setting('max_replication_slots')::bigint;
    there pg_replication_slots;
    why text;
BEGIN
    IF current_setting('server_version_num')::integer < 140000 THEN
        RAISE 'Postgres % is too old: postbox needs 14 or later', current_setting('server_version');
    END IF;
    IF current_setting('wal_level') <> 'logical' THEN
        RAISE 'wal_level is "%" and must be "logical"', current_setting('wal_level')
        USING HINT = 'ALTER SYSTEM SET wal_level = logical; then restart Postgres.';
    END IF;

    SELECT * INTO there FROM pg_replication_slots WHERE slot_name = wanted;
    IF NOT FOUND THEN
        IF (SELECT count(*) FROM pg_replication_slots) >= slots THEN
            RAISE 'no replication slot is free, max_replication_slots is %', slots
            USING HINT = format(
                'Drop one that nothing reads, or ALTER SYSTEM SET max_replication_slots = %s; then restart Postgres.',
                slots + 4
            );
        END IF;
        RETURN;
    END IF;
    why := CASE
        WHEN there.slot_type <> 'logical' THEN format('is %s and must be logical', there.slot_type)
        WHEN there.plugin <> 'pgoutput' THEN format('has output plugin "%s" and must have "pgoutput"', there.plugin)
        WHEN there.database <> current_database() THEN format('belongs to database "%s"', there.database)
        WHEN there.temporary THEN 'is temporary, and goes with the session that made it'
    END;
    IF why IS NOT NULL THEN
        RAISE 'replication slot "%" %', wanted, why
        USING HINT = 'Choose another name with --slot.';
    END IF;
END
$$;
