//! The stream from slot to topic, without harm.

use std::time::Duration;

use tokio_postgres::types::PgLsn;

use crate::support::{Fixture, Relay, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steady_load_arrives_complete_in_order_and_once() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.write_for_a_while().await;
    let verdict = fixture.judge(relay).await;
    assert!(verdict.committed > 500 && verdict.is_clean(0), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_slot_moves_on_while_other_tables_write() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &[]).await;
    let before = fixture.confirmed().await;
    let other = "CREATE TABLE other (x text); INSERT INTO other SELECT repeat('x', 1000) FROM generate_series(1, 5000)";
    fixture.client.batch_execute(other).await.unwrap();
    let after = fixture.wal_end().await;
    wait_until("the slot passes the other table's WAL", || async {
        fixture.confirmed().await >= after
    })
    .await;
    assert!(u64::from(after) - u64::from(before) > 5_000_000);
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_million_rows_in_one_transaction_pass_in_bounded_memory() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &[]).await;
    let sql = format!(
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
         SELECT '{}', 'k' || n % 100, 'changed', json_build_object('n', n) FROM generate_series(1, 1000000) AS n",
        fixture.topic
    );
    let committed = async {
        fixture.client.batch_execute(&sql).await.unwrap();
        fixture.wal_end().await
    };
    let mut peak = 0;
    let mut committed = std::pin::pin!(committed);
    let end: PgLsn = loop {
        tokio::select! {
            end = &mut committed => break end,
            () = tokio::time::sleep(Duration::from_millis(100)) => peak = peak.max(relay.memory()),
        }
    };
    wait_until("the transaction is confirmed", || {
        peak = peak.max(relay.memory());
        async { fixture.confirmed().await >= end }
    })
    .await;
    fixture.enter_in_ledger().await;
    let verdict = fixture.judge(relay).await;
    assert!(
        verdict.records == 1_000_000 && verdict.is_clean(0),
        "{verdict}"
    );
    // Far less than the transaction's 500 MB. A debug build with 10,000 events in
    // flight has 60 MB.
    assert!(peak < 150 << 20, "{} MiB", peak >> 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_900_kb_pass_in_bounded_memory() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &[]).await;
    let sql = format!(
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload)
         SELECT '{}', 'k' || n % 10, 'changed', json_build_object('filler', repeat('x', 900000)) FROM generate_series(1, 300) AS n",
        fixture.topic
    );
    fixture.client.batch_execute(&sql).await.unwrap();
    let end = fixture.wal_end().await;
    let mut peak = 0;
    wait_until("all are confirmed", || {
        peak = peak.max(relay.memory());
        async { fixture.confirmed().await >= end }
    })
    .await;
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 300);
    // 32 MiB in flight, 64 rows on their way to it, and both once more on their
    // way through buffers.
    assert!(peak < 300 << 20, "{} MiB", peak >> 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_relay_stands_by_and_takes_over() {
    let fixture = Fixture::new().await;
    let first = Relay::streaming(&fixture, &[]).await;
    let mut second = Relay::start(&fixture, &[]);
    second.wait_for_log("standing by").await;
    let writers = fixture.writers(fixture.load());
    tokio::time::sleep(Duration::from_secs(1)).await;
    first.drain().await;
    second.wait_for_log("streaming").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge(second).await;
    assert!(verdict.is_clean(0), "{verdict}");
}

/// The `pg_snapshot` in the checkpoint.
async fn stored_fence(fixture: &Fixture) -> String {
    let sql = "SELECT snapshot::text FROM postbox.checkpoint";
    fixture.client.query_one(sql, &[]).await.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heartbeats_store_a_fence_once_everything_before_it_is_delivered() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &["--heartbeat-interval", "1s"]).await;
    fixture.insert("a", "{}").await;
    let sql = "SELECT count(*) FROM postbox.outbox, postbox.checkpoint \
               WHERE pg_visible_in_snapshot(xid, snapshot)";
    wait_until("the checkpoint's snapshot sees the row", || async {
        let row = fixture.client.query_one(sql, &[]).await.unwrap();
        row.get::<_, i64>(0) == 1
    })
    .await;
    // Rows that the fence sees are delivered.
    assert_eq!(fixture.records().await.len(), 1);
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fence_that_somebody_else_writes_is_not_stored() {
    let fixture = Fixture::new().await;
    let at_setup = stored_fence(&fixture).await;
    let relay = Relay::streaming(&fixture, &["--heartbeat-interval", "1s"]).await;
    // Its first. The next would come after events.
    wait_until("the checkpoint has a new snapshot", || async {
        stored_fence(&fixture).await != at_setup
    })
    .await;
    let before = stored_fence(&fixture).await;
    let forge = "SELECT pg_logical_emit_message(true, 'postbox', '1:18446744073709551000:'); \
                 SELECT pg_logical_emit_message(true, 'postbox', '20:10:')";
    fixture.client.batch_execute(forge).await.unwrap();
    fixture.wait_for_confirmation().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(stored_fence(&fixture).await, before);
    relay.drain().await;
}
