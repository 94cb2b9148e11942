//! Harm, and then the same questions: is anything lost, reordered, invented, or
//! repeated beyond the window?

mod exhaustion;
mod failpoints;
mod kafka;
mod partition;
mod postgres;
mod publication;
mod relay;
pub(crate) mod restore;
mod slot;

use std::collections::HashSet;

use tokio_postgres::types::PgLsn;

use crate::support::{Fixture, Relay};

/// Commits one event for each of 200 keys. Their commit lies behind the position.
async fn commit_behind(fixture: &Fixture) -> PgLsn {
    let insert = format!(
        "BEGIN; INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
         SELECT '{}', 'k' || n, 'changed', '{{}}' FROM generate_series(1, 200) AS n",
        fixture.topic
    );
    fixture.client.batch_execute(&insert).await.unwrap();
    let position = fixture.wal_end().await;
    fixture.client.batch_execute("COMMIT").await.unwrap();
    position
}

/// Recovers: then every row of this key arrives.
async fn assert_recoverable(fixture: &Fixture, key: &str) {
    let recovery = fixture.recover(&[]);
    assert_eq!(recovery.code, 0, "{recovery:?}");
    assert!(recovery.stdout.contains(": created ("), "{recovery:?}");
    let relay = Relay::streaming(fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let sql = "SELECT count(*) FROM postbox.outbox WHERE aggregate_id = $1";
    let rows: i64 = fixture.client.query_one(sql, &[&key]).await.unwrap().get(0);
    let records = fixture.records().await;
    let ids: HashSet<_> = records
        .iter()
        .filter(|seen| seen.key == key)
        .map(|seen| seen.id)
        .collect();
    assert!(
        rows > 0 && ids.len() as i64 == rows,
        "{} of {rows}",
        ids.len()
    );
}
