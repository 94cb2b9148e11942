//! What was read and is not confirmed yet: sent, on its way, or behind something
//! that is.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rdkafka::error::RDKafkaErrorCode;
use tokio_postgres::types::PgLsn;

use crate::ack::AckQueue;
use crate::envelope::Record;
use crate::error::{Error, ErrorKind, Result};
use crate::health::Health;
use crate::metrics::{Metrics, TopicMetrics};
use crate::publisher::{Publisher, Report, SendError, Topic, Verdict, verdict};
use crate::source::{Place, Position, Row};
use crate::timestamp::Timestamp;

/// The publisher, and the queue of what it was given.
pub(super) struct Window {
    pub(super) publisher: Publisher,
    queue: AckQueue<Sent, PgLsn>,
    /// Fences that were read and not yet reached.
    fences: VecDeque<Position>,
    topics: Vec<TopicMetrics>,
    reports: Vec<Report>,
    /// Rows that were in a refused batch: they are sent again alone, so that the
    /// one that is at fault can be told from its neighbours.
    suspects: BTreeSet<Place>,
    /// The row that is being sent alone.
    alone: Option<(u64, Row)>,
    failed: Option<Failed>,
    /// When the brokers last reported anything.
    pub(super) heard: Instant,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
}

/// What is remembered of an event in flight.
struct Sent {
    place: Place,
    topic: usize,
    size: usize,
    committed_at: Timestamp,
    sent_at: Instant,
}

/// A delivery failed: nothing more is sent, and what is in flight is waited for,
/// as the reports name the rows that were refused.
struct Failed {
    error: Error,
    /// How many of the events in flight have failed.
    events: usize,
    since: Instant,
}

/// What can be confirmed now.
#[derive(Default)]
pub(super) struct Progress {
    /// Everything before it is delivered.
    pub(super) confirm: Option<PgLsn>,
    /// The newest fence that lies before it.
    pub(super) fence: Option<Position>,
}

/// Why nothing more can be sent.
pub(super) enum Stop {
    /// This row can never go out.
    Row(Row, String),
    /// The attempt is over.
    Attempt(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Attempt(error)
    }
}

/// How long the reports of a failed producer are waited for. It purges at once.
const FAILED_REPORTS_MAX: Duration = Duration::from_secs(5);

impl Window {
    pub(super) fn new(
        publisher: Publisher,
        suspects: BTreeSet<Place>,
        metrics: Arc<Metrics>,
        health: Arc<Health>,
    ) -> Self {
        Self {
            publisher,
            queue: AckQueue::default(),
            fences: VecDeque::new(),
            topics: Vec::new(),
            reports: Vec::new(),
            suspects,
            alone: None,
            failed: None,
            heard: Instant::now(),
            metrics,
            health,
        }
    }

    /// Ends the producer. The suspects are for the next attempt.
    pub(super) async fn close(self) -> BTreeSet<Place> {
        self.publisher.close().await;
        self.suspects
    }

    /// Whether one more event may be sent.
    pub(super) fn has_room(&self, events_max: usize, bytes_max: usize) -> bool {
        self.alone.is_none()
            && self.failed.is_none()
            && self.queue.in_flight() < events_max
            && self.queue.in_flight_bytes() < bytes_max
    }

    /// Whether nothing is on its way.
    pub(super) fn is_settled(&self) -> bool {
        self.queue.in_flight() == 0
    }

    /// Whether a delivery has failed, so that nothing more may be sent.
    pub(super) fn has_failed(&self) -> bool {
        self.failed.is_some()
    }

    /// Whether anything is left that is not confirmed.
    pub(super) fn has_work(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Whether this row must be sent with nothing else on its way.
    pub(super) fn is_suspect(&self, row: &Row) -> bool {
        self.suspects.contains(&row.place)
    }

    /// Lets records for this topic pass. Nothing is on its way if the topic needs
    /// smaller batches, since a producer has one size of them.
    pub(super) async fn admit(&mut self, topic: &Topic) -> Result<()> {
        if !self.publisher.fits(topic) {
            self.publisher.shrink(topic).await?;
        }
        if self.publisher.admit(topic) == self.topics.len() {
            self.topics.push(self.metrics.topic(&topic.name));
        }
        Ok(())
    }

    /// Sends a row whose topic, by its number, was admitted.
    pub(super) fn send(
        &mut self,
        row: &Row,
        record: &Record<'_>,
        topic: usize,
    ) -> Result<(), Stop> {
        let size = record.size();
        let sent = Sent {
            place: row.place,
            topic,
            size,
            committed_at: row.committed_at,
            sent_at: Instant::now(),
        };
        let sequence = self.queue.push_event(sent, size);
        match self.publisher.send(record, sequence) {
            Ok(()) => {}
            Err(SendError::Row(code)) => return Err(self.refusal(row.clone(), topic, code)),
            Err(SendError::Producer(error)) => {
                // Reports that are still to come say what broke the producer, and
                // name the rows that were refused. There will be none for this row.
                self.fail(error);
                return Ok(());
            }
        }
        if self.is_suspect(row) {
            self.alone = Some((sequence, row.clone()));
        }
        Ok(())
    }

    /// Everything that was sent lies before this position.
    pub(super) fn push_position(&mut self, position: Position) {
        self.queue.push_position(position.lsn);
        if position.fence.is_some() {
            self.fences.push_back(position);
        }
    }

    /// Turns the reports that arrived into progress.
    pub(super) fn settle(&mut self) -> Result<Progress, Stop> {
        self.publisher.take_reports(&mut self.reports)?;
        if !self.reports.is_empty() {
            self.heard = Instant::now();
            let now = Timestamp::from_unix_micros(unix_micros());
            let mut reports = std::mem::take(&mut self.reports);
            for report in reports.drain(..) {
                match report.error {
                    None => self.delivered(report.sequence, now),
                    Some(code) => self.refused(report.sequence, code)?,
                }
            }
            self.reports = reports;
            self.health.brokers(Ok(()));
            self.health.moved();
        }
        let progress = self.progress();
        match self.failed.take_if(|failed| {
            failed.events == self.queue.in_flight() || failed.since.elapsed() > FAILED_REPORTS_MAX
        }) {
            Some(failed) => Err(failed.error.into()),
            None => Ok(progress),
        }
    }

    pub(super) fn update_gauges(&self) {
        let gauge = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
        self.metrics
            .in_flight_events
            .set(gauge(self.queue.in_flight()));
        self.metrics
            .in_flight_bytes
            .set(gauge(self.queue.in_flight_bytes()));
    }

    fn progress(&mut self) -> Progress {
        let Some(lsn) = self.queue.confirmable() else {
            return Progress::default();
        };
        self.health.moved();
        let mut fence = None;
        while self.fences.front().is_some_and(|fence| fence.lsn <= lsn) {
            fence = self.fences.pop_front();
        }
        Progress {
            confirm: Some(lsn),
            fence,
        }
    }

    fn delivered(&mut self, sequence: u64, now: Timestamp) {
        let sent = self.queue.delivered(sequence);
        let topic = &self.topics[sent.topic];
        topic.events.inc();
        topic.bytes.inc_by(sent.size as u64);
        let seconds = sent.sent_at.elapsed().as_secs_f64();
        self.metrics.publish_seconds.observe(seconds);
        // Two hosts' clocks may differ.
        let micros = (now.unix_micros() - sent.committed_at.unix_micros()).max(0);
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

    fn refused(&mut self, sequence: u64, code: RDKafkaErrorCode) -> Result<(), Stop> {
        let failures = &self.metrics.failures;
        failures.with_label_values(&[&format!("{code:?}")]).inc();
        if verdict(code) != Verdict::Retry
            && let Some(sent) = self.queue.get(sequence)
        {
            if let Some((_, row)) = self.alone.take_if(|(alone, _)| *alone == sequence) {
                return Err(self.refusal(row, sent.topic, code));
            }
            self.suspects.insert(sent.place);
        }
        self.fail(Error::new(ErrorKind::BrokerAway, "a delivery failed").caused_by(code));
        Ok(())
    }

    /// One of the events in flight will not be delivered by this producer.
    fn fail(&mut self, error: Error) {
        let failed = self.failed.get_or_insert_with(|| Failed {
            error,
            events: 0,
            since: Instant::now(),
        });
        failed.events += 1;
    }

    fn refusal(&self, row: Row, topic: usize, code: RDKafkaErrorCode) -> Stop {
        let topic = self.publisher.topic_name(topic).unwrap_or_default();
        Stop::Row(row, format!("topic \"{topic}\": {code}"))
    }
}

fn unix_micros() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
    since_epoch.map_or(0, |since| {
        i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
    })
}
