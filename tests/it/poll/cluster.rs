//! The server crashes, is promoted, or is another one.

use std::time::{Duration, Instant};

use super::{POLL, polling};
use crate::faults::restore::{back_up, restore as restore_backup};
use crate::promotion::{assert_told_of_timeline, demote};
use crate::setup::slot::{HOLDING_UP, held_up_event};
use crate::support::{Fixture, Relay, statement, wait_until};

/// What is seen is not yet on the disk, if its session has not waited for that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_event_is_out_that_a_crash_of_the_server_takes_back() {
    let settings = ["synchronous_commit=off", "wal_writer_delay=10s"];
    let mut fixture = Fixture::with_postgres(&settings).await;
    fixture.set_up_polling().await;
    let relay = polling(&fixture, &[]).await;
    for round in 0..5 {
        fixture
            .insert("a", &format!("{{\"round\": {round}}}"))
            .await;
        wait_until("it is delivered", async || {
            fixture.records().await.len() > round
        })
        .await;
        fixture.postgres("stop immediate");
        fixture.postgres("start");
        fixture.reconnect().await;
    }
    fixture.wait_for_checkpoint().await;
    relay.drain().await;
    fixture.enter_in_ledger().await;
    let verdict = fixture.verdict().await;
    assert!(verdict.committed == 5 && verdict.is_clean(5), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_timeline_is_told_once_and_events_go_on() {
    let mut fixture = Fixture::with_postgres(&[]).await;
    fixture.set_up_polling().await;
    fixture.insert("before", "{}").await;
    demote(&mut fixture).await;
    let mut relay = Relay::start(&fixture, &POLL);
    relay.wait_for_log("waiting for a primary").await;
    let promote = "SELECT pg_promote()";
    fixture.client.batch_execute(promote).await.unwrap();
    relay.wait_for_log("polling").await;
    assert_told_of_timeline(&relay.log());
    fixture.insert("after", "{}").await;
    fixture.wait_for_checkpoint().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["after", "before"]);
    let relay = polling(&fixture, &[]).await;
    assert!(!relay.log().contains("timeline"), "{}", relay.log());
    relay.drain().await;
}

/// The same cluster on another timeline, without what was committed since the backup: the
/// numbers of those rows, and of their transactions, are given to others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn polling_goes_on_from_where_a_restored_backup_is() {
    for is_alive in [true, false] {
        let mut fixture = Fixture::with_postgres(&[]).await;
        fixture.set_up_polling().await;
        let relay = polling(&fixture, &[]).await;
        fixture.insert("before", "{}").await;
        fixture.wait_for_checkpoint().await;
        relay.drain().await;
        fixture.insert("waits", "{}").await;
        let backup = back_up(&mut fixture).await;

        let mut relay = polling(&fixture, &[]).await;
        for _ in 0..20 {
            fixture.insert("lost", "{}").await;
        }
        fixture.wait_for_checkpoint().await;
        if !is_alive {
            relay.drain().await;
            fixture.postgres("stop immediate");
            restore_backup(&mut fixture, &backup).await;
            relay = polling(&fixture, &[]).await;
        } else {
            fixture.postgres("stop immediate");
            relay.wait_for_log("trying again").await;
            restore_backup(&mut fixture, &backup).await;
            wait_until("it polls again", async || {
                relay.log().matches("INFO polling").count() == 2
            })
            .await;
        }
        assert_told_of_timeline(&relay.log());
        for _ in 0..5 {
            fixture.insert("new", "{}").await;
        }
        fixture.wait_for_checkpoint().await;
        relay.drain().await;
        let mut expected = vec!["before"];
        expected.extend(["lost"; 20]);
        expected.extend(["new"; 5]);
        // As the backup does not know that it was delivered.
        expected.extend(["waits"; 2]);
        assert_eq!(fixture.keys().await, expected, "{is_alive}");
        let relay = polling(&fixture, &[]).await;
        assert!(!relay.log().contains("timeline"), "{}", relay.log());
        relay.drain().await;
    }
}

/// What a dump has of an outbox, restored into another cluster: its rows, with the numbers
/// of transactions of where they come from, and the checkpoint.
pub(super) async fn restore(original: &Fixture, restored: &Fixture) {
    let rows = "SELECT row_to_json(o)::text FROM postbox.outbox AS o ORDER BY seq";
    for row in original.client.query(rows, &[]).await.unwrap() {
        let insert = format!(
            "INSERT INTO postbox.outbox OVERRIDING SYSTEM VALUE \
             SELECT * FROM json_populate_record(NULL::postbox.outbox, '{}')",
            row.get::<_, &str>(0)
        );
        restored.client.batch_execute(&insert).await.unwrap();
    }
    let checkpoint = "SELECT row_to_json(c)::text FROM postbox.checkpoint AS c";
    let row = original.client.query_one(checkpoint, &[]).await.unwrap();
    let insert = format!(
        "DELETE FROM postbox.checkpoint; \
         INSERT INTO postbox.checkpoint SELECT * FROM json_populate_record(NULL::postbox.checkpoint, '{}'); \
         UPDATE postbox.checkpoint SET name = '{}'; \
         SELECT setval(pg_get_serial_sequence('postbox.outbox', 'seq'), 1000)",
        row.get::<_, &str>(0),
        restored.contract.slot
    );
    restored.client.batch_execute(&insert).await.unwrap();
    let slices = "SELECT (to_jsonb(s) || jsonb_build_object('name', $1::text))::text FROM postbox.slice AS s";
    let name = &restored.contract.slot;
    for row in original.client.query(slices, &[name]).await.unwrap() {
        let insert = format!(
            "INSERT INTO postbox.slice SELECT * FROM json_populate_record(NULL::postbox.slice, '{}')",
            row.get::<_, &str>(0)
        );
        restored.client.batch_execute(&insert).await.unwrap();
    }
}

/// In either mode, though the numbers of transactions are far ahead of the new cluster's:
/// what was published is not, what was not is, and so is what was written since.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_published_in_another_cluster_is_in_this_one() {
    for mode in ["poll", "wal"] {
        let flags = ["--mode", mode];
        let original = Fixture::with_postgres(&[]).await;
        let burn =
            "DO 'BEGIN FOR n IN 1..5000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END'";
        original.client.batch_execute(burn).await.unwrap();
        original.setup(&flags).results();
        let mut relay = Relay::start(&original, &flags);
        relay.wait_for_log("INFO").await;
        original.insert("published", "{}").await;
        original.wait_until_published(&relay, 1).await;
        relay.drain().await;
        original.insert("left", "{}").await;

        let restored = Fixture::with_postgres(&[]).await;
        // Of one, a partitioned outbox.
        let partitioned = &["--partitioned", "hour"][..usize::from(mode == "wal") * 2];
        let poll = [&["--mode", "poll"], partitioned].concat();
        restored.setup(&poll).results();
        restore(&original, &restored).await;
        restored.insert("new", "{}").await;
        let mut relay = Relay::start(&restored, &flags);
        assert_eq!(relay.exit_code().await, 3, "{}", relay.log());
        let said = match mode {
            "poll" => " --mode poll",
            _ => "",
        };
        for command in ["--adopt", "--backfill none"] {
            let command = format!("run `postbox setup{said} {command}`");
            assert!(relay.log().contains(&command), "{}", relay.log());
        }
        let adopt = [&flags[..], &["--adopt"]].concat();
        // Or not at all.
        let crashed = restored.setup_until("adopting", &adopt);
        assert!(crashed.complaint(-1).contains("failpoint adopting panic"));
        let report = restored.setup(&adopt);
        let expected = "rows not published in the other cluster: 2";
        assert!(report.results().contains(expected), "{report:?}");
        let mut relay = Relay::start(&restored, &flags);
        relay.wait_for_log("INFO").await;
        restored.insert("newest", "{}").await;
        restored.wait_until_published(&relay, 2).await;
        relay.drain().await;
        assert_eq!(restored.keys().await, ["new", "newest"], "{mode}");
        // Its topic is in its row.
        assert_eq!(original.keys().await, ["left", "published"], "{mode}");
        // Nothing more to adopt.
        restored.setup(&adopt).results();
    }
}

/// Copied by hand, or by replication: no snapshot of this cluster sees their numbers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_whose_numbers_are_still_to_come_are_told_and_not_sent_again_and_again() {
    let fixture = Fixture::polling().await;
    fixture.insert("copied", "{}").await;
    let copied = "UPDATE postbox.outbox SET xid = '99999999999'";
    fixture.client.batch_execute(copied).await.unwrap();
    let relay = polling(&fixture, &[]).await;
    fixture.insert("new", "{}").await;
    fixture.wait_until_published(&relay, 1).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let log = relay.log();
    assert!(log.contains("WARN rows of \"postbox\".\"outbox\""), "{log}");
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["new"]);

    let forget = "DELETE FROM postbox.checkpoint";
    fixture.client.batch_execute(forget).await.unwrap();
    let refused = fixture.setup(&POLL);
    let refused = refused.complaint(3);
    assert!(refused.contains("copied from another one"), "{refused}");
    let flags = ["--mode", "wal", "--backfill", "pending"];
    let refused = fixture.setup(&flags);
    let mend = statement(refused.complaint(3), "UPDATE");
    fixture.client.batch_execute(mend).await.unwrap();
    fixture.setup(&flags).results();
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_until_published(&relay, 2).await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["copied", "new", "new"]);
}

impl Fixture {
    async fn wait_until_published(&self, relay: &Relay, events: usize) {
        wait_until("events are published", async || {
            relay.published(&self.topic) >= events
        })
        .await;
    }
}

/// A commit that waits for a standby is in the WAL, and nobody sees it: a slot may have
/// given it, and polling has not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_waits_for_a_standby_is_not_lost_when_the_mode_is_changed() {
    for (from, to) in [("wal", "poll"), ("poll", "wal")] {
        let fixture = Fixture::with_postgres(&[HOLDING_UP]).await;
        fixture.setup(&["--mode", from]).results();
        let flags = |mode| ["--mode", mode, "--route", &fixture.topic];
        let mut relay = Relay::start(&fixture, &flags(from));
        relay.wait_for_log("INFO").await;
        fixture.insert("before", "{}").await;
        fixture.wait_until_published(&relay, 1).await;
        let local = "SET synchronous_commit = local";
        fixture.client.batch_execute(local).await.unwrap();
        // Which waits for all that run.
        let index = "CREATE INDEX IF NOT EXISTS outbox_xid_idx ON postbox.outbox (xid)";
        fixture.client.batch_execute(index).await.unwrap();
        let held_up = held_up_event(&fixture).await;
        fixture.insert("after", "{}").await;
        // A slot gives both.
        let given = if from == "wal" { 3 } else { 2 };
        fixture.wait_until_published(&relay, given).await;
        // What it stores waits for no standby.
        relay.drain().await;
        change_beside(&fixture, from, to);
        let mut relay = Relay::start(&fixture, &flags(to));
        relay.wait_for_log("INFO").await;
        release(&fixture, true).await;
        held_up.await.unwrap();
        fixture.insert("last", "{}").await;
        wait_until("all are there", async || {
            let mut keys = fixture.keys().await;
            keys.dedup();
            keys == ["a", "after", "before", "last"]
        })
        .await;
        relay.kill();
    }
}

/// Sets up for another mode. What set-up and the relay write waits for no standby; and a slot
/// waits for all that run, so that for one the commit is let go.
fn change_beside(fixture: &Fixture, from: &str, to: &str) {
    let since = Instant::now();
    std::thread::scope(|scope| {
        let setup = scope.spawn(|| fixture.setup(&["--mode", to]));
        tokio::task::block_in_place(|| {
            while !setup.is_finished() {
                let all = from == "poll" && since.elapsed() > Duration::from_secs(2);
                tokio::runtime::Handle::current().block_on(release(fixture, all));
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        setup.join().unwrap().results();
    });
}

/// Lets go commits that wait for a standby: all, or those that are not the test's.
async fn release(fixture: &Fixture, all: bool) {
    let sql = format!(
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity \
         WHERE wait_event = 'SyncRep' AND (application_name <> 'postbox test' OR {all})"
    );
    fixture.client.batch_execute(&sql).await.unwrap();
}
