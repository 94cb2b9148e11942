-- What a person needs for `postbox parked` and `postbox cancel`: to see what waits, with its
-- payloads, and to decide about it. Not to send, write or delete an event.
GRANT USAGE ON SCHEMA :"schema" TO :"role";
GRANT SELECT ON :"schema".parked, :"schema".cancellation TO :"role";
GRANT UPDATE (status, due_at, taken_at, awaits_topic, attempts, owes_letter, decided_by, decided_at, reason)
    ON :"schema".parked TO :"role";
GRANT EXECUTE ON FUNCTION :"schema".cancel TO :"role";
-- Why an event was not cancelled.
GRANT SELECT (id, scheduled_at) ON :"schema".outbox TO :"role";
