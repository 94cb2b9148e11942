-- The same of a partitioned outbox, where no index can be made beside writers as a whole. This one is
-- valid once each partition has a part of it: new ones have theirs from the start, and what
-- partition_indexes.sql returns makes those of the others, statement by statement.
CREATE INDEX IF NOT EXISTS outbox_xid_idx ON ONLY :"schema".outbox (xid);
