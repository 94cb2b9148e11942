//! How far the logs of a group's topics go, as the brokers say when they are asked.
//!
//! # What is misleading
//!
//! - The consumer knows ends, too: those of the last answers with records. Where it hears nothing,
//!   or is told to pause, they are old, and an end that is too low would say that all is read. So the
//!   brokers are asked, by a client of its own that joins no group.
//! - Behind the last record there may be some that nobody is given, as those that end a
//!   transaction: the group's offset never comes to the end then. Whether there is any to be read
//!   before it, only reading tells.
//! - What an open transaction has written lies behind the end: it is produced when that commits.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::types::RDKafkaRespErr as Code;
use rdkafka::{ClientConfig, Offset, TopicPartitionList};
use tokio::sync::oneshot;

use super::consumer::Place;
use crate::error::{Error, ErrorKind, Result};

/// How long the brokers may take for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// How long a look at a partition may take: they answer within `fetch.wait.max.ms`.
const LOOK_MAX: Duration = Duration::from_secs(2);

/// Asks brokers.
pub(super) struct Asking {
    client: BaseConsumer,
}

/// What the brokers know of topics.
#[derive(Debug, Default)]
pub(super) struct Ends {
    /// Of each partition, as far as its leader has answered.
    pub(super) of: HashMap<Place, i64>,
    /// How many partitions there are.
    partitions: HashMap<String, i32>,
    /// There are none of these names.
    unknown: HashSet<String>,
}

impl Ends {
    /// Whether there is no such partition.
    pub(super) fn lack(&self, place: &Place) -> bool {
        let count = self.partitions.get(&*place.topic);
        self.unknown.contains(&*place.topic) || count.is_some_and(|count| place.partition >= *count)
    }
}

impl Asking {
    /// Runs `ask` on a thread of its own, as answers are waited for. Left, it goes on to its end.
    pub(super) async fn run<T: Send + 'static>(
        mut config: ClientConfig,
        ask: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        // It is no member, and says where a log ends.
        config.remove("group.instance.id");
        config.set("enable.partition.eof", "true");
        let (tell, answer) = oneshot::channel();
        let thread = move || {
            let client = config.create().map_err(crate::publisher::invalid);
            let answer = client.and_then(|client| ask(&Self { client }));
            // Nobody listens where the inbox stops.
            let _ = tell.send(answer);
        };
        let started = std::thread::Builder::new()
            .name("postbox-ends".to_owned())
            .spawn(thread);
        started.map_err(|error| {
            Error::new(ErrorKind::Unexpected, "start a thread").caused_by(error)
        })?;
        let ended = |_| Error::new(ErrorKind::Unexpected, "a thread ended without an answer");
        answer.await.map_err(ended)?
    }

    /// The ends of all partitions of these topics: not before those of now.
    pub(super) fn ends<'t>(&self, topics: impl IntoIterator<Item = &'t str>) -> Result<Ends> {
        let mut ends = Ends::default();
        let mut list = TopicPartitionList::new();
        for topic in topics {
            let asked = self.client.fetch_metadata(Some(topic), ANSWER_MAX);
            let asked = asked.map_err(|error| failed("ask for partitions", error))?;
            let known = asked.topics().iter().find(|known| known.name() == topic);
            let Some(known) = known else { continue };
            match known.error() {
                Some(
                    Code::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART
                    | Code::RD_KAFKA_RESP_ERR__UNKNOWN_TOPIC,
                ) => {
                    ends.unknown.insert(topic.to_owned());
                }
                // Not known now.
                Some(_) => {}
                None => {
                    let partitions = known.partitions();
                    for partition in partitions {
                        let added = list.add_partition_offset(topic, partition.id(), Offset::End);
                        added.map_err(|error| failed("ask for ends", error))?;
                    }
                    let count = partitions.iter().map(|one| one.id() + 1).max();
                    ends.partitions.insert(topic.to_owned(), count.unwrap_or(0));
                }
            }
        }
        if list.count() == 0 {
            return Ok(ends);
        }
        let answer = self.client.offsets_for_times(list, ANSWER_MAX);
        let answer = answer.map_err(|error| failed("ask for ends", error))?;
        for element in answer.elements() {
            if let (Ok(()), Offset::Offset(end)) = (element.error(), element.offset()) {
                let place = Place {
                    topic: element.topic().into(),
                    partition: element.partition(),
                };
                ends.of.insert(place, end);
            }
        }
        Ok(ends)
    }

    /// Whether there is nothing to be read of a partition from this offset on.
    pub(super) fn is_empty_from(&self, place: &Place, offset: i64) -> Result<bool> {
        let looked = self.look(place, offset);
        looked.map_err(|error| failed(&format!("look at {place}"), error))
    }

    fn look(&self, place: &Place, offset: i64) -> KafkaResult<bool> {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(&place.topic, place.partition, Offset::Offset(offset))?;
        self.client.assign(&list)?;
        let until = Instant::now() + LOOK_MAX;
        let mut is_empty = false;
        while Instant::now() < until {
            match self.client.poll(Duration::from_millis(100)) {
                Some(Err(KafkaError::PartitionEOF(partition))) if partition == place.partition => {
                    is_empty = true;
                    break;
                }
                // It is not, or that is not known.
                Some(_) => break,
                None => {}
            }
        }
        self.client.unassign()?;
        Ok(is_empty)
    }
}

fn failed(doing: &str, error: KafkaError) -> Error {
    Error::new(ErrorKind::BrokerAway, doing).caused_by(error)
}
