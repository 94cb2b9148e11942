//! Polling, where a slot is not to be had.

mod change;
mod cluster;
mod crash;
mod lease;
mod order;
mod pooler;
mod setup;
pub(crate) mod shards;
mod trouble;

use std::time::Duration;

use postbox::oracle::{self, Load, Verdict};

use crate::support::{Fixture, Relay, wait_until};

/// The flags of a relay that polls.
pub(crate) const POLL: [&str; 2] = ["--mode", "poll"];

impl Fixture {
    /// On the servers that all tests share, set up for polling.
    async fn polling() -> Self {
        let fixture = Self::empty().await;
        fixture.set_up_polling().await;
        fixture
    }

    /// `postbox setup --mode poll`, and the oracle's tables.
    pub(crate) async fn set_up_polling(&self) {
        self.setup(&POLL).results();
        oracle::prepare(&self.client, "postbox").await.unwrap();
    }

    /// Waits until the checkpoint says that everything is delivered.
    pub(crate) async fn wait_for_checkpoint(&self) {
        let sql = "SELECT count(*) FROM postbox.outbox AS o, postbox.checkpoint AS c \
                   WHERE c.second_snapshot IS NOT NULL OR NOT pg_visible_in_snapshot(o.xid, c.snapshot)";
        wait_until("all is stored to be delivered", async || {
            let row = self.client.query_one(sql, &[]).await.unwrap();
            row.get::<_, i64>(0) == 0
        })
        .await;
    }

    /// Waits until all is delivered, stops the relay, and asks the oracle.
    pub(crate) async fn judge_polling(&self, relay: Relay) -> Verdict {
        self.wait_for_checkpoint().await;
        self.wait_for_untried().await;
        relay.drain().await;
        self.verdict().await
    }
}

/// Starts a relay that polls, with these flags besides, and waits until it does.
pub(crate) async fn polling(fixture: &Fixture, flags: &[&str]) -> Relay {
    let mut relay = Relay::start(fixture, &[&POLL, flags].concat());
    relay.wait_for_log("polling").await;
    relay
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steady_load_arrives_complete_in_order_and_once() {
    let fixture = Fixture::polling().await;
    let relay = polling(&fixture, &[]).await;
    fixture.write_for_a_while().await;
    let verdict = fixture.judge_polling(relay).await;
    assert!(verdict.committed > 500 && verdict.is_clean(0), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigkill_in_a_loop_loses_nothing() {
    let fixture = Fixture::polling().await;
    let writers = fixture.writers(Load {
        pause_percent: 10,
        ..fixture.load()
    });
    for round in 0..6 {
        let relay = polling(&fixture, &["--in-flight-max", "500"]).await;
        tokio::time::sleep(Duration::from_millis(300 + round * 100)).await;
        relay.kill();
    }
    writers.stop().await.unwrap();
    let relay = polling(&fixture, &[]).await;
    let verdict = fixture.judge_polling(relay).await;
    assert!(
        verdict.committed > 500 && verdict.is_clean(6 * 2000),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_in_a_loop_repeats_nothing() {
    let fixture = Fixture::polling().await;
    let writers = fixture.writers(Load {
        pause_percent: 10,
        ..fixture.load()
    });
    for round in 0..6 {
        let relay = polling(&fixture, &[]).await;
        tokio::time::sleep(Duration::from_millis(300 + round * 100)).await;
        relay.drain().await;
    }
    writers.stop().await.unwrap();
    let relay = polling(&fixture, &[]).await;
    let verdict = fixture.judge_polling(relay).await;
    assert!(verdict.committed > 500 && verdict.is_clean(0), "{verdict}");
}

const BACKLOG: i32 = 60_000;

/// Rows of a hundred keys, committed at once.
async fn backlog(fixture: &Fixture) {
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
               SELECT $1, 'k' || n % 100, 'changed', json_build_object('n', n) FROM generate_series(1, $2) AS n";
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&fixture.topic, &BACKLOG];
    fixture.client.execute(sql, &parameters).await.unwrap();
    fixture.enter_in_ledger().await;
}

/// Unlike a transaction of the WAL, a gap is confirmed as it is read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigkill_amid_a_large_transaction_repeats_a_page_or_so() {
    let fixture = Fixture::polling().await;
    backlog(&fixture).await;
    let relay = polling(&fixture, &["--in-flight-max", "1000"]).await;
    wait_until("a part is delivered", async || {
        relay.published(&fixture.topic) > 20_000
    })
    .await;
    relay.kill();
    assert!(
        fixture.records().await.len() < BACKLOG as usize,
        "it was too late"
    );
    let relay = polling(&fixture, &[]).await;
    let verdict = fixture.judge_polling(relay).await;
    // In flight, since the last mark, and what was delivered between two of its writes.
    assert!(verdict.is_clean(1_000 + 1_024 + 10_000), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_amid_a_large_transaction_repeats_nothing() {
    let fixture = Fixture::polling().await;
    backlog(&fixture).await;
    let relay = polling(&fixture, &["--in-flight-max", "1000"]).await;
    wait_until("a part is delivered", async || {
        relay.published(&fixture.topic) > 5_000
    })
    .await;
    relay.drain().await;
    assert!(
        fixture.records().await.len() < BACKLOG as usize,
        "it was too late"
    );
    let relay = polling(&fixture, &[]).await;
    let verdict = fixture.judge_polling(relay).await;
    assert!(verdict.is_clean(0), "{verdict}");
}

/// An idle relay that polls writes nothing but its lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_answer_is_stored_at_heartbeats_only() {
    let fixture = Fixture::polling().await;
    let relay = polling(&fixture, &["--heartbeat-interval", "2s"]).await;
    let snapshot = async || -> String {
        let sql = "SELECT snapshot::text FROM postbox.checkpoint";
        fixture.client.query_one(sql, &[]).await.unwrap().get(0)
    };
    let first = snapshot().await;
    wait_until("another is stored", async || snapshot().await != first).await;
    let second = snapshot().await;
    for _ in 0..10 {
        fixture
            .client
            .batch_execute("SELECT pg_current_xact_id()")
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(snapshot().await, second);
    }
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_900_kb_pass_in_bounded_memory() {
    let fixture = Fixture::polling().await;
    let sql = format!(
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
         SELECT '{}', 'k' || n % 10, 'changed', json_build_object('filler', repeat('x', 900000)) \
         FROM generate_series(1, 300) AS n",
        fixture.topic
    );
    fixture.client.batch_execute(&sql).await.unwrap();
    let relay = polling(&fixture, &[]).await;
    let mut peak = 0;
    wait_until("all are delivered", || {
        peak = peak.max(relay.memory());
        async { relay.published(&fixture.topic) == 300 }
    })
    .await;
    relay.drain().await;
    // Compressed to a ninetieth, 52 of them are a page, and two pages are there at a time,
    // twice over. The rest is in flight.
    assert!(peak < 400 << 20, "{} MiB", peak >> 20);
}
