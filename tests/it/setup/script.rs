//! The script that `postbox setup --print` prints.

use std::process::Command;

use postbox::catalog::SCHEMA_VERSION;

use super::{all_there, assert_events_flow, slots};
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_printed_script_refuses_what_set_up_refuses() {
    let fixture = Fixture::empty().await;
    fixture.setup(&[]).results();
    let slot = fixture.contract.slot.clone();
    let refusal = async |script: &str| {
        let client = connect(&fixture.database_url).await;
        let error = run_script(&client, script).await.unwrap_err();
        error.as_db_error().unwrap().message().to_owned()
    };
    let plain = script(&fixture, &[]);

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
