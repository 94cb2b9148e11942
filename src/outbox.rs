//! Events: what an application writes and the relay publishes.
//!
//! [`append`] takes the application's own transaction, so the event exists
//! exactly when the change it tells of does. It calls the database's `emit`, as
//! SQL callers do: there is one way in. [`cancel`] takes a scheduled event back.

use std::time::SystemTime;

use serde::{Serialize, Serializer};
use tokio_postgres::Transaction;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};

/// The schema of the outbox, unless it was set up in another.
pub const DEFAULT_SCHEMA: &str = "postbox";

/// An event to write.
///
/// ```
/// use postbox::outbox::NewEvent;
///
/// # fn main() -> postbox::Result<()> {
/// let event = NewEvent::new("order", "42", "order_placed", &serde_json::json!({"total": 17}))?
///     .correlation_id("checkout-7")
///     .idempotency_key("place-42");
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "an event is written by `append`"]
pub struct NewEvent {
    aggregate_type: String,
    aggregate_id: String,
    event_type: String,
    payload: Option<String>,
    topic: Option<String>,
    partition_key: Option<String>,
    headers: Vec<(String, String)>,
    schema_version: Option<String>,
    trace_id: Option<String>,
    correlation_id: Option<String>,
    causation_id: Option<String>,
    idempotency_key: Option<String>,
    scheduled_at: Option<SystemTime>,
    id: Option<Uuid>,
}

impl NewEvent {
    /// An event whose payload is `payload` as JSON. `None` becomes JSON's
    /// `null`, which is a value: see [`NewEvent::tombstone`].
    pub fn new(
        aggregate_type: impl Into<String>,
        aggregate_id: impl Into<String>,
        event_type: impl Into<String>,
        payload: &(impl Serialize + ?Sized),
    ) -> Result<Self> {
        let text = serde_json::to_string(payload).map_err(|error| {
            Error::new(ErrorKind::Event, "write the payload as JSON").caused_by(error)
        })?;
        Ok(Self::from_json(
            aggregate_type,
            aggregate_id,
            event_type,
            text,
        ))
    }

    /// An event whose payload is JSON already. It is published as it stands,
    /// byte for byte; the database refuses what is not JSON.
    pub fn from_json(
        aggregate_type: impl Into<String>,
        aggregate_id: impl Into<String>,
        event_type: impl Into<String>,
        payload: impl Into<String>,
    ) -> Self {
        Self {
            payload: Some(payload.into()),
            ..Self::tombstone(aggregate_type, aggregate_id, event_type)
        }
    }

    /// An event without a payload: a record without a value, which makes a
    /// compacted topic forget the key.
    pub fn tombstone(
        aggregate_type: impl Into<String>,
        aggregate_id: impl Into<String>,
        event_type: impl Into<String>,
    ) -> Self {
        Self {
            aggregate_type: aggregate_type.into(),
            aggregate_id: aggregate_id.into(),
            event_type: event_type.into(),
            payload: None,
            topic: None,
            partition_key: None,
            headers: Vec::new(),
            schema_version: None,
            trace_id: None,
            correlation_id: None,
            causation_id: None,
            idempotency_key: None,
            scheduled_at: None,
            id: None,
        }
    }

    /// The topic of this event alone, in place of the relay's route.
    pub fn topic(mut self, topic: impl Into<String>) -> Self {
        self.topic = Some(topic.into());
        self
    }

    /// The record's key, in place of the aggregate's id. Events of one key keep
    /// their order.
    pub fn partition_key(mut self, key: impl Into<String>) -> Self {
        self.partition_key = Some(key.into());
        self
    }

    /// Adds a record header, after those that were added before.
    pub fn header(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    /// The version of the payload's schema.
    pub fn schema_version(mut self, version: impl Into<String>) -> Self {
        self.schema_version = Some(version.into());
        self
    }

    /// The trace the event belongs to.
    pub fn trace_id(mut self, id: impl Into<String>) -> Self {
        self.trace_id = Some(id.into());
        self
    }

    /// The conversation the event belongs to.
    pub fn correlation_id(mut self, id: impl Into<String>) -> Self {
        self.correlation_id = Some(id.into());
        self
    }

    /// The message or command that caused the event.
    pub fn causation_id(mut self, id: impl Into<String>) -> Self {
        self.causation_id = Some(id.into());
        self
    }

    /// Writes the event only if no other has this key: see [`append`].
    pub fn idempotency_key(mut self, key: impl Into<String>) -> Self {
        self.idempotency_key = Some(key.into());
        self
    }

    /// The time before which the event must not be sent.
    pub fn scheduled_at(mut self, time: SystemTime) -> Self {
        self.scheduled_at = Some(time);
        self
    }

    /// The event's id, in place of a random one.
    pub fn id(mut self, id: Uuid) -> Self {
        self.id = Some(id);
        self
    }

    /// The headers as one JSON object, in the order they were added.
    fn headers_json(&self) -> Option<String> {
        if self.headers.is_empty() {
            return None;
        }
        let mut text = Vec::new();
        serde_json::Serializer::new(&mut text)
            .collect_map(self.headers.iter().map(|(name, value)| (name, value)))
            .expect("strings are JSON, and a vector takes them");
        Some(String::from_utf8(text).expect("JSON is UTF-8"))
    }
}

/// Writes `event` in `transaction` and returns its id.
///
/// With an idempotency key that is taken nothing is written, and the id is that
/// of the first event. While the transaction that took the key is open, this
/// waits for its end. In `REPEATABLE READ` and `SERIALIZABLE` a key taken since
/// the transaction began is a serialization failure: try the transaction again.
///
/// An error of the database is the [`source`](std::error::Error::source) of
/// this one, as [`tokio_postgres::Error`]. The transaction is then lost.
pub async fn append(transaction: &Transaction<'_>, event: NewEvent) -> Result<Uuid> {
    append_in(DEFAULT_SCHEMA, transaction, event).await
}

/// [`append`] to the outbox of another schema.
pub async fn append_in(
    schema: &str,
    transaction: &Transaction<'_>,
    event: NewEvent,
) -> Result<Uuid> {
    // JSON travels as text: its bytes must arrive as they are.
    let sql = format!(
        "SELECT {}.emit(aggregate_type => $1, aggregate_id => $2, event_type => $3, \
         payload => $4::json, topic => $5, partition_key => $6, headers => $7::json, \
         schema_version => $8, trace_id => $9, correlation_id => $10, causation_id => $11, \
         idempotency_key => $12, scheduled_at => $13, id => $14)",
        quote_identifier(schema)
    );
    // Typed: one round trip, and nothing prepared that a pooler could lose.
    let rows = transaction
        .query_typed(
            &sql,
            &[
                (&event.aggregate_type, Type::TEXT),
                (&event.aggregate_id, Type::TEXT),
                (&event.event_type, Type::TEXT),
                (&event.payload, Type::TEXT),
                (&event.topic, Type::TEXT),
                (&event.partition_key, Type::TEXT),
                (&event.headers_json(), Type::TEXT),
                (&event.schema_version, Type::TEXT),
                (&event.trace_id, Type::TEXT),
                (&event.correlation_id, Type::TEXT),
                (&event.causation_id, Type::TEXT),
                (&event.idempotency_key, Type::TEXT),
                (&event.scheduled_at, Type::TIMESTAMPTZ),
                (&event.id, Type::UUID),
            ],
        )
        .await;
    let doing = format!("append to \"{schema}.outbox\"");
    let value = rows.and_then(|rows| rows.first().map(|row| row.try_get(0)).transpose());
    let id = value.map_err(|error| refused(&doing, "--grant-writer-to", error))?;
    id.ok_or_else(|| returned_nothing(schema, "emit"))
}

/// Has a scheduled event not sent, from the commit of `transaction` on. Until the transaction
/// ends, the event is not sent either; if it is rolled back, the event goes out at its time.
///
/// False if the event will be sent or was sent: its time has come, by the database's clock,
/// or it was not scheduled, or there is none with this id. True again for one that is
/// cancelled already.
///
/// In `REPEATABLE READ` and `SERIALIZABLE` an event that was written since the transaction
/// began is not seen; and if somebody else has cancelled it since, that is a serialization
/// failure: try the transaction again.
///
/// An error of the database is the [`source`](std::error::Error::source) of this one, as
/// [`tokio_postgres::Error`]. The transaction is then lost.
pub async fn cancel(transaction: &Transaction<'_>, id: Uuid) -> Result<bool> {
    cancel_in(DEFAULT_SCHEMA, transaction, id).await
}

/// [`cancel`] of an event in another schema.
pub async fn cancel_in(schema: &str, transaction: &Transaction<'_>, id: Uuid) -> Result<bool> {
    let sql = format!("SELECT {}.cancel($1)", quote_identifier(schema));
    let rows = transaction.query_typed(&sql, &[(&id, Type::UUID)]).await;
    let doing = format!("cancel an event of \"{schema}.outbox\"");
    let value = rows.and_then(|rows| rows.first().map(|row| row.try_get(0)).transpose());
    let flags = "--grant-writer-to` or `--grant-operator-to";
    let is_cancelled = value.map_err(|error| refused(&doing, flags, error))?;
    is_cancelled.ok_or_else(|| returned_nothing(schema, "cancel"))
}

pub(crate) fn returned_nothing(schema: &str, function: &str) -> Error {
    let message = format!("function \"{schema}.{function}\" returned no row");
    Error::new(ErrorKind::Unexpected, message)
}

/// `grants` are the flags of a set-up that give the right to.
pub(crate) fn refused(doing: &str, grants: &str, error: tokio_postgres::Error) -> Error {
    let (kind, message) = match error.code() {
        Some(code) if *code == SqlState::INSUFFICIENT_PRIVILEGE => (
            ErrorKind::Rights,
            format!("{doing}: `postbox setup {grants}` gives the right to"),
        ),
        Some(code)
            if [
                SqlState::INVALID_SCHEMA_NAME,
                SqlState::UNDEFINED_FUNCTION,
                SqlState::UNDEFINED_TABLE,
            ]
            .contains(code) =>
        {
            (
                ErrorKind::Database,
                format!("{doing}: has `postbox setup` been run here?"),
            )
        }
        // Data exceptions and broken constraints: this event, as it is.
        Some(code) if code.code().starts_with("22") || code.code().starts_with("23") => {
            (ErrorKind::Event, format!("{doing}: the event is refused"))
        }
        _ => (ErrorKind::DatabaseAway, doing.to_owned()),
    };
    Error::new(kind, message).caused_by(error)
}

pub(crate) fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_keep_their_order() {
        let event = NewEvent::tombstone("a", "1", "gone")
            .header("z", "quote \"")
            .header("a", "2");
        assert_eq!(
            event.headers_json().as_deref(),
            Some(r#"{"z":"quote \"","a":"2"}"#)
        );
    }

    #[test]
    fn no_headers_are_no_object() {
        assert_eq!(NewEvent::tombstone("a", "1", "gone").headers_json(), None);
    }

    #[test]
    fn json_text_is_left_as_it_is() {
        let text = "{ \"a\":1 ,\"a\":123456789012345678901234567890 }";
        let event = NewEvent::from_json("a", "1", "made", text);
        assert_eq!(event.payload.as_deref(), Some(text));
        let raw: Box<serde_json::value::RawValue> = serde_json::from_str(text).unwrap();
        let event = NewEvent::new("a", "1", "made", &raw).unwrap();
        assert_eq!(event.payload.as_deref(), Some(text));
    }

    #[test]
    fn a_null_payload_is_not_a_tombstone() {
        let event = NewEvent::new("a", "1", "made", &None::<i32>).unwrap();
        assert_eq!(event.payload.as_deref(), Some("null"));
        assert_eq!(NewEvent::tombstone("a", "1", "gone").payload, None);
    }

    #[test]
    fn identifiers_are_quoted() {
        assert_eq!(quote_identifier("my \"box"), "\"my \"\"box\"");
    }
}
