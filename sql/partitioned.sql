-- Makes an outbox partitioned by created_at: one that is empty, and that no relay reads yet, as a
-- publication holds the table and not its name.
--
-- By hand, after 0002: psql -v ON_ERROR_STOP=1 -1 -v schema=postbox -v partitioned=day -f sql/partitioned.sql \
--     -f sql/partition_width.sql -f sql/make_partitions.sql
SET search_path = :"schema", pg_temp;
-- A policy that hides rows of the outbox must be an error.
SET row_security = off;

DO $$
DECLARE
    statement text;
    again CONSTANT text[] := array(
        SELECT pg_get_indexdef(indexrelid) FROM pg_index
        WHERE indrelid = 'outbox'::regclass AND NOT indisprimary ORDER BY indexrelid
    ) || array(
        SELECT pg_get_triggerdef(oid) FROM pg_trigger
        WHERE tgrelid = 'outbox'::regclass AND NOT tgisinternal ORDER BY oid
    ) || format('COMMENT ON TABLE outbox IS %L', obj_description('outbox'::regclass, 'pg_class'));
BEGIN
    LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM checkpoint) OR EXISTS (SELECT FROM outbox) THEN
        RAISE 'the outbox is not partitioned, and has rows or a relay already'
        USING HINT = 'Set a partitioned one up in another schema, with another slot and publication, have applications write there, and let the relay of this one end its work.';
    END IF;
    CREATE TABLE outbox_partitioned (LIKE outbox INCLUDING ALL EXCLUDING INDEXES) PARTITION BY RANGE (created_at);
    DROP TABLE outbox;
    ALTER TABLE outbox_partitioned RENAME TO outbox;
    ALTER SEQUENCE outbox_partitioned_seq_seq RENAME TO outbox_seq_seq;
    -- A primary key has the key of the partitions in it.
    ALTER TABLE outbox ADD CONSTRAINT outbox_pkey PRIMARY KEY (created_at, seq);
    -- What is read in order is read by it.
    CREATE INDEX outbox_seq_idx ON outbox (seq);
    FOREACH statement IN ARRAY again LOOP
        EXECUTE statement;
    END LOOP;
    CREATE TABLE outbox_default PARTITION OF outbox DEFAULT;
    COMMENT ON TABLE outbox_default IS
        'rows for which there is no partition, which are sent as all others are; rows of a time still to come keep it from having one';
END
$$;

CREATE TABLE partitioning (
    only_row boolean NOT NULL DEFAULT true,
    width interval NOT NULL DEFAULT '1 day',
    ahead interval NOT NULL DEFAULT '7 days',
    CONSTRAINT partitioning_pkey PRIMARY KEY (only_row),
    CONSTRAINT there_is_one_row CHECK (only_row),
    CONSTRAINT width_is_of_a_fixed_length CHECK (width >= '1 second' AND width < '28 days')
);
COMMENT ON TABLE partitioning IS 'how make_partitions partitions the outbox';
COMMENT ON COLUMN partitioning.width IS 'of partitions that are made from now on: 1 day or 1 hour, counted from midnight UTC';
COMMENT ON COLUMN partitioning.ahead IS 'for how long from now on there are to be partitions';
INSERT INTO partitioning DEFAULT VALUES;

RESET row_security;
RESET search_path;

CREATE FUNCTION :"schema".partitions(OUT partition regclass, OUT since timestamptz, OUT until timestamptz)
RETURNS SETOF record
LANGUAGE sql
STABLE
SET search_path = :"schema", pg_temp
-- What bounds are printed with, and read.
SET timezone = 'UTC'
SET datestyle = 'ISO'
AS $$
    SELECT c.oid, replace(bounds[1], 'MINVALUE', '-infinity')::timestamptz,
        replace(bounds[2], 'MAXVALUE', 'infinity')::timestamptz
    FROM pg_inherits AS i
    JOIN pg_class AS c ON c.oid = i.inhrelid,
        -- The default partition has none.
        regexp_match(pg_get_expr(c.relpartbound, c.oid), '\(''?([^'')]*)''?\) TO \(''?([^'')]*)''?\)') AS bounds
    WHERE i.inhparent = 'outbox'::regclass AND bounds IS NOT NULL
    ORDER BY 2
$$;
COMMENT ON FUNCTION :"schema".partitions IS
    'the partitions of the outbox but for the default one: rows with created_at from since on and before until';
REVOKE EXECUTE ON FUNCTION :"schema".partitions FROM PUBLIC;

-- A partition is made by itself and then attached. CREATE TABLE ... PARTITION OF would lock the
-- outbox against all; ATTACH only locks the default partition, which ordinary rows do not come to.
-- But a row that has been sent to the default partition and waits for that lock is an error once
-- its own partition is there: so while one is made that rows may come to now, writers wait.
--
-- A row is never moved out of the default partition: a slot would send it again. Where it has
-- rows of a time, that time gets no partition, and cleaning up removes them one by one.
--
-- SECURITY DEFINER: a relay owns no table.
CREATE FUNCTION :"schema".make_partitions(
    OUT made bigint,
    OUT skipped bigint,
    OUT seconds_ahead double precision,
    OUT default_rows bigint
)
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = :"schema", pg_temp
SET timezone = 'UTC'
SET datestyle = 'ISO'
-- What else waits for what is waited for, waits as long.
SET lock_timeout = '500ms'
AS $$
DECLARE
    plan partitioning;
    origin CONSTANT timestamptz := '2000-01-01';
    begins timestamptz;
    ends timestamptz;
    name text;
    gapless timestamptz;
BEGIN
    made := 0;
    skipped := 0;
    -- One at a time.
    SELECT * INTO STRICT plan FROM partitioning FOR UPDATE;
    begins := date_bin(plan.width, now(), origin);
    IF NOT EXISTS (SELECT FROM partitions()) THEN
        -- For transactions that have begun, and clocks that are behind.
        begins := begins - plan.width;
    END IF;
    gapless := begins;
    WHILE begins < now() + plan.ahead LOOP
        SELECT p.until INTO ends FROM partitions() AS p WHERE p.since <= begins AND p.until > begins;
        IF NOT FOUND THEN
            -- Up to what there is, of another width or made by hand.
            SELECT least(date_bin(plan.width, begins, origin) + plan.width, min(p.since)) INTO ends
            FROM partitions() AS p WHERE p.since > begins;
            IF EXISTS (SELECT FROM outbox_default AS d WHERE d.created_at >= begins AND d.created_at < ends) THEN
                skipped := skipped + 1;
            ELSE
                IF begins < now() + plan.width THEN
                    LOCK TABLE ONLY outbox IN SHARE ROW EXCLUSIVE MODE;
                END IF;
                name := 'outbox_' || to_char(begins, CASE
                    WHEN plan.width >= interval '1 day' AND begins = date_trunc('day', begins) THEN 'YYYYMMDD'
                    WHEN plan.width >= interval '1 hour' AND begins = date_trunc('hour', begins) THEN 'YYYYMMDDHH24'
                    ELSE 'YYYYMMDDHH24MISS'
                END);
                EXECUTE format('CREATE TABLE %I (LIKE outbox INCLUDING ALL EXCLUDING IDENTITY EXCLUDING INDEXES EXCLUDING COMMENTS)', name);
                EXECUTE format('ALTER TABLE outbox ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)', name, begins, ends);
                made := made + 1;
            END IF;
        END IF;
        begins := ends;
        IF skipped = 0 THEN
            gapless := ends;
        END IF;
    END LOOP;
    seconds_ahead := greatest(extract(epoch FROM least(gapless, now() + plan.ahead + plan.width) - now()), 0);
    SELECT count(*) INTO default_rows FROM (SELECT FROM outbox_default LIMIT 100000) AS d;
END
$$;
COMMENT ON FUNCTION :"schema".make_partitions IS
    'makes the partitions that are to be there by now. Skipped are times of which the default partition has rows; seconds_ahead: for how long all rows will find one; default_rows: at most 100000';
REVOKE EXECUTE ON FUNCTION :"schema".make_partitions FROM PUBLIC;

-- Dropping a partition, for who may clean up and owns no table: all in one transaction, hold it,
-- look that each of its rows may go, drop it. See src/partitions.rs.
CREATE FUNCTION :"schema".hold_partition(partition regclass) RETURNS boolean
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = :"schema", pg_temp
-- Only who writes to this one waits behind. Longer than a server takes to end its own vacuum of it.
SET lock_timeout = '5s'
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM partitions() AS p WHERE p.partition = hold_partition.partition) THEN
        RETURN false;
    END IF;
    EXECUTE format('LOCK TABLE %s IN SHARE MODE', hold_partition.partition);
    RETURN EXISTS (SELECT FROM partitions() AS p WHERE p.partition = hold_partition.partition);
END
$$;
COMMENT ON FUNCTION :"schema".hold_partition IS
    'waits until nobody writes to this partition, and lets nobody until the transaction ends; false if it is none of the outbox, or the default one';
REVOKE EXECUTE ON FUNCTION :"schema".hold_partition FROM PUBLIC;

CREATE FUNCTION :"schema".drop_partition(partition regclass) RETURNS void
LANGUAGE plpgsql
SECURITY DEFINER
SET search_path = :"schema", pg_temp
-- The outbox is locked against all that use it, and all that come while that is waited for wait, too.
SET lock_timeout = '200ms'
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM partitions() AS p WHERE p.partition = drop_partition.partition) THEN
        RAISE '% is no partition of the outbox, or the default one', drop_partition.partition;
    END IF;
    EXECUTE format('DROP TABLE %s', drop_partition.partition);
END
$$;
COMMENT ON FUNCTION :"schema".drop_partition IS 'drops a partition of the outbox, whatever is in it: hold it first, and look';
REVOKE EXECUTE ON FUNCTION :"schema".drop_partition FROM PUBLIC;
