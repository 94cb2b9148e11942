-- What the slot sends: inserts into this one table. A partitioned outbox goes
-- out under its own name, not under that of its partitions.
--
-- By hand: psql -v publication=postbox -v table_schema=postbox -v table=outbox -f sql/publication.sql
CREATE PUBLICATION :"publication" FOR TABLE :"table_schema".:"table"
    WITH (publish = 'insert', publish_via_partition_root = true);
COMMENT ON PUBLICATION :"publication" IS
    'read by postbox, which stops when this publication is changed or made again';
