//! Sends what is due of the parked events, aside from the stream.
//!
//! Two tasks do it, each with a session and a producer of its own, so that none waits for
//! another: a producer that was refused a record sends no more, and a topic may take seconds
//! to say that it is not there. So the stream never ends for an event that is tried in vain,
//! and what is scheduled is not late for it:
//!
//! - `schedule.rs` sends what was never refused, when its time has come. What is refused, or
//!   may be, joins the queue of its key.
//! - `queue.rs` tries what is in those queues again, one by one if it must.
//!
//! That a broker is away counts for nothing: it is waited for. What became of rows is stored
//! in one transaction with whose turn it is next. A relay that is killed before sends them
//! again.

mod courier;
mod letters;
mod queue;
mod schedule;
mod topics;
mod tries;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tracing::debug;

use self::courier::Courier;
use self::queue::Queue;
use self::schedule::Schedule;
use self::tries::Tried;
use super::marks::Marker;
use super::parking::Shared;
use crate::envelope::Encoder;
use crate::error::{Result, joined};
use crate::metrics::Metrics;
use crate::parked::ParkedSettings;
use crate::parked::store::Store;
use crate::publisher::KafkaSettings;
use crate::source::Outbox;

/// How long what is due is left that cannot be taken yet: the checkpoint has not passed it, or
/// somebody is cancelling it.
const UNSETTLED_PAUSE: Duration = Duration::from_millis(100);

/// How long no broker need be asked again that did not answer.
const AWAY_PAUSE: Duration = Duration::from_secs(2);

/// How many tasks there are.
const TASKS: usize = 2;

/// What each of them needs to make records of rows, and to send them.
pub(super) struct Tools {
    pub(super) encoder: Encoder,
    pub(super) outbox: Outbox,
    pub(super) kafka: KafkaSettings,
    pub(super) settings: ParkedSettings,
    pub(super) metrics: Arc<Metrics>,
    /// What marks rows that are sent in their own table, where rows are marked.
    pub(super) marker: Option<Marker>,
    pub(super) shared: Arc<Shared>,
}

/// The tasks that do it. Dropped, they end at once.
pub(super) struct Aside {
    tasks: JoinSet<Result<()>>,
    rest: watch::Sender<bool>,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// How many have nothing on its way, nor will have until they are told to go on.
    resting: AtomicUsize,
    rested: Notify,
}

/// What both tasks are made of.
struct Sender {
    store: Store,
    shared: Arc<Shared>,
    courier: Courier,
    settings: ParkedSettings,
    metrics: Arc<Metrics>,
    marker: Option<Marker>,
    rest: watch::Receiver<bool>,
    state: Arc<State>,
}

impl Aside {
    /// Starts them: one on each session.
    pub(super) fn start(schedule: Store, queue: Store, tools: impl Fn() -> Tools) -> Self {
        let (rest, told_to_rest) = watch::channel(false);
        let state = Arc::new(State::default());
        let sender = |store| Sender::new(store, tools(), told_to_rest.clone(), &state);
        let mut schedule = Schedule::new(sender(schedule));
        let mut queue = Queue::new(sender(queue));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            loop {
                schedule.step().await?;
            }
        });
        tasks.spawn(async move {
            loop {
                queue.step().await?;
            }
        });
        Self { tasks, rest, state }
    }

    /// Whether nothing more is to be sent: see [`is_at_rest`](Self::is_at_rest).
    pub(super) fn rest(&self, rests: bool) {
        self.rest.send_replace(rests);
    }

    /// Whether what became of the last row is stored, and no more are sent.
    pub(super) fn is_at_rest(&self) -> bool {
        self.state.resting.load(Ordering::Relaxed) == TASKS
    }

    /// Waits until one of them is. Cancel-safe.
    ///
    /// # Errors
    /// Why they cannot go on.
    async fn news(&mut self) -> Result<()> {
        tokio::select! {
            () = self.state.rested.notified() => Ok(()),
            Some(ended) = self.tasks.join_next() => joined(ended),
        }
    }
}

/// Waits until it is nearer to rest, where there is one, or cannot go on.
pub(super) async fn news(aside: Option<&mut Aside>) -> Result<()> {
    match aside {
        Some(aside) => aside.news().await,
        None => std::future::pending().await,
    }
}

impl Sender {
    fn new(store: Store, tools: Tools, rest: watch::Receiver<bool>, state: &Arc<State>) -> Self {
        Self {
            store,
            shared: Arc::clone(&tools.shared),
            settings: tools.settings.clone(),
            metrics: Arc::clone(&tools.metrics),
            marker: tools.marker.clone(),
            courier: Courier::new(tools, rest.clone()),
            rest,
            state: Arc::clone(state),
        }
    }

    /// Rests if it is told to, until it is told to go on.
    async fn rest(&mut self) {
        if !*self.rest.borrow() {
            return;
        }
        self.state.resting.fetch_add(1, Ordering::Relaxed);
        self.state.rested.notify_one();
        // Whoever could tell it is gone, and it with them.
        let _ = self.rest.wait_for(|rests| !*rests).await;
        self.state.resting.fetch_sub(1, Ordering::Relaxed);
    }

    /// Waits so long, unless it is told to rest, or woken by `wake`.
    async fn wait(&mut self, pause: Duration, wake: Option<&Notify>) {
        self.courier.close_if_idle();
        let woken = async {
            match wake {
                Some(wake) => wake.notified().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = woken => {}
            _ = self.rest.wait_for(|rests| *rests) => {}
            error = self.store.ended() => debug!("{}", error.chain()),
        }
    }

    /// Stores what became of rows, and tells the stream.
    async fn store(&self, tried: &Tried) -> Result<()> {
        if let Some(marker) = &self.marker {
            marker.mark(tried.to_mark.clone()).await?;
        }
        let outcome = &tried.outcome;
        self.store.settle(outcome).await?;
        self.shared.change(|holds| {
            holds.add(&tried.added);
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
        Ok(())
    }
}
