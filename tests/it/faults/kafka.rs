//! Brokers that stop or freeze.

use std::time::Duration;

use super::commit_behind;
use crate::support::{Fixture, Relay, SMALL_WINDOW, WINDOW, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_broker_is_waited_for() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let relay = Relay::streaming(&fixture, &SMALL_WINDOW).await;
    let writers = fixture.writers(fixture.steady_load());
    fixture.outgrow(&relay, WINDOW).await;
    fixture.kafka("stop kill");
    wait_until("readiness is red and says why", || async {
        let (status, body) = relay.get("/readyz");
        status == 503 && body.contains("kafka: ")
    })
    .await;
    fixture.kafka("start");
    wait_until("readiness is green again", || async {
        relay.get("/readyz").0 == 200
    })
    .await;
    writers.stop().await.unwrap();
    fixture.assert_repeats_at_most(WINDOW, relay).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_starts_before_its_servers_waits_for_them() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    fixture.insert("a", "{}").await;
    fixture.kafka("stop kill");
    fixture.postgres("stop fast");
    let mut relay = Relay::start(&fixture, &[]);
    relay.wait_for_log("trying again").await;
    assert_eq!(relay.get("/healthz").0, 200);
    assert_eq!(relay.get("/readyz").0, 503);
    fixture.postgres("start");
    fixture.kafka("start");
    relay.wait_for_log("streaming").await;
    fixture.reconnect().await;
    fixture.wait_for_confirmation().await;
    assert_eq!(fixture.records().await.len(), 1);
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_confirmed_before_a_frozen_broker_has_it() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.insert("a", "1").await;
    fixture.wait_for_confirmation().await;
    fixture.kafka("pause");
    let before_commit = commit_behind(&fixture).await;
    for _ in 0..150 {
        let confirmed = fixture.confirmed().await;
        assert!(
            confirmed <= before_commit,
            "{confirmed} is past {before_commit}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    fixture.kafka("resume");
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 201);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn broker_and_relay_killed_together_lose_nothing() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let writers = fixture.writers(fixture.steady_load());
    for _ in 0..2 {
        let relay = Relay::streaming(&fixture, &SMALL_WINDOW).await;
        fixture.outgrow(&relay, WINDOW).await;
        fixture.kafka("pause");
        tokio::time::sleep(Duration::from_millis(500)).await;
        relay.kill();
        fixture.kafka("stop kill");
        fixture.kafka("start");
    }
    writers.stop().await.unwrap();
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.assert_repeats_at_most(2 * WINDOW, relay).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_password_that_the_brokers_refuse_stops_the_relay() {
    let login = "org.apache.kafka.common.security.plain.PlainLoginModule required \
                 username=\"broker\" password=\"own\" user_broker=\"own\" user_relay=\"right\";";
    let login = format!("listener.name.plaintext.plain.sasl.jaas.config={login}");
    let settings = [
        "listener.security.protocol.map=PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT",
        "sasl.enabled.mechanisms=PLAIN",
        "sasl.mechanism.inter.broker.protocol=PLAIN",
        &login,
    ];
    let fixture = Fixture::with_servers(&[], &settings).await;
    let flags = "security.protocol=SASL_PLAINTEXT\nsasl.mechanism=PLAIN\nsasl.username=relay\nsasl.password=";
    let relay = |password| {
        let properties = format!("{flags}{password}");
        let flags: Vec<_> = properties.lines().flat_map(|line| ["-X", line]).collect();
        Relay::start(&fixture, &flags)
    };
    fixture.insert("a", "{}").await;
    let mut wrong = relay("wrong");
    assert_eq!(wrong.exit_code().await, 6, "{}", wrong.log());
    let log = wrong.log();
    assert!(log.contains("the brokers refuse our identity"), "{log}");
    let right = relay("right");
    fixture.wait_for_confirmation().await;
    right.drain().await;
}
