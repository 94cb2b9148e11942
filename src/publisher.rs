//! From a record to a delivery: librdkafka, set up so that nothing overtakes a
//! failure.
//!
//! *Delivered* means that the broker acknowledged with `acks=all`, not that
//! `send` returned. What is misleading about librdkafka, and what we do:
//!
//! - A message that times out fails alone and later ones go on: a hole. So
//!   `message.timeout.ms=0`, and a broker that is away is waited for.
//! - A batch that a broker refuses fails alone too. So
//!   `enable.gapless.guarantee`: the first refusal is fatal to the producer, and
//!   the relay starts again from the confirmed position with a new one. What was
//!   pipelined behind the refused batch is refused for the gap in its sequence
//!   numbers.
//! - That does not hold for the first batch of a producer in a partition: a broker
//!   that knows nothing of the producer accepts any sequence number. Measured: of
//!   9,000 rows behind a first row of 3 MB, 896 and 1,336 overtook it, and with
//!   `max.in.flight=1` still up to 102, as the next request is built before the
//!   answer comes. So we choose the partition ourselves, as Java's producers do,
//!   and the relay sends a partition's first record alone.
//! - An unknown topic is reported after 30 s, while other topics go on. So a
//!   topic's metadata is fetched before its first record.
//! - The fatal error names no row. The delivery reports do: each carries the
//!   sequence number that the record was sent with.
//! - A refused batch is not a refused row: a topic with a small
//!   `max.message.bytes` refuses a full batch of small rows. So batches are kept
//!   under the smallest limit of the topics, where we may ask for it; else the
//!   relay sends the suspects again one by one.
//!
//! The publisher never sees an LSN.

mod brokers;
pub mod codes;
mod events;
mod partitioner;
mod producer;
mod push;
mod refusals;
mod reports;
mod settings;
mod size;
mod topics;

pub use codes::{Verdict, verdict};
pub use reports::Report;
pub(crate) use settings::invalid;
pub use settings::{BATCH_BYTES, KafkaSettings};
pub use topics::{Patience, Topic};

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::BaseRecord;

use crate::envelope::Record;
use crate::error::{Error, ErrorKind, Result};
use producer::Producer;
use topics::Directory;

/// A producer, and the topics it knows. Dropped, it forgets what is in flight; what was
/// sent may still be delivered.
pub struct Publisher {
    settings: KafkaSettings,
    producer: Producer,
    directory: Arc<Directory>,
    topics: HashMap<String, Known>,
    batch_bytes: usize,
    is_compressing: bool,
    /// How many records without a key have come.
    unkeyed: AtomicU32,
}

/// A topic that was resolved.
#[derive(Debug, Clone, Copy)]
struct Known {
    number: usize,
    partitions: u32,
    message_bytes_max: Option<usize>,
    asked_at: Instant,
}

/// Where a record goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Destination {
    /// The topic's number, counted from zero.
    pub topic: usize,
    /// The partition.
    pub partition: i32,
}

/// Whether a record can be taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fit {
    /// It may be; the broker knows.
    Unknown,
    /// By what was known a while ago, it cannot: the topic is to be asked about again.
    Ask,
    /// It cannot, and why.
    Never(String),
}

/// How long a topic's limit is taken for what it was, before a record is refused by it.
const LIMIT_MAX: Duration = Duration::from_secs(10);

/// Why a record was not accepted for sending.
#[derive(Debug)]
pub enum SendError {
    /// The record can never go out.
    Row(RDKafkaErrorCode),
    /// The producer can take no more records; the relay starts again.
    Producer(Error),
}

impl Publisher {
    /// Makes a producer with batches of at most `batch_bytes` before compression.
    /// It connects by itself, in the background.
    ///
    /// # Errors
    /// If a setting is refused.
    pub fn new(settings: KafkaSettings, batch_bytes: usize) -> Result<Self> {
        let producer = Producer::start(&settings, batch_bytes)?;
        Ok(Self {
            is_compressing: settings.compresses(),
            directory: Arc::new(Directory::new(settings.clone())),
            settings,
            producer,
            topics: HashMap::new(),
            batch_bytes,
            unkeyed: AtomicU32::new(0),
        })
    }

    /// The same producer, which knows no topics. Nothing may be in flight.
    pub fn anew(self) -> Self {
        Self {
            topics: HashMap::new(),
            ..self
        }
    }

    /// Where a record goes, if its topic was resolved. Partitions that are added
    /// later are used by the next attempt, so that a key stays where it is.
    pub fn destination(&self, record: &Record<'_>) -> Option<Destination> {
        let known = self.topics.get(record.topic)?;
        Some(Destination {
            topic: known.number,
            partition: match record.key {
                Some(key) => partitioner::partition(key.as_bytes(), known.partitions),
                None => {
                    let number = self.unkeyed.fetch_add(1, Ordering::Relaxed);
                    partitioner::partition_of_unkeyed(number, known.partitions)
                }
            },
        })
    }

    /// Whether a record can be taken by its topic, as far as that is known before it is
    /// sent: without compression, and where the topic's limit is ours to ask for.
    pub fn check(&self, record: &Record<'_>, destination: Destination) -> Fit {
        if self.is_compressing {
            return Fit::Unknown;
        }
        let (_, known) = self.known(destination.topic);
        let max = known.message_bytes_max.unwrap_or(usize::MAX);
        // What is certainly small enough need not be counted.
        if record.size() < max / 2 || size::batch_bytes(record) <= max {
            return Fit::Unknown;
        }
        if known.asked_at.elapsed() > LIMIT_MAX {
            return Fit::Ask;
        }
        let code = RDKafkaErrorCode::MessageSizeTooLarge;
        Fit::Never(self.refusal(destination.topic, record.size(), code, true))
    }

    /// Why a record of so many bytes was refused, in words: by the brokers if it was
    /// sent, else by librdkafka.
    pub fn refusal(
        &self,
        topic: usize,
        size: usize,
        code: RDKafkaErrorCode,
        was_sent: bool,
    ) -> String {
        let (name, known) = self.known(topic);
        let (limit, max) = match was_sent {
            true => ("max.message.bytes", known.message_bytes_max),
            false => ("message.max.bytes", self.settings.message_bytes_max()),
        };
        let what = match (codes::is_too_large(code), max) {
            (true, Some(max)) => format!("{size} bytes, and {limit} is {max}: "),
            (true, None) => format!("{size} bytes: "),
            (false, _) => String::new(),
        };
        format!("topic \"{name}\": {what}{}", codes::explain(code))
    }

    /// The name of a topic that was resolved.
    ///
    /// # Panics
    /// If there is no such topic.
    pub fn topic_name(&self, number: usize) -> &str {
        self.known(number).0
    }

    /// The largest batch of a topic that was resolved, after compression, if it is ours to ask
    /// for.
    ///
    /// # Panics
    /// If there is no such topic.
    pub fn limit(&self, number: usize) -> Option<usize> {
        self.known(number).1.message_bytes_max
    }

    fn known(&self, number: usize) -> (&str, &Known) {
        let mut topics = self.topics.iter();
        let found = topics.find(|(_, known)| known.number == number);
        let (name, known) = found.expect("only what was resolved is sent to");
        (name, known)
    }

    /// Asks the brokers about a topic, apart from this publisher so that it can
    /// go on meanwhile.
    pub fn resolve(
        &self,
        name: &str,
        patience: Patience,
    ) -> impl Future<Output = Result<Topic>> + Send + use<> {
        let directory = Arc::clone(&self.directory);
        let producer = Arc::clone(self.producer.client());
        directory.resolve(producer, name.to_owned(), patience)
    }

    /// Whether a topic needs smaller batches than this producer makes.
    pub fn fits(&self, topic: &Topic) -> bool {
        topic
            .message_bytes_max
            .is_none_or(|max| max >= self.batch_bytes)
    }

    /// Whether records for this topic may pass, and its limit was asked for of late.
    pub fn knows(&self, topic: &str) -> bool {
        let known = self.topics.get(topic);
        known.is_some_and(|known| known.asked_at.elapsed() < LIMIT_MAX)
    }

    /// Makes a new producer in the place of one that was refused something.
    ///
    /// # Errors
    /// If librdkafka cannot make one.
    pub fn renew(&mut self) -> Result<()> {
        self.producer = Producer::start(&self.settings, self.batch_bytes)?;
        Ok(())
    }

    /// Makes a new producer with batches that fit the topic. Nothing may be in
    /// flight.
    ///
    /// # Errors
    /// If librdkafka cannot make one.
    pub fn shrink(&mut self, topic: &Topic) -> Result<()> {
        if let Some(max) = topic.message_bytes_max {
            self.batch_bytes = self.batch_bytes.min(max);
        }
        self.renew()
    }

    /// Lets records for this topic pass, and returns its number.
    pub fn admit(&mut self, topic: &Topic) -> usize {
        let known = Known {
            number: self.topics.len(),
            partitions: topic.partitions,
            message_bytes_max: topic.message_bytes_max,
            asked_at: Instant::now(),
        };
        let entry = self.topics.entry(topic.name.clone()).or_insert(known);
        // Partitions that were added are for the next attempt: a key stays where it is.
        entry.message_bytes_max = known.message_bytes_max;
        entry.asked_at = known.asked_at;
        entry.number
    }

    /// Hands a record over. Its delivery is reported under `sequence`.
    ///
    /// # Errors
    /// If it was not accepted. Nothing is reported then.
    pub fn send(
        &self,
        record: &Record<'_>,
        partition: i32,
        sequence: u64,
    ) -> Result<(), SendError> {
        let mut headers = OwnedHeaders::new_with_capacity(record.headers.len());
        for header in &record.headers {
            headers = headers.insert(Header {
                key: &header.name,
                value: header.value.as_deref(),
            });
        }
        let sequence = usize::try_from(sequence).expect("fewer events than addresses");
        let mut message = BaseRecord::with_opaque_to(record.topic, sequence)
            .partition(partition)
            .headers(headers);
        message.timestamp = record.timestamp_millis.map(timestamp);
        message.key = record.key;
        message.payload = record.value;
        let Err((error, _)) = self.producer.client().send(message) else {
            return Ok(());
        };
        Err(match error {
            KafkaError::MessageProduction(code) if verdict(code) == Verdict::Row => {
                SendError::Row(code)
            }
            KafkaError::MessageProduction(code) => SendError::Producer(failure(code, record.topic)),
            error => SendError::Producer(
                Error::new(ErrorKind::BrokerAway, "send a record").caused_by(error),
            ),
        })
    }

    /// What was sent leaves at once, without waiting for a fuller batch; if the user has
    /// set `linger.ms`, it waits as they say.
    pub fn push(&self) {
        self.producer.push();
    }

    /// Waits until librdkafka has something to say, which
    /// [`take_reports`](Self::take_reports) hears: reports, or why a broker cannot be
    /// reached, which whoever waits for an answer of the brokers is then told.
    /// Cancel-safe: a report is never lost by not waiting for it.
    pub async fn reported(&self) {
        self.producer.reported().await;
    }

    /// Moves the reports that arrived into `into`, in no order across
    /// partitions.
    ///
    /// # Errors
    /// If the brokers refuse us, which waiting will not mend.
    pub fn take_reports(&self, into: &mut Vec<Report>) -> Result<()> {
        self.producer.take_reports(into)
    }

    /// Asks a broker for a sign of life, apart from this publisher.
    ///
    /// # Errors
    /// If none answers within `timeout`.
    pub fn probe(&self, timeout: Duration) -> impl Future<Output = Result<()>> + Send + use<> {
        topics::probe(
            Arc::clone(self.producer.client()),
            self.topics.keys().next().cloned(),
            timeout,
        )
    }

    /// Forgets what is queued and in flight: all of it is reported as failed,
    /// though what was sent may still be delivered.
    pub fn purge(&self) {
        self.producer.purge();
    }
}

/// Why a delivery failed, or cannot be tried. What the brokers refuse for good they
/// say before: see [`Publisher::take_reports`].
pub fn failure(code: RDKafkaErrorCode, topic: &str) -> Error {
    let kind = match verdict(code) {
        // Judged only alone: the next attempt sends it so.
        Verdict::Row | Verdict::Topic => ErrorKind::BrokerAway,
        verdict => verdict.kind(),
    };
    let message = format!("a delivery to topic \"{topic}\" failed");
    Error::new(kind, message).caused_by(codes::explain(code))
}

/// Of the milliseconds since 1970, librdkafka takes 0 for "now", and Kafka -1 for
/// "none": those two instants are a little off instead.
fn timestamp(millis: i64) -> i64 {
    if matches!(millis, -1 | 0) { 1 } else { millis }
}
