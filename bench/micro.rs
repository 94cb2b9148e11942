//! What an event costs in the pure parts of its way, without servers:
//! `make bench-micro`.
//!
//! What is built for benches has failpoints, as what is built for tests has. None
//! lies in what is measured here.

mod outbox;

use std::hint::black_box;
use std::time::{Duration, Instant};

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput};
use pgwire_replication::Lsn;
use pgwire_replication::client::ReplicationEvent;
use postbox::ack::AckQueue;
use postbox::envelope::{Encoder, Format, Route};
use postbox::event::Event;
use postbox::pgoutput;
use postbox::publisher::Destination;
use postbox::source::{Item, Messages, Place, Row};
use postbox::timestamp::Timestamp;
use tokio_postgres::types::PgLsn;

/// As many as the stream buffers: a row was received just before it is decoded, and
/// is still in the processor's cache.
const ROWS: u32 = 64;

/// The default of `--in-flight-max`.
const IN_FLIGHT: usize = 10_000;

/// Reports that are taken in one go.
const REPORTS: usize = 256;

/// Of the topic, in `ack/out_of_order`.
const PARTITIONS: usize = 12;

/// What the relay remembers of an event in flight, as [`AckQueue`] carries it.
type Sent = (Place, Destination, usize, Timestamp, Instant);

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(50)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    decode(&mut criterion);
    envelope(&mut criterion);
    ack(&mut criterion);
    confirm(&mut criterion);
    criterion.final_summary();
}

/// From a message's bytes to borrowed values, and on to an event.
fn decode(criterion: &mut Criterion) {
    let rows: Vec<Bytes> = (0..ROWS).map(|n| outbox::row(n).into()).collect();
    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::ElementsAndBytes {
        elements: rows.len() as u64,
        bytes: rows.iter().map(|row| row.len() as u64).sum(),
    });
    group.bench_function("pgoutput", |bencher| {
        bencher.iter(|| {
            for bytes in &rows {
                let _ = black_box(pgoutput::decode(black_box(bytes)));
            }
        });
    });
    let mut messages = in_transaction();
    group.bench_function("event", |bencher| {
        bencher.iter(|| {
            for bytes in &rows {
                let row = row(&mut messages, black_box(bytes));
                let _ = black_box(messages.event(&row));
            }
        });
    });
}

/// From an event to a record, in each format.
fn envelope(criterion: &mut Criterion) {
    let mut messages = in_transaction();
    let rows: Vec<Row> = (0..ROWS)
        .map(|n| row(&mut messages, &outbox::row(n).into()))
        .collect();
    let read = |row| messages.event(row).expect("the row is one of ours");
    let events: Vec<Event<'_>> = rows.iter().map(read).collect();
    let mut group = criterion.benchmark_group("envelope");
    for (name, format) in [
        ("envelope", Format::Envelope),
        ("raw", Format::Raw),
        ("versioned", Format::Versioned),
    ] {
        let mut encoder = Encoder::new(format, Route::default());
        let mut size = |event| {
            let record = encoder.encode(event).expect("the event is one of ours");
            record.size() as u64
        };
        group.throughput(Throughput::ElementsAndBytes {
            elements: events.len() as u64,
            bytes: events.iter().map(&mut size).sum(),
        });
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                for event in &events {
                    let _ = black_box(encoder.encode(black_box(event)));
                }
            });
        });
    }
}

/// An event's way through the queue, with a transaction of its own: pushed,
/// delivered, released. A full window goes in before the reports come out.
fn ack(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("ack");
    group.throughput(Throughput::Elements(IN_FLIGHT as u64));
    let by_partition = |partition| (partition..IN_FLIGHT).step_by(PARTITIONS);
    for (name, order) in [
        ("in_order", (0..IN_FLIGHT).collect::<Vec<_>>()),
        // As if each partition's reports came when the one before was done.
        (
            "out_of_order",
            (0..PARTITIONS).flat_map(by_partition).collect(),
        ),
    ] {
        let mut queue = AckQueue::default();
        let mut sequences = Vec::new();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                fill(&mut queue, &mut sequences, 1);
                for reports in order.chunks(REPORTS) {
                    for &index in reports {
                        black_box(queue.delivered(sequences[index]));
                    }
                    black_box(queue.confirmable());
                }
            });
        });
        assert!(queue.is_empty(), "all was delivered");
    }
}

/// The release of a full window alone, to the position that is confirmed. What the
/// relay then does with that does not depend on the number of events.
fn confirm(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("confirm");
    group.throughput(Throughput::Elements(IN_FLIGHT as u64));
    for rows in [1, 100] {
        let delivered = || {
            let (mut queue, mut sequences) = (AckQueue::default(), Vec::new());
            fill(&mut queue, &mut sequences, rows);
            for sequence in sequences {
                queue.delivered(sequence);
            }
            queue
        };
        group.bench_function(format!("transactions_of_{rows}"), |bencher| {
            bencher.iter_batched_ref(
                delivered,
                |queue| black_box(queue.confirmable()),
                BatchSize::LargeInput,
            );
        });
    }
}

/// Adds a full window of transactions with this many rows each.
fn fill(queue: &mut AckQueue<Sent, PgLsn>, sequences: &mut Vec<u64>, rows: usize) {
    let sent_at = Instant::now();
    sequences.clear();
    for index in 0..IN_FLIGHT {
        let place = Place {
            commit_lsn: queue.end().into(),
            ordinal: 0,
        };
        let destination = Destination {
            topic: 0,
            partition: 0,
        };
        let now = Timestamp::from_unix_micros(0);
        let sent = (place, destination, 600, now, sent_at);
        sequences.push(queue.push_event(black_box(sent), 600));
        if (index + 1) % rows == 0 {
            queue.push_position(queue.end().into());
        }
    }
}

/// Messages of a stream that stands within a transaction.
fn in_transaction() -> Messages {
    let mut messages = outbox::messages();
    let begun = messages.accept(ReplicationEvent::Begin {
        final_lsn: Lsn(1),
        xid: 1,
        commit_time_micros: 0,
    });
    assert!(matches!(begun, Ok(None)), "{begun:?}");
    messages
}

fn row(messages: &mut Messages, bytes: &Bytes) -> Row {
    match messages.accept(outbox::data(bytes.clone())) {
        Ok(Some(Item::Row(row))) => row,
        other => panic!("not a row: {other:?}"),
    }
}
