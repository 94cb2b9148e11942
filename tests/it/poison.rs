//! Events that can never go out, where the relay is to stop at them; batches that a broker
//! refuses; and what must stop a relay.

use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::client::DefaultClientContext;

use crate::support::{Fixture, Relay, SMALL_WINDOW, WINDOW, wait_until};

/// The relay ends at what cannot go out.
pub(crate) const STOP: [&str; 2] = ["--on-poison", "stop"];

pub(crate) fn admin(fixture: &Fixture) -> AdminClient<DefaultClientContext> {
    ClientConfig::new()
        .set("bootstrap.servers", &fixture.brokers)
        .create()
        .unwrap()
}

pub(crate) async fn create_topic(fixture: &Fixture, message_bytes_max: &str) {
    create_topic_with(fixture, 1, message_bytes_max).await;
}

async fn create_topic_with(fixture: &Fixture, partitions: i32, message_bytes_max: &str) {
    let topic = NewTopic::new(&fixture.topic, partitions, TopicReplication::Fixed(1))
        .set("max.message.bytes", message_bytes_max);
    let created = admin(fixture)
        .create_topics(&[topic], &AdminOptions::new())
        .await;
    created.unwrap().remove(0).unwrap();
}

/// The relay ends with exit code 8, names the event, and has confirmed nothing
/// of it.
pub(crate) async fn assert_stopped_by(mut relay: Relay, fixture: &Fixture, id: &str, why: &str) {
    assert_eq!(relay.exit_code().await, 8, "{}", relay.log());
    let log = relay.log();
    assert!(log.contains("event with seq ") && log.contains(id), "{log}");
    assert!(log.contains("commit LSN ") && log.contains(why), "{log}");
    let end = fixture.wal_end().await;
    assert!(fixture.confirmed().await < end);
}

pub(crate) async fn insert_returning_id(fixture: &Fixture, key: &str, payload: &str) -> String {
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
               VALUES ($1, $2, 'changed', $3::text::json) RETURNING id::text";
    let row = fixture
        .client
        .query_one(sql, &[&fixture.topic, &key, &payload])
        .await;
    row.unwrap().get(0)
}

pub(crate) fn incompressible(bytes: usize) -> String {
    let mut state = 1u64;
    let letters = (0..bytes).map(|_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        char::from(
            b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_"
                [(state >> 58) as usize],
        )
    });
    format!("\"{}\"", letters.collect::<String>())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_too_large_stops_the_relay_and_is_named() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &STOP).await;
    for _ in 0..20 {
        fixture.insert("a", "{}").await;
    }
    fixture.wait_for_confirmation().await;
    let id = insert_returning_id(&fixture, "a", &incompressible(3_000_000)).await;
    for _ in 0..20 {
        fixture.insert("a", "{}").await;
    }
    assert_stopped_by(relay, &fixture, &id, "too large").await;
    // What stands behind it in its key has not overtaken it.
    assert_eq!(fixture.records().await.len(), 20);
    // The next relay stops at the same event, now the first of its producer.
    let again = Relay::start(&fixture, &STOP);
    assert_stopped_by(again, &fixture, &id, "too large").await;
    assert_eq!(fixture.records().await.len(), 20);
}

/// One transaction: a row that is too large, and 9,000 behind it in its key. The
/// id of the first.
async fn insert_poison_and_many_behind(fixture: &Fixture) -> String {
    fixture.client.batch_execute("BEGIN").await.unwrap();
    let id = insert_returning_id(fixture, "a", &incompressible(3_000_000)).await;
    let many = format!(
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
         SELECT '{}', 'a', 'changed', json_build_object('n', n) FROM generate_series(1, 9000) AS n; COMMIT",
        fixture.topic
    );
    fixture.client.batch_execute(&many).await.unwrap();
    id
}

/// A broker that knows nothing of a producer yet accepts its second batch without
/// the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_overtakes_the_first_row_of_a_producer() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, "1000000").await;
    let id = insert_poison_and_many_behind(&fixture).await;
    let relay = Relay::start(&fixture, &STOP);
    assert_stopped_by(relay, &fixture, &id, "too large").await;
    assert_eq!(fixture.records().await.len(), 0);
}

/// What was pipelined behind a refused batch must not pass. The gapless guarantee
/// sees to it, and mostly the purge at the first failure too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_overtakes_a_refused_row() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, "1000000").await;
    let relay = Relay::streaming(&fixture, &STOP).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    let id = insert_poison_and_many_behind(&fixture).await;
    assert_stopped_by(relay, &fixture, &id, "too large").await;
    assert_eq!(fixture.records().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_delivery_repeats_only_what_was_in_flight() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, "1000000").await;
    let many = format!(
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
         SELECT '{}', 'a', 'changed', json_build_object('n', n) FROM generate_series(1, 20000) AS n",
        fixture.topic
    );
    fixture.client.batch_execute(&many).await.unwrap();
    let id = insert_returning_id(&fixture, "b", &incompressible(3_000_000)).await;
    fixture.client.batch_execute(&many).await.unwrap();
    // A server that is busy writing may not read a confirmation before it is let go. This
    // one has not even left.
    let flags = ["--in-flight-max", "500", "--status-interval", "4s"];
    let relay = Relay::start(&fixture, &[&flags[..], &STOP].concat());
    assert_stopped_by(relay, &fixture, &id, "too large").await;
    let records = fixture.records().await.len();
    assert!((20_000..=21_000).contains(&records), "{records}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_no_broker_would_read_stops_the_relay() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &STOP).await;
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
               SELECT $1, 'a', 'changed', to_json(repeat('0123456789', 12000000)) RETURNING id::text";
    let row = fixture.client.query_one(sql, &[&fixture.topic]).await;
    let id: String = row.unwrap().get(0);
    assert_stopped_by(relay, &fixture, &id, "too large").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_started_again_and_again_at_one_event_repeats_nothing() {
    let fixture = Fixture::new().await;
    for _ in 0..20 {
        fixture.insert("a", "{}").await;
    }
    let poison = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, topic) \
                  VALUES ('a', 'b', 'c', 'no spaces')";
    fixture.client.batch_execute(poison).await.unwrap();
    for _ in 0..3 {
        let mut relay = Relay::start(&fixture, &STOP);
        assert_eq!(relay.exit_code().await, 8, "{}", relay.log());
    }
    assert_eq!(fixture.records().await.len(), 20);
}

/// An event that only the brokers can refuse, between others that they take.
pub(crate) async fn insert_with_one_refused(fixture: &Fixture) {
    create_topic_with(fixture, 8, "1000").await;
    for number in 0..40 {
        let payload = match number {
            10 => incompressible(3_000),
            _ => "{}".to_owned(),
        };
        fixture.insert(&number.to_string(), &payload).await;
    }
}

/// Relays that are started again and again end at an event that cannot go out, and only
/// the first of them delivers anything.
pub(crate) async fn assert_repeats_nothing(fixture: &Fixture, flags: &[&str]) {
    let mut delivered = Vec::new();
    for _ in 0..3 {
        let mut relay = Relay::start(fixture, flags);
        assert_eq!(relay.exit_code().await, 8, "{}", relay.log());
        delivered.push(fixture.records().await.len());
    }
    assert!(
        delivered.iter().all(|count| *count == delivered[0]),
        "{delivered:?}"
    );
}

/// What is behind such an event in other partitions was delivered by the first relay
/// and cannot be confirmed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_started_again_and_again_at_a_refused_event_repeats_nothing() {
    let fixture = Fixture::new().await;
    insert_with_one_refused(&fixture).await;
    assert_repeats_nothing(&fixture, &STOP).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_name_that_kafka_does_not_allow_stops_the_relay() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &STOP).await;
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, topic) \
               VALUES ('a', 'b', 'c', 'no spaces') RETURNING id::text";
    let id: String = fixture.client.query_one(sql, &[]).await.unwrap().get(0);
    assert_stopped_by(relay, &fixture, &id, "\"no spaces\" is not a topic name").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_nobody_creates_stops_the_relay() {
    let fixture = Fixture::with_servers(&[], &["auto.create.topics.enable=false"]).await;
    let relay = Relay::streaming(&fixture, &STOP).await;
    let id = insert_returning_id(&fixture, "a", "{}").await;
    assert_stopped_by(relay, &fixture, &id, "create the topic").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_not_an_event_stops_the_relay() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &STOP).await;
    let alter = "ALTER TABLE postbox.outbox RENAME COLUMN event_type TO kind";
    fixture.client.batch_execute(alter).await.unwrap();
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, kind) VALUES ('a', 'b', 'c') RETURNING id::text";
    let id: String = fixture.client.query_one(sql, &[]).await.unwrap().get(0);
    assert_stopped_by(relay, &fixture, &id, "no column \"event_type\"").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_that_is_not_json_stops_the_relay() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &STOP).await;
    let alter = "ALTER TABLE postbox.outbox ALTER COLUMN payload TYPE text";
    fixture.client.batch_execute(alter).await.unwrap();
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
               VALUES ('a', 'b', 'c', 'not json') RETURNING id::text";
    let id: String = fixture.client.query_one(sql, &[]).await.unwrap().get(0);
    assert_stopped_by(relay, &fixture, &id, "is not JSON").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_rows_pass_into_a_topic_with_a_small_limit() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, "2000").await;
    let relay = Relay::streaming(&fixture, &["-X", "compression.codec=none"]).await;
    let writers = fixture.writers(fixture.load());
    tokio::time::sleep(Duration::from_secs(2)).await;
    writers.stop().await.unwrap();
    fixture.wait_for_confirmation().await;
    assert!(!relay.get("/metrics").1.contains("delivery_failures_total{"));
    let verdict = fixture.judge(relay).await;
    assert!(verdict.is_clean(0), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_batch_is_not_a_refused_row() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, "1000000").await;
    let flags = ["-X", "compression.codec=none"];
    let relay = Relay::streaming(&fixture, &[flags, SMALL_WINDOW].concat()).await;
    let writers = fixture.writers(fixture.steady_load());
    fixture.outgrow(&relay, WINDOW).await;
    // The relay has read the old limit and now makes batches that are refused.
    let lower =
        AlterConfig::new(ResourceSpecifier::Topic(&fixture.topic)).set("max.message.bytes", "2000");
    let altered = admin(&fixture)
        .alter_configs(&[lower], &AdminOptions::new())
        .await;
    altered.unwrap().remove(0).unwrap();
    wait_until("a batch is refused", || async {
        relay.get("/metrics").1.contains("delivery_failures_total{")
    })
    .await;
    writers.stop().await.unwrap();
    fixture.assert_repeats_at_most(WINDOW, relay).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_made_again_stops_the_relay() {
    let fixture = Fixture::new().await;
    let mut relay = Relay::streaming(&fixture, &["--heartbeat-interval", "1s"]).await;
    let again = "BEGIN; DROP PUBLICATION postbox; \
                 CREATE PUBLICATION postbox FOR TABLE postbox.outbox WITH (publish = 'insert', publish_via_partition_root = true); COMMIT";
    fixture.client.batch_execute(again).await.unwrap();
    assert_eq!(relay.exit_code().await, 5, "{}", relay.log());
    assert!(
        relay
            .log()
            .contains("publication \"postbox\" was dropped and made again"),
        "{}",
        relay.log()
    );
    let mut next = Relay::start(&fixture, &[]);
    assert_eq!(next.exit_code().await, 5, "{}", next.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_that_is_gone_stops_the_relay() {
    let fixture = Fixture::new().await;
    let mut relay = Relay::streaming(&fixture, &["--heartbeat-interval", "1s"]).await;
    fixture
        .client
        .batch_execute("DROP PUBLICATION postbox")
        .await
        .unwrap();
    assert_eq!(relay.exit_code().await, 5, "{}", relay.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_gone_stops_the_relay_and_is_not_made_again() {
    let fixture = Fixture::new().await;
    let slot = &fixture.contract.slot;
    fixture
        .client
        .execute("SELECT pg_drop_replication_slot($1)", &[slot])
        .await
        .unwrap();
    let mut relay = Relay::start(&fixture, &[]);
    assert_eq!(relay.exit_code().await, 4, "{}", relay.log());
    assert!(
        relay
            .log()
            .contains(&format!("replication slot \"{slot}\" is gone")),
        "{}",
        relay.log()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_was_never_set_up_says_what_to_run() {
    let fixture = Fixture::empty().await;
    let mut relay = Relay::start(&fixture, &[]);
    assert_eq!(relay.exit_code().await, 4, "{}", relay.log());
    assert!(
        relay.log().contains("run `postbox setup`"),
        "{}",
        relay.log()
    );
}

/// A session that waits for a lock compares nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_made_again_is_noticed_though_the_checkpoint_is_locked() {
    let fixture = Fixture::new().await;
    let mut relay = Relay::streaming(&fixture, &["--heartbeat-interval", "1s"]).await;
    let locked = fixture.lock_checkpoint().await;
    fixture.insert("a", "{}").await;
    let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND pid = ANY($1)";
    let sessions = "SELECT array_agg(pid) FROM pg_stat_activity WHERE application_name = $1";
    let name = format!("postbox {} control", fixture.contract.slot);
    let row = fixture.client.query_one(sessions, &[&name]).await.unwrap();
    let first: Vec<i32> = row.get(0);
    let left_behind = async || {
        let row = fixture.client.query_one(waiting, &[&first]).await.unwrap();
        row.get::<_, i64>(0)
    };
    wait_until("the lock is waited for", async || left_behind().await > 0).await;
    relay.wait_for_log("does not answer").await;
    // What the relay gave up does not wait on in the server.
    wait_until("nothing is left behind", async || left_behind().await == 0).await;
    let again = "BEGIN; DROP PUBLICATION postbox; \
                 CREATE PUBLICATION postbox FOR TABLE postbox.outbox WITH (publish = 'insert', publish_via_partition_root = true); COMMIT";
    fixture.client.batch_execute(again).await.unwrap();
    assert_eq!(relay.exit_code().await, 5, "{}", relay.log());
    drop(locked);
}
