-- The schema of the outbox. Made only where it is missing, so that a role
-- without CREATE on the database can work in one that was prepared for it.
CREATE SCHEMA :"schema";
COMMENT ON SCHEMA :"schema" IS 'transactional outbox, relayed to Kafka by postbox';
