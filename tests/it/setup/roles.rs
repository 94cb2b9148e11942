//! What the roles may do, and what must be given to whom.

use super::{all_created, all_there, assert_events_flow, count, slots, statement};
use crate::support::{Fixture, Relay, connect, wait_until};

/// Each of these is refused for want of a right.
async fn assert_forbidden(url: &str, statements: &[&str]) {
    let client = connect(url).await;
    for statement in statements {
        let error = client.batch_execute(statement).await;
        let code = error.err().and_then(|error| error.code().cloned());
        let forbidden = tokio_postgres::error::SqlState::INSUFFICIENT_PRIVILEGE;
        assert_eq!(code, Some(forbidden), "{statement}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_role_can_relay_and_nothing_else() {
    let fixture = Fixture::empty().await;
    let (role, url) = fixture.role("Relay").await;
    let first = fixture.setup(&["--grant-to", &role]);
    let lines = format!(
        "replication by role \"{role}\": created\ngrants to relay role \"{role}\": created\n"
    );
    assert_eq!(first.results(), all_created(&fixture) + &lines);
    let second = fixture.setup(&["--grant-to", &role]);
    let lines = lines.replace("created", "already there");
    assert_eq!(second.results(), all_there(&fixture) + &lines);

    let snapshot = "SELECT snapshot::text FROM postbox.checkpoint";
    let fence = async || -> String {
        fixture
            .client
            .query_one(snapshot, &[])
            .await
            .unwrap()
            .get(0)
    };
    let before = fence().await;
    let flags = ["--database-url", &url, "--heartbeat-interval", "1s"];
    let relay = Relay::streaming(&fixture, &flags).await;
    fixture.insert("a", "{}").await;
    wait_until("the relay stores a fence", async || fence().await != before).await;
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 1);

    fixture.drop_slot().await;
    fixture.insert("b", "{}").await;
    fixture.recover_as(&url, &[]).results();
    let relay = Relay::streaming(&fixture, &flags).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let keys = fixture.keys().await;
    assert!(keys.contains(&"b".to_owned()), "{keys:?}");

    let forbidden = [
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type) VALUES ('a', 'b', 'c')",
        "UPDATE postbox.outbox SET topic = 'x'",
        "DELETE FROM postbox.outbox",
        "TRUNCATE postbox.outbox",
        "SELECT postbox.emit('a', 'b', 'c', NULL)",
        "SELECT FROM postbox.idempotency",
        "DELETE FROM postbox.checkpoint",
        "INSERT INTO postbox.checkpoint (name, mode) VALUES ('x', 'wal')",
        "DELETE FROM postbox.slice",
        "UPDATE postbox.migration SET version = 2",
        "CREATE TABLE postbox.mine ()",
        "CREATE SCHEMA mine",
        "DROP TABLE postbox.outbox",
        "DROP TABLE postbox.checkpoint",
        "DROP FUNCTION postbox.publication_identity",
        "DROP PUBLICATION postbox",
        "ALTER PUBLICATION postbox SET (publish = 'update')",
        "DROP SCHEMA postbox CASCADE",
    ];
    assert_forbidden(&url, &forbidden).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_role_can_write_events_and_nothing_else() {
    let fixture = Fixture::empty().await;
    let (role, url) = fixture.role("Writer").await;
    let first = fixture.setup(&["--grant-writer-to", &role]);
    let line = format!("grants to writer role \"{role}\": created\n");
    assert_eq!(first.results(), all_created(&fixture) + &line);
    let second = fixture.setup(&["--grant-writer-to", &role]);
    let line = format!("grants to writer role \"{role}\": already there\n");
    assert_eq!(second.results(), all_there(&fixture) + &line);

    let writer = connect(&url).await;
    for statement in [
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type) VALUES ('a', 'b', 'c') RETURNING id",
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, idempotency_key) VALUES ('a', 'b', 'c', 'k1')",
        "SELECT postbox.emit('a', 'b', 'c', NULL)",
        "SELECT postbox.emit('a', 'b', 'c', '{}', idempotency_key => 'k2')",
        "SELECT postbox.emit('a', 'b', 'c', '{}', idempotency_key => 'k2')",
    ] {
        writer.batch_execute(statement).await.unwrap();
    }
    assert_eq!(
        count(&fixture, "SELECT count(*) FROM postbox.outbox").await,
        4
    );

    let forbidden = [
        "SELECT payload FROM postbox.outbox",
        "SELECT * FROM postbox.outbox",
        "UPDATE postbox.outbox SET topic = 'x'",
        "DELETE FROM postbox.outbox",
        "TRUNCATE postbox.outbox",
        "INSERT INTO postbox.idempotency (key, id) VALUES ('x', gen_random_uuid())",
        "UPDATE postbox.idempotency SET key = 'x'",
        "DELETE FROM postbox.idempotency",
        "SELECT FROM postbox.checkpoint",
        "UPDATE postbox.checkpoint SET lsn = NULL",
        "SELECT FROM postbox.slice",
        "SELECT FROM postbox.migration",
        "SELECT postbox.publication_identity('postbox')",
        "CREATE TABLE postbox.mine ()",
        "DROP TABLE postbox.outbox",
        "DROP PUBLICATION postbox",
        "ALTER TABLE postbox.outbox DISABLE TRIGGER take_idempotency_key",
        "SELECT pg_drop_replication_slot('x')",
        "SELECT pg_create_logical_replication_slot('x', 'pgoutput')",
    ];
    assert_forbidden(&url, &forbidden).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_right_that_is_missing_is_named_with_the_statement_that_gives_it() {
    let fixture = Fixture::empty().await;
    let (role, url) = fixture.role("owner").await;
    for expected in [
        format!("ALTER ROLE \"{role}\" REPLICATION"),
        format!(
            "GRANT CREATE ON DATABASE {} TO {role}",
            fixture.database.name()
        ),
    ] {
        let setup = fixture.setup_as(&url, &[]);
        let mend = statement(setup.complaint(6), &expected[..12]);
        assert!(mend.starts_with(&expected), "{mend}");
        fixture.client.batch_execute(&expected).await.unwrap();
        // Refused before anything was made.
        let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'postbox'";
        assert_eq!(
            (count(&fixture, schemas).await, slots(&fixture).await),
            (0, 0)
        );
    }
    assert_eq!(fixture.setup_as(&url, &[]).results(), all_created(&fixture));

    // An owner cannot lend what only a superuser can give.
    let (relay, relay_url) = fixture.role("relay").await;
    let setup = fixture.setup_as(&url, &["--grant-to", &relay]);
    let mend = statement(setup.complaint(6), "ALTER ROLE");
    assert!(
        mend.starts_with(&format!("ALTER ROLE \"{relay}\" REPLICATION")),
        "{mend}"
    );
    let mend = format!("ALTER ROLE \"{relay}\" REPLICATION");
    fixture.client.batch_execute(&mend).await.unwrap();
    let setup = fixture.setup_as(&url, &["--grant-to", &relay]);
    let granted = format!("grants to relay role \"{relay}\": created\n");
    assert!(setup.stdout.ends_with(&granted), "{setup:?}");
    assert_events_flow(&fixture, &["--database-url", &relay_url]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_does_not_exist_is_refused_before_anything_is_made() {
    let fixture = Fixture::empty().await;
    for flag in ["--grant-to", "--grant-writer-to", "--grant-operator-to"] {
        let setup = fixture.setup(&[flag, "no \"body"]);
        let expected =
            "error: role \"no \"body\" does not exist: CREATE ROLE \"no \"\"body\" LOGIN\n";
        assert_eq!(setup.complaint(6), expected);
    }
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'postbox'";
    assert_eq!(count(&fixture, schemas).await, 0);
}

/// As where a login of the day takes the role of the one that owns things.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_is_not_shown_its_walsender_is_told() {
    let fixture = Fixture::empty().await;
    let ((owner, _), (login, url)) = (fixture.role("owner").await, fixture.role("login").await);
    fixture.setup(&["--grant-to", &owner]).results();
    fixture.setup(&["--grant-to", &login]).results();
    let taken_on = format!("GRANT {owner} TO {login}; ALTER ROLE {login} SET role = '{owner}'");
    fixture.client.batch_execute(&taken_on).await.unwrap();
    let flags = ["--database-url", &url];
    let relay = Relay::streaming(&fixture, &flags).await;
    let mend = statement(&relay.log(), "GRANT pg_read_all_stats").to_owned();
    relay.drain().await;
    fixture.client.batch_execute(&mend).await.unwrap();
    let relay = Relay::streaming(&fixture, &flags).await;
    let log = relay.log();
    assert!(!log.contains("walsender"), "{log}");
    relay.drain().await;
}
