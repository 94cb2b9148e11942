-- What polling finds new rows by. Made beside writers, which it does not hold up; not
-- in a transaction. One that was cut short is there and not valid: drop it first.
CREATE INDEX CONCURRENTLY IF NOT EXISTS outbox_xid_idx ON :"schema".outbox (xid);
