-- An order and its event, in one transaction.
--
--   postbox setup --database-url postgres://me@localhost/shop
--   psql -v ON_ERROR_STOP=1 -f examples/emit.sql postgres://me@localhost/shop
--
-- Run again, it writes one event and not two: order_placed has an idempotency key.
CREATE TABLE IF NOT EXISTS shop_order (id text PRIMARY KEY, cents bigint);

BEGIN;

-- Writers of one key wait for each other before they write its event: so its
-- events keep the order of the changes they tell of.
INSERT INTO shop_order VALUES ('43', 1700) ON CONFLICT (id) DO UPDATE SET cents = excluded.cents;

-- A transaction's events carry its trace.
SET LOCAL postbox.traceparent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01';

SELECT postbox.emit(
    'order', '43', 'order_placed',
    payload => '{"order": "43", "cents": 1700}',
    headers => '{"source": "examples/emit.sql"}',
    idempotency_key => 'order_placed 43'
) AS id;

-- The same key again writes nothing and returns the same id.
SELECT postbox.emit('order', '43', 'order_placed', '{}', idempotency_key => 'order_placed 43') AS id;

-- A plain INSERT will do as well.
INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload)
VALUES ('order', '43', 'order_paid', '{"order": "43"}')
RETURNING id;

COMMIT;
