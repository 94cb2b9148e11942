-- What a relay needs beside the REPLICATION attribute. It reads the outbox through
-- the slot, and from the table what a lost slot has missed.
GRANT CONNECT ON DATABASE :"DBNAME" TO :"role";
GRANT USAGE ON SCHEMA :"schema" TO :"role";
GRANT SELECT, UPDATE ON :"schema".checkpoint TO :"role";
GRANT SELECT, INSERT, UPDATE ON :"schema".slice TO :"role";
GRANT SELECT ON :"schema".migration, :"schema".outbox TO :"role";
GRANT EXECUTE ON FUNCTION :"schema".publication_identity TO :"role";
