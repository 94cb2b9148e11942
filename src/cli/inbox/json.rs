//! Messages as JSON. Field names stay as they are: scripts go by them.

use postbox::inbox::stored::Stored;
use postbox::timestamp::Timestamp;
use serde::Serialize;

/// What is known of a message, without what is in it.
#[derive(Serialize)]
pub(super) struct Message<'a> {
    id: &'a str,
    group: &'a str,
    number: i64,
    status: &'static str,
    topic: &'a str,
    partition: i32,
    offset: i64,
    key: Option<&'a str>,
    event_type: &'a str,
    schema_version: Option<&'a str>,
    attempts: i32,
    error: Option<&'a str>,
    received_at: String,
    created_at: Option<String>,
    due_at: Option<String>,
    is_claimed: bool,
    owes_letter: bool,
    decided_by: Option<&'a str>,
    decided_at: Option<String>,
    reason: Option<&'a str>,
}

impl<'a> Message<'a> {
    pub(super) fn of(message: &'a Stored) -> Self {
        let time = |time: Option<Timestamp>| time.map(|time| time.to_string());
        Self {
            id: &message.id,
            group: &message.group,
            number: message.number,
            status: message.status.name(),
            topic: &message.topic,
            partition: message.partition,
            offset: message.offset,
            key: message.key.as_deref(),
            event_type: &message.event_type,
            schema_version: message.schema_version.as_deref(),
            attempts: message.attempts,
            error: message.error.as_deref(),
            received_at: message.received_at.to_string(),
            created_at: time(message.created_at),
            due_at: time(message.due_at),
            is_claimed: message.is_claimed,
            owes_letter: message.owes_letter,
            decided_by: message.decided_by.as_deref(),
            decided_at: time(message.decided_at),
            reason: message.reason.as_deref(),
        }
    }
}
