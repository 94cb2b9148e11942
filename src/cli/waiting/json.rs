//! Rows as JSON, one a line. Field names stay as they are: scripts go by them.

use std::io::{self, Write};

use postbox::parked::row::Column;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

pub(in crate::cli) fn line(out: &mut dyn Write, row: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, row)?;
    out.write_all(b"\n")
}

/// A row as it was before a decision, and what became of that.
#[derive(Serialize)]
pub(in crate::cli) struct Outcome<T> {
    #[serde(flatten)]
    pub(in crate::cli) row: T,
    pub(in crate::cli) outcome: &'static str,
    pub(in crate::cli) left_because: Option<&'static str>,
    pub(in crate::cli) dry_run: bool,
}

/// A row with its columns.
#[derive(Serialize)]
pub(in crate::cli) struct Whole<'a, T> {
    #[serde(flatten)]
    row: T,
    columns: Option<Columns<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    hidden: Vec<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unreadable: Option<String>,
}

impl<'a, T> Whole<'a, T> {
    pub(in crate::cli) fn of(
        row: T,
        columns: Result<Vec<Column<'a>>, String>,
        with_payload: bool,
    ) -> Self {
        let (columns, unreadable) = match columns {
            Ok(columns) => (Some(columns), None),
            Err(why) => (None, Some(why)),
        };
        let is_hidden = |column: &Column<'_>| column.is_private && !with_payload;
        let all = columns.as_deref().unwrap_or_default();
        let hidden = all.iter().filter(|column| is_hidden(column));
        Self {
            row,
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
