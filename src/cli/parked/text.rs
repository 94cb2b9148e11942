//! Events for people.

use postbox::parked::Status;
use postbox::parked::event::Parked;
use postbox::timestamp::Timestamp;

use crate::cli::waiting::text::{self, Line, between, printable, skipped};

/// An event in a table.
pub(super) fn line(event: &Parked) -> Line {
    Line {
        cells: cells(event),
        note: note(event),
        left: None,
    }
}

fn cells(event: &Parked) -> [String; 8] {
    let text = |text: &Option<String>| text.as_deref().map_or("-".to_owned(), printable);
    [
        printable(&event.id),
        event.status.to_string(),
        between(event.parked_at, event.seen_at),
        event.attempts.to_string(),
        due(event),
        text(&event.topic),
        text(&event.key),
        text(&event.event_type),
    ]
}

/// When it is sent or tried next, in a word.
fn due(event: &Parked) -> String {
    match (event.status, event.due_at) {
        (Status::Dead | Status::Skipped, _) => "-".to_owned(),
        _ if event.is_being_sent => "sending".to_owned(),
        _ if event.is_cancelled => "cancelled".to_owned(),
        (_, None) if event.awaits_topic => "topic".to_owned(),
        (_, due_at) => text::due(due_at, event.seen_at),
    }
}

/// What a person must know of it: who gave it up, or why it could not go out.
fn note(event: &Parked) -> Option<String> {
    let said = match (event.status, &event.decided_by) {
        (Status::Skipped, Some(by)) => Some(skipped(by, event.reason.as_deref())),
        _ => event.error.clone(),
    };
    said.map(|text| printable(&text))
}

/// What there is to say of an event, and its name.
pub(super) fn facts(event: &Parked) -> Vec<(&'static str, String)> {
    let when = |time: Timestamp| text::when(time, event.seen_at);
    let due = match (event.status, event.due_at) {
        (Status::Dead | Status::Skipped, _) => None,
        _ if event.is_cancelled => Some("never: it is cancelled".to_owned()),
        (_, None) if event.awaits_topic => Some("once the brokers take its topic".to_owned()),
        (_, None) => Some("after the earlier events of its key".to_owned()),
        (_, Some(time)) => Some(when(time)),
    };
    let yes = |is: bool, text: &str| is.then(|| text.to_owned());
    let text = |text: &Option<String>| text.as_deref().map(printable);
    let decided = event.decided_at.zip(event.decided_by.as_deref());
    [
        ("relay", Some(printable(&event.relay))),
        ("number", Some(event.number.to_string())),
        ("status", Some(event.status.to_string())),
        ("due", due),
        ("", yes(event.is_being_sent, "being sent just now")),
        ("topic", text(&event.topic)),
        ("key", text(&event.key)),
        ("type", text(&event.event_type)),
        ("attempts", Some(event.attempts.to_string())),
        ("tried", event.tried_at.map(when)),
        ("error", text(&event.error)),
        ("dead letter", yes(event.owes_letter, "still to be sent")),
        (
            "decided",
            decided.map(|(time, by)| format!("{} by {}", when(time), printable(by))),
        ),
        ("reason", text(&event.reason)),
        ("parked", Some(when(event.parked_at))),
        ("committed", Some(when(event.committed_at))),
        ("commit LSN", text(&event.commit_lsn)),
        ("transaction", text(&event.xid)),
    ]
    .into_iter()
    .filter_map(|(name, value)| value.map(|value| (name, value)))
    .collect()
}
