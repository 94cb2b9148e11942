//! What stands still and says nothing: readiness is red within 15 s, says why, and is
//! green again by itself.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::support::{Fixture, Proxy, Relay, Weather, signal, wait_until};

/// How long a stall may go unseen.
const SEEN_WITHIN: Duration = Duration::from_secs(15);

/// Readiness is red in time, and its body has a line with all of these.
async fn assert_red(relay: &Relay, reason: &[&str]) {
    let since = Instant::now();
    loop {
        let (status, body) = relay.get("/readyz");
        let says_why = |line: &str| reason.iter().all(|part| line.contains(part));
        if status == 503 && body.lines().any(says_why) {
            return;
        }
        assert!(
            since.elapsed() < SEEN_WITHIN,
            "{status} without {reason:?}: {body}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn wait_for_green(relay: &Relay) {
    wait_until("readiness is green again", async || {
        relay.get("/readyz").0 == 200
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_broker_is_seen_and_what_waits_for_it() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let waits = format!("topic \"{}\", partition 0, ", fixture.topic);
    let full = ["no progress for ", &waits, "no more are read"];
    // Nothing waits, and then more than may be in flight.
    for (bound, events, reason) in [
        (
            ["--in-flight-max", "5"],
            0,
            ["kafka: no broker answers"].as_slice(),
        ),
        (
            ["--in-flight-max", "5"],
            20,
            &[full[0], full[1], full[2], "5 events"],
        ),
        (["--in-flight-bytes-max", "1KiB"], 20, &full),
    ] {
        let relay = Relay::streaming(&fixture, &bound).await;
        fixture.insert("a", "{}").await;
        fixture.wait_for_confirmation().await;
        fixture.kafka("pause");
        for _ in 0..events {
            fixture.insert("a", "{}").await;
        }
        assert_red(&relay, reason).await;
        fixture.kafka("resume");
        wait_for_green(&relay).await;
        fixture.wait_for_confirmation().await;
        relay.drain().await;
    }
    // A broker that stood still for long may be told of what is in flight once more.
    let ids: HashSet<_> = fixture.records().await.iter().map(|seen| seen.id).collect();
    assert_eq!(ids.len(), 3 + 20 + 20);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_that_says_nothing_is_seen() {
    let proxy = Proxy::start().await;
    let (fixture, url) = Fixture::behind(&proxy).await;
    // However long the stream itself would wait.
    for timeout in ["8s", "10m"] {
        let flags = ["--database-url", &url, "--wal-sender-timeout", timeout];
        let relay = Relay::streaming(&fixture, &flags).await;
        fixture.insert("a", "{}").await;
        fixture.wait_for_confirmation().await;
        wait_for_green(&relay).await;
        proxy.weather(Weather::Stalled);
        assert_red(&relay, &["postgres: "]).await;
        proxy.weather(Weather::Fair);
        wait_for_green(&relay).await;
        fixture.insert("a", "{}").await;
        fixture.wait_for_confirmation().await;
        relay.drain().await;
    }
}

/// The walsender stands still, and everything else of the server goes on. The stream
/// itself would wait for twenty minutes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_says_nothing_beside_a_server_that_writes_is_seen() {
    let fixture = Fixture::with_postgres(&[]).await;
    fixture.setup(&[]).results();
    let silent = ["--wal-sender-timeout", "10m", "--heartbeat-interval", "10m"];
    let relay = Relay::streaming(&fixture, &silent).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    // Where nothing is written, nothing is owed.
    tokio::time::sleep(Duration::from_secs(14)).await;
    assert_eq!(relay.get("/readyz").0, 200);

    let walsender = fixture.walsender().await;
    signal(walsender, "STOP");
    fixture.insert("a", "{}").await;
    assert_red(&relay, &["postgres: ", " its stream has said nothing for "]).await;
    signal(walsender, "CONT");
    wait_for_green(&relay).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_accept_and_say_nothing_from_the_start_are_seen() {
    let (postgres, kafka) = (Proxy::start().await, Proxy::start().await);
    let (fixture, url) = Fixture::behind(&postgres).await;
    kafka.pass_on_to(&fixture.brokers);
    postgres.weather(Weather::Stalled);
    kafka.weather(Weather::Stalled);
    let flags = ["--database-url", &url, "--brokers", kafka.address()];
    let mut relay = Relay::start(&fixture, &flags);
    relay.wait_for_log("serving http").await;
    assert_red(&relay, &["postgres: connect to ", ": no answer within "]).await;
    postgres.weather(Weather::Fair);
    assert_red(&relay, &["kafka: no broker answers"]).await;
    kafka.weather(Weather::Fair);
    wait_for_green(&relay).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
}

/// What was asked before a connection died is never answered: the relay asks again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_that_falls_silent_between_login_and_stream_is_given_up() {
    let proxy = Proxy::start().await;
    let (mut fixture, url) = Fixture::behind(&proxy).await;
    // The first question after the login waits for this lock.
    let lock = "BEGIN; LOCK TABLE postbox.checkpoint IN ACCESS EXCLUSIVE MODE";
    fixture.client.batch_execute(lock).await.unwrap();
    let mut relay = Relay::start(&fixture, &["--database-url", &url]);
    relay.wait_for_log("serving http").await;
    assert_red(
        &relay,
        &["postgres: read what was set up: no answer within "],
    )
    .await;
    fixture.reconnect().await;
    wait_for_green(&relay).await;
    relay.drain().await;
}
