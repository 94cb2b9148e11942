-- What who cleans up a partitioned outbox needs besides: rows of the default partition are deleted one by
-- one, and whole partitions dropped.
GRANT SELECT, DELETE ON :"schema".outbox_default TO :"role";
GRANT EXECUTE ON FUNCTION :"schema".partitions, :"schema".hold_partition, :"schema".drop_partition TO :"role";
