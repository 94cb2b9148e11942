//! Tables that are not as their preset says.

use super::{OMNI_BOX, claiming};
use crate::support::{Fixture, Relay, postbox, run, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_not_as_its_preset_says_is_refused() {
    for (change, expected) in [
        (
            "ALTER TABLE outbox_events RENAME TO events",
            "\"public\".\"outbox_events\" does not exist: name the table with --table",
        ),
        (
            "ALTER TABLE outbox_events RENAME COLUMN payload TO body CASCADE",
            "has no column \"payload\": name the one that has its payload with --column payload=NAME",
        ),
        (
            "ALTER TABLE outbox_events ALTER COLUMN locked_at TYPE timestamp",
            "has a column \"locked_at\" of type timestamp without time zone, and its locked_at must be timestamp with time zone",
        ),
        (
            "ALTER TABLE outbox_events DROP CONSTRAINT outbox_events_pkey",
            "has no primary key: claims need one, on its id",
        ),
    ] {
        let fixture = Fixture::empty().await;
        let table = include_str!("omni_box.sql")
            .split("CREATE SCHEMA")
            .next()
            .unwrap();
        fixture.client.batch_execute(table).await.unwrap();
        let change = change.trim_end_matches(" CASCADE");
        fixture.client.batch_execute(change).await.unwrap();
        let mut relay = Relay::start(&fixture, &OMNI_BOX);
        assert_eq!(relay.exit_code().await, 3, "{}", relay.log());
        assert!(relay.log().contains(expected), "{}", relay.log());
    }
}

#[test]
fn flags_that_do_not_go_together_are_refused() {
    for (flags, expected) in [
        (
            &["--table-preset", "spakky", "--mode", "auto"][..],
            "--table-preset spakky needs --mode poll, as its rows are claimed, or --mode wal",
        ),
        (
            &["--table-preset", "debezium", "--mode", "poll"],
            "--table-preset debezium needs --mode wal",
        ),
        (&["--mark"], "--table-preset postbox fights --mark"),
        (
            &[
                "--table-preset",
                "omni-box",
                "--mode",
                "poll",
                "--shards",
                "2",
            ],
            "--table-preset omni-box fights --shards",
        ),
        (
            &["--table-preset", "omnibox"],
            "unknown preset \"omnibox\": use postbox, omni-box, spakky or debezium",
        ),
        (
            &["--table", "events"],
            "--table and --column are for tables of others",
        ),
        (
            &["--table-preset", "spakky", "--column", "payload"],
            "a column is FIELD=COLUMN, such as payload=body",
        ),
        (
            &["--table-preset", "spakky", "--column", "colour=red"],
            "--column colour=…: there is no such field; use one of seq, id,",
        ),
        (
            &["--table-preset", "omni-box", "--mode", "poll", "--mark"],
            "--mark fights --mode poll: rows that are claimed are completed anyway",
        ),
        (
            &[
                "--table-preset",
                "omni-box",
                "--column",
                "payload=a",
                "--column",
                "payload=b",
            ],
            "--column payload=…: given twice",
        ),
    ] {
        let flags = [
            &[
                "relay",
                "--brokers",
                "localhost:1",
                "--database-url",
                "postgresql://localhost:1/a",
            ],
            flags,
        ]
        .concat();
        let output = run(&mut postbox(&flags));
        let complaint = output.complaint(2);
        assert!(complaint.contains(expected), "{complaint}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_names_are_told_one_by_one() {
    let fixture = Fixture::omni_box().await;
    fixture.insert("a", "{\"n\": 1}").await;
    let rename = "CREATE SCHEMA shop; ALTER TABLE outbox_events SET SCHEMA shop; \
                  ALTER TABLE shop.outbox_events RENAME TO events; \
                  ALTER TABLE shop.events RENAME COLUMN payload TO body; \
                  ALTER TABLE shop.events RENAME COLUMN locked_by TO owner";
    fixture.client.batch_execute(rename).await.unwrap();
    let flags = [
        "--table",
        "shop.events",
        "--column",
        "payload=body",
        "--column",
        "locked_by=owner",
    ];
    let relay = claiming(&fixture, &flags).await;
    wait_until("it is delivered", async || fixture.keys().await == ["a"]).await;
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partitioned_table_is_claimed_from_too() {
    let fixture = Fixture::omni_box().await;
    fixture.partition_omni_box().await;
    fixture.omni_box_backlog(3_000, 30).await;
    let relay = claiming(&fixture, &[]).await;
    let verdict = fixture.judge_claims(relay).await;
    assert!(
        verdict.committed == 3_000 && verdict.is_clean(0),
        "{verdict}"
    );
}

/// As omni-box writes them for an event that has none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_that_are_a_json_null_are_none() {
    let fixture = Fixture::omni_box().await;
    fixture.insert("a", "{\"n\": 1}").await;
    let null = "UPDATE outbox_events SET headers = 'null'";
    fixture.client.batch_execute(null).await.unwrap();
    let relay = claiming(&fixture, &[]).await;
    wait_until("it is delivered", async || fixture.keys().await == ["a"]).await;
    relay.drain().await;
}

/// Ids that end in blanks, which a comparison with text would miss.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ids_may_be_of_a_fixed_length() {
    let fixture = Fixture::omni_box().await;
    fixture.insert("a", "{}").await;
    let change =
        "DROP VIEW postbox.outbox; ALTER TABLE outbox_events ALTER COLUMN id TYPE char(40)";
    fixture.client.batch_execute(change).await.unwrap();
    let relay = claiming(&fixture, &[]).await;
    fixture.wait_until_completed().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["a"]);
}

/// What does not fit is cut.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_column_of_the_last_error_may_be_narrow() {
    let fixture = Fixture::omni_box().await;
    let change = "ALTER TABLE outbox_events ALTER COLUMN last_error TYPE varchar(20)";
    fixture.client.batch_execute(change).await.unwrap();
    fixture.insert("a", "{}").await;
    let bad = "UPDATE outbox_events SET topic = 'not a topic'";
    fixture.client.batch_execute(bad).await.unwrap();
    let relay = claiming(&fixture, &[]).await;
    wait_until("it is put off", async || {
        let put_off = "attempts_made = 1 AND length(last_error) = 20";
        fixture.rows_that_are(put_off).await == 1
    })
    .await;
    relay.drain().await;
}

/// What a relay that claims needs is not what set-up gives.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_lacks_a_right_is_told_which() {
    for (given, expected) in [
        (
            "GRANT SELECT ON outbox_events TO ROLE",
            "GRANT SELECT, UPDATE ON \"public\".\"outbox_events\" TO",
        ),
        (
            "GRANT SELECT, UPDATE ON outbox_events TO ROLE; ALTER TABLE outbox_events ENABLE ROW LEVEL SECURITY",
            "ALTER ROLE … BYPASSRLS",
        ),
    ] {
        let mut fixture = Fixture::omni_box().await;
        let (role, url) = fixture.role("relay").await;
        let given = given.replace("ROLE;", &format!("\"{role}\";"));
        let given = match given.strip_suffix("ROLE") {
            Some(before) => format!("{before}\"{role}\""),
            None => given,
        };
        fixture.client.batch_execute(&given).await.unwrap();
        fixture.database_url = url;
        let mut relay = Relay::start(&fixture, &OMNI_BOX);
        relay.exit_code().await;
        let log = relay.log();
        assert!(
            log.contains(expected) && !log.contains("postbox setup"),
            "{log}"
        );
    }
}

/// Postgres makes none concurrently on a partitioned table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_index_that_is_missing_can_be_made_as_is_said() {
    for is_partitioned in [false, true] {
        let fixture = Fixture::omni_box().await;
        let drop = "ALTER TABLE outbox_events RENAME COLUMN partition_key TO \"Key\"; \
                    DO $$ BEGIN EXECUTE (SELECT string_agg(format('DROP INDEX %s', indexrelid::regclass), '; ') \
                        FROM pg_index WHERE indrelid = 'outbox_events'::regclass AND NOT indisprimary); END $$";
        fixture.client.batch_execute(drop).await.unwrap();
        if is_partitioned {
            fixture.partition_omni_box().await;
        }
        let named = ["--column", "partition_key=Key"];
        let mut relay = claiming(&fixture, &named).await;
        relay.wait_for_log("no index that begins with").await;
        let log = relay.log();
        let at = log.find("CREATE INDEX").expect("a statement");
        let statement = log[at..].lines().next().unwrap();
        fixture.client.batch_execute(statement).await.unwrap();
        relay.drain().await;
        let relay = claiming(&fixture, &named).await;
        assert!(!relay.log().contains("WARN"), "{}", relay.log());
        relay.drain().await;
    }
}

/// After a change from one to claims.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_nobody_reads_any_more_is_told_of() {
    let fixture = Fixture::omni_box().await;
    let slot = &fixture.contract.slot;
    let create = format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')");
    fixture.client.batch_execute(&create).await.unwrap();
    let mut relay = claiming(&fixture, &[]).await;
    let drop = format!("SELECT pg_drop_replication_slot('{slot}')");
    relay.wait_for_log(&drop).await;
    fixture.client.batch_execute(&drop).await.unwrap();
    relay.drain().await;
}
