//! spakky-outbox: what it makes and writes, and its relay beside ours.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::Package;
use super::omni_box::shape;
use crate::claim::spakky::{SPAKKY, claiming};
use crate::support::{Fixture, Relay, wait_until};

const PACKAGE: Package = Package {
    name: "spakky",
    script: "spakky-outbox.py",
};

/// Its table, as it makes it. Nothing where there is no spakky.
async fn made_by_spakky() -> Option<Fixture> {
    if !PACKAGE.is_there() {
        return None;
    }
    let fixture = Fixture::empty().await;
    PACKAGE.ask(&fixture, &["create"]);
    Some(fixture)
}

async fn execute(fixture: &Fixture, sql: &str) -> u64 {
    fixture.client.execute(sql, &[]).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_copy_of_its_table_is_what_it_makes() {
    let Some(made) = made_by_spakky().await else {
        return;
    };
    let ours = Fixture::spakky().await;
    let table = "spakky_event_outbox";
    let expected = shape(&made, table).await;
    assert_eq!(expected.len(), 8 + 1 + 2, "{expected:#?}");
    assert_eq!(shape(&ours, table).await, expected);
}

/// The same rows by both, one after the other: topic, value and headers are the same, and
/// neither has a key, and their times are those of the producer, also of old rows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_records_are_those_of_its_transport() {
    let Some(fixture) = made_by_spakky().await else {
        return;
    };
    PACKAGE.ask(&fixture, &["write", &fixture.topic]);
    let more = "UPDATE spakky_event_outbox SET headers = '{\"z\": \"ü\", \"a\": \"\", \"id\": \"of the row\"}' \
                WHERE headers ->> 'traceparent' IS NULL";
    assert_eq!(execute(&fixture, more).await, 1);
    let old = "UPDATE spakky_event_outbox SET created_at = created_at - interval '1 day'";
    assert_eq!(execute(&fixture, old).await, 3);
    let relay = claiming(&fixture, &[]).await;
    fixture.wait_until_sent().await;
    relay.drain().await;
    let theirs = format!("{}-theirs", fixture.topic);
    let again = format!(
        "UPDATE spakky_event_outbox SET published_at = NULL, claimed_at = NULL, event_name = '{theirs}'"
    );
    execute(&fixture, &again).await;
    PACKAGE.ask(&fixture, &["publish"]);
    assert_eq!(fixture.messages_that_are("published_at IS NULL").await, 0);
    let [ours, theirs] = [&fixture.topic, &theirs].map(|topic| {
        let Value::Array(mut records) = PACKAGE.ask(&fixture, &["read", topic, "3"]) else {
            panic!("no records")
        };
        records.sort_by_key(|record| record["value"].to_string());
        // Without a key, each producer takes any.
        for record in &mut records {
            record["partition"].take();
        }
        records
    });
    assert!(ours.iter().all(|record| record["key"].is_null()));
    assert_eq!(ours, theirs);
}

/// Notes each row that is published.
const PUBLICATIONS: &str = "\
    CREATE TABLE publication (id uuid); \
    CREATE FUNCTION publish() RETURNS trigger LANGUAGE plpgsql AS $$ \
    BEGIN INSERT INTO publication VALUES (NEW.id); RETURN NEW; END $$; \
    CREATE TRIGGER publish AFTER UPDATE OF published_at ON spakky_event_outbox FOR EACH ROW \
    WHEN (NEW.published_at IS NOT NULL) EXECUTE FUNCTION publish()";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_relay_and_ours_share_a_table() {
    if !PACKAGE.is_there() {
        return;
    }
    let fixture = Fixture::spakky().await;
    fixture.client.batch_execute(PUBLICATIONS).await.unwrap();
    let theirs = PACKAGE.start(&fixture, &["work"], "working").await;
    let writers = fixture.writers(fixture.steady_load());
    let relay = claiming(&fixture, &[]).await;
    wait_until("each has a share", async || {
        let sql = "SELECT count(*) FROM publication";
        let all: i64 = fixture.client.query_one(sql, &[]).await.unwrap().get(0);
        let ours = relay.published(&fixture.topic);
        ours > 100 && all as usize > ours + 100
    })
    .await;
    writers.stop().await.unwrap();
    fixture.wait_until_sent().await;
    let ours = relay.published(&fixture.topic);
    theirs.drain().await;
    relay.drain().await;
    let verdict = fixture.verdict().await;
    println!("{ours} are ours: {verdict}");
    assert!(
        verdict.lost.is_empty() && verdict.ghosts.is_empty(),
        "{verdict}"
    );
    assert_eq!(verdict.duplicates, 0, "{verdict}");
    let once = "SELECT count(*) = count(DISTINCT id) FROM publication";
    assert!(
        fixture
            .client
            .query_one(once, &[])
            .await
            .unwrap()
            .get::<_, bool>(0)
    );
}

/// It takes a claim of ours for dead after seconds, as it looks minutes old to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_relay_takes_over_from_our_killed_one() {
    if !PACKAGE.is_there() {
        return;
    }
    let fixture = Fixture::spakky().await;
    let mut command = Relay::command(&fixture, &SPAKKY);
    let relay = Relay::spawn(command.env("FAILPOINTS", "completing=pause"));
    fixture.insert_many("a", "{}", 5).await;
    wait_until("all are claimed", async || {
        fixture.messages_that_are("claimed_at IS NOT NULL").await == 5
    })
    .await;
    relay.kill();
    let since = Instant::now();
    let theirs = PACKAGE.start(&fixture, &["work"], "working").await;
    fixture.wait_until_sent().await;
    assert!(since.elapsed() < Duration::from_secs(30));
    theirs.drain().await;
}

/// What it claimed and did not send is ours once its claim is over; what it could not send
/// keeps its count.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_of_a_killed_relay_of_its_own_goes_out() {
    if !PACKAGE.is_there() {
        return;
    }
    let fixture = Fixture::spakky().await;
    fixture.insert_many("a", "{}", 20).await;
    let holding = PACKAGE.start(&fixture, &["hold", "10"], "holding 10").await;
    holding.kill();
    let claimed = "SELECT id::text FROM spakky_event_outbox WHERE claimed_at IS NOT NULL LIMIT 1";
    let id: String = fixture.client.query_one(claimed, &[]).await.unwrap().get(0);
    for _ in 0..4 {
        PACKAGE.ask(&fixture, &["fail", &id]);
    }
    let relay = claiming(&fixture, &["--claim-timeout", "300s"]).await;
    wait_until("those that it does not hold are published", async || {
        fixture.messages_that_are("published_at IS NOT NULL").await == 10
    })
    .await;
    let late = "UPDATE spakky_event_outbox SET claimed_at = now() - interval '301 s' WHERE published_at IS NULL";
    assert_eq!(execute(&fixture, late).await, 10);
    fixture.wait_until_sent().await;
    assert_eq!(fixture.messages_that_are("retry_count = 4").await, 1);
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 20);
}

/// Its relay leaves what we have put off alone until then, and what we have parked for
/// ever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_relay_keeps_to_what_ours_has_written() {
    if !PACKAGE.is_there() {
        return;
    }
    let fixture = Fixture::spakky().await;
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, payload) \
               SELECT 'not a topic', key, '{}' FROM unnest(ARRAY['put off', 'parked']) AS key; \
               UPDATE spakky_event_outbox SET retry_count = 4 WHERE headers ->> 'key' = 'parked'";
    fixture.client.batch_execute(sql).await.unwrap();
    let relay = claiming(&fixture, &[]).await;
    wait_until("both are refused", async || {
        fixture.messages_that_are("retry_count IN (1, 5)").await == 2
    })
    .await;
    relay.drain().await;
    // Far from where its time is over, whatever that takes here.
    let far = "UPDATE spakky_event_outbox SET claimed_at = claimed_at + interval '60 s' WHERE retry_count = 1";
    assert_eq!(execute(&fixture, far).await, 1);
    PACKAGE.ask(&fixture, &["publish"]);
    assert_eq!(fixture.messages_that_are("retry_count IN (1, 5)").await, 2);
    let due = "UPDATE spakky_event_outbox SET claimed_at = NULL";
    execute(&fixture, due).await;
    PACKAGE.ask(&fixture, &["publish"]);
    // Its transport takes for sent what the brokers refuse.
    let tried = "published_at IS NOT NULL AND retry_count = 1";
    assert_eq!(fixture.messages_that_are(tried).await, 1);
    let parked = "published_at IS NULL AND retry_count = 5";
    assert_eq!(fixture.messages_that_are(parked).await, 1);
}
