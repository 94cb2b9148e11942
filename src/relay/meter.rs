//! Measures the backlog as long as the relay lives, whether it streams, waits for Kafka or
//! begins anew: what piles up while nothing moves is what people want to know.
//!
//! In a session of its own, so that neither a heartbeat nor a lease waits for it. With a
//! slot, what is delivered is known by fences: it is measured when one was stored, when the
//! number is exact, and otherwise after a while.
//!
//! Of another library's table, only rows that are claimed or marked can be told from those
//! that are delivered.
//!
//! A relay that stands by says nothing: the one that is at work does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::RelaySettings;
use crate::backlog::{self, Backlog};
use crate::catalog;
use crate::database::{Session, within};
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;

/// How long not to measure again.
const INTERVAL_MIN: Duration = Duration::from_secs(5);

/// By how much a fence may be late that was due by then.
const LATE: Duration = Duration::from_secs(1);

/// How long a measurement may take: some statements, each of which has its own limit.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// What the measurements go by.
#[derive(Debug, Default)]
pub(super) struct Cue {
    fenced: Notify,
    stands_by: AtomicBool,
}

impl Cue {
    /// A fence was stored: the checkpoint says exactly what is delivered.
    pub(super) fn fenced(&self) {
        self.fenced.notify_waiters();
    }

    /// Whether another relay was at work when that was last said.
    pub(super) fn is_standing_by(&self) -> bool {
        self.stands_by.load(Ordering::Relaxed)
    }

    /// Whether another relay is at work.
    pub(super) fn stands_by(&self, stands_by: bool) {
        self.stands_by.store(stands_by, Ordering::Relaxed);
    }
}

/// Measures for ever.
pub(super) async fn run(settings: RelaySettings, metrics: Arc<Metrics>, cue: Arc<Cue>) {
    let fence_max = settings.heartbeat_interval.min(INTERVAL_MIN) + LATE;
    let mut session = None;
    let mut is_told = false;
    loop {
        let _ = timeout(fence_max, cue.fenced.notified()).await;
        let measured = match cue.is_standing_by() {
            true => Ok(None),
            false => measure(&settings, &mut session).await,
        };
        let failed = measured.as_ref().err();
        if let Some(error) = failed {
            tell(error, is_told);
        }
        is_told = failed.is_some();
        metrics.backlog(measured.ok().flatten().as_ref());
        sleep(INTERVAL_MIN).await;
    }
}

async fn measure(
    settings: &RelaySettings,
    session: &mut Option<Session>,
) -> Result<Option<Backlog>> {
    // One in which something failed, or has not ended, is not used again.
    let ours = match session.take() {
        Some(session) => session,
        None => open(settings).await?,
    };
    let measured = async {
        match settings.claims().or_else(|| settings.marks()) {
            Some(claims) => backlog::measure_claims(&ours.client, &claims)
                .await
                .map(Some),
            // Only the slot knows.
            None if !settings.contract.outbox.is_ours() => Ok(None),
            None => backlog::measure(&ours.client, &settings.contract, &settings.route).await,
        }
    };
    match within(ANSWER_MAX, "measure the backlog", measured).await {
        Ok(backlog) => {
            *session = Some(ours);
            Ok(backlog)
        }
        // What takes too long is not away.
        Err(error) if !ours.client.is_closed() => {
            Err(Error::new(ErrorKind::Database, error.chain()))
        }
        Err(error) => Err(error),
    }
}

/// Nothing is set in it, as with a session that polls.
async fn open(settings: &RelaySettings) -> Result<Session> {
    let name = format!("postbox {} backlog", settings.contract.slot);
    let session = settings.database.connect_pooled(&name).await?;
    let checked = catalog::check_server(&session.client);
    within(ANSWER_MAX, "read the server's settings", checked).await?;
    Ok(session)
}

/// Once, while it is so. That Postgres is away, the relay itself says.
fn tell(error: &Error, is_told: bool) {
    if is_told || error.kind() == ErrorKind::DatabaseAway {
        debug!("the backlog is not known: {}", error.chain());
    } else {
        warn!("the backlog is not known: {}", error.chain());
    }
}
