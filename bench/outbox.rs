//! The rows of an outbox, as a walsender writes them, for benches and tests.

use bytes::Bytes;
use pgwire_replication::Lsn;
use pgwire_replication::client::ReplicationEvent;
use postbox::source::{Messages, Outbox};
use postbox::table::Table;

/// The columns of `sql/0001_outbox.sql`, with the oids of their types.
const COLUMNS: [(&str, u32); 18] = [
    ("seq", 20),
    ("id", 2950),
    ("aggregate_type", 25),
    ("aggregate_id", 25),
    ("event_type", 25),
    ("topic", 25),
    ("partition_key", 25),
    ("payload", 114),
    ("headers", 114),
    ("schema_version", 25),
    ("trace_id", 25),
    ("correlation_id", 25),
    ("causation_id", 25),
    ("traceparent", 25),
    ("idempotency_key", 25),
    ("scheduled_at", 1184),
    ("created_at", 1184),
    ("xid", 5069),
];

const RELATION_ID: u32 = 16_384;

/// The message Insert of an event with a payload of 400 bytes and nothing that is
/// optional: 10 of its 18 columns are NULL.
pub(crate) fn row(number: u32) -> Vec<u8> {
    let mut bytes = [b"I", &RELATION_ID.to_be_bytes()[..], b"N\0\x12"].concat();
    for (column, _) in COLUMNS {
        let Some(value) = value(column, number) else {
            bytes.push(b'n');
            continue;
        };
        let len = u32::try_from(value.len()).expect("a short value");
        bytes.push(b't');
        bytes.extend(len.to_be_bytes());
        bytes.extend(value.as_bytes());
    }
    bytes
}

fn value(column: &str, number: u32) -> Option<String> {
    Some(match column {
        "seq" | "xid" => number.to_string(),
        "id" => format!("{number:08x}-6f0e-4a9a-8a39-0f9d0f6a7c11"),
        "aggregate_type" => "order".to_owned(),
        "aggregate_id" => format!("{}", number % 1000),
        "event_type" => "order_placed".to_owned(),
        "payload" => format!(
            r#"{{"order": {number:8}, "total": 17.50, "note": "{}"}}"#,
            "x".repeat(353)
        ),
        "created_at" => "2026-03-01 12:00:00.250000+00".to_owned(),
        _ => return None,
    })
}

/// Messages of a stream in which the table was described.
pub(crate) fn messages() -> Messages {
    let mut messages = Messages::new(Outbox {
        table: Table::of("postbox"),
        publication: "postbox".to_owned(),
        nonce: "nonce".to_owned(),
    });
    let described = messages.accept(data(relation().into()));
    assert!(matches!(described, Ok(None)), "{described:?}");
    messages
}

/// The message Relation.
fn relation() -> Vec<u8> {
    let mut bytes = [
        b"R",
        &RELATION_ID.to_be_bytes()[..],
        b"postbox\0outbox\0d\0\x12",
    ]
    .concat();
    for (name, type_oid) in COLUMNS {
        bytes.push(0);
        bytes.extend(name.as_bytes());
        bytes.push(0);
        bytes.extend(type_oid.to_be_bytes());
        bytes.extend(u32::MAX.to_be_bytes());
    }
    bytes
}

/// What the replication client makes of a message that it does not parse itself.
pub(crate) fn data(data: Bytes) -> ReplicationEvent {
    ReplicationEvent::XLogData {
        wal_start: Lsn(0),
        wal_end: Lsn(0),
        server_time_micros: 0,
        data,
    }
}
