//! One membership in the group: from joining it to whatever ends that.
//!
//! All that can break ends the attempt: the session's transaction is rolled back, the group is
//! left, and the next attempt begins where Postgres says. A partition that was not given back
//! in order is handled with care by whoever takes it next: what may have been at work then
//! goes to the table first, and is tried from there one by one, with its attempts counted
//! before it begins. So a message that ends the process is found, and given up like any other.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{debug, info};

use super::batch::{self, Batch, Broken, Done, Entry, Lane, Work};
use super::consumer::{Assigned, Change, Consumed, Consumer, Place};
use super::handler::Working;
use super::lane;
use super::message::Message;
use super::position::{Last, OnReset};
use super::retries::{self, Ours};
use super::store::{Advance, Source, Store, is_another, reset};
use super::{Inbox, InboxSettings, told_to_stop};
use crate::catalog::{check_version, schema_version};
use crate::database::{Session, sort};
use crate::error::{Error, ErrorKind, Result, joined};
use crate::health::Server;

/// A consumer at work.
pub(super) struct Attempt<'i> {
    inbox: &'i mut Inbox,
    session: Session,
    work: Arc<Work>,
    consumer: Consumer,
    held: HashMap<Place, Held>,
    /// Lanes of which a message waits in the table: those that follow go there, too.
    blocked: HashSet<Lane>,
    /// For those who try again what waits: which partitions are ours.
    ours: watch::Sender<Vec<Ours>>,
    /// Lanes of which a message was dealt with.
    settled: mpsc::UnboundedReceiver<Lane>,
    retries: JoinHandle<Result<()>>,
    /// Whether a batch was begun and is not committed.
    is_at_work: bool,
    /// How many messages wait in the table, at most.
    waiting: usize,
}

/// A partition that is ours.
struct Held {
    assigned: Assigned,
    source: Source,
    epoch: i64,
    next_offset: i64,
    /// What the record before must be.
    witness: Option<Last>,
    /// How many messages more are handled with care.
    suspects: usize,
}

/// How often lanes that wait are looked at, whether or not it is said that something has changed:
/// people decide about messages, too.
const LANES_INTERVAL: Duration = Duration::from_secs(5);

/// How often the brokers' and the server's signs of life are looked at.
const PULSE_INTERVAL: Duration = Duration::from_secs(2);

/// How long it may take to give partitions back when something else has failed.
const RELEASE_MAX: Duration = Duration::from_secs(1);

impl<'i> Attempt<'i> {
    /// Runs until it is told to stop, and then gives everything back.
    pub(super) async fn run(
        inbox: &'i mut Inbox,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<()> {
        let settings = &inbox.settings;
        let session = settings.session("postbox inbox").await?;
        let version = schema_version(&session.client, &settings.contract).await?;
        check_version(&settings.contract, version.unwrap_or(0))?;
        let handler = settings
            .handlers
            .prepare(&session.client, &settings.contract, &settings.group)
            .await?;
        let work = Arc::new(Work {
            store: Store::new(settings, inbox.owner.clone()),
            handler,
            handler_timeout: settings.handler_timeout,
            attempts: settings.ack.attempts(settings.attempts.clone()),
            ack: settings.ack,
            batch_max: settings.batch_max,
            batch_bytes_max: settings.batch_bytes_max,
            metrics: inbox.metrics.clone(),
            promoted: Notify::new(),
        });
        let (ours, watched) = watch::channel(Vec::new());
        let (tell, settled) = mpsc::unbounded_channel();
        let retries = retries::spawn(settings, work.clone(), watched, tell).await?;
        let consumer = Consumer::start(settings.consumer()?)?;
        inbox.health.streaming();
        inbox.health.brokers(Ok(()));
        let mut attempt = Self {
            inbox,
            session,
            work,
            consumer,
            held: HashMap::new(),
            blocked: HashSet::new(),
            ours,
            settled,
            retries,
            is_at_work: false,
            waiting: 0,
        };
        let ended = attempt.serve(shutdown).await;
        attempt.end(ended).await
    }

    async fn serve(&mut self, shutdown: &mut watch::Receiver<bool>) -> Result<()> {
        let patience = self.inbox.settings.shutdown_timeout;
        let stopping = shutdown.clone();
        let mut lanes_tick = interval(LANES_INTERVAL);
        lanes_tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pulse = interval(PULSE_INTERVAL);
        pulse.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // All of them can be left and come back to: what they give is taken at once.
            tokio::select! {
                biased;
                () = told_to_stop(shutdown) => return Ok(()),
                change = self.consumer.changes.recv() => match change {
                    Some(change) => in_time(stopping.clone(), patience, self.change(change)).await?,
                    None => return Err(ended_early()),
                },
                error = self.session.ended() => return Err(error),
                ended = &mut self.retries => return Err(joined(ended).err().unwrap_or_else(ended_early)),
                Some(lane) = self.settled.recv() => {
                    let mut lanes = vec![lane];
                    while let Ok(lane) = self.settled.try_recv() {
                        lanes.push(lane);
                    }
                    self.free(lanes).await?;
                }
                // Before batches, of which there may always be another.
                _ = lanes_tick.tick() => self.free(self.blocked.iter().copied().collect()).await?,
                _ = pulse.tick() => self.feel_pulse().await?,
                batch = self.consumer.batches.recv(), if self.may_go_on() => match batch {
                    Some(batch) => {
                        self.is_at_work = true;
                        in_time(stopping.clone(), patience, self.handle(&batch.messages)).await?;
                        self.is_at_work = false;
                    }
                    // The change that says why comes next.
                    None => tokio::task::yield_now().await,
                },
            }
        }
    }

    /// Gives everything back, if what happened lets it.
    async fn end(self, ended: Result<()>) -> Result<()> {
        let places: Vec<(Place, i64)> = self
            .held
            .iter()
            .map(|(place, held)| (place.clone(), held.epoch))
            .collect();
        let (store, client) = (&self.work.store, &self.session.client);
        let stopped = match ended {
            Ok(()) => {
                // What is being tried again is finished first.
                self.ours.send_replace(Vec::new());
                drop(self.ours);
                let patience = self.inbox.settings.shutdown_timeout;
                match tokio::time::timeout(patience, self.retries).await {
                    Ok(done) => match joined(done) {
                        Ok(()) => store.release(client, &places).await,
                        Err(error) => Err(error),
                    },
                    Err(_) => Err(still_at_work()),
                }
            }
            Err(error) => {
                self.retries.abort();
                // Whoever takes them next need not suspect what was never begun.
                if !self.is_at_work {
                    let released = store.release(client, &places);
                    let _ = tokio::time::timeout(RELEASE_MAX, released).await;
                }
                Err(error)
            }
        };
        self.consumer.leave().await;
        stopped
    }

    async fn change(&mut self, change: Change) -> Result<()> {
        match change {
            Change::Assigned(assigned, cluster_id, answer) => {
                self.assign(assigned, cluster_id.as_deref(), answer).await
            }
            Change::Revoked(places, answer) => {
                let released = self.revoke(&places).await;
                // The thread may have ended, and says so itself.
                let _ = answer.send(());
                released
            }
            Change::Failed(error) => Err(error),
        }
    }

    async fn assign(
        &mut self,
        assigned: Vec<Assigned>,
        cluster_id: Option<&str>,
        answer: oneshot::Sender<Vec<i64>>,
    ) -> Result<()> {
        let InboxSettings {
            from,
            on_reset,
            batch_max,
            ..
        } = self.inbox.settings;
        failpoint!("inbox_assigned");
        let claims = self.work.store.claim(
            &mut self.session.client,
            &assigned,
            cluster_id,
            from,
            on_reset,
        );
        let claimed = claims.await?;
        failpoint!("inbox_claimed");
        let starts = claimed
            .iter()
            .map(|claimed| claimed.start.offset())
            .collect();
        let places: Vec<Place> = assigned.iter().map(|one| one.place.clone()).collect();
        let (store, client) = (&self.work.store, &self.session.client);
        let is_for_application = matches!(self.work.handler, Working::Application);
        store.adopt(client, &places, is_for_application).await?;
        let lanes = store.lanes(client, &places).await?;
        self.blocked.extend(lanes.iter().copied());
        for (assigned, claimed) in assigned.into_iter().zip(claimed) {
            info!(
                topic = &*assigned.place.topic,
                partition = assigned.place.partition,
                offset = claimed.start.next_offset,
                "reading on"
            );
            let held = Held {
                source: claimed.source,
                epoch: claimed.epoch,
                next_offset: claimed.start.next_offset,
                witness: claimed.start.witness,
                suspects: if claimed.was_held && self.work.ack.reads_again() {
                    batch_max
                } else {
                    0
                },
                assigned,
            };
            self.held.insert(held.assigned.place.clone(), held);
        }
        self.tell_ours();
        self.count_waiting().await?;
        self.free(lanes.into_iter().collect()).await?;
        // Nobody waits for it if the thread has ended, which it says itself.
        let _ = answer.send(starts);
        Ok(())
    }

    async fn revoke(&mut self, places: &[Place]) -> Result<()> {
        let mut released = Vec::new();
        for place in places {
            if let Some(held) = self.held.remove(place) {
                // Another tells it from now on. One that was never told is none to forget.
                let labels = [&*place.topic, &*place.partition.to_string()];
                let _ = self.inbox.metrics.lag.remove_label_values(&labels);
                let source = held.source.messages;
                self.blocked
                    .retain(|lane| (lane.source, lane.partition) != (source, place.partition));
                info!(
                    topic = &*place.topic,
                    partition = place.partition,
                    "given up"
                );
                released.push((place.clone(), held.epoch));
            }
        }
        self.tell_ours();
        self.work
            .store
            .release(&self.session.client, &released)
            .await
    }

    fn tell_ours(&self) {
        let ours = self.held.iter().map(|(place, held)| Ours {
            place: place.clone(),
            source: held.source.messages,
            epoch: held.epoch,
        });
        self.ours.send_replace(ours.collect());
    }

    /// Deals with what was read.
    async fn handle(&mut self, consumed: &[Consumed]) -> Result<()> {
        let order = self.inbox.settings.order;
        let ack = self.work.ack;
        let mut messages = Vec::with_capacity(consumed.len());
        for Consumed {
            message,
            assignment,
        } in consumed
        {
            let place = Place::of(message);
            // What was read under another assignment is read again under this, if it is to be.
            let Some(held) = self.held.get_mut(&place) else {
                continue;
            };
            if held.assigned.assignment != *assignment {
                continue;
            }
            let is_before = message.offset < held.next_offset;
            if let Some(witness) = held.witness.take()
                && message.offset == held.next_offset - 1
            {
                let timestamp = message.produced_at.map(|at| at.unix_millis());
                if witness.id != message.id.text || witness.timestamp != timestamp {
                    return self.reset(&place, &witness, message).await;
                }
            }
            if is_before {
                continue;
            }
            held.next_offset = message.offset + 1;
            let is_suspect = held.suspects > 0 || ack.stores_first();
            held.suspects = held.suspects.saturating_sub(1);
            messages.push(Entry {
                message,
                id: message.id.uuid(),
                dedup: held.source.dedup,
                lane: Lane {
                    source: held.source.messages,
                    partition: message.partition,
                    number: lane::number(order, message),
                },
                attempt: 1,
                is_suspect,
            });
        }
        for messages in messages.chunks(self.work.together(messages.len())) {
            self.handle_together(messages).await?;
        }
        Ok(())
    }

    /// Deals with what has a transaction together.
    async fn handle_together(&mut self, messages: &[Entry<'_>]) -> Result<()> {
        // In one order, as their rows are locked.
        let mut last: BTreeMap<Place, &Message> = BTreeMap::new();
        for Entry { message, .. } in messages {
            last.insert(Place::of(message), message);
        }
        let advances = last.iter().map(|(place, last)| Advance {
            place,
            epoch: self.held[place].epoch,
            last,
        });
        let batch = Batch {
            advances: advances.collect(),
            messages,
        };
        let waits_for = format!("{} messages are being handled", messages.len());
        self.inbox.health.waiting(Some(waits_for));
        let began = Instant::now();
        let done = self.run_batch(&batch).await?;
        self.inbox.health.moved();
        self.inbox.health.heard(Server::Postgres);
        self.inbox.health.heard(Server::Kafka);
        let offsets = (last.iter()).map(|(place, last)| (place.clone(), last.offset + 1));
        self.consumer.handled(offsets);
        self.blocked.extend(done.blocked.iter().copied());
        self.waiting += done.blocked.len();
        if self.is_full() {
            self.count_waiting().await?;
        }
        self.tell_what_is_waited_for();
        let metrics = &self.inbox.metrics;
        metrics
            .transaction_seconds
            .observe(began.elapsed().as_secs_f64());
        metrics.batch_messages.observe(messages.len() as f64);
        for entry in messages {
            let topic = &*entry.message.topic;
            metrics.consumed.with_label_values(&[topic]).inc();
        }
        for (topic, count) in &done.duplicates {
            metrics
                .duplicates
                .with_label_values(&[*topic])
                .inc_by(*count);
        }
        for ((outcome, event_type), count) in &done.handled {
            let labels = [*outcome, *event_type];
            metrics.handled.with_label_values(&labels).inc_by(*count);
        }
        debug!(messages = messages.len(), "batch");
        self.inbox.worked = true;
        Ok(())
    }

    async fn run_batch<'a>(&mut self, batch: &Batch<'a>) -> Result<Done<'a>> {
        let client = &mut self.session.client;
        match batch::run(client, &self.work, &self.blocked, batch).await {
            Ok(done) => Ok(done),
            Err(Broken::Fenced) => {
                let message = "a partition was taken by another consumer: joining the group again";
                Err(Error::new(ErrorKind::BrokerAway, message))
            }
            Err(Broken::Postgres(error)) => Err(sort("handle a batch", error)),
        }
    }

    /// The last record is not the one that it was.
    async fn reset(&mut self, place: &Place, was: &Last, is: &Message) -> Result<()> {
        let why = format!(
            "the record at offset {} was \"{}\" and is \"{}\": the topic was made anew",
            is.offset,
            was.id.escape_debug(),
            is.id.text.escape_debug()
        );
        let held = &self.held[place];
        let on_reset = self.inbox.settings.on_reset;
        if on_reset == OnReset::Stop {
            return Err(is_another(place, &why));
        }
        let start = reset(&held.assigned, &why, on_reset)?;
        let store = &self.work.store;
        store
            .go_to(&self.session.client, place, held.epoch, start.next_offset)
            .await?;
        let message = format!("{place} is read on at offset {}", start.next_offset);
        Err(Error::new(ErrorKind::BrokerAway, message))
    }

    /// Has the next of these lanes tried, and lets go of those of which none waits.
    async fn free(&mut self, lanes: Vec<Lane>) -> Result<()> {
        if lanes.is_empty() {
            return Ok(());
        }
        let store = &self.work.store;
        let waiting = store.promote(&self.session.client, &lanes).await?;
        for lane in lanes.iter().filter(|lane| !waiting.contains(lane)) {
            self.blocked.remove(lane);
        }
        self.work.promoted.notify_one();
        if self.is_full() {
            self.inbox.health.moved();
            self.count_waiting().await?;
        }
        Ok(())
    }

    /// Whether so many messages wait that no more are read.
    fn is_full(&self) -> bool {
        self.waiting >= self.inbox.settings.waiting_max
    }

    /// Counts what waits, as far as it matters.
    async fn count_waiting(&mut self) -> Result<()> {
        let most = self.inbox.settings.waiting_max;
        let (store, client) = (&self.work.store, &self.session.client);
        let ours = self.ours.borrow().clone();
        self.waiting = store.count_waiting(client, &ours, most).await?;
        self.tell_what_is_waited_for();
        Ok(())
    }

    /// Whether what is read next can be dealt with. Partitions are paused if it cannot.
    fn may_go_on(&self) -> bool {
        !self.is_full() && (self.work.ack.stores_first() || self.work.away().is_none())
    }

    fn tell_what_is_waited_for(&self) {
        let full = self.is_full().then(|| {
            format!(
                "{} messages wait in the table, and no more are read: see --waiting-max",
                self.waiting
            )
        });
        let away = self.work.away().map(|(why, _)| why);
        self.inbox.health.waiting(full.or(away));
    }

    async fn feel_pulse(&mut self) -> Result<()> {
        let answered = self.session.client.batch_execute("").await;
        answered.map_err(|error| sort("ask for a sign of life", error))?;
        self.inbox.health.heard(Server::Postgres);
        self.tell_what_is_waited_for();
        if self.consumer.hears_brokers() {
            self.inbox.health.heard(Server::Kafka);
        }
        for (place, end) in self.consumer.ends() {
            if let Some(held) = self.held.get(&place) {
                let labels = [&*place.topic, &*place.partition.to_string()];
                let lag = self.inbox.metrics.lag.with_label_values(&labels);
                lag.set((end - held.next_offset).max(0));
            }
        }
        Ok(())
    }
}

/// Does it, and gives it up if it takes too long once it is time to stop.
async fn in_time(
    mut shutdown: watch::Receiver<bool>,
    patience: Duration,
    work: impl Future<Output = Result<()>>,
) -> Result<()> {
    let late = async {
        // Nobody is left to tell it.
        if shutdown.wait_for(|stops| *stops).await.is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(patience).await;
    };
    tokio::select! {
        biased;
        done = work => done,
        () = late => Err(still_at_work()),
    }
}

fn still_at_work() -> Error {
    Error::new(
        ErrorKind::NotDrained,
        "a handler was still at work when the time to stop was over: what it did is rolled back, and is done again",
    )
}

/// Something ended that has not said why.
fn ended_early() -> Error {
    Error::new(
        ErrorKind::Unexpected,
        "a part of the inbox ended without a word",
    )
}
