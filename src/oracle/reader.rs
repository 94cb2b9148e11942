//! What is in Kafka.

use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{BorrowedMessage, Headers, Message};
use rdkafka::{Offset, TopicPartitionList};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::publisher::KafkaSettings;

/// A record, as far as the oracle looks at it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// The event's id, from the header.
    pub id: Uuid,
    /// The record's key.
    pub key: String,
    /// The record's time, in milliseconds since 1970: when the event was written, or when it
    /// was sent where its table is omni-box's or spakky's, or when the broker took it, where
    /// the topic says so.
    pub timestamp_millis: i64,
}

/// Reads a topic from its beginning, all partitions.
pub struct Reader {
    consumer: BaseConsumer,
    topic: String,
    partitions: Vec<i32>,
}

/// How long one question to the brokers may take.
const TIMEOUT: Duration = Duration::from_secs(10);

impl Reader {
    /// Waits until the topic exists and begins at its start.
    ///
    /// # Errors
    /// If there is no such topic before `deadline`.
    pub fn open(kafka: &KafkaSettings, topic: &str, deadline: Instant) -> Result<Self> {
        let consumer: BaseConsumer = kafka
            .client()?
            .set("group.id", "postbox-oracle")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "50")
            .create()
            .map_err(|error| away("make a consumer", error))?;
        let partitions = loop {
            let partitions = partitions(&consumer, topic)?;
            if !partitions.is_empty() {
                break partitions;
            }
            if Instant::now() > deadline {
                let message = format!("topic \"{topic}\" does not exist");
                return Err(Error::new(ErrorKind::Broker, message));
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        let mut list = TopicPartitionList::new();
        for partition in &partitions {
            list.add_partition_offset(topic, *partition, Offset::Beginning)
                .map_err(|error| away("assign partitions", error))?;
        }
        consumer
            .assign(&list)
            .map_err(|error| away("assign partitions", error))?;
        Ok(Self {
            consumer,
            topic: topic.to_owned(),
            partitions,
        })
    }

    /// The records that arrive within `wait`.
    ///
    /// # Errors
    /// If a record has no id: it is not an event's.
    pub fn read_for(&self, wait: Duration) -> Result<Vec<Seen>> {
        let deadline = Instant::now() + wait;
        let mut records = Vec::new();
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            // Errors of the consumer are about brokers that are away: it goes on.
            if let Some(Ok(message)) = self.consumer.poll(left) {
                records.push(seen(&message)?);
            }
        }
        Ok(records)
    }

    /// The records up to the end that the topic has now. A broker that comes back
    /// is waited for.
    ///
    /// # Errors
    /// If the brokers do not answer for long, or a record has no id.
    pub fn read_to_end(&self) -> Result<Vec<Seen>> {
        let mut records = Vec::new();
        let mut answered = Instant::now();
        loop {
            match self.is_at_end() {
                Ok(true) => return Ok(records),
                Ok(false) => answered = Instant::now(),
                Err(error) if answered.elapsed() > TIMEOUT * 3 => return Err(error),
                Err(_) => {}
            }
            records.extend(self.read_for(Duration::from_millis(100))?);
        }
    }

    fn is_at_end(&self) -> Result<bool> {
        let position = self.consumer.position();
        let position = position.map_err(|error| away("read positions", error))?;
        for partition in &self.partitions {
            let (_, end) = self
                .consumer
                .fetch_watermarks(&self.topic, *partition, TIMEOUT)
                .map_err(|error| away("read the topic's end", error))?;
            let reached = position
                .find_partition(&self.topic, *partition)
                .and_then(|found| found.offset().to_raw())
                .unwrap_or(0);
            if end > 0 && reached < end {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn partitions(consumer: &BaseConsumer, topic: &str) -> Result<Vec<i32>> {
    let metadata = consumer
        .fetch_metadata(Some(topic), TIMEOUT)
        .map_err(|error| away("read metadata", error))?;
    let topics = metadata.topics().iter();
    let partitions = topics.flat_map(|topic| topic.partitions());
    Ok(partitions.map(|partition| partition.id()).collect())
}

fn seen(message: &BorrowedMessage<'_>) -> Result<Seen> {
    let headers = message.headers();
    let id = headers
        .and_then(|headers| {
            let mut headers = headers.iter();
            headers
                .find(|header| ["id", "event_id"].contains(&header.key))?
                .value
        })
        .and_then(|value| Uuid::parse_str(std::str::from_utf8(value).ok()?).ok());
    let Some(id) = id else {
        let (partition, offset) = (message.partition(), message.offset());
        let message =
            format!("the record at partition {partition}, offset {offset} has no event's id");
        return Err(Error::new(ErrorKind::Unexpected, message));
    };
    let key = message.key().unwrap_or_default();
    Ok(Seen {
        id,
        key: String::from_utf8_lossy(key).into_owned(),
        timestamp_millis: message.timestamp().to_millis().unwrap_or(0),
    })
}

fn away(context: &str, error: rdkafka::error::KafkaError) -> Error {
    Error::new(ErrorKind::BrokerAway, context).caused_by(error)
}
