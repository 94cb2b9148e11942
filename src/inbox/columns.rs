//! Messages as arrays, one for each column: how a statement takes any number of them.

use tokio_postgres::types::{ToSql, Type};

use super::message::Message;

/// A parameter of a statement.
pub(super) type Parameter<'a> = (&'a (dyn ToSql + Sync), Type);

/// The columns that a message has of itself.
#[derive(Default)]
pub(super) struct Columns<'a> {
    message_ids: Vec<&'a str>,
    topics: Vec<&'a str>,
    partitions: Vec<i32>,
    offsets: Vec<i64>,
    keys: Vec<Option<&'a str>>,
    event_types: Vec<&'a str>,
    schema_versions: Vec<Option<&'a str>>,
    headers: Vec<&'a str>,
    payloads: Vec<Option<&'a str>>,
    bodies: Vec<Option<&'a [u8]>>,
    /// Microseconds since 1970.
    produced: Vec<Option<i64>>,
}

impl<'a> Columns<'a> {
    /// Rows `m` of these columns, of the first [`Self::COUNT`] parameters.
    pub(super) const ROWS: &'static str = "unnest($1::text[], $2::text[], $3::integer[], $4::bigint[], $5::text[], \
         $6::text[], $7::text[], $8::text[], $9::text[], $10::bytea[], $11::bigint[]) WITH ORDINALITY AS m \
         (message_id, topic, partition, kafka_offset, key, event_type, schema_version, headers, payload, body, \
         produced, n)";

    /// How many parameters they are.
    pub(super) const COUNT: usize = 11;

    /// What follows the group in `postbox.message`.
    pub(super) const MESSAGE: &'static str = "m.message_id, m.topic, m.partition, m.kafka_offset, m.key, m.event_type, \
         m.schema_version, m.headers::jsonb, m.payload::jsonb, m.body, \
         timestamptz 'epoch' + m.produced * interval '1 microsecond'";

    /// The same without the topic.
    pub(super) const STORED: &'static str = "m.message_id, m.partition, m.kafka_offset, m.key, m.event_type, \
         m.schema_version, m.headers::jsonb, m.payload::jsonb, m.body, \
         timestamptz 'epoch' + m.produced * interval '1 microsecond'";

    pub(super) fn of(messages: impl IntoIterator<Item = &'a Message>) -> Self {
        let mut columns = Self::default();
        for message in messages {
            columns.message_ids.push(&message.id.text);
            columns.topics.push(&message.topic);
            columns.partitions.push(message.partition);
            columns.offsets.push(message.offset);
            columns.keys.push(message.key.as_deref());
            columns.event_types.push(&message.event_type);
            columns
                .schema_versions
                .push(message.schema_version.as_deref());
            columns.headers.push(&message.headers);
            columns.payloads.push(message.payload.as_deref());
            columns.bodies.push(message.body.as_deref());
            columns
                .produced
                .push(message.produced_at.map(|at| at.unix_micros()));
        }
        columns
    }

    pub(super) fn parameters(&self) -> Vec<Parameter<'_>> {
        vec![
            (&self.message_ids, Type::TEXT_ARRAY),
            (&self.topics, Type::TEXT_ARRAY),
            (&self.partitions, Type::INT4_ARRAY),
            (&self.offsets, Type::INT8_ARRAY),
            (&self.keys, Type::TEXT_ARRAY),
            (&self.event_types, Type::TEXT_ARRAY),
            (&self.schema_versions, Type::TEXT_ARRAY),
            (&self.headers, Type::TEXT_ARRAY),
            (&self.payloads, Type::TEXT_ARRAY),
            (&self.bodies, Type::BYTEA_ARRAY),
            (&self.produced, Type::INT8_ARRAY),
        ]
    }
}
