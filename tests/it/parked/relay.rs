//! What people decided, and a relay that carries it out.

use std::time::Duration;

use crate::parking::{LARGE, RARELY, SMALL, ids, limit, sent, turns, wait_for_turns};
use crate::poison::{create_topic, incompressible};
use crate::support::{Fixture, Relay, wait_until};

/// Whatever it reads from.
async fn assert_does_as_was_decided(fixture: Fixture, start: impl AsyncFn(&Fixture) -> Relay) {
    create_topic(&fixture, SMALL).await;
    let relay = start(&fixture).await;
    let large = incompressible(5000);
    for payload in ["1", &large, "3", &large, "5"] {
        fixture.insert("a", payload).await;
    }
    wait_for_turns(
        &fixture,
        &[
            "waiting 1",
            "waiting 0 behind",
            "waiting 0 behind",
            "waiting 0 behind",
        ],
    )
    .await;
    let ids = ids(&fixture).await;

    // Those behind it go on, up to the next that cannot.
    fixture
        .parked(&["skip", &ids[1], "--reason", "test"])
        .results();
    wait_for_turns(
        &fixture,
        &["skipped 1 behind", "waiting 1", "waiting 0 behind"],
    )
    .await;
    assert_eq!(sent(&fixture).await, [&*ids[0], &ids[2]]);

    relay.kill();
    let relay = start(&fixture).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = ["skipped 1 behind", "waiting 1", "waiting 0 behind"];
    assert_eq!(turns(&fixture).await, before);

    // The topic takes them now, the second too after all: each in its place.
    limit(&fixture, LARGE).await;
    fixture.parked(&["retry", &ids[3], &ids[1]]).results();
    wait_for_turns(&fixture, &[]).await;
    relay.drain().await;
    assert_eq!(
        sent(&fixture).await,
        [&*ids[0], &ids[2], &ids[1], &ids[3], &ids[4]]
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_does_as_was_decided_and_a_crash_forgets_nothing() {
    let start = async |fixture: &Fixture| Relay::streaming(fixture, &RARELY).await;
    assert_does_as_was_decided(Fixture::new().await, start).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn polling_it_does_as_was_decided_and_a_crash_forgets_nothing() {
    let fixture = Fixture::empty().await;
    fixture.set_up_polling().await;
    // No producer is refused anything, so that nothing is repeated.
    let flags = ["--mode", "poll", "-X", "compression.codec=none"];
    let start = async |fixture: &Fixture| {
        let mut relay = Relay::start(fixture, &[&RARELY[..], &flags].concat());
        relay.wait_for_log(" INFO polling ").await;
        relay
    };
    assert_does_as_was_decided(fixture, start).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_event_is_not_sent_whether_the_relay_has_seen_it_or_not() {
    let fixture = Fixture::new().await;
    let schedule = async || -> String {
        let sql = "SELECT postbox.emit($1, 'a', 'due', '{}', scheduled_at => now() + interval '6 s')::text";
        fixture
            .client
            .query_one(sql, &[&fixture.topic])
            .await
            .unwrap()
            .get(0)
    };
    let unseen = schedule().await;
    fixture
        .cancel_as(&fixture.database_url, &[&unseen])
        .results();
    let relay = Relay::streaming(&fixture, &[]).await;
    let (seen, kept) = (schedule().await, schedule().await);
    wait_until("the relay has them", async || {
        turns(&fixture)
            .await
            .iter()
            .filter(|line| line.starts_with("scheduled"))
            .count()
            >= 2
    })
    .await;
    fixture.cancel_as(&fixture.database_url, &[&seen]).results();
    wait_for_turns(&fixture, &[]).await;
    relay.drain().await;
    assert_eq!(sent(&fixture).await, [kept]);
}
