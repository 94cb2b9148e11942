//! Transactions that end in another order than they began in.
//!
//! Each test fails with a naive way to poll: a cursor over `seq` loses rows, one that
//! waits for the oldest transaction stalls, and one in the order of transactions
//! changes the order of a key.

use std::time::Duration;

use tokio_postgres::Client;

use super::polling;
use crate::support::{Fixture, connect, wait_until};

/// A session in a transaction that has inserted an event with this key.
async fn open_with(fixture: &Fixture, key: &str) -> Client {
    let session = connect(&fixture.database_url).await;
    let insert = format!(
        "BEGIN; INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type) \
         VALUES ('{}', '{key}', 'changed')",
        fixture.topic
    );
    session.batch_execute(&insert).await.unwrap();
    session
}

async fn wait_for_keys(fixture: &Fixture, expected: &[&str]) {
    let what = format!("{expected:?} are delivered");
    wait_until(&what, async || fixture.keys().await == expected).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_committed_after_a_later_one_is_not_missed() {
    let fixture = Fixture::polling().await;
    let relay = polling(&fixture, &[]).await;
    let slow = open_with(&fixture, "a").await;
    fixture.insert("b", "{}").await;
    wait_for_keys(&fixture, &["b"]).await;
    slow.batch_execute("COMMIT").await.unwrap();
    wait_for_keys(&fixture, &["a", "b"]).await;
    relay.drain().await;
}

/// Nor after a restart, nor with many rows in between, nor with subtransactions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_committed_much_later_is_not_missed() {
    let fixture = Fixture::polling().await;
    let relay = polling(&fixture, &[]).await;
    let slow = open_with(&fixture, "a").await;
    for key in ["b", "c"] {
        let nested = format!(
            "SAVEPOINT s; INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type) \
             VALUES ('{}', '{key}', 'changed')",
            fixture.topic
        );
        slow.batch_execute(&nested).await.unwrap();
    }
    slow.batch_execute("ROLLBACK TO s").await.unwrap();
    fixture.insert_many("many", "{}", 3_000).await;
    fixture.wait_for_checkpoint_of(3_000).await;
    relay.drain().await;
    let relay = polling(&fixture, &[]).await;
    fixture.insert_many("more", "{}", 3_000).await;
    fixture.wait_for_checkpoint_of(6_000).await;
    slow.batch_execute("COMMIT").await.unwrap();
    fixture.enter_in_ledger().await;
    let verdict = fixture.judge_polling(relay).await;
    assert!(
        verdict.committed == 6_002 && verdict.is_clean(0),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_transaction_that_stays_open() {
    let fixture = Fixture::polling().await;
    let relay = polling(&fixture, &[]).await;
    let _slow = open_with(&fixture, "never").await;
    let elsewhere = connect(
        &fixture
            .database_url
            .replace(&fixture.contract.slot, "postgres"),
    )
    .await;
    elsewhere
        .batch_execute("BEGIN; SELECT pg_current_xact_id()")
        .await
        .unwrap();
    for key in ["a", "b", "c"] {
        fixture.insert(key, "{}").await;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    wait_for_keys(&fixture, &["a", "b", "c"]).await;
    relay.drain().await;
}

/// The first transaction begins first and comes last to the key: its number is smaller,
/// and its event later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_of_a_key_come_in_the_order_of_their_commits() {
    let fixture = Fixture::polling().await;
    let first = open_with(&fixture, "other").await;
    fixture.insert("a", "1").await;
    let insert = format!(
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
         VALUES ('{}', 'a', 'changed', '2'); COMMIT",
        fixture.topic
    );
    first.batch_execute(&insert).await.unwrap();
    // Both are in one gap.
    let relay = polling(&fixture, &[]).await;
    fixture.enter_in_ledger().await;
    let verdict = fixture.judge_polling(relay).await;
    assert!(verdict.committed == 3 && verdict.is_clean(0), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prepared_transaction_is_delivered_when_it_is_committed() {
    let fixture = Fixture::with_postgres(&["max_prepared_transactions=5"]).await;
    fixture.set_up_polling().await;
    let relay = polling(&fixture, &[]).await;
    let slow = open_with(&fixture, "a").await;
    slow.batch_execute("PREPARE TRANSACTION 'later'")
        .await
        .unwrap();
    fixture.insert("b", "{}").await;
    wait_for_keys(&fixture, &["b"]).await;
    slow.batch_execute("COMMIT PREPARED 'later'").await.unwrap();
    wait_for_keys(&fixture, &["a", "b"]).await;
    relay.drain().await;
}

impl Fixture {
    /// Waits until so many rows are stored to be delivered.
    async fn wait_for_checkpoint_of(&self, rows: i64) {
        let sql = "SELECT count(*) FROM postbox.outbox AS o, postbox.checkpoint AS c \
                   WHERE c.second_snapshot IS NULL AND pg_visible_in_snapshot(o.xid, c.snapshot)";
        wait_until("rows are stored to be delivered", async || {
            let row = self.client.query_one(sql, &[]).await.unwrap();
            row.get::<_, i64>(0) == rows
        })
        .await;
    }
}
