//! Brokers that do not answer while what waits is sent.

use std::time::Duration;

use rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};

use super::scheduled::schedule;
use super::{LARGE, RARELY, SMALL, SOON, limit, wait_for_parked};
use crate::poison::{admin, create_topic, incompressible};
use crate::support::{Fixture, Relay, wait_until};

/// An event of this key waits. The relay is sending it to brokers that are frozen.
pub(super) async fn send_to_frozen_brokers(fixture: &mut Fixture, key: &str) {
    limit(fixture, SMALL).await;
    fixture.insert(key, &incompressible(5000)).await;
    wait_for_parked(fixture, &[&format!("waiting {key} 1")]).await;
    fixture.wait_for_confirmation().await;
    // So that it knows the topic, and need not ask about it.
    let tried = "SELECT tried_at > decided_at FROM postbox.parked";
    fixture.parked(&["retry", "--all"]).results();
    wait_until("it is refused again", async || {
        fixture.client.query_one(tried, &[]).await.unwrap().get(0)
    })
    .await;
    limit(fixture, LARGE).await;
    fixture.kafka("pause");
    fixture.parked(&["retry", "--all"]).results();
    wait_until("it is taken", async || {
        let sql = "SELECT taken_at IS NOT NULL FROM postbox.parked";
        fixture.client.query_one(sql, &[]).await.unwrap().get(0)
    })
    .await;
    // And handed over.
    tokio::time::sleep(Duration::from_millis(500)).await;
}

/// It waits for them no longer than it may take to stop. What was on its way is sent by the
/// next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_sends_what_waits_to_frozen_brokers_stops_in_time_and_loses_nothing() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    create_topic(&fixture, SMALL).await;
    for (timeout, code) in [("1s", 9), ("20s", 0)] {
        let flags = [&RARELY[..], &["--shutdown-timeout", timeout]].concat();
        let mut relay = Relay::streaming(&fixture, &flags).await;
        send_to_frozen_brokers(&mut fixture, "a").await;
        relay.signal("TERM");
        assert_eq!(relay.exit_code().await, code, "{}", relay.log());
        fixture.kafka("resume");
        wait_for_parked(&fixture, &["waiting a 0"]).await;
        let relay = Relay::streaming(&fixture, &RARELY).await;
        wait_for_parked(&fixture, &[]).await;
        fixture.insert("a", "{}").await;
        fixture.wait_for_confirmation().await;
        relay.drain().await;
    }
    fixture.enter_in_ledger().await;
    let verdict = fixture.verdict().await;
    // What the brokers took when they could.
    assert!(verdict.is_clean(2), "{verdict}");
    assert_eq!(verdict.committed, 4);
}

/// As many as are taken at once, and more, whose partition has no leader, do not hold up others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scheduled_events_go_out_though_the_leader_of_others_is_away() {
    const EVENTS: i32 = 1100;
    let mut fixture = Fixture::with_two_brokers().await;
    let away = format!("{}-away", fixture.topic);
    let create = async |name: &str, broker: i32| {
        let replicas = [broker];
        let replicas = [&replicas[..]];
        let topic = NewTopic::new(name, 1, TopicReplication::Variable(&replicas));
        let created = admin(&fixture)
            .create_topics(&[topic], &AdminOptions::new())
            .await;
        created.unwrap().remove(0).unwrap();
    };
    create(&fixture.topic, 1).await;
    create(&away, 2).await;
    let relay = Relay::streaming(&fixture, &SOON).await;
    let sql = "SELECT postbox.emit($1, n::text, 'changed', '{}', scheduled_at => clock_timestamp() + interval '5 s') \
               FROM generate_series(1, $2) AS n";
    let scheduled = fixture.client.query(sql, &[&away, &EVENTS]).await;
    assert_eq!(scheduled.unwrap().len(), 1100);
    schedule(&fixture, "a", "1", "6 s").await;
    fixture.second_broker("stop kill");
    wait_until("it is sent", async || fixture.keys().await == ["a"]).await;
    fixture.second_broker("start");
    wait_for_parked(&fixture, &[]).await;
    relay.drain().await;
    fixture.topic = away;
    let mut keys = fixture.keys().await;
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), 1100);
}
