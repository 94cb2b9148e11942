//! What a user may say about events that cannot go out, and how many may wait.

use super::{LARGE, SMALL, SOON, limit, parked, wait_for_parked};
use crate::poison::{create_topic, incompressible};
use crate::support::{Fixture, Relay, wait_until};

pub(super) const UNROUTABLE: &str = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload, topic) \
                          VALUES ('order', 'a', 'changed', '{\"n\": 1}', 'no topic''s name')";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_is_skipped_is_a_dead_letter_at_once_and_holds_nobody() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, SMALL).await;
    let relay = Relay::streaming(&fixture, &["--on-poison", "skip"]).await;
    fixture.client.batch_execute(UNROUTABLE).await.unwrap();
    fixture.insert("a", &incompressible(5000)).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    wait_for_parked(&fixture, &["dead a 1", "dead a 1"]).await;
    assert_eq!(fixture.keys().await, ["a"]);
    assert!(
        relay.log().contains("as --on-poison skip says"),
        "{}",
        relay.log()
    );
    relay.drain().await;
}

/// A row that was given up and is read again keeps what was decided.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_decided_holds_when_a_row_is_read_again() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, SMALL).await;
    fixture.insert("a", &incompressible(5000)).await;
    fixture.insert("b", "{}").await;
    // It is parked, and its position never confirmed.
    let flags = ["--on-poison", "skip", "-X", "compression.codec=none"];
    let mut command = Relay::command(&fixture, &flags);
    let mut relay = Relay::spawn(command.env("FAILPOINTS", "parked=panic"));
    assert_eq!(relay.exit_code().await, -1, "{}", relay.log());
    assert_eq!(parked(&fixture).await, ["dead a 1"]);
    // Somebody decides; what would be done about a new one, which could go out by now, is
    // another thing.
    let skip = "UPDATE postbox.parked SET status = 'skipped', decided_by = 'somebody'";
    fixture.client.batch_execute(skip).await.unwrap();
    limit(&fixture, LARGE).await;
    let relay = Relay::streaming(&fixture, &SOON).await;
    fixture.wait_for_confirmation().await;
    assert_eq!(parked(&fixture).await, ["skipped a 1"]);
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["b"]);
}

/// No restart reads the first again by then: this is another event.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_that_comes_again_long_after_it_was_given_up_is_a_new_event() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &["--on-poison", "skip"]).await;
    fixture.client.batch_execute(UNROUTABLE).await.unwrap();
    fixture.wait_for_confirmation().await;
    fixture.insert("b", "{}").await;
    fixture.wait_for_confirmation().await;
    assert_eq!(parked(&fixture).await, ["dead a 1"]);
    let settled = "SELECT postbox.is_settled(p) FROM postbox.parked AS p";
    wait_until("the checkpoint has passed it", async || {
        fixture.client.query_one(settled, &[]).await.unwrap().get(0)
    })
    .await;
    let again = "WITH gone AS (DELETE FROM postbox.outbox WHERE aggregate_id = 'a' RETURNING id) \
                 INSERT INTO postbox.outbox (id, aggregate_type, aggregate_id, event_type, topic, payload) \
                 SELECT id, 'order', 'c', 'changed', 'no topic''s name', '{}' FROM gone";
    fixture.client.batch_execute(again).await.unwrap();
    fixture.wait_for_confirmation().await;
    assert_eq!(parked(&fixture).await, ["dead c 1"]);
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_has_parked_as_much_as_may_be_stops_and_loses_nothing() {
    let fixture = Fixture::new().await;
    let mut relay = Relay::streaming(&fixture, &["--parked-max", "3"]).await;
    // In one transaction: the relay has read all of them before the first is in the table.
    let five = [UNROUTABLE; 5].join(";");
    fixture.client.batch_execute(&five).await.unwrap();
    assert_eq!(relay.exit_code().await, 8, "{}", relay.log());
    let log = relay.log();
    assert!(
        log.contains("3 events are parked, as many as --parked-max allows")
            && log.contains("would be the next, as "),
        "{log}"
    );
    assert_eq!(parked(&fixture).await.len(), 3, "what is looked at next");
    let relay = Relay::streaming(&fixture, &["--parked-bytes-max", "1MiB"]).await;
    wait_until("all are parked", async || parked(&fixture).await.len() == 5).await;
    relay.drain().await;
    let mut relay = Relay::streaming(&fixture, &["--scheduled-max", "1"]).await;
    for _ in 0..2 {
        let sql = "SELECT postbox.emit('order', 'a', 'changed', '{}', scheduled_at => now() + interval '1 h')";
        fixture.client.batch_execute(sql).await.unwrap();
    }
    assert_eq!(relay.exit_code().await, 8, "{}", relay.log());
    assert!(relay.log().contains("--scheduled-max"), "{}", relay.log());
}

/// Its topic is known by the route, though there will never be a record.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_no_event_holds_its_key() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &["--retry-backoff-min", "1h"]).await;
    let insert = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, created_at) \
                  VALUES ($1, 'a', 'changed', 'infinity')";
    fixture
        .client
        .execute(insert, &[&fixture.topic])
        .await
        .unwrap();
    fixture.insert("a", "{}").await;
    fixture.insert("b", "{}").await;
    fixture.wait_for_confirmation().await;
    assert_eq!(parked(&fixture).await, ["waiting a 1", "waiting a 0"]);
    assert_eq!(fixture.keys().await, ["b"]);
    relay.drain().await;
}

/// Whatever it is that makes no event of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_no_event_is_parked_as_it_is() {
    let fixture = Fixture::new().await;
    let letters = format!("{}-dead", fixture.topic);
    let flags = ["--max-attempts", "2", "--dead-letter-topic", &letters];
    let relay = Relay::streaming(&fixture, &[&SOON[..], &flags].concat()).await;
    let alter = "ALTER TABLE postbox.outbox ALTER event_type DROP NOT NULL, ALTER aggregate_id DROP NOT NULL";
    fixture.client.batch_execute(alter).await.unwrap();
    for (column, value) in [
        ("event_type", "NULL"),
        ("aggregate_id", "NULL"),
        ("created_at", "'infinity'"),
        ("scheduled_at", "'infinity'"),
        ("scheduled_at", "now() + interval '100 years'"),
    ] {
        let columns = ["aggregate_type", "aggregate_id", "event_type"];
        let others: Vec<&str> = columns
            .into_iter()
            .filter(|other| *other != column)
            .collect();
        let sql = format!(
            "INSERT INTO postbox.outbox ({}, {column}) VALUES ({}, {value})",
            others.join(", "),
            others.iter().map(|_| "'x'").collect::<Vec<_>>().join(", ")
        );
        fixture.client.batch_execute(&sql).await.unwrap();
    }
    fixture.insert("b", "{}").await;
    fixture.wait_for_confirmation().await;
    wait_for_parked(
        &fixture,
        &["dead x 2", "dead - 2", "dead x 2", "dead x 2", "dead x 2"],
    )
    .await;
    let owed = "SELECT count(*) FROM postbox.parked WHERE owes_letter";
    wait_until("the letters are sent", async || {
        fixture
            .client
            .query_one(owed, &[])
            .await
            .unwrap()
            .get::<_, i64>(0)
            == 0
    })
    .await;
    assert_eq!(fixture.keys().await, ["b"]);
    relay.drain().await;
}
