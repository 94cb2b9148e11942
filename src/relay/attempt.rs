//! One attempt: from opening the source until something breaks or the relay is
//! told to stop.

mod offering;
mod parting;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_postgres::types::PgLsn;
use tracing::info;

use super::Relay;
use super::aside::{self, Aside, Tools};
use super::connect::{Connected, PROBE_TIMEOUT, Stores, connect, outbox};
use super::control::{Control, Hold, walsender_is_ending};
use super::division::{DRAIN_MAX, Watch, served};
use super::gather::Gather;
use super::marks::{self, Marks};
use super::parking::{self, Parking};
use super::partitions::OPEN_MAX;
use super::refused_topics::RefusedTopics;
use super::window::{Progress, Window};
use crate::envelope::Encoder;
use crate::error::{Error, ErrorKind, Result, joined};
use crate::health::{SILENCE_MAX, Server};
use crate::publisher::Topic;
use crate::source::{Item, Mark, Row, Source};

pub(super) struct Attempt<'r> {
    relay: &'r mut Relay,
    control: Control,
    source: Source,
    encoder: Encoder,
    window: Window,
    /// Where rows are marked before they are confirmed.
    marks: Option<Marks>,
    /// Where rows go that cannot go out, or must not yet; and what sends them. None where
    /// rows are claimed, and put off.
    parking: Option<Parking>,
    aside: Option<Aside>,
    /// What they do it by.
    stores: Option<Stores>,
    /// A row that waits: for its topic, for smaller batches, for the first record of
    /// its partition, or to be sent alone.
    held: Option<Row>,
    /// The topic of the held row, before records for it may pass.
    resolved_topic: Option<Topic>,
    resolving: JoinSet<Result<Topic>>,
    resolving_name: Option<String>,
    refused_topics: RefusedTopics,
    /// When the brokers last did not know a topic.
    topic_refused_at: Option<Instant>,
    probing: JoinSet<Result<()>>,
    /// Writes a last fence, when the relay is told to stop.
    fencing: JoinSet<Option<String>>,
    /// That fence, until everything before it is delivered, and when that is no longer
    /// waited for.
    last_fence: Option<(String, Instant)>,
    /// Since when the stream is open.
    began: Instant,
    /// When the loop last came round. At first, when that was claimed which makes this relay
    /// the one that sends.
    awake_at: Instant,
    /// Ended by [`check_awake`](Self::check_awake).
    was_frozen: bool,
    /// Ended by an event that was put off.
    has_put_off: bool,
    stopping: bool,
    /// Watches the slices of a divided relay.
    watch: Option<Watch>,
    /// It is to end as it should serve other slices, unless it has not drained by then.
    dividing: Option<Instant>,
}

/// How an attempt ends that nothing has gone wrong with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// The relay was told to stop.
    Stopped,
    /// The relay is to serve other slices.
    Divided,
}

/// Rows taken in one go before anything else is looked at.
const BURST: usize = 256;

/// How often liveness, progress and the brokers are looked at.
const TICK: Duration = Duration::from_secs(1);

/// A process that did not come round for this long was frozen: a tick ends each wait,
/// and a burst takes less.
const FROZEN_MIN: Duration = Duration::from_secs(2);

/// After how long without a delivery the brokers are asked for a sign of life.
const PROBE_INTERVAL: Duration = Duration::from_secs(4);

/// How long the last fence may take to be written, and then to come out of the slot.
const LAST_FENCE_MAX: Duration = Duration::from_millis(500);

impl<'r> Attempt<'r> {
    /// Carries events until something breaks, or `shutdown` becomes true and
    /// everything that was read is delivered and confirmed.
    pub(super) async fn run(
        relay: &'r mut Relay,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Result<Ended> {
        let connected = tokio::select! {
            _ = shutdown.wait_for(|stop| *stop) => None,
            connected = connect(relay) => Some(connected?),
        };
        let Some(connected) = connected else {
            relay.leave().await;
            return Ok(Ended::Stopped);
        };
        let mut attempt = Attempt::new(relay, connected);
        let result = attempt.carry(shutdown).await;
        attempt.part(result).await
    }

    fn new(relay: &'r mut Relay, connected: Connected) -> Self {
        let (metrics, health) = (relay.metrics.clone(), relay.health.clone());
        let settings = &relay.settings;
        let database = settings.database.display();
        let session = connected.session;
        let mut watch = None;
        match (&connected.source, &connected.hold) {
            (Source::Wal(_), _) => info!(slot = settings.contract.slot, database, "streaming"),
            (Source::Poll(_), Hold::Slices(_, held)) => {
                let served = served(held);
                info!(relay = settings.contract.slot, database, "{served}");
                metrics.slices.set(held.slices.count() as i64);
                let start = |division| Watch::start(division, Arc::clone(&session), held.clone());
                watch = relay.division().map(start);
            }
            (Source::Poll(_), _) => info!(relay = settings.contract.slot, database, "polling"),
            (Source::Claim(_), _) => info!(
                table = settings.contract.outbox.quoted(),
                database, "polling, by claims"
            ),
        }
        health.streaming();
        relay.cue.stands_by(false);
        let encoder = || {
            Encoder::new(settings.format, settings.route.clone())
                .with_headers(settings.headers)
                .placing(settings.contract.outbox.placements())
                .keyed(settings.contract.outbox.is_keyed())
                .timed(settings.contract.outbox.preset.times_records())
        };
        let marker = connected.marks.as_ref().map(Marks::marker);
        let (parking, stores) = connected.parked.unzip();
        let aside = parking
            .as_ref()
            .zip(stores.clone())
            .map(|(parking, stores)| {
                Aside::start(stores.schedule, stores.queue, || Tools {
                    encoder: encoder(),
                    outbox: outbox(relay),
                    kafka: settings.kafka.clone(),
                    settings: settings.parked.clone(),
                    metrics: metrics.clone(),
                    marker: marker.clone(),
                    shared: Arc::clone(&parking.shared),
                })
            });
        // From here on the table and what is held say so.
        relay.refused_topics.clear();
        let parks = parking.is_some() && settings.parked.parks();
        Self {
            parking,
            aside,
            stores,
            watch,
            dividing: None,
            control: Control::start(
                session,
                settings,
                connected.hold,
                relay.nonce.clone(),
                metrics.clone(),
                health.clone(),
                relay.cue.clone(),
            ),
            source: connected.source,
            marks: connected.marks,
            encoder: encoder(),
            window: Window::new(
                connected.publisher,
                std::mem::take(&mut relay.suspects),
                parks,
                metrics,
                health,
            ),
            held: None,
            resolved_topic: None,
            resolving: JoinSet::new(),
            resolving_name: None,
            refused_topics: RefusedTopics::default(),
            topic_refused_at: None,
            probing: JoinSet::new(),
            fencing: JoinSet::new(),
            last_fence: None,
            began: Instant::now(),
            awake_at: connected.claimed_at,
            was_frozen: false,
            has_put_off: false,
            stopping: false,
            relay,
        }
    }

    async fn carry(&mut self, shutdown: &mut watch::Receiver<bool>) -> Result<Ended> {
        let mut tick = tokio::time::interval(TICK);
        let mut deadline = None;
        let mut gather = Gather::start();
        let mut gathered = 0;
        let mut waited = Duration::ZERO;
        loop {
            self.look_at_clock();
            self.settle()?;
            if self.is_ending() && self.is_drained() {
                return self.end(deadline).await;
            }
            self.check_awake(waited)?;
            self.release_held()?;
            let read = self.read_burst()?;
            let may_read = self.may_read();
            if read > 0 {
                gathered += read;
            } else {
                self.window.push(self.held.is_some() || self.is_ending());
                let gathered = std::mem::take(&mut gathered);
                let may_gather = may_read && matches!(self.source, Source::Wal(_));
                if may_gather && let Some(pause) = gather.pause(gathered, self.window.is_many()) {
                    std::thread::sleep(pause);
                    tokio::task::yield_now().await;
                    continue;
                }
            }
            let since = Instant::now();
            let mut arrived = None;
            tokio::select! {
                biased;
                _ = shutdown.wait_for(|stop| *stop), if !self.stopping => {
                    self.stopping = true;
                    self.rest_aside(true);
                    // It asks for no more slices.
                    self.watch = None;
                    // A relay that is behind does not wait for what it has not read.
                    if read == 0 && self.source.received() >= self.control.wal_end_before() {
                        let fence = timeout(LAST_FENCE_MAX, self.control.last_fence());
                        // Without it more is repeated if the mode is changed next, or the
                        // slot lost.
                        self.fencing.spawn(async { fence.await.ok()?.ok()? });
                    }
                    deadline = Some(Instant::now() + self.relay.settings.shutdown_timeout);
                }
                () = Watch::changed(&mut self.watch), if !self.stopping => {
                    self.rest_aside(true);
                    self.dividing = Some(Instant::now() + DRAIN_MAX);
                }
                () = sleep_until(self.dividing), if !self.stopping => self.go_on(),
                error = self.control.failed() => return Err(error),
                () = sleep_until(deadline) => return Err(self.not_drained()),
                _ = tick.tick() => self.look_after()?,
                Some(topic) = self.resolving.join_next() => self.resolved(joined(topic))?,
                Some(alive) = self.probing.join_next() => self.probed(joined(alive)),
                Some(fence) = self.fencing.join_next() => {
                    let until = Instant::now() + LAST_FENCE_MAX;
                    // It may have come out already.
                    let fence = fence.ok().flatten().filter(|fence| !self.control.has_reached(fence));
                    self.last_fence = fence.map(|fence| (fence, until));
                }
                () = sleep_until(self.last_fence.as_ref().map(|(_, until)| *until)) => {
                    self.last_fence = None;
                }
                () = tokio::task::yield_now(), if read > 0 => {}
                () = self.window.publisher.reported() => {}
                parked = parking::next(self.parking.as_mut()) => {
                    for sequence in parked? {
                        self.window.parked(sequence);
                    }
                }
                news = aside::news(self.aside.as_mut()) => news?,
                marked = marks::next(self.marks.as_mut()) => self.confirm(marked?),
                item = self.source.next(), if may_read => arrived = Some(item?),
            }
            waited = since.elapsed();
            if let Some(item) = arrived {
                self.look_at_clock();
                self.check_awake(waited)?;
                self.take(item)?;
            }
        }
    }

    /// Whether nothing more is to be read than must be for an orderly end.
    fn is_ending(&self) -> bool {
        self.stopping || self.dividing.is_some()
    }

    /// It cannot drain for now: others have to wait for the slices they want.
    fn go_on(&mut self) {
        self.dividing = None;
        self.rest_aside(false);
        if let Some(watch) = &mut self.watch {
            watch.go_on(false);
        }
    }

    /// Once for all that is done before anything is waited for.
    fn look_at_clock(&mut self) {
        let now = Instant::now();
        self.window.look_at_clock(now.into_std());
        self.source.look_at_clock(now.into_std());
    }

    /// Ends the attempt of a process that was frozen, before it sends what has come in
    /// the meantime: the server may have ended its walsender, and another relay may have
    /// sent the same.
    ///
    /// A tick ends each wait, so that one that has `waited` for long was frozen.
    fn check_awake(&mut self, waited: Duration) -> Result<()> {
        let asleep = std::mem::replace(&mut self.awake_at, Instant::now()).elapsed();
        // The last status message may have left a status interval before, which is half
        // of this timeout at most.
        let status = self.relay.settings.wal_sender_timeout / 2;
        let given_up = self.control.frozen_max().unwrap_or(status);
        let limit = given_up.max(FROZEN_MIN);
        // If the next attempt finds the same, it is our own work that takes as long, and
        // must get done.
        let is_work = self.relay.was_frozen && !self.window.has_delivered && waited < limit;
        if asleep < limit || is_work {
            return Ok(());
        }
        self.was_frozen = true;
        let message = format!(
            "this process did not run for {:.1} s, and the server may have given it up",
            asleep.as_secs_f64()
        );
        Err(Error::new(ErrorKind::DatabaseAway, message))
    }

    /// Takes what has already arrived.
    fn read_burst(&mut self) -> Result<usize> {
        let mut read = 0;
        while read < BURST && self.may_read() {
            let Some(item) = self.source.try_next()? else {
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
            && self
                .window
                .has_room(settings.in_flight_max, settings.in_flight_bytes_max)
            && self.marks.as_ref().is_none_or(|marks| marks.has_room(settings.in_flight_max))
            // A stop reads on to the end of the transaction, as only that can be
            // confirmed, and of what was sent before.
            && (!self.is_ending()
                || self.source.is_amid()
                || !self.has_read_on()
                || self.awaits_fence())
    }

    fn awaits_fence(&self) -> bool {
        !self.fencing.is_empty() || self.last_fence.is_some()
    }

    fn take(&mut self, item: Item) -> Result<()> {
        match item {
            Item::Row(row) => {
                failpoint!("received");
                self.offer(row)
            }
            Item::Position(position) => {
                failpoint!("positioned");
                self.window.push_position(position);
                Ok(())
            }
        }
    }

    /// Turns delivery reports into progress: the only place where a position is
    /// confirmed.
    fn settle(&mut self) -> Result<()> {
        let (progress, stop) = self.window.settle();
        let progress = match &mut self.marks {
            Some(marks) => marks.reach(progress, self.window.head()),
            None => progress,
        };
        self.confirm(progress);
        stop.map_or(Ok(()), |stop| Err(self.stopped(stop)))
    }

    /// Everything before this is delivered, and marked where it is to be.
    fn confirm(&mut self, progress: Progress) {
        if progress.has_moved {
            self.relay.health.moved();
        }
        let has_events = progress.events > 0;
        if has_events {
            self.window.confirmed();
        }
        if let Some(lsn) = progress.confirm {
            failpoint!("confirming");
            self.source.confirm(lsn);
            failpoint!("confirmed");
            if has_events {
                self.control.confirmed(lsn);
            }
        }
        if let Some(mark) = progress.mark {
            self.last_fence
                .take_if(|(fence, _)| mark.0 == Mark::Fence(fence.clone()));
            self.control.reached(mark, has_events);
        }
    }

    /// Whether all rows are marked that can be confirmed.
    fn is_marked(&self) -> bool {
        self.marks.as_ref().is_none_or(Marks::are_done)
    }

    fn look_after(&mut self) -> Result<()> {
        let may_read = self.may_read();
        self.source.check_alive(may_read)?;
        self.update_gauges();
        if self.control.walsender_is_ending() {
            return Err(walsender_is_ending());
        }
        if let Some(sent_at) = self.window.oldest_sent_at()
            && sent_at.elapsed() > OPEN_MAX
        {
            let message = "a delivery has taken so long that brokers forget the producer";
            return Err(Error::new(ErrorKind::BrokerAway, message));
        }
        let silence = self.source.silence();
        let is_overdue =
            silence > SILENCE_MAX && self.source.received() < self.control.wal_end_before();
        let health = &self.relay.health;
        health.overdue(is_overdue.then_some(silence));
        health.waiting(self.waiting());
        if health.silence(Server::Kafka) > PROBE_INTERVAL && self.probing.is_empty() {
            self.probing
                .spawn(self.window.publisher.probe(PROBE_TIMEOUT));
        }
        Ok(())
    }

    /// What the oldest event waits for, if there is any.
    fn waiting(&self) -> Option<String> {
        let settings = &self.relay.settings;
        let mut waiting = match (self.window.waiting(), &self.held) {
            // What is in flight lies behind them.
            _ if !self.is_marked() => "rows are being marked published".to_owned(),
            (Some(waiting), _) => waiting,
            (None, Some(row)) => format!("{} waits for its topic", self.source.name_of(row)),
            (None, None) if self.source.locked() > 0 => locked(self.source.locked()),
            (None, None) if self.source.mark().is_some() || self.source.is_asking() => {
                "the table is read".to_owned()
            }
            (None, None) => return None,
        };
        if self
            .window
            .is_full(settings.in_flight_max, settings.in_flight_bytes_max)
        {
            waiting += ", as many as may be in flight: no more are read";
        }
        Some(waiting)
    }

    fn probed(&mut self, alive: Result<()>) {
        let link = alive.map_err(|error| error.chain());
        self.relay.health.brokers(link);
    }

    fn update_gauges(&self) {
        let metrics = &self.relay.metrics;
        let bytes = |lsn: PgLsn| i64::try_from(u64::from(lsn)).unwrap_or(i64::MAX);
        metrics.received_lsn.set(bytes(self.source.received()));
        metrics.confirmed_lsn.set(bytes(self.source.confirmed()));
        self.window.update_gauges();
    }
}

/// Why rows that are claimed cannot be completed.
fn locked(rows: usize) -> String {
    format!("{rows} of the rows that are done with are locked by somebody else")
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
