//! The replication slot: when it is made, when it is refused.

use tokio::task::JoinHandle;
use tokio_postgres::Client;

use super::{all_created, all_there, assert_events_flow, count, forget_slot, slots, statement};
use crate::support::{Fixture, Relay, connect, wait_until};

/// A transaction that is open, and its id.
pub(crate) async fn open_transaction(fixture: &Fixture) -> (Client, String) {
    let client = connect(&fixture.database_url).await;
    client.batch_execute("BEGIN").await.unwrap();
    let sql = "SELECT pg_current_xact_id()::text";
    let id = client.query_one(sql, &[]).await.unwrap().get(0);
    (client, id)
}

/// Commits an event that nobody sees: what ends when it is no longer to wait.
pub(crate) async fn held_up_event(fixture: &Fixture) -> JoinHandle<()> {
    let emit = "SELECT postbox.emit('order', 'a', 'order_placed', '{}')";
    hold_up(fixture, emit).await
}

/// Commits this, and nobody sees it, as its commit waits for a standby that there is not:
/// what ends when it is no longer to wait.
pub(crate) async fn hold_up(fixture: &Fixture, sql: &str) -> JoinHandle<()> {
    for statement in [
        "ALTER SYSTEM SET synchronous_standby_names = 'nobody'",
        "SELECT pg_reload_conf()",
    ] {
        fixture.client.batch_execute(statement).await.unwrap();
    }
    wait_until("a standby is missing", async || {
        let sql = "SELECT count(*) FROM pg_settings \
                   WHERE name = 'synchronous_standby_names' AND setting <> ''";
        count(fixture, sql).await > 0
    })
    .await;
    let writer = connect(&fixture.database_url).await;
    let waits = "SET synchronous_commit = on";
    writer.batch_execute(waits).await.unwrap();
    let sql = sql.to_owned();
    let held_up = tokio::spawn(async move { writer.batch_execute(&sql).await.unwrap() });
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    wait_until("a commit is held up", async || {
        count(fixture, sql).await > 0
    })
    .await;
    held_up
}

/// The standby is there, as far as the server can tell: what was held up ends.
pub(crate) async fn let_through(fixture: &Fixture, held_up: JoinHandle<()>) {
    for statement in [
        "ALTER SYSTEM RESET synchronous_standby_names",
        "SELECT pg_reload_conf()",
    ] {
        fixture.client.batch_execute(statement).await.unwrap();
    }
    held_up.await.unwrap();
}

/// By this, a commit waits for a standby only if its session wants to.
pub(crate) const HOLDING_UP: &str = "synchronous_commit=local";

/// Waits until set-up waits for what is held up, or is over; then holds it up no more.
pub(crate) async fn let_go(fixture: &Fixture, is_over: impl Fn() -> bool) {
    // Its own text has it too.
    let waits = "SELECT count(*) FROM pg_stat_activity \
                 WHERE query LIKE '%pg_snapshot_xmin(pg_current_snapshot())%' AND pid <> pg_backend_pid()";
    wait_until("set-up waits for what is held up", async || {
        is_over() || count(fixture, waits).await > 0
    })
    .await;
    let let_go = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'";
    fixture.client.batch_execute(let_go).await.unwrap();
}

/// The URL of a role that may do everything, and from which a policy hides all rows.
pub(crate) async fn blind_role(fixture: &Fixture) -> String {
    let (role, url) = fixture.role("blind").await;
    let database = &fixture.contract.slot;
    let blind = format!(
        "ALTER ROLE {role} REPLICATION; GRANT ALL ON DATABASE {database} TO {role}; \
         GRANT ALL ON SCHEMA postbox TO {role}; \
         GRANT ALL ON ALL TABLES IN SCHEMA postbox TO {role}; \
         GRANT ALL ON ALL FUNCTIONS IN SCHEMA postbox TO {role}; \
         ALTER TABLE postbox.outbox ENABLE ROW LEVEL SECURITY"
    );
    fixture.client.batch_execute(&blind).await.unwrap();
    url
}

/// Waits until the walsender that makes a slot waits for this transaction.
pub(crate) async fn wait_for_waiting(fixture: &Fixture, id: &str) {
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
        assert!(complaint.contains("`postbox recover`"), "{complaint}");
        assert_eq!(slots(&fixture).await, 0);
    }
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

    // A publication that is younger than the slot cannot be read through it,
    // whoever made it.
    let made_by_hand = "DROP PUBLICATION postbox; \
                        CREATE PUBLICATION postbox FOR TABLE postbox.outbox \
                        WITH (publish = 'insert', publish_via_partition_root = true)";
    for change in ["DROP PUBLICATION postbox", made_by_hand] {
        forget_slot(&fixture).await;
        fixture.client.batch_execute(&make).await.unwrap();
        fixture.client.batch_execute(change).await.unwrap();
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
    }

    // Which rows the slot still holds nobody can tell.
    forget_slot(&fixture).await;
    fixture.client.batch_execute(&make).await.unwrap();
    fixture.insert("a", "{}").await;
    let setup = fixture.setup(&[]);
    let complaint = setup.complaint(4);
    assert!(complaint.contains("has rows: 1;"), "{complaint}");
    // Rows that are hidden are not none.
    let setup = fixture.setup_as(&blind_role(&fixture).await, &[]);
    let stderr = &setup.stderr;
    assert!(stderr.contains("row-level security policy"), "{setup:?}");
    let seeing = "ALTER TABLE postbox.outbox DISABLE ROW LEVEL SECURITY";
    fixture.client.batch_execute(seeing).await.unwrap();
    // Interrupted, it is still another's, and holds what it held.
    let interrupted = fixture.setup_until("taking_over", &["--backfill", "none"]);
    assert!(!interrupted.stderr.is_empty(), "{interrupted:?}");
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

/// A commit that waits for a standby is in the WAL, and nobody sees it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_take_over_waits_for_what_was_committed_and_is_not_seen() {
    let fixture = Fixture::with_postgres(&[HOLDING_UP]).await;
    fixture.setup(&[]).results();
    let slot = &fixture.contract.slot;
    forget_slot(&fixture).await;
    let make = format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')");
    fixture.client.batch_execute(&make).await.unwrap();
    let held_up = held_up_event(&fixture).await;
    let past = format!("SELECT pg_replication_slot_advance('{slot}', pg_current_wal_flush_lsn())");
    fixture.client.batch_execute(&past).await.unwrap();
    let setup = std::thread::scope(|scope| {
        let setup = scope.spawn(|| fixture.setup(&[]));
        tokio::task::block_in_place(|| {
            let let_go = let_go(&fixture, || setup.is_finished());
            tokio::runtime::Handle::current().block_on(let_go);
        });
        setup.join().unwrap()
    });
    held_up.await.unwrap();
    let complaint = setup.complaint(4);
    assert!(complaint.contains("has rows: 1;"), "{complaint}");
}

/// There is a limit to what a slot's snapshot can hold, of transactions that were rolled
/// back too. Here one stays open when the slot is about to begin, and many come after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_whose_snapshot_was_too_large_is_made_again() {
    let settings = [
        "max_connections=20",
        "max_wal_senders=5",
        "max_replication_slots=5",
    ];
    let fixture = Fixture::with_postgres(&settings).await;
    let junk = "CREATE TABLE junk (x integer)";
    fixture.client.batch_execute(junk).await.unwrap();
    let (first, first_id) = open_transaction(&fixture).await;
    let set_up = std::thread::scope(|scope| {
        let set_up = scope.spawn(|| fixture.setup(&[]));
        let steps = async {
            wait_until_waited_for(&fixture, &first_id).await;
            let (second, second_id) = open_transaction(&fixture).await;
            first.batch_execute("COMMIT").await.unwrap();
            wait_until_waited_for(&fixture, &second_id).await;
            let (third, third_id) = open_transaction(&fixture).await;
            let many = "DO $$ BEGIN FOR i IN 1..500 LOOP BEGIN \
                            INSERT INTO junk VALUES (i); RAISE EXCEPTION 'no'; \
                        EXCEPTION WHEN raise_exception THEN NULL; END; END LOOP; END $$";
            for statement in [many, "INSERT INTO junk VALUES (1)"] {
                fixture.client.batch_execute(statement).await.unwrap();
            }
            second.batch_execute("COMMIT").await.unwrap();
            wait_until("it is waited for, or set-up is over", async || {
                set_up.is_finished() || is_waited_for(&fixture, &third_id).await
            })
            .await;
            third.batch_execute("COMMIT").await.unwrap();
        };
        let handle = tokio::runtime::Handle::current();
        tokio::task::block_in_place(|| handle.block_on(steps));
        set_up.join().unwrap()
    });
    assert_eq!(set_up.results(), all_created(&fixture));
    assert_events_flow(&fixture, &[]).await;
}

async fn wait_until_waited_for(fixture: &Fixture, id: &str) {
    let is = async || is_waited_for(fixture, id).await;
    wait_until("a transaction is waited for", is).await;
}

async fn is_waited_for(fixture: &Fixture, id: &str) -> bool {
    let sql = format!(
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid' AND transactionid = '{id}'"
    );
    count(fixture, &sql).await > 0
}
