//! Harm, and then the same questions: is anything lost, reordered, invented, or
//! repeated beyond the window?

mod exhaustion;
mod failpoints;
mod kafka;
mod partition;
mod postgres;
mod publication;
mod relay;
mod restore;
mod slot;

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

/// What recovery begins with knows no row of this key, and the outbox holds it still.
async fn assert_recoverable(fixture: &Fixture, key: &str) {
    let sql = "SELECT count(*), count(*) FILTER (WHERE pg_visible_in_snapshot(o.xid, c.snapshot)) \
               FROM postbox.outbox AS o, postbox.checkpoint AS c WHERE o.aggregate_id = $1";
    let row = fixture.client.query_one(sql, &[&key]).await.unwrap();
    let (rows, given_up): (i64, i64) = (row.get(0), row.get(1));
    assert!(rows > 0 && given_up == 0, "{given_up} of {rows}");
}
