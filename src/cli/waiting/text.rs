//! Rows for people: a table of 120 columns, and all that is known of one.
//!
//! What an application or a broker wrote may hold anything: characters that are not printed
//! are escaped, so that none moves the cursor or makes another line.

use std::io::{self, Write};
use std::time::Duration;

use postbox::duration;
use postbox::parked::row::Column;
use postbox::timestamp::Timestamp;

use super::json::hex;

/// How wide a line is at most.
const WIDTH: usize = 120;

const GAP: &str = "  ";

/// The third is when they came, in the table's own word.
const HEAD: [&str; 8] = ["ID", "STATUS", "", "TRIES", "DUE", "TOPIC", "KEY", "TYPE"];

/// How many of those have a width of their own; the others share what is left.
const FIXED: usize = 5;

/// What a table says of a row.
pub(in crate::cli) struct Line {
    pub(in crate::cli) cells: [String; 8],
    /// What a person must know of it.
    pub(in crate::cli) note: Option<String>,
    /// Why a decision left it as it is.
    pub(in crate::cli) left: Option<&'static str>,
}

/// The head, and a row for each, and below it what is wrong with it; then, of one that a decision left
/// as it is, why.
pub(in crate::cli) fn table(
    out: &mut dyn Write,
    since: &str,
    lines: impl Iterator<Item = Line> + Clone,
) -> io::Result<()> {
    let mut head = HEAD.map(str::to_owned);
    head[2] = since.to_owned();
    let widths = widths(&head, lines.clone().map(|line| line.cells));
    write_row(out, &head, &widths)?;
    for line in lines {
        write_row(out, &line.cells, &widths)?;
        if let Some(note) = line.note {
            writeln!(out, "{GAP}{}", shorten(&note, WIDTH - GAP.len()))?;
        }
        if let Some(left) = line.left {
            writeln!(out, "{GAP}left as it is: {left}")?;
        }
    }
    Ok(())
}

/// When it is due, in a word.
pub(in crate::cli) fn due(at: Option<Timestamp>, seen_at: Timestamp) -> String {
    match at {
        None => "behind".to_owned(),
        Some(time) if time <= seen_at => "now".to_owned(),
        Some(time) => between(seen_at, time),
    }
}

/// A time, and how far it is away.
pub(in crate::cli) fn when(time: Timestamp, seen_at: Timestamp) -> String {
    match time <= seen_at {
        true => format!("{time} ({} ago)", between(time, seen_at)),
        false => format!("{time} (in {})", between(seen_at, time)),
    }
}

/// Who gave it up, if a person did.
pub(in crate::cli) fn skipped(by: &str, reason: Option<&str>) -> String {
    match reason {
        Some(reason) => format!("skipped by {by}: {reason}"),
        None => format!("skipped by {by}"),
    }
}

/// As wide as the widest cell; if that is too much, the last columns share what there is.
fn widths(head: &[String; 8], rows: impl Iterator<Item = [String; 8]>) -> [usize; 8] {
    let mut widths = head.each_ref().map(|name| name.len());
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

/// All that is known of a row.
pub(in crate::cli) fn everything(
    out: &mut dyn Write,
    title: &str,
    facts: &[(&'static str, String)],
    columns: Result<Vec<Column<'_>>, String>,
    with_payload: bool,
) -> io::Result<()> {
    writeln!(out, "{title}")?;
    for (name, value) in facts {
        writeln!(out, "  {name:<13}{value}")?;
    }
    let columns = match columns {
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

pub(in crate::cli) fn between(from: Timestamp, to: Timestamp) -> String {
    let micros = to.unix_micros().saturating_sub(from.unix_micros());
    let micros = u64::try_from(micros).unwrap_or_default();
    duration::rounded(Duration::from_micros(micros))
}

/// With what is not printed escaped.
pub(in crate::cli) fn printable(text: &str) -> String {
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
        let head = HEAD.map(str::to_owned);
        let row = |topic: usize, key: usize, event_type: usize| {
            let cell = |width| "x".repeat(width);
            let fixed = [cell(36), cell(7), cell(2), cell(1), cell(3)];
            let [a, b, c, d, e] = fixed;
            [a, b, c, d, e, cell(topic), cell(key), cell(event_type)]
        };
        for (topic, key, event_type) in [(300, 4, 10), (300, 300, 300), (6, 2, 12), (5, 200, 5)] {
            let widths = widths(&head, [row(topic, key, event_type)].into_iter());
            let line = widths.iter().sum::<usize>() + GAP.len() * 7;
            assert!(line <= WIDTH, "{widths:?}");
            assert!(widths[6] >= key.min(15), "{widths:?}");
        }
        assert_eq!(shorten("abcdef", 4), "abc…");
        assert_eq!(shorten("abcd", 4), "abcd");
    }
}
