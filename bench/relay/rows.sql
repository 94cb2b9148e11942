-- What the benches write: the same rows for all, but for the columns of their tables.

-- About 400 bytes of JSON, of which 320 compress no better than business data does.
CREATE FUNCTION bench_payload(n bigint) RETURNS text
    LANGUAGE sql IMMUTABLE AS $$
    SELECT format('{"n": %s, "customer": "customer-%s", "status": "paid", "currency": "EUR", "note": "%s"}',
        n, n % 1000, (SELECT string_agg(md5((n * 10 + part)::text), '') FROM generate_series(1, 10) AS part))
    $$;

CREATE FUNCTION bench_insert_postbox(topic text, first bigint, last bigint) RETURNS void
    LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload)
        SELECT topic, 'k' || n % 1000, 'changed', bench_payload(n)::json
        FROM generate_series(first, last) AS n;
    END
    $$;

-- Rows 0 to `rows` - 1, by the function `insert`.
CREATE PROCEDURE bench_load(insert text, topic text, rows bigint, rows_per_transaction bigint)
    LANGUAGE plpgsql AS $$
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
