-- What a relay needs besides, to keep partitions made ahead.
GRANT EXECUTE ON FUNCTION :"schema".make_partitions TO :"role";
