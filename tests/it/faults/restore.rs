//! A database that was restored from a backup: another cluster, or another timeline.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::assert_recoverable;
use crate::support::{Fixture, Relay, statement, wait_until};

/// A dump that was restored into another cluster brings the checkpoint along, and no
/// slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_of_another_cluster_is_refused() {
    let original = Fixture::with_postgres(&[]).await;
    original.setup(&[]).results();
    let restored = Fixture::new().await;
    let dump = "SELECT system_identifier, row_to_json(c)::text FROM postbox.checkpoint AS c";
    let row = original.client.query_one(dump, &[]).await.unwrap();
    let (identifier, checkpoint): (String, String) = (row.get(0), row.get(1));
    let slot = &restored.contract.slot;
    let restore = format!(
        "SELECT pg_drop_replication_slot('{slot}'); DELETE FROM postbox.checkpoint; \
         INSERT INTO postbox.checkpoint SELECT * FROM json_populate_record(NULL::postbox.checkpoint, '{checkpoint}'); \
         UPDATE postbox.checkpoint SET name = '{slot}'"
    );
    restored.client.batch_execute(&restore).await.unwrap();
    restored.insert("a", "{}").await;

    let mut relay = Relay::start(&restored, &[]);
    assert_eq!(relay.exit_code().await, 3, "{}", relay.log());
    let expected =
        format!("belongs to the cluster with system identifier {identifier}, and this one has ");
    assert!(relay.log().contains(&expected), "{}", relay.log());
    let setup = restored.setup(&[]);
    let complaint = setup.complaint(3);
    assert!(complaint.contains(&expected), "{complaint}");
    let give_up = statement(complaint, "DELETE FROM");
    restored.client.batch_execute(give_up).await.unwrap();
    restored.setup(&["--backfill", "none"]).results();
    let relay = Relay::streaming(&restored, &[]).await;
    restored.insert("b", "{}").await;
    restored.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(restored.records().await.len(), 1);
}

/// A backup of the files, recovered to its end, is the same cluster on another
/// timeline; backups leave slots out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restored_backup_is_on_another_timeline_and_has_no_slot() {
    let mut fixture = Fixture::with_postgres(&[]).await;
    fixture.setup(&[]).results();
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.insert("before", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let backup = back_up(&mut fixture).await;
    fixture.insert("after the backup", "{}").await;
    fixture.postgres("stop immediate");
    let slot = format!("{backup}/pg_replslot/{}", fixture.contract.slot);
    run(&["rm", "-r", &slot]);
    restore(&mut fixture, &backup).await;

    let mut relay = Relay::start(&fixture, &[]);
    assert_eq!(relay.exit_code().await, 4, "{}", relay.log());
    let log = relay.log();
    assert!(log.contains("the server is on another timeline"), "{log}");
    assert!(log.contains("stored=1 found=2"), "{log}");
    assert!(log.contains(" is gone: run `postbox recover`"), "{log}");
    fixture.insert("missed", "{}").await;
    assert_recoverable(&fixture, "missed").await;
}

/// A fail-over may lose what was committed last. A relay that has delivered it, and could
/// not store that, does not wait for it at the end; but for what was delivered before, and
/// is not lost, it does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_after_a_fail_over_waits_for_what_is_left() {
    for (kafka_is_away, code) in [(false, 0), (true, 9)] {
        let mut fixture = Fixture::with_servers(&[], &[]).await;
        fixture.insert("kept", "{}").await;
        let backup = back_up(&mut fixture).await;
        // The restored server writes a little by itself.
        let ahead = "SELECT pg_logical_emit_message(false, 'fill', repeat('x', 1000000))";
        fixture.client.batch_execute(ahead).await.unwrap();
        let mut relay = Relay::streaming(&fixture, &["--shutdown-timeout", "5s"]).await;
        let _locked = fixture.lock_checkpoint().await;
        fixture.insert("lost", "{}").await;
        wait_until("it is delivered", async || {
            relay.published(&fixture.topic) == 2
        })
        .await;
        fixture.postgres("stop immediate");
        relay.wait_for_log("trying again").await;
        if kafka_is_away {
            fixture.kafka("pause");
        }
        restore(&mut fixture, &backup).await;
        let (reached, times) = match kafka_is_away {
            true => ("waiting for kafka", 1),
            false => ("INFO streaming", 2),
        };
        wait_until(reached, async || {
            relay.log().matches(reached).count() == times
        })
        .await;
        relay.signal("TERM");
        assert_eq!(relay.exit_code().await, code, "{}", relay.log());
    }
}

/// Copies the files of the test's Postgres, while it is stopped.
pub(crate) async fn back_up(fixture: &mut Fixture) -> String {
    let data = data_directory(fixture);
    let backup = format!("{data}.backup");
    fixture.postgres("stop fast");
    run(&["cp", "-a", &data, &backup]);
    fixture.postgres("start");
    fixture.reconnect().await;
    backup
}

/// Recovers the stopped Postgres from that copy, onto another timeline.
pub(crate) async fn restore(fixture: &mut Fixture, backup: &str) {
    let data = data_directory(fixture);
    run(&["rm", "-rf", &data]);
    run(&["mv", backup, &data]);
    let data = Path::new(&data);
    fs::write(data.join("recovery.signal"), "").unwrap();
    let settings = fs::read_to_string(data.join("postgresql.auto.conf")).unwrap();
    let settings = format!("{settings}\nrestore_command = 'false'\n");
    fs::write(data.join("postgresql.auto.conf"), settings).unwrap();
    fixture.postgres("start");
    fixture.reconnect().await;
}

fn data_directory(fixture: &Fixture) -> String {
    let postgres = fixture.postgres.as_ref().expect("a Postgres of its own");
    postgres.fact("data_dir").to_owned()
}

fn run(command: &[&str]) {
    let status = Command::new(command[0]).args(&command[1..]).status();
    assert!(status.unwrap().success(), "{command:?}");
}
