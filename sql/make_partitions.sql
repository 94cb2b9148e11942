-- Makes the partitions that are to be there by now, as each relay does every few minutes.
SELECT * FROM :"schema".make_partitions();
