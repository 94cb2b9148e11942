-- Debezium's outbox, in the shape that its EventRouter expects by default. Rows need rows.sql.

CREATE SCHEMA debezium;

CREATE TABLE debezium.outbox (
    id uuid NOT NULL,
    aggregatetype varchar(255) NOT NULL,
    aggregateid varchar(255) NOT NULL,
    type varchar(255) NOT NULL,
    payload jsonb,
    CONSTRAINT outbox_pkey PRIMARY KEY (id)
);

CREATE PUBLICATION debezium FOR TABLE debezium.outbox WITH (publish = 'insert');

CREATE FUNCTION bench_insert_debezium(topic text, first bigint, last bigint) RETURNS void
LANGUAGE plpgsql
AS $$
BEGIN
    INSERT INTO debezium.outbox (id, aggregatetype, aggregateid, type, payload)
    SELECT gen_random_uuid(), topic, 'k' || (i % 1000), 'changed', bench_payload(i)::jsonb
    FROM generate_series(first, last) AS i;
END
$$;
