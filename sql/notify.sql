-- Wakes a relay that polls as soon as a transaction with events is committed. It is not
-- free: commits that notify wait for each other, one at a time in the whole database.
CREATE OR REPLACE FUNCTION :"schema".notify_relay() RETURNS trigger
LANGUAGE plpgsql
SET search_path = :"schema", pg_temp
AS $$
BEGIN
    PERFORM pg_notify('postbox', '');
    RETURN NULL;
END
$$;
COMMENT ON FUNCTION :"schema".notify_relay() IS 'wakes a relay that polls';
REVOKE EXECUTE ON FUNCTION :"schema".notify_relay() FROM PUBLIC;

CREATE TRIGGER notify_relay
    AFTER INSERT ON :"schema".outbox
    FOR EACH STATEMENT
    EXECUTE FUNCTION :"schema".notify_relay();
