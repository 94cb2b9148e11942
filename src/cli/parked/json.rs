//! Events as JSON, one a line. Field names stay as they are: scripts go by them.

use std::io::{self, Write};

use postbox::parked::decisions::{Decided, Decision};
use postbox::parked::event::Parked;
use postbox::parked::row::{Column, StoredRow};
use postbox::timestamp::Timestamp;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

pub(super) fn line(out: &mut dyn Write, event: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, event)?;
    out.write_all(b"\n")
}

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

/// An event as it was before a decision, and what became of that.
#[derive(Serialize)]
pub(super) struct Outcome<'a> {
    #[serde(flatten)]
    event: Event<'a>,
    outcome: &'static str,
    left_because: Option<&'static str>,
    dry_run: bool,
}

impl<'a> Outcome<'a> {
    pub(super) fn of(decided: &'a Decided, decision: Decision<'_>, dry_run: bool) -> Self {
        Self {
            event: Event::of(&decided.event),
            outcome: match (decided.left, decision) {
                (Some(_), _) => "left",
                (None, Decision::Retry) => "retried",
                (None, Decision::Skip { .. }) => "skipped",
            },
            left_because: decided.left.map(|left| left.name()),
            dry_run,
        }
    }
}

/// An event with the columns of its row.
#[derive(Serialize)]
pub(super) struct Whole<'a> {
    #[serde(flatten)]
    event: Event<'a>,
    columns: Option<Columns<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    hidden: Vec<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable: Option<String>,
}

impl<'a> Whole<'a> {
    pub(super) fn of(event: &'a Parked, row: &'a StoredRow, with_payload: bool) -> Self {
        let (columns, unreadable) = match row.columns() {
            Ok(columns) => (Some(columns), None),
            Err(why) => (None, Some(why)),
        };
        let is_hidden = |column: &Column<'_>| column.is_private && !with_payload;
        let all = columns.as_deref().unwrap_or_default();
        let hidden = all.iter().filter(|column| is_hidden(column));
        Self {
            event: Event::of(event),
            hidden: hidden.map(|column| column.name).collect(),
            columns: columns.map(|mut columns| {
                columns.retain(|column| !is_hidden(column));
                Columns(columns)
            }),
            unreadable,
        }
    }
}

/// By name, in the order of the table.
struct Columns<'a>(Vec<Column<'a>>);

impl Serialize for Columns<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for column in &self.0 {
            match column
                .value
                .map(|bytes| (bytes, std::str::from_utf8(bytes)))
            {
                None => map.serialize_entry(column.name, &None::<&str>)?,
                Some((_, Ok(text))) => map.serialize_entry(column.name, text)?,
                Some((bytes, Err(_))) => {
                    map.serialize_entry(column.name, &Hex { hex: hex(bytes) })?;
                }
            }
        }
        map.end()
    }
}

#[derive(Serialize)]
struct Hex {
    hex: String,
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
