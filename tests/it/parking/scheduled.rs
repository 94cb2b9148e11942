//! Events that should go out later.

use std::time::Duration;

use super::topics::create;
use super::{LARGE, SMALL, SOON, limit, parked, wait_for_parked};
use crate::poison::{create_topic, incompressible};
use crate::support::{Fixture, Relay, connect, wait_until};

pub(super) async fn schedule(fixture: &Fixture, key: &str, payload: &str, delay: &str) -> String {
    let sql = "SELECT postbox.emit($1, $2, 'changed', $3::text::json, scheduled_at => clock_timestamp() + $4::text::interval)::text";
    let row = fixture
        .client
        .query_one(sql, &[&fixture.topic, &key, &payload, &delay])
        .await;
    row.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scheduled_event_goes_out_in_its_time_and_holds_nobody() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &SOON).await;
    schedule(&fixture, "a", "1", "3 s").await;
    fixture.insert("a", "2").await;
    fixture.wait_for_confirmation().await;
    assert_eq!(fixture.keys().await, ["a"]);
    wait_for_parked(&fixture, &["scheduled a 0"]).await;
    wait_until("it is sent", async || fixture.keys().await.len() == 2).await;
    let late = "SELECT extract(epoch FROM clock_timestamp() - max(scheduled_at))::float8 FROM postbox.outbox";
    let late: f64 = fixture.client.query_one(late, &[]).await.unwrap().get(0);
    // That the test itself looks takes its time, too.
    assert!((0.0..3.0).contains(&late), "{late}");
    wait_for_parked(&fixture, &[]).await;
    relay.drain().await;
}

/// Whatever is tried again, and however long that takes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scheduled_event_does_not_wait_for_those_that_are_tried_again() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, SMALL).await;
    let relay = Relay::streaming(&fixture, &SOON).await;
    fixture.insert("a", &incompressible(5000)).await;
    fixture.wait_for_confirmation().await;
    // Somebody takes his time to decide about it.
    let mut deciding = connect(&fixture.database_url).await;
    let deciding = deciding.transaction().await.unwrap();
    let lock = "SELECT FROM postbox.parked FOR UPDATE";
    assert_eq!(deciding.query(lock, &[]).await.unwrap().len(), 1);
    let waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name LIKE 'postbox % parked'";
    wait_until("its queue waits", async || {
        !fixture.client.query(waits, &[]).await.unwrap().is_empty()
    })
    .await;
    schedule(&fixture, "b", "1", "1 s").await;
    wait_until("it is sent", async || fixture.keys().await == ["b"]).await;
    deciding.rollback().await.unwrap();
    relay.drain().await;
}

/// Looks begin where nothing is due before; what is scheduled later on may be due before that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scheduled_event_that_is_due_before_all_others_is_not_late_for_it() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &SOON).await;
    schedule(&fixture, "a", "1", "1 h").await;
    wait_for_parked(&fixture, &["scheduled a 0"]).await;
    fixture.insert("b", "1").await;
    wait_until("it looks for that", async || fixture.keys().await == ["b"]).await;
    schedule(&fixture, "c", "1", "1 s").await;
    wait_until("it is sent", async || fixture.keys().await.len() == 2).await;
    let late = "SELECT extract(epoch FROM clock_timestamp() - min(scheduled_at))::float8 FROM postbox.outbox";
    let late: f64 = fixture.client.query_one(late, &[]).await.unwrap().get(0);
    // All is looked at every ten seconds.
    assert!((0.0..5.0).contains(&late), "{late}");
    relay.drain().await;
}

/// An event whose topic there is not yet, and one that joins another of its key, leave the
/// schedule and wait as any other would.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scheduled_event_that_cannot_go_out_in_its_time_joins_the_queue_of_its_key() {
    let mut fixture = Fixture::with_servers(&[], &["auto.create.topics.enable=false"]).await;
    let there = fixture.topic.clone();
    create_topic(&fixture, SMALL).await;
    let missing = format!("{there}-missing");
    let flags = [&SOON[..], &["--max-attempts", "1000"]].concat();
    let relay = Relay::streaming(&fixture, &flags).await;
    fixture.insert("a", &incompressible(5000)).await;
    schedule(&fixture, "a", "1", "1 s").await;
    schedule(&fixture, "b", "1", "1 s").await;
    schedule(&fixture, "c", &incompressible(5000), "1 s").await;
    fixture.topic.clone_from(&missing);
    for key in ["a", "b", "c"] {
        schedule(&fixture, key, "1", "1 s").await;
    }
    fixture.topic.clone_from(&there);
    wait_until("all but one wait for their topic, or another", async || {
        let parked = parked(&fixture).await;
        parked.len() == 6 && parked.iter().all(|line| line.starts_with("waiting"))
    })
    .await;
    assert_eq!(fixture.keys().await, ["b"]);
    limit(&fixture, LARGE).await;
    create(&fixture, &missing).await;
    wait_for_parked(&fixture, &[]).await;
    wait_until("all are sent", async || fixture.keys().await.len() == 4).await;
    let keys = fixture.keys().await;
    assert_eq!(keys.iter().filter(|key| *key == "a").count(), 2, "{keys:?}");
    fixture.topic.clone_from(&missing);
    assert_eq!(fixture.keys().await, ["a", "b", "c"]);
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_event_is_never_sent() {
    let fixture = Fixture::new().await;
    // One that the relay has not seen yet, and one that it has.
    let early = schedule(&fixture, "a", "1", "2 s").await;
    let cancel = async |id: &str| {
        let sql = "SELECT postbox.cancel($1::text::uuid)";
        let row = fixture.client.query_one(sql, &[&id]).await.unwrap();
        row.get::<_, bool>(0)
    };
    assert!(cancel(&early).await);
    let relay = Relay::streaming(&fixture, &SOON).await;
    let late = schedule(&fixture, "b", "1", "2 s").await;
    fixture.wait_for_confirmation().await;
    assert!(cancel(&late).await);
    // One of a transaction that is open beyond the event's time.
    let open = schedule(&fixture, "c", "1", "5 s").await;
    fixture.wait_for_confirmation().await;
    let canceller = connect(&fixture.database_url).await;
    let sql = format!("BEGIN; SELECT 1 / postbox.cancel('{open}')::integer");
    canceller.batch_execute(&sql).await.unwrap();
    schedule(&fixture, "d", "1", "6 s").await;
    wait_until("what is due after it is sent", async || {
        !fixture.keys().await.is_empty()
    })
    .await;
    canceller.batch_execute("COMMIT").await.unwrap();
    wait_for_parked(&fixture, &[]).await;
    assert!(!cancel(&late).await);
    assert_eq!(fixture.keys().await, ["d"]);
    tokio::time::sleep(Duration::from_millis(100)).await;
    relay.drain().await;
}

/// What was sent stays in the index as long as a transaction is open that began before, as a
/// backup's is for hours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_due_is_found_without_passing_what_was_sent() {
    const EVENTS: i64 = 400;
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &SOON).await;
    let backup = connect(&fixture.database_url).await;
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1";
    backup.batch_execute(begin).await.unwrap();
    let sql = "SELECT postbox.emit($1, n::text, 'changed', '{}', \
                   scheduled_at => clock_timestamp() + interval '1 s' + n * interval '10 ms') \
               FROM generate_series(1, $2::bigint) AS n";
    let events = fixture.client.query(sql, &[&fixture.topic, &EVENTS]).await;
    assert_eq!(events.unwrap().len(), 400);
    wait_until("all are sent", async || {
        fixture.keys().await.len() == 400 && parked(&fixture).await.is_empty()
    })
    .await;
    relay.drain().await;
    // A session has said what it did once it has ended.
    let sessions = "SELECT FROM pg_stat_activity \
                    WHERE datname = current_database() AND application_name LIKE 'postbox % parked'";
    wait_until("its sessions have ended", async || {
        let sessions = fixture.client.query(sessions, &[]).await.unwrap();
        sessions.is_empty()
    })
    .await;
    let sql =
        "SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'parked_scheduled'";
    let passed = async || -> i64 { fixture.client.query_one(sql, &[]).await.unwrap().get(0) };
    wait_until("it is counted", async || passed().await >= EVENTS).await;
    // If each look began at the beginning: 400 of 200 entries each, and more.
    let passed = passed().await;
    assert!(passed < 20 * EVENTS, "{passed} entries were passed");
    backup.batch_execute("COMMIT").await.unwrap();
}
