-- What an application needs to handle messages by itself, and nothing to read others' by.
GRANT USAGE ON SCHEMA :"schema" TO :"role";
GRANT EXECUTE ON FUNCTION :"schema".inbox_claim, :"schema".inbox_done, :"schema".inbox_fail,
    :"schema".inbox_record, :"schema".inbox_seen, :"schema".inbox_forget TO :"role";
