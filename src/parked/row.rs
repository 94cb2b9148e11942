//! The row of an event that waits, as the application wrote it.
//!
//! A payload is for whoever asks for it. Which column holds it, the row does not say: it may
//! have any name in a table that another library made. So private is every column whose name
//! we do not know.

use std::sync::LazyLock;

use tokio_postgres::Row;

use super::Taken;
use crate::outbox::DEFAULT_SCHEMA;
use crate::pgoutput::{self, Message, Value};
use crate::table::{Preset, Table};

/// The bytes of a row, and the names of its columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRow {
    message: Vec<u8>,
    names: Vec<String>,
}

/// A column of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Column<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its value as text, in the encoding of the database; none: NULL.
    pub value: Option<&'a [u8]>,
    /// It is or may be the payload, or the application's headers.
    pub is_private: bool,
}

/// Columns of ours that no field of a [`Table`] stands for.
const OTHERS: [&str; 3] = ["idempotency_key", "scheduled_at", "xid"];

/// What is for those who ask for it.
const PRIVATE: [&str; 2] = ["payload", "headers"];

impl StoredRow {
    pub(super) fn read(row: &Row) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            message: row.try_get("message")?,
            names: row.try_get("column_names")?,
        })
    }

    /// A row that the relay has taken.
    pub(crate) fn of(taken: &Taken) -> Self {
        Self {
            message: taken.row.bytes.to_vec(),
            names: taken
                .columns
                .iter()
                .map(|column| column.name.clone())
                .collect(),
        }
    }

    /// Its columns, in the order of the table.
    ///
    /// # Errors
    /// Why the bytes are not a row with these columns.
    pub fn columns(&self) -> Result<Vec<Column<'_>>, String> {
        let insert = match pgoutput::decode(&self.message) {
            Ok(Message::Insert(insert)) => insert,
            Ok(_) => return Err("not the message of a row".to_owned()),
            Err(error) => return Err(error.to_string()),
        };
        let (values, names) = (insert.row.len(), self.names.len());
        if values != names {
            return Err(format!("{values} values for {names} columns"));
        }
        let values = insert.row.values();
        Ok(self.names.iter().zip(values).map(Column::new).collect())
    }
}

impl<'a> Column<'a> {
    fn new((name, value): (&'a String, Value<'a>)) -> Self {
        Self {
            name,
            value: match value {
                Value::Null | Value::Unchanged => None,
                Value::Text(bytes) | Value::Binary(bytes) => Some(bytes),
            },
            is_private: !PUBLIC.contains(name),
        }
    }
}

/// The names of columns that hold no payload in any of the tables we know.
static PUBLIC: LazyLock<Vec<String>> = LazyLock::new(|| {
    let mut names: Vec<String> = OTHERS.map(str::to_owned).into();
    for (_, preset) in Preset::ALL {
        let table = Table::new(preset, DEFAULT_SCHEMA, None, &[]).expect("a preset as it is");
        let columns = table.fields().filter_map(|field| table.column(field));
        names.extend(columns.map(str::to_owned));
    }
    names.retain(|name| !PRIVATE.contains(&name.as_str()));
    names
});

#[cfg(test)]
mod tests {
    use super::*;

    fn stored(columns: &[(&str, Value<'_>)]) -> StoredRow {
        let values = columns.iter().map(|(_, value)| *value);
        StoredRow {
            message: pgoutput::encode_insert(7, values),
            names: columns.iter().map(|(name, _)| (*name).to_owned()).collect(),
        }
    }

    #[test]
    fn a_column_that_is_not_known_is_private() {
        let value = Value::Text(b"x");
        let names = [
            "id",
            "payload",
            "headers",
            "body",
            "aggregatetype",
            "xid",
            "topic",
        ];
        let row = stored(&names.map(|name| (name, value)));
        let columns = row.columns().unwrap();
        let private = columns.iter().filter(|column| column.is_private);
        let private: Vec<_> = private.map(|column| column.name).collect();
        assert_eq!(private, ["payload", "headers", "body"]);
    }

    #[test]
    fn bytes_that_are_not_the_row_are_an_error_and_not_a_panic() {
        let mut row = stored(&[("id", Value::Null)]);
        assert_eq!(row.columns().unwrap()[0].value, None);
        row.names.push("more".to_owned());
        assert_eq!(row.columns(), Err("1 values for 2 columns".to_owned()));
        row.message.pop();
        assert!(row.columns().unwrap_err().contains("ends early"));
        row.message = b"D\0\0\0\x07K\0\0".to_vec();
        assert_eq!(row.columns(), Err("not the message of a row".to_owned()));
    }
}
