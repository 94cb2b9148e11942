//! An event as it was read from the outbox, before it becomes a record.

use crate::timestamp::Timestamp;

/// One row of the outbox, borrowed from the bytes it was read from.
#[derive(Debug, Clone, PartialEq)]
pub struct Event<'a> {
    /// The row's number, for people: it orders nothing. Tables of others may
    /// have none.
    pub seq: Option<&'a str>,
    /// What a consumer recognises a repetition by.
    pub id: &'a str,
    /// The kind of thing that the event is about, such as `order`.
    pub aggregate_type: &'a str,
    /// Which of its kind. Rows of Debezium's tables may name none.
    pub aggregate_id: Option<&'a str>,
    /// What happened to it, such as `order_placed`. Debezium's tables need not say.
    pub event_type: Option<&'a str>,
    /// The topic, if the row overrides the route.
    pub topic: Option<&'a str>,
    /// What is kept in order, if not the aggregate.
    pub partition_key: Option<&'a str>,
    /// The body; `None` is a tombstone.
    pub payload: Option<Payload<'a>>,
    /// The row's own headers: a JSON object.
    pub headers: Option<&'a str>,
    /// The version of the body's schema.
    pub schema_version: Option<&'a str>,
    /// An application's trace id.
    pub trace_id: Option<&'a str>,
    /// What the event belongs to.
    pub correlation_id: Option<&'a str>,
    /// What caused the event.
    pub causation_id: Option<&'a str>,
    /// The W3C trace context.
    pub traceparent: Option<&'a str>,
    /// When the row was written.
    pub created_at: Timestamp,
    /// When it is to be sent, if not at once.
    pub scheduled_at: Option<Timestamp>,
    /// The values of the columns that become headers besides, in the order of
    /// [`Table::placements`](crate::table::Table::placements).
    pub placed: Vec<Option<&'a str>>,
}

/// What can be read of a row that may be no event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Outline {
    /// Its event's id.
    pub(crate) id: Option<String>,
    /// The topic that it names.
    pub(crate) topic: Option<String>,
    /// The kind of thing that it is about.
    pub(crate) aggregate_type: Option<String>,
    /// What is kept in order.
    pub(crate) key: Option<String>,
    /// What happened.
    pub(crate) event_type: Option<String>,
    /// The transaction that wrote it, with its epoch; only of our own outbox.
    pub(crate) xid: Option<String>,
}

/// A body, by the type of the column it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload<'a> {
    /// `json` or `jsonb`: Postgres has checked it.
    Json(&'a str),
    /// Any other type, as its text: it may or may not be JSON.
    Text(&'a str),
    /// `bytea`, as Postgres prints it: two digits a byte after `\x`.
    Hex(&'a str),
}

impl<'a> Event<'a> {
    /// What is kept in order, if anything: the partition key, else the aggregate's id.
    pub fn key(&self) -> Option<&'a str> {
        self.partition_key.or(self.aggregate_id)
    }
}
