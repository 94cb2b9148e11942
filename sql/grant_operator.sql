-- What a person needs for `postbox parked`, `postbox cancel` and `postbox inbox list`, `show`, `retry` and
-- `skip`: to see what waits, with its payloads, and to decide about it. Not to send, write or delete an event,
-- nor to handle or delete a message.
GRANT USAGE ON SCHEMA :"schema" TO :"role";
GRANT SELECT ON :"schema".parked, :"schema".cancellation TO :"role";
GRANT UPDATE (status, due_at, taken_at, awaits_topic, attempts, owes_letter, decided_by, decided_at, reason)
    ON :"schema".parked TO :"role";
GRANT EXECUTE ON FUNCTION :"schema".cancel TO :"role";
-- Why an event was not cancelled.
GRANT SELECT (id, scheduled_at) ON :"schema".outbox TO :"role";
GRANT SELECT ON :"schema".inbox_source, :"schema".inbox_message TO :"role";
GRANT UPDATE (status, due_at, attempts, is_claimed, owes_letter, decided_by, decided_at, reason)
    ON :"schema".inbox_message TO :"role";
