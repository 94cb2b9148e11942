//! A database that was restored from a backup: another cluster, or another timeline.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::assert_recoverable;
use crate::support::{Fixture, Relay, statement};

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
    let data = fixture
        .postgres
        .as_ref()
        .unwrap()
        .fact("data_dir")
        .to_owned();
    let backup = format!("{data}.backup");
    fixture.postgres("stop fast");
    run(&["cp", "-a", &data, &backup]);
    fixture.postgres("start");
    fixture.reconnect().await;
    fixture.insert("after the backup", "{}").await;
    fixture.postgres("stop immediate");

    run(&["rm", "-rf", &data]);
    run(&["mv", &backup, &data]);
    run(&[
        "rm",
        "-rf",
        &format!("{data}/pg_replslot/{}", fixture.contract.slot),
    ]);
    let data = Path::new(&data);
    fs::write(data.join("recovery.signal"), "").unwrap();
    let settings = fs::read_to_string(data.join("postgresql.auto.conf")).unwrap();
    let settings = format!("{settings}\nrestore_command = 'false'\n");
    fs::write(data.join("postgresql.auto.conf"), settings).unwrap();
    fixture.postgres("start");
    fixture.reconnect().await;

    let mut relay = Relay::start(&fixture, &[]);
    assert_eq!(relay.exit_code().await, 4, "{}", relay.log());
    let log = relay.log();
    assert!(log.contains("the server is on another timeline"), "{log}");
    assert!(log.contains("stored=1 found=2"), "{log}");
    assert!(log.contains(" is gone: run `postbox recover`"), "{log}");
    fixture.insert("missed", "{}").await;
    assert_recoverable(&fixture, "missed").await;
}

fn run(command: &[&str]) {
    let status = Command::new(command[0]).args(&command[1..]).status();
    assert!(status.unwrap().success(), "{command:?}");
}
