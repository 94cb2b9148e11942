//! Cleans up now and then, as long as the relay lives, in a session of its own: see
//! [`cleanup`]. What goes wrong is told, and tried again at the next time; the relay goes on.
//!
//! A relay that stands by leaves it to the one that is at work; of several at work, as where a table is
//! divided or claimed from, one cleans up at a time.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tracing::{debug, info, warn};

use super::RelaySettings;
use super::meter::Cue;
use crate::cleanup::{self, BATCH, CleanupOptions, Report};
use crate::error::{ErrorKind, Result};
use crate::metrics::Metrics;

/// When a relay cleans up, and what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CleanupSettings {
    /// How often.
    pub interval: Duration,
    /// The retention.
    pub older_than: Duration,
}

/// Cleans up for ever, if that is wanted.
pub(super) async fn run(settings: RelaySettings, metrics: Arc<Metrics>, cue: Arc<Cue>) {
    let Some(cleanup) = settings.cleanup else {
        return;
    };
    let mut times = interval(cleanup.interval);
    // One that takes longer than that is not followed by others at once.
    times.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // At the start others have more to do.
    times.tick().await;
    loop {
        times.tick().await;
        if cue.is_standing_by() {
            continue;
        }
        match clean(&settings, cleanup, &metrics).await {
            Ok(report) => {
                tell(&report);
                if let Err(error) = report.check() {
                    warn!("cleaning up again later: {}", error.chain());
                }
            }
            // Another does it; that Postgres is away, the relay itself says.
            Err(error) if error.kind() == ErrorKind::SlotInUse => {
                debug!("not cleaning up: {}", error.chain());
            }
            Err(error) => warn!("cleaning up again later: {}", error.chain()),
        }
    }
}

async fn clean(
    settings: &RelaySettings,
    cleanup: CleanupSettings,
    metrics: &Metrics,
) -> Result<Report> {
    let options = CleanupOptions {
        older_than: cleanup.older_than,
        batch: BATCH,
        // For ever, as the rest would wait for the next time.
        timeout: Duration::from_secs(u64::from(u32::MAX)),
        patience: Duration::ZERO,
        stale_after: settings.claim_timeout,
        dry_run: false,
    };
    let name = format!("postbox {} cleanup", settings.contract.slot);
    let session = cleanup::open(&settings.database, &name).await?;
    let count = |table: &str, rows: u64| {
        metrics.cleaned.with_label_values(&[table]).inc_by(rows);
    };
    cleanup::run(&session.client, &settings.contract, &options, &count).await
}

fn tell(report: &Report) {
    for line in report.lines.iter().filter(|line| line.rows > 0) {
        let (table, rows) = (&line.table, line.rows);
        match line.done {
            cleanup::Done::Removed => info!(table, rows, "removed old rows"),
            cleanup::Done::Dropped => info!(table, partitions = rows, "dropped old partitions"),
            cleanup::Done::Released => info!(table, rows, "released stale claims"),
        }
    }
}
