//! A topic that the brokers do not take.

use std::time::{Duration, Instant};

use rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};

use super::{LARGE, RARELY, SMALL, SOON, limit, parked, wait_for_parked};
use crate::poison::{admin, create_topic, incompressible};
use crate::support::{Fixture, PATIENCE, Relay, wait_until};

pub(super) async fn create(fixture: &Fixture, name: &str) {
    let topic = NewTopic::new(name, 1, TopicReplication::Fixed(1));
    let created = admin(fixture)
        .create_topics(&[topic], &AdminOptions::new())
        .await;
    created.unwrap().remove(0).unwrap();
}

/// What goes to it waits, in its order and untried; what does not is not held up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_of_a_topic_that_nobody_creates_wait_for_it() {
    let mut fixture = Fixture::with_servers(&[], &["auto.create.topics.enable=false"]).await;
    let there = fixture.topic.clone();
    create(&fixture, &there).await;
    let missing = format!("{there}-missing");
    let flags = [&SOON[..], &["--max-attempts", "1"]].concat();
    let mut relay = Relay::streaming(&fixture, &flags).await;
    for number in 0..20 {
        fixture.topic.clone_from(&missing);
        fixture.insert(&(number % 3).to_string(), "{}").await;
        fixture.topic.clone_from(&there);
        fixture.insert(&(number % 3).to_string(), "{}").await;
    }
    fixture.wait_for_confirmation().await;
    assert_eq!(fixture.records().await.len(), 20);
    assert_eq!(parked(&fixture).await.len(), 20);
    let told =
        format!("events of this topic wait until the brokers take them: topic \"{missing}\"");
    relay.wait_for_log(&told).await;
    // A relay that comes later knows that it is held.
    relay.drain().await;
    let relay = Relay::streaming(&fixture, &flags).await;
    fixture.topic.clone_from(&missing);
    fixture.insert("0", "{}").await;
    fixture.wait_for_confirmation().await;
    assert!(
        parked(&fixture)
            .await
            .iter()
            .all(|line| line.ends_with(" 0"))
    );
    create(&fixture, &missing).await;
    wait_for_parked(&fixture, &[]).await;
    fixture.insert("1", "{}").await;
    wait_until("it is sent directly", async || {
        relay.published(&missing) == 22
    })
    .await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let enter = "INSERT INTO postbox_oracle.ledger SELECT id, aggregate_id, seq FROM postbox.outbox \
                 WHERE aggregate_type LIKE '%-missing'";
    fixture.client.batch_execute(enter).await.unwrap();
    let verdict = fixture.verdict().await;
    assert!(verdict.is_clean(0), "{verdict}");
}

/// The first that is tried then is refused for itself: that says nothing about the topic.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_created_takes_others_than_the_one_that_it_cannot() {
    let fixture = Fixture::with_servers(&[], &["auto.create.topics.enable=false"]).await;
    let relay = Relay::streaming(&fixture, &RARELY).await;
    fixture.insert("a", &incompressible(5000)).await;
    fixture.wait_for_confirmation().await;
    assert_eq!(parked(&fixture).await, ["waiting a 0"]);
    create_topic(&fixture, SMALL).await;
    wait_for_parked(&fixture, &["waiting a 1"]).await;
    for key in ["b", "a", "c"] {
        fixture.insert(key, "{}").await;
    }
    wait_until("others are sent", async || {
        fixture.keys().await == ["b", "c"]
    })
    .await;
    wait_for_parked(&fixture, &["waiting a 1", "waiting a 0"]).await;
    limit(&fixture, LARGE).await;
    fixture.parked(&["retry", "--all"]).results();
    wait_for_parked(&fixture, &[]).await;
    fixture.enter_in_ledger().await;
    let verdict = fixture.judge(relay).await;
    assert!(verdict.is_clean(0), "{verdict}");
}

/// Each question blocks a thread, and each client for them has threads of its own.
#[cfg(target_os = "linux")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_topics_are_asked_about_at_once_by_a_few_threads() {
    const TOPICS: usize = 200;
    let fixture = Fixture::new().await;
    let names: Vec<String> = (0..TOPICS)
        .map(|number| format!("{}-{number}", fixture.topic))
        .collect();
    let topics = names
        .iter()
        .map(|name| NewTopic::new(name, 1, TopicReplication::Fixed(1)));
    let topics: Vec<NewTopic<'_>> = topics.collect();
    let created = admin(&fixture)
        .create_topics(&topics, &AdminOptions::new())
        .await;
    assert!(created.unwrap().iter().all(Result::is_ok));
    let relay = Relay::streaming(&fixture, &SOON).await;
    let sql = "SELECT postbox.emit(name, 'a', 'changed', '{}', scheduled_at => now() + interval '5 s') \
               FROM unnest($1::text[]) AS name";
    fixture.client.query(sql, &[&names]).await.unwrap();
    wait_until("all are parked", async || {
        parked(&fixture).await.len() == TOPICS
    })
    .await;
    let deadline = Instant::now() + PATIENCE;
    let mut most = 0;
    while !parked(&fixture).await.is_empty() {
        assert!(Instant::now() < deadline, "{}", relay.log());
        let status = std::fs::read_to_string(format!("/proc/{}/status", relay.pid())).unwrap();
        let mut lines = status.lines();
        let threads = lines.find_map(|line| line.strip_prefix("Threads:"));
        most = most.max(threads.unwrap().trim().parse::<usize>().unwrap());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(most < TOPICS, "{most} threads");
    relay.drain().await;
}

/// While more comes for it all the time, and some is parked just as it is being freed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_created_under_load_is_free_soon_and_its_events_are_in_order() {
    let fixture = Fixture::with_servers(&[], &["auto.create.topics.enable=false"]).await;
    let relay = Relay::streaming(&fixture, &SOON).await;
    let writers = fixture.writers(fixture.steady_load());
    wait_until("many wait", async || parked(&fixture).await.len() > 3000).await;
    create(&fixture, &fixture.topic).await;
    wait_until("none waits", async || parked(&fixture).await.is_empty()).await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge(relay).await;
    // What a trial of the topic had on its way when it was too soon.
    assert!(verdict.is_clean(1000), "{verdict}");
}
