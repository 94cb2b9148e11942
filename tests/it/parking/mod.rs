//! Events that cannot go out, or must not yet: what they hold up, and what becomes of them.

mod away;
mod between;
mod crash;
mod decided;
mod divided;
mod letters;
mod policies;
mod queue;
mod refused;
mod restart;
mod scheduled;
mod topics;

use std::time::{Duration, Instant};

use rdkafka::admin::{AdminOptions, AlterConfig, ResourceSpecifier};

use crate::poison::admin;
use crate::support::{Fixture, PATIENCE, Relay, wait_until};

/// Tried again soon.
pub(crate) const SOON: [&str; 4] = ["--retry-backoff-min", "10ms", "--retry-backoff-max", "50ms"];

/// Nothing is tried twice by itself.
pub(crate) const RARELY: [&str; 4] = ["--retry-backoff-min", "1h", "--retry-backoff-max", "1h"];

/// The limit of a topic that takes small events alone, and of one that takes all.
pub(crate) const SMALL: &str = "2000";
pub(crate) const LARGE: &str = "1000000";

/// From now on the test's topic takes batches of so many bytes.
pub(crate) async fn limit(fixture: &Fixture, bytes: &str) {
    let limit =
        AlterConfig::new(ResourceSpecifier::Topic(&fixture.topic)).set("max.message.bytes", bytes);
    let altered = admin(fixture)
        .alter_configs(&[limit], &AdminOptions::new())
        .await;
    altered.unwrap().remove(0).unwrap();
}

/// The ids of all events, in the order in which they were inserted.
pub(crate) async fn ids(fixture: &Fixture) -> Vec<String> {
    let sql = "SELECT id::text FROM postbox.outbox ORDER BY seq";
    let rows = fixture.client.query(sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// The ids of what was sent, in that order.
pub(crate) async fn sent(fixture: &Fixture) -> Vec<String> {
    let records = fixture.records().await;
    records.iter().map(|record| record.id.to_string()).collect()
}

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

/// What waits, and whose turn it is not yet.
pub(crate) async fn turns(fixture: &Fixture) -> Vec<String> {
    let sql = "SELECT concat_ws(' ', status, attempts, CASE WHEN due_at = 'infinity' THEN 'behind' END) \
               FROM postbox.parked ORDER BY number";
    let rows = fixture.client.query(sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

pub(crate) async fn wait_for_turns(fixture: &Fixture, lines: &[&str]) {
    let what = format!("parked: {lines:?}");
    wait_until(&what, async || turns(fixture).await == lines).await;
}

/// From now on its topic takes all events of the test: they go out in their order, and no more
/// often than so many times too often.
pub(crate) async fn assert_all_go_out(fixture: &Fixture, relay: Relay, repeated: usize) {
    limit(fixture, LARGE).await;
    wait_for_parked(fixture, &[]).await;
    fixture.enter_in_ledger().await;
    let verdict = fixture.judge(relay).await;
    assert!(verdict.is_clean(repeated), "{verdict}");
}
