//! Whose table is read, and which of its columns is which field of an event.
//!
//! The outbox is ours, or one that another library made: its users change the relay and
//! nothing else. A *preset* knows such a table as its makers left it:
//!
//! | preset | table | tracks progress | key | value | headers |
//! |---|---|---|---|---|---|
//! | `postbox` | `postbox.outbox` | no | `partition_key`, else `aggregate_id` | envelope | ours, the row's |
//! | `omni-box` | `outbox_events` | `status`, `locked_at`, `attempts_made` … | `partition_key` | envelope | the row's, theirs |
//! | `spakky` | `spakky_event_outbox` | `published_at`, `claimed_at`, `retry_count` | none | payload | the row's |
//! | `debezium` | `outbox` | no | `aggregateid` | payload | `id` |
//!
//! A column that has another name is named one by one; a field without a column is one
//! that no row has. Any column may become a header besides: see [`Placement`].
//!
//! Debezium's table can be read from a slot only: nothing in it says in what order its rows
//! were committed, nor which of them were published.

mod placement;

pub use placement::Placement;

use std::str::FromStr;

use postgres_protocol::escape::escape_identifier;

use crate::contract::check_name;
use crate::envelope::{Format, HeaderStyle, Route};
use crate::error::{Error, ErrorKind, Result};

/// A table as those who made it left it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Preset {
    /// Ours.
    #[default]
    Postbox,
    /// omni-box 0.1 to 0.3: `outbox_events`, plain or partitioned.
    OmniBox,
    /// spakky-outbox 6: `spakky_event_outbox`.
    Spakky,
    /// What Debezium's Outbox Event Router reads, unless it is told otherwise: `outbox`.
    Debezium,
}

impl Preset {
    /// All of them, by the names they have on the command line.
    pub const ALL: [(&'static str, Self); 4] = [
        ("postbox", Self::Postbox),
        ("omni-box", Self::OmniBox),
        ("spakky", Self::Spakky),
        ("debezium", Self::Debezium),
    ];

    /// As it is written on the command line.
    pub fn name(self) -> &'static str {
        Self::ALL[self as usize].0
    }

    /// Its table, if none is named.
    fn table(self) -> &'static str {
        match self {
            Self::Postbox | Self::Debezium => "outbox",
            Self::OmniBox => "outbox_events",
            Self::Spakky => "spakky_event_outbox",
        }
    }

    /// What a record's value looks like, if nothing is said.
    pub fn format(self) -> Format {
        match self {
            Self::Postbox | Self::OmniBox => Format::Envelope,
            Self::Spakky | Self::Debezium => Format::Raw,
        }
    }

    /// Where an event goes whose row does not say, if nothing is said.
    ///
    /// # Panics
    /// Never: it is a route.
    pub fn route(self) -> Route {
        match self {
            Self::Postbox | Self::OmniBox | Self::Spakky => Route::default(),
            Self::Debezium => "outbox.event.{aggregate_type}".parse().expect("a route"),
        }
    }

    /// How batches of its records are compressed, if nothing is said and it is not as ours
    /// are: consumers of these need what no one had to install for them. aiokafka does not
    /// read what is compressed, but by gzip, without a library more. Connect compresses
    /// nothing unless it is told to.
    pub fn compression(self) -> Option<&'static str> {
        match self {
            Self::Postbox => None,
            Self::OmniBox | Self::Spakky | Self::Debezium => Some("none"),
        }
    }

    /// Which headers its records have, if nothing is said.
    pub fn headers(self) -> HeaderStyle {
        match self {
            Self::Postbox => HeaderStyle::Postbox,
            Self::OmniBox => HeaderStyle::OmniBox,
            Self::Spakky => HeaderStyle::None,
            Self::Debezium => HeaderStyle::Debezium,
        }
    }

    /// How it says which rows are published, if its rows say that.
    pub fn tracking(self) -> Option<Tracking> {
        match self {
            Self::OmniBox => Some(Tracking::Status),
            Self::Spakky => Some(Tracking::Times),
            Self::Postbox | Self::Debezium => None,
        }
    }

    /// Whether a record's time is that of its row. With these libraries it is when the
    /// record is sent, and their clocks are the application's: Kafka refuses a time that is
    /// an hour ahead, and may forget a record of long ago before it is read.
    pub fn times_records(self) -> bool {
        self.tracking().is_none()
    }

    /// Whether its rows can be read from the table itself.
    pub fn can_be_polled(self) -> bool {
        self != Self::Debezium
    }

    /// Whether the publication may publish more than what is inserted into its table, which
    /// is passed over then: one that Debezium made is of all tables and of all that happens
    /// to them.
    pub(crate) fn shares_publication(self) -> bool {
        self == Self::Debezium
    }

    /// Whether each of its events is about an aggregate and has a type. Debezium's router
    /// makes records without a key of rows that name none, and never reads a type.
    pub(crate) fn names_aggregate_and_type(self) -> bool {
        self != Self::Debezium
    }

    /// Fields that have a column, and its name.
    fn columns(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Postbox => &[
                ("seq", "seq"),
                ("id", "id"),
                ("aggregate_type", "aggregate_type"),
                ("aggregate_id", "aggregate_id"),
                ("event_type", "event_type"),
                ("topic", "topic"),
                ("partition_key", "partition_key"),
                ("payload", "payload"),
                ("headers", "headers"),
                ("schema_version", "schema_version"),
                ("trace_id", "trace_id"),
                ("correlation_id", "correlation_id"),
                ("causation_id", "causation_id"),
                ("traceparent", "traceparent"),
                ("created_at", "created_at"),
                ("scheduled_at", "scheduled_at"),
            ],
            Self::OmniBox => &[
                ("id", "id"),
                ("aggregate_type", "aggregate_type"),
                ("aggregate_id", "aggregate_id"),
                ("event_type", "event_type"),
                ("topic", "topic"),
                ("partition_key", "partition_key"),
                ("payload", "payload"),
                ("headers", "headers"),
                ("schema_version", "schema_version"),
                ("trace_id", "trace_id"),
                ("correlation_id", "correlation_id"),
                ("causation_id", "causation_id"),
                ("created_at", "created_at"),
                ("status", "status"),
                ("attempts_made", "attempts_made"),
                ("max_attempts", "max_attempts"),
                ("last_error", "last_error"),
                ("scheduled_at", "scheduled_at"),
                ("completed_at", "completed_at"),
                ("locked_at", "locked_at"),
                ("locked_by", "locked_by"),
                ("updated_at", "updated_at"),
            ],
            // Its records have no key, and its name of an event is the topic.
            Self::Spakky => &[
                ("id", "id"),
                ("aggregate_type", "event_name"),
                ("aggregate_id", "id"),
                ("event_type", "event_name"),
                ("topic", "event_name"),
                ("payload", "payload"),
                ("headers", "headers"),
                ("created_at", "created_at"),
                ("published_at", "published_at"),
                ("claimed_at", "claimed_at"),
                ("retry_count", "retry_count"),
            ],
            Self::Debezium => &[
                ("id", "id"),
                ("aggregate_type", "aggregatetype"),
                ("aggregate_id", "aggregateid"),
                ("event_type", "type"),
                ("payload", "payload"),
            ],
        }
    }
}

impl FromStr for Preset {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|(known, _)| *known == name);
        found.map(|(_, preset)| preset).ok_or_else(|| {
            format!("unknown preset \"{name}\": use postbox, omni-box, spakky or debezium")
        })
    }
}

/// How rows say whether they are published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tracking {
    /// By a status, a lock with its owner, and a time before which a row is not tried.
    Status,
    /// By the times when a row was published and claimed.
    Times,
}

/// The table that is read.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Table {
    /// Whose it is.
    pub preset: Preset,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// Fields whose columns have other names than the preset says.
    columns: Vec<(String, String)>,
    placements: Vec<Placement>,
    /// How often a row is tried, where rows do not say: one that was tried as often and is
    /// not published is given up.
    pub attempts_max: u32,
}

/// How often a row is tried, unless something else is said.
pub const ATTEMPTS_MAX: u32 = 5;

impl Table {
    /// The table of a preset; of ours, that of our schema. `name` is `table` or
    /// `schema.table`, if it is another one; `columns` are `field=column`.
    ///
    /// # Errors
    /// `Settings`: a name that cannot be, or a field that there is not.
    pub fn new(
        preset: Preset,
        our_schema: &str,
        name: Option<&str>,
        columns: &[(String, String)],
    ) -> Result<Self> {
        let (schema, name) = match name {
            None if preset == Preset::Postbox => (our_schema, preset.table()),
            None => ("public", preset.table()),
            Some(name) => name.split_once('.').unwrap_or(("public", name)),
        };
        check_name("schema", schema)?;
        check_name("table", name)?;
        let table = Self {
            preset,
            schema: schema.to_owned(),
            name: name.to_owned(),
            columns: columns.to_vec(),
            placements: Vec::new(),
            attempts_max: ATTEMPTS_MAX,
        };
        if preset == Preset::Postbox && table != Self::of(our_schema) {
            let message = "--table and --column are for tables of others: with --table-preset postbox the table is \
                           that of --schema, which `postbox setup` makes";
            return Err(Error::new(ErrorKind::Settings, message));
        }
        for (number, (field, column)) in columns.iter().enumerate() {
            table.check_field(field)?;
            check_name("column", column)?;
            if columns[..number].iter().any(|(before, _)| before == field) {
                let message = format!("--column {field}=…: given twice");
                return Err(Error::new(ErrorKind::Settings, message));
            }
        }
        Ok(table)
    }

    /// Our own outbox in this schema.
    pub fn of(schema: &str) -> Self {
        Self {
            preset: Preset::Postbox,
            schema: schema.to_owned(),
            name: Preset::Postbox.table().to_owned(),
            columns: Vec::new(),
            placements: Vec::new(),
            attempts_max: ATTEMPTS_MAX,
        }
    }

    /// The same, of which these columns become headers too.
    #[must_use]
    pub fn placing(self, placements: Vec<Placement>) -> Self {
        Self { placements, ..self }
    }

    /// The columns that become headers, in the headers' order.
    pub fn placements(&self) -> &[Placement] {
        &self.placements
    }

    /// A column may be named for each field of an event, and for what the preset has besides.
    fn check_field(&self, field: &str) -> Result<()> {
        let of_event = Preset::Postbox.columns().iter();
        let of_preset = self.preset.columns().iter();
        let mut known: Vec<&str> = Vec::new();
        for (name, _) in of_event.chain(of_preset) {
            if !known.contains(name) {
                known.push(name);
            }
        }
        if known.contains(&field) {
            return Ok(());
        }
        let message = format!(
            "--column {field}=…: there is no such field; use one of {}",
            known.join(", ")
        );
        Err(Error::new(ErrorKind::Settings, message))
    }

    /// Whether it is ours, whose rows say by which transaction they were written, and in
    /// which order.
    pub fn is_ours(&self) -> bool {
        self.preset == Preset::Postbox
    }

    /// The column of a field, if there is one.
    pub fn column(&self, field: &str) -> Option<&str> {
        let own = self
            .columns
            .iter()
            .map(|(known, column)| (known.as_str(), column.as_str()));
        let all = own.chain(self.preset.columns().iter().copied());
        let mut found = all.filter(|(known, _)| *known == field);
        found.next().map(|(_, column)| column)
    }

    /// The same, quoted for SQL.
    pub(crate) fn quoted_column(&self, field: &str) -> Option<String> {
        self.column(field).map(escape_identifier)
    }

    /// Whether the table may have no column of this field, though its preset has one: of an
    /// event's type, where events need none and the column is not named.
    pub(crate) fn may_lack(&self, field: &str) -> bool {
        let is_named = self.columns.iter().any(|(named, _)| named == field);
        field == "event_type" && !self.preset.names_aggregate_and_type() && !is_named
    }

    /// Whether its records have a key.
    pub fn is_keyed(&self) -> bool {
        self.preset != Preset::Spakky || self.column("partition_key").is_some()
    }

    /// All fields that have a column, those of its tracking too.
    pub(crate) fn fields(&self) -> impl Iterator<Item = &str> {
        let named = self.columns.iter().map(|(field, _)| field.as_str());
        let of_preset = self.preset.columns().iter().map(|(field, _)| *field);
        of_preset.chain(named.filter(|field| {
            self.preset
                .columns()
                .iter()
                .all(|(known, _)| known != field)
        }))
    }

    /// Quoted for SQL.
    pub fn quoted(&self) -> String {
        let (schema, name) = (&self.schema, &self.name);
        format!("{}.{}", escape_identifier(schema), escape_identifier(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_preset_finds_its_own_name() {
        for (name, preset) in Preset::ALL {
            assert_eq!(name.parse(), Ok(preset));
            assert_eq!(preset.name(), name);
        }
    }

    #[test]
    fn a_column_is_that_of_the_preset_unless_it_is_named() {
        let columns = [("payload".to_owned(), "body".to_owned())];
        let table = Table::new(Preset::OmniBox, "postbox", Some("shop.events"), &columns).unwrap();
        assert_eq!(table.quoted(), r#""shop"."events""#);
        assert_eq!(table.column("payload"), Some("body"));
        assert_eq!(table.column("locked_by"), Some("locked_by"));
        assert_eq!(table.column("traceparent"), None);
        let fields: Vec<_> = table.fields().filter(|field| *field == "payload").collect();
        assert_eq!(fields.len(), 1);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let column = |field: &str, column: &str| [(field.to_owned(), column.to_owned())];
        for (preset, name, columns) in [
            (Preset::OmniBox, None, column("colour", "red")),
            (Preset::Spakky, None, column("locked_by", "owner")),
            (Preset::OmniBox, None, column("payload", "")),
            (Preset::OmniBox, Some("."), column("payload", "body")),
            (Preset::Postbox, Some("events"), column("payload", "body")),
        ] {
            let refused = Table::new(preset, "postbox", name, &columns).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Settings, "{refused}");
        }
    }

    #[test]
    fn routes_are_those_of_each_preset() {
        let topic = |preset: Preset| preset.route().topic_of("order", "placed");
        assert_eq!(topic(Preset::OmniBox), "order");
        assert_eq!(topic(Preset::Debezium), "outbox.event.order");
    }

    #[test]
    fn records_of_a_table_without_a_key_have_none() {
        let spakky = |columns: &[(String, String)]| {
            Table::new(Preset::Spakky, "postbox", None, columns).unwrap()
        };
        assert!(!spakky(&[]).is_keyed());
        assert!(spakky(&[("partition_key".to_owned(), "customer".to_owned())]).is_keyed());
    }
}
