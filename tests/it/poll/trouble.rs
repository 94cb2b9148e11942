//! Relays that share a table, when something is in their way.

use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;

use super::POLL;
use super::pooler::behind_pgbouncer;
use super::shards::{SHARDS, counts, insert_all, judge, start, wait_for_division, wait_for_slices};
use crate::support::{Fixture, Proxy, Relay, Weather, connect, wait_until};

/// The first mark is stored at once, and the next after ten seconds.
const SELDOM: [&str; 4] = ["--status-interval", "10s", "--wal-sender-timeout", "20s"];

/// Whose lease does not end, as far as these tests go.
const ANOTHER: &str = "process 0, another";

/// Divided, and nobody serves any slice.
async fn divided() -> Fixture {
    let fixture = Fixture::polling().await;
    divide(&fixture).await;
    fixture
}

async fn divide(fixture: &Fixture) {
    let mut relay = start(fixture, &[]);
    relay.wait_for_log("serving 64 of 64 slices").await;
    relay.drain().await;
}

/// Another relay takes these slices, whoever has them.
async fn take_over(fixture: &Fixture, slices: &str) {
    let sql = format!(
        "UPDATE postbox.slice SET owner = '{ANOTHER}', epoch = epoch + 1, \
                expires_at = clock_timestamp() + interval '1 h' WHERE {slices}"
    );
    fixture.client.batch_execute(&sql).await.unwrap();
}

/// How many slices are as this condition says.
async fn count(fixture: &Fixture, condition: &str) -> i64 {
    let sql = format!("SELECT count(*) FROM postbox.slice WHERE {condition}");
    fixture.client.query_one(&sql, &[]).await.unwrap().get(0)
}

/// Keeps a key of a slice of this relay to a broker.
async fn insert_for(fixture: &Fixture, relay: &Relay, topic: &str) {
    let sql = format!(
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, topic) \
         SELECT 'any', key, 'changed', '{topic}' FROM (SELECT 'k' || n AS key FROM generate_series(1, 1000) AS n) AS k \
         JOIN postbox.slice AS s ON s.slice = get_byte(sha256(textsend(key)), 0) & 63 \
         WHERE s.owner LIKE 'process {},%' LIMIT 1",
        relay.pid()
    );
    assert_eq!(fixture.client.execute(&sql, &[]).await.unwrap(), 1);
}

/// A topic of which only the second broker has a partition.
async fn create_topic(fixture: &Fixture) -> String {
    let name = format!("{}-second", fixture.topic);
    let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
        .set("bootstrap.servers", &fixture.brokers)
        .create()
        .unwrap();
    let topic = NewTopic::new(&name, 1, TopicReplication::Variable(&[&[2]]));
    let created = admin.create_topics(&[topic], &AdminOptions::new()).await;
    created.unwrap().remove(0).unwrap();
    name
}

/// What it asked for nobody would serve: the other has given it up, and it does not get on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_cannot_drain_asks_for_nothing_until_it_can() {
    let mut fixture = Fixture::with_two_brokers().await;
    fixture.setup(&POLL).results();
    let topic = create_topic(&fixture).await;
    let [first, stuck, leaving] = [(); 3].map(|()| start(&fixture, &[]));
    wait_for_division(&fixture, &[22, 21, 21]).await;
    // So that it need not ask about the topic: it would wait for an answer, and not for this.
    insert_for(&fixture, &stuck, &topic).await;
    wait_until("it knows the topic", async || stuck.published(&topic) == 1).await;
    fixture.second_broker("pause");
    insert_for(&fixture, &stuck, &topic).await;
    wait_until("it cannot drain", async || {
        stuck.metric("postbox_in_flight_events") > 0.0
    })
    .await;
    leaving.drain().await;
    wait_until("the first has what was left", async || {
        counts(&fixture).await.len() == 2 && counts(&fixture).await[0] >= 42
    })
    .await;
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(15) {
        let trouble = "wanted_by IS NOT NULL OR expires_at < clock_timestamp()";
        assert_eq!(count(&fixture, trouble).await, 0, "{:?}", since.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    fixture.second_broker("resume");
    wait_for_division(&fixture, &[32, 32]).await;
    wait_for_slices(&fixture).await;
    for relay in [first, stuck] {
        relay.drain().await;
    }
}

/// A relay that hands slices over serves the others all the time, however long it would take
/// to reach brokers anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_hands_slices_over_keeps_the_others_though_no_broker_can_be_reached() {
    let fixture = Fixture::polling().await;
    let proxy = Proxy::start().await;
    proxy.pass_on_to(&fixture.brokers);
    let mut first = start(&fixture, &["--brokers", proxy.address()]);
    first.wait_for_log("serving 64 of 64 slices").await;
    let writers = fixture.writers(fixture.load());
    tokio::time::sleep(Duration::from_secs(1)).await;
    // Brokers are known by now; only for the first question they are asked here.
    proxy.weather(Weather::Silent);
    let second = start(&fixture, &[]);
    wait_for_division(&fixture, &[32, 32]).await;
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(8) {
        assert_eq!(counts(&fixture).await, [32, 32], "{:?}", since.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    writers.stop().await.unwrap();
    let verdict = judge(&fixture, [first, second]).await;
    assert!(verdict.committed > 500 && verdict.is_clean(0), "{verdict}");
}

/// Its last transaction has locked its slices, and never ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slices_of_a_relay_that_is_cut_off_before_it_commits_are_served_by_the_other() {
    let proxy = Proxy::start().await;
    let fixture = Fixture::with_postgres(&[]).await;
    fixture.set_up_polling().await;
    let url = fixture.url_behind(&proxy);
    let mut cut_off = start(&fixture, &["--database-url", &url]);
    cut_off.wait_for_log("serving 64 of 64 slices").await;
    let mut other = start(&fixture, &[]);
    wait_for_division(&fixture, &[32, 32]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    proxy.weather(Weather::Before("COMMIT"));
    let locks = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction' AND query LIKE '%slice%'";
    wait_until("its transaction stays open", async || {
        let row = fixture.client.query_one(locks, &[]).await.unwrap();
        row.get::<_, i64>(0) > 0
    })
    .await;
    cut_off.kill();
    let since = Instant::now();
    other.wait_for_log("serving 64 of 64 slices").await;
    let taken = since.elapsed();
    other.drain().await;
    assert!(taken < Duration::from_secs(6), "{taken:?}");
}

/// Its limit is that of the transaction, and nobody else's of the session.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_of_a_transaction_are_not_left_in_the_sessions_of_a_pooler() {
    let Some((fixture, _pgbouncer, url)) = behind_pgbouncer().await else {
        return;
    };
    let through = ["--database-url", &*url];
    let first = start(&fixture, &through);
    let second = start(&fixture, &through);
    wait_for_division(&fixture, &[32, 32]).await;
    let other = connect(&url).await;
    let insert = format!(
        "BEGIN; INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type) VALUES ('{}', 'a', 'x')",
        fixture.topic
    );
    other.batch_execute(&insert).await.unwrap();
    tokio::time::sleep(Duration::from_secs(4)).await;
    other.batch_execute("COMMIT").await.unwrap();
    wait_for_slices(&fixture).await;
    for relay in [first, second] {
        relay.drain().await;
    }
    assert_eq!(fixture.keys().await, ["a"]);
}

/// Whoever has the checkpoint locked keeps a relay from asking for more, not from what it has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_cannot_ask_keeps_what_it_has() {
    let fixture = divided().await;
    take_over(&fixture, "slice < 42").await;
    // It has something to store all the time.
    let writers = fixture.writers(fixture.load());
    let mut relay = start(&fixture, &[]);
    relay.wait_for_log("serving 22 of 64 slices").await;
    let lock = fixture.lock_checkpoint().await;
    let since = Instant::now();
    while since.elapsed() < Duration::from_secs(6) {
        let ending = "slice >= 42 AND expires_at < clock_timestamp() + interval '1.5 s'";
        assert_eq!(count(&fixture, ending).await, 0, "{:?}", since.elapsed());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    writers.stop().await.unwrap();
    let log = relay.log();
    assert!(!log.contains("WARN"), "{log}");
    lock.batch_execute("ROLLBACK").await.unwrap();
    wait_until("it has asked", async || {
        count(&fixture, "wanted_by IS NOT NULL").await == 10
    })
    .await;
    relay.drain().await;
}

/// Others would hand it slices that it does not serve.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_stops_withdraws_what_it_asked_for() {
    let fixture = divided().await;
    take_over(&fixture, "slice < 42").await;
    let relay = start(&fixture, &[]);
    wait_until("it has asked", async || {
        count(&fixture, "wanted_by IS NOT NULL").await == 10
    })
    .await;
    relay.drain().await;
    assert_eq!(count(&fixture, "wanted_by IS NOT NULL").await, 0);
    assert_eq!(counts(&fixture).await, [42, 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_no_longer_withdraws_what_it_asked_for() {
    let fixture = divided().await;
    take_over(&fixture, "true").await;
    let mut relay = start(&fixture, &[]);
    wait_until("it has asked", async || {
        count(&fixture, "wanted_by IS NOT NULL").await == 32
    })
    .await;
    relay.wait_for_log("standing by").await;
    wait_until("it asks no more", async || {
        count(&fixture, "wanted_by IS NOT NULL").await == 0
    })
    .await;
    relay.drain().await;
    assert_eq!(count(&fixture, "wanted_by IS NOT NULL").await, 0);
}

/// It has claimed slices, and others have them by the time it begins to read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_frozen_behind_its_claim_notices_it() {
    let fixture = divided().await;
    let mut command = Relay::command(&fixture, &SHARDS);
    let mut relay = Relay::spawn(command.env("FAILPOINTS", "slices_claimed=1*sleep(4000)"));
    wait_until("it has claimed them", async || {
        count(&fixture, "owner IS NOT NULL").await == 64
    })
    .await;
    take_over(&fixture, "true").await;
    relay.wait_for_log("this process did not run for").await;
    let log = relay.log();
    assert!(!log.contains("taken over"), "{log}");
}

/// The guard that is local: no answer of the server is waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_wakes_up_sends_nothing_though_it_cannot_ask_whether_it_may() {
    let fixture = Fixture::polling().await;
    let mut sleeper = start(&fixture, &[]);
    sleeper.wait_for_log("serving 64 of 64 slices").await;
    insert_all(&fixture, 1).await;
    wait_for_slices(&fixture).await;
    sleeper.signal("STOP");
    let mut other = start(&fixture, &[]);
    other.wait_for_log("serving 64 of 64 slices").await;
    insert_all(&fixture, 2).await;
    wait_for_slices(&fixture).await;
    other.drain().await;
    let lock = connect(&fixture.database_url).await;
    let slices = "BEGIN; LOCK TABLE postbox.slice IN ACCESS EXCLUSIVE MODE";
    lock.batch_execute(slices).await.unwrap();
    sleeper.signal("CONT");
    tokio::time::sleep(Duration::from_millis(1500)).await;
    lock.batch_execute("ROLLBACK").await.unwrap();
    wait_for_division(&fixture, &[64]).await;
    fixture.enter_in_ledger().await;
    let verdict = judge(&fixture, [sleeper]).await;
    assert!(verdict.committed == 300 && verdict.is_clean(0), "{verdict}");
}

/// The guard that is the server's: what another has is not written over, and not sent. What
/// is left is stored, and not repeated.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_whose_slices_are_taken_stores_what_is_left_and_leaves_the_others_alone() {
    let fixture = divided().await;
    let mut relay = start(&fixture, &SELDOM);
    let mut sent = 0;
    // Some at a time, as either of two looks may be the one that notices it.
    for taken in [0, 12, 24, 36, 48] {
        let served = format!("serving {} of 64 slices", 64 - taken);
        relay.wait_for_log(&served).await;
        let places = places_below(&fixture, taken).await;
        for is_stored in [true, false] {
            insert_all(&fixture, 1).await;
            sent += keys_from(&fixture, taken).await;
            let what = format!("{sent} are sent");
            wait_until(&what, async || relay.published(&fixture.topic) == sent).await;
            if is_stored {
                let behind = format!("slice >= {taken} AND {BEHIND}");
                wait_until("it is stored", async || count(&fixture, &behind).await == 0).await;
            }
        }
        assert_eq!(places_below(&fixture, taken).await, places);
        let next = taken + 12;
        // Behind a look at who has which slices, and before a renewal, or the other way round.
        tokio::time::sleep(Duration::from_millis(taken.unsigned_abs().into()) * 15).await;
        take_over(&fixture, &format!("slice >= {taken} AND slice < {next}")).await;
    }
    relay.wait_for_log("serving 4 of 64 slices").await;
    let places = places_below(&fixture, 60).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    relay.drain().await;
    assert_eq!(places_below(&fixture, 60).await, places);
    assert_eq!(fixture.records().await.len(), sent);
}

/// Of a slice: there are rows that its place does not see.
const BEHIND: &str = "(second_snapshot IS NOT NULL OR EXISTS ( \
    SELECT FROM postbox.outbox WHERE NOT pg_visible_in_snapshot(xid, snapshot)))";

/// What there is of the slices below this one.
async fn places_below(fixture: &Fixture, slice: i32) -> Option<String> {
    let sql = "SELECT string_agg(concat(owner, epoch, snapshot, seq, expires_at), ' ' ORDER BY slice) \
               FROM postbox.slice WHERE slice < $1";
    let row = fixture.client.query_one(sql, &[&slice]).await.unwrap();
    row.get(0)
}

/// How many of the hundred keys are in slices from this one on.
async fn keys_from(fixture: &Fixture, slice: i32) -> usize {
    let sql = "SELECT count(DISTINCT aggregate_id) FROM postbox.outbox \
               WHERE get_byte(sha256(textsend(aggregate_id)), 0) & 63 >= $1";
    let row = fixture.client.query_one(sql, &[&slice]).await.unwrap();
    row.get::<_, i64>(0) as usize
}

/// Slices that stand at several places stand at one after a stop, also where there was
/// nothing to send in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_has_caught_up_leaves_all_slices_at_one_place() {
    let fixture = divided().await;
    let other_place = |slices: &str| {
        format!(
            "SELECT pg_current_xact_id(); UPDATE postbox.slice SET snapshot = pg_current_snapshot() WHERE {slices}"
        )
    };
    for slices in ["slice % 3 = 0", "slice % 3 = 1", "slice % 3 = 2"] {
        let sql = other_place(slices);
        fixture.client.batch_execute(&sql).await.unwrap();
    }
    let mut relay = start(&fixture, &SELDOM);
    relay.wait_for_log("serving 64 of 64 slices").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    relay.drain().await;
    let sql = "SELECT count(DISTINCT snapshot::text) FROM postbox.slice";
    let places: i64 = fixture.client.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(places, 1);
}

/// Some rows of `postbox.slice` are gone: what they said nobody knows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_division_that_lacks_slices_is_refused() {
    let fixture = divided().await;
    let lose = "DELETE FROM postbox.slice WHERE slice IN (3, 5)";
    fixture.client.batch_execute(lose).await.unwrap();
    let lacks = "has 62 of 64 slices";
    let mut relay = start(&fixture, &[]);
    assert_eq!(relay.exit_code().await, 4, "{}", relay.log());
    assert!(relay.log().contains(lacks), "{}", relay.log());
    let setup = fixture.setup(&["--mode", "wal"]);
    assert!(setup.complaint(4).contains(lacks), "{setup:?}");
    // As if the dump of another cluster had been restored.
    let foreign = "UPDATE postbox.checkpoint SET system_identifier = '1'";
    fixture.client.batch_execute(foreign).await.unwrap();
    let setup = fixture.setup(&[&POLL[..], &["--adopt"]].concat());
    assert!(setup.complaint(4).contains(lacks), "{setup:?}");
    assert_eq!(count(&fixture, "true").await, 62);
}
