//! Tries what waits for another try, the first of each key, and looks after the queues.
//!
//! What was never refused is sent many at a time, of each key in its order; what was is
//! sent alone, with nothing else on its way. So is each of those that were on their way when
//! one was refused: a refused batch is not a refused event.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::letters::Letters;
use super::topics::Topics;
use super::{AWAY_PAUSE, Sender, UNSETTLED_PAUSE};
use crate::error::Result;

/// How long to wait at most before looking again: somebody may have decided.
const LOOK_MAX: Duration = Duration::from_secs(1);

/// How often everything is looked after: what is held back, and how much there is.
const REFRESH_INTERVAL: Duration = Duration::from_secs(10);

/// How often scheduled events are counted, of which there may be very many. In between it is
/// known what comes and goes.
const COUNT_INTERVAL: Duration = Duration::from_secs(600);

/// What waits for another try.
pub(super) struct Queue {
    pub(super) sender: Sender,
    pub(super) topics: Topics,
    refreshed_at: Option<Instant>,
    counted_at: Option<Instant>,
    pub(super) letters: Letters,
}

impl Queue {
    pub(super) fn new(sender: Sender) -> Self {
        Self {
            sender,
            topics: Topics::default(),
            refreshed_at: None,
            counted_at: None,
            letters: Letters::new(),
        }
    }

    /// Tries what is due, and waits until something may be.
    pub(super) async fn step(&mut self) -> Result<()> {
        self.sender.rest().await;
        if self.refreshed_at.is_none() {
            self.sender.store.release_taken().await?;
        }
        self.refresh().await?;
        self.probe()?;
        self.take_answers().await?;
        let due = self.sender.store.next_waiting().await?;
        let tried = match due {
            Some(Duration::ZERO) => self.send().await?,
            _ => None,
        };
        self.look_after_keys().await?;
        match tried {
            // There may be more.
            Some(is_away) if !is_away => Ok(()),
            Some(_) => self.wait(AWAY_PAUSE, false).await,
            None => {
                self.write_letters().await?;
                let pause = due.map_or(LOOK_MAX, |due| due.clamp(UNSETTLED_PAUSE, LOOK_MAX));
                self.wait(pause, true).await
            }
        }
    }

    /// Waits, unless brokers say what they know of a topic.
    async fn wait(&mut self, pause: Duration, may_wake: bool) -> Result<()> {
        let shared = Arc::clone(&self.sender.shared);
        let wake = may_wake.then_some(&shared.wake_queue);
        let probed = tokio::select! {
            () = self.sender.wait(pause, wake) => return Ok(()),
            probed = self.topics.answer() => probed?,
        };
        self.probed(probed).await
    }

    /// Sends what is due. `None` if nothing is; else whether no broker could be asked.
    async fn send(&mut self) -> Result<Option<bool>> {
        let sender = &mut self.sender;
        let began = Instant::now();
        let rows = sender.store.take_waiting().await?;
        if rows.is_empty() {
            return Ok(None);
        }
        let trials = self.topics.trials();
        let tried = sender.try_again(rows, began, trials).await?;
        sender.store(&tried).await?;
        let outcome = &tried.outcome;
        if let Some(due) = outcome.early.iter().map(|(_, time)| *time).min() {
            sender.shared.schedule(due);
        }
        if outcome.refused.iter().any(|refused| refused.owes_letter) {
            self.letters.look();
        }
        self.topics.tried(&tried);
        self.free_topics().await?;
        Ok(Some(tried.is_away))
    }

    /// Looks now and then at everything that waits.
    async fn refresh(&mut self) -> Result<()> {
        let now = Instant::now();
        let is_recent = |at: Instant| now.duration_since(at) < REFRESH_INTERVAL;
        if self.refreshed_at.is_some_and(is_recent) {
            return Ok(());
        }
        self.refreshed_at = Some(now);
        let Sender {
            store,
            shared,
            metrics,
            ..
        } = &self.sender;
        self.letters.look();
        let has_decided = shared.with(|holds| holds.has_decided());
        let held = store.held(has_decided).await?;
        if self
            .counted_at
            .is_none_or(|at| at.elapsed() > COUNT_INTERVAL)
        {
            self.counted_at = Some(now);
            let scheduled = store.count_scheduled().await?;
            shared.change(|holds| holds.count_scheduled(scheduled));
        }
        let count = store.count().await?;
        // Parked while it was just being freed.
        for (topic, _) in &held.topics {
            if !shared.with(|holds| holds.topics().contains_key(topic)) {
                store.free_topic(topic).await?;
            }
        }
        let count = shared.change(|holds| {
            for (topic, key) in held.keys {
                if !holds.has_key(&topic, &key) {
                    holds.hold_key(topic, key);
                }
            }
            holds.doubt_all();
            holds.keep_decided(held.decided);
            holds.count(count)
        });
        metrics.parked.set(&count);
        Ok(())
    }

    /// Lets the next of a key have its turn, and the stream have keys of which nothing waits.
    async fn look_after_keys(&mut self) -> Result<()> {
        let Sender { store, shared, .. } = &self.sender;
        let dirty = shared.with(|holds| holds.dirty());
        if dirty.is_empty() {
            return Ok(());
        }
        let keys: HashSet<(String, String)> = dirty.keys().cloned().collect();
        let held = store.look_after(&keys).await?;
        shared.change(|holds| holds.looked_after(dirty, &held));
        Ok(())
    }
}
