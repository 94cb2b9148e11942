//! Events as JSON. Field names stay as they are: scripts go by them.

use postbox::parked::event::Parked;
use postbox::timestamp::Timestamp;
use serde::Serialize;

/// What is known of an event, without its row.
#[derive(Serialize)]
pub(super) struct Event<'a> {
    id: &'a str,
    relay: &'a str,
    number: i64,
    status: &'static str,
    topic: Option<&'a str>,
    key: Option<&'a str>,
    event_type: Option<&'a str>,
    attempts: i32,
    error: Option<&'a str>,
    parked_at: String,
    due_at: Option<String>,
    tried_at: Option<String>,
    is_being_sent: bool,
    is_cancelled: bool,
    awaits_topic: bool,
    owes_letter: bool,
    decided_by: Option<&'a str>,
    decided_at: Option<String>,
    reason: Option<&'a str>,
    committed_at: String,
    commit_lsn: Option<&'a str>,
    xid: Option<&'a str>,
    row_bytes: i64,
}

impl<'a> Event<'a> {
    pub(super) fn of(event: &'a Parked) -> Self {
        let time = |time: Option<Timestamp>| time.map(|time| time.to_string());
        Self {
            id: &event.id,
            relay: &event.relay,
            number: event.number,
            status: event.status.name(),
            topic: event.topic.as_deref(),
            key: event.key.as_deref(),
            event_type: event.event_type.as_deref(),
            attempts: event.attempts,
            error: event.error.as_deref(),
            parked_at: event.parked_at.to_string(),
            due_at: time(event.due_at),
            tried_at: time(event.tried_at),
            is_being_sent: event.is_being_sent,
            is_cancelled: event.is_cancelled,
            awaits_topic: event.awaits_topic,
            owes_letter: event.owes_letter,
            decided_by: event.decided_by.as_deref(),
            decided_at: time(event.decided_at),
            reason: event.reason.as_deref(),
            committed_at: event.committed_at.to_string(),
            commit_lsn: event.commit_lsn.as_deref(),
            xid: event.xid.as_deref(),
            row_bytes: event.row_bytes,
        }
    }
}
