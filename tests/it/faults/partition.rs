//! One partition's leader is stuck, while another's works.

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;

use super::commit_behind;
use crate::support::{Fixture, Relay, WINDOW, wait_until};

/// The test's topic, with a partition on each of two brokers.
async fn create_topic(fixture: &Fixture) {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", &fixture.brokers)
        .create()
        .unwrap();
    let replicas = TopicReplication::Variable(&[&[1], &[2]]);
    let topic = NewTopic::new(&fixture.topic, 2, replicas);
    let created = admin.create_topics(&[topic], &AdminOptions::new()).await;
    created.unwrap().remove(0).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_leader_holds_up_its_own_partition_and_then_the_stream() {
    one_leader_is_stuck("pause", "resume").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_leader_holds_up_its_own_partition_and_then_the_stream() {
    one_leader_is_stuck("stop kill", "start").await;
}

async fn one_leader_is_stuck(harm: &str, mend: &str) {
    const IN_FLIGHT_MAX: usize = 5000;
    let mut fixture = Fixture::with_two_brokers().await;
    create_topic(&fixture).await;
    let flags = ["--in-flight-max", &IN_FLIGHT_MAX.to_string()];
    let relay = Relay::streaming(&fixture, &flags).await;
    // Both partitions are in use.
    commit_behind(&fixture).await;
    fixture.wait_for_confirmation().await;
    let before = relay.published(&fixture.topic);
    fixture.second_broker(harm);
    let before_commit = commit_behind(&fixture).await;
    let writers = fixture.writers(fixture.load());

    let passed = || relay.published(&fixture.topic) - before;
    // Some of it may still be on its way to the other partition's leader.
    let read = || passed() + relay.metric("postbox_in_flight_events") as usize;
    wait_until("the other partition fills the window", || async {
        passed() > IN_FLIGHT_MAX / 10 && read() == IN_FLIGHT_MAX
    })
    .await;
    let mut peak = 0;
    let stuck = format!("topic \"{}\", partition 1, has not", fixture.topic);
    wait_until("readiness is red and says why", || {
        peak = peak.max(relay.memory());
        let (status, body) = relay.get("/readyz");
        let says_why = status == 503 && body.contains("no progress for ") && body.contains(&stuck);
        async move { says_why }
    })
    .await;
    assert!(fixture.confirmed().await <= before_commit);
    assert_eq!(read(), IN_FLIGHT_MAX);
    // A debug build has 17 MiB, however many events were committed behind these.
    assert!(peak < 50 << 20, "{} MiB", peak >> 20);

    fixture.second_broker(mend);
    wait_until("readiness is green again", || async {
        relay.get("/readyz").0 == 200
    })
    .await;
    writers.stop().await.unwrap();
    fixture.enter_in_ledger().await;
    let verdict = fixture.judge(relay).await;
    assert!(verdict.is_clean(IN_FLIGHT_MAX + WINDOW), "{verdict}");
}
