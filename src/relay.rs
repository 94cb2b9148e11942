//! The loop that carries events from the slot, or the table, to Kafka, and starts again.
//!
//! Everything that can break breaks one way: the attempt ends, its stream and
//! its producer go, and the next one starts where the slot was last confirmed.
//! So a restart after a failed delivery, a lost connection, a takeover and a
//! `kill -9` are the same path, and what is repeated is bounded by the same
//! window: what was in flight, and what was delivered since the last
//! confirmation. A repetition never breaks the order of a key: each producer
//! sends in order and stops at its first failure, and the next begins at or before
//! the first event that is missing. That holds while the producer before is still
//! ending: what it has sent is a run without a gap, too.
//!
//! The relay is the only place that knows both LSNs and records.

mod ahead;
mod aside;
mod attempt;
mod cleaner;
mod connect;
mod control;
mod division;
mod gather;
mod marks;
mod meter;
mod pace;
mod parking;
mod partitions;
mod refused_topics;
mod share;
mod window;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{info, warn};

use crate::backoff::{BACKOFF_MAX, backoff};
use crate::catalog::Mode;
use crate::contract::Contract;
use crate::database::Database;
use crate::envelope::{Format, HeaderStyle, Route};
use crate::error::{Error, ErrorKind, Result};
use crate::health::Health;
use crate::metrics::Metrics;
use crate::parked::ParkedSettings;
use crate::publisher::{BATCH_BYTES, KafkaSettings};
use crate::source::Place;
use crate::source::claim::ClaimSettings;
use attempt::{Attempt, Ended};
pub use cleaner::CleanupSettings;
use connect::Kept;
use division::Division;
use meter::Cue;

/// What a relay needs to know.
#[derive(Debug, Clone)]
pub struct RelaySettings {
    /// The database.
    pub database: Database,
    /// The names of schema, slot and publication, and the table. With polling, one whose rows
    /// say whether they are published is claimed from, and nothing needs to be set up.
    pub contract: Contract,
    /// How events are read; if it is not said, as it was set up.
    pub mode: Option<Mode>,
    /// Whether rows that come from a slot are marked published in their table, where that
    /// has columns for it.
    pub mark: bool,
    /// With claims, after how long others take a claim for dead.
    pub claim_timeout: Duration,
    /// With claims, how often a row is tried whose table does not say.
    pub attempts_max: u32,
    /// What becomes of events that cannot go out, and of those that should go out later. Rows
    /// that are claimed say that themselves.
    pub parked: ParkedSettings,
    /// The brokers.
    pub kafka: KafkaSettings,
    /// What a value looks like.
    pub format: Format,
    /// Where an event goes whose row does not say.
    pub route: Route,
    /// Which headers a record has.
    pub headers: HeaderStyle,
    /// How many events may be sent and not yet acknowledged, or held behind one that is
    /// not: what a crash may repeat.
    pub in_flight_max: usize,
    /// How many bytes of them. One larger event still passes, alone.
    pub in_flight_bytes_max: usize,
    /// How often a new position is told to Postgres.
    pub status_interval: Duration,
    /// How often the publication is checked and a fence is written.
    pub heartbeat_interval: Duration,
    /// After how long without a sign of life the other side counts as dead.
    pub wal_sender_timeout: Duration,
    /// With polling, how long to wait at least before the table is asked again.
    pub poll_interval_min: Duration,
    /// How long to wait at most.
    pub poll_interval_max: Duration,
    /// With polling, among how many relays at most the table is divided; if it is not said,
    /// it is not.
    pub shards: Option<u8>,
    /// How long a stop may take to drain what is in flight.
    pub shutdown_timeout: Duration,
    /// Whether it cleans up, too.
    pub cleanup: Option<CleanupSettings>,
}

impl RelaySettings {
    /// How rows are claimed, if they are.
    fn claims(&self) -> Option<ClaimSettings> {
        (self.mode == Some(Mode::Poll)).then(|| self.tracked())?
    }

    /// How rows are marked, if they are.
    fn marks(&self) -> Option<ClaimSettings> {
        (self.mode == Some(Mode::Wal) && self.mark).then(|| self.tracked())?
    }

    /// The table, if its rows say whether they are published.
    fn tracked(&self) -> Option<ClaimSettings> {
        let is_tracked = self.contract.outbox.preset.tracking().is_some();
        is_tracked.then(|| ClaimSettings {
            table: self.contract.outbox.clone(),
            timeout: self.claim_timeout,
            attempts_max: self.attempts_max,
        })
    }
}

/// Carries events until it is told to stop.
pub struct Relay {
    settings: RelaySettings,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    /// For those that measure the backlog.
    cue: Arc<Cue>,
    /// Rows that were in a refused batch: they are sent again alone, so that the
    /// one that is at fault can be told from its neighbours.
    suspects: BTreeSet<Place>,
    /// Rows that were refused alone, and why: they are parked when they come again.
    condemned: BTreeMap<Place, String>,
    /// Topics that were refused altogether, and why, until that is in the table.
    refused_topics: HashMap<String, String>,
    /// From which size on records of a topic were too large, and may be still: they are parked
    /// untried, until one passes.
    too_large: HashMap<String, usize>,
    /// The largest batch. An attempt with a refused batch halves it, as the topic's limit may be
    /// smaller and not ours to ask for; it does not grow again.
    batch_bytes: usize,
    /// The last event that was sent, if Postgres may not have stored that it was delivered.
    unstored: Option<Place>,
    /// What this relay's fences are known by.
    nonce: String,
    /// How it was last said that events are read, where that is as it was set up.
    told: Option<Mode>,
    /// Whether a slot that nobody reads was looked for.
    has_looked_for_slot: bool,
    /// Whether the last attempt delivered anything, or held for a while.
    worked: bool,
    /// Until when what attempts before have claimed may not have been given back.
    leftovers_until: Option<tokio::time::Instant>,
    /// Whether the last attempt ended as this process seemed to have been frozen.
    was_frozen: bool,
    /// What the last attempt leaves to one that serves other slices.
    kept: Option<Kept>,
}

impl Relay {
    /// A relay that reports to `metrics` and `health`.
    pub fn new(settings: RelaySettings, metrics: Arc<Metrics>, health: Arc<Health>) -> Self {
        Self {
            settings,
            metrics,
            health,
            cue: Arc::default(),
            suspects: BTreeSet::new(),
            condemned: BTreeMap::new(),
            refused_topics: HashMap::new(),
            too_large: HashMap::new(),
            batch_bytes: BATCH_BYTES,
            unstored: None,
            nonce: uuid::Uuid::new_v4().to_string(),
            told: None,
            has_looked_for_slot: false,
            worked: false,
            leftovers_until: None,
            was_frozen: false,
            kept: None,
        }
    }

    /// Runs until `shutdown` becomes true or something fails that waiting will
    /// not mend. It pauses its thread while busy, so that the server can send in
    /// bursts: run it on a runtime of its own.
    ///
    /// When it returns, threads of librdkafka may need up to two seconds to end, and
    /// longer where a broker does not answer or a name look-up hangs. A program that
    /// ends sooner, and talks TLS to Kafka, should do so by `_exit`: OpenSSL's clean-up
    /// would crash them.
    ///
    /// # Errors
    /// Any definite error; `NotDrained` if a stop left events to be repeated.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) -> Result<()> {
        let mut pauses = backoff();
        let mut standing_by = false;
        // Ends with us.
        let mut beside = JoinSet::new();
        let (settings, metrics) = (self.settings.clone(), self.metrics.clone());
        beside.spawn(ahead::run(settings.clone(), metrics.clone()));
        beside.spawn(cleaner::run(
            settings.clone(),
            metrics.clone(),
            self.cue.clone(),
        ));
        beside.spawn(meter::run(settings, metrics, self.cue.clone()));
        loop {
            self.worked = false;
            let error = match Box::pin(Attempt::run(&mut self, &mut shutdown)).await {
                Ok(Ended::Stopped) => return self.end(),
                // The next serves other slices.
                Ok(Ended::Divided) => continue,
                Err(error) => error,
            };
            self.health.stopped(&error);
            if !error.kind().is_transient() {
                return Err(error);
            }
            self.cue.stands_by(error.kind() == ErrorKind::SlotInUse);
            let reason = error.kind().label();
            self.metrics.reconnects.with_label_values(&[reason]).inc();
            // An attempt that worked, or found another relay at work, is not part of a series.
            if self.worked || error.kind() == ErrorKind::SlotInUse {
                pauses = backoff();
            }
            let pause = match error.kind() {
                // The other relay may end at any moment; asking is cheap.
                ErrorKind::SlotInUse => STANDBY_INTERVAL,
                _ => pauses.next().unwrap_or(BACKOFF_MAX),
            };
            if self.worked {
                standing_by = false;
            }
            // Once, not with every question.
            if error.kind() != ErrorKind::SlotInUse {
                standing_by = false;
                let seconds = pause.as_secs_f32();
                warn!("trying again in {seconds:.1} s: {}", error.chain());
            } else if !std::mem::replace(&mut standing_by, true) {
                info!("standing by: {}", error.chain());
            }
            tokio::select! {
                _ = shutdown.wait_for(|stop| *stop) => {
                    self.leave().await;
                    return self.end();
                }
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// As whom it holds a lease.
    fn owner(&self) -> String {
        format!("process {}, {}", std::process::id(), self.nonce)
    }

    /// How it shares its table with others, if it does.
    fn division(&self) -> Option<Division> {
        let relays_max = self.settings.shards?;
        let contract = &self.settings.contract;
        Some(Division::new(contract, &self.owner(), relays_max))
    }

    /// Gives up what is leased to it between two attempts.
    async fn leave(&self) {
        if let Some(division) = self.division() {
            division.leave(&self.settings.database).await;
        }
    }

    /// A stop that was asked for.
    fn end(&self) -> Result<()> {
        if self.unstored.is_none() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::NotDrained,
            "stopped while disconnected: the last events may be sent again",
        ))
    }
}

/// How often a relay that stands by asks for the slot.
const STANDBY_INTERVAL: Duration = Duration::from_millis(500);
