//! Which column of a table is which field of an event.

use std::sync::Arc;
use std::time::SystemTime;

use crate::event::{Event, Outline, Payload};
use crate::pgoutput::{Column, Relation, Tuple, Value};
use crate::table::{Table, Tracking};
use crate::timestamp::{Timestamp, TimestampError};

/// The fields of a table's columns, in the columns' order.
#[derive(Debug)]
pub(super) struct Columns {
    fields: Vec<Option<Field>>,
    /// Fields that share a column with one of those: which, and with which.
    shared: Vec<(Field, Field)>,
    /// Columns that become headers besides, in the headers' order.
    placed: Vec<Placed>,
    payload: PayloadType,
    /// Times without a zone: they are in UTC, as others take them too.
    local_times: Vec<Field>,
    /// Whether each row that names a time is sent by it; else those whose time is to come.
    schedules_all: bool,
    /// Whether each row must name an aggregate and a type.
    names_aggregate_and_type: bool,
    /// The column that says whether a row is published, and how, where one does.
    progress: Option<(usize, Tracking)>,
    /// The column that says which transaction wrote a row, where one does.
    xid: Option<usize>,
    /// The columns.
    described: Arc<[Column]>,
    /// A column that every event needs and this table does not have.
    missing: Option<String>,
}

/// A column that becomes a header.
#[derive(Debug, Clone, Copy)]
struct Placed {
    column: usize,
    is_boolean: bool,
}

/// Why a row cannot be read as an event.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// A column that every event needs is not in the table.
    #[error("the outbox has no column \"{0}\"")]
    Missing(String),
    /// A column that every event needs is NULL.
    #[error("the column \"{0}\" is NULL")]
    Null(String),
    /// The value is not text in UTF-8.
    #[error("the column \"{0}\" is not text in UTF-8")]
    NotText(String),
    /// A time that cannot be carried by a record, or waited for.
    #[error("the column \"{0}\": {1}")]
    Time(&'static str, TimestampError),
    /// The bytes are not an INSERT of a known table.
    #[error(transparent)]
    Decode(#[from] crate::pgoutput::DecodeError),
    /// The server sent a row before its table's columns.
    #[error("relation {0} was not described")]
    Relation(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PayloadType {
    Json,
    Bytea,
    Text,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Seq,
    Id,
    AggregateType,
    AggregateId,
    EventType,
    Topic,
    PartitionKey,
    Payload,
    Headers,
    SchemaVersion,
    TraceId,
    CorrelationId,
    CausationId,
    Traceparent,
    CreatedAt,
    ScheduledAt,
}

/// Types by their fixed oid: `pg_type.dat` in the server's source.
mod type_oid {
    pub(super) const BOOL: u32 = 16;
    pub(super) const BYTEA: u32 = 17;
    pub(super) const JSON: u32 = 114;
    pub(super) const JSONB: u32 = 3802;
    pub(super) const TIMESTAMP: u32 = 1114;
}

impl Field {
    const ALL: [(&'static str, Self); 16] = [
        ("seq", Self::Seq),
        ("id", Self::Id),
        ("aggregate_type", Self::AggregateType),
        ("aggregate_id", Self::AggregateId),
        ("event_type", Self::EventType),
        ("topic", Self::Topic),
        ("partition_key", Self::PartitionKey),
        ("payload", Self::Payload),
        ("headers", Self::Headers),
        ("schema_version", Self::SchemaVersion),
        ("trace_id", Self::TraceId),
        ("correlation_id", Self::CorrelationId),
        ("causation_id", Self::CausationId),
        ("traceparent", Self::Traceparent),
        ("created_at", Self::CreatedAt),
        ("scheduled_at", Self::ScheduledAt),
    ];

    fn name(self) -> &'static str {
        Self::ALL[self as usize].0
    }

    /// Whether an event is impossible without its column. A missing payload would make
    /// every event a tombstone.
    fn is_required(self) -> bool {
        matches!(
            self,
            Self::Id | Self::AggregateType | Self::AggregateId | Self::EventType | Self::Payload
        )
    }
}

/// The values of a row by field, as they are found.
#[derive(Default)]
struct Fields<'a>([Option<&'a str>; Field::ALL.len()]);

impl<'a> Fields<'a> {
    fn get(&self, field: Field) -> Option<&'a str> {
        self.0[field as usize]
    }
}

impl Columns {
    /// Columns that are no field's are passed over; those that are missing are
    /// noticed when a row is read, so that the row can be named.
    pub(super) fn of(relation: &Relation, table: &Table) -> Self {
        let place = |field: &str| {
            let name = table.column(field)?;
            let mut columns = relation.columns.iter();
            columns.position(|column| column.name == name)
        };
        let mut fields = vec![None; relation.columns.len()];
        let mut shared = Vec::new();
        let mut missing = None;
        for (name, field) in Field::ALL {
            match place(name) {
                Some(column) => match fields[column] {
                    None => fields[column] = Some(field),
                    Some(first) => shared.push((field, first)),
                },
                None if field.is_required() && !table.may_lack(name) => {
                    missing = missing.or(Some(table.column(name).unwrap_or(name)));
                }
                None => {}
            }
        }
        let mut placed = Vec::new();
        for placement in table.placements() {
            let mut columns = relation.columns.iter();
            match columns.position(|column| column.name == placement.column) {
                Some(column) => placed.push(Placed {
                    column,
                    is_boolean: relation.columns[column].type_oid == type_oid::BOOL,
                }),
                None => missing = missing.or(Some(&placement.column)),
            }
        }
        let type_of = |field| place(field).map(|column| relation.columns[column].type_oid);
        Self {
            fields,
            shared,
            placed,
            names_aggregate_and_type: table.preset.names_aggregate_and_type(),
            progress: table.preset.tracking().and_then(|tracking| {
                let field = match tracking {
                    Tracking::Status => "status",
                    Tracking::Times => "published_at",
                };
                Some((place(field)?, tracking))
            }),
            xid: table
                .is_ours()
                .then(|| {
                    relation
                        .columns
                        .iter()
                        .position(|column| column.name == "xid")
                })
                .flatten(),
            described: relation.columns.iter().cloned().collect(),
            missing: missing.map(str::to_owned),
            local_times: [Field::CreatedAt, Field::ScheduledAt]
                .into_iter()
                .filter(|field| type_of(field.name()) == Some(type_oid::TIMESTAMP))
                .collect(),
            // What is sent by its time can be cancelled: that must not depend on when it was
            // committed, which nobody knows before.
            schedules_all: table.is_ours(),
            payload: match type_of("payload") {
                Some(type_oid::JSON | type_oid::JSONB) => PayloadType::Json,
                Some(type_oid::BYTEA) => PayloadType::Bytea,
                _ => PayloadType::Text,
            },
        }
    }

    /// Whether a row that was inserted says that it is published or given up, as one does that
    /// was copied, or moved to another partition.
    pub(super) fn is_done_with(&self, row: &Tuple<'_>) -> bool {
        let Some((column, tracking)) = self.progress else {
            return false;
        };
        match (tracking, row.values().nth(column)) {
            (Tracking::Status, Some(Value::Text(status))) => status != b"pending",
            (Tracking::Times, Some(Value::Text(_))) => true,
            _ => false,
        }
    }

    /// The event of a row. `committed_at` stands in for a `created_at` that the
    /// table does not have.
    pub(super) fn read<'a>(
        &self,
        row: &Tuple<'a>,
        committed_at: Timestamp,
    ) -> Result<Event<'a>, Unreadable> {
        if let Some(name) = &self.missing {
            return Err(Unreadable::Missing(name.clone()));
        }
        let fields = self.values(row)?;
        let required = |field| {
            let value = fields.get(field);
            value.ok_or_else(|| Unreadable::Null(self.column_of(field)))
        };
        let named = |field| match self.names_aggregate_and_type {
            true => required(field).map(Some),
            false => Ok(fields.get(field)),
        };
        Ok(Event {
            seq: fields.get(Field::Seq),
            id: required(Field::Id)?,
            aggregate_type: required(Field::AggregateType)?,
            aggregate_id: named(Field::AggregateId)?,
            event_type: named(Field::EventType)?,
            topic: fields.get(Field::Topic),
            partition_key: fields.get(Field::PartitionKey),
            payload: fields.get(Field::Payload).map(|text| match self.payload {
                PayloadType::Json => Payload::Json(text),
                PayloadType::Bytea => Payload::Hex(text),
                PayloadType::Text => Payload::Text(text),
            }),
            headers: fields.get(Field::Headers),
            schema_version: fields.get(Field::SchemaVersion),
            trace_id: fields.get(Field::TraceId),
            correlation_id: fields.get(Field::CorrelationId),
            causation_id: fields.get(Field::CausationId),
            traceparent: fields.get(Field::Traceparent),
            created_at: self
                .time(&fields, Field::CreatedAt)?
                .unwrap_or(committed_at),
            scheduled_at: self
                .time(&fields, Field::ScheduledAt)?
                .filter(|at| self.schedules_all || is_to_come(*at, committed_at)),
            placed: self.placed(row)?,
        })
    }

    fn time(&self, fields: &Fields<'_>, field: Field) -> Result<Option<Timestamp>, Unreadable> {
        let Some(text) = fields.get(field) else {
            return Ok(None);
        };
        let time = match self.local_times.contains(&field) {
            true => Timestamp::parse(&format!("{text}+00")),
            false => Timestamp::parse(text),
        };
        time.map(Some)
            .map_err(|why| Unreadable::Time(field.name(), why))
    }

    /// What can be read of a row that may be no event.
    pub(super) fn outline(&self, row: &Tuple<'_>) -> Outline {
        let mut found: [Option<String>; Field::ALL.len()] = Default::default();
        for (column, (field, value)) in self.fields.iter().zip(row.values()).enumerate() {
            if let Some(field) = *field {
                found[field as usize] = self.text(column, value).ok().flatten().map(str::to_owned);
            }
        }
        for (field, first) in &self.shared {
            found[*field as usize] = found[*first as usize].clone();
        }
        let mut take = |field: Field| found[field as usize].take();
        Outline {
            id: take(Field::Id),
            topic: take(Field::Topic),
            aggregate_type: take(Field::AggregateType),
            key: take(Field::PartitionKey).or_else(|| take(Field::AggregateId)),
            event_type: take(Field::EventType),
            xid: self.xid.and_then(|column| {
                let value = row.values().nth(column)?;
                self.text(column, value).ok().flatten().map(str::to_owned)
            }),
        }
    }

    /// The columns, in their order.
    pub(super) fn described(&self) -> &Arc<[Column]> {
        &self.described
    }

    /// The values of the columns that become headers: as Postgres prints them, but for
    /// booleans, which Connect prints in full.
    fn placed<'a>(&self, row: &Tuple<'a>) -> Result<Vec<Option<&'a str>>, Unreadable> {
        if self.placed.is_empty() {
            return Ok(Vec::new());
        }
        let mut placed = vec![None; self.placed.len()];
        for (column, value) in row.values().enumerate() {
            for (value_placed, place) in placed.iter_mut().zip(&self.placed) {
                if place.column == column {
                    *value_placed = match (place.is_boolean, self.text(column, value)?) {
                        (true, Some("t")) => Some("true"),
                        (true, Some("f")) => Some("false"),
                        (_, text) => text,
                    };
                }
            }
        }
        Ok(placed)
    }

    /// A value as text, unless it is NULL.
    fn text<'a>(&self, column: usize, value: Value<'a>) -> Result<Option<&'a str>, Unreadable> {
        let text = match value {
            Value::Null => return Ok(None),
            Value::Text(text) => std::str::from_utf8(text).ok(),
            Value::Unchanged | Value::Binary(_) => None,
        };
        let name = || self.name(column).unwrap_or_default().to_owned();
        text.map(Some).ok_or_else(|| Unreadable::NotText(name()))
    }

    /// The name of a field's column.
    fn column_of(&self, field: Field) -> String {
        let mut shared = self.shared.iter();
        let shared = shared.find(|(other, _)| *other == field);
        let field = shared.map_or(field, |(_, first)| *first);
        let mut fields = self.fields.iter();
        let column = fields.position(|known| *known == Some(field));
        let name = column.and_then(|column| self.name(column));
        name.unwrap_or(field.name()).to_owned()
    }

    fn name(&self, column: usize) -> Option<&str> {
        let column = self.described.get(column)?;
        Some(&column.name)
    }

    /// The row's id and number as far as they can be read: for an error.
    pub(super) fn name_of(&self, row: &Tuple<'_>) -> String {
        let named = self.fields.iter().zip(row.values());
        named
            .filter_map(|(field, value)| match (field, value) {
                (Some(field @ (Field::Id | Field::Seq)), Value::Text(text)) => {
                    let text = String::from_utf8_lossy(text);
                    Some(format!("{} {text}", field.name()))
                }
                _ => None,
            })
            .collect::<Vec<_>>()
            .join(", ")
    }

    fn values<'a>(&self, row: &Tuple<'a>) -> Result<Fields<'a>, Unreadable> {
        let mut fields = Fields::default();
        for (column, (field, value)) in self.fields.iter().zip(row.values()).enumerate() {
            if let Some(field) = *field {
                fields.0[field as usize] = self.text(column, value)?;
            }
        }
        for (field, first) in &self.shared {
            fields.0[*field as usize] = fields.get(*first);
        }
        Ok(fields)
    }
}

/// Whether a row of others is to be sent later: they name a time for each row, that of its
/// creation for most. When a row of a copy was committed nobody knows.
fn is_to_come(time: Timestamp, committed_at: Timestamp) -> bool {
    time > committed_at && time > Timestamp::from(SystemTime::now())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pgoutput::{Message, decode, encode_insert};
    use crate::table::Preset;

    #[test]
    fn each_field_finds_its_own_name() {
        for (name, field) in Field::ALL {
            assert_eq!(field.name(), name);
        }
    }

    const TEXT: u32 = 25;

    fn debezium(columns: &[(&str, u32)], placements: &[&str]) -> Columns {
        let placements = placements.iter().map(|text| text.parse().unwrap());
        let table = Table::new(Preset::Debezium, "postbox", None, &[]).unwrap();
        let columns = columns.iter().map(|(name, type_oid)| Column {
            name: (*name).to_owned(),
            type_oid: *type_oid,
        });
        let relation = Relation {
            id: 7,
            schema: "public".to_owned(),
            name: "outbox".to_owned(),
            columns: columns.collect(),
        };
        Columns::of(&relation, &table.placing(placements.collect()))
    }

    /// Reads a row with these values.
    fn read<T>(
        columns: &Columns,
        values: &[Option<&str>],
        look: impl FnOnce(Result<Event<'_>, Unreadable>) -> T,
    ) -> T {
        let values = values.iter().map(|value| match value {
            Some(text) => Value::Text(text.as_bytes()),
            None => Value::Null,
        });
        let bytes = encode_insert(7, values);
        let Message::Insert(insert) = decode(&bytes).unwrap() else {
            panic!("not an insert");
        };
        look(columns.read(&insert.row, Timestamp::from_unix_micros(0)))
    }

    const ROUTER: [(&str, u32); 6] = [
        ("id", TEXT),
        ("aggregatetype", TEXT),
        ("aggregateid", TEXT),
        ("payload", type_oid::JSONB),
        ("is_test", type_oid::BOOL),
        ("type", TEXT),
    ];

    #[test]
    fn placed_columns_come_in_the_order_of_their_headers() {
        let placements = [
            "type:header:eventType",
            "is_test:header",
            "type:header",
            "id:header:key",
        ];
        let columns = debezium(&ROUTER, &placements);
        let row = [
            Some("1"),
            Some("order"),
            Some("42"),
            Some("{}"),
            Some("f"),
            None,
        ];
        read(&columns, &row, |event| {
            let event = event.unwrap();
            assert_eq!(event.placed, [None, Some("false"), None, Some("1")]);
            assert_eq!(event.event_type, None);
        });
    }

    #[test]
    fn a_column_that_is_missing_is_named_as_the_table_would_have_it() {
        let without = |name: &str, placements: &[&str]| {
            let columns = ROUTER.into_iter().filter(|(known, _)| *known != name);
            let columns = debezium(&columns.collect::<Vec<_>>(), placements);
            let row = [Some("t"); 5];
            read(&columns, &row, |event| {
                event.map(|_| ()).map_err(|error| error.to_string())
            })
        };
        for name in ["id", "aggregatetype", "aggregateid", "payload"] {
            let expected = format!("the outbox has no column \"{name}\"");
            assert_eq!(without(name, &[]), Err(expected));
        }
        assert_eq!(without("type", &[]), Ok(()));
        let expected = "the outbox has no column \"type\"".to_owned();
        assert_eq!(without("type", &["type:header"]), Err(expected));
    }

    #[test]
    fn only_the_aggregate_and_the_type_may_be_null() {
        let columns = debezium(&ROUTER, &[]);
        for (null, expected) in [
            (0, Some("the column \"id\" is NULL")),
            (1, Some("the column \"aggregatetype\" is NULL")),
            (2, None),
            (5, None),
        ] {
            let mut row = [Some("1"); 6];
            row[null] = None;
            let refused = read(&columns, &row, |event| {
                event.err().map(|error| error.to_string())
            });
            assert_eq!(refused.as_deref(), expected);
        }
    }
}
