//! Which column of a table is which field of an event.

use crate::event::{Event, Payload};
use crate::pgoutput::{Relation, Tuple, Value};
use crate::table::Table;
use crate::timestamp::{Timestamp, TimestampError};

/// The fields of a table's columns, in the columns' order.
#[derive(Debug)]
pub(super) struct Columns {
    fields: Vec<Option<Field>>,
    /// Fields that share a column with one of those: which, and with which.
    shared: Vec<(Field, Field)>,
    payload: PayloadType,
    /// A column that every event needs and this table does not have.
    missing: Option<&'static str>,
}

/// Why a row cannot be read as an event.
#[derive(Debug, thiserror::Error)]
pub enum Unreadable {
    /// A column that every event needs is not in the table.
    #[error("the outbox has no column \"{0}\"")]
    Missing(&'static str),
    /// A column that every event needs is NULL.
    #[error("the column \"{0}\" is NULL")]
    Null(&'static str),
    /// The value is not text in UTF-8.
    #[error("the column \"{0}\" is not text in UTF-8")]
    NotText(&'static str),
    /// The row's time cannot be carried by a record.
    #[error("the column \"created_at\": {0}")]
    CreatedAt(#[from] TimestampError),
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
}

/// Types by their fixed oid: `pg_type.dat` in the server's source.
mod type_oid {
    pub(super) const BYTEA: u32 = 17;
    pub(super) const JSON: u32 = 114;
    pub(super) const JSONB: u32 = 3802;
}

impl Field {
    const ALL: [(&'static str, Self); 15] = [
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
    ];

    fn name(self) -> &'static str {
        Self::ALL[self as usize].0
    }

    /// Whether an event is impossible without it. A missing payload would make
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

    fn required(&self, field: Field) -> Result<&'a str, Unreadable> {
        self.get(field).ok_or(Unreadable::Null(field.name()))
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
                None if field.is_required() => missing = missing.or(Some(name)),
                None => {}
            }
        }
        let payload = place("payload").map(|column| relation.columns[column].type_oid);
        Self {
            fields,
            shared,
            missing,
            payload: match payload {
                Some(type_oid::JSON | type_oid::JSONB) => PayloadType::Json,
                Some(type_oid::BYTEA) => PayloadType::Bytea,
                _ => PayloadType::Text,
            },
        }
    }

    /// The event of a row. `committed_at` stands in for a `created_at` that the
    /// table does not have.
    pub(super) fn read<'a>(
        &self,
        row: &Tuple<'a>,
        committed_at: Timestamp,
    ) -> Result<Event<'a>, Unreadable> {
        if let Some(name) = self.missing {
            return Err(Unreadable::Missing(name));
        }
        let fields = self.values(row)?;
        Ok(Event {
            seq: fields.get(Field::Seq),
            id: fields.required(Field::Id)?,
            aggregate_type: fields.required(Field::AggregateType)?,
            aggregate_id: fields.required(Field::AggregateId)?,
            event_type: fields.required(Field::EventType)?,
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
            created_at: match fields.get(Field::CreatedAt) {
                Some(text) => Timestamp::parse(text)?,
                None => committed_at,
            },
        })
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
        for (field, value) in self.fields.iter().zip(row.values()) {
            let Some(field) = *field else { continue };
            fields.0[field as usize] = match value {
                Value::Null => None,
                Value::Text(text) => {
                    let text = std::str::from_utf8(text);
                    Some(text.map_err(|_| Unreadable::NotText(field.name()))?)
                }
                Value::Unchanged | Value::Binary(_) => {
                    return Err(Unreadable::NotText(field.name()));
                }
            };
        }
        for (field, first) in &self.shared {
            fields.0[*field as usize] = fields.get(*first);
        }
        Ok(fields)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_field_finds_its_own_name() {
        for (name, field) in Field::ALL {
            assert_eq!(field.name(), name);
        }
    }
}
