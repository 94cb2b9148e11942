//! An event that cannot go out as it is.

use std::time::Duration;

use super::{LARGE, SMALL, SOON, limit, parked, wait_for_parked};
use crate::poison::{create_topic, incompressible};
use crate::support::{Fixture, Relay, wait_until};

const NOT_COMPRESSED: [&str; 2] = ["-X", "compression.codec=none"];

/// Three events of a key of which the second is too large, and some of another.
async fn insert(fixture: &Fixture) {
    let large = incompressible(5000);
    for (key, payload) in [
        ("a", "1"),
        ("b", "1"),
        ("a", &large),
        ("b", "2"),
        ("a", "3"),
        ("b", "3"),
    ] {
        fixture.insert(key, payload).await;
    }
}

/// Whether it is known before it is sent that an event is too large, or only by the broker:
/// its key waits, all others flow, and it goes out in its order once the topic takes it.
async fn assert_holds_its_key_alone(flags: &[&str]) {
    let fixture = Fixture::new().await;
    create_topic(&fixture, SMALL).await;
    let flags = [&SOON[..], &["--max-attempts", "1000"], flags].concat();
    let relay = Relay::streaming(&fixture, &flags).await;
    insert(&fixture).await;
    fixture.wait_for_confirmation().await;
    wait_until("it was tried again", async || {
        let sql = "SELECT attempts > 2 FROM postbox.parked WHERE attempts > 0";
        let rows = fixture.client.query(sql, &[]).await.unwrap();
        rows.len() == 1 && rows[0].get(0)
    })
    .await;
    assert_eq!(fixture.keys().await, ["a", "b", "b", "b"]);
    assert_eq!(relay.metric("postbox_parked_refused_total"), 1.0);
    assert_eq!(relay.metric("postbox_parked_behind_total"), 1.0);
    limit(&fixture, LARGE).await;
    wait_for_parked(&fixture, &[]).await;
    fixture.insert("a", "4").await;
    fixture.enter_in_ledger().await;
    let verdict = fixture.judge(relay).await;
    assert!(verdict.is_clean(0), "{verdict}");
    assert_eq!(verdict.records, 7);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_is_known_to_be_too_large_holds_its_key_alone() {
    assert_holds_its_key_alone(&NOT_COMPRESSED).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_the_broker_refuses_holds_its_key_alone() {
    assert_holds_its_key_alone(&[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_was_refused_often_enough_is_a_dead_letter() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, SMALL).await;
    let letters = format!("{}-dead", fixture.topic);
    let flags = ["--max-attempts", "3", "--dead-letter-topic", &letters];
    let relay = Relay::streaming(&fixture, &[&SOON[..], &flags].concat()).await;
    insert(&fixture).await;
    wait_for_parked(&fixture, &["dead a 3"]).await;
    fixture.wait_for_confirmation().await;
    wait_until("the rest is sent", async || fixture.keys().await.len() == 5).await;
    let mut log = relay.log();
    assert_eq!(
        log.matches("is a dead letter after 3 attempts").count(),
        1,
        "{log}"
    );
    assert_eq!(relay.metric("postbox_dead_letters_total"), 1.0);
    wait_until("the letter is sent", async || {
        let sql = "SELECT NOT owes_letter FROM postbox.parked";
        fixture.client.query_one(sql, &[]).await.unwrap().get(0)
    })
    .await;
    relay.drain().await;
    // It stays as it is.
    let relay = Relay::streaming(&fixture, &SOON).await;
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(parked(&fixture).await, ["dead a 3"]);
    log = relay.log();
    assert!(!log.contains("dead letter"), "{log}");
    relay.drain().await;
    assert_eq!(fixture.keys().await.len(), 5);
}
