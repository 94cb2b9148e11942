//! An event becomes a record that says the same.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use crate::envelope::{Encoder, Format, HeaderStyle, Record, Refused, Route};
use crate::event::{Event, Payload};
use crate::table::Placement;
use crate::timestamp::Timestamp;

/// Between fields; not part of any text in UTF-8.
const END: u8 = 0xff;
/// A field that is NULL.
const NULL: &[u8] = &[0xfe];

/// The record of an event passes [`check`], and with placed columns it has their headers.
/// The fields stand in the order in which they are taken below, with [`END`] between them;
/// the first tells the payload's type: `j`, `t` or `h`; after the route come headers of
/// placed columns, each a name and a value.
pub fn event(bytes: &[u8]) {
    let fields: Vec<_> = bytes.split(|byte| *byte == END).collect();
    let fields: Vec<Option<Cow<'_, str>>> = fields
        .into_iter()
        .map(|field| (field != NULL).then(|| String::from_utf8_lossy(field)))
        .collect();
    let mut rest = fields.iter().map(|field| field.as_deref());
    let mut next = || rest.next().flatten();
    let payload_type = next().unwrap_or_default();
    let mut event = Event {
        id: next().unwrap_or_default(),
        aggregate_type: next().unwrap_or_default(),
        aggregate_id: next(),
        event_type: next(),
        created_at: next()
            .and_then(|text| Timestamp::parse(text).ok())
            .unwrap_or(Timestamp::from_unix_micros(0)),
        payload: next().map(|text| match payload_type {
            "h" => Payload::Hex(text),
            "t" => Payload::Text(text),
            _ => Payload::Json(text),
        }),
        headers: next(),
        topic: next(),
        partition_key: next(),
        schema_version: next(),
        trace_id: next(),
        correlation_id: next(),
        causation_id: next(),
        traceparent: next(),
        seq: None,
        scheduled_at: None,
        placed: Vec::new(),
    };
    check(&event);
    if let Some(route) = next().and_then(|route| route.parse::<Route>().ok()) {
        let _ = Encoder::new(Format::Raw, route).encode(&event);
    }
    let mut placements = Vec::new();
    while let Some(name) = rest.next() {
        placements.push(Placement {
            column: String::new(),
            header: name.unwrap_or_default().to_owned(),
        });
        event.placed.push(rest.next().flatten());
    }
    check_placed(&event, &placements);
}

/// The headers of Debezium's router are the id and the placed columns, in their order, also
/// where names repeat.
fn check_placed(event: &Event<'_>, placements: &[Placement]) {
    let mut encoder = Encoder::new(Format::Raw, Route::default())
        .with_headers(HeaderStyle::Debezium)
        .placing(placements);
    let Ok(record) = encoder.encode(event) else {
        return;
    };
    let found = record.headers.iter();
    let found = found.map(|header| (&*header.name, header.value.as_deref()));
    let names = placements.iter().map(|placed| &*placed.header);
    let expected = names.zip(event.placed.iter().copied());
    let expected = std::iter::once(("id", Some(event.id))).chain(expected);
    assert!(found.eq(expected), "{:?}", record.headers);
}

/// A record is made of the event in each format, or refused for a reason that can
/// be seen in the event.
pub(super) fn check(event: &Event<'_>) {
    // Postgres lets nothing else into such a column.
    if matches!(event.payload, Some(Payload::Json(text)) if !is_json(text.as_bytes())) {
        return;
    }
    for format in [Format::Envelope, Format::Raw, Format::Versioned] {
        match Encoder::new(format, Route::default()).encode(event) {
            Ok(record) => check_record(event, format, &record),
            Err(refused) => check_refusal(event, &refused),
        }
    }
}

fn check_record(event: &Event<'_>, format: Format, record: &Record<'_>) {
    assert_eq!(record.topic, event.topic.unwrap_or(event.aggregate_type));
    assert!(is_topic_name(record.topic));
    assert_eq!(record.key, event.key());
    check_headers(event, record);
    let payload = event.payload.map(bytes_of);
    let (Some(payload), Some(value)) = (payload.as_deref(), record.value) else {
        assert_eq!((payload, record.value), (None, None));
        return;
    };
    match format {
        Format::Raw => assert_eq!(value, payload),
        Format::Envelope => {
            let object: Envelope<'_> = serde_json::from_slice(value).unwrap();
            assert_eq!(object.id, event.id);
            assert_eq!(
                object.schema_version.as_deref(),
                Some(event.schema_version.unwrap_or("1.0.0"))
            );
            assert_eq!(Some(&*object.event_type), event.event_type);
            assert_eq!(object.aggregate_type, event.aggregate_type);
            assert_eq!(Some(&*object.aggregate_id), event.aggregate_id);
            assert_eq!(object.trace_id.as_deref(), event.trace_id);
            assert_eq!(object.correlation_id.as_deref(), event.correlation_id);
            assert_eq!(object.causation_id.as_deref(), event.causation_id);
            assert_eq!(object.timestamp, event.created_at.to_string());
            check_payload(value, payload);
        }
        Format::Versioned => {
            let object: Versioned<'_> = serde_json::from_slice(value).unwrap();
            assert_eq!(object.schema_version.as_deref(), event.schema_version);
            check_payload(value, payload);
        }
    }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Envelope<'a> {
    id: String,
    schema_version: Option<String>,
    event_type: String,
    aggregate_type: String,
    aggregate_id: String,
    #[serde(borrow, rename = "payload")]
    _payload: &'a RawValue,
    timestamp: String,
    trace_id: Option<String>,
    correlation_id: Option<String>,
    causation_id: Option<String>,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Versioned<'a> {
    schema_version: Option<String>,
    #[serde(borrow, rename = "payload")]
    _payload: &'a RawValue,
}

/// The payload stands in the value, byte for byte. Its name stands there once before
/// it: within a string the quotes would be escaped.
fn check_payload(value: &[u8], payload: &[u8]) {
    const NAME: &[u8] = b",\"payload\":";
    let at = value.windows(NAME.len()).position(|window| window == NAME);
    let rest = &value[at.unwrap() + NAME.len()..];
    assert_eq!(rest.get(..payload.len()), Some(payload));
}

fn check_headers(event: &Event<'_>, record: &Record<'_>) {
    let ours = [
        ("id", Some(event.id)),
        ("event_type", event.event_type),
        ("schema_version", event.schema_version),
        ("trace_id", event.trace_id),
        ("correlation_id", event.correlation_id),
        ("causation_id", event.causation_id),
        ("traceparent", event.traceparent),
    ];
    let mut names = HashSet::new();
    for (name, value) in ours {
        let Some(value) = value else { continue };
        let mut found = record.headers.iter().filter(|header| header.name == name);
        assert_eq!(found.next().unwrap().value.as_deref(), Some(value));
        assert!(found.next().is_none(), "{name} twice");
        names.insert(name.to_owned());
    }
    let own = event.headers.map(own_names);
    for name in own.into_iter().flatten().flatten() {
        assert!(record.headers.iter().any(|header| header.name == name));
        names.insert(name);
    }
    assert!(
        record
            .headers
            .iter()
            .all(|header| names.contains(&*header.name))
    );
}

/// The names of an object's members, if it is one and its strings are text.
fn own_names(object: &str) -> Option<HashSet<String>> {
    let members: HashMap<String, &RawValue> = serde_json::from_str(object).ok()?;
    let is_text = |value: &RawValue| {
        !value.get().starts_with('"') || serde_json::from_str::<String>(value.get()).is_ok()
    };
    let names = members
        .into_iter()
        .map(|(name, value)| is_text(value).then_some(name));
    names.collect()
}

fn check_refusal(event: &Event<'_>, refused: &Refused) {
    match refused {
        Refused::Topic(topic) => assert!(!is_topic_name(topic)),
        Refused::Unsaid("aggregate_id", _) => assert!(event.aggregate_id.is_none()),
        Refused::Unsaid(..) => assert!(event.event_type.is_none()),
        Refused::Headers(_) => assert!(own_names(event.headers.unwrap()).is_none()),
        Refused::Payload(_) => assert!(!is_json(&bytes_of(event.payload.unwrap()))),
        Refused::Hex => assert!(matches!(event.payload, Some(Payload::Hex(_)))),
    }
}

/// The payload as an application wrote it.
fn bytes_of(payload: Payload<'_>) -> Cow<'_, [u8]> {
    match payload {
        Payload::Json(text) | Payload::Text(text) => text.as_bytes().into(),
        Payload::Hex(hex) => {
            let digits = hex.strip_prefix("\\x").unwrap_or_default().as_bytes();
            let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
            digits.chunks(2).map_while(byte).collect()
        }
    }
}

fn is_json(bytes: &[u8]) -> bool {
    serde_json::from_slice::<IgnoredAny>(bytes).is_ok()
}

fn is_topic_name(name: &str) -> bool {
    let legal = |letter: char| letter.is_ascii_alphanumeric() || "._-".contains(letter);
    !matches!(name, "" | "." | "..") && name.len() < 250 && name.chars().all(legal)
}
