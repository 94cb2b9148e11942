//! A batch, from its records to the commit.
//!
//! One transaction moves the offsets, writes which messages were received, and has the handler
//! work: either all of it has happened, or nothing. The offsets come first: their rows are
//! locked then, and whoever has lost a partition learns it before the handler begins.
//!
//! # What fails
//!
//! A message that fails costs itself, and those of its lane. The handler works within a
//! savepoint, on all messages at once; what fails is rolled back and tried in halves, so that
//! one of five hundred costs nine tries more, and not five hundred. One that fails alone goes
//! to the table with its error, and what follows in its lane goes there untried; the rest is
//! committed, and the offsets with it.
//!
//! What takes too long is tried one by one instead: halves would take as long each.
//!
//! Deadlocks and serialization failures are nobody's fault: the whole transaction is run again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::try_join;
use futures_util::{StreamExt, stream};
use tokio::sync::Notify;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Transaction};
use tracing::debug;
use uuid::Uuid;

use super::handler::http::{Answer, Service};
use super::handler::{Again, Failure, Working, kept_open};
use super::message::Message;
use super::store::{Advance, Kept, Status, Store};
use super::strategy::{Ack, CommitOn};
use crate::backoff::doubled;
use crate::metrics::InboxMetrics;

/// How soon a transaction is run again that nobody is to blame for.
const AGAIN_MIN: Duration = Duration::from_millis(10);
const AGAIN_MAX: Duration = Duration::from_secs(1);

/// What the handler has written is kept. What follows is ours, and has no limit.
const KEEP: &str = "RELEASE SAVEPOINT messages; SET LOCAL statement_timeout TO DEFAULT";

/// It is undone. To roll back to a savepoint leaves it there.
const UNDO: &str = "ROLLBACK TO SAVEPOINT messages; RELEASE SAVEPOINT messages; \
     SET LOCAL statement_timeout TO DEFAULT";

/// What all batches have in common.
pub(super) struct Work {
    pub(super) store: Store,
    pub(super) handler: Working,
    pub(super) handler_timeout: Duration,
    pub(super) attempts: Attempts,
    pub(super) ack: Ack,
    /// The most messages, and bytes, of a run.
    pub(super) batch_max: usize,
    pub(super) batch_bytes_max: usize,
    pub(super) metrics: Arc<InboxMetrics>,
    /// Told when a lane can go on.
    pub(super) promoted: Notify,
}

impl Work {
    /// How many messages of a batch have a transaction together.
    pub(super) fn together(&self, batch: usize) -> usize {
        match (self.ack, &self.handler) {
            (Ack::AtLeastOnce(CommitOn::Success), Working::Http(service)) => service.parallel(),
            (Ack::AtLeastOnce(CommitOn::Success), _) => 1,
            _ => batch.max(1),
        }
    }

    /// How many messages are tried together from the table.
    pub(super) fn run_max(&self) -> usize {
        match &self.handler {
            Working::Http(service) => service.parallel(),
            _ => self.batch_max,
        }
    }

    /// Why nothing can be handled now, and for how long.
    pub(super) fn away(&self) -> Option<(String, Duration)> {
        match &self.handler {
            Working::Http(service) => service.away(),
            _ => None,
        }
    }
}

/// What is to be done with a batch, in the order of its records.
pub(super) struct Batch<'a> {
    pub(super) advances: Vec<Advance<'a>>,
    pub(super) messages: &'a [Entry<'a>],
}

/// A message of a batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry<'a> {
    pub(super) message: &'a Message,
    pub(super) id: Uuid,
    /// Where its id counts: a number of `inbox_source`.
    pub(super) dedup: i32,
    pub(super) lane: Lane,
    /// Which attempt this is, counted from one.
    pub(super) attempt: u32,
    /// It goes to the table untried, though nothing of its lane has failed.
    pub(super) is_suspect: bool,
}

/// What waits for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Lane {
    /// As messages have it.
    pub(super) source: i32,
    pub(super) partition: i32,
    pub(super) number: i64,
}

/// What became of a batch.
#[derive(Debug, Clone, Default)]
pub(super) struct Done<'a> {
    /// How many were received before, by topic.
    pub(super) duplicates: HashMap<&'a str, u64>,
    /// How many of the others there are of each outcome, and event type.
    pub(super) handled: HashMap<(&'static str, &'a str), u64>,
    /// Lanes of which a message waits, now.
    pub(super) blocked: Vec<Lane>,
}

/// Why a batch came to nothing.
#[derive(Debug)]
pub(super) enum Broken {
    /// A partition is another consumer's by now.
    Fenced,
    Postgres(tokio_postgres::Error),
}

impl From<tokio_postgres::Error> for Broken {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Postgres(error)
    }
}

/// How often something is tried, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempts {
    /// After so many it is a dead letter.
    pub max: u32,
    /// How long it waits for its second attempt, and twice as long for each further one,
    pub backoff_min: Duration,
    /// and at most.
    pub backoff_max: Duration,
}

impl Default for Attempts {
    fn default() -> Self {
        Self {
            max: 6,
            backoff_min: Duration::from_secs(1),
            backoff_max: Duration::from_secs(3600),
        }
    }
}

impl Attempts {
    /// How long to wait after so many attempts; `None`: it is a dead letter.
    pub(super) fn pause(&self, attempts: u32) -> Option<Duration> {
        (attempts < self.max).then(|| doubled(self.backoff_min, self.backoff_max, attempts))
    }
}

/// Messages that were not received before, and what is known of the others.
#[derive(Debug, Clone)]
struct Received<'a> {
    entries: Vec<Entry<'a>>,
    done: Done<'a>,
}

/// Receives and handles it, until that has happened.
pub(super) async fn run<'a>(
    client: &mut Client,
    work: &Work,
    blocked: &HashSet<Lane>,
    batch: &Batch<'a>,
) -> Result<Done<'a>, Broken> {
    let mut received = None;
    let mut attempts = 0;
    loop {
        match once(client, work, blocked, batch, &mut received).await {
            Err(Broken::Postgres(error)) if is_to_be_run_again(&error) => {
                debug!("run a batch again: {error}");
                attempts += 1;
                tokio::time::sleep(doubled(AGAIN_MIN, AGAIN_MAX, attempts)).await;
            }
            ended => return ended,
        }
    }
}

/// What was received in a transaction of its own, if that comes first, is left in `received`.
async fn once<'a>(
    client: &mut Client,
    work: &Work,
    blocked: &HashSet<Lane>,
    batch: &Batch<'a>,
    received: &mut Option<Received<'a>>,
) -> Result<Done<'a>, Broken> {
    if work.ack != Ack::AtMostOnce {
        let transaction = client.transaction().await?;
        let received = receive(&transaction, work, batch).await?;
        return settle(transaction, work, blocked, received).await;
    }
    if received.is_none() {
        let transaction = client.transaction().await?;
        let now = receive(&transaction, work, batch).await?;
        transaction.commit().await?;
        *received = Some(now);
    }
    let transaction = client.transaction().await?;
    for Advance { place, epoch, .. } in &batch.advances {
        if !work.store.hold_place(&transaction, place, *epoch).await? {
            return Err(Broken::Fenced);
        }
    }
    let received = received.clone().expect("it was just received");
    settle(transaction, work, blocked, received).await
}

/// Moves the offsets, and writes which messages were received.
async fn receive<'a>(
    transaction: &Transaction<'_>,
    work: &Work,
    batch: &Batch<'a>,
) -> Result<Received<'a>, Broken> {
    // The second is sent before the first is answered: the server does them in this order.
    let advance = work.store.advance(transaction, &batch.advances);
    let receive = work.store.receive(transaction, batch.messages);
    let (has_advanced, mut fresh) = try_join(advance, receive).await?;
    if !has_advanced {
        return Err(Broken::Fenced);
    }
    let mut done = Done::default();
    let mut entries = Vec::with_capacity(batch.messages.len());
    for entry in batch.messages {
        // Of an id that comes twice, the first.
        if fresh.remove(&(entry.dedup, entry.id)) {
            entries.push(*entry);
        } else {
            *done.duplicates.entry(&entry.message.topic).or_default() += 1;
        }
    }
    failpoint!("inbox_received");
    Ok(Received { entries, done })
}

/// Handles what was received, and commits it.
async fn settle<'a>(
    mut transaction: Transaction<'_>,
    work: &Work,
    blocked: &HashSet<Lane>,
    Received { entries, mut done }: Received<'a>,
) -> Result<Done<'a>, Broken> {
    let verdicts = match work.handler {
        Working::Application => vec![Verdict::Stored; entries.len()],
        _ => try_all(&mut transaction, work, &entries, blocked).await?,
    };
    let kept: Vec<Kept<'a>> = (entries.iter().zip(verdicts))
        .filter_map(|(entry, verdict)| done.settle(entry, verdict))
        .collect();
    work.store.keep(&transaction, &kept).await?;
    failpoint!("inbox_handled");
    transaction.commit().await?;
    failpoint!("inbox_committed");
    Ok(done)
}

/// Has the handler try them, in their order, and those of these lanes not at all.
pub(super) async fn try_all(
    transaction: &mut Transaction<'_>,
    work: &Work,
    entries: &[Entry<'_>],
    blocked: &HashSet<Lane>,
) -> Result<Vec<Verdict>, tokio_postgres::Error> {
    let mut trial = Trial {
        work,
        entries,
        blocked: blocked.clone(),
        verdicts: vec![Verdict::Behind; entries.len()],
    };
    for (entry, verdict) in entries.iter().zip(&mut trial.verdicts) {
        if entry.is_suspect && trial.blocked.insert(entry.lane) {
            *verdict = Verdict::Suspect;
        }
    }
    failpoint!("inbox_handling");
    trial.run(transaction).await?;
    Ok(trial.verdicts)
}

/// Whether a transaction failed that is to be run again as it is.
pub(super) fn is_to_be_run_again(error: &tokio_postgres::Error) -> bool {
    let codes = [
        SqlState::T_R_DEADLOCK_DETECTED,
        SqlState::T_R_SERIALIZATION_FAILURE,
    ];
    error.code().is_some_and(|code| codes.contains(code))
}

impl<'a> Done<'a> {
    /// Counts it. What is kept of it, if anything is.
    fn settle(&mut self, entry: &Entry<'a>, verdict: Verdict) -> Option<Kept<'a>> {
        let outcome = (verdict.name(), &*entry.message.event_type);
        *self.handled.entry(outcome).or_default() += 1;
        let (status, attempts, due_in, error) = match verdict {
            Verdict::Completed | Verdict::Skipped => return None,
            Verdict::Stored => (Status::Stored, 0, Some(Duration::ZERO), None),
            Verdict::Suspect => (Status::Waiting, 0, Some(Duration::ZERO), None),
            Verdict::Behind => (Status::Waiting, 0, None, None),
            Verdict::Away(why, pause) => (Status::Waiting, 0, Some(pause), Some(why)),
            Verdict::Failed(why, Some(pause)) => (Status::Waiting, 1, Some(pause), Some(why)),
            Verdict::Failed(why, None) => (Status::Dead, 1, Some(Duration::ZERO), Some(why)),
        };
        if status == Status::Waiting {
            self.blocked.push(entry.lane);
        }
        Some(Kept {
            message: entry.message,
            lane: entry.lane,
            status,
            attempts,
            due_in,
            error,
        })
    }
}

/// What became of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    Completed,
    Skipped,
    /// For the application.
    Stored,
    /// To be tried from the table, alone.
    Suspect,
    /// One before it of its lane waits.
    Behind,
    /// Who is to handle it was not reached, for this reason, and is to be asked again then.
    Away(String, Duration),
    /// Why, and when it is tried again; `None`: never.
    Failed(String, Option<Duration>),
}

impl Verdict {
    /// Whether those behind it wait for it.
    fn holds_its_lane(&self) -> bool {
        matches!(self, Self::Away(..) | Self::Failed(_, Some(_)))
    }

    /// As metrics have it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Skipped => "skipped",
            Self::Stored => "stored",
            Self::Suspect | Self::Behind | Self::Away(..) => "waiting",
            Self::Failed(_, Some(_)) => "failed",
            Self::Failed(_, None) => "dead",
        }
    }
}

/// The handler at work on messages, in their order.
struct Trial<'t> {
    work: &'t Work,
    entries: &'t [Entry<'t>],
    blocked: HashSet<Lane>,
    /// Of those that were not tried: `Behind`.
    verdicts: Vec<Verdict>,
}

impl Trial<'_> {
    async fn run(
        &mut self,
        transaction: &mut Transaction<'_>,
    ) -> Result<(), tokio_postgres::Error> {
        match &self.work.handler {
            Working::Http(service) => self.ask(service, transaction).await,
            _ => self.try_in_order(transaction).await,
        }
    }

    async fn try_in_order(
        &mut self,
        transaction: &mut Transaction<'_>,
    ) -> Result<(), tokio_postgres::Error> {
        let limit = self.work.handler_timeout;
        let begin = format!(
            "SET LOCAL statement_timeout = {}; SAVEPOINT messages",
            limit.as_millis()
        );
        let all = 0..self.entries.len();
        // The next is the last.
        let mut untried = match self.work.ack {
            Ack::AtMostOnce => all.rev().map(|index| index..index + 1).collect(),
            _ => vec![all],
        };
        while let Some(range) = untried.pop() {
            let indices: Vec<usize> = range.clone().filter(|index| self.may_go(*index)).collect();
            if indices.is_empty() {
                continue;
            }
            let messages: Vec<&Message> = (indices.iter())
                .map(|index| self.entries[*index].message)
                .collect();
            transaction.batch_execute(&begin).await?;
            let began = Instant::now();
            let handled = self
                .work
                .handler
                .handle(transaction, &messages, limit)
                .await;
            let seconds = &self.work.metrics.handler_seconds;
            seconds.observe(began.elapsed().as_secs_f64());
            let failures = match handled? {
                Ok(verdicts) => {
                    transaction.batch_execute(KEEP).await?;
                    for (index, verdict) in indices.iter().zip(verdicts) {
                        self.verdicts[*index] = verdict;
                    }
                    continue;
                }
                Err(failures) => failures,
            };
            transaction.batch_execute(UNDO).await?;
            let is_alone = indices.len() == 1;
            if is_alone || failures.iter().all(|failure| failure.at.is_some()) {
                let mut lanes = HashSet::new();
                for failure in failures {
                    let index = indices[failure.at.unwrap_or_default()];
                    // Those behind it in its lane may have failed for that alone.
                    if lanes.insert(self.entries[index].lane) {
                        self.fail(index, failure);
                    }
                }
                untried.push(range);
            } else if failures.iter().any(|failure| failure.took_too_long) {
                untried.extend(indices.iter().rev().map(|index| *index..index + 1));
            } else {
                let middle = indices[indices.len() / 2];
                untried.push(middle..range.end);
                untried.push(range.start..middle);
            }
        }
        Ok(())
    }

    /// Whether it was not tried, and may be.
    fn may_go(&self, index: usize) -> bool {
        self.verdicts[index] == Verdict::Behind && !self.blocked.contains(&self.entries[index].lane)
    }

    fn fail(&mut self, index: usize, failure: Failure) {
        let verdict = self.failed(index, failure);
        if verdict.holds_its_lane() {
            self.blocked.insert(self.entries[index].lane);
        }
        self.verdicts[index] = verdict;
    }

    fn failed(&self, index: usize, failure: Failure) -> Verdict {
        let pause = self.work.attempts.pause(self.entries[index].attempt);
        let pause = match failure.again {
            Again::InTurn => pause,
            Again::After(after) => pause.map(|_| after.min(self.work.attempts.backoff_max)),
            Again::Never => None,
        };
        Verdict::Failed(failure.why, pause)
    }

    /// Has a service handle them: those of a lane one after the other, and lanes at once.
    async fn ask(
        &mut self,
        service: &Service,
        transaction: &Transaction<'_>,
    ) -> Result<(), tokio_postgres::Error> {
        let mut lanes: Vec<Vec<usize>> = Vec::new();
        let mut of: HashMap<Lane, usize> = HashMap::new();
        for index in (0..self.entries.len()).filter(|index| self.may_go(*index)) {
            let lane = *of.entry(self.entries[index].lane).or_insert(lanes.len());
            match lanes.get_mut(lane) {
                Some(lane) => lane.push(index),
                None => lanes.push(vec![index]),
            }
        }
        let lanes = stream::iter(
            lanes
                .into_iter()
                .map(|lane| self.ask_in_turn(service, lane)),
        );
        let lanes = lanes.buffer_unordered(service.parallel());
        let asked = async { Ok(lanes.concat().await) };
        for (index, verdict) in kept_open(transaction, asked).await? {
            self.verdicts[index] = verdict;
        }
        Ok(())
    }

    /// Until one is to wait.
    async fn ask_in_turn(&self, service: &Service, lane: Vec<usize>) -> Vec<(usize, Verdict)> {
        let mut verdicts = Vec::with_capacity(lane.len());
        for index in lane {
            let message = self.entries[index].message;
            let began = Instant::now();
            let verdict = match service.ask(message, self.work.handler_timeout).await {
                Answer::Handled => Verdict::Completed,
                Answer::Failed(failure) => self.failed(index, failure),
                Answer::Away(why, pause) => Verdict::Away(why, pause),
            };
            let seconds = &self.work.metrics.handler_seconds;
            seconds.observe(began.elapsed().as_secs_f64());
            let is_last = verdict.holds_its_lane();
            verdicts.push((index, verdict));
            if is_last {
                break;
            }
        }
        verdicts
    }
}
