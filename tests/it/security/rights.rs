//! Topics that are not ours to write to, until somebody allows it.

use std::time::{Duration, Instant};

use postbox::oracle::Reader;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;

use super::acls::Operation::{Describe, Write};
use super::acls::{Acl, Operation, Permission};
use super::servers::{CLERK, GUARD, GUEST, kafka, kafka_flags};
use super::{borrowed, complaint};
use crate::parking::wait_for_parked;
use crate::poison::STOP;
use crate::support::{Fixture, Relay, SMALL_WINDOW, WINDOW};

/// A topic with one partition, on which this user has these rights.
async fn create_topic(name: &str, user: &str, rights: &[Operation]) {
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", kafka().fact("brokers"))
        .create()
        .unwrap();
    let topic = NewTopic::new(name, 1, TopicReplication::Fixed(1));
    let created = admin.create_topics(&[topic], &AdminOptions::new()).await;
    created.unwrap().remove(0).unwrap();
    for &operation in rights {
        allow(name, user, operation);
    }
}

fn allow(topic: &str, user: &str, operation: Operation) {
    let permission = Permission::Allow;
    let acl = Acl {
        user,
        topic,
        operation,
        permission,
    };
    acl.create(kafka().fact("brokers"));
}

async fn insert(fixture: &Fixture, topic: &str, key: &str) -> String {
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
               VALUES ($1, $2, 'changed', '{}') RETURNING id::text";
    let row = fixture.client.query_one(sql, &[&topic, &key]).await;
    row.unwrap().get(0)
}

async fn on_secure_kafka() -> Fixture {
    let mut fixture = Fixture::new().await;
    fixture.brokers = kafka().fact("brokers").to_owned();
    fixture
}

fn relay(fixture: &Fixture, user: &str) -> Relay {
    let flags = kafka_flags("IN", &[("sasl.username", user)]);
    let flags = [&borrowed(&flags)[..], &SMALL_WINDOW, &STOP].concat();
    Relay::start(fixture, &flags)
}

async fn assert_stopped(mut relay: Relay, id: &str, topic: &str) {
    assert_eq!(relay.exit_code().await, 8, "{}", relay.log());
    let log = relay.log();
    let complaint = complaint(&log);
    for text in [
        id,
        &format!("topic \"{topic}\": TopicAuthorizationFailed"),
        "allow Write and Describe on the topic",
    ] {
        assert!(complaint.contains(text), "no \"{text}\" in: {complaint}");
    }
}

/// The keys of a topic's records, in their order.
async fn keys(fixture: &Fixture, topic: &str) -> Vec<String> {
    let (kafka, topic) = (fixture.kafka_settings(), topic.to_owned());
    let read = tokio::task::spawn_blocking(move || {
        Reader::open(&kafka, &topic, Instant::now())?.read_to_end()
    });
    let records = read.await.unwrap().unwrap().into_iter();
    records.map(|record| record.key).collect()
}

/// What stands behind it is not sent before it, not even to other topics.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_is_not_ours_stops_the_relay_until_it_is_allowed() {
    let fixture = on_secure_kafka().await;
    let closed = &fixture.topic;
    let open = format!("{closed}-open");
    create_topic(closed, CLERK, &[]).await;
    create_topic(&open, CLERK, &[Write, Describe]).await;
    insert(&fixture, &open, "before").await;
    let id = insert(&fixture, closed, "first").await;
    insert(&fixture, &open, "after").await;
    insert(&fixture, closed, "second").await;

    // To see a topic is not to write to it.
    for right in [Describe, Write] {
        assert_stopped(relay(&fixture, CLERK), &id, closed).await;
        assert!(fixture.confirmed().await < fixture.wal_end().await);
        assert_eq!(keys(&fixture, closed).await, [""; 0]);
        assert_eq!(keys(&fixture, &open).await, ["before"]);
        allow(closed, CLERK, right);
    }
    let mut relay = relay(&fixture, CLERK);
    relay.wait_for_log("streaming").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(keys(&fixture, closed).await, ["first", "second"]);
    assert_eq!(keys(&fixture, &open).await, ["before", "after"]);
}

/// Nothing else waits for it, and to be refused does not count as an attempt.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_of_a_topic_that_is_not_ours_wait_until_it_is_allowed() {
    let fixture = on_secure_kafka().await;
    let closed = &fixture.topic;
    let open = format!("{closed}-open");
    create_topic(closed, CLERK, &[]).await;
    create_topic(&open, CLERK, &[Write, Describe]).await;
    let flags = kafka_flags("IN", &[("sasl.username", CLERK)]);
    let flags = [&borrowed(&flags)[..], &["--max-attempts", "1"]].concat();
    let relay = Relay::streaming(&fixture, &flags).await;
    for number in ["1", "2"] {
        insert(&fixture, closed, number).await;
        insert(&fixture, &open, number).await;
    }
    // To see a topic is not to write to it.
    for right in [Describe, Write] {
        fixture.wait_for_confirmation().await;
        wait_for_parked(&fixture, &["waiting 1 0", "waiting 2 0"]).await;
        assert_eq!(keys(&fixture, closed).await, [""; 0]);
        allow(closed, CLERK, right);
        if matches!(right, Describe) {
            // It is tried again meanwhile.
            tokio::time::sleep(Duration::from_secs(5)).await;
        }
    }
    wait_for_parked(&fixture, &[]).await;
    insert(&fixture, closed, "3").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(keys(&fixture, closed).await, ["1", "2", "3"]);
    assert_eq!(keys(&fixture, &open).await, ["1", "2"]);
}

/// Nothing that is parked is tried before its transaction is behind the relay: until then its
/// topic is seen, and nothing is known of whether it can be written to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_may_be_seen_alone_does_not_hold_up_a_long_transaction() {
    const EVENTS: i32 = 30_000;
    let fixture = on_secure_kafka().await;
    let closed = &fixture.topic;
    let open = format!("{closed}-open");
    create_topic(closed, CLERK, &[Describe]).await;
    create_topic(&open, CLERK, &[Write, Describe]).await;
    let flags = kafka_flags("IN", &[("sasl.username", CLERK)]);
    let flags = [&borrowed(&flags)[..], &SMALL_WINDOW].concat();
    let relay = Relay::streaming(&fixture, &flags).await;
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
               SELECT CASE n % 2 WHEN 0 THEN $1 ELSE $2 END, n::text, 'changed', '{}' \
               FROM generate_series(1, $3) AS n";
    let inserted = fixture.client.execute(sql, &[closed, &open, &EVENTS]).await;
    assert_eq!(inserted.unwrap(), 30_000);
    fixture.wait_for_confirmation().await;
    let attempts = relay.log().matches("streaming slot").count();
    assert!(attempts <= 3, "{}", relay.log());
    let sent = keys(&fixture, &open).await.len();
    assert!(
        (15_000..15_000 + 2 * WINDOW).contains(&sent),
        "{sent} were sent"
    );
    let sql = "SELECT count(*) FROM postbox.parked WHERE status = 'waiting' AND attempts = 0";
    let row = fixture.client.query_one(sql, &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 15_000);
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_right_that_is_taken_away_loses_nothing() {
    let fixture = on_secure_kafka().await;
    let topic = &fixture.topic;
    create_topic(topic, GUARD, &[Write, Describe]).await;
    create_topic(&format!("{topic}-other"), GUARD, &[Write]).await;
    let mut first = relay(&fixture, GUARD);
    first.wait_for_log("streaming").await;
    let writers = fixture.writers(fixture.steady_load());
    fixture.outgrow(&first, WINDOW).await;
    let denied = Acl {
        user: GUARD,
        topic,
        operation: Write,
        permission: Permission::Deny,
    };
    denied.create(kafka().fact("brokers"));
    assert_stopped(first, "event with seq ", topic).await;
    writers.stop().await.unwrap();
    denied.delete(kafka().fact("brokers"));
    let mut second = relay(&fixture, GUARD);
    second.wait_for_log("streaming").await;
    fixture.assert_repeats_at_most(WINDOW, second).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_who_may_write_nowhere_is_told_so() {
    let fixture = on_secure_kafka().await;
    create_topic(&fixture.topic, GUEST, &[Describe]).await;
    insert(&fixture, &fixture.topic, "a").await;
    let mut relay = relay(&fixture, GUEST);
    assert_eq!(relay.exit_code().await, 6, "{}", relay.log());
    let log = relay.log();
    let expected = "error: the brokers let us write nowhere: allow Write on the topics: ";
    assert!(complaint(&log).starts_with(expected), "{log}");
    assert!(fixture.confirmed().await < fixture.wal_end().await);
}
