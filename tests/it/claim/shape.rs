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
