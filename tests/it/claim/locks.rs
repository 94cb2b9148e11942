//! Rows that somebody else has locked while they are ours: they hold up nothing but
//! themselves.

use std::time::Duration;

use tokio_postgres::Client;

use super::{OMNI_BOX, claiming};
use crate::support::{Fixture, Relay, connect, wait_until};

/// Rows wait so long for others to fill their batch.
const SLOW: [&str; 2] = ["-X", "linger.ms=2000"];

/// A session that has this row locked until it ends its transaction.
async fn lock(fixture: &Fixture, n: i32) -> Client {
    let locker = connect(&fixture.database_url).await;
    let sql = format!(
        "BEGIN; SELECT FROM outbox_events WHERE payload ->> 'n' = '{n}' AND status = 'pending' FOR UPDATE"
    );
    locker.batch_execute(&sql).await.unwrap();
    locker
}

/// For longer than its claim lasts; and somebody updates what is completed meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_locked_when_it_is_delivered_is_completed_once_it_is_free() {
    let fixture = Fixture::omni_box().await;
    fixture.omni_box_backlog(300, 300).await;
    let relay = claiming(&fixture, &SLOW).await;
    wait_until("all are claimed", async || {
        fixture.rows_that_are("locked_by IS NOT NULL").await == 300
    })
    .await;
    let locker = lock(&fixture, 7).await;
    wait_until("all others are completed", async || {
        fixture.rows_that_are("status = 'completed'").await == 299
    })
    .await;
    let update = "UPDATE outbox_events SET headers = headers WHERE status = 'completed'";
    locker.batch_execute(update).await.unwrap();
    tokio::time::sleep(Duration::from_secs(11)).await;
    // Of its key, too.
    let next = "INSERT INTO outbox_events (id, event_type, payload, status, attempts_made, max_attempts, scheduled_at, \
                    created_at, aggregate_type, aggregate_id, topic, partition_key) \
                SELECT gen_random_uuid(), event_type, '{\"n\": 307}', 'pending', 0, 6, now(), now(), aggregate_type, \
                    aggregate_id, topic, partition_key FROM outbox_events WHERE payload ->> 'n' = '7'";
    fixture.client.batch_execute(next).await.unwrap();
    fixture.enter_payloads_in_ledger().await;
    wait_until("what comes is delivered", async || {
        fixture.records().await.len() == 301
    })
    .await;
    locker.batch_execute("COMMIT").await.unwrap();
    assert!(!relay.log().contains("WARN"), "{}", relay.log());
    let verdict = fixture.judge_claims(relay).await;
    assert!(verdict.committed == 301 && verdict.is_clean(0), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_completes_what_nobody_has_locked_and_says_what_it_could_not() {
    let fixture = Fixture::omni_box().await;
    let flags = [&SLOW[..], &["--shutdown-timeout", "4s"]].concat();
    let mut relay = claiming(&fixture, &flags).await;
    // The first record to a partition goes alone.
    fixture.omni_box_backlog(300, 300).await;
    fixture.wait_until_completed().await;
    fixture.omni_box_backlog(300, 300).await;
    wait_until("all are on their way", async || {
        relay.metric("postbox_in_flight_events") == 300.0
    })
    .await;
    let locker = lock(&fixture, 7).await;
    relay.signal("TERM");
    assert_eq!(relay.exit_code().await, 9, "{}", relay.log());
    assert_eq!(fixture.rows_that_are("status = 'completed'").await, 599);
    let log = relay.log();
    assert!(log.contains("are locked by somebody else"), "{log}");
    drop(locker);
}

/// The rows of its key wait with it, and nothing else does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_locked_before_its_turn_for_longer_than_its_claim_lasts_holds_its_key_alone()
{
    let fixture = Fixture::omni_box().await;
    fixture.omni_box_backlog(60, 60).await;
    let keys = "UPDATE outbox_events SET partition_key = 'held' WHERE (payload ->> 'n')::integer IN (50, 51); \
                UPDATE postbox_oracle.ledger SET key = 'held' WHERE version IN (50, 51)";
    fixture.client.batch_execute(keys).await.unwrap();
    let one_by_one = ["--in-flight-max", "1", "-X", "linger.ms=250"];
    let relay = claiming(&fixture, &one_by_one).await;
    wait_until("all are claimed", async || {
        fixture.rows_that_are("locked_by IS NOT NULL").await > 50
    })
    .await;
    let locker = lock(&fixture, 50).await;
    wait_until("all others are completed", async || {
        fixture.rows_that_are("status = 'completed'").await == 58
    })
    .await;
    let free = "partition_key = 'held' AND status = 'pending' AND attempts_made = 0";
    assert_eq!(fixture.rows_that_are(free).await, 2);
    locker.batch_execute("COMMIT").await.unwrap();
    let verdict = fixture.judge_claims(relay).await;
    assert!(verdict.committed == 60 && verdict.is_clean(0), "{verdict}");
}

/// It is put off once it is free, and nothing waits for that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_cannot_go_out_and_is_locked_holds_its_key_alone() {
    let fixture = Fixture::omni_box().await;
    fixture.omni_box_backlog(2, 1).await;
    let bad = "UPDATE outbox_events SET topic = 'not a topic'";
    fixture.client.batch_execute(bad).await.unwrap();
    let mut command = Relay::command(&fixture, &OMNI_BOX);
    let mut relay = Relay::spawn(command.env("FAILPOINTS", "rows_claimed=sleep(1000)"));
    relay.wait_for_log("polling, by claims").await;
    wait_until("both are claimed", async || {
        fixture.rows_that_are("locked_by IS NOT NULL").await == 2
    })
    .await;
    let locker = lock(&fixture, 1).await;
    relay.wait_for_log("put off, as its table says").await;
    fixture.insert("b", "{}").await;
    wait_until("another is delivered", async || {
        fixture.keys().await == ["b"]
    })
    .await;
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(fixture.rows_that_are("attempts_made > 0").await, 0);
    assert!(!relay.log().contains("WARN"), "{}", relay.log());
    locker.batch_execute("COMMIT").await.unwrap();
    wait_until("it is put off", async || {
        let put_off = "attempts_made = 1 AND payload ->> 'n' = '1'";
        fixture.rows_that_are(put_off).await == 1
    })
    .await;
    assert_eq!(fixture.rows_that_are("attempts_made > 0").await, 1);
    relay.drain().await;
}
