//! The names of the database contract, and its SQL with the names filled in.
//!
//! The files in `sql/` are written for psql, whose `:"schema"` is a quoted
//! identifier and `:'slot'` a quoted literal. Here the same tokens are filled
//! in by us, so there is one text for both.

use postgres_protocol::escape::{escape_identifier, escape_literal};

use crate::error::{Error, ErrorKind, Result};
use crate::outbox::DEFAULT_SCHEMA;
use crate::table::Table;

/// What the name of a copy of rows begins with, before that of the slot.
const BACKFILL: &str = "backfill_";

/// Postgres cuts longer names short without an error.
const NAME_BYTES_MAX: usize = 63;

/// The names that set-up and relay must agree on.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Contract {
    /// The schema that holds the outbox.
    pub schema: String,
    /// The replication slot, which is also the relay's name in the checkpoint.
    pub slot: String,
    /// The publication that the slot is read through.
    pub publication: String,
    /// The table that is read: that of the schema, or one that another library made.
    pub outbox: Table,
}

impl Default for Contract {
    fn default() -> Self {
        Self {
            schema: DEFAULT_SCHEMA.to_owned(),
            slot: "postbox".to_owned(),
            publication: "postbox".to_owned(),
            outbox: Table::of(DEFAULT_SCHEMA),
        }
    }
}

impl Contract {
    /// The contract under these names, with a table of ours, if Postgres can take them.
    pub fn new(
        schema: impl Into<String>,
        slot: impl Into<String>,
        publication: impl Into<String>,
    ) -> Result<Self> {
        let schema = schema.into();
        let contract = Self {
            outbox: Table::of(&schema),
            schema,
            slot: slot.into(),
            publication: publication.into(),
        };
        contract.validate()?;
        Ok(contract)
    }

    /// Refuses names that Postgres would refuse, cut short or misread.
    pub fn validate(&self) -> Result<()> {
        check_name("schema", &self.schema)?;
        check_name("publication", &self.publication)?;
        check_name("slot", &self.slot)?;
        // The slot's name stands unquoted in replication commands.
        let allowed = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_');
        if !self.slot.bytes().all(allowed) {
            return Err(Error::new(
                ErrorKind::Settings,
                format!(
                    "slot \"{}\" may only have a to z, 0 to 9 and _ in its name",
                    self.slot.escape_debug()
                ),
            ));
        }
        let room = NAME_BYTES_MAX - BACKFILL.len();
        if !self.outbox.is_ours() && self.slot.len() > room {
            return Err(Error::new(
                ErrorKind::Settings,
                format!(
                    "slot \"{}\" has a name longer than {room} bytes, which --table-preset {} needs for a table \
                     named after it",
                    self.slot,
                    self.outbox.preset.name()
                ),
            ));
        }
        Ok(())
    }

    /// The same contract, to read this table.
    pub fn reading(self, outbox: Table) -> Result<Self> {
        let contract = Self { outbox, ..self };
        contract.validate()?;
        Ok(contract)
    }

    /// A table of the contract, quoted for SQL.
    pub fn table(&self, name: &str) -> String {
        format!(
            "{}.{}",
            escape_identifier(&self.schema),
            escape_identifier(name)
        )
    }

    /// The copy of rows that lie before a slot, of a table that does not say which
    /// transaction wrote a row. Quoted for SQL.
    pub(crate) fn backfill_table(&self) -> String {
        self.table(&format!("{BACKFILL}{}", self.slot))
    }

    /// Fills the names into a text from `sql/`.
    pub(crate) fn sql(&self, text: &str) -> String {
        self.sql_with(text, &[])
    }

    /// Fills in the names and `more`. Other tokens stay, for psql.
    pub(crate) fn sql_with(&self, text: &str, more: &[(&str, &str)]) -> String {
        let value = |name: &str| match name {
            "schema" => Some(self.schema.as_str()),
            "slot" => Some(self.slot.as_str()),
            "publication" => Some(self.publication.as_str()),
            "table_schema" => Some(self.outbox.schema.as_str()),
            "table" => Some(self.outbox.name.as_str()),
            _ => more.iter().find(|(key, _)| *key == name).map(|(_, v)| *v),
        };
        fill(text, value)
    }
}

pub(crate) fn check_name(what: &str, name: &str) -> Result<()> {
    let refuse = |why: &str| {
        let name = name.escape_debug();
        Err(Error::new(
            ErrorKind::Settings,
            format!("{what} \"{name}\" {why}"),
        ))
    };
    match name.len() {
        0 => refuse("needs a name"),
        1..=NAME_BYTES_MAX if name.contains('\0') => refuse("has a NUL in its name"),
        1..=NAME_BYTES_MAX => Ok(()),
        bytes => refuse(&format!(
            "has a name of {bytes} bytes, longer than {NAME_BYTES_MAX} bytes"
        )),
    }
}

/// Replaces `:"name"` and `:'name'` in one pass, so that a value which looks
/// like a token is left alone.
fn fill<'a>(text: &str, value: impl Fn(&str) -> Option<&'a str>) -> String {
    let mut filled = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(colon) = rest.find(':') {
        let (before, token) = rest.split_at(colon);
        filled.push_str(before);
        match read_token(token) {
            Some((quote, name, length)) if value(name).is_some() => {
                let value = value(name).unwrap_or_default();
                filled.push_str(&match quote {
                    '"' => escape_identifier(value),
                    _ => escape_literal(value),
                });
                rest = &token[length..];
            }
            _ => {
                filled.push(':');
                rest = &token[1..];
            }
        }
    }
    filled.push_str(rest);
    filled
}

/// Quote, name and length of the token that `text` begins with.
fn read_token(text: &str) -> Option<(char, &str, usize)> {
    let quote = text[1..]
        .chars()
        .next()
        .filter(|c| matches!(c, '"' | '\''))?;
    let name = &text[2..];
    let end = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')?;
    (end > 0 && name[end..].starts_with(quote)).then(|| (quote, &name[..end], end + 3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contract(schema: &str) -> Contract {
        Contract {
            schema: schema.to_owned(),
            outbox: Table::of(schema),
            ..Contract::default()
        }
    }

    #[test]
    fn default_names_are_valid() {
        Contract::default().validate().unwrap();
    }

    #[test]
    fn names_that_postgres_cannot_take_are_refused() {
        let long = "x".repeat(64);
        for (schema, slot, publication) in [
            ("", "s", "p"),
            ("a\0", "s", "p"),
            (&*long, "s", "p"),
            ("a", "s", ""),
            ("a", "s", &*long),
            ("a", "", "p"),
            ("a", "Slot", "p"),
            ("a", "s-1", "p"),
            ("a", "s; DROP", "p"),
            ("a", &*long, "p"),
        ] {
            let error = Contract::new(schema, slot, publication).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Settings, "{error}");
        }
        Contract::new("My \"Schema", "slot_1", "Überall").unwrap();
    }

    #[test]
    fn tokens_are_filled_in_quoted() {
        let filled = contract("my \"box").sql(r#"SELECT :'slot'::text FROM :"schema".outbox"#);
        assert_eq!(filled, r#"SELECT 'postbox'::text FROM "my ""box".outbox"#);
        assert_eq!(contract("it's").sql(":'schema'"), "'it''s'");
    }

    #[test]
    fn other_colons_stay() {
        for text in [
            "a::b",
            ":\"DBNAME\"",
            "'%s:%s'",
            ":",
            "x:'",
            ":\"",
            ":''",
            "ü:\"schema",
        ] {
            assert_eq!(contract("s").sql(text), text);
        }
    }

    #[test]
    fn a_value_that_looks_like_a_token_is_not_filled() {
        let filled = contract(":'slot'").sql(r#":"schema""#);
        assert_eq!(filled, r#"":'slot'""#);
    }

    #[test]
    fn a_table_is_quoted_in_its_schema() {
        assert_eq!(contract("s").table("outbox"), r#""s"."outbox""#);
    }
}
