//! What an event allocates on its way from the walsender's bytes to a record, and
//! until it is confirmed.
//!
//! Counted are the replication client's reader and the channel to us, the event, the
//! record and the queue. Not counted is what the client's task does besides, and the
//! hand-over to librdkafka, which copies a record in C and its topic's name in Rust.

// A test fails by panicking.
#![allow(clippy::unwrap_used)]

#[path = "../bench/outbox.rs"]
mod outbox;

use std::collections::VecDeque;
use std::hint::black_box;
use std::time::Instant;

use allocation_counter::measure;
use bytes::{Buf, Bytes};
use futures_util::FutureExt;
use pgwire_replication::Lsn;
use pgwire_replication::client::ReplicationEvent;
use pgwire_replication::protocol::framing::MessageReader;
use pgwire_replication::protocol::{ReplicationCopyData, parse_copy_data};
use postbox::ack::AckQueue;
use postbox::envelope::{Encoder, Format, Route};
use postbox::source::{Item, Messages, Place, Row};
use postbox::timestamp::Timestamp;
use tokio::sync::mpsc;
use tokio_postgres::types::PgLsn;

const WARM_UP: u32 = 1_000;
const EVENTS: u32 = 10_000;

/// One is the list of a record's headers. The reader's buffers hold several messages,
/// and are shared among several events; one that is larger has a buffer of its own.
const ALLOCATIONS_PER_EVENT_MAX: f64 = 2.0;

/// As many messages as the stream lets the client read ahead.
const BUFFERED: usize = 64;

/// Events that are sent before the first is reported.
const IN_FLIGHT: usize = 500;

#[test]
fn an_event_allocates_twice_at_most() {
    for format in [Format::Envelope, Format::Raw, Format::Versioned] {
        let warm_up = wire(0..WARM_UP);
        let wire = wire(WARM_UP..WARM_UP + EVENTS);
        let mut way = Way::new(format);
        way.carry(&warm_up);
        let counted = measure(|| way.carry(&wire));
        assert_eq!(way.confirmed, Some(u64::from(WARM_UP + EVENTS).into()));
        let per_event = counted.count_total as f64 / f64::from(EVENTS);
        let bytes = counted.bytes_total as f64 / f64::from(EVENTS);
        println!("{format:?}: {per_event:.3} allocations and {bytes:.0} bytes for each event");
        assert!(
            per_event <= ALLOCATIONS_PER_EVENT_MAX,
            "{format:?}: {per_event:.3} allocations for each event"
        );
    }
}

/// What an event passes.
struct Way {
    reader: MessageReader,
    sender: mpsc::Sender<ReplicationEvent>,
    receiver: mpsc::Receiver<ReplicationEvent>,
    messages: Messages,
    encoder: Encoder,
    queue: AckQueue<Sent, PgLsn>,
    in_flight: VecDeque<u64>,
    confirmed: Option<PgLsn>,
}

/// As large as what the relay remembers of an event in flight.
type Sent = (Place, Timestamp, Instant, [usize; 3]);

impl Way {
    fn new(format: Format) -> Self {
        let (sender, receiver) = mpsc::channel(BUFFERED);
        Self {
            reader: MessageReader::new(),
            sender,
            receiver,
            messages: outbox::messages(),
            encoder: Encoder::new(format, Route::default()),
            queue: AckQueue::default(),
            in_flight: VecDeque::new(),
            confirmed: None,
        }
    }

    /// Reads, sends and confirms all, as many messages at a time as are buffered.
    fn carry(&mut self, mut wire: &[u8]) {
        while !wire.is_empty() {
            while !wire.is_empty() && self.sender.capacity() > 0 {
                let message = self.read(&mut wire);
                self.sender.try_send(message).unwrap();
            }
            while let Ok(message) = self.receiver.try_recv() {
                match self.messages.accept(message).unwrap() {
                    Some(Item::Row(row)) => self.send(&row),
                    Some(Item::Position(position)) => self.queue.push_position(position.lsn),
                    None => {}
                }
            }
            self.settle(IN_FLIGHT);
        }
        self.settle(0);
    }

    fn read(&mut self, wire: &mut &[u8]) -> ReplicationEvent {
        let read = self.reader.read(wire).now_or_never();
        let message = read.expect("all is there").unwrap();
        match parse_copy_data(message.payload).unwrap() {
            ReplicationCopyData::XLogData { data, .. } => {
                boundary(&data).unwrap_or(outbox::data(data))
            }
            other => panic!("not WAL: {other:?}"),
        }
    }

    fn send(&mut self, row: &Row) {
        let event = self.messages.event(row).unwrap();
        let record = self.encoder.encode(&event).unwrap();
        let sent = (row.place, row.committed_at, Instant::now(), [0; 3]);
        let sequence = self.queue.push_event(sent, record.size());
        black_box(record);
        self.in_flight.push_back(sequence);
    }

    /// Takes reports, the oldest first, until so many events are in flight.
    fn settle(&mut self, in_flight: usize) {
        while self.in_flight.len() > in_flight {
            let sequence = self.in_flight.pop_front().unwrap();
            black_box(self.queue.delivered(sequence));
        }
        if let Some((lsn, _)) = self.queue.confirmable() {
            self.confirmed = Some(lsn);
        }
    }
}

/// Begin and Commit, which the client parses itself.
fn boundary(data: &Bytes) -> Option<ReplicationEvent> {
    let mut fields = data.slice(1..);
    match data[0] {
        b'B' => Some(ReplicationEvent::Begin {
            final_lsn: Lsn(fields.get_u64()),
            commit_time_micros: fields.get_i64(),
            xid: fields.get_u32(),
        }),
        b'C' => {
            fields.advance(1);
            Some(ReplicationEvent::Commit {
                lsn: Lsn(fields.get_u64()),
                end_lsn: Lsn(fields.get_u64()),
                commit_time_micros: fields.get_i64(),
            })
        }
        _ => None,
    }
}

/// The bytes of a stream with one transaction for each event, which is the most
/// messages that an event can cost.
fn wire(numbers: std::ops::Range<u32>) -> Vec<u8> {
    let mut wire = Vec::new();
    for number in numbers {
        let lsn = u64::from(number).to_be_bytes();
        let end_lsn = u64::from(number + 1).to_be_bytes();
        let begin = [b"B", &lsn[..], &[0; 8], &number.to_be_bytes()].concat();
        let commit = [b"C\0", &lsn[..], &end_lsn, &[0; 8]].concat();
        for message in [begin, outbox::row(number), commit] {
            // CopyData and XLogData: their lengths, and three positions.
            let len = u32::try_from(4 + 25 + message.len()).unwrap();
            wire.extend([b"d", &len.to_be_bytes()[..], b"w", &[0; 24], &message].concat());
        }
    }
    wire
}
