//! Events for people: a table of 120 columns, and all that is known of one.
//!
//! What an application or a broker wrote may hold anything: characters that are not printed
//! are escaped, so that none moves the cursor or makes another line.

use std::io::{self, Write};
use std::time::Duration;

use postbox::duration;
use postbox::parked::Status;
use postbox::parked::decisions::Left;
use postbox::parked::event::Parked;
use postbox::parked::row::StoredRow;
use postbox::timestamp::Timestamp;

use super::json::hex;

/// How wide a line is at most.
const WIDTH: usize = 120;

const GAP: &str = "  ";

const HEAD: [&str; 8] = [
    "ID", "STATUS", "PARKED", "TRIES", "DUE", "TOPIC", "KEY", "TYPE",
];

/// How many of those have a width of their own; the others share what is left.
const FIXED: usize = 5;

/// The head, and a row for each event, and below it what is wrong with it; then, of one that a decision left
/// as it is, why.
pub(super) fn table<'a>(
    out: &mut dyn Write,
    events: impl Iterator<Item = (&'a Parked, Option<Left>)> + Clone,
) -> io::Result<()> {
    let cells = events.clone().map(|(event, _)| cells(event));
    let widths = widths(cells.clone());
    write_row(out, &HEAD.map(str::to_owned), &widths)?;
    for ((event, left), cells) in events.zip(cells) {
        write_row(out, &cells, &widths)?;
        if let Some(note) = note(event) {
            writeln!(out, "{GAP}{}", shorten(&note, WIDTH - GAP.len()))?;
        }
        if let Some(left) = left {
            writeln!(out, "{GAP}left as it is: {}", left.reason())?;
        }
    }
    Ok(())
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
        (_, None) => "behind".to_owned(),
        (_, Some(time)) if time <= event.seen_at => "now".to_owned(),
        (_, Some(time)) => between(event.seen_at, time),
    }
}

/// What a person must know of it: who gave it up, or why it could not go out.
fn note(event: &Parked) -> Option<String> {
    let said = match (event.status, &event.decided_by, &event.reason) {
        (Status::Skipped, Some(by), Some(reason)) => Some(format!("skipped by {by}: {reason}")),
        (Status::Skipped, Some(by), None) => Some(format!("skipped by {by}")),
        _ => event.error.clone(),
    };
    said.map(|text| printable(&text))
}

/// As wide as the widest cell; if that is too much, the last columns share what there is.
fn widths(rows: impl Iterator<Item = [String; 8]>) -> [usize; 8] {
    let mut widths = HEAD.map(str::len);
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let (fixed, shared) = widths.split_at_mut(FIXED);
    // An id that is not a UUID may be of any length, and is needed as a whole.
    let used = fixed.iter().sum::<usize>() + GAP.len() * (HEAD.len() - 1);
    let mut room = WIDTH.saturating_sub(used).max(30);
    let mut order: Vec<&mut usize> = shared.iter_mut().collect();
    order.sort_unstable();
    let mut columns = order.len();
    for width in order {
        *width = (*width).min(room / columns);
        room -= *width;
        columns -= 1;
    }
    widths
}

fn write_row(out: &mut dyn Write, cells: &[String; 8], widths: &[usize; 8]) -> io::Result<()> {
    let mut line = String::new();
    for (cell, width) in cells.iter().zip(widths) {
        let cell = shorten(cell, *width);
        line.push_str(&format!("{cell:<width$}{GAP}"));
    }
    writeln!(out, "{}", line.trim_end())
}

/// All that is known of an event.
pub(super) fn everything(
    out: &mut dyn Write,
    event: &Parked,
    row: &StoredRow,
    with_payload: bool,
) -> io::Result<()> {
    writeln!(out, "event {}", printable(&event.id))?;
    for (name, value) in facts(event) {
        writeln!(out, "  {name:<13}{value}")?;
    }
    let columns = match row.columns() {
        Ok(columns) => columns,
        Err(why) => return writeln!(out, "  row          cannot be read: {why}"),
    };
    writeln!(out, "  row")?;
    let width = columns.iter().map(|column| column.name.chars().count());
    let width = width.max().unwrap_or_default();
    for column in &columns {
        let name = printable(column.name);
        let value = match (column.value, column.value.map(std::str::from_utf8)) {
            (Some(bytes), _) if column.is_private && !with_payload => {
                format!("({} bytes: --payload shows them)", bytes.len())
            }
            (Some(bytes), Some(Err(_))) => format!("(not UTF-8) {}", hex(bytes)),
            (_, Some(Ok(text))) => printable(text),
            _ => "NULL".to_owned(),
        };
        writeln!(out, "    {name:<width$}  {value}")?;
    }
    Ok(())
}

/// What there is to say of an event, and its name.
fn facts(event: &Parked) -> Vec<(&'static str, String)> {
    let when = |time: Timestamp| match time <= event.seen_at {
        true => format!("{time} ({} ago)", between(time, event.seen_at)),
        false => format!("{time} (in {})", between(event.seen_at, time)),
    };
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

fn between(from: Timestamp, to: Timestamp) -> String {
    let micros = to.unix_micros().saturating_sub(from.unix_micros());
    let micros = u64::try_from(micros).unwrap_or_default();
    duration::rounded(Duration::from_micros(micros))
}

/// With what is not printed escaped.
fn printable(text: &str) -> String {
    let escaped = |c: char| match c.is_control() || is_invisible(c) {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    text.chars().map(escaped).collect()
}

/// Marks that turn the direction of a line, or have no width.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

fn shorten(text: &str, width: usize) -> String {
    match text.char_indices().nth(width) {
        None => text.to_owned(),
        Some(_) => text
            .chars()
            .take(width.saturating_sub(1))
            .chain(['…'])
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_printed_is_escaped() {
        assert_eq!(printable("a\n\u{1b}[2Jü\u{202e}"), r"a\n\u{1b}[2Jü\u{202e}");
        assert_eq!(printable(r"C:\temp"), r"C:\temp");
    }

    #[test]
    fn ages_are_in_their_largest_unit() {
        let at = |seconds: i64| Timestamp::from_unix_micros(seconds * 1_000_000 + 999);
        for (seconds, expected) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (7199, "1h"),
            (86_399, "23h"),
            (864_000, "10d"),
        ] {
            assert_eq!(between(at(0), at(seconds)), expected);
        }
        // Two clocks.
        assert_eq!(between(at(5), at(0)), "0s");
    }

    #[test]
    fn long_columns_leave_room_for_short_ones() {
        let row = |topic: usize, key: usize, event_type: usize| {
            let cell = |width| "x".repeat(width);
            let fixed = [cell(36), cell(7), cell(2), cell(1), cell(3)];
            let [a, b, c, d, e] = fixed;
            [a, b, c, d, e, cell(topic), cell(key), cell(event_type)]
        };
        for (topic, key, event_type) in [(300, 4, 10), (300, 300, 300), (6, 2, 12), (5, 200, 5)] {
            let widths = widths([row(topic, key, event_type)].into_iter());
            let line = widths.iter().sum::<usize>() + GAP.len() * 7;
            assert!(line <= WIDTH, "{widths:?}");
            assert!(widths[6] >= key.min(15), "{widths:?}");
        }
        assert_eq!(shorten("abcdef", 4), "abc…");
        assert_eq!(shorten("abcd", 4), "abcd");
    }
}
