-- What `postbox inbox` needs. Its handler needs its own rights besides.
GRANT CONNECT ON DATABASE :"DBNAME" TO :"role";
GRANT USAGE ON SCHEMA :"schema" TO :"role";
GRANT SELECT ON :"schema".migration TO :"role";
GRANT SELECT, INSERT, UPDATE (partitions, owes_letters) ON :"schema".inbox_source TO :"role";
GRANT SELECT, INSERT, DELETE ON :"schema".inbox TO :"role";
GRANT SELECT, INSERT, UPDATE ON :"schema".inbox_offset, :"schema".inbox_mark TO :"role";
GRANT SELECT, INSERT, UPDATE, DELETE ON :"schema".inbox_message TO :"role";
