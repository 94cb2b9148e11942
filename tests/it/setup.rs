//! `postbox setup`, as its users run it, and the script it prints.

use std::process::Command;

use postbox::catalog::SCHEMA_VERSION;
use postbox::contract::Contract;
use tokio_postgres::Client;

use crate::support::{Fixture, Relay, connect, postbox, run, run_script, wait_until};

/// What set-up says of an empty database.
fn all_created(fixture: &Fixture) -> String {
    let slot = &fixture.contract.slot;
    format!(
        "schema \"postbox\": created\n\
         tables of schema \"postbox\", version {SCHEMA_VERSION}: created\n\
         publication \"postbox\": created\n\
         replication slot \"{slot}\": created\n"
    )
}

/// What it says when there is nothing to do.
fn all_there(fixture: &Fixture) -> String {
    let Contract {
        schema,
        slot,
        publication,
    } = &fixture.contract;
    format!(
        "tables of schema \"{schema}\", version {SCHEMA_VERSION}: already there\n\
         publication \"{publication}\": already there\n\
         replication slot \"{slot}\": already there\n"
    )
}

/// The statement that an error ends with: from its first word to `;` or the end
/// of the line.
fn statement<'a>(complaint: &'a str, first_words: &str) -> &'a str {
    let start = complaint.find(first_words);
    let start = start.unwrap_or_else(|| panic!("no {first_words} in: {complaint}"));
    let statement = complaint[start..].lines().next().unwrap();
    statement.split(';').next().unwrap()
}

async fn count(fixture: &Fixture, sql: &str) -> i64 {
    fixture.client.query_one(sql, &[]).await.unwrap().get(0)
}

async fn slots(fixture: &Fixture) -> i64 {
    let slot = &fixture.contract.slot;
    let sql = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{slot}'");
    count(fixture, &sql).await
}

/// Leaves the tables and the publication, as if there had never been a slot.
async fn forget_slot(fixture: &Fixture) {
    let sql = format!(
        "SELECT pg_drop_replication_slot('{}'); DELETE FROM postbox.checkpoint",
        fixture.contract.slot
    );
    fixture.client.batch_execute(&sql).await.unwrap();
}

/// A relay runs on what was set up.
async fn assert_events_flow(fixture: &Fixture, flags: &[&str]) {
    let relay = Relay::streaming(fixture, flags).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_set_up_makes_everything_and_the_second_finds_it_there() {
    let fixture = Fixture::empty().await;
    assert_eq!(fixture.setup(&[]).results(), all_created(&fixture));
    assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
    assert_events_flow(&fixture, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_at_once_one_makes_everything_and_the_other_finds_it_there() {
    let fixture = Fixture::empty().await;
    let (one, other) = std::thread::scope(|scope| {
        let one = scope.spawn(|| fixture.setup(&[]));
        let other = scope.spawn(|| fixture.setup(&[]));
        (one.join().unwrap(), other.join().unwrap())
    });
    let mut results = [one.results(), other.results()];
    results.sort_unstable();
    assert_eq!(results, [all_created(&fixture), all_there(&fixture)]);
    let rows = count(&fixture, "SELECT count(*) FROM postbox.checkpoint").await;
    assert_eq!((slots(&fixture).await, rows), (1, 1));
}

/// A transaction that is open, and its id.
async fn open_transaction(fixture: &Fixture) -> (Client, String) {
    let client = connect(&fixture.database_url).await;
    client.batch_execute("BEGIN").await.unwrap();
    let sql = "SELECT pg_current_xact_id()::text";
    let id = client.query_one(sql, &[]).await.unwrap().get(0);
    (client, id)
}

/// Waits until the walsender that makes a slot waits for this transaction.
async fn wait_for_waiting(fixture: &Fixture, id: &str) {
    let sql =
        format!("SELECT count(*) FROM pg_locks WHERE NOT granted AND transactionid = '{id}'::xid");
    let what = format!("set-up waits for transaction {id}");
    wait_until(&what, async || count(fixture, &sql).await > 0).await;
}

/// A server that always has a transaction open builds the slot's snapshot in two
/// steps. One that rolls back between them moves the snapshot's `xmin` and not
/// its `xmax`, and pg_snapshot refuses the text, such as `7366:7365:`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_that_come_and_go_while_the_slot_is_made_do_not_stop_set_up() {
    let fixture = Fixture::with_postgres(&["autovacuum=off"]).await;
    let (first, first_id) = open_transaction(&fixture).await;
    let setup = std::thread::scope(|scope| {
        let setup = scope.spawn(|| fixture.setup(&[]));
        let meanwhile = async {
            wait_for_waiting(&fixture, &first_id).await;
            let (second, second_id) = open_transaction(&fixture).await;
            first.batch_execute("COMMIT").await.unwrap();
            wait_for_waiting(&fixture, &second_id).await;
            let (_third, _) = open_transaction(&fixture).await;
            second.batch_execute("ROLLBACK").await.unwrap();
            wait_until("set-up ends", async || setup.is_finished()).await;
        };
        let handle = tokio::runtime::Handle::current();
        tokio::task::block_in_place(|| handle.block_on(meanwhile));
        setup.join().unwrap()
    });
    assert_eq!(setup.results(), all_created(&fixture));
    assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
    assert_events_flow(&fixture, &[]).await;
}

/// The script that `postbox setup --print` prints for the fixture's names.
fn script(fixture: &Fixture, flags: &[&str]) -> String {
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

    let forbidden = [
        "SELECT FROM postbox.outbox",
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type) VALUES ('a', 'b', 'c')",
        "UPDATE postbox.outbox SET topic = 'x'",
        "DELETE FROM postbox.outbox",
        "TRUNCATE postbox.outbox",
        "SELECT postbox.emit('a', 'b', 'c', NULL)",
        "SELECT FROM postbox.idempotency",
        "DELETE FROM postbox.checkpoint",
        "INSERT INTO postbox.checkpoint (name, mode) VALUES ('x', 'wal')",
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
    for flag in ["--grant-to", "--grant-writer-to"] {
        let setup = fixture.setup(&[flag, "no \"body"]);
        let expected =
            "error: role \"no \"body\" does not exist: CREATE ROLE \"no \"\"body\" LOGIN\n";
        assert_eq!(setup.complaint(6), expected);
    }
    let schemas = "SELECT count(*) FROM pg_namespace WHERE nspname = 'postbox'";
    assert_eq!(count(&fixture, schemas).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_publication_is_refused_with_the_statement_that_mends_it() {
    let fixture = Fixture::empty().await;
    fixture.setup(&[]).results();
    let other = "CREATE TABLE other (x integer PRIMARY KEY)";
    fixture.client.batch_execute(other).await.unwrap();
    let version = "SELECT current_setting('server_version_num')::bigint";
    let has_filters = count(&fixture, version).await >= 150_000;
    let for_outbox =
        "CREATE PUBLICATION postbox FOR TABLE postbox.outbox WITH (publish = 'insert')";
    for (make, why, mend, since_15) in [
        (
            "ALTER PUBLICATION postbox SET (publish = 'insert, update')",
            "must publish inserts and nothing else",
            "ALTER PUBLICATION",
            false,
        ),
        (
            "ALTER PUBLICATION postbox SET (publish = '')",
            "must publish inserts and nothing else",
            "ALTER PUBLICATION",
            false,
        ),
        (
            "ALTER PUBLICATION postbox ADD TABLE other",
            "publishes other too",
            "ALTER PUBLICATION",
            false,
        ),
        (
            "ALTER PUBLICATION postbox SET TABLE other",
            "publishes other too",
            "ALTER PUBLICATION",
            false,
        ),
        (
            "ALTER PUBLICATION postbox DROP TABLE postbox.outbox",
            "does not publish \"postbox\".\"outbox\"",
            "ALTER PUBLICATION",
            false,
        ),
        (
            &format!("DROP PUBLICATION postbox; {for_outbox}"),
            "does not publish partitions under the name of their table",
            "ALTER PUBLICATION",
            false,
        ),
        (
            "DROP PUBLICATION postbox; CREATE PUBLICATION postbox FOR ALL TABLES",
            "is FOR ALL TABLES",
            "DROP PUBLICATION",
            false,
        ),
        (
            "ALTER PUBLICATION postbox SET TABLE postbox.outbox WHERE (seq > 5)",
            "has a row filter or a column list",
            "ALTER PUBLICATION",
            true,
        ),
        (
            "ALTER PUBLICATION postbox SET TABLE postbox.outbox (seq, id)",
            "has a row filter or a column list",
            "ALTER PUBLICATION",
            true,
        ),
        (
            "ALTER PUBLICATION postbox ADD TABLES IN SCHEMA public",
            "publishes all tables of public",
            "DROP PUBLICATION",
            true,
        ),
    ] {
        if since_15 && !has_filters {
            continue;
        }
        forget_slot(&fixture).await;
        fixture.client.batch_execute(make).await.unwrap();
        let setup = fixture.setup(&[]);
        let complaint = setup.complaint(5);
        assert!(complaint.contains(why), "after {make}: {complaint}");
        assert_eq!(slots(&fixture).await, 0, "after {make}");
        let mend = statement(complaint, mend);
        fixture.client.batch_execute(mend).await.unwrap();
        fixture.setup(&[]).results();
        assert_eq!(
            fixture.setup(&[]).results(),
            all_there(&fixture),
            "after {make}"
        );
    }
    assert_events_flow(&fixture, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_changed_after_set_up_is_mended_by_what_it_says() {
    let fixture = Fixture::empty().await;
    fixture.setup(&[]).results();
    let change = "ALTER PUBLICATION postbox SET (publish = 'insert, delete')";
    fixture.client.batch_execute(change).await.unwrap();
    let setup = fixture.setup(&[]);
    let complaint = setup.complaint(5);
    assert!(
        complaint.contains("is not what it was when the slot was set up"),
        "{complaint}"
    );
    // To go on is for a person to decide, who then still hears what is wrong.
    let go_on = statement(complaint, "UPDATE ");
    fixture.client.batch_execute(go_on).await.unwrap();
    let setup = fixture.setup(&[]);
    let mend = statement(setup.complaint(5), "ALTER PUBLICATION");
    fixture.client.batch_execute(mend).await.unwrap();
    assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
    assert_events_flow(&fixture, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_does_not_replicate_is_refused_with_the_setting_that_mends_it() {
    let settings = [
        "wal_level=replica",
        "max_replication_slots=0",
        "max_wal_senders=0",
    ];
    let mut fixture = Fixture::with_postgres(&settings).await;
    // One after another: each statement takes us to the next refusal.
    let occupy = "SELECT pg_create_physical_replication_slot('of_others_' || n) \
                  FROM generate_series(1, current_setting('max_replication_slots')::integer) AS n";
    for (code, why, mend) in [
        (
            3,
            "wal_level is \"replica\" and must be \"logical\"",
            "SET wal_level",
        ),
        (
            4,
            "no replication slot is free, max_replication_slots is 0",
            "SET max_replication_slots",
        ),
        (
            4,
            "no replication slot is free, max_replication_slots is 4",
            "SET max_replication_slots",
        ),
        (
            3,
            "no WAL sender is free, max_wal_senders is 0",
            "SET max_wal_senders",
        ),
    ] {
        let setup = fixture.setup(&[]);
        let complaint = setup.complaint(code);
        assert!(complaint.contains(why), "{complaint}");
        assert!(complaint.contains(mend), "{complaint}");
        assert!(
            complaint.trim_end().ends_with("then restart Postgres"),
            "{complaint}"
        );
        let mend = statement(complaint, "ALTER SYSTEM");
        fixture.client.batch_execute(mend).await.unwrap();
        fixture.restart_postgres().await;
        if mend.ends_with("max_replication_slots = 4") {
            fixture.client.batch_execute(occupy).await.unwrap();
        }
    }
    assert_eq!(fixture.setup(&[]).results(), all_created(&fixture));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_gone_is_never_made_again_in_silence() {
    let fixture = Fixture::empty().await;
    fixture.setup(&[]).results();
    fixture.insert("a", "{}").await;
    let slot = &fixture.contract.slot;
    let drop = format!("SELECT pg_drop_replication_slot('{slot}')");
    fixture.client.batch_execute(&drop).await.unwrap();
    for flags in [&[][..], &["--backfill", "none"]] {
        let setup = fixture.setup(flags);
        let complaint = setup.complaint(4);
        let expected = format!("error: replication slot \"{slot}\" is gone: ");
        assert!(complaint.starts_with(&expected), "{complaint}");
        assert_eq!(slots(&fixture).await, 0);
    }
    let setup = fixture.setup(&[]);
    let give_up = statement(setup.complaint(4), "DELETE FROM");
    fixture.client.batch_execute(give_up).await.unwrap();
    let again = fixture.setup(&["--backfill", "none"]);
    let made = format!(
        "replication slot \"{slot}\": created (rows in the outbox before it: 1; they stay unpublished)\n"
    );
    assert!(again.results().ends_with(&made), "{again:?}");
    assert_events_flow(&fixture, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_cannot_be_ours_is_refused() {
    let fixture = Fixture::empty().await;
    let elsewhere = Fixture::empty().await;
    let slot = &fixture.contract.slot;
    let logical = "SELECT FROM pg_create_logical_replication_slot";
    for (client, make, why) in [
        (
            &fixture.client,
            format!("SELECT FROM pg_create_physical_replication_slot('{slot}')"),
            "is physical and must be logical".to_owned(),
        ),
        (
            &fixture.client,
            format!("{logical}('{slot}', 'pgoutput', true)"),
            "is temporary".to_owned(),
        ),
        (
            &elsewhere.client,
            format!("{logical}('{slot}', 'pgoutput')"),
            format!("belongs to database \"{}\"", elsewhere.database.name()),
        ),
        (
            &fixture.client,
            format!("{logical}('{slot}', 'test_decoding')"),
            "has output plugin \"test_decoding\" and must have \"pgoutput\"".to_owned(),
        ),
    ] {
        if let Err(error) = client.batch_execute(&make).await {
            // Not every build of Postgres has it.
            assert!(make.contains("test_decoding"), "{error:?}");
            continue;
        }
        let setup = fixture.setup(&[]);
        let complaint = setup.complaint(4);
        assert!(complaint.contains(&why), "{complaint}");
        assert!(
            complaint.contains("choose another name with `--slot`"),
            "{complaint}"
        );
        assert_eq!(slots(&fixture).await, 1);
        let drop = format!("SELECT pg_drop_replication_slot('{slot}')");
        client.batch_execute(&drop).await.unwrap();
    }
    fixture.setup(&[]).results();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_from_before_the_slot_are_counted_and_must_be_given_up_by_name() {
    let fixture = Fixture::empty().await;
    fixture.setup(&[]).results();
    forget_slot(&fixture).await;
    for _ in 0..3 {
        fixture.insert("a", "{}").await;
    }
    let setup = fixture.setup(&[]);
    let complaint = setup.complaint(4);
    assert!(
        complaint.contains("would never be published: 3;"),
        "{complaint}"
    );
    assert!(complaint.contains("--backfill none"), "{complaint}");
    let rows = count(&fixture, "SELECT count(*) FROM postbox.checkpoint").await;
    assert_eq!((slots(&fixture).await, rows), (0, 0));
    let setup = fixture.setup(&["--backfill", "none"]);
    let made = "created (rows in the outbox before it: 3; they stay unpublished)\n";
    assert!(setup.results().ends_with(made), "{setup:?}");
    assert_events_flow(&fixture, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_someone_else_made_is_taken_over_where_nothing_can_be_lost() {
    // Of its own: transactions of other tests would make the slot look older.
    let fixture = Fixture::with_postgres(&[]).await;
    fixture.setup(&[]).results();
    let slot = &fixture.contract.slot;
    let make = format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')");
    let taken_over = format!("replication slot \"{slot}\": taken over");

    forget_slot(&fixture).await;
    fixture.client.batch_execute(&make).await.unwrap();
    let setup = fixture.setup(&[]);
    assert!(
        setup.results().ends_with(&format!("{taken_over}\n")),
        "{setup:?}"
    );

    // A publication that is younger than the slot cannot be read through it.
    forget_slot(&fixture).await;
    fixture.client.batch_execute(&make).await.unwrap();
    let drop = "DROP PUBLICATION postbox";
    fixture.client.batch_execute(drop).await.unwrap();
    let setup = fixture.setup(&[]);
    let complaint = setup.complaint(4);
    assert!(
        complaint.contains("is not surely younger than publication"),
        "{complaint}"
    );
    let mend = statement(complaint, "SELECT pg_drop");
    let mend = mend.split(" and run").next().unwrap();
    fixture.client.batch_execute(mend).await.unwrap();
    fixture.setup(&[]).results();

    // Which rows the slot still holds nobody can tell.
    forget_slot(&fixture).await;
    fixture.client.batch_execute(&make).await.unwrap();
    fixture.insert("a", "{}").await;
    let setup = fixture.setup(&[]);
    let complaint = setup.complaint(4);
    assert!(complaint.contains("has rows: 1;"), "{complaint}");
    let setup = fixture.setup(&["--backfill", "none"]);
    let note = format!(
        "{taken_over} (rows in the outbox: 1; those before its position stay unpublished)\n"
    );
    assert!(setup.results().ends_with(&note), "{setup:?}");
    // It came after the slot: it is not lost.
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_of_a_later_version_is_left_alone() {
    let fixture = Fixture::empty().await;
    fixture.setup(&[]).results();
    let later = SCHEMA_VERSION + 1;
    let newer = format!("INSERT INTO postbox.migration (version) VALUES ({later})");
    fixture.client.batch_execute(&newer).await.unwrap();
    let expected = format!(
        "error: schema \"postbox\" has version {later}, newer than this program knows ({SCHEMA_VERSION})"
    );
    let setup = fixture.setup(&[]);
    let complaint = setup.complaint(3);
    assert!(complaint.starts_with(&expected), "{complaint}");
    // A relay goes on: set-up comes before the relays when both are upgraded.
    assert_events_flow(&fixture, &[]).await;
    // Also where there is no slot yet.
    forget_slot(&fixture).await;
    let setup = fixture.setup(&[]);
    let complaint = setup.complaint(3);
    assert!(complaint.starts_with(&expected), "{complaint}");
    assert_eq!(slots(&fixture).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_names_work_from_set_up_to_kafka() {
    for (schema, publication) in [
        ("My Schema", "My Publication"),
        ("Sch\"e'ma", "Päb\"l'ic; --"),
    ] {
        let mut fixture = Fixture::empty().await;
        let slot = &fixture.contract.slot;
        fixture.contract = Contract::new(schema, slot, publication).unwrap();
        fixture.setup(&[]).results();
        assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
        let emit = format!(
            "SELECT {}($1, 'a', 'b', '{{}}', idempotency_key => 'k')",
            fixture.contract.table("emit")
        );
        let relay = Relay::streaming(&fixture, &["--heartbeat-interval", "1s"]).await;
        for _ in 0..2 {
            fixture
                .client
                .query(&emit, &[&fixture.topic])
                .await
                .unwrap();
        }
        fixture.insert("a", "{}").await;
        fixture.wait_for_confirmation().await;
        relay.drain().await;
        assert_eq!(fixture.records().await.len(), 2, "{schema}");
        // What it tells people to run has the names right.
        let drop = format!(
            "SELECT pg_drop_replication_slot('{}')",
            fixture.contract.slot
        );
        fixture.client.batch_execute(&drop).await.unwrap();
        let setup = fixture.setup(&[]);
        let give_up = statement(setup.complaint(4), "DELETE FROM");
        fixture.client.batch_execute(give_up).await.unwrap();
        // The script knows them too.
        let script = script(&fixture, &["--backfill", "none"]);
        run_script(&fixture.client, &script).await.unwrap();
        assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
    }
}

#[test]
fn the_script_is_printed_without_a_database() {
    let output = run(&mut postbox(&["setup", "--print", "--slot", "mine"]));
    assert!(
        output
            .results()
            .contains("pg_create_logical_replication_slot('mine', 'pgoutput')")
    );
}
