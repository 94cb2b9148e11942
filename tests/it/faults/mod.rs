//! Harm, and then the same questions: is anything lost, reordered, invented, or
//! repeated beyond the window?

mod failpoints;
mod kafka;
mod partition;
mod postgres;
mod relay;

use tokio_postgres::types::PgLsn;

use crate::support::Fixture;

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
