-- Makes the partitions that are to be there by now, as each relay does every minute.
SELECT * FROM :"schema".make_partitions();
