//! Tables of others, whose rows are claimed and completed.

mod backlog;
mod crash;
mod lease;
mod locks;
mod order;
mod packages;
mod races;
mod refused;
mod shape;
pub(crate) mod spakky;
mod workers;

use std::time::{Duration, Instant};

use postbox::oracle::{self, Verdict};

use crate::support::{Fixture, PATIENCE, Relay, wait_until};

const OMNI_BOX: [&str; 4] = ["--mode", "poll", "--table-preset", "omni-box"];

/// With these flags the first rows are completed at once, and later ones ten seconds later,
/// or at the end: until then they stay claimed.
const LATE_MARKS: [&str; 4] = ["--status-interval", "10s", "--wal-sender-timeout", "20s"];

impl Fixture {
    /// On the servers that all tests share, with omni-box's table, through which the oracle
    /// writes. Nothing of ours is set up.
    pub(crate) async fn omni_box() -> Self {
        let fixture = Self::empty().await;
        fixture.make_omni_box().await;
        fixture
    }

    /// The same on servers of its own.
    async fn omni_box_with_servers() -> Self {
        let fixture = Self::with_servers(&[], &[]).await;
        let drop = "DROP SCHEMA postbox CASCADE; DROP SCHEMA postbox_oracle CASCADE";
        fixture.client.batch_execute(drop).await.unwrap();
        fixture.make_omni_box().await;
        fixture
    }

    pub(crate) async fn make_omni_box(&self) {
        let sql = include_str!("omni_box.sql");
        self.client.batch_execute(sql).await.unwrap();
        oracle::prepare(&self.client, "postbox").await.unwrap();
    }

    /// As omni-box's partitioned table: its primary key is created_at and id.
    async fn partition_omni_box(&self) {
        let partition = "ALTER TABLE outbox_events RENAME TO plain; \
                         CREATE TABLE outbox_events (LIKE plain INCLUDING DEFAULTS, PRIMARY KEY (created_at, id)) \
                         PARTITION BY RANGE (created_at); \
                         CREATE TABLE old PARTITION OF outbox_events FOR VALUES FROM (MINVALUE) TO ('2026-01-01'); \
                         CREATE TABLE new PARTITION OF outbox_events FOR VALUES FROM ('2026-01-01') TO (MAXVALUE)";
        self.client.batch_execute(partition).await.unwrap();
    }

    /// How many rows have this status.
    pub(crate) async fn rows_that_are(&self, what: &str) -> i64 {
        let sql = format!("SELECT count(*) FROM outbox_events WHERE {what}");
        self.client.query_one(&sql, &[]).await.unwrap().get(0)
    }

    async fn wait_until_completed(&self) {
        let pending =
            "SELECT min(row_to_json(o)::text) FROM outbox_events AS o WHERE status = 'pending'";
        let deadline = Instant::now() + PATIENCE;
        loop {
            let row = self.client.query_one(pending, &[]).await.unwrap();
            let Some(row) = row.get::<_, Option<String>>(0) else {
                return;
            };
            assert!(Instant::now() < deadline, "waited in vain for {row}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until all is completed, stops the relay, and asks the oracle.
    async fn judge_claims(&self, relay: Relay) -> Verdict {
        self.wait_until_completed().await;
        relay.drain().await;
        assert_eq!(self.rows_that_are("locked_by IS NOT NULL").await, 0);
        self.verdict().await
    }

    /// So many rows of a hundred keys, committed at once, in the ledger.
    pub(crate) async fn omni_box_backlog(&self, rows: i32, keys: i32) {
        let sql = "WITH event AS ( \
                       INSERT INTO outbox_events (id, event_type, payload, status, attempts_made, max_attempts, \
                           scheduled_at, created_at, aggregate_type, aggregate_id, topic, partition_key) \
                       SELECT gen_random_uuid(), 'changed', json_build_object('n', n), 'pending', 0, 6, now(), \
                           now() - interval '1 hour' + n * interval '1 ms', 'order', gen_random_uuid(), $1, \
                           'k' || n % $3::integer \
                       FROM generate_series(1, $2::integer) AS n RETURNING id, partition_key, payload) \
                   INSERT INTO postbox_oracle.ledger SELECT id, partition_key, (payload ->> 'n')::bigint FROM event";
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
            [&self.topic, &rows, &keys];
        self.client.execute(sql, &parameters).await.unwrap();
        self.client
            .batch_execute("ANALYZE outbox_events")
            .await
            .unwrap();
    }
}

/// Starts a relay that claims rows, with these flags besides, and waits until it does.
pub(crate) async fn claiming(fixture: &Fixture, flags: &[&str]) -> Relay {
    let mut relay = Relay::start(fixture, &[&OMNI_BOX, flags].concat());
    relay.wait_for_log("polling, by claims").await;
    relay
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steady_load_arrives_complete_in_order_and_once() {
    let fixture = Fixture::omni_box().await;
    let relay = claiming(&fixture, &[]).await;
    fixture.write_for_a_while().await;
    let verdict = fixture.judge_claims(relay).await;
    assert!(verdict.committed > 500 && verdict.is_clean(0), "{verdict}");
}

/// One key has as many rows as thousands have: neither is slow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn backlogs_of_few_and_of_many_keys_arrive_in_order_and_once() {
    for keys in [1, 10, 10_000] {
        let fixture = Fixture::omni_box().await;
        fixture.omni_box_backlog(20_000, keys).await;
        let since = Instant::now();
        let relay = claiming(&fixture, &[]).await;
        let verdict = fixture.judge_claims(relay).await;
        println!("20,000 rows of {keys} keys in {:?}", since.elapsed());
        assert!(verdict.is_clean(0), "{keys} keys: {verdict}");
    }
}

/// By what they take in memory, not by what they take on the disk, where they are compressed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_large_rows_are_claimed_than_memory_is_meant_to_hold() {
    let fixture = Fixture::omni_box().await;
    let large = format!("{{\"filler\": \"{}\"}}", "x".repeat(500_000));
    fixture.insert_many("a", &large, 60).await;
    // The first is in flight until the test is over.
    let flags = ["--in-flight-max", "1", "-X", "linger.ms=60000"];
    let relay = claiming(&fixture, &flags).await;
    wait_until("some are claimed", async || {
        fixture.rows_that_are("locked_by IS NOT NULL").await > 0
    })
    .await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let claimed = fixture.rows_that_are("locked_by IS NOT NULL").await;
    assert!((10..=18).contains(&claimed), "{claimed}");
    relay.kill();
}
