//! What is decided about an event just when the relay has to do with it.

use super::away::send_to_frozen_brokers;
use super::scheduled::schedule;
use super::{LARGE, RARELY, SMALL, ids, limit, sent, wait_for_parked};
use crate::poison::{create_topic, incompressible};
use crate::support::{Fixture, Relay, connect, wait_until};

/// What is sent for longer than a minute may be skipped. That it went out in the end does
/// not undo it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_is_skipped_while_it_is_sent_stays_skipped_and_its_key_goes_on() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    create_topic(&fixture, SMALL).await;
    let relay = Relay::streaming(&fixture, &RARELY).await;
    send_to_frozen_brokers(&mut fixture, "a").await;
    let first = ids(&fixture).await.remove(0);
    let age = "UPDATE postbox.parked SET taken_at = now() - interval '61 s'";
    fixture.client.batch_execute(age).await.unwrap();
    let skip = ["skip", &first, "--reason", "test"];
    fixture.parked(&skip).results();
    fixture.kafka("resume");
    fixture.insert("a", "2").await;
    wait_until("its key goes on", async || fixture.keys().await.len() == 2).await;
    wait_for_parked(&fixture, &["skipped a 0"]).await;
    fixture.insert("a", "3").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(sent(&fixture).await, ids(&fixture).await);
    wait_for_parked(&fixture, &["skipped a 0"]).await;
}

/// One that was refused, as it was scheduled too far ahead, has its time still before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_is_cancelled_while_it_waits_is_not_sent_and_its_key_goes_on() {
    let fixture = Fixture::new().await;
    let flags = [&RARELY[..], &["--max-schedule", "1s"]].concat();
    let relay = Relay::streaming(&fixture, &flags).await;
    let late = schedule(&fixture, "a", "1", "10 s").await;
    fixture.insert("a", "2").await;
    fixture.wait_for_confirmation().await;
    wait_for_parked(&fixture, &["waiting a 1", "waiting a 0"]).await;
    relay.drain().await;
    fixture.cancel_as(&fixture.database_url, &[&late]).results();
    let has_come = "SELECT max(scheduled_at) < clock_timestamp() FROM postbox.outbox";
    wait_until("its time has come", async || {
        let row = fixture.client.query_one(has_come, &[]).await.unwrap();
        row.get(0)
    })
    .await;
    let relay = Relay::streaming(&fixture, &RARELY).await;
    fixture.parked(&["retry", &late]).results();
    wait_for_parked(&fixture, &[]).await;
    assert_eq!(relay.metric("postbox_parked_cancelled_total"), 1.0);
    relay.drain().await;
    assert_eq!(sent(&fixture).await, ids(&fixture).await[1..]);
}

/// Of two that wait for each other, Postgres ends one: here it is the relay, when it stores
/// that the event was sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_a_decision_locks_out_goes_on_and_sends_nothing_twice() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, SMALL).await;
    fixture.end_others_at_deadlocks().await;
    let relay = Relay::streaming(&fixture, &RARELY).await;
    fixture.insert("a", &incompressible(5000)).await;
    fixture.insert("a", "2").await;
    fixture.wait_for_confirmation().await;
    wait_for_parked(&fixture, &["waiting a 1", "waiting a 0"]).await;
    // When it forgets the event, it has locked it, and waits.
    let wait = "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS \
                $$BEGIN PERFORM pg_advisory_xact_lock_shared(7); RETURN old; END$$; \
                CREATE TRIGGER wait BEFORE DELETE ON postbox.parked FOR EACH ROW EXECUTE FUNCTION wait()";
    fixture.client.batch_execute(wait).await.unwrap();
    let other = connect(&fixture.database_url).await;
    let lock = "SET deadlock_timeout = '10min'; BEGIN; SELECT pg_advisory_xact_lock(7)";
    other.batch_execute(lock).await.unwrap();
    limit(&fixture, LARGE).await;
    fixture.parked(&["retry", "--all"]).results();
    fixture.wait_for_lock().await;
    let lock = "SELECT FROM postbox.parked FOR UPDATE";
    other.batch_execute(lock).await.unwrap();
    other.batch_execute("COMMIT").await.unwrap();
    wait_for_parked(&fixture, &[]).await;
    fixture.insert("a", "3").await;
    fixture.enter_in_ledger().await;
    let verdict = fixture.judge(relay).await;
    assert!(verdict.is_clean(0), "{verdict}");
    assert_eq!(verdict.records, 3);
}
