//! Harm, and then the same questions: is anything lost, reordered, invented, or
//! repeated beyond the window?

use std::fmt::Write as _;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::SinkExt;
use postbox::oracle::Load;
use tokio_postgres::types::PgLsn;

use crate::support::{Fixture, Relay, WINDOW, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigkill_in_a_loop_loses_nothing() {
    let fixture = Fixture::new().await;
    let writers = fixture.writers(fixture.load());
    for round in 0..8 {
        let relay = Relay::streaming(&fixture, &["--in-flight-max", "500"]).await;
        tokio::time::sleep(Duration::from_millis(300 + round * 100)).await;
        relay.kill();
    }
    writers.stop().await.unwrap();
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let verdict = fixture.verdict().await;
    // A slow machine may stretch a status interval.
    assert!(
        verdict.committed > 500 && verdict.is_clean(8 * 2000),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_in_a_loop_repeats_nothing() {
    let fixture = Fixture::new().await;
    let writers = fixture.writers(fixture.load());
    for round in 0..8 {
        let relay = Relay::streaming(&fixture, &[]).await;
        tokio::time::sleep(Duration::from_millis(300 + round * 100)).await;
        relay.drain().await;
    }
    writers.stop().await.unwrap();
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let verdict = fixture.verdict().await;
    assert!(verdict.committed > 500 && verdict.is_clean(0), "{verdict}");
}

/// Puts 500,000 rows into the outbox with one COPY, whose rows share WAL
/// positions, and enters them in the ledger.
async fn copy_half_a_million(fixture: &Fixture) {
    let mut rows = String::with_capacity(32 << 20);
    for number in 0..500_000 {
        let topic = &fixture.topic;
        writeln!(
            rows,
            "{topic}\tk{}\tchanged\t{{\"version\": {number}}}",
            number % 100
        )
        .unwrap();
    }
    let copy = "COPY postbox.outbox (aggregate_type, aggregate_id, event_type, payload) FROM STDIN";
    let sink = fixture.client.copy_in::<_, Bytes>(copy).await.unwrap();
    let mut sink = pin!(sink);
    sink.send(Bytes::from(rows)).await.unwrap();
    sink.finish().await.unwrap();
    let enter = "INSERT INTO postbox_oracle.ledger \
                 SELECT id, aggregate_id, (payload ->> 'version')::bigint FROM postbox.outbox";
    fixture.client.batch_execute(enter).await.unwrap();
}

/// Waits until some of the topic's records are there, and not all.
async fn wait_for_the_middle(relay: &Relay, fixture: &Fixture) {
    let metric = format!(
        "postbox_events_published_total{{topic=\"{}\"}}",
        fixture.topic
    );
    wait_until("a part is delivered", || async {
        let (_, text) = relay.get("/metrics");
        text.contains(&metric) && relay.metric(&metric) > 50_000.0
    })
    .await;
    assert!(relay.metric(&metric) < 450_000.0, "the middle has passed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigkill_in_the_middle_of_a_copy_repeats_it_and_loses_nothing() {
    let fixture = Fixture::new().await;
    copy_half_a_million(&fixture).await;
    let relay = Relay::streaming(&fixture, &[]).await;
    wait_for_the_middle(&relay, &fixture).await;
    relay.kill();
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let verdict = fixture.verdict().await;
    // Only the commit's end is a position: all that was delivered is repeated.
    assert!(verdict.is_clean(500_000), "{verdict}");
    assert!(verdict.duplicates > 0, "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_in_the_middle_of_a_copy_reads_on_to_its_end() {
    let fixture = Fixture::new().await;
    copy_half_a_million(&fixture).await;
    let relay = Relay::streaming(&fixture, &["--shutdown-timeout", "2m"]).await;
    wait_for_the_middle(&relay, &fixture).await;
    relay.drain().await;
    let verdict = fixture.verdict().await;
    assert!(verdict.is_clean(0), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_that_cannot_drain_in_time_says_so_and_loses_nothing() {
    let fixture = Fixture::new().await;
    copy_half_a_million(&fixture).await;
    let mut relay = Relay::streaming(&fixture, &["--shutdown-timeout", "100ms"]).await;
    wait_for_the_middle(&relay, &fixture).await;
    relay.signal("TERM");
    assert_eq!(relay.exit_code().await, 9);
    assert!(
        relay.log().contains("will be sent again"),
        "{}",
        relay.log()
    );
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let verdict = fixture.verdict().await;
    assert!(verdict.is_clean(500_000), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminated_walsender_is_replaced() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &[]).await;
    let writers = fixture.writers(fixture.load());
    let terminate = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active";
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(700)).await;
        let slot = &fixture.contract.slot;
        fixture.client.execute(terminate, &[slot]).await.unwrap();
    }
    writers.stop().await.unwrap();
    fixture.wait_for_confirmation().await;
    assert!(relay.metric("postbox_reconnects_total{reason=\"database_away\"}") >= 3.0);
    relay.drain().await;
    let verdict = fixture.verdict().await;
    assert!(verdict.is_clean(5 * WINDOW), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_broker_is_waited_for() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let relay = Relay::streaming(&fixture, &[]).await;
    let writers = fixture.writers(Load {
        events_per_second: 2000.0,
        ..fixture.load()
    });
    tokio::time::sleep(Duration::from_secs(2)).await;
    fixture
        .kafka
        .as_mut()
        .unwrap()
        .command("stop kill")
        .unwrap();
    wait_until("readiness is red and says why", || async {
        let (status, body) = relay.get("/readyz");
        status == 503 && body.contains("kafka: ")
    })
    .await;
    fixture.kafka.as_mut().unwrap().command("start").unwrap();
    wait_until("readiness is green again", || async {
        relay.get("/readyz").0 == 200
    })
    .await;
    writers.stop().await.unwrap();
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let verdict = fixture.verdict().await;
    assert!(verdict.is_clean(WINDOW), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_starts_before_its_servers_waits_for_them() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    fixture.insert("a", "{}").await;
    fixture
        .kafka
        .as_mut()
        .unwrap()
        .command("stop kill")
        .unwrap();
    fixture
        .postgres
        .as_mut()
        .unwrap()
        .command("stop fast")
        .unwrap();
    let mut relay = Relay::start(&fixture, &[]);
    relay.wait_for_log("trying again").await;
    assert_eq!(relay.get("/healthz").0, 200);
    assert_eq!(relay.get("/readyz").0, 503);
    fixture.postgres.as_mut().unwrap().command("start").unwrap();
    fixture.kafka.as_mut().unwrap().command("start").unwrap();
    relay.wait_for_log("streaming").await;
    fixture.reconnect().await;
    fixture.wait_for_confirmation().await;
    assert_eq!(fixture.records().await.len(), 1);
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_of_postgres_is_never_held_up_by_a_dead_kafka() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let relay = Relay::streaming(&fixture, &["--in-flight-max", "500"]).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    fixture
        .kafka
        .as_mut()
        .unwrap()
        .command("stop kill")
        .unwrap();
    // More than may be in flight, so that the stream stands still too.
    let writers = fixture.writers(fixture.load());
    tokio::time::sleep(Duration::from_secs(4)).await;
    writers.stop().await.unwrap();
    fixture
        .postgres
        .as_mut()
        .unwrap()
        .command("stop fast 15")
        .unwrap();
    fixture.postgres.as_mut().unwrap().command("start").unwrap();
    fixture.kafka.as_mut().unwrap().command("start").unwrap();
    fixture.reconnect().await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    // One event was inserted by hand, before the writers.
    let ids = "INSERT INTO postbox_oracle.ledger SELECT id, aggregate_id, 0 FROM postbox.outbox WHERE aggregate_id = 'a'";
    fixture.client.batch_execute(ids).await.unwrap();
    let verdict = fixture.verdict().await;
    assert!(
        verdict.committed > 600 && verdict.is_clean(WINDOW),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_confirmed_before_a_frozen_broker_has_it() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.insert("a", "1").await;
    fixture.wait_for_confirmation().await;
    fixture.kafka.as_mut().unwrap().command("pause").unwrap();
    // The commit lies behind this position.
    let before_commit: PgLsn = {
        let insert = format!(
            "BEGIN; INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
             SELECT '{}', 'a', 'changed', '{{}}' FROM generate_series(1, 200)",
            fixture.topic
        );
        fixture.client.batch_execute(&insert).await.unwrap();
        let position = fixture.wal_end().await;
        fixture.client.batch_execute("COMMIT").await.unwrap();
        position
    };
    for _ in 0..150 {
        let confirmed = fixture.confirmed().await;
        assert!(
            confirmed <= before_commit,
            "{confirmed} is past {before_commit}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    fixture.kafka.as_mut().unwrap().command("resume").unwrap();
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 201);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broker_and_relay_killed_together_lose_nothing() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let writers = fixture.writers(Load {
        events_per_second: 3000.0,
        ..fixture.load()
    });
    for _ in 0..2 {
        let relay = Relay::streaming(&fixture, &[]).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        fixture.kafka.as_mut().unwrap().command("pause").unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        relay.kill();
        fixture
            .kafka
            .as_mut()
            .unwrap()
            .command("stop kill")
            .unwrap();
        fixture.kafka.as_mut().unwrap().command("start").unwrap();
    }
    writers.stop().await.unwrap();
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let verdict = fixture.verdict().await;
    assert!(verdict.is_clean(2 * WINDOW), "{verdict}");
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
    let mut relay = Relay::streaming(&fixture, &["--wal-sender-timeout", "2s"]).await;
    let metric = format!(
        "postbox_events_published_total{{topic=\"{}\"}}",
        fixture.topic
    );
    wait_until("a part is delivered", || async {
        relay.get("/metrics").1.contains(&metric)
    })
    .await;
    let sql = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1";
    let pid: i32 = fixture
        .client
        .query_one(sql, &[&fixture.contract.slot])
        .await
        .unwrap()
        .get(0);
    let signal = |name: &str| {
        let sent = std::process::Command::new("kill")
            .args([name, &pid.to_string()])
            .status();
        assert!(sent.unwrap().success());
    };
    signal("-STOP");
    relay.wait_for_log("trying again").await;
    relay.signal("TERM");
    let code = relay.exit_code().await;
    signal("-CONT");
    // A part of the transaction was delivered, and will be again.
    assert_eq!(code, 9, "{}", relay.log());
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert!(fixture.records().await.len() > 300_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_while_disconnected_with_nothing_left_to_confirm_is_orderly() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let mut relay = Relay::streaming(&fixture, &[]).await;
    let writers = fixture.writers(fixture.load());
    let terminate =
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active";
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(600)).await;
        fixture.client.execute(terminate, &[]).await.unwrap();
    }
    writers.stop().await.unwrap();
    fixture.wait_for_confirmation().await;
    fixture
        .postgres
        .as_mut()
        .unwrap()
        .command("stop fast")
        .unwrap();
    wait_until("the relay has noticed", || async {
        relay.get("/readyz").0 == 503
    })
    .await;
    relay.signal("TERM");
    assert_eq!(relay.exit_code().await, 0, "{}", relay.log());
}
