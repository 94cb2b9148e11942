-- What a relay needs beside the REPLICATION attribute. It reads the outbox
-- through the slot alone, so it has no right to the table.
GRANT CONNECT ON DATABASE :"DBNAME" TO :"role";
GRANT USAGE ON SCHEMA :"schema" TO :"role";
GRANT SELECT, UPDATE ON :"schema".checkpoint TO :"role";
GRANT SELECT ON :"schema".migration TO :"role";
GRANT EXECUTE ON FUNCTION :"schema".publication_identity TO :"role";
