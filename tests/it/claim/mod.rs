//! Tables of others, whose rows are claimed and completed.

mod backlog;
mod crash;
mod order;
mod packages;
mod refused;
mod shape;
mod spakky;
mod workers;

use std::time::{Duration, Instant};

use postbox::oracle::{self, Load, Verdict};

use crate::support::{Fixture, PATIENCE, Relay};

const OMNI_BOX: [&str; 4] = ["--mode", "poll", "--table-preset", "omni-box"];

impl Fixture {
    /// On the servers that all tests share, with omni-box's table, through which the oracle
    /// writes. Nothing of ours is set up.
    async fn omni_box() -> Self {
        let fixture = Self::empty().await;
        fixture.make_omni_box().await;
        fixture
    }

    pub(crate) async fn make_omni_box(&self) {
        let sql = include_str!("omni_box.sql");
        self.client.batch_execute(sql).await.unwrap();
        oracle::prepare(&self.client, "postbox").await.unwrap();
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
    async fn omni_box_backlog(&self, rows: i32, keys: i32) {
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
async fn claiming(fixture: &Fixture, flags: &[&str]) -> Relay {
    let mut relay = Relay::start(fixture, &[&OMNI_BOX, flags].concat());
    relay.wait_for_log("polling, by claims").await;
    relay
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steady_load_arrives_complete_in_order_and_once() {
    let fixture = Fixture::omni_box().await;
    let relay = claiming(&fixture, &[]).await;
    let writers = fixture.writers(Load {
        rollback_percent: 20,
        savepoint_percent: 20,
        pause_percent: 10,
        ..fixture.load()
    });
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(writers.rolled_back() > 0);
    writers.stop().await.unwrap();
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
