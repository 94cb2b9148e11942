//! Tables of others, read from a slot: in the order of commits, and untouched unless rows
//! are to be marked.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use postbox::oracle::{Load, Verdict};

use crate::claim::claiming;
use crate::claim::spakky::is_clean_without_keys;
use crate::parking::SOON;
use crate::parking::{LARGE, limit};
use crate::poison::{create_topic, incompressible};
use crate::setup::slot::{HOLDING_UP, hold_up, let_through};
use crate::support::{
    Fixture, PATIENCE, Relay, SMALL_WINDOW, WINDOW, connect, statement, wait_until,
};

/// The fixtures' view by which the oracle writes is in the schema `postbox`.
const OMNI_BOX: [&str; 4] = ["--schema", "box", "--table-preset", "omni-box"];
const MARK: [&str; 5] = ["--schema", "box", "--table-preset", "omni-box", "--mark"];
const SPAKKY: [&str; 5] = ["--schema", "box", "--table-preset", "spakky", "--mark"];

impl Fixture {
    fn set_up_table(&self, flags: &[&str]) -> String {
        self.setup(flags).results().to_owned()
    }

    /// Waits until all is confirmed, stops the relay, and asks the oracle.
    async fn judge_slot(&self, relay: Relay) -> Verdict {
        self.wait_for_confirmation().await;
        relay.drain().await;
        self.verdict().await
    }

    async fn rows_of(&self, table: &str) -> i64 {
        let sql = format!("SELECT count(*) FROM {table}");
        self.client.query_one(&sql, &[]).await.unwrap().get(0)
    }

    fn copy(&self) -> String {
        format!("box.backfill_{}", self.contract.slot)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_arrive_in_commit_order_and_are_not_touched() {
    let fixture = Fixture::omni_box().await;
    let set_up = fixture.set_up_table(&OMNI_BOX);
    assert!(set_up.contains("replication slot"), "{set_up}");
    assert!(fixture.set_up_table(&OMNI_BOX).contains("already there"));
    let relay = Relay::streaming(&fixture, &OMNI_BOX).await;
    let writers = fixture.writers(Load {
        rollback_percent: 20,
        savepoint_percent: 20,
        ..fixture.load()
    });
    tokio::time::sleep(Duration::from_secs(2)).await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge_slot(relay).await;
    assert!(verdict.committed > 200 && verdict.is_clean(0), "{verdict}");
    let touched = "status <> 'pending' OR locked_at IS NOT NULL OR attempts_made > 0";
    assert_eq!(fixture.rows_that_are(touched).await, 0);
}

/// As its own worker would have left them: `updated_at`, `completed_at` and no lock.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_are_marked_published() {
    let fixture = Fixture::omni_box().await;
    fixture.set_up_table(&OMNI_BOX);
    let relay = Relay::streaming(&fixture, &MARK).await;
    let writers = fixture.writers(fixture.steady_load());
    tokio::time::sleep(Duration::from_secs(2)).await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge_slot(relay).await;
    assert!(verdict.committed > 200 && verdict.is_clean(0), "{verdict}");
    let marked = "status = 'completed' AND completed_at >= created_at AND updated_at >= completed_at \
                  AND locked_by IS NULL";
    assert_eq!(
        fixture.rows_that_are(marked).await,
        verdict.committed as i64
    );
}

/// Whatever a crash comes between: a row that is confirmed is marked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_leaves_no_row_behind_unmarked() {
    for (step, passage) in [
        ("delivered", 300),
        ("marking", 3),
        ("marked", 3),
        ("confirmed", 3),
    ] {
        let fixture = Fixture::omni_box().await;
        fixture.set_up_table(&OMNI_BOX);
        let writers = fixture.writers(fixture.steady_load());
        let flags = [&MARK[..], &SMALL_WINDOW].concat();
        let mut command = Relay::command(&fixture, &flags);
        let failpoint = format!("{step}={}*off->panic", passage - 1);
        let mut relay = Relay::spawn(command.env("FAILPOINTS", failpoint));
        assert_eq!(relay.exit_code().await, -1, "{step}: {}", relay.log());
        writers.stop().await.unwrap();
        let relay = Relay::streaming(&fixture, &flags).await;
        let verdict = fixture.judge_slot(relay).await;
        println!("{step}: repeated at most {WINDOW}: {verdict}");
        assert!(verdict.is_clean(WINDOW), "{step}: {verdict}");
        assert_eq!(
            fixture.rows_that_are("status <> 'completed'").await,
            0,
            "{step}"
        );
    }
}

/// What is behind them is not confirmed: the next attempt marks them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_could_not_be_marked_are_marked_after_all() {
    let fixture = Fixture::omni_box().await;
    fixture.set_up_table(&OMNI_BOX);
    let fails_once = "CREATE SEQUENCE marks; \
                      CREATE FUNCTION fails_once() RETURNS trigger LANGUAGE plpgsql AS $$ \
                      BEGIN IF nextval('marks') = 5 THEN RAISE 'not now'; END IF; RETURN NULL; END $$; \
                      CREATE TRIGGER fails_once BEFORE UPDATE ON outbox_events \
                      FOR EACH STATEMENT EXECUTE FUNCTION fails_once()";
    fixture.client.batch_execute(fails_once).await.unwrap();
    // So slow that there is always something on its way.
    let mut command = Relay::command(&fixture, &[&MARK[..], &SMALL_WINDOW].concat());
    let mut relay = Relay::spawn(command.env("FAILPOINTS", "delivering=sleep(2)"));
    relay.wait_for_log("streaming").await;
    let writers = fixture.writers(fixture.steady_load());
    relay.wait_for_log("not now").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge_slot(relay).await;
    assert!(verdict.is_clean(WINDOW), "{verdict}");
    assert_eq!(fixture.rows_that_are("status <> 'completed'").await, 0);
}

/// A row that waits is not published: it is marked once it is sent, and confirmed before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_parked_is_marked_when_it_is_sent() {
    let fixture = Fixture::omni_box().await;
    fixture.set_up_table(&OMNI_BOX);
    create_topic(&fixture, "2000").await;
    let flags = [&MARK[..], &SOON, &["--max-attempts", "1000"]].concat();
    let relay = Relay::streaming(&fixture, &flags).await;
    for (key, payload) in [
        ("a", "1"),
        ("a", &incompressible(5000)),
        ("a", "3"),
        ("b", "1"),
    ] {
        fixture.insert(key, payload).await;
    }
    fixture.wait_for_confirmation().await;
    let marked = "status = 'completed'";
    assert_eq!(fixture.rows_of("box.parked").await, 2);
    assert_eq!(fixture.rows_that_are(marked).await, 2);
    assert_eq!(fixture.keys().await, ["a", "b"]);
    limit(&fixture, LARGE).await;
    wait_until("nothing waits", async || {
        fixture.rows_of("box.parked").await == 0
    })
    .await;
    assert_eq!(fixture.rows_that_are(marked).await, 4);
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["a", "a", "a", "b"]);
}

/// Rows that a policy hides are not gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_may_not_see_the_rows_confirms_nothing() {
    let mut fixture = Fixture::omni_box().await;
    let (role, url) = fixture.role("relay").await;
    fixture.set_up_table(&[&OMNI_BOX[..], &["--grant-to", &role]].concat());
    let hide = "ALTER TABLE outbox_events ENABLE ROW LEVEL SECURITY";
    fixture.client.batch_execute(hide).await.unwrap();
    fixture.insert("a", "{\"n\": 1}").await;
    let end = fixture.wal_end().await;
    fixture.database_url = url;
    let mut relay = Relay::start(&fixture, &MARK);
    assert_eq!(relay.exit_code().await, 6, "{}", relay.log());
    let log = relay.log();
    assert!(log.contains("row-level security"), "{log}");
    assert!(
        log.contains("BYPASSRLS") && !log.contains("--grant-to"),
        "{log}"
    );
    assert!(fixture.confirmed().await < end);
}

/// A row of the table is locked: what it holds up is not confirmed, and sent once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_cannot_be_marked_yet_is_not_confirmed() {
    let fixture = Fixture::omni_box().await;
    fixture.set_up_table(&OMNI_BOX);
    fixture.insert("a", "{\"n\": 1}").await;
    let end = fixture.wal_end().await;
    let lock = "BEGIN; SELECT FROM outbox_events FOR UPDATE";
    let other = connect(&fixture.database_url).await;
    other.batch_execute(lock).await.unwrap();
    let relay = Relay::streaming(&fixture, &MARK).await;
    wait_until("it is delivered", async || fixture.keys().await == ["a"]).await;
    wait_until_it_marks(&relay).await;
    assert!(fixture.confirmed().await < end);
    other.batch_execute("ROLLBACK").await.unwrap();
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["a"]);
    assert_eq!(fixture.rows_that_are("status = 'completed'").await, 1);
}

/// The slot gives what waits for its standby, and no session can mark it yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_cannot_be_seen_yet_is_marked_when_it_can() {
    let fixture = Fixture::with_postgres(&[HOLDING_UP]).await;
    fixture.make_omni_box().await;
    fixture.set_up_table(&OMNI_BOX);
    let end = fixture.wal_end().await;
    let insert = format!(
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
         VALUES ('{}', 'a', 'changed', '{{}}')",
        fixture.topic
    );
    let held_up = hold_up(&fixture, &insert).await;
    let relay = Relay::streaming(&fixture, &MARK).await;
    wait_until("it is delivered", async || fixture.keys().await == ["a"]).await;
    wait_until_it_marks(&relay).await;
    assert!(fixture.confirmed().await <= end);
    // The standby is there, as far as the server can tell: the marks wait for it, too.
    let_through(&fixture, held_up).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["a"]);
    assert_eq!(fixture.rows_that_are("status = 'completed'").await, 1);
}

async fn wait_until_it_marks(relay: &Relay) {
    wait_until("readiness tells", async || {
        let (_, state) = relay.get("/readyz");
        state.contains("rows are being marked published")
    })
    .await;
}

/// As omni-box's partitioned table: its primary key is created_at and id.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partitioned_table_is_read_and_marked_too() {
    let fixture = Fixture::omni_box().await;
    let partition = "ALTER TABLE outbox_events RENAME TO plain; \
                     CREATE TABLE outbox_events (LIKE plain, PRIMARY KEY (created_at, id)) PARTITION BY RANGE (created_at); \
                     CREATE TABLE old PARTITION OF outbox_events FOR VALUES FROM (MINVALUE) TO ('2026-01-01'); \
                     CREATE TABLE new PARTITION OF outbox_events FOR VALUES FROM ('2026-01-01') TO (MAXVALUE)";
    fixture.client.batch_execute(partition).await.unwrap();
    fixture.omni_box_backlog(2_000, 30).await;
    let set_up = fixture.set_up_table(&[&OMNI_BOX[..], &["--backfill", "pending"]].concat());
    assert!(
        set_up.contains("before it: 2000; they are sent first"),
        "{set_up}"
    );
    fixture.omni_box_backlog(1_000, 30).await;
    let relay = Relay::streaming(&fixture, &MARK).await;
    let verdict = fixture.judge_slot(relay).await;
    assert!(
        verdict.committed == 3_000 && verdict.lost.is_empty() && verdict.duplicates == 0,
        "{verdict}"
    );
    assert_eq!(fixture.rows_that_are("status = 'completed'").await, 3_000);
}

/// Those that are published or given up stay as they are; what becomes of a row later is
/// of no matter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_before_the_slot_are_sent_first_if_they_are_pending() {
    let fixture = Fixture::omni_box().await;
    fixture.omni_box_backlog(5_000, 10).await;
    let done = "UPDATE outbox_events SET status = 'completed', completed_at = now() WHERE (payload ->> 'n')::int <= 500; \
                UPDATE outbox_events SET status = 'failed' WHERE (payload ->> 'n')::int BETWEEN 501 AND 600; \
                DELETE FROM postbox_oracle.ledger WHERE version <= 600";
    fixture.client.batch_execute(done).await.unwrap();
    let refused = fixture.setup(&OMNI_BOX);
    let complaint = refused.complaint(4);
    assert!(
        complaint.contains("\"public\".\"outbox_events\" has rows committed before the slot")
            && complaint.contains(": 4400;"),
        "{complaint}"
    );
    let pending = [&OMNI_BOX[..], &["--backfill", "pending"]].concat();
    fixture.set_up_table(&pending);
    assert_eq!(fixture.rows_of(&fixture.copy()).await, 4_400);
    let deleted = "DELETE FROM outbox_events WHERE (payload ->> 'n')::int > 4000";
    fixture.client.batch_execute(deleted).await.unwrap();
    // Amid the copy, twice.
    for _ in 0..2 {
        let mut command = Relay::command(&fixture, &[&MARK[..], &SMALL_WINDOW].concat());
        let mut relay = Relay::spawn(command.env("FAILPOINTS", "delivered=1500*off->panic"));
        assert_eq!(relay.exit_code().await, -1, "{}", relay.log());
    }
    let relay = Relay::streaming(&fixture, &MARK).await;
    fixture.insert("k0", "{\"n\": 9000}").await;
    let entered = "INSERT INTO postbox_oracle.ledger SELECT id, partition_key, 9000 FROM outbox_events \
                   WHERE payload ->> 'n' = '9000'";
    fixture.client.batch_execute(entered).await.unwrap();
    let verdict = fixture.judge_slot(relay).await;
    println!("{verdict}");
    assert!(
        verdict.committed == 4_401 && verdict.is_clean(2 * (WINDOW + 1024)),
        "{verdict}"
    );
    assert_eq!(fixture.rows_that_are("status = 'pending'").await, 0);
    assert_eq!(fixture.rows_of(&fixture.copy()).await, 0);
    fixture.set_up_table(&OMNI_BOX);
    let gone = format!("to_regclass('{}') IS NULL", fixture.copy());
    let row = fixture
        .client
        .query_one(&format!("SELECT {gone}"), &[])
        .await
        .unwrap();
    assert!(row.get::<_, bool>(0));
}

/// Stop those who claim, set the slot up, start the relay: under load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_takes_over_from_claims_without_loss_or_repetition() {
    let fixture = Fixture::omni_box().await;
    let relay = claiming(&fixture, &[]).await;
    let writers = fixture.writers(fixture.steady_load());
    tokio::time::sleep(Duration::from_secs(2)).await;
    relay.drain().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let set_up = fixture.set_up_table(&[&OMNI_BOX[..], &["--backfill", "pending"]].concat());
    assert!(set_up.contains("they are sent first"), "{set_up}");
    let relay = Relay::streaming(&fixture, &MARK).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge_slot(relay).await;
    assert!(verdict.committed > 200 && verdict.is_clean(0), "{verdict}");
    assert_eq!(fixture.rows_that_are("status <> 'completed'").await, 0);
}

/// And back: what is marked is not claimed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_take_over_from_a_slot_that_marks() {
    let fixture = Fixture::omni_box().await;
    fixture.set_up_table(&OMNI_BOX);
    let relay = Relay::streaming(&fixture, &MARK).await;
    let writers = fixture.writers(fixture.steady_load());
    tokio::time::sleep(Duration::from_secs(2)).await;
    relay.drain().await;
    let relay = claiming(&fixture, &[]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    writers.stop().await.unwrap();
    wait_until("all is completed", async || {
        fixture.rows_that_are("status <> 'completed'").await == 0
    })
    .await;
    relay.drain().await;
    let verdict = fixture.verdict().await;
    assert!(verdict.committed > 200 && verdict.is_clean(0), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_spakky_are_read_and_marked() {
    let fixture = Fixture::spakky().await;
    for key in ["before", "before too"] {
        fixture.insert(key, "{\"n\": 1}").await;
    }
    fixture.client.batch_execute("INSERT INTO postbox_oracle.ledger SELECT id, headers ->> 'key', 1 FROM spakky_event_outbox").await.unwrap();
    fixture.set_up_table(&[&SPAKKY[..4], &["--backfill", "pending"]].concat());
    let relay = Relay::streaming(&fixture, &SPAKKY).await;
    let writers = fixture.writers(fixture.steady_load());
    tokio::time::sleep(Duration::from_secs(1)).await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge_slot(relay).await;
    assert!(
        verdict.committed > 100 && is_clean_without_keys(&verdict, 0),
        "{verdict}"
    );
    assert_eq!(fixture.messages_that_are("published_at IS NULL").await, 0);
}

/// A slot that is lost: the table does not say which rows it has not given, but for those
/// that are marked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_lost_slot_missed_is_sent_again_or_skipped_as_is_chosen() {
    let fixture = Fixture::omni_box().await;
    fixture.set_up_table(&OMNI_BOX);
    let relay = Relay::streaming(&fixture, &MARK).await;
    fixture.insert("before", "{\"n\": 1}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    fixture.drop_slot().await;
    fixture.insert("missed", "{\"n\": 1}").await;
    let complaint = fixture.recover(&OMNI_BOX);
    let complaint = complaint.complaint(4);
    assert!(
        complaint.contains("--resend") && complaint.contains("--skip-missed"),
        "{complaint}"
    );
    let recovery = fixture.recover(&[&OMNI_BOX[..], &["--resend"]].concat());
    assert!(
        recovery
            .results()
            .contains("not marked published: 1; the relay sends them"),
        "{}",
        recovery.results()
    );
    let relay = Relay::streaming(&fixture, &MARK).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["before", "missed"]);
    fixture.drop_slot().await;
    fixture.insert("skipped", "{\"n\": 1}").await;
    let recovery = fixture.recover(&[&OMNI_BOX[..], &["--skip-missed"]].concat());
    assert!(
        recovery.results().contains("they stay unpublished"),
        "{}",
        recovery.results()
    );
    fixture.insert("after", "{\"n\": 1}").await;
    let relay = Relay::streaming(&fixture, &MARK).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["after", "before", "missed"]);
}

/// With roles that have what set-up gives them and no more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_of_least_rights_reads_the_copy_and_marks() {
    let mut fixture = Fixture::omni_box().await;
    let (role, server) = fixture.role("relay").await;
    fixture.omni_box_backlog(100, 10).await;
    let flags = [&OMNI_BOX[..], &["--grant-to", &role]].concat();
    // Roles first, then what they are to read.
    fixture.set_up_table(&[&flags[..], &["--backfill", "none"]].concat());
    fixture.drop_slot().await;
    let recovery = fixture.recover(&[&OMNI_BOX[..], &["--resend"]].concat());
    assert!(
        recovery.results().contains(": 100; the relay"),
        "{}",
        recovery.results()
    );
    fixture.database_url = server;
    let relay = Relay::streaming(&fixture, &MARK).await;
    fixture.wait_for_confirmation().await;
    wait_until("the copy is emptied", async || {
        fixture.rows_of(&fixture.copy()).await == 0
    })
    .await;
    let log = relay.log();
    relay.drain().await;
    assert!(!log.contains("WARN"), "{log}");
    assert_eq!(fixture.rows_that_are("status <> 'completed'").await, 0);
    assert_eq!(fixture.keys().await.len(), 100);
}

/// All in one call, on a database that has nothing of ours yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_of_least_rights_may_read_the_copy_of_the_first_set_up() {
    let mut fixture = Fixture::omni_box().await;
    let (role, server) = fixture.role("relay").await;
    fixture.omni_box_backlog(100, 10).await;
    let flags = ["--backfill", "pending", "--grant-to", &role];
    fixture.set_up_table(&[&OMNI_BOX[..], &flags].concat());
    fixture.database_url = server;
    let relay = Relay::streaming(&fixture, &MARK).await;
    fixture.wait_for_confirmation().await;
    wait_until("the copy is emptied", async || {
        fixture.rows_of(&fixture.copy()).await == 0
    })
    .await;
    relay.drain().await;
    assert_eq!(fixture.keys().await.len(), 100);
}

/// The database ends what takes three seconds; here it takes five until what lies before the
/// slot is read, and five more to copy it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_set_up_that_takes_long_is_not_cut_short_by_the_databases_limits() {
    let fixture = Fixture::with_postgres(&[]).await;
    fixture.make_omni_box().await;
    fixture.omni_box_backlog(10, 10).await;
    let limits = "CREATE FUNCTION slow() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(5); END'; \
                  CREATE EVENT TRIGGER slow ON ddl_command_end WHEN TAG IN ('CREATE TABLE AS') EXECUTE FUNCTION slow(); \
                  DO $$ BEGIN \
                      EXECUTE format('ALTER DATABASE %I SET statement_timeout = 3000', current_database()); \
                      IF current_setting('server_version_num')::integer >= 170000 THEN \
                          EXECUTE format('ALTER DATABASE %I SET transaction_timeout = 3000', current_database()); \
                      END IF; \
                  END $$";
    fixture.client.batch_execute(limits).await.unwrap();
    let pending = [&OMNI_BOX[..], &["--backfill", "pending"]].concat();
    let set_up = fixture.setup_with("slot_created=sleep(5000)", &pending);
    let set_up = set_up.results();
    assert!(
        set_up.contains("before it: 10; they are sent first"),
        "{set_up}"
    );
    // And one that somebody else made.
    fixture.drop_slot().await;
    let slot = &fixture.contract.slot;
    let forget = format!(
        "DELETE FROM box.checkpoint; SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"
    );
    for statement in forget.split("; ") {
        fixture.client.batch_execute(statement).await.unwrap();
    }
    let set_up = fixture.set_up_table(&pending);
    assert!(
        set_up.contains("outbox: 10; all are sent first"),
        "{set_up}"
    );
}

/// The slots of two tables, in one database.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_of_one_table_is_not_used_for_another() {
    let fixture = Fixture::omni_box().await;
    fixture.set_up_table(&OMNI_BOX);
    let ours = ["--schema", "box"];
    for refused in [fixture.setup(&ours), fixture.recover(&ours)] {
        let complaint = refused.complaint(5);
        assert!(
            complaint.contains("was not set up for \"box\".\"outbox\""),
            "{complaint}"
        );
    }
    let mut relay = Relay::start(&fixture, &ours);
    assert_eq!(relay.exit_code().await, 5, "{}", relay.log());
    let polled = ["--schema", "box", "--slot", "polled", "--mode", "poll"];
    fixture.set_up_table(&polled);
    let refused = fixture.setup(&[&OMNI_BOX[..], &["--slot", "polled"]].concat());
    let complaint = refused.complaint(4);
    assert!(
        complaint.contains("was set up to poll \"box\".\"outbox\""),
        "{complaint}"
    );
}

/// What would make the publication right for one table would break the relay of the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_of_another_table_is_not_to_be_changed() {
    let fixture = Fixture::omni_box().await;
    fixture.set_up_table(&OMNI_BOX);
    let ours = ["--schema", "box"];
    let check = |complaint: &str| {
        assert!(
            complaint.contains("was set up for another table than \"box\".\"outbox\"")
                && !complaint.contains("SET TABLE"),
            "{complaint}"
        );
    };
    let another = fixture.setup(&[&ours[..], &["--slot", "another"]].concat());
    check(another.complaint(5));
    let altered = "ALTER PUBLICATION postbox SET (publish = 'insert, update')";
    fixture.client.batch_execute(altered).await.unwrap();
    for refused in [fixture.setup(&ours), fixture.recover(&ours)] {
        check(refused.complaint(5));
    }
    fixture.drop_slot().await;
    check(fixture.recover(&ours).complaint(5));
    // With its own table it says what mends it.
    let resend = [&OMNI_BOX[..], &["--resend"]].concat();
    let refused = fixture.recover(&resend);
    let mend = statement(refused.complaint(5), "ALTER PUBLICATION");
    fixture.client.batch_execute(mend).await.unwrap();
    fixture.recover(&resend).results();
}

/// By `--max-attempts`, as the relay has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_that_spakky_gave_up_are_not_sent() {
    for (flags, expected) in [(&[][..], 5), (&["--max-attempts", "2"], 2)] {
        let fixture = Fixture::spakky().await;
        fixture.insert_many("a", "{}", 8).await;
        let tried = "UPDATE spakky_event_outbox AS e SET retry_count = t.n - 1 \
                     FROM (SELECT id, row_number() OVER () AS n FROM spakky_event_outbox) AS t WHERE t.id = e.id";
        fixture.client.batch_execute(tried).await.unwrap();
        let pending = [&SPAKKY[..4], &["--backfill", "pending"], flags].concat();
        fixture.set_up_table(&pending);
        assert_eq!(fixture.rows_of(&fixture.copy()).await, expected);
        let tries = format!("SELECT max(retry_count) FROM {}", fixture.copy());
        let most: i32 = fixture.client.query_one(&tries, &[]).await.unwrap().get(0);
        assert_eq!(i64::from(most), expected - 1);
        fixture.drop_slot().await;
        let resend = [&SPAKKY[..4], &["--resend"], flags].concat();
        fixture.recover(&resend).results();
        assert_eq!(fixture.rows_of(&fixture.copy()).await, expected);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_set_up_is_refused_and_nothing_is_touched() {
    let fixture = Fixture::omni_box().await;
    let role = fixture.role("writer").await.0;
    for (flags, code, expected) in [
        (&["--mode", "poll"][..], 2, "needs no set-up to be polled"),
        (&["--mode", "auto"], 2, "needs no set-up to be polled"),
        (&["--adopt"], 2, "fights --adopt"),
        (&["--notify", "true"], 2, "fights --notify"),
        (&["--print"], 2, "fights --print"),
        (&["--grant-writer-to", &role], 2, "fights --grant-writer-to"),
        (&["--table", "nowhere"], 3, "does not exist"),
        (&["--column", "payload=body"], 3, "has no column \"body\""),
        (&["--slot", &"s".repeat(60)], 2, "longer than 54 bytes"),
    ] {
        let refused = fixture.setup(&[&OMNI_BOX[..], flags].concat());
        let complaint = refused.complaint(code);
        assert!(complaint.contains(expected), "{complaint}");
    }
    let without_key = "ALTER TABLE outbox_events DROP CONSTRAINT outbox_events_pkey";
    fixture.client.batch_execute(without_key).await.unwrap();
    let refused = fixture.setup(&OMNI_BOX);
    let complaint = refused.complaint(3);
    assert!(complaint.contains("has no primary key"), "{complaint}");
    let row = fixture
        .client
        .query_one("SELECT to_regnamespace('box') IS NULL", &[])
        .await
        .unwrap();
    assert!(row.get::<_, bool>(0));
    let mut relay = Relay::start(&fixture, &OMNI_BOX);
    assert_eq!(relay.exit_code().await, 4, "{}", relay.log());
    assert!(
        relay
            .log()
            .contains("or read the table by claims, with --mode poll"),
        "{}",
        relay.log()
    );
}

/// Its slot would be dropped, and with it what it has not given.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slot_of_a_table_is_not_changed_to_poll_another() {
    let fixture = Fixture::omni_box().await;
    fixture.set_up_table(&OMNI_BOX);
    fixture.insert("a", "{\"n\": 1}").await;
    let poll = ["--schema", "box", "--mode", "poll"];
    let refused = fixture.setup(&poll);
    let refused = refused.complaint(5);
    let why = "was not set up for \"box\".\"outbox\"";
    assert!(refused.contains(why), "{refused}");
    let mut early = Relay::start(&fixture, &poll);
    assert_eq!(early.exit_code().await, 5, "{}", early.log());
    assert!(early.log().contains(why), "{}", early.log());
    assert!(fixture.set_up_table(&OMNI_BOX).contains("already there"));
    let relay = Relay::streaming(&fixture, &OMNI_BOX).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["a"]);
}

/// It is looked at before anything is made.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_refused_leaves_nothing_behind() {
    let fixture = Fixture::empty().await;
    let table = "CREATE TABLE rows ( \
                     id uuid PRIMARY KEY DEFAULT gen_random_uuid(), aggregatetype text NOT NULL DEFAULT 'x', \
                     aggregateid text NOT NULL DEFAULT 'a', type text NOT NULL DEFAULT 't', payload jsonb); \
                 INSERT INTO rows DEFAULT VALUES; CREATE VIEW looks AS SELECT * FROM rows";
    fixture.client.batch_execute(table).await.unwrap();
    for (table, code, why) in [
        ("public.rows", 4, "would never be published: 1;"),
        ("public.looks", 3, "is a view and must be a table"),
    ] {
        let flags = ["--table-preset", "debezium", "--table", table];
        let refused = fixture.setup(&flags);
        let refused = refused.complaint(code);
        assert!(refused.contains(why), "{refused}");
        let left = "(SELECT nspname::text FROM pg_namespace WHERE nspname = 'postbox' \
                     UNION ALL SELECT pubname FROM pg_publication) AS left_behind";
        assert_eq!(fixture.rows_of(left).await, 0, "{table}");
    }
}

/// Rows wait for as long as somebody keeps them from being marked, whatever else is in the WAL.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readiness_says_that_rows_cannot_be_marked() {
    let fixture = Fixture::omni_box().await;
    fixture.set_up_table(&OMNI_BOX);
    let hold_up = "CREATE TABLE others (n integer); \
                   CREATE FUNCTION hold_up() RETURNS trigger LANGUAGE plpgsql AS $$ \
                   BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW; END $$; \
                   CREATE TRIGGER hold_up BEFORE UPDATE ON outbox_events FOR EACH ROW EXECUTE FUNCTION hold_up()";
    fixture.client.batch_execute(hold_up).await.unwrap();
    let holder = connect(&fixture.database_url).await;
    let lock = "SELECT pg_advisory_lock(1)";
    holder.batch_execute(lock).await.unwrap();
    let flags = [&MARK[..], &["--shutdown-timeout", "1s"]].concat();
    let mut relay = Relay::streaming(&fixture, &flags).await;
    fixture.insert("a", "{}").await;
    let deadline = Instant::now() + PATIENCE;
    let complaint = loop {
        fixture
            .client
            .batch_execute("INSERT INTO others VALUES (1)")
            .await
            .unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        let (status, text) = relay.get("/readyz");
        if status != 200 {
            break text;
        }
        assert!(Instant::now() < deadline, "ready all the time");
    };
    assert!(
        complaint.contains("rows are being marked published"),
        "{complaint}"
    );
    relay.signal("TERM");
    assert_eq!(relay.exit_code().await, 9, "{}", relay.log());
    assert!(
        relay.log().contains("could not be marked published"),
        "{}",
        relay.log()
    );
    drop(holder);
}

/// A row may be copied, restored, or moved to another partition, once it is published.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_come_as_published_or_given_up_are_passed_over() {
    let fixture = Fixture::omni_box().await;
    fixture.set_up_table(&OMNI_BOX);
    let relay = Relay::streaming(&fixture, &OMNI_BOX).await;
    fixture.insert("a", "{}").await;
    let copy = "INSERT INTO outbox_events SELECT (jsonb_populate_record(o, jsonb_build_object( \
                    'id', gen_random_uuid(), 'status', s.status, 'completed_at', s.at, 'partition_key', 'b'))).* \
                FROM outbox_events AS o, (VALUES ('completed', now()), ('failed', NULL)) AS s (status, at)";
    assert_eq!(fixture.client.execute(copy, &[]).await.unwrap(), 2);
    fixture.insert("c", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["a", "c"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_spakky_that_come_as_published_are_passed_over() {
    let fixture = Fixture::spakky().await;
    fixture.set_up_table(&SPAKKY[..4]);
    let relay = Relay::streaming(&fixture, &SPAKKY[..4]).await;
    fixture.insert("a", "{}").await;
    let copy = "INSERT INTO spakky_event_outbox SELECT (jsonb_populate_record(o, jsonb_build_object( \
                    'id', gen_random_uuid(), 'published_at', now()))).* FROM spakky_event_outbox AS o";
    assert_eq!(fixture.client.execute(copy, &[]).await.unwrap(), 1);
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await.len(), 1);
}

/// A record has the time at which it is sent, as their own publishers leave it: Kafka refuses
/// one of a time to come, and forgets an old one soon.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn records_have_the_time_at_which_they_are_sent() {
    for is_slot in [false, true] {
        let fixture = Fixture::omni_box().await;
        let relay = match is_slot {
            false => claiming(&fixture, &[]).await,
            true => {
                fixture.set_up_table(&OMNI_BOX);
                Relay::streaming(&fixture, &OMNI_BOX).await
            }
        };
        let shift = "CREATE FUNCTION shift() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                     NEW.created_at = now() + CASE NEW.partition_key WHEN 'a' THEN interval '2 hours' ELSE interval '-30 days' END; \
                     RETURN NEW; END $$; \
                     CREATE TRIGGER shift BEFORE INSERT ON outbox_events FOR EACH ROW EXECUTE FUNCTION shift()";
        fixture.client.batch_execute(shift).await.unwrap();
        for key in ["a", "b"] {
            fixture.insert(key, "{}").await;
        }
        wait_until("both are delivered", async || {
            fixture.keys().await == ["a", "b"]
        })
        .await;
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_millis() as i64;
        for seen in fixture.records().await {
            let age = now - seen.timestamp_millis;
            assert!(
                (-1_000..60_000).contains(&age),
                "{} is {age} ms old",
                seen.key
            );
        }
        relay.drain().await;
    }
}
