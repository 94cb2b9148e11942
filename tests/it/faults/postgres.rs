//! A Postgres that stops, crashes or freezes.

use std::time::Duration;

use crate::support::{Fixture, Proxy, Relay, SMALL_WINDOW, WINDOW, Weather, signal, wait_until};

/// Without `synchronous_commit`, a crash takes back what was committed and not yet
/// flushed: none of it may be in Kafka. And what was in flight to a frozen broker is
/// given up, so that only the slot knows where to begin again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_of_postgres_loses_nothing_and_invents_nothing() {
    let mut fixture = Fixture::with_servers(&["synchronous_commit=off"], &[]).await;
    let relay = Relay::streaming(&fixture, &["--in-flight-max", "500"]).await;
    let writers = fixture.writers(fixture.load());
    let mut repeatable = 0;
    for _ in 0..3 {
        let stored = relay.published(&fixture.topic);
        // The relay stores its position every second.
        tokio::time::sleep(Duration::from_secs(3)).await;
        fixture.kafka("pause");
        wait_until("events are in flight", || async {
            relay.metric("postbox_in_flight_events") > 0.0
        })
        .await;
        fixture.postgres("stop immediate");
        wait_until("the relay has given up what was in flight", || async {
            relay.get("/readyz").1.contains("postgres: ")
        })
        .await;
        // A server that crashed starts each slot at the position that it last wrote
        // to its disk, and it does that only now and then: the relay begins where its
        // own position is.
        repeatable += relay.published(&fixture.topic) - stored + 500;
        fixture.kafka("resume");
        fixture.postgres("start");
        wait_until("readiness is green again", || async {
            relay.get("/readyz").0 == 200
        })
        .await;
    }
    fixture.reconnect().await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge(relay).await;
    assert!(
        verdict.committed > 500 && verdict.is_clean(repeatable),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminated_walsender_is_replaced() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &SMALL_WINDOW).await;
    let writers = fixture.writers(fixture.steady_load());
    for _ in 0..3 {
        fixture.outgrow(&relay, WINDOW).await;
        fixture.terminate_walsender().await;
    }
    writers.stop().await.unwrap();
    fixture.wait_for_confirmation().await;
    assert!(relay.metric("postbox_reconnects_total{reason=\"database_away\"}") >= 3.0);
    fixture.assert_repeats_at_most(3 * WINDOW, relay).await;
}

/// What was delivered before a connection was cut, and not confirmed, is read again. A
/// stop in the midst of that reads on to its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_after_a_cut_leaves_nothing_to_repeat() {
    let proxy = Proxy::start().await;
    let (mut fixture, url) = Fixture::behind(&proxy).await;
    let many = format!(
        "DO $$ BEGIN FOR n IN 1..2000 LOOP \
             INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
             VALUES ('{}', n::text, 'changed', '{{}}'); COMMIT; \
         END LOOP; END $$",
        fixture.topic
    );
    fixture.client.batch_execute(&many).await.unwrap();
    // Nothing of what is delivered is confirmed, nor stored.
    let mut relay = Relay::streaming(
        &fixture,
        &["--database-url", &url, "--status-interval", "4s"],
    )
    .await;
    let locking = fixture.lock_checkpoint().await;
    wait_until("all is delivered", || async {
        relay.published(&fixture.topic) == 2000
    })
    .await;
    proxy.cut();
    locking.batch_execute("ROLLBACK").await.unwrap();
    wait_until("it streams again", || async {
        relay.log().matches("INFO streaming").count() == 2
    })
    .await;
    relay.signal("TERM");
    assert_eq!(relay.exit_code().await, 0, "{}", relay.log());
    fixture.reconnect().await;
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.insert("last", "{}").await;
    fixture.wait_for_confirmation().await;
    assert_eq!(relay.published(&fixture.topic), 1);
    relay.drain().await;
}

/// A confirmation that left the relay and did not arrive is none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_after_a_confirmation_was_cut_off_says_that_events_are_repeated() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let proxy = Proxy::start().await;
    let url = fixture.url_behind(&proxy);
    let mut relay = Relay::streaming(&fixture, &["--database-url", &url]).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    fixture.kafka("pause");
    let in_flight = || relay.metric("postbox_in_flight_events") as usize;
    fixture.insert("a", "{}").await;
    wait_until("it is on its way", async || in_flight() == 1).await;
    // Half of two at once could be one of them.
    proxy.weather(Weather::Silent);
    fixture.kafka("resume");
    wait_until("it is delivered", async || in_flight() == 0).await;
    // More than a status interval: the relay has told what the proxy keeps.
    tokio::time::sleep(Duration::from_millis(500)).await;
    proxy.cut();
    relay.wait_for_log("trying again").await;
    relay.signal("TERM");
    assert_eq!(relay.exit_code().await, 9, "{}", relay.log());
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 3);
}

/// What the slot has confirmed and nobody has stored, a crash of Postgres may still forget.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_before_the_position_is_stored_says_that_events_may_be_repeated() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let mut relay = Relay::streaming(&fixture, &[]).await;
    let locking = fixture.lock_checkpoint().await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    fixture.kafka("pause");
    let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
               WHERE application_name LIKE '% control' OR backend_type = 'walsender'";
    fixture.client.batch_execute(cut).await.unwrap();
    relay.wait_for_log("trying again").await;
    locking.batch_execute("ROLLBACK").await.unwrap();
    wait_until("it has looked for the brokers", async || {
        relay.log().matches("trying again").count() >= 2
    })
    .await;
    relay.signal("TERM");
    assert_eq!(relay.exit_code().await, 9, "{}", relay.log());
}

/// What a slot has confirmed may be on the server's disk much later. Each start stores
/// it, or relays that live for less than a second each would leave it all to a crash.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_slot_has_confirmed_is_stored_at_the_start() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let at_the_end = fixture.stored().await;
    let forget = "UPDATE postbox.checkpoint SET lsn = '0/1'";
    fixture.client.batch_execute(forget).await.unwrap();
    // One at a time: it takes a while until anything else is stored.
    fixture.insert_many("b", "{}", 1000).await;
    let relay = Relay::streaming(&fixture, &["--in-flight-max", "1"]).await;
    assert!(fixture.stored().await >= at_the_end);
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_walsender_is_given_up_and_a_stop_then_tells_the_truth() {
    let fixture = Fixture::new().await;
    let many = format!(
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
         SELECT '{}', 'a', 'changed', json_build_object('n', n) FROM generate_series(1, 300000) AS n",
        fixture.topic
    );
    fixture.client.batch_execute(&many).await.unwrap();
    fixture.enter_in_ledger().await;
    let mut relay = Relay::streaming(&fixture, &["--wal-sender-timeout", "2s"]).await;
    wait_until("a part is delivered", || async {
        relay.published(&fixture.topic) > 0
    })
    .await;
    let walsender = fixture.walsender().await;
    signal(walsender, "STOP");
    relay.wait_for_log("trying again").await;
    relay.signal("TERM");
    let code = relay.exit_code().await;
    signal(walsender, "CONT");
    // A part of the transaction was delivered, and will be again.
    assert_eq!(code, 9, "{}", relay.log());
    let relay = Relay::streaming(&fixture, &[]).await;
    let verdict = fixture.judge(relay).await;
    assert!(
        verdict.duplicates > 0 && verdict.is_clean(300_000),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_of_postgres_is_never_held_up_by_a_dead_kafka() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let relay = Relay::streaming(&fixture, &SMALL_WINDOW).await;
    let writers = fixture.writers(fixture.steady_load());
    fixture.outgrow(&relay, WINDOW).await;
    fixture.kafka("stop kill");
    // More than may be in flight, so that the stream stands still too.
    let before = writers.committed();
    wait_until("the window is full", || async {
        writers.committed() > before + WINDOW as u64
    })
    .await;
    writers.stop().await.unwrap();
    fixture.postgres("stop fast 15");
    fixture.postgres("start");
    fixture.kafka("start");
    fixture.reconnect().await;
    fixture.assert_repeats_at_most(WINDOW, relay).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_while_disconnected_with_nothing_left_to_confirm_is_orderly() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let mut relay = Relay::streaming(&fixture, &[]).await;
    let writers = fixture.writers(fixture.load());
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(600)).await;
        fixture.terminate_walsender().await;
    }
    writers.stop().await.unwrap();
    fixture.wait_for_confirmation().await;
    let before = fixture.wal_end().await;
    fixture.insert("last", "{}").await;
    wait_until("its delivery is stored", async || {
        fixture.stored().await > before
    })
    .await;
    fixture.postgres("stop fast");
    wait_until("the relay has noticed", || async {
        relay.get("/readyz").0 == 503
    })
    .await;
    relay.signal("TERM");
    assert_eq!(relay.exit_code().await, 0, "{}", relay.log());
}

/// A stream that held for a while is not part of a series of failures, even if no
/// event came.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_relay_comes_back_as_fast_as_a_busy_one() {
    let fixture = Fixture::new().await;
    let mut relay = Relay::streaming(&fixture, &[]).await;
    let lines = |relay: &Relay, what: &str| relay.log().matches(what).count();
    for round in 0..5 {
        wait_until("the stream is open again", async || {
            lines(&relay, " streaming ") > round
        })
        .await;
        if round == 4 {
            tokio::time::sleep(Duration::from_millis(10_500)).await;
        }
        fixture.terminate_walsender().await;
        wait_until("the stream is ended", async || {
            lines(&relay, "trying again in ") > round
        })
        .await;
    }
    let log = relay.log();
    let pause = log.rsplit("trying again in ").next().unwrap();
    let seconds: f32 = pause.split(' ').next().unwrap().parse().unwrap();
    assert!(seconds <= 0.2, "{log}");
    relay.wait_for_log("streaming").await;
    relay.drain().await;
}
