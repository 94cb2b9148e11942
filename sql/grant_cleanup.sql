-- What `postbox cleanup` needs, or a relay that cleans up. Not what --forget needs, which is for
-- the owner.
GRANT CONNECT ON DATABASE :"DBNAME" TO :"role";
GRANT USAGE ON SCHEMA :"schema" TO :"role";
GRANT SELECT ON :"schema".migration, :"schema".checkpoint, :"schema".slice TO :"role";
GRANT SELECT, DELETE ON :"schema".outbox, :"schema".parked, :"schema".cancellation, :"schema".idempotency TO :"role";
GRANT EXECUTE ON FUNCTION :"schema".publication_identity, :"schema".is_settled TO :"role";
