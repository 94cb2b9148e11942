-- What polling finds new rows by. An insert of 400 bytes costs 26.5 us with it and 25.9 without, and of 100 in a
-- transaction 4.0 and 3.5 each; with a bigint in the place of an xid8 as much, with a hash index too, which is four times
-- as large. A BRIN index costs nothing there, but finds no row: it says which parts of the table to look through.
--
-- Made beside writers, which it does not hold up; not
-- in a transaction. One that was cut short is there and not valid: drop it first.
CREATE INDEX CONCURRENTLY IF NOT EXISTS outbox_xid_idx ON :"schema".outbox (xid);
