//! The script that `postbox setup --print` prints.

use std::process::Command;

use postbox::catalog::SCHEMA_VERSION;

use super::slot::{
    HOLDING_UP, blind_role, held_up_event, let_go, open_transaction, wait_for_waiting,
};
use super::{all_there, assert_events_flow, count, forget_slot, slots};
use crate::support::{Fixture, connect, postbox, run, run_script};

/// The script that `postbox setup --print` prints for the fixture's names.
pub(super) fn script(fixture: &Fixture, flags: &[&str]) -> String {
    fixture
        .setup(&[&["--print"], flags].concat())
        .results()
        .to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_printed_script_sets_an_empty_database_up() {
    let fixture = Fixture::empty().await;
    let (role, url) = fixture.role("relay").await;
    let script = script(&fixture, &["--grant-to", &role]);
    run_script(&fixture.client, &script).await.unwrap();
    assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
    // A second run finds nothing to do.
    let before = fixture.confirmed().await;
    run_script(&fixture.client, &script).await.unwrap();
    assert_eq!(fixture.confirmed().await, before);
    assert_events_flow(&fixture, &["--database-url", &url]).await;
}

/// The same through psql itself, on machines that have one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_printed_script_is_one_for_psql() {
    if Command::new("psql").arg("--version").output().is_err() {
        eprintln!("not tested: there is no psql");
        return;
    }
    let fixture = Fixture::empty().await;
    let (role, _) = fixture.role("Writer").await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), script(&fixture, &["--grant-writer-to", &role])).unwrap();
    for _ in 0..2 {
        let psql = run(Command::new("psql")
            .args(["-X", "-q", "-f"])
            .arg(file.path())
            .arg(&fixture.database_url));
        assert_eq!((psql.code, psql.stderr.as_str()), (0, ""), "{psql:?}");
    }
    assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
    assert_events_flow(&fixture, &[]).await;
}

/// What the script is refused with.
async fn refusal(fixture: &Fixture, script: &str) -> String {
    refusal_as(&fixture.database_url, script).await
}

/// The same, by the role of this URL.
async fn refusal_as(database_url: &str, script: &str) -> String {
    let client = connect(database_url).await;
    let error = run_script(&client, script).await.unwrap_err();
    error.as_db_error().unwrap().message().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_printed_script_makes_nothing_where_there_can_be_no_slot() {
    let mut fixture =
        Fixture::with_postgres(&["wal_level=replica", "max_replication_slots=1"]).await;
    let slot = fixture.contract.slot.clone();
    let script = script(&fixture, &[]);
    let physical = |name: &str| format!("SELECT pg_create_physical_replication_slot('{name}')");
    let again = format!(
        "SELECT pg_drop_replication_slot('other'); {}",
        physical(&slot)
    );
    let made = "SELECT count(*) FROM pg_namespace WHERE nspname = 'postbox'";
    let is_physical = format!("replication slot \"{slot}\" is physical and must be logical");
    for (harm, why) in [
        ("SELECT", "wal_level is \"replica\" and must be \"logical\""),
        (
            &physical("other"),
            "no replication slot is free, max_replication_slots is 1",
        ),
        (&again, &is_physical),
    ] {
        fixture.client.batch_execute(harm).await.unwrap();
        assert_eq!(refusal(&fixture, &script).await, why);
        assert_eq!(count(&fixture, made).await, 0, "{why}");
        let logical = "ALTER SYSTEM SET wal_level = logical";
        fixture.client.batch_execute(logical).await.unwrap();
        fixture.restart_postgres().await;
    }
    let drop = format!("SELECT pg_drop_replication_slot('{slot}')");
    fixture.client.batch_execute(&drop).await.unwrap();
    run_script(&fixture.client, &script).await.unwrap();
    assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
}

/// Also where a set-up of ours was interrupted, whose own slot would be dropped.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_of_another_database_is_left_alone() {
    let fixture = Fixture::empty().await;
    let elsewhere = Fixture::empty().await;
    let slot = &fixture.contract.slot;
    let make = format!("SELECT FROM pg_create_logical_replication_slot('{slot}', 'pgoutput')");
    elsewhere.client.batch_execute(&make).await.unwrap();
    let database = elsewhere.database.name();
    let expected = format!("replication slot \"{slot}\" belongs to database \"{database}\"");
    let made = "SELECT count(*) FROM pg_namespace WHERE nspname = 'postbox'";
    for interrupted in [false, true] {
        if interrupted {
            forget_slot(&fixture).await;
            let begun = format!(
                "INSERT INTO postbox.checkpoint (name, mode, publication) VALUES ('{slot}', 'wal', 'postbox')"
            );
            fixture.client.batch_execute(&begun).await.unwrap();
            elsewhere.client.batch_execute(&make).await.unwrap();
        }
        let plain = script(&fixture, &[]);
        assert_eq!(refusal(&fixture, &plain).await, expected);
        let setup = fixture.setup(&[]);
        let complaint = setup.complaint(4);
        assert!(complaint.contains(&expected), "{complaint}");
        assert_eq!(slots(&fixture).await, 1);
        if !interrupted {
            assert_eq!(count(&fixture, made).await, 0, "something was made");
            let drop = format!("SELECT pg_drop_replication_slot('{slot}')");
            elsewhere.client.batch_execute(&drop).await.unwrap();
            fixture.setup(&[]).results();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_printed_script_refuses_what_set_up_refuses() {
    let fixture = Fixture::empty().await;
    fixture.setup(&[]).results();
    let slot = fixture.contract.slot.clone();
    let refusal = async |script: &str| refusal(&fixture, script).await;
    let plain = script(&fixture, &[]);

    let change = "ALTER PUBLICATION postbox SET (publish = 'insert, update')";
    fixture.client.batch_execute(change).await.unwrap();
    let message = refusal(&plain).await;
    let changed = "publication \"postbox\" is not what it was when the slot was set up";
    assert_eq!(message, changed);
    let right = "ALTER PUBLICATION postbox SET (publish = 'insert')";
    fixture.client.batch_execute(right).await.unwrap();

    let drop = format!("SELECT pg_drop_replication_slot('{slot}')");
    fixture.client.batch_execute(&drop).await.unwrap();
    let message = refusal(&plain).await;
    assert!(
        message.contains("is gone, and is not made again"),
        "{message}"
    );
    assert_eq!(slots(&fixture).await, 0);

    let forget = "DELETE FROM postbox.checkpoint";
    fixture.client.batch_execute(forget).await.unwrap();
    fixture.insert("a", "{}").await;
    let message = refusal(&plain).await;
    assert!(
        message.contains("has rows that were committed before the slot"),
        "{message}"
    );
    assert_eq!(slots(&fixture).await, 0);
    // Rows that are hidden are not none.
    let message = refusal_as(&blind_role(&fixture).await, &plain).await;
    assert!(message.contains("row-level security policy"), "{message}");
    let seeing = "ALTER TABLE postbox.outbox DISABLE ROW LEVEL SECURITY";
    fixture.client.batch_execute(seeing).await.unwrap();

    let newer = format!("INSERT INTO postbox.migration (version) VALUES ({SCHEMA_VERSION} + 1)");
    fixture.client.batch_execute(&newer).await.unwrap();
    let message = refusal(&plain).await;
    assert_eq!(message, "the schema is newer than this script");
    let older = format!("DELETE FROM postbox.migration WHERE version > {SCHEMA_VERSION}");
    fixture.client.batch_execute(&older).await.unwrap();

    let without = script(&fixture, &["--backfill", "none"]);
    run_script(&fixture.client, &without).await.unwrap();
    assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
    assert_events_flow(&fixture, &[]).await;
}

/// A commit that waits for a standby is in the WAL before the slot, and nobody sees it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_printed_script_waits_for_what_was_committed_and_is_not_seen() {
    let fixture = Fixture::with_postgres(&[HOLDING_UP, "autovacuum=off"]).await;
    fixture.setup(&[]).results();
    forget_slot(&fixture).await;
    let (first, first_id) = open_transaction(&fixture).await;
    let (script, client) = (script(&fixture, &[]), connect(&fixture.database_url).await);
    let script = tokio::spawn(async move { run_script(&client, &script).await });
    // The server begins a slot in two steps; what begins after the first, and is committed
    // before the second, the slot will not give.
    wait_for_waiting(&fixture, &first_id).await;
    let (second, second_id) = open_transaction(&fixture).await;
    first.batch_execute("COMMIT").await.unwrap();
    wait_for_waiting(&fixture, &second_id).await;
    let held_up = held_up_event(&fixture).await;
    second.batch_execute("ROLLBACK").await.unwrap();
    let_go(&fixture, || script.is_finished()).await;
    held_up.await.unwrap();
    let refused = script.await.unwrap().unwrap_err();
    let message = refused.as_db_error().unwrap().message();
    assert!(message.starts_with("rows were committed"), "{message}");
    assert_eq!(slots(&fixture).await, 0);
}

#[test]
fn the_script_is_printed_without_a_database() {
    let mut command = postbox(&["setup", "--print", "--slot", "mine"]);
    let output = run(command.env("POSTBOX_DATABASE_URL", "postgresql://app@127.0.0.1:1/app"));
    assert!(
        output
            .results()
            .contains("pg_create_logical_replication_slot('mine', 'pgoutput')")
    );
}

/// What would have no effect is not passed over in silence.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flags_without_an_effect_are_refused() {
    let fixture = Fixture::empty().await;
    for (flags, why) in [
        (&["--print", "--adopt"][..], "--adopt fights --print"),
        (
            &["--print", "--mode", "poll", "--notify", "false"],
            "--notify false fights --print",
        ),
        (&["--print", "--mode", "auto"], "--mode auto fights --print"),
        (
            &["--print", "--notify", "true"],
            "--notify true fights --mode wal",
        ),
        (
            &["--mode", "wal", "--notify", "true"],
            "--notify true fights --mode wal",
        ),
        (&["--notify", "true"], "--notify true fights --mode wal"),
    ] {
        let refused = fixture.setup(flags);
        let refused = refused.complaint(2);
        assert!(refused.contains(why), "{refused}");
    }
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'postbox'";
    assert_eq!(count(&fixture, schemas).await, 0);
}
