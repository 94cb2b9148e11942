-- Rows for omni-box, whose table `omni-box create` makes. They need rows.sql.

-- A key for each row, unless bench.keys says how many there are: a batch of omni-box holds one row per key, so that
-- repeated keys slow it down.
CREATE FUNCTION bench_insert_omni_box(topic text, first bigint, last bigint) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO outbox_events (id, event_type, payload, status, attempts_made, max_attempts, scheduled_at, created_at,
        aggregate_type, aggregate_id, topic, partition_key)
    SELECT gen_random_uuid(), 'changed', bench_payload(i)::jsonb, 'pending', 0, 6, now(), now(),
        'bench', gen_random_uuid(), topic,
        'k' || i % coalesce(nullif(current_setting('bench.keys', true), '')::bigint, last + 1)
    FROM generate_series(first, last) AS i;
END
$$;
