//! What was read and is not confirmed yet: sent, on its way, or behind something
//! that is.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use rdkafka::error::RDKafkaErrorCode;
use tokio_postgres::types::PgLsn;

use super::control::Reached;
use super::pace::Pace;
use super::partitions::Partitions;
use crate::ack::AckQueue;
use crate::envelope::Record;
use crate::error::{Error, Result};
use crate::health::Health;
use crate::metrics::{Metrics, TopicMetrics};
use crate::publisher::{
    self, Destination, Publisher, Report, SendError, Topic, Verdict, codes, verdict,
};
use crate::source::{Mark, Place, Position, Row};
use crate::timestamp::Timestamp;

/// The publisher, and the queue of what it was given.
pub(super) struct Window {
    pub(super) publisher: Publisher,
    queue: AckQueue<Sent, PgLsn>,
    /// Marks that were read and not yet reached, with how many entries the queue
    /// had taken before each.
    marks: VecDeque<(u64, Mark, PgLsn)>,
    topics: Vec<TopicMetrics>,
    partitions: Partitions,
    reports: Vec<Report>,
    pace: Pace,
    /// When the relay last looked at the clock: for each event it would be too dear.
    now: Instant,
    /// Rows that were in a refused batch: they are sent again alone, so that the
    /// one that is at fault can be told from its neighbours.
    suspects: BTreeSet<Place>,
    /// The row that is being sent alone.
    alone: Option<(u64, Row)>,
    failed: Option<Failed>,
    /// Whether anything was delivered at all.
    pub(super) has_delivered: bool,
    /// Whether this producer refused a row or the batch it was in.
    pub(super) has_refused: bool,
    /// Whether what is refused is parked: a topic is told as that, and not by its rows, and
    /// records that are too large by their size.
    parks: bool,
    /// From which size on records of a topic were too large.
    too_large: HashMap<String, usize>,
    /// Rows that were in a batch that was refused, and the numbers of their topics.
    refused: Vec<(Place, usize)>,
    /// The last event that was sent.
    pub(super) last_sent: Option<Place>,
    /// The newest position that was read.
    newest: PgLsn,
    beginning: Beginning,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
}

/// An event at which one relay after another ends is in the first transaction that
/// is not confirmed. What is read past that is repeated by each of them: so nothing
/// is, until it is confirmed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beginning {
    /// No transaction with events has been read to its end.
    Reading,
    /// One has, and is on its way.
    Waiting,
    /// One is confirmed.
    Over,
}

/// What is remembered of an event in flight.
struct Sent {
    place: Place,
    /// `None`: the parked table.
    destination: Option<Destination>,
    size: usize,
    committed_at: Timestamp,
    sent_at: Instant,
}

/// A delivery failed: nothing more is sent, and what is in flight is waited for,
/// as the reports name the rows that were refused.
struct Failed {
    error: Error,
    since: Instant,
}

/// What can be confirmed now.
#[derive(Default)]
pub(super) struct Progress {
    /// Everything before it is delivered.
    pub(super) confirm: Option<PgLsn>,
    /// The newest mark that was reached, and its position.
    pub(super) mark: Option<Reached>,
    /// How many events lie between it and the position before.
    pub(super) events: usize,
    /// Whether anything has left the window.
    pub(super) has_moved: bool,
}

impl Progress {
    /// What comes behind this.
    pub(super) fn add(&mut self, later: Self) {
        self.confirm = later.confirm.or(self.confirm);
        self.mark = later.mark.or(self.mark.take());
        self.events += later.events;
        self.has_moved |= later.has_moved;
    }
}

/// Why nothing more can be sent.
pub(super) enum Stop {
    /// This row can never go out.
    Row(Row, String),
    /// The brokers take nothing of ours for this topic.
    Topic(String, String),
    /// The attempt is over.
    Attempt(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Attempt(error)
    }
}

/// How long the reports of a failed producer are waited for, after it was purged.
const FAILED_REPORTS_MAX: Duration = Duration::from_secs(1);

impl Window {
    pub(super) fn new(
        publisher: Publisher,
        suspects: BTreeSet<Place>,
        parks: bool,
        metrics: Arc<Metrics>,
        health: Arc<Health>,
    ) -> Self {
        Self {
            publisher,
            queue: AckQueue::default(),
            marks: VecDeque::new(),
            topics: Vec::new(),
            partitions: Partitions::default(),
            reports: Vec::new(),
            pace: Pace::start(Instant::now()),
            now: Instant::now(),
            suspects,
            alone: None,
            failed: None,
            has_delivered: false,
            has_refused: false,
            parks,
            too_large: HashMap::new(),
            refused: Vec::new(),
            last_sent: None,
            newest: PgLsn::from(0),
            beginning: Beginning::Reading,
            metrics,
            health,
        }
    }

    /// What may be for the next attempt: the producer, the suspects, and from which size on
    /// records of a topic were too large. Where one was, its neighbours are no suspects.
    pub(super) fn close(mut self) -> (Publisher, BTreeSet<Place>, HashMap<String, usize>) {
        for (place, topic) in self.refused {
            let topic = self.publisher.topic_name(topic);
            if !self.too_large.contains_key(topic) {
                self.suspects.insert(place);
            }
        }
        (self.publisher, self.suspects, self.too_large)
    }

    /// Whether one more event may be sent.
    pub(super) fn has_room(&self, events_max: usize, bytes_max: usize) -> bool {
        self.alone.is_none()
            && self.failed.is_none()
            && self.beginning != Beginning::Waiting
            && !self.is_full(events_max, bytes_max)
    }

    /// Whether as much is held as may be.
    pub(super) fn is_full(&self, events_max: usize, bytes_max: usize) -> bool {
        // What is held, not only what is in flight: one partition that is stuck
        // must neither fill our memory nor widen what a crash repeats.
        let held = self.queue.held();
        held.events >= events_max || held.bytes >= bytes_max
    }

    /// Whether nothing is on its way.
    pub(super) fn is_settled(&self) -> bool {
        self.queue.in_flight().events == 0
    }

    /// Whether a delivery has failed, so that nothing more may be sent.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// What the oldest event that is not acknowledged waits for.
    pub(super) fn waiting(&self) -> Option<String> {
        let oldest = self.queue.get(self.queue.head())?.destination;
        let waits_for = match oldest {
            Some(Destination { topic, partition }) => {
                let topic = self.publisher.topic_name(topic);
                format!("topic \"{topic}\", partition {partition}, has not acknowledged")
            }
            None => "Postgres has not parked".to_owned(),
        };
        let events = self.queue.held().events;
        Some(format!("{waits_for} the oldest of {events} events"))
    }

    /// Since when the oldest event that is not acknowledged is on its way to a broker.
    pub(super) fn oldest_sent_at(&self) -> Option<Instant> {
        let oldest = self.queue.get(self.queue.head())?;
        oldest.destination.map(|_| oldest.sent_at)
    }

    /// Events were confirmed.
    pub(super) fn confirmed(&mut self) {
        self.beginning = Beginning::Over;
    }

    /// How many entries have left it: all before are delivered.
    pub(super) fn head(&self) -> u64 {
        self.queue.head()
    }

    /// How many entries it has taken.
    pub(super) fn end(&self) -> u64 {
        self.queue.end()
    }

    /// Whether anything is left that is not confirmed.
    pub(super) fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Whether this row cannot be sent yet: a suspect waits until nothing is on its
    /// way, and a partition's second record for the first.
    pub(super) fn must_wait(&self, row: &Row, destination: Destination) -> bool {
        self.partitions.is_opening(destination) || (self.is_suspect(row) && !self.is_settled())
    }

    fn is_suspect(&self, row: &Row) -> bool {
        self.suspects.contains(&row.place)
    }

    /// Lets records for this topic pass. Nothing is on its way if the topic needs
    /// smaller batches, since a producer has one size of them.
    pub(super) fn admit(&mut self, topic: &Topic) -> Result<()> {
        if !self.publisher.fits(topic) {
            self.publisher.shrink(topic)?;
            // It is a new producer.
            self.partitions = Partitions::default();
        }
        if self.publisher.admit(topic) == self.topics.len() {
            self.topics.push(self.metrics.topic(&topic.name));
        }
        Ok(())
    }

    /// Sends a row whose topic was admitted.
    pub(super) fn send(
        &mut self,
        row: &Row,
        record: &Record<'_>,
        destination: Destination,
    ) -> Result<(), Stop> {
        self.partitions.sent(destination, self.now);
        let size = record.size();
        let sent = Sent {
            place: row.place,
            destination: Some(destination),
            size,
            committed_at: row.committed_at,
            sent_at: self.now,
        };
        let sequence = self.queue.push_event(sent, size);
        failpoint!("sending");
        match self.publisher.send(record, destination.partition, sequence) {
            Ok(()) => {
                self.last_sent = Some(row.place);
                self.pace.sent(self.now);
                failpoint!("sent");
            }
            Err(SendError::Row(code)) => {
                self.queue.withdraw();
                let why = self.publisher.refusal(destination.topic, size, code, false);
                return Err(Stop::Row(row.clone(), why));
            }
            Err(SendError::Producer(error)) => {
                // Reports that are still to come say what broke the producer, and
                // name the rows that were refused. There will be none for this row.
                self.queue.refused(sequence);
                self.fail(error);
                return Ok(());
            }
        }
        if self.is_suspect(row) {
            self.alone = Some((sequence, row.clone()));
        }
        Ok(())
    }

    /// A row is not sent but parked, which [`parked`](Self::parked) says of this number.
    pub(super) fn park(&mut self, row: &Row) -> u64 {
        let size = row.bytes.len();
        let sent = Sent {
            place: row.place,
            destination: None,
            size,
            committed_at: row.committed_at,
            sent_at: self.now,
        };
        self.queue.push_event(sent, size)
    }

    /// This row is in the table of parked events for good.
    pub(super) fn parked(&mut self, sequence: u64) {
        self.queue.delivered(sequence);
    }

    /// Nothing more is to be sent for now: what was sent leaves at once, unless there is
    /// so much of it that more is sure to follow. Nothing follows while the relay `waits`
    /// for what was sent.
    pub(super) fn push(&mut self, waits: bool) {
        let waits = waits || self.alone.is_some() || self.beginning == Beginning::Waiting;
        if self.pace.should_push() || waits {
            self.publisher.push();
        }
    }

    /// Whether so much goes out that a batch is worth its wait.
    pub(super) fn is_many(&self) -> bool {
        self.pace.is_many()
    }

    /// Everything that was sent lies before this position.
    pub(super) fn push_position(&mut self, position: Position) {
        // A keepalive may carry an older position than the commit before it.
        if position.lsn < self.newest {
            return;
        }
        self.newest = position.lsn;
        if self.beginning == Beginning::Reading && self.last_sent.is_some() {
            self.beginning = Beginning::Waiting;
        }
        self.queue.push_position(position.lsn);
        if let Some(mark) = position.mark {
            self.marks.push_back((self.queue.end(), mark, position.lsn));
        }
    }

    pub(super) fn look_at_clock(&mut self, now: Instant) {
        self.now = now;
    }

    /// Turns the reports that arrived into progress, and says why nothing more can
    /// be sent, if so.
    pub(super) fn settle(&mut self) -> (Progress, Option<Stop>) {
        let refusal = self.publisher.take_reports(&mut self.reports).err();
        let mut stop = refusal.map(Stop::Attempt);
        if !self.reports.is_empty() {
            let now = Timestamp::from(SystemTime::now());
            let mut reports = std::mem::take(&mut self.reports);
            if reports.iter().any(|report| report.error.is_none()) {
                self.has_delivered = true;
                self.health.brokers(Ok(()));
            }
            for report in reports.drain(..) {
                match report.error {
                    None => self.delivered(report.sequence, now),
                    Some(code) => stop = stop.or(self.refused(report.sequence, code)),
                }
            }
            self.reports = reports;
        }
        let progress = self.progress();
        if stop.is_none() {
            let in_flight = self.queue.in_flight().events;
            let failed = self
                .failed
                .take_if(|failed| in_flight == 0 || failed.since.elapsed() > FAILED_REPORTS_MAX);
            stop = failed.map(|failed| Stop::Attempt(failed.error));
        }
        (progress, stop)
    }

    pub(super) fn update_gauges(&self) {
        let gauge = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        self.metrics
            .in_flight_events
            .set(gauge(self.queue.in_flight().events));
        self.metrics
            .in_flight_bytes
            .set(gauge(self.queue.in_flight().bytes));
    }

    fn progress(&mut self) -> Progress {
        let head = self.queue.head();
        let reached = self.queue.confirmable();
        let has_moved = self.queue.head() > head;
        let Some((lsn, events)) = reached else {
            return Progress {
                has_moved,
                ..Progress::default()
            };
        };
        let mut mark = None;
        while let Some((end, ..)) = self.marks.front()
            && *end <= self.queue.head()
        {
            mark = self.marks.pop_front().map(|(_, mark, lsn)| (mark, lsn));
        }
        Progress {
            confirm: Some(lsn),
            mark,
            events,
            has_moved,
        }
    }

    fn delivered(&mut self, sequence: u64, now: Timestamp) {
        failpoint!("delivering");
        let sent = self.queue.delivered(sequence);
        failpoint!("delivered");
        let destination = sent.destination.expect("only what was sent is reported");
        self.partitions.delivered(destination, sent.sent_at);
        let topic = &self.topics[destination.topic];
        topic.events.inc();
        topic.bytes.inc_by(sent.size as u64);
        let seconds = self.now.duration_since(sent.sent_at).as_secs_f64();
        self.metrics.publish_seconds.observe(seconds);
        // Two hosts' clocks may differ.
        let micros = now
            .unix_micros()
            .saturating_sub(sent.committed_at.unix_micros())
            .max(0);
        self.metrics
            .commit_to_delivery_seconds
            .observe(micros as f64 / 1e6);
        if self
            .alone
            .take_if(|(alone, _)| *alone == sequence)
            .is_some()
        {
            self.suspects.remove(&sent.place);
        }
    }

    fn refused(&mut self, sequence: u64, code: RDKafkaErrorCode) -> Option<Stop> {
        let failures = &self.metrics.failures;
        failures.with_label_values(&[&format!("{code:?}")]).inc();
        let sent = self.queue.refused(sequence);
        let alone = self.alone.take_if(|(alone, _)| *alone == sequence);
        if let (Verdict::Row | Verdict::Topic, Some(destination)) =
            (verdict(code), sent.destination)
        {
            let topic = destination.topic;
            let why = || self.publisher.refusal(topic, sent.size, code, true);
            let name = || self.publisher.topic_name(topic).to_owned();
            if verdict(code) == Verdict::Topic && self.parks {
                return Some(Stop::Topic(name(), why()));
            }
            self.has_refused = true;
            // Compressed it may be smaller than that; but one of these was not small enough.
            let limit = self.publisher.limit(topic);
            let from = match alone {
                Some(_) => Some(sent.size),
                None => limit.filter(|limit| sent.size >= *limit),
            };
            if let Some(from) = from.filter(|_| self.parks && codes::is_too_large(code)) {
                let known = self.too_large.entry(name()).or_insert(from);
                *known = from.min(*known);
            } else {
                self.refused.push((sent.place, topic));
            }
            if let Some((_, row)) = alone {
                return Some(Stop::Row(row, why()));
            }
        }
        let topic = sent
            .destination
            .map(|destination| self.publisher.topic_name(destination.topic));
        self.fail(publisher::failure(code, topic.unwrap_or_default()));
        None
    }

    /// One of the events will not be delivered by this producer.
    fn fail(&mut self, error: Error) {
        self.failed.get_or_insert_with(|| {
            // Of what was pipelined behind a refused batch, librdkafka reports
            // nothing by itself.
            self.publisher.purge();
            Failed {
                error,
                since: Instant::now(),
            }
        });
    }
}
