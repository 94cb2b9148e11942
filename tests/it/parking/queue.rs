//! The queue of a key: who is in it, in which order, and whose turn it is.

use super::policies::UNROUTABLE;
use super::scheduled::schedule;
use super::{LARGE, RARELY, SMALL, ids, limit, sent, wait_for_parked, wait_for_turns};
use crate::poison::{create_topic, incompressible};
use crate::support::{Fixture, Relay, connect, wait_until};

/// Longer than an entry of an index can be, and not to be compressed; another begins with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_of_any_length_has_its_queue() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, "10000").await;
    let relay = Relay::streaming(&fixture, &RARELY).await;
    let key = incompressible(4000);
    let other = format!("{key}x");
    for (key, payload) in [
        (&key, "1"),
        (&key, &incompressible(20_000)),
        (&other, "1"),
        (&key, "3"),
        (&other, "2"),
        (&key, "4"),
    ] {
        fixture.insert(key, payload).await;
    }
    fixture.wait_for_confirmation().await;
    let waiting = ["waiting 1", "waiting 0 behind", "waiting 0 behind"];
    wait_for_turns(&fixture, &waiting).await;
    let list = |key: &str| {
        let listed = fixture.parked(&["list", "--key", key, "--output", "json"]);
        listed.results().lines().count()
    };
    assert_eq!((list(&key), list(&other)), (3, 0));
    // It is held by the next relay, too.
    relay.drain().await;
    let relay = Relay::streaming(&fixture, &RARELY).await;
    fixture.insert(&key, "5").await;
    fixture.wait_for_confirmation().await;
    assert_eq!(list(&key), 4);
    limit(&fixture, LARGE).await;
    fixture.parked(&["retry", "--key", &key]).results();
    wait_for_parked(&fixture, &[]).await;
    fixture.insert(&key, "6").await;
    fixture.enter_in_ledger().await;
    let verdict = fixture.judge(relay).await;
    assert!(verdict.is_clean(0), "{verdict}");
    assert_eq!(verdict.records, 8);
}

/// Behind what waits when its time comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scheduled_event_whose_key_is_held_joins_the_end_of_its_queue() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, SMALL).await;
    let relay = Relay::streaming(&fixture, &RARELY).await;
    fixture.insert("a", &incompressible(5000)).await;
    schedule(&fixture, "a", "2", "5 s").await;
    fixture.insert("a", "3").await;
    fixture.wait_for_confirmation().await;
    let queue = ["waiting 1", "waiting 0 behind", "waiting 0 behind"];
    wait_for_turns(&fixture, &queue).await;
    fixture.insert("a", "4").await;
    fixture.wait_for_confirmation().await;
    assert_eq!(
        fixture
            .parked(&["list"])
            .results()
            .matches(" waiting")
            .count(),
        4
    );
    limit(&fixture, LARGE).await;
    let ids = ids(&fixture).await;
    fixture.parked(&["retry", &ids[0]]).results();
    wait_for_parked(&fixture, &[]).await;
    relay.drain().await;
    assert_eq!(sent(&fixture).await, [&*ids[0], &ids[2], &ids[1], &ids[3]]);
}

/// Also if that leaves while the other is on its way to the table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_is_refused_behind_another_has_its_turn_when_that_has_left() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &RARELY).await;
    let insert = async || fixture.client.batch_execute(UNROUTABLE).await.unwrap();
    insert().await;
    wait_for_turns(&fixture, &["waiting 1"]).await;
    insert().await;
    wait_for_turns(&fixture, &["waiting 1", "waiting 1 behind"]).await;
    let ids = async || ids(&fixture).await;
    let skip = async |number: usize| {
        let ids = ids().await;
        fixture
            .parked(&["skip", &ids[number], "--reason", "test"])
            .results();
    };
    skip(0).await;
    wait_for_turns(&fixture, &["skipped 1 behind", "waiting 2"]).await;

    let wait = "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS \
                $$BEGIN PERFORM pg_advisory_xact_lock_shared(7); RETURN new; END$$; \
                CREATE TRIGGER wait BEFORE INSERT ON postbox.parked FOR EACH ROW EXECUTE FUNCTION wait()";
    fixture.client.batch_execute(wait).await.unwrap();
    let gate = connect(&fixture.database_url).await;
    let close = "SELECT pg_advisory_lock(7)";
    gate.batch_execute(close).await.unwrap();
    insert().await;
    fixture.wait_for_lock().await;
    skip(1).await;
    wait_for_turns(&fixture, &["skipped 1 behind", "skipped 2 behind"]).await;
    drop(gate);
    let after = ["skipped 1 behind", "skipped 2 behind", "waiting 2"];
    wait_for_turns(&fixture, &after).await;
    relay.drain().await;
}

/// A producer that was refused the first of many sends none of the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_due_together_with_one_that_is_refused_goes_out() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, "60000").await;
    let relay = Relay::streaming(&fixture, &RARELY).await;
    // So that its producer is there, and refused the first before it has them all.
    schedule(&fixture, "a", "1", "0 s").await;
    wait_until("one is sent", async || fixture.keys().await == ["a"]).await;
    let payload = incompressible(25_000);
    let large = incompressible(100_000);
    let sql = "SELECT postbox.emit($1, n::text, 'changed', CASE n WHEN 0 THEN $2::text ELSE $3::text END::json, \
                                   scheduled_at => now() + interval '5 s') \
               FROM generate_series(0, 500) AS n";
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
        [&fixture.topic, &large, &payload];
    fixture.client.query(sql, &parameters).await.unwrap();
    wait_for_parked(&fixture, &["waiting 0 1"]).await;
    // Of those that were on their way some came through, and are sent again.
    let keys = async || {
        let mut keys = fixture.keys().await;
        keys.dedup();
        keys.len()
    };
    assert_eq!(keys().await, 501);
    limit(&fixture, LARGE).await;
    fixture.parked(&["retry", "--all"]).results();
    wait_for_parked(&fixture, &[]).await;
    relay.drain().await;
    assert_eq!(keys().await, 502);
}
