-- What an application needs to write events, and nothing to read them by.
GRANT USAGE ON SCHEMA :"schema" TO :"role";
GRANT INSERT ON :"schema".outbox TO :"role";
-- INSERT ... RETURNING id.
GRANT SELECT (seq, id) ON :"schema".outbox TO :"role";
GRANT EXECUTE ON FUNCTION :"schema".emit, :"schema".cancel TO :"role";
-- emit looks the first event up.
GRANT SELECT (key, id) ON :"schema".idempotency TO :"role";
