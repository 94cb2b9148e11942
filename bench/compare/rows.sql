-- What each carrier is given: the same payloads of some 395 bytes, of which 320 hardly compress.
-- Only the call of a function needs the table it is for.

-- Written as jsonb prints it, so that json and jsonb columns hold the same bytes.
CREATE FUNCTION bench_payload(i bigint) RETURNS text
LANGUAGE sql IMMUTABLE
AS $$
    SELECT format('{"n": %s, "data": "%s", "note": "the customer changed the order by phone"}', i,
        (SELECT string_agg(md5(i || ':' || part), '' ORDER BY part) FROM generate_series(1, 10) AS part))
$$;

-- Each of these functions inserts the rows first to last, inclusive, with one statement.
CREATE FUNCTION bench_insert_postbox(topic text, first bigint, last bigint) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload)
    SELECT topic, 'k' || (i % 1000), 'changed', bench_payload(i)::json
    FROM generate_series(first, last) AS i;
END
$$;

-- Rows 0 to `rows` - 1, by the function `insert`.
CREATE PROCEDURE bench_load(insert text, topic text, rows bigint, rows_per_transaction bigint)
LANGUAGE plpgsql
AS $$
BEGIN
    PERFORM set_config('synchronous_commit', 'off', false);
    FOR n IN 0..rows - 1 BY rows_per_transaction LOOP
        EXECUTE format('SELECT %I($1, $2, $3)', insert)
            USING topic, n, least(n + rows_per_transaction, rows) - 1;
        COMMIT;
    END LOOP;
    PERFORM set_config('synchronous_commit', 'on', false);
END
$$;
