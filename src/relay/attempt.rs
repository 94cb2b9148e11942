//! One attempt: from opening the slot until something breaks or the relay is
//! told to stop.

use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rdkafka::error::RDKafkaErrorCode;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_postgres::types::PgLsn;
use tracing::{info, warn};

use super::heartbeat::Heartbeat;
use super::{Relay, Stopped};
use crate::ack::AckQueue;
use crate::catalog;
use crate::envelope::Encoder;
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::TopicMetrics;
use crate::publisher::{Publisher, Report, SendError, Topic, Verdict, verdict};
use crate::source::wal::{Stream, WalSettings};
use crate::source::{Item, Place, Position, Row, Source};
use crate::timestamp::Timestamp;

pub(super) struct Attempt<'r> {
    relay: &'r mut Relay,
    heartbeat: Heartbeat,
    stream: Stream,
    encoder: Encoder,
    publisher: Publisher,
    queue: AckQueue<Sent, PgLsn>,
    /// Fences that were read and not yet reached.
    fences: VecDeque<Position>,
    topics: Vec<TopicMetrics>,
    reports: Vec<Report>,
    /// A row that waits: for its topic, for smaller batches, or to be sent alone.
    held: Option<Row>,
    /// The topic of the held row, before records for it may pass.
    found: Option<Topic>,
    /// A row that is being sent alone.
    alone: Option<(u64, Row)>,
    resolving: JoinSet<Result<Topic>>,
    probing: JoinSet<Result<()>>,
    heard_from_brokers: Instant,
    failed: Option<Failed>,
    stopping: bool,
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
    reports: usize,
    since: Instant,
}

/// Rows taken in one go before anything else is looked at.
const BURST: usize = 256;

/// The server sends each row by itself, and each wakes us. While rows come
/// faster than this many a turn, the thread sleeps for [`PAUSE`] and lets them
/// gather: 500,000 rows over a Unix socket cost the relay 2.9 µs each instead of
/// 4.2, and the walsender does not slow down. Alone, an event never waits.
const BUSY: usize = 32;
const PAUSE: Duration = Duration::from_micros(300);

/// How often liveness, progress and the brokers are looked at.
const TICK: Duration = Duration::from_secs(1);

/// After how long without a delivery the brokers are asked for a sign of life,
/// and how long they may take.
const PROBE_INTERVAL: Duration = Duration::from_secs(4);
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the reports of a failed producer are waited for. It purges at once.
const FAILED_REPORTS_MAX: Duration = Duration::from_secs(5);

/// How long a server that is going away is made to wait while what is in flight
/// is confirmed.
const PARTING_MAX: Duration = Duration::from_secs(2);

impl<'r> Attempt<'r> {
    /// Carries events until something breaks or `shutdown` becomes true.
    pub(super) async fn run(
        relay: &'r mut Relay,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<Stopped> {
        let mut attempt = tokio::select! {
            _ = shutdown.wait_for(|stop| *stop) => return Ok(Stopped::Idle),
            attempt = Self::connect(relay) => attempt?,
        };
        let result = attempt.carry(shutdown).await;
        attempt.update_gauges();
        attempt.stream.close().await;
        attempt.publisher.close().await;
        result.map(|()| Stopped::Drained)
    }

    async fn connect(relay: &'r mut Relay) -> Result<Self> {
        let settings = relay.settings.clone();
        relay.metrics.in_flight_events.set(0);
        let name = format!("postbox {} control", settings.contract.slot);
        let session = settings.database.connect(&name).await?;
        let checkpoint = catalog::check(&session.client, &settings.contract, None).await?;

        // The slot is only taken by a relay that can deliver.
        let publisher = Publisher::new(settings.kafka.clone())?;
        let answer = publisher.probe(PROBE_TIMEOUT).await;
        publisher.take_reports(&mut Vec::new())?;
        if let Err(error) = &answer {
            relay.health.brokers(Err(error.chain()));
        }
        answer?;
        relay.health.brokers(Ok(()));

        let stream = Stream::open(
            &settings.database,
            WalSettings {
                slot: settings.contract.slot.clone(),
                source: Source {
                    schema: settings.contract.schema.clone(),
                    table: "outbox".to_owned(),
                    publication: settings.contract.publication.clone(),
                },
                status_interval: settings.status_interval,
                wal_sender_timeout: settings.wal_sender_timeout,
            },
        )
        .await?;
        info!(
            slot = settings.contract.slot,
            database = settings.database.display(),
            "streaming"
        );
        relay.health.stream(Ok(()));
        let heartbeat = Heartbeat::start(
            session,
            settings.contract,
            checkpoint,
            settings.heartbeat_interval,
            relay.metrics.clone(),
        );
        Ok(Self {
            heartbeat,
            stream,
            encoder: Encoder::new(settings.format, settings.route),
            publisher,
            queue: AckQueue::default(),
            fences: VecDeque::new(),
            topics: Vec::new(),
            reports: Vec::new(),
            held: None,
            found: None,
            alone: None,
            resolving: JoinSet::new(),
            probing: JoinSet::new(),
            heard_from_brokers: Instant::now(),
            failed: None,
            stopping: false,
            relay,
        })
    }

    async fn carry(&mut self, shutdown: &mut watch::Receiver<bool>) -> Result<()> {
        let mut tick = tokio::time::interval(TICK);
        let mut deadline = None;
        let mut busy = 0;
        loop {
            self.settle()?;
            if self.stopping && self.is_drained() {
                return self.finish(deadline).await;
            }
            self.release_held().await?;
            let read = self.read_burst()?;
            busy += read;
            if read == 0 && busy >= BUSY {
                busy = 0;
                std::thread::sleep(PAUSE);
                tokio::task::yield_now().await;
                continue;
            }
            if read == 0 {
                busy = 0;
            }
            let may_read = self.may_read();
            tokio::select! {
                biased;
                _ = shutdown.wait_for(|stop| *stop), if !self.stopping => {
                    self.stopping = true;
                    deadline = Some(tokio::time::Instant::now() + self.relay.settings.shutdown_timeout);
                }
                error = self.heartbeat.failed() => return Err(self.part(error).await),
                () = sleep_until(deadline), if deadline.is_some() => return Err(self.not_drained()),
                _ = tick.tick() => self.look_around()?,
                Some(topic) = self.resolving.join_next() => self.resolved(joined(topic)?)?,
                Some(alive) = self.probing.join_next() => self.probed(joined(alive)),
                () = tokio::task::yield_now(), if read > 0 => {}
                () = self.publisher.reported() => {}
                item = self.stream.next(), if may_read => { busy = 1; self.take(item?)? }
            }
        }
    }

    /// Takes what has already arrived.
    fn read_burst(&mut self) -> Result<usize> {
        let mut read = 0;
        while read < BURST && self.may_read() {
            let Some(item) = self.stream.try_next()? else {
                break;
            };
            self.take(item)?;
            read += 1;
        }
        Ok(read)
    }

    fn may_read(&self) -> bool {
        let settings = &self.relay.settings;
        self.held.is_none()
            && self.alone.is_none()
            && self.failed.is_none()
            && self.queue.in_flight() < settings.in_flight_max
            && self.queue.in_flight_bytes() < settings.in_flight_bytes_max
            // A stop reads on to the end of the transaction: only that can be
            // confirmed.
            && (!self.stopping || self.stream.in_transaction())
    }

    fn take(&mut self, item: Item) -> Result<()> {
        match item {
            Item::Row(row) => self.offer(row),
            Item::Position(position) => {
                self.queue.push_position(position.lsn);
                if position.fence.is_some() {
                    self.fences.push_back(position);
                }
                Ok(())
            }
        }
    }

    /// Sends a row, or holds it until it can be sent.
    fn offer(&mut self, row: Row) -> Result<()> {
        let event = match self.stream.event(&row) {
            Ok(event) => event,
            Err(why) => return Err(self.poison(&row, why)),
        };
        let record = match self.encoder.encode(&event) {
            Ok(record) => record,
            Err(why) => return Err(poison(&self.stream, &row, why)),
        };
        let Some(topic) = self.publisher.topic(record.topic) else {
            let resolve = self.publisher.resolve(record.topic);
            self.resolving.spawn(resolve);
            self.held = Some(row);
            return Ok(());
        };
        let suspect = self.relay.suspects.contains(&row.place);
        if suspect && self.queue.in_flight() > 0 {
            self.held = Some(row);
            return Ok(());
        }
        let size = record.size();
        let sent = Sent {
            place: row.place,
            topic,
            size,
            committed_at: row.committed_at,
            sent_at: Instant::now(),
        };
        let sequence = self.queue.push_event(sent, size);
        match self.publisher.send(&record, sequence) {
            Ok(()) => {}
            Err(SendError::Row(code)) => {
                return Err(poison(&self.stream, &row, refusal(record.topic, code)));
            }
            Err(SendError::Producer(error)) => return Err(error),
        }
        if suspect {
            self.alone = Some((sequence, row));
        }
        self.heartbeat.had_traffic();
        Ok(())
    }

    /// The brokers have said what they know of the held row's topic.
    fn resolved(&mut self, topic: Result<Topic>) -> Result<()> {
        match (topic, &self.held) {
            (Ok(topic), _) => {
                self.found = Some(topic);
                Ok(())
            }
            (Err(error), Some(row)) if error.kind() == ErrorKind::Event => {
                Err(self.poison(row, error))
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Sends the held row if what it waits for has come.
    async fn release_held(&mut self) -> Result<()> {
        let in_flight = self.queue.in_flight() > 0;
        if self.failed.is_some() || !self.resolving.is_empty() {
            return Ok(());
        }
        if let Some(topic) = &self.found {
            if !self.publisher.fits(topic) {
                // A producer has one size of batches, and is replaced when
                // nothing is in flight.
                if in_flight {
                    return Ok(());
                }
                self.publisher.shrink(topic).await?;
            }
            if self.publisher.admit(topic) == self.topics.len() {
                self.topics.push(self.relay.metrics.topic(&topic.name));
            }
            self.found = None;
        }
        match self.held.take() {
            Some(row) => self.offer(row),
            None => Ok(()),
        }
    }

    /// Turns reports into progress. The only place where a position is confirmed.
    fn settle(&mut self) -> Result<()> {
        self.publisher.take_reports(&mut self.reports)?;
        if !self.reports.is_empty() {
            self.heard_from_brokers = Instant::now();
            let now = Timestamp::from_unix_micros(unix_micros());
            let mut reports = std::mem::take(&mut self.reports);
            for report in reports.drain(..) {
                match report.error {
                    None => self.delivered(report.sequence, now),
                    Some(code) => self.refused(report.sequence, code)?,
                }
            }
            self.reports = reports;
            self.relay.health.brokers(Ok(()));
            self.relay.health.moved();
        }
        if let Some(lsn) = self.queue.confirmable() {
            self.stream.confirm(lsn);
            self.relay.health.moved();
            self.reach_fences(lsn);
        }
        match self.failed.take_if(|failed| {
            failed.reports == self.queue.in_flight() || failed.since.elapsed() > FAILED_REPORTS_MAX
        }) {
            Some(failed) => Err(failed.error),
            None => Ok(()),
        }
    }

    fn delivered(&mut self, sequence: u64, now: Timestamp) {
        let sent = self.queue.delivered(sequence);
        let topic = &self.topics[sent.topic];
        topic.events.inc();
        topic.bytes.inc_by(sent.size as u64);
        let metrics = &self.relay.metrics;
        metrics
            .publish_seconds
            .observe(sent.sent_at.elapsed().as_secs_f64());
        // Two hosts' clocks may differ.
        let micros = (now.unix_micros() - sent.committed_at.unix_micros()).max(0);
        metrics
            .commit_to_delivery_seconds
            .observe(micros as f64 / 1e6);
        if self
            .alone
            .take_if(|(alone, _)| *alone == sequence)
            .is_some()
        {
            self.relay.suspects.remove(&sent.place);
        }
    }

    fn refused(&mut self, sequence: u64, code: RDKafkaErrorCode) -> Result<()> {
        let failures = &self.relay.metrics.failures;
        failures.with_label_values(&[&format!("{code:?}")]).inc();
        let about = verdict(code);
        if about != Verdict::Retry {
            if let Some((_, row)) = self.alone.take_if(|(alone, _)| *alone == sequence) {
                return Err(self.poison(&row, code));
            }
            let suspect = self.queue.get(sequence).map(|sent| sent.place);
            self.relay.suspects.extend(suspect);
        }
        let failed = self.failed.get_or_insert_with(|| Failed {
            error: Error::new(ErrorKind::BrokerAway, "a delivery failed").caused_by(code),
            reports: 0,
            since: Instant::now(),
        });
        failed.reports += 1;
        Ok(())
    }

    fn reach_fences(&mut self, lsn: PgLsn) {
        let mut reached = None;
        while self.fences.front().is_some_and(|fence| fence.lsn <= lsn) {
            reached = self.fences.pop_front();
        }
        if let Some(fence) = reached {
            self.heartbeat.reached(fence);
        }
    }

    fn look_around(&mut self) -> Result<()> {
        let may_read = self.may_read();
        self.stream.check_alive(may_read)?;
        self.update_gauges();
        self.relay
            .health
            .has_work(!self.queue.is_empty() || self.held.is_some());
        if self.heard_from_brokers.elapsed() > PROBE_INTERVAL && self.probing.is_empty() {
            self.probing.spawn(self.publisher.probe(PROBE_TIMEOUT));
        }
        Ok(())
    }

    fn probed(&mut self, alive: Result<Result<()>>) {
        let link = alive.and_then(|alive| alive);
        if link.is_ok() {
            self.heard_from_brokers = Instant::now();
        }
        self.relay
            .health
            .brokers(link.map_err(|error| error.chain()));
    }

    fn update_gauges(&self) {
        let metrics = &self.relay.metrics;
        metrics.in_flight_events.set(self.queue.in_flight() as i64);
        metrics
            .in_flight_bytes
            .set(self.queue.in_flight_bytes() as i64);
        metrics
            .received_lsn
            .set(u64::from(self.stream.received()) as i64);
        metrics
            .confirmed_lsn
            .set(u64::from(self.stream.confirmed()) as i64);
    }

    /// Postgres ended our session: it is going away, and waits for the slot to
    /// confirm everything. Confirm what can be, but do not hold it up.
    async fn part(&mut self, error: Error) -> Error {
        if error.kind().is_transient() {
            let settled = async {
                while self.queue.in_flight() > 0 {
                    self.publisher.reported().await;
                    self.settle()?;
                }
                self.stream.confirmation_sent().await;
                Ok::<_, Error>(())
            };
            let _ = tokio::time::timeout(PARTING_MAX, settled).await;
        }
        error
    }

    fn is_drained(&self) -> bool {
        self.queue.in_flight() == 0 && self.held.is_none() && !self.stream.in_transaction()
    }

    /// Everything is delivered: see to it that Postgres knows.
    async fn finish(&mut self, deadline: Option<tokio::time::Instant>) -> Result<()> {
        let confirmed = self.stream.confirmed();
        if u64::from(confirmed) == 0 {
            return Ok(());
        }
        let slot = &self.relay.settings.contract.slot;
        let sent = async {
            self.stream.confirmation_sent().await;
            // A status message that was written is not yet read; closing could
            // still discard it.
            self.heartbeat.confirmed(slot, confirmed).await
        };
        tokio::select! {
            confirmed = sent => confirmed?,
            () = sleep_until(deadline) => {
                let message = format!("everything was delivered, but Postgres did not take the confirmation of {confirmed} in time: the last events will be sent again");
                return Err(Error::new(ErrorKind::NotDrained, message));
            }
        }
        info!(lsn = %confirmed, "drained and confirmed");
        Ok(())
    }

    fn not_drained(&self) -> Error {
        let seconds = self.relay.settings.shutdown_timeout.as_secs_f32();
        let what = match self.stream.in_transaction() {
            true => "a transaction was still being read: all its events",
            false => "events were still in flight: they",
        };
        let message = format!("not drained within {seconds} s: {what} will be sent again");
        warn!(in_flight = self.queue.in_flight(), "{message}");
        Error::new(ErrorKind::NotDrained, message)
    }

    fn poison(&self, row: &Row, why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        poison(&self.stream, row, why)
    }
}

/// An event that can never go out as it is.
fn poison(
    stream: &Stream,
    row: &Row,
    why: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> Error {
    let message = format!("{} cannot go out", stream.name_of(row));
    Error::new(ErrorKind::Event, message).caused_by(why)
}

fn refusal(topic: &str, code: RDKafkaErrorCode) -> String {
    format!("topic \"{topic}\": {code}")
}

fn joined<T>(task: std::result::Result<T, tokio::task::JoinError>) -> Result<T> {
    task.map_err(|error| Error::new(ErrorKind::Unexpected, "a task ended").caused_by(error))
}

async fn sleep_until(deadline: Option<tokio::time::Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn unix_micros() -> i64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
    since_epoch.map_or(0, |since| since.as_micros() as i64)
}
