//! What the brokers say about a topic before its first record.
//!
//! There may be thousands of topics, all asked about at once. librdkafka blocks a thread for each
//! question about metadata: a few are on their way, and the others wait for them. For a topic's
//! limit it takes a client with threads and connections of its own: one asks for all, and is
//! closed when nobody asks.

use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::Producer as _;
use rdkafka::types::RDKafkaRespErr;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;
use tracing::debug;

use super::codes::{self, verdict};
use super::producer::Client;
use super::settings::KafkaSettings;
use crate::error::{Error, ErrorKind, Result};
use crate::lock::lock;

/// A topic that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Topic {
    /// Its name.
    pub name: String,
    /// How many partitions it has.
    pub partitions: u32,
    /// Its `max.message.bytes`, the largest batch after compression; `None` if
    /// we may not ask.
    pub message_bytes_max: Option<usize>,
}

/// How long one question may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a topic is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// While no broker knows it. One that creates topics on demand says so first, and other
    /// brokers learn of a new topic a little later.
    pub unknown: Duration,
    /// While it has no leader, as one that is just being made.
    pub leader: Duration,
}

impl Patience {
    /// As long as either may take.
    pub const MAX: Self = Self {
        unknown: Duration::from_secs(5),
        leader: Duration::from_secs(5),
    };

    /// One answer is enough.
    pub const NONE: Self = Self {
        unknown: Duration::ZERO,
        leader: Duration::ZERO,
    };
}

/// How long to wait before asking again.
const PAUSE: Duration = Duration::from_millis(100);

/// How many questions are on their way at once.
const QUESTIONS_MAX: usize = 16;

/// Whom a publisher asks about topics.
pub(super) struct Directory {
    settings: KafkaSettings,
    questions: Arc<Semaphore>,
    heard: Mutex<Heard>,
    admin: Mutex<Weak<Admin>>,
}

/// When a question was last answered, and when one was last given up.
#[derive(Clone, Copy, Default)]
struct Heard {
    answered_at: Option<Instant>,
    silent_at: Option<Instant>,
}

/// A client that is not closed where others wait: closing it waits for its threads.
struct Admin(Option<AdminClient<DefaultClientContext>>);

impl Drop for Admin {
    fn drop(&mut self) {
        let client = self.0.take();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn_blocking(move || drop(client));
        }
    }
}

impl Directory {
    pub(super) fn new(settings: KafkaSettings) -> Self {
        Self {
            settings,
            questions: Arc::new(Semaphore::new(QUESTIONS_MAX)),
            heard: Mutex::default(),
            admin: Mutex::default(),
        }
    }

    /// Asks until the topic is known.
    ///
    /// # Errors
    /// `Event` if there is no such topic or it is not ours to write, `Broker` or `Rights`
    /// if the brokers take nothing of ours, `BrokerAway` if nobody answers.
    pub(super) async fn resolve(
        self: Arc<Self>,
        producer: Arc<Client>,
        name: String,
        patience: Patience,
    ) -> Result<Topic> {
        let asked = Instant::now();
        let leaders = loop {
            let code = match self.leaders(&producer, &name).await? {
                Ok(leaders) if leaders.is_empty() => RDKafkaErrorCode::LeaderNotAvailable,
                Ok(leaders) => break leaders,
                Err(code) => code,
            };
            let kind = verdict(code).kind();
            let patience = match code {
                RDKafkaErrorCode::UnknownTopicOrPartition => patience.unknown,
                _ if kind.is_transient() => patience.leader,
                _ => Duration::ZERO,
            };
            if asked.elapsed() >= patience {
                let message = format!("topic \"{name}\": {}", codes::explain(code));
                return Err(Error::new(kind, message));
            }
            tokio::time::sleep(PAUSE).await;
        };
        let partitions = u32::try_from(leaders.len()).unwrap_or(u32::MAX);
        let leader = leaders.into_iter().find(|leader| *leader >= 0);
        let message_bytes_max = self.message_bytes_max(&name, leader).await;
        debug!(
            topic = name,
            partitions, message_bytes_max, "topic resolved"
        );
        Ok(Topic {
            name,
            partitions,
            message_bytes_max,
        })
    }

    /// As [`metadata`] says, in its turn.
    async fn leaders(
        &self,
        producer: &Arc<Client>,
        name: &str,
    ) -> Result<Result<Vec<i32>, RDKafkaErrorCode>> {
        let asked = Instant::now();
        let permit = Arc::clone(&self.questions).acquire_owned().await.ok();
        let heard = *lock(&self.heard);
        // Else thousands would wait in vain one after the other.
        if heard.silent_at > heard.answered_at.max(Some(asked)) {
            return Err(Error::new(ErrorKind::BrokerAway, "no broker answers"));
        }
        let answer = metadata(producer, Some(name.to_owned()), REQUEST_TIMEOUT, permit).await;
        let mut heard = lock(&self.heard);
        match answer {
            Ok(_) => heard.answered_at = Some(Instant::now()),
            Err(_) => heard.silent_at = Some(Instant::now()),
        }
        answer
    }

    /// The topic's limit; `None` if we are not allowed to ask or nobody answers, as
    /// the relay can live without.
    ///
    /// Any broker knows it, so a leader is asked, which the relay must reach anyway:
    /// librdkafka would wait for the controller.
    async fn message_bytes_max(&self, name: &str, leader: Option<i32>) -> Option<usize> {
        let admin = self.admin()?;
        let mut options = AdminOptions::new().request_timeout(Some(REQUEST_TIMEOUT));
        if let Some(leader) = leader {
            options = options.broker_id(leader);
        }
        let topic = [ResourceSpecifier::Topic(name)];
        let answer = admin.0.as_ref()?.describe_configs(&topic, &options).await;
        let config = answer.ok()?.pop()?.ok()?;
        let value = config.get("max.message.bytes")?.value.as_ref()?;
        value.parse().ok()
    }

    /// The client of whoever asks now, or a new one.
    fn admin(&self) -> Option<Arc<Admin>> {
        let mut admin = lock(&self.admin);
        if let Some(admin) = admin.upgrade() {
            return Some(admin);
        }
        let client = self.settings.client().ok()?.create().ok()?;
        let made = Arc::new(Admin(Some(client)));
        *admin = Arc::downgrade(&made);
        Some(made)
    }
}

/// A sign of life from any broker.
pub(super) async fn probe(
    producer: Arc<Client>,
    known_topic: Option<String>,
    timeout: Duration,
) -> Result<()> {
    // About a topic we write to, as a cluster may have very many.
    let answer = metadata(&producer, known_topic, timeout, None);
    answer.await.map(drop)
}

/// The leader of each of the topic's partitions, -1 where there is none now, or what
/// is wrong with the topic.
async fn metadata(
    producer: &Arc<Client>,
    topic: Option<String>,
    timeout: Duration,
    permit: Option<OwnedSemaphorePermit>,
) -> Result<Result<Vec<i32>, RDKafkaErrorCode>> {
    let asked = Arc::clone(producer);
    // librdkafka's call blocks.
    let answer = tokio::task::spawn_blocking(move || {
        // As long as it blocks the thread, whoever waits for it.
        let _permit = permit;
        let metadata = asked.client().fetch_metadata(topic.as_deref(), timeout)?;
        let found = metadata.topics().first().filter(|_| topic.is_some());
        let error = found.and_then(|found| found.error());
        let error = error.filter(|error| *error != RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR);
        let partitions = found.map_or(&[][..], |found| found.partitions());
        Ok::<_, KafkaError>(match error {
            Some(error) => Err(RDKafkaErrorCode::from(error)),
            None => Ok(partitions.iter().map(|found| found.leader()).collect()),
        })
    });
    let answer = answer.await;
    // An older complaint is about what has passed.
    let complaint = producer.context().take_complaint();
    match answer {
        Ok(answer) => answer.map_err(|error| {
            let cause = complaint.unwrap_or_else(|| error.to_string());
            Error::new(ErrorKind::BrokerAway, "no broker answers").caused_by(cause)
        }),
        Err(error) => Err(Error::new(ErrorKind::Unexpected, "ask for metadata").caused_by(error)),
    }
}
