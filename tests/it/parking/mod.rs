//! Events that cannot go out, or must not yet: what they hold up, and what becomes of them.

mod between;
mod crash;
mod policies;
pub(crate) mod refused;
mod scheduled;
mod topics;

use std::time::{Duration, Instant};

use crate::support::{Fixture, PATIENCE};

/// Tried again soon.
pub(crate) const SOON: [&str; 4] = ["--retry-backoff-min", "10ms", "--retry-backoff-max", "50ms"];

/// What the table of parked events says, one line a row, in the order of their numbers.
pub(crate) async fn parked(fixture: &Fixture) -> Vec<String> {
    let sql = "SELECT concat_ws(' ', status, coalesce(key, '-'), attempts) FROM postbox.parked ORDER BY number";
    let rows = fixture.client.query(sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Waits until the table says this.
pub(crate) async fn wait_for_parked(fixture: &Fixture, lines: &[&str]) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = parked(fixture).await;
        if found == lines {
            return;
        }
        assert!(Instant::now() < deadline, "{found:?}, not {lines:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
