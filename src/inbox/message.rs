//! A record as the inbox stores it and hands it over, whoever produced it.
//!
//! What a record is called, and what it is about, its producer says in headers, in an
//! envelope around the payload, or not at all:
//!
//! | | header | envelope | else |
//! | --- | --- | --- | --- |
//! | id | the one that is named, `id`, `message_id`, `event_id`, `ce_id` | `id` | `topic:partition:offset:timestamp` |
//! | event type | `event_type`, `ce_type`, `eventType` | `event_type` | the topic |
//! | schema version | `schema_version` | `schema_version` | |
//!
//! An *envelope* is an object that has a `payload` and says what it is: with an `event_type`,
//! or a `schema_version` and nothing else. Any other object is its own payload, whatever it has
//! a member for.
//!
//! # What is misleading
//!
//! - A producer may say the same thing twice: of headers of one name the last counts, of
//!   members of one name likewise, as for `jsonb`.
//! - JSON is more than `jsonb` can hold (`json.rs`), and text in Postgres has no NUL: what does
//!   not fit is kept as bytes.
//! - A header's name may be no text either, at which the bindings of librdkafka panic: so names
//!   are bytes here.
//! - An id may be anything. One that is no text, or longer than an entry of an index may be,
//!   stands for itself by its hash, and is kept beside it.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::json::{self, Envelope};
use crate::timestamp::Timestamp;

/// The longest id that is stored as it is, in bytes; the same as omni-box's column has.
const ID_BYTES_MAX: usize = 255;

/// The end of the year 9999.
const MILLIS_MAX: i64 = 253_402_300_799_999;

/// A record as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received<'a> {
    /// Where it stands.
    pub topic: &'a Arc<str>,
    /// Counted from zero.
    pub partition: i32,
    /// Within the partition.
    pub offset: i64,
    /// Milliseconds since 1970; `None` if it has no time.
    pub timestamp_millis: Option<i64>,
    /// What it is partitioned by.
    pub key: Option<&'a [u8]>,
    /// `None` is a tombstone.
    pub value: Option<&'a [u8]>,
    /// In their order. A name may come twice, and need not be text.
    pub headers: Vec<(&'a [u8], Option<&'a [u8]>)>,
}

/// What the inbox makes of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// What it is told from others by.
    pub id: Id,
    /// Where it stands.
    pub topic: Arc<str>,
    /// Counted from zero.
    pub partition: i32,
    /// Within the partition.
    pub offset: i64,
    /// When it was produced, if the record says so.
    pub produced_at: Option<Timestamp>,
    /// The record's key; one that is no text by its bytes, as `\\x` and hexadecimal digits.
    pub key: Option<String>,
    /// What happened.
    pub event_type: String,
    /// Of the payload.
    pub schema_version: Option<String>,
    /// A JSON object of texts, and of nulls. One that is no text is `{"hex": "…"}`. What the
    /// envelope says of traces is in it, too.
    pub headers: String,
    /// JSON that `jsonb` takes; `None` for a tombstone, and where the body is kept.
    pub payload: Option<String>,
    /// The record's value, where it is no such JSON.
    pub body: Option<Vec<u8>>,
}

/// What a message is told from others by, in its topic or group.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id {
    /// What its producer calls it, or `sha256:` and hexadecimal digits.
    pub text: String,
    /// What was hashed.
    pub original: Option<Vec<u8>>,
}

impl Id {
    /// The id that its producer gave it.
    pub fn new(bytes: &[u8]) -> Self {
        match text(bytes) {
            Some(text) if text.len() <= ID_BYTES_MAX => Self {
                text: text.to_owned(),
                original: None,
            },
            _ => Self {
                text: format!("sha256:{}", hex(&Sha256::digest(bytes))),
                original: Some(bytes.to_owned()),
            },
        }
    }

    /// What stands for it in the tables, 16 bytes for any: an id that is a UUID, as most write
    /// it, is itself; else the first half of its SHA-256, marked as version 8. The same as
    /// `message_uuid` in `sql/0003_inbox.sql`.
    pub fn uuid(&self) -> Uuid {
        let is_canonical = |uuid: &Uuid| {
            let mut buffer = Uuid::encode_buffer();
            *uuid.hyphenated().encode_lower(&mut buffer) == *self.text
        };
        let canonical = Uuid::try_parse(&self.text).ok().filter(is_canonical);
        canonical.unwrap_or_else(|| {
            let hash = Sha256::digest(self.text.as_bytes());
            let half = hash[..16].try_into().expect("32 bytes");
            uuid::Builder::from_custom_bytes(half).into_uuid()
        })
    }
}

/// How records are read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reading {
    /// The header that has the id, where it is there; else one of those that are known.
    pub id_header: Option<String>,
}

const ID_HEADERS: [&str; 4] = ["id", "message_id", "event_id", "ce_id"];
const TYPE_HEADERS: [&str; 3] = ["event_type", "ce_type", "eventType"];
const VERSION_HEADERS: [&str; 1] = ["schema_version"];

/// What an envelope may say that is a header else.
const TRACE_HEADERS: [&str; 3] = ["trace_id", "correlation_id", "causation_id"];

impl Reading {
    /// Reads any record.
    pub fn read(&self, record: &Received<'_>) -> Message {
        // The last of a name counts.
        let headers: BTreeMap<&[u8], Option<&[u8]>> = record.headers.iter().copied().collect();
        let value = record.value.and_then(text);
        let json = value.filter(|value| json::is_json(value));
        let envelope = json.and_then(Envelope::of);
        let header = |names: &[&str]| {
            let mut values = names
                .iter()
                .map(|name| headers.get(name.as_bytes()).copied().flatten());
            values.find_map(|value| value.filter(|value| !value.is_empty()))
        };
        let said = |name: &str| envelope.as_ref().and_then(|envelope| envelope.text(name));
        let word = |names: &[&str], member: &str| {
            let value = header(names).and_then(text).map(str::to_owned);
            value
                .filter(|value| !value.trim().is_empty())
                .or_else(|| said(member))
        };
        let payload = match &envelope {
            Some(envelope) => Some(envelope.payload.get()),
            None => json,
        };
        let payload = payload.filter(|payload| json::fits_jsonb(payload));
        let named = self.id_header.as_deref();
        let id = header(named.as_slice()).or_else(|| header(&ID_HEADERS));
        let id = id.map(Id::new);
        let id = id.or_else(|| said("id").map(|id| Id::new(id.as_bytes())));
        Message {
            id: id.unwrap_or_else(|| place(record)),
            topic: record.topic.clone(),
            partition: record.partition,
            offset: record.offset,
            produced_at: millis(record).map(|millis| Timestamp::from_unix_micros(millis * 1000)),
            key: record.key.map(|key| match text(key) {
                Some(key) => key.to_owned(),
                None => format!("\\x{}", hex(key)),
            }),
            event_type: word(&TYPE_HEADERS, "event_type")
                .unwrap_or_else(|| record.topic.to_string()),
            schema_version: word(&VERSION_HEADERS, "schema_version"),
            headers: headers_as_json(&headers, said),
            payload: payload.map(str::to_owned),
            body: record
                .value
                .filter(|_| payload.is_none())
                .map(<[u8]>::to_vec),
        }
    }
}

/// What stands for a record that nobody has named. With its time: a topic that is made anew
/// begins to count anew.
fn place(record: &Received<'_>) -> Id {
    let Received {
        topic,
        partition,
        offset,
        ..
    } = record;
    let millis = millis(record).unwrap_or(-1);
    Id::new(format!("{topic}:{partition}:{offset}:{millis}").as_bytes())
}

/// A producer may write any number. Those that are a year of four digits are a time.
fn millis(record: &Received<'_>) -> Option<i64> {
    let millis = record.timestamp_millis;
    millis.filter(|millis| (0..=MILLIS_MAX).contains(millis))
}

/// Text that Postgres can store.
fn text(bytes: &[u8]) -> Option<&str> {
    std::str::from_utf8(bytes)
        .ok()
        .filter(|text| !text.contains('\0'))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn headers_as_json(
    headers: &BTreeMap<&[u8], Option<&[u8]>>,
    said: impl Fn(&str) -> Option<String>,
) -> String {
    let name = |name: &[u8]| match text(name) {
        Some(name) => name.to_owned(),
        None => format!("\\x{}", hex(name)),
    };
    let value = |value: &[u8]| match text(value) {
        Some(value) => Value::from(value),
        None => json!({ "hex": hex(value) }),
    };
    let traces = TRACE_HEADERS
        .iter()
        .filter_map(|name| Some(((*name).to_owned(), said(name)?.into())));
    let own = headers
        .iter()
        .map(|(header, bytes)| (name(header), bytes.map_or(Value::Null, value)));
    let all: serde_json::Map<String, Value> = traces.chain(own).collect();
    Value::from(all).to_string()
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use super::*;

    fn record<'a>(value: &'a str, headers: &[(&'a str, &'a str)]) -> Received<'a> {
        static TOPIC: LazyLock<Arc<str>> = LazyLock::new(|| Arc::from("order"));
        let headers = headers.iter();
        Received {
            topic: &TOPIC,
            partition: 3,
            offset: 42,
            timestamp_millis: Some(1_700_000_000_123),
            key: Some(b"k"),
            value: Some(value.as_bytes()),
            headers: headers
                .map(|(name, value)| (name.as_bytes(), Some(value.as_bytes())))
                .collect(),
        }
    }

    fn read(value: &str, headers: &[(&str, &str)]) -> Message {
        Reading::default().read(&record(value, headers))
    }

    #[test]
    fn what_we_produce_is_read_with_each_format() {
        let envelope = r#"{"id":"7f1c","schema_version":"1.2.0","event_type":"created","aggregate_type":"order","aggregate_id":"9","payload":{"a": 1},"timestamp":"2026-01-02T03:04:05+00:00","trace_id":"t"}"#;
        let headers = [
            ("id", "7f1c"),
            ("event_type", "created"),
            ("schema_version", "1.2.0"),
        ];
        for (value, headers) in [
            (envelope, &headers[..]),
            (envelope, &[]),
            (r#"{"a": 1}"#, &headers[..]),
            (
                r#"{"schema_version":"1.2.0","payload":{"a": 1}}"#,
                &headers[..2],
            ),
        ] {
            let message = read(value, headers);
            assert_eq!(message.id, Id::new(b"7f1c"), "{value}");
            assert_eq!(message.event_type, "created");
            assert_eq!(message.schema_version.as_deref(), Some("1.2.0"));
            assert_eq!(message.payload.as_deref(), Some(r#"{"a": 1}"#));
            assert_eq!(message.body, None);
        }
        let message = read(envelope, &[("trace_id", "header")]);
        assert_eq!(message.headers, r#"{"trace_id":"header"}"#);
        assert_eq!(read(envelope, &[]).headers, r#"{"trace_id":"t"}"#);
    }

    #[test]
    fn an_id_is_found_in_its_order() {
        let all = [
            ("ce_id", "4"),
            ("event_id", "3"),
            ("message_id", "2"),
            ("id", "1"),
        ];
        let envelope = r#"{"id":"5","event_type":"a","payload":1}"#;
        for (from, id) in (0..4).zip(["1", "2", "3", "4"]) {
            let headers = &all[..4 - from];
            assert_eq!(read(envelope, headers).id.text, id);
        }
        assert_eq!(read(envelope, &[]).id.text, "5");
        assert_eq!(read("1", &[]).id.text, "order:3:42:1700000000123");
        assert_eq!(read("1", &[("id", "")]).id.text, "order:3:42:1700000000123");
        assert_eq!(read("1", &[("id", "1"), ("id", "2")]).id.text, "2");
        let reading = Reading {
            id_header: Some("x-id".to_owned()),
        };
        assert_eq!(
            reading
                .read(&record("1", &[("id", "1"), ("x-id", "9")]))
                .id
                .text,
            "9"
        );
        assert_eq!(reading.read(&record("1", &[("id", "1")])).id.text, "1");
    }

    #[test]
    fn any_id_can_be_stored_and_none_is_taken_for_another() {
        let long = "x".repeat(3000);
        for bytes in [long.as_bytes(), b"a\0b", &[0xff, 0xfe]] {
            let id = Id::new(bytes);
            assert!(
                id.text.starts_with("sha256:") && id.text.len() == 71,
                "{}",
                id.text
            );
            assert_eq!(id.original.as_deref(), Some(bytes));
        }
        assert_ne!(Id::new(b"a\0b"), Id::new(b"a\0c"));
        assert_eq!(Id::new("x".repeat(255).as_bytes()).original, None);
    }

    #[test]
    fn what_is_no_json_is_kept_as_it_is() {
        let mut broken = record("", &[]);
        for value in [
            &b"{"[..],
            b"",
            b"\xff\x00",
            br#"{"a":"\u0000"}"#,
            b"1e200000",
            b"1 2",
        ] {
            broken.value = Some(value);
            let message = Reading::default().read(&broken);
            assert_eq!(
                (message.payload, message.body.as_deref()),
                (None, Some(value))
            );
            assert_eq!(message.event_type, "order");
        }
        broken.value = None;
        let tombstone = Reading::default().read(&broken);
        assert_eq!((tombstone.payload, tombstone.body), (None, None));
        // An envelope is read though its payload is kept as bytes, all of it.
        let envelope = r#"{"id":"5","event_type":"a","payload":"\u0000"}"#;
        let message = read(envelope, &[]);
        assert_eq!(
            (message.id.text.as_str(), message.event_type.as_str()),
            ("5", "a")
        );
        assert_eq!(
            (message.payload, message.body.as_deref()),
            (None, Some(envelope.as_bytes()))
        );
    }

    #[test]
    fn headers_may_be_anything() {
        let mut odd = record("1", &[]);
        odd.headers = vec![
            (b"a", Some(b"x")),
            (b"a", Some(b"y")),
            (b"null", None),
            (b"nul", Some(b"\0")),
            (b"bytes", Some(b"\xff")),
            (b"\xfe", Some(b"z")),
            (b"event_type", Some(b"\xff")),
            (b"id", None),
        ];
        odd.key = Some(b"\xff");
        odd.timestamp_millis = Some(-1);
        let message = Reading::default().read(&odd);
        assert_eq!(
            message.headers,
            r#"{"\\xfe":"z","a":"y","bytes":{"hex":"ff"},"event_type":{"hex":"ff"},"id":null,"nul":{"hex":"00"},"null":null}"#
        );
        assert_eq!(message.event_type, "order");
        assert_eq!(message.key.as_deref(), Some(r"\xff"));
        assert_eq!(message.id.text, "order:3:42:-1");
        assert_eq!(message.produced_at, None);
    }
}
