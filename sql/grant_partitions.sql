-- What a relay needs besides, to keep partitions made ahead.
GRANT SELECT ON :"schema".partitioning TO :"role";
GRANT EXECUTE ON FUNCTION :"schema".make_partitions TO :"role";
