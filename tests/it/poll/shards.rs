//! Relays that share a table.

use std::sync::Arc;
use std::time::{Duration, Instant};

use postbox::oracle::Verdict;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::cluster::restore;
use super::pooler::behind_pgbouncer;
use super::{BACKLOG, POLL, backlog, polling};
use crate::support::{Fixture, PATIENCE, Relay, SMALL_WINDOW, WINDOW, trials, wait_until};

/// The flags of a relay that shares. Where slices stand is stored each second, also while
/// nothing comes.
pub(crate) const SHARDS: [&str; 6] = [
    "--mode",
    "poll",
    "--shards",
    "4",
    "--heartbeat-interval",
    "1s",
];

/// Starts one with these flags besides.
pub(crate) fn start(fixture: &Fixture, flags: &[&str]) -> Relay {
    Relay::start(fixture, &[&SHARDS, flags].concat())
}

/// How many slices each relay has, the most first; 0 for those that nobody has.
pub(super) async fn counts(fixture: &Fixture) -> Vec<i64> {
    let sql = "SELECT count(*) FILTER (WHERE s.is_served) FROM ( \
                   SELECT *, owner IS NOT NULL AND expires_at > clock_timestamp() AS is_served \
                   FROM postbox.slice) AS s \
               GROUP BY CASE WHEN s.is_served THEN s.owner END ORDER BY 1 DESC";
    let rows = fixture.client.query(sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Waits until the slices are divided so, and nobody wants another's.
pub(crate) async fn wait_for_division(fixture: &Fixture, expected: &[i64]) {
    let sql = "SELECT count(*) FROM postbox.slice WHERE wanted_by IS NOT NULL";
    let what = format!("slices are divided {expected:?}");
    wait_until(&what, async || {
        let wanted: i64 = fixture.client.query_one(sql, &[]).await.unwrap().get(0);
        wanted == 0 && counts(fixture).await == expected
    })
    .await;
}

/// Waits until every slice is stored to be past every row.
pub(crate) async fn wait_for_slices(fixture: &Fixture) {
    let sql = "SELECT count(*) FROM postbox.outbox AS o, postbox.slice AS s \
               WHERE s.second_snapshot IS NOT NULL OR NOT pg_visible_in_snapshot(o.xid, s.snapshot)";
    wait_until("all is stored to be delivered", async || {
        let row = fixture.client.query_one(sql, &[]).await.unwrap();
        row.get::<_, i64>(0) == 0
    })
    .await;
}

/// Waits until all is delivered, stops the relays, and asks the oracle.
pub(crate) async fn judge(fixture: &Fixture, relays: impl IntoIterator<Item = Relay>) -> Verdict {
    wait_for_slices(fixture).await;
    fixture.wait_for_untried().await;
    for relay in relays {
        relay.drain().await;
    }
    fixture.verdict().await
}

/// Nobody took what was another's, and nothing went wrong.
fn assert_orderly(relay: &Relay) {
    let log = relay.log();
    assert!(
        !log.contains("taken over") && !log.contains("WARN"),
        "{log}"
    );
}

/// A relay comes, another one does, one goes: each time all slices are divided evenly, and
/// nothing is repeated, under writers and while a slice changes hands.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relays_that_come_and_go_divide_the_slices_and_repeat_nothing() {
    let fixture = Fixture::polling().await;
    let writers = fixture.writers(fixture.load());
    let mut first = start(&fixture, &[]);
    first.wait_for_log("serving 64 of 64 slices").await;
    let mut second = start(&fixture, &[]);
    second.wait_for_log("serving 32 of 64 slices").await;
    wait_for_division(&fixture, &[32, 32]).await;
    let mut third = start(&fixture, &[]);
    third.wait_for_log("serving 2").await;
    wait_for_division(&fixture, &[22, 21, 21]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let since = Instant::now();
    first.drain().await;
    wait_for_division(&fixture, &[32, 32]).await;
    let divided = since.elapsed();
    tokio::time::sleep(Duration::from_secs(1)).await;
    writers.stop().await.unwrap();
    [&second, &third].into_iter().for_each(assert_orderly);
    for relay in [&second, &third] {
        assert!(relay.published(&fixture.topic) > 0, "{}", relay.log());
        assert_eq!(relay.metric("postbox_slices"), 32.0);
    }
    let verdict = judge(&fixture, [second, third]).await;
    println!("divided anew after {divided:?}: {verdict}");
    assert!(verdict.committed > 500 && verdict.is_clean(0), "{verdict}");
    assert!(divided < Duration::from_secs(3), "{divided:?}");
}

/// What has settled stays: no slice changes hands.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slices_that_are_divided_evenly_stay_where_they_are() {
    let fixture = Fixture::polling().await;
    let relays: Vec<Relay> = (0..3).map(|_| start(&fixture, &[])).collect();
    wait_for_division(&fixture, &[22, 21, 21]).await;
    // Each of them is served, not only owned.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let sql = "SELECT sum(epoch)::bigint FROM postbox.slice";
    let epochs = async || -> i64 { fixture.client.query_one(sql, &[]).await.unwrap().get(0) };
    let before = epochs().await;
    let writers = fixture.writers(fixture.load());
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(epochs().await, before);
    writers.stop().await.unwrap();
    relays.iter().for_each(assert_orderly);
    let verdict = judge(&fixture, relays).await;
    assert!(verdict.is_clean(0), "{verdict}");
}

/// Kills one of two; how long its slices are served by nobody.
async fn take_over() -> Duration {
    let fixture = Fixture::polling().await;
    let writers = fixture.writers(fixture.load());
    let mut victim = start(&fixture, &[]);
    victim.wait_for_log("serving 64 of 64 slices").await;
    let other = start(&fixture, &[]);
    wait_for_division(&fixture, &[32, 32]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    victim.kill();
    let since = Instant::now();
    while !other.log().contains("serving 64 of 64 slices") {
        assert!(since.elapsed() < PATIENCE, "{}", other.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let taken = since.elapsed();
    writers.stop().await.unwrap();
    let verdict = judge(&fixture, [other]).await;
    assert!(verdict.is_clean(12_000), "{verdict}");
    taken
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slices_of_a_relay_that_is_killed_are_served_by_the_others() {
    take_over().await;
}

/// How long it takes, and that it does not take longer than is promised.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures: make trials"]
async fn trials_of_slices() {
    let name = "Kill: the other relay serves all slices after";
    trials(name, Duration::from_secs(4), take_over).await;
}

/// Its slices stand amid a gap, and those of the others amid another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_killed_amid_what_it_reads_is_gone_on_from_there() {
    let fixture = Fixture::polling().await;
    let few = ["--in-flight-max", "1000"];
    let victim = start(&fixture, &few);
    let other = start(&fixture, &few);
    wait_for_division(&fixture, &[32, 32]).await;
    backlog(&fixture).await;
    wait_until("a part is delivered by each", async || {
        let published = |relay: &Relay| relay.published(&fixture.topic);
        published(&victim) > 15_000 && published(&other) > 1_000
    })
    .await;
    victim.kill();
    assert!(
        fixture.records().await.len() < BACKLOG as usize,
        "it was too late"
    );
    let third = start(&fixture, &few);
    wait_for_division(&fixture, &[32, 32]).await;
    let verdict = judge(&fixture, [other, third]).await;
    println!("{verdict}");
    // As where the table is not shared: less than it had sent.
    assert!(
        verdict.committed == BACKLOG as usize && verdict.is_clean(1_000 + 1_024 + 10_000),
        "{verdict}"
    );
}

/// It has lost its slices in its sleep, sends nothing more of them, and gets others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_wakes_up_sends_nothing_of_what_others_have_by_now() {
    let fixture = Fixture::polling().await;
    let mut sleeper = start(&fixture, &[]);
    sleeper.wait_for_log("serving 64 of 64 slices").await;
    let mut other = start(&fixture, &[]);
    wait_for_division(&fixture, &[32, 32]).await;
    insert_all(&fixture, 2).await;
    wait_for_slices(&fixture).await;
    sleeper.signal("STOP");
    insert_all(&fixture, 5).await;
    other.wait_for_log("serving 64 of 64 slices").await;
    wait_for_slices(&fixture).await;
    sleeper.signal("CONT");
    wait_for_division(&fixture, &[32, 32]).await;
    insert_all(&fixture, 1).await;
    fixture.enter_in_ledger().await;
    let verdict = judge(&fixture, [sleeper, other]).await;
    assert!(verdict.committed == 800 && verdict.is_clean(0), "{verdict}");
}

/// So many rows of each of a hundred keys.
pub(super) async fn insert_all(fixture: &Fixture, rows: i32) {
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
               SELECT $1, 'k' || key, 'changed', '{}' FROM generate_series(1, $2) AS n, generate_series(1, 100) AS key";
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&fixture.topic, &rows];
    fixture.client.execute(sql, &parameters).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_relays_are_at_work_than_there_may_be() {
    let fixture = Fixture::polling().await;
    let flags = ["--mode", "poll", "--shards", "1"];
    let mut active = Relay::start(&fixture, &flags);
    active.wait_for_log("serving 64 of 64 slices").await;
    let mut other = Relay::start(&fixture, &flags);
    other.wait_for_log("standing by").await;
    fixture.insert("a", "{}").await;
    wait_for_slices(&fixture).await;
    active.drain().await;
    other.wait_for_log("serving 64 of 64 slices").await;
    fixture.insert("b", "{}").await;
    wait_for_slices(&fixture).await;
    other.drain().await;
    assert_eq!(fixture.keys().await, ["a", "b"]);
}

/// Kills and stops at random, while slices change hands all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relays_killed_and_started_in_a_loop_lose_nothing() {
    let fixture = Fixture::polling().await;
    let writers = fixture.writers(fixture.load());
    let mut relays = vec![start(&fixture, &[]), start(&fixture, &[])];
    for round in 0..6 {
        tokio::time::sleep(Duration::from_millis(700 + round * 300)).await;
        let relay = relays.remove(0);
        relays.push(start(&fixture, &[]));
        match round % 2 {
            0 => relay.kill(),
            _ => relay.drain().await,
        }
    }
    writers.stop().await.unwrap();
    let verdict = judge(&fixture, relays).await;
    println!("{verdict}");
    assert!(
        verdict.committed > 500 && verdict.is_clean(3 * 12_000),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slices_are_divided_through_a_pooler() {
    let Some((fixture, _pgbouncer, url)) = behind_pgbouncer().await else {
        return;
    };
    let through = ["--database-url", &*url];
    let writers = fixture.writers(fixture.load());
    let first = start(&fixture, &through);
    let second = start(&fixture, &through);
    wait_for_division(&fixture, &[32, 32]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    [&first, &second].into_iter().for_each(assert_orderly);
    let mut third = start(&fixture, &through);
    wait_for_division(&fixture, &[22, 21, 21]).await;
    first.kill();
    wait_for_division(&fixture, &[32, 32]).await;
    second.drain().await;
    third.wait_for_log("serving 64 of 64 slices").await;
    writers.stop().await.unwrap();
    let verdict = judge(&fixture, [third]).await;
    assert!(
        verdict.committed > 500 && verdict.is_clean(12_000),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_is_divided_or_not_and_says_so() {
    let fixture = Fixture::polling().await;
    let undivided = polling(&fixture, &[]).await;
    // While it is at work.
    let mut divided = start(&fixture, &[]);
    divided.wait_for_log("standing by").await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_checkpoint().await;
    undivided.drain().await;
    divided.wait_for_log("serving 64 of 64 slices").await;
    fixture.insert("b", "{}").await;
    wait_for_slices(&fixture).await;
    let mut undivided = Relay::start(&fixture, &POLL);
    assert_eq!(undivided.exit_code().await, 4);
    let log = undivided.log();
    assert!(log.contains("start it with `--shards`"), "{log}");
    divided.drain().await;
    assert_eq!(fixture.keys().await, ["a", "b"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_is_not_divided() {
    let fixture = Fixture::new().await;
    let mut relay = Relay::start(&fixture, &["--shards", "2"]);
    assert_eq!(relay.exit_code().await, 2);
    let log = relay.log();
    assert!(log.contains("--shards 2 fights --mode wal"), "{log}");
    let mut relay = Relay::start(&fixture, &["--mode", "auto", "--shards", "2"]);
    assert_eq!(relay.exit_code().await, 2);
    let log = relay.log();
    assert!(log.contains("--shards fights mode wal"), "{log}");
}

/// Where the slices stand at several places, the way out that set-up names is one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_divided_relay_is_changed_to_a_slot_and_nothing_is_lost_or_repeated() {
    let fixture = Fixture::polling().await;
    let writers = fixture.writers(fixture.load());
    let to_wal = ["--mode", "wal"];
    // Where each stands is another place, but for chance.
    let mut places = 1_i64;
    while places == 1 {
        let relays = [start(&fixture, &[]), start(&fixture, &[])];
        wait_for_division(&fixture, &[32, 32]).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let setup = fixture.setup(&to_wal);
        assert!(
            setup.complaint(4).contains("is at work: process "),
            "{setup:?}"
        );
        // At once: one alone would bring all slices to one place.
        relays.iter().for_each(|relay| relay.signal("TERM"));
        for mut relay in relays {
            assert_eq!(relay.exit_code().await, 0, "{}", relay.log());
        }
        let sql = "SELECT count(DISTINCT snapshot::text) FROM postbox.slice";
        places = fixture.client.query_one(sql, &[]).await.unwrap().get(0);
    }
    let setup = fixture.setup(&to_wal);
    assert!(
        setup
            .complaint(4)
            .contains("start one with `--mode poll --shards 1`"),
        "{setup:?}"
    );
    writers.stop().await.unwrap();
    let mut relay = Relay::start(&fixture, &["--mode", "poll", "--shards", "1"]);
    relay.wait_for_log("serving 64 of 64 slices").await;
    wait_for_slices(&fixture).await;
    relay.drain().await;
    let crashed = fixture.setup_until("merging", &to_wal);
    assert!(crashed.complaint(-1).contains("failpoint merging panic"));
    let setup = fixture.setup(&to_wal);
    assert!(setup.results().contains("slices of relay"), "{setup:?}");
    let writers = fixture.writers(fixture.load());
    let relay = Relay::streaming(&fixture, &[]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge(relay).await;
    assert!(verdict.committed > 500 && verdict.is_clean(0), "{verdict}");
    // And back, and not divided then.
    fixture.setup(&POLL).results();
    polling(&fixture, &[]).await.drain().await;
}

/// Each slice tells which of its rows were published.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_slices_had_not_published_in_another_cluster_is_in_this_one() {
    let original = Fixture::with_postgres(&[]).await;
    original.set_up_polling().await;
    // So that its transactions have other numbers than those of the new cluster.
    let burn =
        "DO 'BEGIN FOR n IN 1..5000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END'";
    original.client.batch_execute(burn).await.unwrap();
    let mut relay = start(&original, &[]);
    relay.wait_for_log("serving 64 of 64 slices").await;
    insert_all(&original, 1).await;
    wait_for_slices(&original).await;
    relay.drain().await;
    insert_all(&original, 1).await;
    // As if half of the slices had been served by another relay for a while longer.
    let further = "UPDATE postbox.slice SET snapshot = pg_current_snapshot() WHERE slice < 32";
    original.client.batch_execute(further).await.unwrap();
    let sql = "SELECT count(*) FROM postbox.outbox \
               WHERE seq > 100 AND get_byte(sha256(textsend(aggregate_id)), 0) & 63 >= 32";
    let left: i64 = original.client.query_one(sql, &[]).await.unwrap().get(0);
    assert!((20..80).contains(&left), "{left}");

    let restored = Fixture::with_postgres(&[]).await;
    restored.set_up_polling().await;
    restore(&original, &restored).await;
    let mut refused = start(&restored, &[]);
    assert_eq!(refused.exit_code().await, 3, "{}", refused.log());
    let adopt = [&POLL[..], &["--adopt"]].concat();
    let setup = restored.setup(&adopt);
    let expected = format!("rows not published in the other cluster: {left}");
    assert!(setup.results().contains(&expected), "{setup:?}");
    let relay = polling(&restored, &[]).await;
    restored.insert("new", "{}").await;
    restored.wait_for_checkpoint().await;
    relay.drain().await;
    // The topic of the others is in their rows.
    assert_eq!(restored.keys().await, ["new"]);
    assert_eq!(original.keys().await.len() as i64, 100 + left);
}

/// The steps of a division, at which passage a relay crashes, and whether it is the one
/// that was there first.
const STEPS: [(&str, u32, bool); 11] = [
    ("dividing", 1, true),
    ("divided", 1, true),
    ("claiming_slices", 1, false),
    ("slices_claimed", 1, false),
    ("wanting", 1, false),
    ("wanted", 1, false),
    ("storing_slices", 5, true),
    ("slices_stored", 5, true),
    ("renewing_slices", 2, true),
    ("handing_over", 1, true),
    ("handed_over", 1, true),
];

/// What one crash may repeat: while its leases end, rows gather, of which a mark is stored
/// every 1,024.
const REPEATED_MAX: usize = WINDOW + 1_024;

/// How many fixtures are harmed at once: most of their time is waiting.
const AT_ONCE: usize = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_step_of_a_division_loses_nothing() {
    let mut crashing = JoinSet::new();
    let at_once = Arc::new(Semaphore::new(AT_ONCE));
    for (step, passage, is_first) in STEPS {
        let at_once = Arc::clone(&at_once);
        crashing.spawn(async move {
            let _permit = at_once.acquire().await;
            crash_at(step, passage, is_first).await;
        });
    }
    while let Some(crashed) = crashing.join_next().await {
        crashed.unwrap();
    }
}

/// One of two relays ends at this step; what it leaves is the other's, and then a third's.
async fn crash_at(step: &str, passage: u32, is_first: bool) {
    let fixture = Fixture::polling().await;
    let writers = fixture.writers(fixture.steady_load());
    let flags = [&SHARDS[..], &SMALL_WINDOW].concat();
    let crashing = || {
        let mut command = Relay::command(&fixture, &flags);
        let failpoint = format!("{step}={}*off->panic", passage - 1);
        Relay::spawn(command.env("FAILPOINTS", failpoint))
    };
    let (mut crashed, mut other);
    if is_first {
        crashed = crashing();
        tokio::time::sleep(Duration::from_millis(500)).await;
        other = start(&fixture, &SMALL_WINDOW);
    } else {
        other = start(&fixture, &SMALL_WINDOW);
        other.wait_for_log("serving 64 of 64 slices").await;
        crashed = crashing();
    }
    assert_eq!(crashed.exit_code().await, -1, "{step}: {}", crashed.log());
    let log = crashed.log();
    assert!(log.contains(&format!("failpoint {step} panic")), "{log}");
    let third = start(&fixture, &SMALL_WINDOW);
    wait_for_division(&fixture, &[32, 32]).await;
    wait_until("more is committed than may be repeated", async || {
        writers.committed() > 2 * REPEATED_MAX as u64
    })
    .await;
    writers.stop().await.unwrap();
    let verdict = judge(&fixture, [other, third]).await;
    println!("{step}: repeated at most {REPEATED_MAX}: {verdict}");
    assert!(verdict.is_clean(REPEATED_MAX), "{step}: {verdict}");
}
