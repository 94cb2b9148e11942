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

use std::borrow::Cow;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tracing::{debug, error, info, warn};

use super::parking::Shared;
use crate::envelope::{Encoder, Header, Record};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::{Metrics, ParkedMetrics};
use crate::parked::store::{Outcome, Refused, Store};
use crate::parked::{ParkedSettings, Status, Taken};
use crate::pgoutput::{self, Message, Value};
use crate::publisher::{
    BATCH_BYTES, Fit, KafkaSettings, Publisher, Report, SendError, Topic, UNKNOWN_MAX, Verdict,
    verdict,
};
use crate::source::{Messages, Outbox};
use crate::timestamp::Timestamp;

/// How long to wait at most before looking again: somebody may have decided.
const LOOK_MAX: Duration = Duration::from_secs(1);

/// How often everything is looked after: what is held back, and how much there is.
const REFRESH_INTERVAL: Duration = Duration::from_secs(10);

/// How long no broker need be asked again that did not answer.
const AWAY_PAUSE: Duration = Duration::from_secs(2);

/// How long a delivery may take before the brokers count as away.
const REPORT_MAX: Duration = Duration::from_secs(30);

/// After how long without anything due the producer is closed.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// How soon a topic that was refused is asked about again; each time twice as long.
const PROBE_MIN: Duration = Duration::from_secs(1);
const PROBE_MAX: Duration = Duration::from_secs(60);

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
    task: JoinSet<Error>,
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
    encoder: Encoder,
    messages: Messages,
    kafka: KafkaSettings,
    settings: ParkedSettings,
    metrics: Arc<Metrics>,
    gauges: ParkedMetrics,
    publisher: Option<Publisher>,
    used_at: Instant,
    refreshed_at: Option<Instant>,
    probes: HashMap<String, Probe>,
    probing: JoinSet<(String, Result<Topic>)>,
    /// Whether copies of dead letters may have to be sent.
    owes_letters: bool,
    reports: Vec<Report>,
    rest: watch::Receiver<bool>,
    state: Arc<State>,
}

/// When a topic that is held is asked about.
struct Probe {
    at: Instant,
    pause: Duration,
    is_on_its_way: bool,
}

/// The rows of one key that are sent one after another.
struct Lane {
    rows: VecDeque<Taken>,
    /// It was on its way when something was refused, or was refused before.
    is_suspect: bool,
}

/// What became of one record.
enum Sent {
    Delivered,
    /// It can never go out as it is, and why.
    Refused(String),
    /// Nothing of its topic is taken, and why.
    TopicRefused(String, String),
    /// No broker could be asked.
    Away(String),
    /// Its time has not come.
    Early(Timestamp),
}

impl Aside {
    pub(super) fn start(store: Store, shared: Arc<Shared>, tools: Tools) -> Self {
        let (rest, told_to_rest) = watch::channel(false);
        let state = Arc::new(State::default());
        let mut sender = Sender {
            gauges: tools.metrics.parked.clone(),
            store,
            shared,
            encoder: tools.encoder,
            messages: Messages::new(tools.outbox),
            kafka: tools.kafka,
            owes_letters: true,
            settings: tools.settings,
            metrics: tools.metrics,
            publisher: None,
            used_at: Instant::now(),
            refreshed_at: None,
            probes: HashMap::new(),
            probing: JoinSet::new(),
            reports: Vec::new(),
            rest: told_to_rest,
            state: Arc::clone(&state),
        };
        let mut task = JoinSet::new();
        task.spawn(async move {
            loop {
                if let Err(error) = sender.step().await {
                    return error;
                }
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
            Some(ended) = self.task.join_next() => Err(match ended {
                Ok(error) => error,
                Err(error) => {
                    Error::new(ErrorKind::Unexpected, "a task ended").caused_by(error)
                }
            }),
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
        let is_away = match self.look().await? {
            Some(is_away) => is_away,
            None => self.write_letters().await?,
        };
        self.look_after_keys().await?;
        self.wait(is_away).await
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
        let (outcome, is_away) = self.send(rows).await?;
        self.store.settle(&outcome).await?;
        self.shared.change(|holds| {
            for (topic, why) in outcome.topics {
                holds.hold_topic(topic, why);
            }
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

    /// Waits until something may be due.
    async fn wait(&mut self, is_away: bool) -> Result<()> {
        let pause = match self.store.next_due().await? {
            _ if is_away => AWAY_PAUSE,
            Some(due) => due.min(LOOK_MAX),
            None => LOOK_MAX,
        };
        if self.publisher.is_some() && self.used_at.elapsed() > IDLE_MAX {
            self.publisher = None;
        }
        let waited = async {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.shared.wake.notified(), if !is_away => {}
                _ = self.rest.wait_for(|rests| *rests) => {}
                Some(probed) = self.probing.join_next() => return Some(probed),
                error = self.store.ended() => {
                    debug!("{}", error.chain());
                }
            }
            None
        };
        if let Some(probed) = waited.await {
            let (topic, result) = probed.map_err(|error| {
                Error::new(ErrorKind::Unexpected, "a task ended").caused_by(error)
            })?;
            self.probed(topic, result).await?;
        }
        Ok(())
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
        let held = self.store.held().await?;
        let count = self.store.count().await?;
        self.gauges.set(&count);
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

    /// Asks about topics that are held, each in its time.
    fn probe(&mut self) -> Result<()> {
        let held: Vec<String> = self
            .shared
            .with(|holds| holds.topics().keys().cloned().collect());
        self.probes.retain(|topic, _| held.contains(topic));
        let now = Instant::now();
        for topic in held {
            let probe = self.probes.entry(topic.clone()).or_insert(Probe {
                at: now + PROBE_MIN,
                pause: PROBE_MIN,
                is_on_its_way: false,
            });
            if probe.is_on_its_way || probe.at > now {
                continue;
            }
            probe.is_on_its_way = true;
            let publisher = publisher(&mut self.publisher, &self.kafka)?;
            self.used_at = now;
            let resolved = publisher.resolve(&topic, Duration::ZERO);
            self.probing.spawn(async move { (topic, resolved.await) });
        }
        Ok(())
    }

    async fn probed(&mut self, topic: String, result: Result<Topic>) -> Result<()> {
        let Some(probe) = self.probes.get_mut(&topic) else {
            return Ok(());
        };
        probe.is_on_its_way = false;
        // Also if it is known: a topic may be ours to see and not to write.
        probe.pause = (probe.pause * 2).min(PROBE_MAX);
        probe.at = Instant::now() + probe.pause;
        match result {
            Ok(found) => {
                info!(
                    topic,
                    "the brokers know this topic by now: its events are sent"
                );
                publisher(&mut self.publisher, &self.kafka)?.admit(&found);
                self.store.free_topic(&topic).await?;
                self.shared.change(|holds| holds.free_topic(&topic));
            }
            Err(error) => debug!("{}", error.chain()),
        }
        Ok(())
    }

    /// Sends rows, and says what became of each, and whether no broker could be asked.
    async fn send(&mut self, rows: Vec<Taken>) -> Result<(Outcome, bool)> {
        let mut outcome = Outcome::default();
        let mut lanes = self.lanes(rows, &mut outcome);
        let mut away = self.resolve(&mut lanes, &mut outcome).await?;
        if away.is_none() {
            away = self.send_many(&mut lanes, &mut outcome).await?;
        }
        if away.is_none() {
            away = self.send_alone(&mut lanes, &mut outcome).await?;
        }
        for taken in lanes.into_iter().flat_map(|lane| lane.rows) {
            if taken.status == Status::Waiting {
                outcome.untried.push(taken.id);
            }
        }
        if let Some(why) = &away {
            debug!(why, "parked events wait for the brokers");
        }
        Ok((outcome, away.is_some()))
    }

    /// The rows by their keys, each in its order, without those that cannot be sent now.
    fn lanes(&mut self, rows: Vec<Taken>, outcome: &mut Outcome) -> Vec<Lane> {
        let mut lanes: Vec<Lane> = Vec::new();
        let mut numbers: HashMap<(String, String), usize> = HashMap::new();
        let mut stopped: HashSet<(String, String)> = HashSet::new();
        for mut taken in rows {
            if taken.is_cancelled {
                self.metrics.parked.cancelled.inc();
                info!(id = taken.id, "cancelled: it is not sent");
                outcome.gone.push(taken.id);
                continue;
            }
            let address = match record_of(&mut self.messages, &mut self.encoder, &taken) {
                Ok(record) => Ok((record.topic.to_owned(), record.key.map(str::to_owned))),
                Err(sent) => Err(sent),
            };
            let name = match &address {
                Ok((topic, key)) => Some(topic.clone()).zip(key.clone()),
                Err(_) => taken.topic.clone().zip(taken.key.clone()),
            };
            // Behind one of its key that is not sent now.
            if name.as_ref().is_some_and(|name| stopped.contains(name)) {
                outcome.untried.push(taken.id);
                continue;
            }
            let topic = match address {
                Ok((topic, key)) => {
                    (taken.topic, taken.key) = (Some(topic.clone()), key);
                    topic
                }
                Err(sent) => {
                    stopped.extend(name);
                    self.settle(taken, sent, outcome);
                    continue;
                }
            };
            let held =
                |name: &(String, String)| self.shared.with(|holds| holds.has_key(&name.0, &name.1));
            let why = self
                .shared
                .with(|holds| holds.topics().get(&topic).cloned());
            if taken.status == Status::Scheduled
                && (why.is_some() || name.as_ref().is_some_and(held))
            {
                outcome.joining.push((taken.id, taken.topic, taken.key));
                outcome.topics.extend(why.map(|why| (topic, why)));
                continue;
            }
            if let Some(why) = why {
                outcome.topics.push((topic, why));
                outcome.untried.push(taken.id);
                continue;
            }
            let is_suspect = taken.attempts > 0;
            let number = name.map(|name| *numbers.entry(name).or_insert(lanes.len()));
            match number.filter(|number| *number < lanes.len()) {
                Some(number) => lanes[number].rows.push_back(taken),
                None => lanes.push(Lane {
                    rows: VecDeque::from([taken]),
                    is_suspect,
                }),
            }
        }
        lanes
    }

    /// Asks about topics that are not known yet. Says why no broker could be asked, if so.
    async fn resolve(
        &mut self,
        lanes: &mut Vec<Lane>,
        outcome: &mut Outcome,
    ) -> Result<Option<String>> {
        let publisher = publisher(&mut self.publisher, &self.kafka)?;
        self.used_at = Instant::now();
        let topics = lanes
            .iter()
            .filter_map(|lane| lane.rows.front()?.topic.clone());
        let unknown: HashSet<String> = topics.filter(|topic| !publisher.knows(topic)).collect();
        let mut resolving = JoinSet::new();
        for topic in unknown {
            let resolved = publisher.resolve(&topic, UNKNOWN_MAX);
            resolving.spawn(async move { (topic, resolved.await) });
        }
        let mut refused = HashMap::new();
        while let Some(resolved) = resolving.join_next().await {
            let (name, result) = resolved.map_err(|error| {
                Error::new(ErrorKind::Unexpected, "a task ended").caused_by(error)
            })?;
            match result {
                Ok(topic) if publisher.fits(&topic) => {
                    publisher.admit(&topic);
                }
                Ok(topic) => {
                    // Nothing is on its way.
                    publisher.shrink(&topic)?;
                    publisher.admit(&topic);
                }
                Err(error) if error.kind() == ErrorKind::Event => {
                    refused.insert(name, error.chain());
                }
                Err(error) if error.kind().is_transient() => return Ok(Some(error.chain())),
                Err(error) => return Err(error),
            }
        }
        let (stay, go) = std::mem::take(lanes).into_iter().partition(|lane: &Lane| {
            let topic = lane.rows.front().and_then(|row| row.topic.as_ref());
            topic.is_none_or(|topic| !refused.contains_key(topic))
        });
        *lanes = stay;
        for taken in Vec::from_iter(go)
            .into_iter()
            .flat_map(|lane: Lane| lane.rows)
        {
            let topic = taken.topic.clone().unwrap_or_default();
            let why = refused.get(&topic).cloned().unwrap_or_default();
            self.settle(taken, Sent::TopicRefused(topic, why), outcome);
        }
        Ok(None)
    }

    /// Sends what was never refused, of each key one after another. What was on its way when
    /// one was refused is suspect.
    async fn send_many(
        &mut self,
        lanes: &mut [Lane],
        outcome: &mut Outcome,
    ) -> Result<Option<String>> {
        let mut on_their_way: HashMap<u64, usize> = HashMap::new();
        let mut sequence = 0;
        let mut has_failed = false;
        let mut ready: Vec<usize> = (0..lanes.len())
            .filter(|number| !lanes[*number].is_suspect)
            .collect();
        loop {
            for number in std::mem::take(&mut ready) {
                let Some(taken) = lanes[number].rows.front() else {
                    continue;
                };
                if has_failed || taken.attempts > 0 {
                    lanes[number].is_suspect |= taken.attempts > 0;
                    continue;
                }
                match self.hand_over(taken, sequence) {
                    Ok(()) => {
                        on_their_way.insert(sequence, number);
                        sequence += 1;
                    }
                    Err(Sent::Away(_)) => has_failed = true,
                    Err(sent) => {
                        let taken = lanes[number].rows.pop_front();
                        self.close(&mut lanes[number], outcome);
                        if let Some(taken) = taken {
                            self.settle(taken, sent, outcome);
                        }
                    }
                }
            }
            if on_their_way.is_empty() {
                break;
            }
            if self.await_reports().await?.is_none() {
                let lost = on_their_way.len();
                self.publisher = None;
                return Ok(Some(format!("{lost} deliveries are not acknowledged")));
            }
            for report in std::mem::take(&mut self.reports) {
                let Some(number) = on_their_way.remove(&report.sequence) else {
                    continue;
                };
                let lane = &mut lanes[number];
                if report.error.is_some() {
                    lane.is_suspect = true;
                    if !std::mem::replace(&mut has_failed, true)
                        && let Some(publisher) = &self.publisher
                    {
                        publisher.purge();
                    }
                } else if let Some(taken) = lane.rows.pop_front() {
                    self.settle(taken, Sent::Delivered, outcome);
                    ready.push(number);
                }
            }
        }
        if has_failed {
            self.renew()?;
        }
        Ok(None)
    }

    /// Sends the first of each suspect key, with nothing else on its way.
    async fn send_alone(
        &mut self,
        lanes: &mut [Lane],
        outcome: &mut Outcome,
    ) -> Result<Option<String>> {
        for lane in lanes.iter_mut().filter(|lane| lane.is_suspect) {
            let Some(taken) = lane.rows.front() else {
                continue;
            };
            let sent = match self.hand_over(taken, 0) {
                Ok(()) => self.await_one(taken).await?,
                Err(sent) => sent,
            };
            if let Sent::Away(why) = sent {
                self.publisher = None;
                return Ok(Some(why));
            }
            let is_delivered = matches!(sent, Sent::Delivered);
            if let Some(taken) = lane.rows.pop_front() {
                self.settle(taken, sent, outcome);
            }
            // Those behind it have their turn with the next look, if it is theirs.
            self.close(lane, outcome);
            if !is_delivered {
                self.renew()?;
            }
        }
        Ok(None)
    }

    /// What is left of a lane is not tried.
    fn close(&self, lane: &mut Lane, outcome: &mut Outcome) {
        let waiting = lane.rows.drain(..);
        let waiting = waiting.filter(|taken| taken.status == Status::Waiting);
        outcome.untried.extend(waiting.map(|taken| taken.id));
    }

    /// A producer that was refused a record sends no more.
    fn renew(&mut self) -> Result<()> {
        if let Some(publisher) = &mut self.publisher {
            publisher.renew()?;
        }
        Ok(())
    }

    fn hand_over(&mut self, taken: &Taken, sequence: u64) -> Result<(), Sent> {
        let away = |error: Error| Sent::Away(error.chain());
        let publisher = publisher(&mut self.publisher, &self.kafka).map_err(away)?;
        let record = record_of(&mut self.messages, &mut self.encoder, taken)?;
        hand_over(publisher, &record, sequence)
    }

    /// Waits for reports. `None` if none came for long.
    async fn await_reports(&mut self) -> Result<Option<()>> {
        let publisher = publisher(&mut self.publisher, &self.kafka)?;
        publisher.push();
        let deadline = Instant::now() + REPORT_MAX;
        while self.reports.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if timeout(left, publisher.reported()).await.is_err() {
                return Ok(None);
            }
            publisher.take_reports(&mut self.reports)?;
        }
        Ok(Some(()))
    }

    /// Waits for the report of a record that was sent alone.
    async fn await_one(&mut self, taken: &Taken) -> Result<Sent> {
        if self.await_reports().await?.is_none() {
            return Ok(Sent::Away("a delivery is not acknowledged".to_owned()));
        }
        let report = self.reports.drain(..).next_back();
        let Some(code) = report.and_then(|report| report.error) else {
            return Ok(Sent::Delivered);
        };
        let failures = &self.metrics.failures;
        failures.with_label_values(&[&format!("{code:?}")]).inc();
        let publisher = publisher(&mut self.publisher, &self.kafka)?;
        let record = match record_of(&mut self.messages, &mut self.encoder, taken) {
            Ok(record) => record,
            Err(sent) => return Ok(sent),
        };
        let size = record.size();
        let Some(destination) = publisher.destination(&record) else {
            return Ok(Sent::Away("its topic is not known".to_owned()));
        };
        let why = publisher.refusal(destination.topic, size, code, true);
        Ok(match verdict(code) {
            Verdict::Row => Sent::Refused(why),
            Verdict::Topic => Sent::TopicRefused(record.topic.to_owned(), why),
            _ => Sent::Away(why),
        })
    }

    /// Says what is to be stored of a row.
    fn settle(&mut self, taken: Taken, sent: Sent, outcome: &mut Outcome) {
        let name = taken.topic.clone().zip(taken.key.clone());
        match sent {
            Sent::Delivered => {
                if let Some(topic) = &taken.topic {
                    let topic = self.metrics.topic(topic);
                    topic.events.inc();
                    topic.bytes.inc_by(taken.row.bytes.len() as u64);
                }
                self.metrics.parked.sent.inc();
                if taken.status == Status::Waiting {
                    info!(
                        id = taken.id,
                        attempts = taken.attempts,
                        "a parked event was sent"
                    );
                    outcome.keys.extend(name);
                }
                outcome.gone.push(taken.id);
            }
            Sent::Refused(why) => {
                let attempts = taken.attempts + 1;
                let is_dead = attempts >= self.settings.attempts_max;
                let owes_letter = is_dead && self.settings.dead_letter_topic.is_some();
                let backoff = self.settings.backoff(attempts);
                let id = &taken.id;
                if is_dead {
                    error!(
                        "event {id} is a dead letter after {attempts} attempts, and its key goes on; \
                         `postbox parked show {id}` shows it: {why}"
                    );
                    self.metrics.parked.dead_letters.inc();
                    self.owes_letters |= owes_letter;
                    outcome.keys.extend(name);
                } else {
                    let seconds = backoff.as_secs_f32();
                    warn!("event {id} was refused again, and is tried in {seconds:.0} s: {why}");
                }
                if taken.status == Status::Scheduled {
                    let (topic, key) = (taken.topic.clone(), taken.key.clone());
                    outcome.joining.push((taken.id.clone(), topic, key));
                }
                outcome.refused.push(Refused {
                    id: taken.id,
                    topic: taken.topic,
                    key: taken.key,
                    why,
                    backoff,
                    is_dead,
                    owes_letter,
                });
            }
            Sent::TopicRefused(topic, why) => {
                if !outcome.topics.iter().any(|(held, _)| *held == topic) {
                    warn!(
                        topic,
                        "no event of this topic is sent until the brokers take them: {why}"
                    );
                    outcome.topics.push((topic.clone(), why.clone()));
                    self.shared.change(|holds| holds.hold_topic(topic, why));
                }
                match taken.status {
                    Status::Scheduled => outcome.joining.push((taken.id, taken.topic, taken.key)),
                    _ => outcome.untried.push(taken.id),
                }
            }
            Sent::Early(time) => {
                outcome.early.push((taken.id, time));
                outcome.keys.extend(name);
            }
            Sent::Away(_) if taken.status == Status::Waiting => outcome.untried.push(taken.id),
            Sent::Away(_) => {}
        }
    }

    /// Sends copies of dead letters to their topic. Says whether no broker could be asked.
    async fn write_letters(&mut self) -> Result<bool> {
        let Some(topic) = self.settings.dead_letter_topic.clone() else {
            return Ok(false);
        };
        if !std::mem::take(&mut self.owes_letters) {
            return Ok(false);
        }
        let letters = self.store.letters().await?;
        if letters.is_empty() {
            return Ok(false);
        }
        // There may be more.
        self.owes_letters = true;
        let publisher = publisher(&mut self.publisher, &self.kafka)?;
        self.used_at = Instant::now();
        if !publisher.knows(&topic) {
            match publisher.resolve(&topic, UNKNOWN_MAX).await {
                Ok(found) => {
                    publisher.admit(&found);
                }
                Err(error) if error.kind() == ErrorKind::Event || error.kind().is_transient() => {
                    warn!(
                        "dead letters wait, in the table, for their topic: {}",
                        error.chain()
                    );
                    return Ok(true);
                }
                Err(error) => return Err(error),
            }
        }
        let mut sent = Vec::new();
        for taken in letters {
            match self.write_letter(&taken, &topic).await? {
                Sent::Delivered => {}
                Sent::Away(why) | Sent::TopicRefused(_, why) => {
                    warn!("dead letters wait, in the table, for their topic: {why}");
                    self.store.sent_letters(&sent).await?;
                    self.renew()?;
                    return Ok(true);
                }
                Sent::Refused(why) => {
                    error!(
                        "the copy of dead letter {} cannot go out either, it is kept in the table alone: {why}",
                        taken.id
                    );
                    self.renew()?;
                }
                Sent::Early(_) => {}
            }
            sent.push(taken.id);
        }
        self.store.sent_letters(&sent).await?;
        Ok(false)
    }

    async fn write_letter(&mut self, taken: &Taken, topic: &str) -> Result<Sent> {
        let relay = self.store.relay().to_owned();
        let origin = taken.topic.clone();
        let made = record_of(&mut self.messages, &mut self.encoder, taken).ok();
        let (value, mut headers) = match &made {
            Some(record) => (record.value.map(<[u8]>::to_vec), record.headers.clone()),
            // What is no event has no record: then the row, as it was read.
            None => (Some(row_as_json(taken)), Vec::new()),
        };
        let mut head = |name: &'static str, value: Option<String>| {
            headers.push(Header {
                name: Cow::from(name),
                value: value.map(Cow::from),
            });
        };
        head("postbox_error", taken.error.clone());
        head("postbox_topic", origin);
        head("postbox_event", Some(taken.id.clone()));
        head("postbox_attempts", Some(taken.attempts.to_string()));
        head("postbox_relay", Some(relay));
        let key = taken.key.clone();
        let record = Record {
            topic,
            key: key.as_deref(),
            value: value.as_deref(),
            headers,
            timestamp_millis: None,
        };
        let publisher = publisher(&mut self.publisher, &self.kafka)?;
        if let Err(sent) = hand_over(publisher, &record, 0) {
            return Ok(sent);
        }
        if self.await_reports().await?.is_none() {
            return Ok(Sent::Away("a delivery is not acknowledged".to_owned()));
        }
        let report = self.reports.drain(..).next_back();
        let Some(code) = report.and_then(|report| report.error) else {
            return Ok(Sent::Delivered);
        };
        let why = crate::publisher::codes::explain(code);
        Ok(match verdict(code) {
            Verdict::Row => Sent::Refused(why),
            Verdict::Topic => Sent::TopicRefused(topic.to_owned(), why),
            _ => Sent::Away(why),
        })
    }
}

/// The producer, made where there is none.
fn publisher<'p>(
    publisher: &'p mut Option<Publisher>,
    kafka: &KafkaSettings,
) -> Result<&'p mut Publisher> {
    if publisher.is_none() {
        *publisher = Some(Publisher::new(kafka.clone(), BATCH_BYTES)?);
    }
    publisher
        .as_mut()
        .ok_or_else(|| Error::new(ErrorKind::Unexpected, "there is no producer"))
}

/// The record of a row, unless it has none, or not yet.
fn record_of<'a>(
    messages: &'a mut Messages,
    encoder: &'a mut Encoder,
    taken: &'a Taken,
) -> Result<Record<'a>, Sent> {
    let refused = |why: String| Sent::Refused(why);
    messages
        .take_up(&taken.row, &taken.columns)
        .map_err(|why| refused(why.to_string()))?;
    let event = messages
        .event(&taken.row)
        .map_err(|why| refused(why.to_string()))?;
    if taken.status == Status::Waiting
        && let Some(time) = event.scheduled_at
        && time > Timestamp::from(SystemTime::now())
    {
        return Err(Sent::Early(time));
    }
    encoder
        .encode(&event)
        .map_err(|why| refused(why.to_string()))
}

fn hand_over(publisher: &Publisher, record: &Record<'_>, sequence: u64) -> Result<(), Sent> {
    let Some(destination) = publisher.destination(record) else {
        return Err(Sent::Away("its topic is not known".to_owned()));
    };
    if let Fit::Never(why) = publisher.check(record, destination) {
        return Err(Sent::Refused(why));
    }
    match publisher.send(record, destination.partition, sequence) {
        Ok(()) => Ok(()),
        Err(SendError::Row(code)) => {
            let why = publisher.refusal(destination.topic, record.size(), code, false);
            Err(Sent::Refused(why))
        }
        Err(SendError::Producer(error)) => Err(Sent::Away(error.chain())),
    }
}

/// A row as it was read: an object of its columns, as text.
fn row_as_json(taken: &Taken) -> Vec<u8> {
    let mut object = serde_json::Map::new();
    if let Ok(Message::Insert(insert)) = pgoutput::decode(&taken.row.bytes) {
        for (column, value) in taken.columns.iter().zip(insert.row.values()) {
            let value = match value {
                Value::Text(text) | Value::Binary(text) => {
                    String::from_utf8_lossy(text).into_owned().into()
                }
                Value::Null | Value::Unchanged => serde_json::Value::Null,
            };
            object.insert(column.name.clone(), value);
        }
    }
    serde_json::Value::from(object).to_string().into_bytes()
}
