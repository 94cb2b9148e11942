//! A slot that was lost: `postbox recover`, and the relay after it.

mod parked;
mod skip;

use std::time::{Duration, Instant};

use postbox::oracle::Load;
use postbox::servers::Server;

use crate::setup::slot::{open_transaction, wait_for_waiting};
use crate::support::{
    Fixture, Relay, connect, run_script, shared_brokers, signal, trials, wait_until,
};

const FAST: [&str; 4] = ["--heartbeat-interval", "1s", "--in-flight-max", "100"];
const IN_FLIGHT_MAX: usize = 100;

/// A heartbeat interval, and the time until its fence is stored, on a slow machine.
const FENCE_AGE_MAX: Duration = Duration::from_millis(2500);

fn load(fixture: &Fixture) -> Load {
    Load {
        events_per_second: 1_000.0,
        rollback_percent: 20,
        pause_percent: 10,
        ..fixture.load()
    }
}

/// How many rows recovery says it has found.
fn missed(results: &str) -> usize {
    let (_, rest) = results.split_once("since the last checkpoint: ").unwrap();
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap();
    rest[..digits].parse().unwrap()
}

async fn checkpoint(fixture: &Fixture) -> String {
    let sql = "SELECT (c.*)::text FROM postbox.checkpoint AS c";
    let row = fixture.client.query_one(sql, &[]).await;
    row.unwrap().get(0)
}

/// How the slot is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    Dropped,
    /// `max_slot_wal_keep_size`
    Invalidated,
}

/// Loses the slot under load, and recovers: how long it took until events flowed.
async fn lose(loss: Loss) -> Duration {
    let fixture = match loss {
        Loss::Dropped => Fixture::new().await,
        Loss::Invalidated => Fixture::with_servers(&["max_slot_wal_keep_size=1MB"], &[]).await,
    };
    let writers = fixture.writers(load(&fixture));
    let mut relay = Relay::streaming(&fixture, &FAST).await;
    let delivered = || relay.published(&fixture.topic);
    tokio::time::sleep(2 * FENCE_AGE_MAX).await;
    let before = delivered();
    tokio::time::sleep(FENCE_AGE_MAX).await;
    let bound = delivered() - before + IN_FLIGHT_MAX;
    assert!(delivered() > bound * 3 / 2, "{} of {bound}", delivered());
    let says = match loss {
        Loss::Dropped => {
            fixture.drop_slot().await;
            "replication slot"
        }
        Loss::Invalidated => {
            // Not stopped: a walsender that is told to end while its client reads
            // nothing waits for it for ever, and the checkpoint that told it too.
            relay.kill();
            fixture.outrun_slot().await;
            relay = Relay::start(&fixture, &FAST);
            "was invalidated by the server"
        }
    };
    assert_eq!(relay.exit_code().await, 4, "{}", relay.log());
    let log = relay.log();
    assert!(log.contains(says), "{log}");
    assert!(log.contains("run `postbox recover`"), "{log}");
    // While nothing reads.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let since = Instant::now();
    let recovery = fixture.recover(&[]);
    assert!(missed(recovery.results()) > 0, "{recovery:?}");
    let relay = Relay::streaming(&fixture, &FAST).await;
    wait_until("events flow", async || relay.published(&fixture.topic) > 0).await;
    let back = since.elapsed();
    tokio::time::sleep(Duration::from_secs(1)).await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge(relay).await;
    assert!(verdict.is_clean(bound), "{loss:?}: {verdict}");
    println!("{loss:?}: back after {back:.1?}; repeated of {bound}: {verdict}");
    back
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_dropped_under_load_is_recovered_without_loss() {
    lose(Loss::Dropped).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_the_server_gave_up_is_recovered_without_loss() {
    lose(Loss::Invalidated).await;
}

/// How long it takes, and that it does not take longer than is promised.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures: make trials"]
async fn trials_of_recovery() {
    for loss in [Loss::Dropped, Loss::Invalidated] {
        let name = format!("{loss:?}: events flow after");
        trials(&name, Duration::from_secs(5), async || lose(loss).await).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recovery_that_was_interrupted_begins_again() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &FAST).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    fixture.drop_slot().await;
    fixture.insert("b", "{}").await;
    fixture.recover(&[]).results();
    fixture.insert("c", "{}").await;
    // As if it had been killed after it made the slot.
    let undo = "UPDATE postbox.checkpoint SET lsn = NULL, second_snapshot = NULL";
    fixture.client.batch_execute(undo).await.unwrap();
    let mut relay = Relay::start(&fixture, &FAST);
    assert_eq!(relay.exit_code().await, 4, "{}", relay.log());
    let why = "has not finished: run `postbox recover` again";
    assert!(relay.log().contains(why), "{}", relay.log());
    assert!(fixture.setup(&[]).complaint(4).contains(why));
    let print = fixture.setup(&["--print"]);
    let script = run_script(&fixture.client, print.results()).await;
    let refused = script.unwrap_err();
    let refused = refused.as_db_error().unwrap().message().to_owned();
    assert!(refused.contains("has not finished"), "{refused}");
    let reset = "SELECT pg_advisory_unlock_all(); RESET ALL";
    fixture.client.batch_execute(reset).await.unwrap();

    fixture.recover(&[]).results();
    let relay = Relay::streaming(&fixture, &FAST).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let keys = fixture.keys().await;
    assert!(
        ["b", "c"]
            .iter()
            .all(|key| keys.contains(&(*key).to_owned())),
        "{keys:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_killed_while_it_reads_the_gap_goes_on_where_it_was() {
    let fixture = Fixture::new().await;
    fixture.drop_slot().await;
    let many = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
                SELECT $1, (n % 100)::text, 'changed', json_build_object('version', n) \
                FROM generate_series(1, 100000) AS n";
    let many = fixture.client.execute(many, &[&fixture.topic]).await;
    many.unwrap();
    fixture.enter_in_ledger().await;
    let recovery = fixture.recover(&[]);
    assert_eq!(missed(recovery.results()), 100_000);
    let kills = 3;
    for kill in 1..=kills {
        let relay = Relay::streaming(&fixture, &FAST).await;
        wait_until("a part is delivered", async || {
            relay.published(&fixture.topic) > 10_000
        })
        .await;
        if kill == 1 {
            relay.drain().await;
        } else {
            relay.kill();
        }
    }
    let before = checkpoint(&fixture).await;
    fixture.insert("after", "{}").await;
    fixture.enter_in_ledger().await;
    let relay = Relay::streaming(&fixture, &FAST).await;
    wait_until("the gap ends", async || {
        let ended = "SELECT second_snapshot IS NULL FROM postbox.checkpoint";
        fixture.client.query_one(ended, &[]).await.unwrap().get(0)
    })
    .await;
    let verdict = fixture.judge(relay).await;
    // The window and the rows between two marks, and what a slow machine adds.
    assert!(verdict.is_clean(2 * 5_000), "{verdict}\n{before}");
}

/// It slept while its slot was lost and made anew, and then learns that what it had
/// sent was delivered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_wakes_after_a_recovery_does_not_end_the_gap() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let relay = Relay::streaming(&fixture, &FAST).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    fixture.kafka("pause");
    fixture.insert("b", "{}").await;
    // A fence behind it.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    relay.signal("STOP");
    fixture.drop_slot().await;
    fixture.insert("missed", "{}").await;
    fixture.recover(&[]).results();
    fixture.kafka("resume");
    tokio::time::sleep(Duration::from_secs(1)).await;
    relay.signal("CONT");
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let keys = fixture.keys().await;
    assert!(keys.contains(&"missed".to_owned()), "{keys:?}");
}

/// What commits while the server waits for a transaction that was open, so that it can
/// make the slot, is not given by the slot. Its snapshot sees it, though it says that it
/// ends before, as in `7366:7365:`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_commits_while_the_slot_is_made_is_not_lost() {
    let fixture = Fixture::with_postgres(&["autovacuum=off"]).await;
    fixture.set_up().await;
    fixture.drop_slot().await;
    let (first, first_id) = open_transaction(&fixture).await;
    let recovery = std::thread::scope(|scope| {
        let recovery = scope.spawn(|| fixture.recover(&[]));
        let meanwhile = async {
            wait_for_waiting(&fixture, &first_id).await;
            let (second, second_id) = open_transaction(&fixture).await;
            fixture.insert("meanwhile", "{}").await;
            first.batch_execute("COMMIT").await.unwrap();
            wait_for_waiting(&fixture, &second_id).await;
            let (_third, _) = open_transaction(&fixture).await;
            second.batch_execute("ROLLBACK").await.unwrap();
            wait_until("recovery ends", async || recovery.is_finished()).await;
        };
        let handle = tokio::runtime::Handle::current();
        tokio::task::block_in_place(|| handle.block_on(meanwhile));
        recovery.join().unwrap()
    });
    assert_eq!(missed(recovery.results()), 1);
    let relay = Relay::streaming(&fixture, &FAST).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["meanwhile"]);
}

/// A process may be held up between its commit in the WAL and the moment at which others
/// see it. Whoever then reads its rows through a slot's snapshot destroys them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_a_commit_that_is_held_up_are_not_lost() {
    let fixture = Fixture::with_postgres(&[]).await;
    fixture.set_up().await;
    let writers = fixture.writers(Load {
        writers: 8,
        events_max: 1,
        rollback_percent: 0,
        large_per_mille: 0,
        events_per_second: 10_000.0,
        ..fixture.load()
    });
    let server = connect(&fixture.database_url).await;
    let end = Instant::now() + Duration::from_secs(15);
    let holding_up = tokio::spawn(async move {
        // As a rule one that waits until another has flushed its commit too.
        let sql = "SELECT pid FROM pg_stat_activity \
                   WHERE query = 'COMMIT' AND state = 'active' AND backend_xid IS NOT NULL \
                   ORDER BY wait_event = 'WALWrite' DESC NULLS LAST, random() LIMIT 1";
        while Instant::now() < end {
            for row in server.query(sql, &[]).await.unwrap() {
                let process = row.get::<_, i32>(0).unsigned_abs();
                signal(process, "STOP");
                tokio::time::sleep(Duration::from_millis(50)).await;
                signal(process, "CONT");
            }
        }
    });
    while !holding_up.is_finished() {
        fixture.drop_slot().await;
        fixture.recover(&[]).results();
    }
    holding_up.await.unwrap();
    writers.stop().await.unwrap();
    let relay = Relay::streaming(&fixture, &FAST).await;
    let verdict = fixture.judge(relay).await;
    assert!(verdict.is_clean(usize::MAX), "{verdict}");
}

/// Not at the first row of the table, of which there may be many.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_missed_is_read_from_its_first_row_on() {
    let fixture = Fixture::new().await;
    let seq = async || -> Option<i64> {
        let sql = "SELECT seq FROM postbox.checkpoint";
        fixture.client.query_one(sql, &[]).await.unwrap().get(0)
    };
    fixture.drop_slot().await;
    for _ in 0..3 {
        fixture.insert("old", "{}").await;
    }
    fixture.recover(&["--skip-missed"]).results();
    assert_eq!(seq().await, None);
    fixture.drop_slot().await;
    for _ in 0..2 {
        fixture.insert("missed", "{}").await;
    }
    fixture.recover(&[]).results();
    assert_eq!(seq().await, Some(3));
    let relay = Relay::streaming(&fixture, &FAST).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["missed", "missed"]);
}

/// Standbys keep a copy of such a slot, since Postgres 17.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_follows_a_failover_still_does_when_it_is_made_anew() {
    let postgres = Server::postgres_of("17", &[]).unwrap();
    let fixture = Fixture::beside(&postgres, &shared_brokers()).await;
    let slot = &fixture.contract.slot;
    let follows = async || -> bool {
        let sql = "SELECT failover FROM pg_replication_slots";
        fixture.client.query_one(sql, &[]).await.unwrap().get(0)
    };
    fixture.drop_slot().await;
    let make = format!(
        "SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput', failover => true); \
         DROP PUBLICATION postbox"
    );
    fixture.client.batch_execute(&make).await.unwrap();
    fixture.insert("missed", "{}").await;
    assert_eq!(missed(fixture.recover(&[]).results()), 1);
    assert!(follows().await);
    let relay = Relay::streaming(&fixture, &FAST).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["missed"]);
    // Only where it did.
    fixture.drop_slot().await;
    fixture.recover(&[]).results();
    assert!(!follows().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_done_where_nothing_is_lost() {
    let fixture = Fixture::empty().await;
    let never = fixture.recover(&[]);
    let complaint = never.complaint(4);
    assert!(complaint.contains("run `postbox setup`"), "{complaint}");
    fixture.set_up().await;
    let before = checkpoint(&fixture).await;
    let nothing = fixture.recover(&["--skip-missed"]);
    let slot = &fixture.contract.slot;
    assert_eq!(
        nothing.results(),
        format!(
            "publication \"postbox\": already there\nreplication slot \"{slot}\": already there\n"
        )
    );
    assert_eq!(checkpoint(&fixture).await, before);
    let relay = Relay::streaming(&fixture, &[]).await;
    let in_use = fixture.recover(&[]);
    let complaint = in_use.complaint(4);
    assert!(complaint.contains("is in use by process"), "{complaint}");
    relay.drain().await;
}
