//! From an event to a Kafka record: the wire contract, byte by byte. Pure.
//!
//! | part | content |
//! |---|---|
//! | topic | the row's `topic`, else the route, by default the aggregate type |
//! | key | the row's `partition_key`, else its `aggregate_id`, in UTF-8; none where table or row has none |
//! | timestamp | the row's `created_at`, in milliseconds |
//! | headers | by [`HeaderStyle`], and by [`Placement`] |
//! | value | by [`Format`]; a NULL payload is a null value (a tombstone) in each |
//!
//! A payload is copied, never parsed and printed again: spaces, the order of its
//! keys, repeated keys and numbers of any length arrive as they were written.

mod headers;
mod route;

pub use headers::{Header, HeaderStyle};
pub use route::{Route, RouteError, is_topic_name};

use std::borrow::Cow;
use std::io::Write;
use std::str::FromStr;

use serde::de::IgnoredAny;

use crate::event::{Event, Outline, Payload};
use crate::table::Placement;

/// What a record's value looks like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// One JSON object around the payload: `id`, `schema_version` (`"1.0.0"` when
    /// null), `event_type`, `aggregate_type`, `aggregate_id`, `payload`,
    /// `timestamp`, then those that are set of `trace_id`, `correlation_id`,
    /// `causation_id`.
    #[default]
    Envelope,
    /// The payload alone.
    Raw,
    /// `{"schema_version":…,"payload":…}`; a version that is null stays null.
    Versioned,
}

impl FromStr for Format {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "envelope" => Ok(Self::Envelope),
            "raw" => Ok(Self::Raw),
            "versioned" => Ok(Self::Versioned),
            _ => Err(format!(
                "unknown format \"{name}\": use envelope, raw or versioned"
            )),
        }
    }
}

/// Why an event can never become a record.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Kafka would not take the topic's name.
    #[error(
        "\"{0}\" is not a topic name: Kafka allows 1 to 249 of the characters a-z A-Z 0-9 . _ - and neither \".\" nor \"..\""
    )]
    Topic(String),
    /// The row does not say what the record is made of; and what needs it.
    #[error("the row has no {0}, which {1} needs")]
    Unsaid(&'static str, &'static str),
    /// The row's headers are not an object.
    #[error("the column \"headers\" is not a JSON object: {0}")]
    Headers(serde_json::Error),
    /// The payload's column holds something else than JSON, and the format is
    /// made of JSON.
    #[error("the column \"payload\" is not JSON ({0}): use the format raw, or a json column")]
    Payload(serde_json::Error),
    /// A `bytea` that is not printed in hexadecimal.
    #[error("the column \"payload\" is a bytea that is not printed in hexadecimal")]
    Hex,
}

/// The topic and the key of an event, as far as they are known.
pub(crate) type Address = (Option<String>, Option<String>);

/// A record, ready to be sent. It borrows from the event and from the encoder.
#[derive(Debug)]
pub struct Record<'a> {
    /// Where it goes: a legal topic name.
    pub topic: &'a str,
    /// What is kept in order, if anything.
    pub key: Option<&'a str>,
    /// The body; `None` is a tombstone.
    pub value: Option<&'a [u8]>,
    /// In the order in which they go out.
    pub headers: Vec<Header<'a>>,
    /// Milliseconds since 1970; `None`: when it is sent.
    pub timestamp_millis: Option<i64>,
}

impl Record<'_> {
    /// The bytes of its key, value and headers, which bound what is in flight.
    pub fn size(&self) -> usize {
        let headers = self.headers.iter().map(Header::size).sum::<usize>();
        self.key.map_or(0, str::len) + self.value.map_or(0, <[u8]>::len) + headers
    }
}

/// Makes records of events. It keeps its buffers from one to the next.
#[derive(Debug)]
pub struct Encoder {
    format: Format,
    route: Route,
    headers: HeaderStyle,
    /// The headers that are made of columns.
    placed: Vec<String>,
    is_keyed: bool,
    is_timed: bool,
    topic: String,
    value: Vec<u8>,
}

impl Encoder {
    /// An encoder for one format and one route.
    pub fn new(format: Format, route: Route) -> Self {
        Self {
            format,
            route,
            headers: HeaderStyle::default(),
            placed: Vec::new(),
            is_keyed: true,
            is_timed: true,
            topic: String::new(),
            value: Vec::new(),
        }
    }

    /// The same, with other headers.
    #[must_use]
    pub fn with_headers(self, headers: HeaderStyle) -> Self {
        Self { headers, ..self }
    }

    /// The same, with a header more for each of these columns.
    #[must_use]
    pub fn placing(self, placements: &[Placement]) -> Self {
        let names = placements.iter().map(|placed| placed.header.clone());
        Self {
            placed: names.collect(),
            ..self
        }
    }

    /// The same, whose records have a key or have none.
    #[must_use]
    pub fn keyed(self, is_keyed: bool) -> Self {
        Self { is_keyed, ..self }
    }

    /// The same, whose records have the time of their event, or that when they are sent.
    #[must_use]
    pub fn timed(self, is_timed: bool) -> Self {
        Self { is_timed, ..self }
    }

    /// Where the record of an event would go, and what it would be kept in order by, though
    /// there may never be one.
    pub(crate) fn address(&self, event: &Event<'_>) -> Address {
        let topic = match event.topic {
            Some(named) => Some(named.to_owned()),
            None => {
                let mut routed = String::new();
                let written = self.route.write(event, &mut routed);
                written.ok().map(|()| routed)
            }
        };
        let key = event.key().filter(|_| self.is_keyed);
        (topic, key.map(str::to_owned))
    }

    /// The same of a row that is no event, as far as it can be read.
    pub(crate) fn address_of(&self, outline: &Outline) -> Address {
        let aggregate_type = outline.aggregate_type.as_deref();
        let routed = || {
            self.route
                .topic_if(aggregate_type, outline.event_type.as_deref())
        };
        let key = outline.key.clone().filter(|_| self.is_keyed);
        (outline.topic.clone().or_else(routed), key)
    }

    /// The record of an event.
    ///
    /// # Errors
    /// If the event can never go out as it is.
    pub fn encode<'a>(&'a mut self, event: &Event<'a>) -> Result<Record<'a>, Refused> {
        self.topic.clear();
        match event.topic {
            Some(topic) => self.topic.push_str(topic),
            None => self.route.write(event, &mut self.topic)?,
        }
        if !is_topic_name(&self.topic) {
            return Err(Refused::Topic(self.topic.clone()));
        }
        let value = match event.payload {
            None => None,
            Some(payload) => Some(self.write_value(event, payload)?),
        };
        let headers = headers::of(event, self.headers, &self.placed)?;
        Ok(Record {
            topic: &self.topic,
            key: event.key().filter(|_| self.is_keyed),
            value: match value {
                None => None,
                Some(Value::Written) => Some(&self.value),
                Some(Value::Payload(text)) => Some(text.as_bytes()),
            },
            headers,
            timestamp_millis: (self.is_timed).then(|| event.created_at.unix_millis()),
        })
    }

    fn write_value<'a>(
        &mut self,
        event: &Event<'_>,
        payload: Payload<'a>,
    ) -> Result<Value<'a>, Refused> {
        self.value.clear();
        match (self.format, payload) {
            (Format::Raw, Payload::Json(text) | Payload::Text(text)) => {
                return Ok(Value::Payload(text));
            }
            (Format::Raw, Payload::Hex(hex)) => self.value = bytes_of_hex(hex)?,
            (Format::Envelope, payload) => self.write_envelope(event, json(payload)?.as_ref())?,
            (Format::Versioned, payload) => self.write_versioned(event, json(payload)?.as_ref()),
        }
        Ok(Value::Written)
    }

    fn write_envelope(&mut self, event: &Event<'_>, payload: &[u8]) -> Result<(), Refused> {
        let out = &mut self.value;
        let said = |field, value: Option<_>| value.ok_or(Refused::Unsaid(field, "the envelope"));
        let event_type = said("event_type", event.event_type)?;
        let aggregate_id = said("aggregate_id", event.aggregate_id)?;
        write_field(out, b"{\"id\":", event.id);
        let version = event.schema_version.unwrap_or("1.0.0");
        write_field(out, b",\"schema_version\":", version);
        write_field(out, b",\"event_type\":", event_type);
        write_field(out, b",\"aggregate_type\":", event.aggregate_type);
        write_field(out, b",\"aggregate_id\":", aggregate_id);
        out.extend_from_slice(b",\"payload\":");
        out.extend_from_slice(payload);
        write!(out, ",\"timestamp\":\"{}\"", event.created_at).expect(IN_MEMORY);
        for (name, value) in [
            (&b",\"trace_id\":"[..], event.trace_id),
            (b",\"correlation_id\":", event.correlation_id),
            (b",\"causation_id\":", event.causation_id),
        ] {
            if let Some(value) = value {
                write_field(out, name, value);
            }
        }
        out.push(b'}');
        Ok(())
    }

    fn write_versioned(&mut self, event: &Event<'_>, payload: &[u8]) {
        let out = &mut self.value;
        match event.schema_version {
            Some(version) => write_field(out, b"{\"schema_version\":", version),
            None => out.extend_from_slice(b"{\"schema_version\":null"),
        }
        out.extend_from_slice(b",\"payload\":");
        out.extend_from_slice(payload);
        out.push(b'}');
    }
}

const IN_MEMORY: &str = "a write to memory does not fail";

/// Where a value's bytes are: in the encoder's buffer, or still in the row.
enum Value<'a> {
    Written,
    Payload(&'a str),
}

fn write_field(out: &mut Vec<u8>, name: &[u8], value: &str) {
    out.extend_from_slice(name);
    serde_json::to_writer(out, value).expect(IN_MEMORY);
}

/// The payload as JSON, checked unless Postgres already has.
fn json(payload: Payload<'_>) -> Result<Cow<'_, [u8]>, Refused> {
    let bytes = match payload {
        Payload::Json(text) => return Ok(text.as_bytes().into()),
        Payload::Text(text) => Cow::from(text.as_bytes()),
        Payload::Hex(hex) => Cow::from(bytes_of_hex(hex)?),
    };
    serde_json::from_slice::<IgnoredAny>(&bytes).map_err(Refused::Payload)?;
    Ok(bytes)
}

fn bytes_of_hex(hex: &str) -> Result<Vec<u8>, Refused> {
    let digit = |byte: u8| (byte as char).to_digit(16).ok_or(Refused::Hex);
    let digits = hex.strip_prefix("\\x").ok_or(Refused::Hex)?.as_bytes();
    if digits.len() % 2 != 0 {
        return Err(Refused::Hex);
    }
    digits
        .chunks_exact(2)
        .map(|pair| Ok((digit(pair[0])? << 4 | digit(pair[1])?) as u8))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timestamp::Timestamp;

    fn event() -> Event<'static> {
        Event {
            seq: Some("7"),
            id: "0b9e7f64-6f0e-4a9a-8a39-0f9d0f6a7c11",
            aggregate_type: "order",
            aggregate_id: Some("42"),
            event_type: Some("order_placed"),
            topic: None,
            partition_key: None,
            payload: Some(Payload::Json(r#"{"b": 1,  "a": 2, "a": 3}"#)),
            headers: None,
            schema_version: None,
            trace_id: None,
            correlation_id: None,
            causation_id: None,
            traceparent: None,
            created_at: Timestamp::parse("2026-03-01 12:00:00.25+00").unwrap(),
            scheduled_at: None,
            placed: Vec::new(),
        }
    }

    fn value(format: Format, event: &Event<'_>) -> Option<String> {
        let mut encoder = Encoder::new(format, Route::default());
        let record = encoder.encode(event).unwrap();
        record
            .value
            .map(|value| String::from_utf8(value.to_vec()).unwrap())
    }

    #[test]
    fn an_envelope_is_these_bytes() {
        assert_eq!(
            value(Format::Envelope, &event()).unwrap(),
            concat!(
                r#"{"id":"0b9e7f64-6f0e-4a9a-8a39-0f9d0f6a7c11","schema_version":"1.0.0","#,
                r#""event_type":"order_placed","aggregate_type":"order","aggregate_id":"42","#,
                r#""payload":{"b": 1,  "a": 2, "a": 3},"timestamp":"2026-03-01T12:00:00.250000+00:00"}"#
            )
        );
    }

    #[test]
    fn an_envelope_ends_with_the_ids_that_are_set() {
        let event = Event {
            schema_version: Some("2.1"),
            trace_id: Some("t\"1"),
            causation_id: Some("c-1"),
            ..event()
        };
        let value = value(Format::Envelope, &event).unwrap();
        assert!(value.contains(r#""schema_version":"2.1""#), "{value}");
        assert!(
            value.ends_with(r#"+00:00","trace_id":"t\"1","causation_id":"c-1"}"#),
            "{value}"
        );
    }

    #[test]
    fn raw_is_the_payload_untouched() {
        assert_eq!(
            value(Format::Raw, &event()).unwrap(),
            r#"{"b": 1,  "a": 2, "a": 3}"#
        );
    }

    #[test]
    fn versioned_keeps_a_null_version() {
        assert_eq!(
            value(Format::Versioned, &event()).unwrap(),
            r#"{"schema_version":null,"payload":{"b": 1,  "a": 2, "a": 3}}"#
        );
    }

    #[test]
    fn a_null_payload_is_a_null_value_in_every_format() {
        let event = Event {
            payload: None,
            ..event()
        };
        for format in [Format::Envelope, Format::Raw, Format::Versioned] {
            assert_eq!(value(format, &event), None);
        }
    }

    #[test]
    fn bytes_go_out_raw_and_must_be_json_elsewhere() {
        let json = Event {
            payload: Some(Payload::Hex("\\x7b7d")),
            ..event()
        };
        assert_eq!(value(Format::Raw, &json).unwrap(), "{}");
        assert_eq!(
            value(Format::Versioned, &json).unwrap(),
            r#"{"schema_version":null,"payload":{}}"#
        );
        for payload in [
            Payload::Hex("\\xff"),
            Payload::Text("{]"),
            Payload::Text("1 2"),
        ] {
            let event = Event {
                payload: Some(payload),
                ..event()
            };
            let refused = Encoder::new(Format::Envelope, Route::default())
                .encode(&event)
                .unwrap_err();
            assert!(matches!(refused, Refused::Payload(_)), "{payload:?}");
        }
    }

    #[test]
    fn the_key_is_the_aggregate_unless_the_row_says_otherwise() {
        let mut encoder = Encoder::new(Format::Raw, Route::default());
        assert_eq!(encoder.encode(&event()).unwrap().key, Some("42"));
        let event = Event {
            partition_key: Some("customer-7"),
            ..event()
        };
        assert_eq!(encoder.encode(&event).unwrap().key, Some("customer-7"));
    }

    #[test]
    fn records_of_a_table_without_keys_have_none() {
        let mut encoder = Encoder::new(Format::Raw, Route::default()).keyed(false);
        assert_eq!(encoder.encode(&event()).unwrap().key, None);
    }

    #[test]
    fn placed_columns_follow_the_id_in_their_order() {
        let placements = ["b:header:second", "a:header"].map(|text| text.parse().unwrap());
        let event = Event {
            placed: vec![Some("2"), None],
            headers: Some(r#"{"own": "1", "second": "row"}"#),
            ..event()
        };
        let headers = |style| {
            let mut encoder = Encoder::new(Format::Raw, Route::default())
                .with_headers(style)
                .placing(&placements);
            let record = encoder.encode(&event).unwrap();
            let headers = record.headers.iter();
            headers
                .map(|header| (header.name.to_string(), header.value.is_some()))
                .collect::<Vec<_>>()
        };
        let named = |names: &[(&str, bool)]| {
            let names = names.iter();
            names
                .map(|(name, is_set)| ((*name).to_owned(), *is_set))
                .collect::<Vec<_>>()
        };
        let placed = [("id", true), ("second", true), ("a", false)];
        assert_eq!(headers(HeaderStyle::Debezium), named(&placed));
        // What is placed wins over the row's own, as ours do.
        let beside_others = [
            ("id", true),
            ("event_type", true),
            ("second", true),
            ("a", false),
            ("own", true),
        ];
        assert_eq!(headers(HeaderStyle::Postbox), named(&beside_others));
    }

    #[test]
    fn what_a_row_does_not_say_is_missed_only_where_it_is_needed() {
        let event = Event {
            aggregate_id: None,
            event_type: None,
            ..event()
        };
        let encoder = |format, route: &str| Encoder::new(format, route.parse().unwrap());
        let mut raw = encoder(Format::Raw, "{aggregate_type}").with_headers(HeaderStyle::Debezium);
        assert_eq!(raw.encode(&event).unwrap().key, None);
        for (format, route) in [
            (Format::Envelope, "{aggregate_type}"),
            (Format::Raw, "{aggregate_type}.{event_type}"),
        ] {
            let mut encoder = encoder(format, route);
            let refused = encoder.encode(&event).unwrap_err();
            assert!(matches!(refused, Refused::Unsaid("event_type", _)));
        }
    }

    #[test]
    fn the_topic_is_the_route_unless_the_row_says_otherwise() {
        let route: Route = "shop.{aggregate_type}.{event_type}".parse().unwrap();
        let mut encoder = Encoder::new(Format::Raw, route);
        assert_eq!(
            encoder.encode(&event()).unwrap().topic,
            "shop.order.order_placed"
        );
        let event = Event {
            topic: Some("audit"),
            ..event()
        };
        assert_eq!(encoder.encode(&event).unwrap().topic, "audit");
    }

    #[test]
    fn a_topic_that_kafka_would_refuse_is_refused_here() {
        for topic in ["", ".", "..", "a b", "ä", "a/b", &"x".repeat(250)] {
            let event = Event {
                topic: Some(topic),
                ..event()
            };
            let refused = Encoder::new(Format::Raw, Route::default())
                .encode(&event)
                .unwrap_err();
            assert!(matches!(refused, Refused::Topic(_)), "{topic}");
        }
    }
}
