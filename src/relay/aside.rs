//! Sends what is due of the parked events, aside from the stream.
//!
//! It has a producer of its own, as one that was refused a record sends no more: the stream
//! never ends for an event that is tried in vain. The producer is made when something is
//! due, and closed when nothing has been for a while.
//!
//! What was never refused is sent many at a time, of each key one after another; what was is
//! sent alone, with nothing else on its way. So is each of those that were on their way when
//! one was refused: a refused batch is not a refused event. That a broker is away counts for
//! nothing: it is waited for.
//!
//! What became of the rows is stored in one transaction with whose turn it is next. A relay
//! that is killed before sends them again.

mod courier;
mod letters;
mod topics;
mod tries;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::debug;

use self::courier::Courier;
use self::topics::Topics;
use super::marks::Marker;
use super::parking::Shared;
use crate::envelope::Encoder;
use crate::error::{Result, joined};
use crate::metrics::Metrics;
use crate::parked::store::Store;
use crate::parked::{ParkedSettings, Status, Taken};
use crate::publisher::KafkaSettings;
use crate::source::Outbox;

/// How long to wait at most before looking again: somebody may have decided.
const LOOK_MAX: Duration = Duration::from_secs(1);

/// How long what is due is left that the checkpoint has not passed.
const UNSETTLED_PAUSE: Duration = Duration::from_millis(100);

/// How often everything is looked after: what is held back, and how much there is.
const REFRESH_INTERVAL: Duration = Duration::from_secs(10);

/// How often scheduled events are counted, of which there may be very many. In between it is
/// known what comes and goes.
const COUNT_INTERVAL: Duration = Duration::from_secs(600);

/// How long no broker need be asked again that did not answer.
const AWAY_PAUSE: Duration = Duration::from_secs(2);

/// What it needs to make records of rows, and to send them.
pub(super) struct Tools {
    pub(super) encoder: Encoder,
    pub(super) outbox: Outbox,
    pub(super) kafka: KafkaSettings,
    pub(super) settings: ParkedSettings,
    pub(super) metrics: Arc<Metrics>,
}

/// The task that does it. Dropped, it ends at once.
pub(super) struct Aside {
    task: JoinSet<Result<()>>,
    rest: watch::Sender<bool>,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// Nothing is on its way, nor will be until it is told to go on.
    is_at_rest: AtomicBool,
    rested: Notify,
}

struct Sender {
    store: Store,
    shared: Arc<Shared>,
    courier: Courier,
    topics: Topics,
    settings: ParkedSettings,
    metrics: Arc<Metrics>,
    marker: Option<Marker>,
    /// Events that were sent and are to be marked.
    sent: Vec<(String, i64)>,
    refreshed_at: Option<Instant>,
    counted_at: Option<Instant>,
    /// Whether copies of dead letters may have to be sent.
    owes_letters: bool,
    /// Not before this.
    letters_at: Option<Instant>,
    rest: watch::Receiver<bool>,
    state: Arc<State>,
}

impl Aside {
    /// Starts it. With a `marker`, rows that are sent are marked in their own table.
    pub(super) fn start(
        store: Store,
        shared: Arc<Shared>,
        tools: Tools,
        marker: Option<Marker>,
    ) -> Self {
        let (rest, told_to_rest) = watch::channel(false);
        let state = Arc::new(State::default());
        let mut sender = Sender {
            store,
            shared,
            topics: Topics::default(),
            settings: tools.settings.clone(),
            metrics: Arc::clone(&tools.metrics),
            sent: Vec::new(),
            refreshed_at: None,
            counted_at: None,
            owes_letters: true,
            letters_at: None,
            rest: told_to_rest,
            state: Arc::clone(&state),
            marker,
            courier: Courier::new(tools, rest.subscribe()),
        };
        let mut task = JoinSet::new();
        task.spawn(async move {
            loop {
                sender.step().await?;
            }
        });
        Self { task, rest, state }
    }

    /// Whether nothing more is to be sent: see [`is_at_rest`](Self::is_at_rest).
    pub(super) fn rest(&self, rests: bool) {
        self.rest.send_replace(rests);
    }

    /// Whether what became of the last row is stored, and no more are sent.
    pub(super) fn is_at_rest(&self) -> bool {
        self.state.is_at_rest.load(Ordering::Relaxed)
    }

    /// Waits until it is. Cancel-safe.
    ///
    /// # Errors
    /// Why it cannot go on.
    async fn news(&mut self) -> Result<()> {
        tokio::select! {
            () = self.state.rested.notified() => Ok(()),
            Some(ended) = self.task.join_next() => joined(ended),
        }
    }
}

/// Waits until it is at rest, where there is one, or cannot go on.
pub(super) async fn news(aside: Option<&mut Aside>) -> Result<()> {
    match aside {
        Some(aside) => aside.news().await,
        None => std::future::pending().await,
    }
}

impl Sender {
    /// Sends what is due, and waits until something may be.
    async fn step(&mut self) -> Result<()> {
        if *self.rest.borrow() {
            return self.pause().await;
        }
        if self.refreshed_at.is_none() {
            self.store.release_taken().await?;
        }
        self.refresh().await?;
        self.probe()?;
        self.take_answers().await?;
        let due = self.store.next_due().await?;
        let sent = match due {
            Some(Duration::ZERO) => self.look().await?,
            _ => None,
        };
        self.look_after_keys().await?;
        match sent {
            // There may be more.
            Some(false) => Ok(()),
            Some(true) => self.wait(AWAY_PAUSE, false).await,
            None => {
                self.write_letters().await?;
                let pause = due.map_or(LOOK_MAX, |due| due.clamp(UNSETTLED_PAUSE, LOOK_MAX));
                self.wait(pause, true).await
            }
        }
    }

    /// Rests until it is told to go on.
    async fn pause(&mut self) -> Result<()> {
        self.state.is_at_rest.store(true, Ordering::Relaxed);
        self.state.rested.notify_one();
        // Whoever could tell it is gone, and it with them.
        let _ = self.rest.wait_for(|rests| !*rests).await;
        self.state.is_at_rest.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Sends what is due. `None` if nothing is; else whether no broker could be asked.
    async fn look(&mut self) -> Result<Option<bool>> {
        let mut rows = self.store.take_scheduled().await?;
        rows.extend(self.store.take_waiting().await?);
        if rows.is_empty() {
            return Ok(None);
        }
        let is_scheduled = |row: &&Taken| row.status == Status::Scheduled;
        let scheduled: HashSet<String> = rows
            .iter()
            .filter(is_scheduled)
            .map(|row| row.id.clone())
            .collect();
        let (outcome, is_away) = self.send(rows).await?;
        let sent = std::mem::take(&mut self.sent);
        if let Some(marker) = &self.marker {
            marker.mark(sent).await?;
        }
        self.store.settle(&outcome).await?;
        self.free_topics().await?;
        let gone = outcome.gone.iter().filter(|id| scheduled.contains(*id));
        let unscheduled = gone.count() + outcome.joining.len();
        self.shared.change(|holds| {
            holds.unschedule(i64::try_from(unscheduled).unwrap_or(i64::MAX));
            let refused = outcome.refused.iter().filter(|refused| !refused.is_dead);
            let refused = refused.map(|refused| (&refused.topic, &refused.key));
            let joining = outcome.joining.iter().map(|(_, topic, key)| (topic, key));
            for (topic, key) in refused.chain(joining) {
                if let (Some(topic), Some(key)) = (topic, key) {
                    holds.hold_key(topic.clone(), key.clone());
                }
            }
            for (topic, key) in &outcome.keys {
                holds.doubt(topic, key);
            }
        });
        Ok(Some(is_away))
    }

    /// Waits so long, unless something new may be due before.
    async fn wait(&mut self, pause: Duration, may_wake: bool) -> Result<()> {
        self.courier.close_if_idle();
        let waited = async {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.shared.wake.notified(), if may_wake => {}
                _ = self.rest.wait_for(|rests| *rests) => {}
                probed = self.topics.answer() => return Some(probed),
                error = self.store.ended() => {
                    debug!("{}", error.chain());
                }
            }
            None
        };
        match waited.await {
            Some(probed) => self.probed(probed?).await,
            None => Ok(()),
        }
    }

    /// Looks now and then at everything that waits.
    async fn refresh(&mut self) -> Result<()> {
        let now = Instant::now();
        let is_recent = |at: Instant| now.duration_since(at) < REFRESH_INTERVAL;
        if self.refreshed_at.is_some_and(is_recent) {
            return Ok(());
        }
        self.refreshed_at = Some(now);
        self.owes_letters = self.settings.dead_letter_topic.is_some();
        let has_decided = self.shared.with(|holds| holds.has_decided());
        let held = self.store.held(has_decided).await?;
        if self
            .counted_at
            .is_none_or(|at| at.elapsed() > COUNT_INTERVAL)
        {
            self.counted_at = Some(now);
            let scheduled = self.store.count_scheduled().await?;
            self.shared.change(|holds| holds.count_scheduled(scheduled));
        }
        let scheduled = self.shared.with(|holds| holds.counted().scheduled);
        let count = self.store.count(scheduled).await?;
        self.metrics.parked.set(&count);
        // Parked while it was just being freed.
        for (topic, _) in &held.topics {
            if !self.shared.with(|holds| holds.topics().contains_key(topic)) {
                self.store.free_topic(topic).await?;
            }
        }
        self.shared.change(|holds| {
            for (topic, key) in held.keys {
                if !holds.has_key(&topic, &key) {
                    holds.hold_key(topic, key);
                }
            }
            holds.doubt_all();
            holds.keep_decided(held.decided);
            holds.count(count);
        });
        Ok(())
    }

    /// Lets the next of a key have its turn, and the stream have keys of which nothing waits.
    async fn look_after_keys(&mut self) -> Result<()> {
        let dirty = self.shared.with(|holds| holds.dirty());
        if dirty.is_empty() {
            return Ok(());
        }
        let keys: HashSet<(String, String)> = dirty.keys().cloned().collect();
        let held = self.store.look_after(&keys).await?;
        self.shared.change(|holds| holds.looked_after(dirty, &held));
        Ok(())
    }

    /// This event is to be marked in its own table, where rows are.
    fn remember(&mut self, taken: &Taken) {
        if self.marker.is_some() {
            self.sent.extend(self.courier.identity(taken));
        }
    }
}
