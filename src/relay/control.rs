//! The relay's ordinary session, which controls what the stream does not: it compares the publication, writes fences,
//! stores how far the relay is, and tells at once when Postgres goes away.
//!
//! A *fence* is a logical message that carries `pg_current_snapshot()`. When it
//! comes out of the slot, everything visible in that snapshot lies before it, so
//! once all that is delivered the snapshot is stored in the checkpoint: from it
//! a lost slot is recovered from the table. The first is written at the start, so
//! that a relay that never lives for long still leaves some behind. Each stands at the
//! end of the WAL: a relay that is behind stores none before it has come there.
//!
//! One more is written when the relay is told to stop, so that whatever goes on from the
//! table, polling or a new slot, begins where the relay has ended.
//!
//! The confirmed position is stored too, as the server may forget it in a crash.
//!
//! A relay that claims rows has no checkpoint: what it has delivered it completes, row by
//! row, and the beat renews its claims.
//!
//! A relay that polls has a lease instead of a slot. Each write renews it, and where
//! there is nothing to write, the beat does. No write is waited for longer than until
//! the lease may be over: then the attempt is.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_postgres::types::{PgLsn, Type};
use tracing::{debug, warn};

use super::RelaySettings;
use super::division::standings;
use super::meter::Cue;
use crate::catalog::{self, Checkpoint, Held, LEASE, Slices, SlotState};
use crate::contract::Contract;
use crate::database::{self, Session};
use crate::error::{Error, ErrorKind, Result};
use crate::health::{Health, SILENCE_MAX, Server};
use crate::lock::lock;
use crate::metrics::Metrics;
use crate::source::claim::{self, Claims};
use crate::source::{HEARTBEAT_PREFIX, Mark};

/// How often a lease is renewed.
pub(super) const RENEW_INTERVAL: Duration = Duration::from_secs(1);

/// How long a write may take that renews it.
const RENEWAL_MAX: Duration = LEASE.saturating_sub(RENEW_INTERVAL);

/// A mark of a divided relay is a new version of each slice's row, and while a transaction
/// stays open anywhere in the database, old ones are gone through and not cleaned up: after
/// 1,200 marks of 64 slices beside one a write took 3 ms instead of 0.4, after 3,600 of them
/// 39 ms. So the next comes after so many times as long.
const WRITE_PAUSE: u32 = 4;

/// How often the slot is looked at: for the metrics, and for what the stream owes us.
const SLOT_INTERVAL: Duration = Duration::from_secs(5);

/// How often the confirmed position is stored while events flow: what a crash of
/// Postgres repeats, and one small write.
const STORE_INTERVAL: Duration = Duration::from_secs(1);

/// What makes this relay the one that sends.
#[derive(Clone)]
pub(super) enum Hold {
    /// The slot of this checkpoint.
    Slot(Checkpoint),
    /// The lease of this checkpoint.
    Lease(Checkpoint),
    /// Those of slices, which stand in its place where it is divided.
    Slices(Checkpoint, Held),
    /// Its claims.
    Claims(Arc<Claims>),
}

impl Hold {
    /// How long the server may take for what keeps it.
    fn answer_max(&self) -> Duration {
        match self {
            Self::Slot(_) => SILENCE_MAX,
            Self::Lease(_) | Self::Slices(..) => RENEWAL_MAX,
            Self::Claims(_) => claim::RENEWAL_MAX,
        }
    }

    fn checkpoint(&self) -> Option<&Checkpoint> {
        match self {
            Self::Slot(checkpoint) | Self::Lease(checkpoint) | Self::Slices(checkpoint, _) => {
                Some(checkpoint)
            }
            Self::Claims(_) => None,
        }
    }

    /// What holds in SQL, of the relay $1, as long as it is kept; where a relay parks.
    pub(super) fn fence(&self) -> Option<String> {
        match self {
            Self::Slot(checkpoint) | Self::Lease(checkpoint) => Some(checkpoint.fence()),
            Self::Slices(_, held) => Some(held.fence()),
            Self::Claims(_) => None,
        }
    }

    /// The slices that are served.
    pub(super) fn slices(&self) -> Slices {
        match self {
            Self::Slices(_, held) => held.slices,
            _ => Slices::ALL,
        }
    }

    fn beat_interval(&self, heartbeat: Duration) -> Duration {
        match self {
            Self::Slot(_) => heartbeat,
            Self::Lease(_) | Self::Slices(..) => RENEW_INTERVAL,
            Self::Claims(_) => claim::RENEW_INTERVAL,
        }
    }
}

pub(super) struct Control {
    shared: Arc<Shared>,
    task: JoinSet<Error>,
    mark: watch::Sender<Option<(u64, Reached)>>,
}

/// A mark, and where it stands.
pub(super) type Reached = (Mark, PgLsn);

struct Shared {
    session: Arc<Session>,
    contract: Contract,
    hold: Hold,
    nonce: String,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    cue: Arc<Cue>,
    traffic: AtomicBool,
    fence: Mutex<Option<String>>,
    confirmed: AtomicU64,
    stored: AtomicU64,
    /// How many marks behind events were reached, and how many of them are stored.
    marks_reached: AtomicU64,
    marks_stored: AtomicU64,
    is_ending: AtomicBool,
    /// Whether rows before the slot are still to be sent from their copy.
    has_copy: AtomicBool,
    /// Whether it was said that there is a slot that nobody reads.
    has_warned: AtomicBool,
    /// The end of the WAL, as of the last look and of the one before it.
    wal_end: AtomicU64,
    wal_end_before: AtomicU64,
}

impl Control {
    /// Starts to beat on a session that was checked.
    pub(super) fn start(
        session: Arc<Session>,
        settings: &RelaySettings,
        hold: Hold,
        nonce: String,
        metrics: Arc<Metrics>,
        health: Arc<Health>,
        cue: Arc<Cue>,
    ) -> Self {
        let intervals = Intervals {
            beat: hold.beat_interval(settings.heartbeat_interval),
            mark: settings.status_interval,
        };
        let is_amid_gap = |checkpoint: &Checkpoint| checkpoint.gap.is_some();
        let has_copy =
            !settings.contract.outbox.is_ours() && hold.checkpoint().is_some_and(is_amid_gap);
        let shared = Arc::new(Shared {
            session,
            contract: settings.contract.clone(),
            hold,
            nonce,
            metrics,
            health,
            cue,
            traffic: AtomicBool::new(true),
            fence: Mutex::new(None),
            confirmed: AtomicU64::new(0),
            stored: AtomicU64::new(0),
            marks_reached: AtomicU64::new(0),
            marks_stored: AtomicU64::new(0),
            is_ending: AtomicBool::new(false),
            has_copy: AtomicBool::new(has_copy),
            has_warned: AtomicBool::new(false),
            wal_end: AtomicU64::new(0),
            wal_end_before: AtomicU64::new(0),
        });
        let (mark, marks) = watch::channel(None);
        let mut task = JoinSet::new();
        task.spawn(run(Arc::clone(&shared), marks, intervals));
        Self { shared, task, mark }
    }

    /// The snapshot of a last fence: it is written now, unless there were no events since
    /// the one before.
    pub(super) fn last_fence(&self) -> impl Future<Output = Result<Option<String>>> + 'static {
        let shared = Arc::clone(&self.shared);
        async move {
            if let Hold::Slot(_) = shared.hold {
                shared.write_fence().await?;
            }
            Ok(shared.newest_fence())
        }
    }

    /// Resolves with the reason when the session is gone or the publication is
    /// not what it was. Cancel-safe.
    pub(super) async fn failed(&mut self) -> Error {
        match self.task.join_next().await {
            Some(Ok(error)) => error,
            _ => Error::new(ErrorKind::Unexpected, "the control session ended"),
        }
    }

    /// Whether the walsender was told to end, and waits until we read: as does the
    /// server's checkpoint, if that gives the slot up.
    pub(super) fn walsender_is_ending(&self) -> bool {
        self.shared.is_ending.load(Ordering::Relaxed)
    }

    /// Where the WAL ended some seconds ago. A stream that lives has come up to it, or
    /// sends what lies before it: even where nothing is published, it tells positions.
    /// Only a server that decodes a large transaction, or whose WAL ends in the midst of
    /// a record, is late with that, and pings at half of `wal_sender_timeout`.
    pub(super) fn wal_end_before(&self) -> PgLsn {
        self.shared.wal_end_before.load(Ordering::Relaxed).into()
    }

    /// There were events: the next beat writes a fence.
    pub(super) fn had_traffic(&self) {
        self.shared.traffic.store(true, Ordering::Relaxed);
    }

    /// Whether this fence was the newest mark that was reached.
    pub(super) fn has_reached(&self, fence: &str) -> bool {
        let newest = self.mark.borrow();
        matches!(&*newest, Some((_, (Mark::Fence(snapshot), _))) if snapshot == fence)
    }

    /// Everything before this mark is delivered: store it. `has_events` says whether
    /// anything lies between it and the one before.
    pub(super) fn reached(&self, mark: Reached, has_events: bool) {
        let ends_gap = matches!(mark.0, Mark::Fence(_))
            && matches!(&*self.mark.borrow(), Some((_, (Mark::Seq(_), _))));
        let is_apart = matches!(mark.0, Mark::Standings(_));
        // Until its end is stored, a gap seems to be amid, and slices stand apart.
        let counts = u64::from(has_events || ends_gap || is_apart);
        let marks = &self.shared.marks_reached;
        let number = marks.fetch_add(counts, Ordering::Relaxed) + counts;
        self.mark.send_replace(Some((number, mark)));
    }

    /// Events are delivered up to this position: store it in time.
    pub(super) fn confirmed(&self, lsn: PgLsn) {
        self.shared.confirmed.store(lsn.into(), Ordering::Relaxed);
    }

    /// Whether the last position that lies behind events is stored.
    pub(super) fn is_stored(&self) -> bool {
        self.shared.is_stored()
    }

    /// Stores the last mark and position, at the end of an attempt: nothing is renewed or
    /// stored behind it.
    pub(super) async fn store(&mut self) -> Result<()> {
        let answer_max = self.shared.hold.answer_max();
        self.end_beat(answer_max).await;
        let mark = self.mark.borrow().clone();
        if let Some((number, mark)) = mark {
            self.shared.store_mark(number, mark).await?;
        }
        if !self.is_stored() {
            self.shared.store_position().await?;
        }
        Ok(())
    }

    /// Stores the last mark and position, and waits until the slot, if there is one, has
    /// confirmed this position.
    pub(super) async fn flush(&mut self, lsn: PgLsn) -> Result<()> {
        self.store().await?;
        let client = &self.shared.session.client;
        match &self.shared.hold {
            Hold::Slot(_) => {}
            Hold::Claims(claims) if claims.locked() > 0 => {
                // Others need not wait for what was not sent.
                let _ = claims.release(client).await;
                return claims.settle_all(client).await;
            }
            _ => return Ok(()),
        }
        loop {
            let slot = &self.shared.contract.slot;
            let state = catalog::slot_state(&self.shared.session.client, slot).await?;
            if state.confirmed_flush_lsn >= Some(lsn) {
                return Ok(());
            }
            if state.is_ending {
                return Err(walsender_is_ending());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends what renews and stores by itself, so that no older mark and no renewal comes
    /// behind what is written next. A write about claims is waited for, up to `answer_max`: its
    /// answer says by which tokens they are ours.
    async fn end_beat(&mut self, answer_max: Duration) {
        let Self { shared, task, .. } = self;
        let writing = match &shared.hold {
            Hold::Claims(claims) => timeout(answer_max, claims.pause()).await.ok(),
            _ => None,
        };
        task.shutdown().await;
        drop(writing);
    }

    /// Lets another relay take over at once, where that is ours to say. Whether that is
    /// done.
    pub(super) async fn release(&mut self) -> bool {
        if let Hold::Slot(_) = self.shared.hold {
            return true;
        }
        self.end_beat(RELEASE_MAX).await;
        let shared = &self.shared;
        let client = &shared.session.client;
        let released = async {
            match &shared.hold {
                Hold::Slot(_) => Ok(()),
                Hold::Lease(checkpoint) => checkpoint.release(client, &shared.contract).await,
                Hold::Slices(_, held) => held.release(client, &shared.contract).await,
                Hold::Claims(claims) => claims.release(client).await,
            }
        };
        // If it cannot be said, it ends by itself.
        matches!(timeout(RELEASE_MAX, released).await, Ok(Ok(())))
    }

    /// Gives slices that others want to them, once everything is stored. The rest stays
    /// leased for the next attempt.
    pub(super) async fn hand_over(&mut self) -> Result<()> {
        self.end_beat(RELEASE_MAX).await;
        let shared = &self.shared;
        let Hold::Slices(_, held) = &shared.hold else {
            return Ok(());
        };
        let handed = held.hand_over(&shared.session.client, &shared.contract);
        database::within(RENEWAL_MAX, "hand slices over", handed).await
    }

    /// Whether it holds slices: what others took of them is not what it stores.
    pub(super) fn is_divided(&self) -> bool {
        matches!(self.shared.hold, Hold::Slices(..))
    }

    /// The session, and the checkpoint that was checked in it.
    pub(super) fn checked(&self) -> (Arc<Session>, Option<Checkpoint>) {
        let checkpoint = self.shared.hold.checkpoint().cloned();
        (Arc::clone(&self.shared.session), checkpoint)
    }

    /// How long this process may have been frozen and still be the one that is at work.
    pub(super) fn frozen_max(&self) -> Option<Duration> {
        match &self.shared.hold {
            Hold::Slot(_) => None,
            hold => Some(hold.answer_max()),
        }
    }
}

/// How long a lease may take to be released.
const RELEASE_MAX: Duration = Duration::from_millis(500);

struct Intervals {
    beat: Duration,
    /// Between two writes of marks.
    mark: Duration,
}

/// The walsender was told to end, and only a client that reads or goes lets it.
pub(super) fn walsender_is_ending() -> Error {
    let message = "the server has told its walsender to end, which waits for us: it is let go";
    Error::new(ErrorKind::DatabaseAway, message)
}

async fn run(
    shared: Arc<Shared>,
    mut mark: watch::Receiver<Option<(u64, Reached)>>,
    intervals: Intervals,
) -> Error {
    let is_wal = matches!(shared.hold, Hold::Slot(_));
    let has_left_slot = shared
        .hold
        .checkpoint()
        .is_some_and(Checkpoint::has_left_slot);
    if !is_wal && !has_left_slot {
        // It may have been dropped since it was last looked at.
        shared.metrics.slot(None);
    }
    let answer_max = shared.hold.answer_max();
    let mut beat = tokio::time::interval(intervals.beat);
    let mut slot = tokio::time::interval(SLOT_INTERVAL);
    let mut store = tokio::time::interval(STORE_INTERVAL);
    let mut mark_due = Instant::now();
    loop {
        let marked = async {
            sleep_until(mark_due).await;
            mark.changed().await
        };
        let result = tokio::select! {
            error = shared.session.ended() => return error,
            _ = beat.tick() => timeout(answer_max, shared.beat()).await,
            claims = shared.news_of_claims() => timeout(answer_max, claims.settle(&shared.session.client)).await,
            _ = slot.tick(), if is_wal || has_left_slot => {
                timeout(answer_max, shared.look_at_slot()).await
            }
            _ = store.tick(), if is_wal => {
                if shared.is_stored() { continue }
                timeout(answer_max, shared.store_position()).await
            }
            Ok(()) = marked => {
                let Some((number, mark)) = mark.borrow_and_update().clone() else { continue };
                let since = Instant::now();
                let stored = timeout(answer_max, shared.store_mark(number, mark)).await;
                mark_due = since + intervals.mark.max(shared.pause_after(since.elapsed()));
                stored
            }
        };
        match result {
            Ok(Ok(())) => shared.health.heard(Server::Postgres),
            Ok(Err(error)) => return error,
            // A session that waits for a lock compares nothing: it is as good as gone. And a
            // lease that is not renewed is over.
            Err(_) => {
                let message = format!(
                    "the control session does not answer within {} s",
                    answer_max.as_secs()
                );
                return Error::new(ErrorKind::DatabaseAway, message);
            }
        }
    }
}

impl Shared {
    async fn beat(&self) -> Result<()> {
        let client = &self.session.client;
        match &self.hold {
            Hold::Slot(checkpoint) => {
                self.compare_publication(checkpoint).await?;
                self.write_fence().await
            }
            Hold::Lease(checkpoint) => checkpoint.renew(client, &self.contract).await,
            Hold::Slices(_, held) => held.renew(client, &self.contract).await,
            Hold::Claims(claims) => claims.renew(client).await,
        }
    }

    /// Waits until there is something to write about claims besides what is completed.
    async fn news_of_claims(&self) -> &Claims {
        match &self.hold {
            Hold::Claims(claims) => {
                claims.news.notified().await;
                claims
            }
            _ => std::future::pending().await,
        }
    }

    /// Writes a fence if there were events since the last.
    async fn write_fence(&self) -> Result<()> {
        if !self.traffic.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        // Transactional, so that it stands behind every commit that its
        // snapshot sees.
        let sql = "SELECT now, pg_logical_emit_message(true, $1, $2 || ' ' || now)::text \
                   FROM (SELECT pg_current_snapshot()::text AS now) AS s";
        let parameters = [
            (&HEARTBEAT_PREFIX as _, Type::TEXT),
            (&self.nonce as _, Type::TEXT),
        ];
        let written = self.session.client.query_typed(sql, &parameters).await;
        let written = written.map_err(|error| database::sort("write a heartbeat", error))?;
        let fence = written.first().map(|row| row.get(0));
        *lock(&self.fence) = fence;
        Ok(())
    }

    /// The copy of rows before the slot has served. Set-up drops what is left of it.
    async fn empty_copy(&self) {
        if !self.has_copy.swap(false, Ordering::Relaxed) {
            return;
        }
        let copy = self.contract.backfill_table();
        // Not for long, as leases and fences wait behind it: somebody may be reading it.
        let sql = format!("SET LOCAL lock_timeout = '1s'; TRUNCATE {copy}");
        if let Err(error) = self.session.client.batch_execute(&sql).await {
            let error = database::sort(format!("empty {copy}"), error);
            warn!(
                "{}; nobody needs it any more: DROP TABLE {copy}",
                error.chain()
            );
        }
    }

    /// How long to write no mark after one that took so long.
    fn pause_after(&self, write: Duration) -> Duration {
        match self.hold {
            Hold::Slices(..) => write * WRITE_PAUSE,
            _ => Duration::ZERO,
        }
    }

    /// The snapshot of the fence that was written last.
    fn newest_fence(&self) -> Option<String> {
        lock(&self.fence).clone()
    }

    async fn compare_publication(&self, checkpoint: &Checkpoint) -> Result<()> {
        catalog::compare_publication(&self.session.client, &self.contract, checkpoint).await
    }

    async fn look_at_slot(&self) -> Result<()> {
        let (client, slot) = (&self.session.client, &self.contract.slot);
        if !matches!(self.hold, Hold::Slot(_)) {
            let left = catalog::find_slot(client, slot).await?;
            self.tell_of_left_slot(left.as_ref());
            return Ok(());
        }
        let state = catalog::slot_state(client, slot).await?;
        self.metrics.slot(Some(&state));
        let before = self.wal_end.swap(state.wal_end.into(), Ordering::Relaxed);
        self.wal_end_before.store(before, Ordering::Relaxed);
        self.is_ending.store(state.is_ending, Ordering::Relaxed);
        Ok(())
    }

    /// A change to polling that was cut short has left a slot, until set-up drops it.
    fn tell_of_left_slot(&self, left: Option<&SlotState>) {
        self.metrics.slot(left);
        let complaint = left.map(|_| {
            format!(
                "replication slot \"{}\" is left from before this relay polled, and keeps WAL until the disk is \
                 full: run `postbox setup --mode poll`, which drops it",
                self.contract.slot
            )
        });
        if let Some(complaint) = &complaint
            && !self.has_warned.swap(true, Ordering::Relaxed)
        {
            warn!("{complaint}");
        }
        self.health.left_behind(complaint);
    }

    fn is_stored(&self) -> bool {
        let (reached, stored) = match &self.hold {
            Hold::Slot(_) => (&self.confirmed, &self.stored),
            Hold::Claims(claims) if claims.locked() > 0 => return false,
            _ => (&self.marks_reached, &self.marks_stored),
        };
        reached.load(Ordering::Relaxed) <= stored.load(Ordering::Relaxed)
    }

    async fn store_position(&self) -> Result<()> {
        let Hold::Slot(checkpoint) = &self.hold else {
            return Ok(());
        };
        let confirmed = self.confirmed.load(Ordering::Relaxed);
        let client = &self.session.client;
        let lsn = confirmed.into();
        checkpoint
            .store_position(client, &self.contract, lsn)
            .await?;
        // A store at the end of an attempt may overtake the one of the interval.
        self.stored.fetch_max(confirmed, Ordering::Relaxed);
        Ok(())
    }

    async fn store_mark(&self, number: u64, (mark, lsn): Reached) -> Result<()> {
        let (client, contract) = (&self.session.client, &self.contract);
        match (&self.hold, mark) {
            (Hold::Claims(claims), Mark::Claims(rows)) => claims.complete(client, rows).await?,
            (Hold::Slices(_, held), mark) => {
                let standings = standings(held, mark);
                held.store(client, contract, &standings).await?;
            }
            (Hold::Slot(checkpoint) | Hold::Lease(checkpoint), Mark::Seq(gap)) => {
                checkpoint.store_seq(client, contract, &gap).await?;
            }
            (Hold::Slot(checkpoint) | Hold::Lease(checkpoint), Mark::Fence(snapshot)) => {
                debug!(%lsn, snapshot, "fence reached");
                if let Hold::Slot(_) = self.hold {
                    // Between the last beat and the fence it may have changed and hidden
                    // rows that the fence sees: then the older fence stays.
                    self.compare_publication(checkpoint).await?;
                }
                failpoint!("fencing");
                checkpoint
                    .store_fence(client, contract, lsn, &snapshot)
                    .await?;
                self.cue.fenced();
                self.empty_copy().await;
            }
            (_, mark) => unreachable!("{mark:?} is of another source"),
        }
        // A store at the end of an attempt may overtake the one of the interval.
        self.marks_stored.fetch_max(number, Ordering::Relaxed);
        Ok(())
    }
}
