//! The relay's ordinary session: it compares the publication, writes fences, and
//! tells at once when Postgres goes away.
//!
//! A *fence* is a logical message that carries `pg_current_snapshot()`. When it
//! comes out of the slot, everything visible in that snapshot lies before it, so
//! once all that is delivered the snapshot is stored in the checkpoint: from it
//! a lost slot is recovered from the table.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_postgres::types::{PgLsn, ToSql};
use tracing::debug;

use crate::catalog::{self, Checkpoint};
use crate::contract::Contract;
use crate::database::{self, Session};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;
use crate::source::{HEARTBEAT_PREFIX, Position};

/// How often the slot is looked at for the metrics.
const SLOT_INTERVAL: Duration = Duration::from_secs(5);

pub(super) struct Heartbeat {
    session: Arc<Session>,
    task: JoinSet<Error>,
    traffic: Arc<AtomicBool>,
    fence: watch::Sender<Option<Position>>,
}

struct Task {
    session: Arc<Session>,
    contract: Contract,
    checkpoint: Checkpoint,
    nonce: String,
    metrics: Arc<Metrics>,
    traffic: Arc<AtomicBool>,
    fence: watch::Receiver<Option<Position>>,
}

impl Heartbeat {
    /// Starts to beat on a session that was checked.
    pub(super) fn start(
        session: Session,
        contract: Contract,
        checkpoint: Checkpoint,
        interval: Duration,
        nonce: String,
        metrics: Arc<Metrics>,
    ) -> Self {
        let session = Arc::new(session);
        let traffic = Arc::new(AtomicBool::new(false));
        let (fence, fences) = watch::channel(None);
        let task = Task {
            session: Arc::clone(&session),
            contract,
            checkpoint,
            nonce,
            metrics,
            traffic: Arc::clone(&traffic),
            fence: fences,
        };
        let mut tasks = JoinSet::new();
        tasks.spawn(task.run(interval));
        Self {
            session,
            task: tasks,
            traffic,
            fence,
        }
    }

    /// Resolves with the reason when the session is gone or the publication is
    /// not what it was. Cancel-safe.
    pub(super) async fn failed(&mut self) -> Error {
        match self.task.join_next().await {
            Some(Ok(error)) => error,
            _ => Error::new(ErrorKind::Unexpected, "the heartbeat ended"),
        }
    }

    /// There were events: the next beat writes a fence.
    pub(super) fn had_traffic(&self) {
        self.traffic.store(true, Ordering::Relaxed);
    }

    /// Everything before this fence is delivered: store it.
    pub(super) fn reached(&self, fence: Position) {
        self.fence.send_replace(Some(fence));
    }

    /// Waits until the slot has confirmed this position.
    pub(super) async fn confirmed(&self, slot: &str, lsn: PgLsn) -> Result<()> {
        loop {
            let state = catalog::slot_state(&self.session.client, slot).await?;
            if state.confirmed_flush_lsn >= Some(lsn) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Task {
    async fn run(mut self, interval: Duration) -> Error {
        let mut beat = tokio::time::interval(interval);
        let mut slot = tokio::time::interval(SLOT_INTERVAL);
        // A session that waits for a lock, or for a synchronous standby, compares
        // nothing: then it is as good as gone.
        let patience = interval.max(SLOT_INTERVAL);
        loop {
            let session = Arc::clone(&self.session);
            let result = tokio::select! {
                error = session.ended() => return error,
                _ = beat.tick() => tokio::time::timeout(patience, self.beat()).await,
                _ = slot.tick() => tokio::time::timeout(patience, self.look_at_slot()).await,
                Ok(()) = self.fence.changed() => tokio::time::timeout(patience, self.store_fence()).await,
            };
            match result {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return error,
                Err(_) => {
                    let message = format!(
                        "the heartbeat's session does not answer within {} s",
                        patience.as_secs()
                    );
                    return Error::new(ErrorKind::DatabaseAway, message);
                }
            }
        }
    }

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
        let (client, checkpoint) = (&self.session.client, self.checkpoint.clone());
        catalog::reconcile_publication(client, &self.contract, checkpoint).await?;
        Ok(())
    }

    async fn look_at_slot(&self) -> Result<()> {
        let state = catalog::slot_state(&self.session.client, &self.contract.slot).await?;
        self.metrics.slot_lag_bytes.set(state.lag_bytes);
        self.metrics.retained_wal_bytes.set(state.retained_bytes);
        if let Some(status) = &state.wal_status {
            self.metrics.wal_status(status);
        }
        Ok(())
    }

    async fn store_fence(&mut self) -> Result<()> {
        let fence = self.fence.borrow_and_update().clone();
        let Some(Position {
            lsn,
            fence: Some(snapshot),
        }) = fence
        else {
            return Ok(());
        };
        debug!(%lsn, snapshot, "fence reached");
        // Between the last beat and the fence it may have changed and hidden rows
        // that the fence sees: then the older fence stays.
        self.compare_publication().await?;
        catalog::store_heartbeat(&self.session.client, &self.contract, lsn, &snapshot).await
    }
}
