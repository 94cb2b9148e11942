-- What a relay needs beside the REPLICATION attribute. It reads the outbox through
-- the slot, and from the table what a lost slot has missed.
GRANT CONNECT ON DATABASE :"DBNAME" TO :"role";
GRANT USAGE ON SCHEMA :"schema" TO :"role";
GRANT SELECT, UPDATE ON :"schema".checkpoint TO :"role";
GRANT SELECT, INSERT, UPDATE ON :"schema".slice TO :"role";
GRANT SELECT ON :"schema".migration, :"schema".outbox, :"schema".cancellation TO :"role";
GRANT SELECT, INSERT, UPDATE, DELETE ON :"schema".parked TO :"role";
GRANT EXECUTE ON FUNCTION :"schema".publication_identity, :"schema".is_settled TO :"role";
