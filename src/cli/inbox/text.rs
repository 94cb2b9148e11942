//! Messages for people.

use postbox::inbox::stored::{Status, Stored};
use postbox::timestamp::Timestamp;

use crate::cli::waiting::text::{self, Line, between, printable, skipped};

/// A message in a table.
pub(super) fn line(message: &Stored) -> Line {
    Line {
        cells: [
            printable(&message.id),
            message.status.to_string(),
            between(message.received_at, message.seen_at),
            message.attempts.to_string(),
            due(message),
            printable(&message.topic),
            message.key.as_deref().map_or("-".to_owned(), printable),
            printable(&message.event_type),
        ],
        note: note(message),
        left: None,
    }
}

/// When it is tried or may be claimed next, in a word.
fn due(message: &Stored) -> String {
    match message.status.is_open() {
        false => "-".to_owned(),
        _ if message.is_claimed => "claimed".to_owned(),
        true => text::due(message.due_at, message.seen_at),
    }
}

/// What a person must know of it: who gave it up, or why it failed.
fn note(message: &Stored) -> Option<String> {
    let said = match (message.status, &message.decided_by) {
        (Status::Skipped, Some(by)) => Some(skipped(by, message.reason.as_deref())),
        _ => message.error.clone(),
    };
    said.map(|text| printable(&text))
}

/// What there is to say of a message, and its name.
pub(super) fn facts(message: &Stored) -> Vec<(&'static str, String)> {
    let when = |time: Timestamp| text::when(time, message.seen_at);
    let due = match (message.status.is_open(), message.due_at) {
        (false, _) => None,
        (true, None) => Some("after the earlier messages of its key".to_owned()),
        (true, Some(time)) => Some(when(time)),
    };
    let yes = |is: bool, text: &str| is.then(|| text.to_owned());
    let text = |text: &Option<String>| text.as_deref().map(printable);
    let decided = message.decided_at.zip(message.decided_by.as_deref());
    [
        ("group", Some(printable(&message.group))),
        ("number", Some(message.number.to_string())),
        ("status", Some(message.status.to_string())),
        ("due", due),
        (
            "",
            yes(message.is_claimed, "claimed by the application until then"),
        ),
        ("topic", Some(printable(&message.topic))),
        ("partition", Some(message.partition.to_string())),
        ("offset", Some(message.offset.to_string())),
        ("key", text(&message.key)),
        ("type", Some(printable(&message.event_type))),
        ("version", text(&message.schema_version)),
        ("attempts", Some(message.attempts.to_string())),
        ("error", text(&message.error)),
        ("dead letter", yes(message.owes_letter, "still to be sent")),
        (
            "decided",
            decided.map(|(time, by)| format!("{} by {}", when(time), printable(by))),
        ),
        ("reason", text(&message.reason)),
        ("received", Some(when(message.received_at))),
        ("produced", message.created_at.map(when)),
    ]
    .into_iter()
    .filter_map(|(name, value)| value.map(|value| (name, value)))
    .collect()
}
