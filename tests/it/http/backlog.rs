//! What is committed and not delivered, as `/metrics` tells it and as the library counts it.

use std::time::Duration;

use postbox::backlog::{self, Backlog, EVENTS_MAX};
use postbox::envelope::Route;

use super::scrape::Scrape;
use crate::support::{Fixture, Relay, connect, wait_until};

const EVENTS: &str = "postbox_pending_events";
const OLDEST: &str = "postbox_oldest_pending_seconds";

impl Fixture {
    async fn backlog(&self) -> Backlog {
        let route = Route::default();
        let measured = backlog::measure(&self.client, &self.contract, &route).await;
        measured.unwrap().expect("it is set up")
    }

    /// Waits until the checkpoint sees all rows.
    async fn wait_until_seen(&self) {
        let sql = "SELECT count(*) FROM postbox.outbox AS o, postbox.checkpoint AS c \
                   WHERE NOT pg_visible_in_snapshot(o.xid, c.snapshot)";
        wait_until("the checkpoint sees all rows", async || {
            let row = self.client.query_one(sql, &[]).await.unwrap();
            row.get::<_, i64>(0) == 0
        })
        .await;
    }
}

fn topic(name: &str) -> String {
    format!("postbox_topic_pending_events{{topic=\"{name}\"}}")
}

async fn wait_for(relay: &Relay, events: u64) -> Scrape {
    let line = format!("\n{EVENTS} {events}\n");
    let what = format!("{events} events are pending");
    wait_until(&what, async || relay.get("/metrics").1.contains(&line)).await;
    Scrape::parse(&relay.get("/metrics").1)
}

fn tells_nothing(relay: &Relay) -> bool {
    !relay.get("/metrics").1.contains("pending")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_for_kafka_is_counted_by_topic_and_grows_old() {
    for mode in ["wal", "poll"] {
        let mut fixture = Fixture::with_servers(&[], &[]).await;
        let mode = ["--mode", mode];
        fixture.setup(&mode).results();
        let prefix = format!("{}.{{aggregate_type}}", fixture.topic);
        let flags = ["--route", &prefix, "--heartbeat-interval", "1s"];
        let relay = Relay::start(&fixture, &[&mode[..], &flags].concat());
        let insert = "INSERT INTO postbox.outbox (topic, aggregate_type, aggregate_id, event_type) \
                      SELECT $1, $2, 'a', 'changed' FROM generate_series(1, $3)";
        let insert = async |client: &tokio_postgres::Client,
                            topic: Option<&str>,
                            kind: &str,
                            events: i32| {
            client
                .execute(insert, &[&topic, &kind, &events])
                .await
                .unwrap();
        };
        insert(&fixture.client, None, "before", 3).await;
        fixture.wait_until_seen().await;
        fixture.kafka("stop immediate");
        let slow = connect(&fixture.database_url).await;
        slow.batch_execute("BEGIN").await.unwrap();
        insert(&slow, None, "slow", 7).await;
        insert(&fixture.client, None, "order", 20).await;
        insert(&fixture.client, Some("audit"), "order", 5).await;

        let [before, order, slowly] = ["before", "order", "slow"]
            .map(|kind| topic(&prefix.replace("{aggregate_type}", kind)));
        let scrape = wait_for(&relay, 25).await;
        assert_eq!(scrape.value(&order), 20.0);
        assert_eq!(scrape.value(&topic("audit")), 5.0);
        assert_eq!(scrape.value(&before), 0.0);
        let age = scrape.value(OLDEST);
        assert!((0.0..30.0).contains(&age), "{age}");
        wait_until("the oldest grows older", async || {
            relay.metric(OLDEST) > age + 6.0
        })
        .await;
        slow.batch_execute("COMMIT").await.unwrap();
        let scrape = wait_for(&relay, 32).await;
        assert_eq!(scrape.value(&slowly), 7.0);

        fixture.kafka("start");
        let scrape = wait_for(&relay, 0).await;
        assert_eq!(scrape.value(OLDEST), 0.0);
        for name in [&before, &order, &slowly, &topic("audit")] {
            assert_eq!(scrape.value(name), 0.0, "{name}");
        }
        relay.drain().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_not_known_is_not_told() {
    let mut fixture = Fixture::with_postgres(&[]).await;
    fixture.setup(&[]).results();
    fixture.insert_many("a", "{}", 3).await;
    // It has never reached its brokers.
    let mut relay = Relay::start(&fixture, &["--brokers", "127.0.0.1:1"]);
    relay.wait_for_log("serving http").await;
    assert!(tells_nothing(&relay));
    let scrape = wait_for(&relay, 3).await;
    assert_eq!(scrape.value(&topic(&fixture.topic)), 3.0);
    fixture.postgres("stop immediate");
    wait_until("nothing is told", async || tells_nothing(&relay)).await;
    fixture.postgres("start");
    fixture.reconnect().await;
    wait_for(&relay, 3).await;
    // The table cannot be read.
    let rename = "ALTER TABLE postbox.outbox RENAME created_at TO inserted_at";
    fixture.client.batch_execute(rename).await.unwrap();
    wait_until("nothing is told", async || tells_nothing(&relay)).await;
    relay
        .wait_for_log("WARN the backlog is not known: measure the backlog: ")
        .await;
    let back = "ALTER TABLE postbox.outbox RENAME inserted_at TO created_at";
    fixture.client.batch_execute(back).await.unwrap();
    wait_for(&relay, 3).await;
    // Nor is anything waited for.
    let lock = "BEGIN; LOCK TABLE postbox.outbox IN ACCESS EXCLUSIVE MODE";
    fixture.client.batch_execute(lock).await.unwrap();
    wait_until("nothing is told", async || tells_nothing(&relay)).await;
    fixture.client.batch_execute("ROLLBACK").await.unwrap();
    wait_for(&relay, 3).await;
    assert_eq!(relay.log().matches("WARN the backlog").count(), 2);
    assert_eq!(relay.stop().await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_stands_by_tells_nothing_of_the_backlog() {
    let fixture = Fixture::new().await;
    let active = Relay::streaming(&fixture, &[]).await;
    wait_for(&active, 0).await;
    let mut other = Relay::start(&fixture, &[]);
    other.wait_for_log("standing by").await;
    // Longer than between two measurements.
    for _ in 0..12 {
        assert!(tells_nothing(&other), "{}", other.get("/metrics").1);
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    active.drain().await;
    wait_for(&other, 0).await;
    other.drain().await;
}

/// As a relay has left it that delivers so far.
async fn deliver(fixture: &Fixture, what: &str) {
    let sql = format!("UPDATE postbox.checkpoint SET {what}");
    fixture.client.batch_execute(&sql).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_is_counted_as_far_as_it_is_worth_it() {
    let fixture = Fixture::new().await;
    fixture.insert("a", "{}").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let many = 150_000;
    fixture.insert_many("a", "{}", many).await;
    let all = u64::from(many.unsigned_abs()) + 1;
    // Without an index on xid, from the end; with one, from the first.
    for is_indexed in [false, true] {
        if is_indexed {
            fixture.setup(&["--mode", "poll"]).results();
        }
        let backlog = fixture.backlog().await;
        assert!((EVENTS_MAX..all).contains(&backlog.events), "{backlog:?}");
        assert_eq!(backlog.topics[&fixture.topic], backlog.events);
        let age = backlog.oldest.unwrap();
        assert!(age > Duration::from_secs(2), "{age:?}");
    }
    // A gap is delivered as far as its seq, and what is new is behind it.
    deliver(
        &fixture,
        "second_snapshot = pg_current_snapshot(), seq = 1000",
    )
    .await;
    assert!(fixture.backlog().await.events >= EVENTS_MAX);
    deliver(&fixture, "seq = 140000").await;
    fixture.insert_many("a", "{}", 10).await;
    let backlog = fixture.backlog().await;
    assert_eq!(backlog.events, all - 140_000 + 10);
    assert_eq!(backlog.topics[&fixture.topic], backlog.events);
    deliver(
        &fixture,
        "snapshot = second_snapshot, second_snapshot = NULL, seq = NULL",
    )
    .await;
    assert_eq!(fixture.backlog().await.events, 10);
    deliver(&fixture, "snapshot = pg_current_snapshot()").await;
    assert_eq!(fixture.backlog().await.events, 0);
    assert_eq!(fixture.backlog().await.oldest, None);
}

/// Held against what the snapshots say of each row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_that_end_late_are_counted_when_they_do() {
    for mode in ["wal", "poll"] {
        let fixture = Fixture::empty().await;
        fixture.setup(&["--mode", mode]).results();
        let insert = |kind: &str| {
            format!(
                "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type) VALUES ('{kind}', 'a', 'x')"
            )
        };
        let mut open = Vec::new();
        for number in 0..5 {
            let session = connect(&fixture.database_url).await;
            session.batch_execute("BEGIN").await.unwrap();
            session.batch_execute(&insert("late")).await.unwrap();
            let nested = format!(
                "SAVEPOINT s; {}; ROLLBACK TO s; SAVEPOINT t; {}",
                insert("never"),
                insert("late")
            );
            session.batch_execute(&nested).await.unwrap();
            fixture.insert_many("a", "{}", number + 1).await;
            open.push(session);
        }
        assert_matches_snapshots(&fixture, 15).await;
        deliver(&fixture, "snapshot = pg_current_snapshot()").await;
        assert_matches_snapshots(&fixture, 0).await;
        open[1].batch_execute("COMMIT").await.unwrap();
        open[2].batch_execute("ROLLBACK").await.unwrap();
        assert_matches_snapshots(&fixture, 2).await;
        deliver(&fixture, "second_snapshot = pg_current_snapshot(), seq = 4").await;
        fixture.insert_many("b", "{}", 6).await;
        open[3].batch_execute("COMMIT").await.unwrap();
        open[0]
            .batch_execute(&format!("{}; COMMIT", insert("late")))
            .await
            .unwrap();
        // 1 is pending in part.
        let pending = match_snapshots(&fixture).await;
        assert_matches_snapshots(&fixture, pending).await;
        assert!((11..=13).contains(&pending), "{pending}");
    }
}

/// How many rows are pending, by a look at each.
async fn match_snapshots(fixture: &Fixture) -> u64 {
    let sql = "SELECT count(*) FROM postbox.outbox AS o, postbox.checkpoint AS c \
               WHERE NOT pg_visible_in_snapshot(o.xid, c.snapshot) \
                 AND NOT (c.second_snapshot IS NOT NULL AND o.seq <= c.seq \
                          AND pg_visible_in_snapshot(o.xid, c.second_snapshot))";
    let row = fixture.client.query_one(sql, &[]).await.unwrap();
    row.get::<_, i64>(0).unsigned_abs()
}

async fn assert_matches_snapshots(fixture: &Fixture, events: u64) {
    assert_eq!(match_snapshots(fixture).await, events);
    let backlog = fixture.backlog().await;
    assert_eq!(backlog.events, events, "{backlog:?}");
    assert_eq!(backlog.topics.values().sum::<u64>(), events, "{backlog:?}");
    assert_eq!(backlog.oldest.is_some(), events > 0, "{backlog:?}");
}

/// An outbox that a relay has divided, which has stopped.
async fn divided() -> Fixture {
    let fixture = Fixture::empty().await;
    let poll = ["--mode", "poll"];
    fixture.setup(&poll).results();
    let mut relay = Relay::start(&fixture, &[&poll[..], &["--shards", "1"]].concat());
    relay.wait_for_log("serving 64 of 64 slices").await;
    relay.drain().await;
    fixture
}

/// Each slice of a divided relay has a place of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_pending_of_each_slice_is_counted() {
    let fixture = divided().await;
    for key in 0..40 {
        fixture.insert(&format!("k{key}"), "{}").await;
    }
    assert_eq!(fixture.backlog().await.events, 40);
    let move_on = "UPDATE postbox.slice SET snapshot = pg_current_snapshot() WHERE slice % 3 = 0";
    fixture.client.batch_execute(move_on).await.unwrap();
    let left = "SELECT count(*) FROM postbox.outbox \
                WHERE (get_byte(sha256(textsend(aggregate_id)), 0) & 63) % 3 <> 0";
    let left: i64 = fixture.client.query_one(left, &[]).await.unwrap().get(0);
    assert!((1..40).contains(&left));
    let backlog = fixture.backlog().await;
    assert_eq!(backlog.events, left.unsigned_abs());
    assert_eq!(backlog.topics[&fixture.topic], left.unsigned_abs());
}

/// However many of the rows there are that are other slices', or delivered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_of_slices_is_counted_as_far_as_it_is_worth_it() {
    let fixture = divided().await;
    let insert = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type) \
                  SELECT 'order', 'k' || n, 'changed' FROM generate_series(1, $1) AS n";
    let insert = async |rows: i32| {
        fixture.client.execute(insert, &[&rows]).await.unwrap();
    };
    insert(150_000).await;
    let slices = async |what: &str| {
        let sql = format!("UPDATE postbox.slice SET {what}");
        fixture.client.batch_execute(&sql).await.unwrap();
    };
    slices("snapshot = pg_current_snapshot() WHERE slice >= 32").await;
    let left = "SELECT count(*) FROM postbox.outbox \
                WHERE get_byte(sha256(textsend(aggregate_id)), 0) & 63 < 32";
    let left: i64 = fixture.client.query_one(left, &[]).await.unwrap().get(0);
    assert!(left < EVENTS_MAX.cast_signed());
    assert_eq!(fixture.backlog().await.events, left.unsigned_abs());
    // All are delivered, and of as many more nothing has been read.
    slices("snapshot = pg_current_snapshot()").await;
    insert(220_000).await;
    slices(&format!(
        "second_snapshot = pg_current_snapshot(), seq = {} WHERE slice < 32",
        i64::MIN
    ))
    .await;
    let backlog = fixture.backlog().await;
    assert!(
        (EVENTS_MAX..220_000).contains(&backlog.events),
        "{backlog:?}"
    );
    assert!(backlog.topics["order"] >= EVENTS_MAX, "{backlog:?}");
}
