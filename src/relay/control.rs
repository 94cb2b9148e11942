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
//! The confirmed position is stored too, as the server may forget it in a crash.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_postgres::types::{PgLsn, ToSql};
use tracing::debug;

use crate::catalog::{self, Checkpoint};
use crate::contract::Contract;
use crate::database::{self, Session};
use crate::error::{Error, ErrorKind, Result};
use crate::health::{Health, SILENCE_MAX, Server};
use crate::metrics::Metrics;
use crate::source::{HEARTBEAT_PREFIX, Mark};

/// How often the slot is looked at: for the metrics, and for what the stream owes us.
const SLOT_INTERVAL: Duration = Duration::from_secs(5);

/// How often the confirmed position is stored while events flow: what a crash of
/// Postgres repeats, and one small write.
const STORE_INTERVAL: Duration = Duration::from_secs(1);

pub(super) struct Control {
    shared: Arc<Shared>,
    task: JoinSet<Error>,
    mark: watch::Sender<Option<Reached>>,
}

/// A mark, and where it stands.
pub(super) type Reached = (Mark, PgLsn);

struct Shared {
    session: Session,
    contract: Contract,
    checkpoint: Checkpoint,
    nonce: String,
    metrics: Arc<Metrics>,
    health: Arc<Health>,
    traffic: AtomicBool,
    confirmed: AtomicU64,
    stored: AtomicU64,
    is_ending: AtomicBool,
    /// The end of the WAL, as of the last look and of the one before it.
    wal_end: AtomicU64,
    wal_end_before: AtomicU64,
}

impl Control {
    /// Starts to beat on a session that was checked.
    pub(super) fn start(
        session: Session,
        contract: Contract,
        checkpoint: Checkpoint,
        interval: Duration,
        nonce: String,
        metrics: Arc<Metrics>,
        health: Arc<Health>,
    ) -> Self {
        let shared = Arc::new(Shared {
            session,
            contract,
            checkpoint,
            nonce,
            metrics,
            health,
            traffic: AtomicBool::new(true),
            confirmed: AtomicU64::new(0),
            stored: AtomicU64::new(0),
            is_ending: AtomicBool::new(false),
            wal_end: AtomicU64::new(0),
            wal_end_before: AtomicU64::new(0),
        });
        let (mark, marks) = watch::channel(None);
        let mut task = JoinSet::new();
        task.spawn(run(Arc::clone(&shared), marks, interval));
        Self { shared, task, mark }
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

    /// Everything before this mark is delivered: store it.
    pub(super) fn reached(&self, mark: Reached) {
        self.mark.send_replace(Some(mark));
    }

    /// Events are delivered up to this position: store it in time.
    pub(super) fn confirmed(&self, lsn: PgLsn) {
        self.shared.confirmed.store(lsn.into(), Ordering::Relaxed);
    }

    /// Whether the last position that lies behind events is stored.
    pub(super) fn is_stored(&self) -> bool {
        self.shared.is_stored()
    }

    /// Stores the last mark and position.
    pub(super) async fn store(&self) -> Result<()> {
        let mark = self.mark.borrow().clone();
        if let Some(mark) = mark {
            self.shared.store_mark(mark).await?;
        }
        if !self.is_stored() {
            self.shared.store_position().await?;
        }
        Ok(())
    }

    /// Stores the last mark and position, and waits until the slot has confirmed this position.
    pub(super) async fn flush(&self, lsn: PgLsn) -> Result<()> {
        self.store().await?;
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
}

/// The walsender was told to end, and only a client that reads or goes lets it.
pub(super) fn walsender_is_ending() -> Error {
    let message = "the server has told its walsender to end, which waits for us: it is let go";
    Error::new(ErrorKind::DatabaseAway, message)
}

async fn run(
    shared: Arc<Shared>,
    mut mark: watch::Receiver<Option<Reached>>,
    interval: Duration,
) -> Error {
    let mut beat = tokio::time::interval(interval);
    let mut slot = tokio::time::interval(SLOT_INTERVAL);
    let mut store = tokio::time::interval(STORE_INTERVAL);
    loop {
        let result = tokio::select! {
            error = shared.session.ended() => return error,
            _ = beat.tick() => tokio::time::timeout(SILENCE_MAX, shared.beat()).await,
            _ = slot.tick() => tokio::time::timeout(SILENCE_MAX, shared.look_at_slot()).await,
            _ = store.tick() => {
                if shared.is_stored() { continue }
                tokio::time::timeout(SILENCE_MAX, shared.store_position()).await
            }
            Ok(()) = mark.changed() => {
                let Some(mark) = mark.borrow_and_update().clone() else { continue };
                tokio::time::timeout(SILENCE_MAX, shared.store_mark(mark)).await
            }
        };
        match result {
            Ok(Ok(())) => shared.health.heard(Server::Postgres),
            Ok(Err(error)) => return error,
            // A session that waits for a lock, or for a synchronous standby, compares
            // nothing: it is as good as gone.
            Err(_) => {
                let message = format!(
                    "the control session does not answer within {} s",
                    SILENCE_MAX.as_secs()
                );
                return Error::new(ErrorKind::DatabaseAway, message);
            }
        }
    }
}

impl Shared {
    async fn beat(&self) -> Result<()> {
        let client = &self.session.client;
        self.compare_publication().await?;
        if self.traffic.swap(false, Ordering::Relaxed) {
            // Transactional, so that it stands behind every commit that its
            // snapshot sees.
            let sql = "SELECT pg_logical_emit_message(true, $1, $2 || ' ' || pg_current_snapshot()::text)";
            let parameters: [&(dyn ToSql + Sync); 2] = [&HEARTBEAT_PREFIX, &self.nonce];
            let written = client.execute(sql, &parameters).await;
            written.map_err(|error| database::sort("write a heartbeat", error))?;
        }
        Ok(())
    }

    async fn compare_publication(&self) -> Result<()> {
        catalog::compare_publication(&self.session.client, &self.contract, &self.checkpoint).await
    }

    async fn look_at_slot(&self) -> Result<()> {
        let state = catalog::slot_state(&self.session.client, &self.contract.slot).await?;
        self.metrics.slot_lag_bytes.set(state.lag_bytes());
        self.metrics.retained_wal_bytes.set(state.retained_bytes());
        let before = self.wal_end.swap(state.wal_end.into(), Ordering::Relaxed);
        self.wal_end_before.store(before, Ordering::Relaxed);
        if let Some(status) = &state.wal_status {
            self.metrics.wal_status(status);
        }
        self.is_ending.store(state.is_ending, Ordering::Relaxed);
        Ok(())
    }

    fn is_stored(&self) -> bool {
        self.confirmed.load(Ordering::Relaxed) <= self.stored.load(Ordering::Relaxed)
    }

    async fn store_position(&self) -> Result<()> {
        let confirmed = self.confirmed.load(Ordering::Relaxed);
        let client = &self.session.client;
        let lsn = confirmed.into();
        self.checkpoint
            .store_position(client, &self.contract, lsn)
            .await?;
        // A store at the end of an attempt may overtake the one of the interval.
        self.stored.fetch_max(confirmed, Ordering::Relaxed);
        Ok(())
    }

    async fn store_mark(&self, (mark, lsn): Reached) -> Result<()> {
        let (client, contract) = (&self.session.client, &self.contract);
        let checkpoint = &self.checkpoint;
        match mark {
            Mark::Seq(seq) => checkpoint.store_seq(client, contract, seq).await,
            Mark::Fence(snapshot) => {
                debug!(%lsn, snapshot, "fence reached");
                // Between the last beat and the fence it may have changed and hidden
                // rows that the fence sees: then the older fence stays.
                self.compare_publication().await?;
                failpoint!("fencing");
                checkpoint
                    .store_fence(client, contract, lsn, &snapshot)
                    .await
            }
        }
    }
}
