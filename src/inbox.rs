//! The other side: a consumer of Kafka that has each message handled once.
//!
//! # The promise
//!
//! The effects of a handler that works in our transaction happen once per group, topic and
//! message id, whatever crashes, is moved to another consumer, or is produced again. Messages of
//! a key are handled in their order. One that fails costs itself and its key, and nothing else:
//! it waits in `postbox.inbox_message`, is tried again, less and less often, and is a dead letter
//! after so many attempts. No record is lost for what is in it.
//!
//! # How
//!
//! One transaction for each batch: it moves the offsets, which are kept in Postgres
//! (`inbox_offset`), writes which messages were received (`inbox`), and has the handler
//! work. Kafka's own offsets follow, for those who look at the lag.
//!
//! ```text
//!  Kafka ──▶ consumer ──▶ batch: offsets + ids + handler, one transaction
//!            (thread)        │                      ▲
//!                            └─▶ inbox_message ─▶ retries
//! ```
//!
//! # What is misleading
//!
//! - Kafka says who may read a partition, but a consumer that was frozen does not hear that it
//!   may no longer. So the offset's row has an epoch, which is raised by whoever takes the
//!   partition, and each transaction begins with an update under its own.
//! - Offsets know nothing of a message that was produced twice, and ids nothing of a partition
//!   that was read twice by two consumers at once: it takes both.
//! - A savepoint around the handler alone would keep the id of a message whose effects were
//!   rolled back. So what failed is written to the table in the same transaction, and is
//!   handled from there.

mod attempt;
pub mod batch;
mod columns;
mod consumer;
mod ends;
mod gauges;
pub mod handler;
mod headers;
mod json;
pub mod lane;
mod letters;
pub mod message;
pub mod position;
pub mod record;
mod retention;
mod retries;
pub mod router;
mod store;
pub mod stored;
pub mod strategy;

use std::sync::Arc;
use std::time::Duration;

use rdkafka::ClientConfig;
use tokio::sync::watch;
use tracing::{debug, warn};

use crate::backoff::{BACKOFF_MAX, backoff};
use crate::contract::Contract;
use crate::database::{Database, Session, sort};
use crate::error::{Error, ErrorKind, Result};
use crate::health::Health;
use crate::metrics::InboxMetrics;
use crate::publisher::KafkaSettings;
use attempt::Attempt;
use batch::Attempts;
use consumer::ConsumerSettings;
use handler::Handlers;
use lane::Order;
use message::Reading;
use position::{From, OnReset};
pub use record::{already_processed, already_processed_in, record, record_in};
use strategy::Ack;

/// What an inbox needs to know.
#[derive(Debug, Clone)]
pub struct InboxSettings {
    /// The database.
    pub database: Database,
    /// The name of the schema.
    pub contract: Contract,
    /// The brokers.
    pub kafka: KafkaSettings,
    /// What is read: names, and regular expressions that begin with `^`.
    pub topics: Vec<String>,
    /// The consumer group.
    pub group: String,
    /// Who it is within the group, if it is to keep its partitions through a restart.
    pub instance: Option<String>,
    /// When a message counts as received.
    pub ack: Ack,
    /// Who handles.
    pub handlers: Handlers,
    /// How records are read.
    pub reading: Reading,
    /// Whether an id means the same in all topics of the group.
    pub shares_ids: bool,
    /// What keeps its order.
    pub order: Order,
    /// Where a group begins that has read nothing.
    pub from: From,
    /// What is done where a log is another.
    pub on_reset: OnReset,
    /// How often a message is tried.
    pub attempts: Attempts,
    /// How long the handler may take for a message, and each of its statements for a batch.
    pub handler_timeout: Duration,
    /// The most messages of a transaction.
    pub batch_max: usize,
    /// The most bytes of them. One larger message passes alone.
    pub batch_bytes_max: usize,
    /// How many bytes librdkafka may hold.
    pub fetch_bytes_max: usize,
    /// How many messages may wait in the table before no more are read.
    pub waiting_max: usize,
    /// Where copies of dead letters go.
    pub dead_letter_topic: Option<String>,
    /// For how long a message that is repeated is known, at least.
    pub dedup_window: Duration,
    /// How long a stop may take.
    pub shutdown_timeout: Duration,
}

/// Properties that carry a promise: our value, and what it would cost to change it.
const FIXED: &[(&str, &str, &str)] = &[
    (
        "enable.auto.commit",
        "false",
        "offsets follow what is committed to Postgres",
    ),
    (
        "enable.auto.offset.store",
        "false",
        "offsets follow what is committed to Postgres",
    ),
    (
        "auto.offset.reset",
        "error",
        "a log that is not the one that was read is told: see --on-reset",
    ),
    (
        "enable.partition.eof",
        "false",
        "the end of a partition is no message",
    ),
    (
        "isolation.level",
        "read_committed",
        "what was aborted never happened",
    ),
];

/// Properties that are flags.
const FLAGS: &[(&str, &str)] = &[
    ("group.id", "--group"),
    ("group.instance.id", "--instance"),
    ("queued.max.messages.kbytes", "--fetch-bytes-max"),
];

/// How much longer than a handler may take a transaction may stand still.
const IDLE_MARGIN: Duration = Duration::from_secs(10);

impl InboxSettings {
    /// A session whose transaction ends though we do not go on with it: it locks the offsets of
    /// partitions, and whoever takes them from one that is frozen or gone waits for that.
    async fn session(&self, application_name: &str) -> Result<Session> {
        let session = self.database.connect(application_name).await?;
        let idle = self.handler_timeout + IDLE_MARGIN;
        let limits = format!(
            "SET idle_in_transaction_session_timeout = {}; SET tcp_keepalives_idle = 10; \
             SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3",
            idle.as_millis()
        );
        let limited = session.client.batch_execute(&limits).await;
        limited.map_err(|error| sort("limit how long a transaction may stand still", error))?;
        // A statement of ours ends with us, where the server's system can tell it.
        let watches = "SET client_connection_check_interval = 2000";
        if let Err(error) = session.client.batch_execute(watches).await {
            debug!("statements go on without their client: {error}");
        }
        Ok(session)
    }

    fn consumer(&self) -> Result<ConsumerSettings> {
        Ok(ConsumerSettings {
            config: self.client()?,
            topics: self.topics.clone(),
            reading: self.reading.clone(),
            batch_max: self.batch_max,
            batch_bytes_max: self.batch_bytes_max,
        })
    }

    fn client(&self) -> Result<ClientConfig> {
        let defaults = [
            ("client.id", "postbox"),
            ("partition.assignment.strategy", "cooperative-sticky"),
            ("socket.keepalive.enable", "true"),
            ("reconnect.backoff.max.ms", "2000"),
            // How long a broker waits for more than a byte. One is enough.
            ("fetch.wait.max.ms", "100"),
            // How soon topics and partitions are seen that are made later; the default is five minutes.
            ("topic.metadata.refresh.interval.ms", "10000"),
        ];
        let mut config = self.kafka.client()?;
        let refuse = |message: String| Err(Error::new(ErrorKind::Settings, message));
        for (name, flag) in FLAGS {
            if config.get(name).is_some() {
                return refuse(format!("-X {name} is not for you to set: use {flag}"));
            }
        }
        for (name, value, why) in FIXED {
            if let Some(set) = config.get(name).filter(|set| set != value) {
                return refuse(format!(
                    "-X {name}={set} fights {name}={value}, which stays: {why}"
                ));
            }
        }
        for (name, value) in defaults {
            if config.get(name).is_none() {
                config.set(name, value);
            }
        }
        for (name, value, _) in FIXED {
            config.set(*name, *value);
        }
        config.set("group.id", &self.group);
        if let Some(instance) = &self.instance {
            config.set("group.instance.id", instance);
        }
        let kilobytes = (self.fetch_bytes_max / 1024).max(1);
        config.set("queued.max.messages.kbytes", kilobytes.to_string());
        Ok(config)
    }
}

/// Has messages handled until it is told to stop.
pub struct Inbox {
    settings: InboxSettings,
    metrics: Arc<InboxMetrics>,
    health: Arc<Health>,
    /// As whom it holds partitions.
    owner: String,
    /// Whether the last attempt did anything.
    worked: bool,
}

impl Inbox {
    /// An inbox that reports to `metrics` and `health`.
    pub fn new(settings: InboxSettings, metrics: Arc<InboxMetrics>, health: Arc<Health>) -> Self {
        let nonce = uuid::Uuid::new_v4();
        Self {
            settings,
            metrics,
            health,
            owner: format!("process {}, {nonce}", std::process::id()),
            worked: false,
        }
    }

    /// Runs until `shutdown` becomes true or something fails that waiting will not mend.
    ///
    /// # Errors
    /// Any definite error; `NotDrained` if a stop left a handler at work.
    pub async fn run(mut self, shutdown: watch::Receiver<bool>) -> Result<()> {
        let (settings, metrics) = (self.settings.clone(), self.metrics.clone());
        let keeping = async {
            tokio::join!(
                retention::run(settings.clone(), metrics.clone()),
                gauges::run(settings.clone(), metrics.clone()),
                letters::run(settings.clone()),
            )
        };
        // Beside what is handled, whatever becomes of it; it never ends by itself.
        tokio::select! {
            ended = self.handle(shutdown) => ended,
            _ = keeping => Ok(()),
        }
    }

    async fn handle(&mut self, mut shutdown: watch::Receiver<bool>) -> Result<()> {
        let mut pauses = backoff();
        loop {
            self.worked = false;
            let Err(error) = Box::pin(Attempt::run(self, &mut shutdown)).await else {
                return Ok(());
            };
            self.health.stopped(&error);
            if !error.kind().is_transient() {
                return Err(error);
            }
            let reason = error.kind().label();
            self.metrics.reconnects.with_label_values(&[reason]).inc();
            if self.worked {
                pauses = backoff();
            }
            let pause = pauses.next().unwrap_or(BACKOFF_MAX);
            let seconds = pause.as_secs_f32();
            warn!("trying again in {seconds:.1} s: {}", error.chain());
            tokio::select! {
                () = told_to_stop(&mut shutdown) => return Ok(()),
                () = tokio::time::sleep(pause) => {}
            }
        }
    }
}

/// Returns once it is time to stop, or nobody is left to tell.
async fn told_to_stop(shutdown: &mut watch::Receiver<bool>) {
    // What it returns cannot be sent to another thread, and so is dropped here.
    let _ = shutdown.wait_for(|stops| *stops).await;
}
