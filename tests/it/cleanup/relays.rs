//! What the relays of an outbox have stored decides what goes.

use super::{FENCES, WEEK, removed};
use crate::support::{Fixture, Relay, connect};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_behind_keeps_rows_until_it_is_there_or_forgotten() {
    let fixture = Fixture::new().await;
    let slot = fixture.contract.slot.as_str();
    let second = ["--slot", "second", "--mode", "poll"];
    fixture.setup(&second).results();
    fixture.publish_old(&["a"]).await;
    assert_eq!(removed(&fixture.cleanup(&WEEK), "outbox"), 0);

    // It is at work, and comes there.
    let mut relay = Relay::start(&fixture, &second);
    relay.wait_for_log("polling").await;
    fixture.wait_for_fence("second").await;
    let refused = fixture.cleanup(&["--forget", "second"]);
    let complaint = refused.complaint(4);
    assert!(
        complaint.contains("relay \"second\" is at work"),
        "{complaint}"
    );
    relay.drain().await;
    assert_eq!(removed(&fixture.cleanup(&WEEK), "outbox"), 1);

    // It is gone.
    fixture.publish_old(&["b"]).await;
    fixture
        .sql("UPDATE postbox.checkpoint SET updated_at = now() - interval '8 days' WHERE name = 'second'")
        .await;
    let refused = fixture.cleanup(&WEEK);
    let complaint = refused.complaint(4);
    assert!(
        complaint.contains("relay \"second\" was not seen for 8d, longer")
            && complaint.contains("`postbox cleanup --forget second`"),
        "{complaint}"
    );
    // An event that it was to send has no other relay.
    let park = "INSERT INTO postbox.parked (id, relay, status, due_at, committed_at, message, column_names, column_types) \
                VALUES ('x', 'second', 'dead', now(), now(), '', '{}', '{}')";
    fixture.sql(park).await;
    let refused = fixture.cleanup(&["--forget", "second"]);
    let complaint = refused.complaint(8);
    assert!(complaint.contains("has parked 1 events"), "{complaint}");
    fixture
        .sql("UPDATE postbox.parked SET status = 'skipped', decided_by = 'me'")
        .await;
    let crashed = fixture.cleanup_until("forgetting", &["--forget", "second"]);
    assert!(crashed.complaint(-1).contains("failpoint forgetting panic"));
    assert_eq!(fixture.count("postbox.checkpoint").await, 2);
    let forgotten = fixture.cleanup(&[&["--forget", "second"], &WEEK[..]].concat());
    assert!(
        forgotten
            .results()
            .starts_with("relay \"second\": forgotten\n\"postbox\".\"parked\": rows removed: 1\n"),
        "{forgotten:?}"
    );
    assert_eq!(removed(&forgotten, "outbox"), 1);

    // A relay that idles stores nothing, and is there.
    let relay = Relay::streaming(&fixture, &FENCES).await;
    fixture
        .sql("UPDATE postbox.checkpoint SET updated_at = now() - interval '8 days'")
        .await;
    fixture.cleanup(&WEEK).results();
    let refused = fixture.cleanup(&["--forget", slot]);
    let complaint = refused.complaint(4);
    assert!(complaint.contains("is at work: process "), "{complaint}");
    relay.drain().await;

    // Without any relay nothing is known to be published.
    fixture.insert("c", "{}").await;
    fixture.age().await;
    let forgotten = fixture.cleanup(&["--forget", slot]);
    let drop = format!("SELECT pg_drop_replication_slot('{slot}')");
    assert!(forgotten.results().contains(&drop), "{forgotten:?}");
    let refused = fixture.cleanup(&WEEK);
    let complaint = refused.complaint(4);
    assert!(complaint.contains("no relay of"), "{complaint}");
    assert_eq!(fixture.outbox().await, ["c"]);
    let unknown = fixture.cleanup(&["--forget", slot]);
    let complaint = unknown.complaint(4);
    assert!(complaint.contains("is not known"), "{complaint}");
}

/// Each of these leaves it open what is published.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_trusted_removes_nothing() {
    let fixture = Fixture::new().await;
    fixture.publish_old(&["a"]).await;
    let refused = |code: i32, expected: &str| {
        let output = fixture.cleanup(&WEEK);
        let complaint = output.complaint(code);
        assert!(complaint.contains(expected), "{complaint}");
    };
    let checkpoint = async |set: &str| {
        fixture
            .sql(&format!("UPDATE postbox.checkpoint SET {set}"))
            .await;
    };
    fixture
        .sql("CREATE TABLE kept AS SELECT * FROM postbox.checkpoint")
        .await;
    checkpoint("system_identifier = '1'").await;
    refused(3, "belongs to the cluster with system identifier 1, ");
    checkpoint("lsn = NULL, snapshot = NULL").await;
    refused(
        4,
        "has not finished, and what it is to publish is not known",
    );
    fixture
        .sql("DELETE FROM postbox.checkpoint; INSERT INTO postbox.checkpoint SELECT * FROM kept")
        .await;
    // One of 64.
    fixture
        .sql("INSERT INTO postbox.slice (name, slice, snapshot) SELECT name, 5, snapshot FROM postbox.checkpoint")
        .await;
    refused(4, "has 1 of 64 slices");
    // A slice that is behind.
    fixture
        .sql(
            "INSERT INTO postbox.slice (name, slice, snapshot) SELECT name, n, snapshot \
             FROM postbox.checkpoint, generate_series(0, 63) AS n ON CONFLICT DO NOTHING; \
             UPDATE postbox.slice SET snapshot = '3:3:' WHERE slice = 63; \
             UPDATE postbox.checkpoint SET mode = 'poll'",
        )
        .await;
    assert_eq!(removed(&fixture.cleanup(&WEEK), "outbox"), 0);
    fixture
        .sql("DELETE FROM postbox.slice; UPDATE postbox.checkpoint SET mode = 'wal'")
        .await;
    // While the publication is another, and while set-up may be changing what is stored.
    fixture
        .sql("ALTER PUBLICATION postbox SET (publish = 'insert, update')")
        .await;
    refused(5, "publication \"postbox\" is not what it was");
    fixture
        .sql("ALTER PUBLICATION postbox SET (publish = 'insert')")
        .await;
    refused(5, "run `postbox recover` for it first");
    assert_eq!(fixture.outbox().await, ["a"]);

    // What was committed before the new slot is sent first, and stays until then.
    fixture.insert("b", "{}").await;
    fixture.age().await;
    fixture.recover(&[]).results();
    assert_eq!(removed(&fixture.cleanup(&WEEK), "outbox"), 1);
    assert_eq!(fixture.outbox().await, ["b"]);
    let other = connect(&fixture.database_url).await;
    let key = i64::from_be_bytes(*b"\0postbox");
    let lock = format!("SELECT pg_advisory_lock({key})");
    other.batch_execute(&lock).await.unwrap();
    refused(4, "another cleanup, or a set-up, is at work");
    drop(other);
    let relay = Relay::streaming(&fixture, &FENCES).await;
    fixture.wait_for_fence(&fixture.contract.slot).await;
    relay.drain().await;
    assert_eq!(removed(&fixture.cleanup(&WEEK), "outbox"), 1);
    assert_eq!(fixture.keys().await, ["a", "b"]);
}

/// What was cancelled is missed by nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_is_forgotten_with_the_events_that_it_has_parked_and_that_were_cancelled() {
    let fixture = Fixture::new().await;
    fixture
        .setup(&["--slot", "second", "--mode", "poll"])
        .results();
    for _ in 0..2 {
        fixture
            .sql("SELECT postbox.emit('a', 'b', 'c', '{}', scheduled_at => now() + interval '1 h')")
            .await;
    }
    fixture
        .sql(
            "INSERT INTO postbox.parked (id, relay, status, due_at, committed_at, message, column_names, column_types) \
             SELECT id, 'second', 'scheduled', scheduled_at, now(), '', '{}', '{}' FROM postbox.outbox",
        )
        .await;
    let cancel = "SELECT postbox.cancel(id) FROM postbox.outbox";
    fixture.sql(&format!("{cancel} ORDER BY seq LIMIT 1")).await;
    let forget = ["--forget", "second"];
    let refused = fixture.cleanup(&forget);
    let complaint = refused.complaint(8);
    assert!(
        complaint.contains("has parked 1 events that were not sent"),
        "{complaint}"
    );
    fixture.sql(cancel).await;
    let forgotten = fixture.cleanup(&forget);
    assert_eq!(
        forgotten.results(),
        "relay \"second\": forgotten\n\"postbox\".\"parked\": rows removed: 2\n"
    );
    assert_eq!(fixture.count("postbox.parked").await, 0);
    // Nor does a cancellation stay, once its event is gone from the outbox.
    fixture
        .sql("UPDATE postbox.cancellation SET cancelled_at = now() - interval '8 days'")
        .await;
    assert_eq!(removed(&fixture.cleanup(&WEEK), "cancellation"), 0);
    fixture.sql("DELETE FROM postbox.outbox").await;
    assert_eq!(removed(&fixture.cleanup(&WEEK), "cancellation"), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn for_how_long_a_relay_was_not_seen_is_told_in_units_that_fit() {
    let fixture = Fixture::new().await;
    fixture
        .setup(&["--slot", "second", "--mode", "poll"])
        .results();
    // However short the retention is, a minute of silence is none.
    for (silent, told) in [("50 s", None), ("3 min", Some("3m")), ("5 h", Some("5h"))] {
        let sql = format!(
            "UPDATE postbox.checkpoint SET updated_at = now() - interval '{silent}' WHERE name = 'second'"
        );
        fixture.sql(&sql).await;
        let output = fixture.cleanup(&["--older-than", "1s"]);
        let Some(told) = told else {
            output.results();
            continue;
        };
        let complaint = output.complaint(4);
        let expected =
            format!("relay \"second\" was not seen for {told}, longer than rows are kept");
        assert!(complaint.contains(&expected), "{complaint}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_without_an_outbox_is_named() {
    let fixture = Fixture::new().await;
    for flags in [&WEEK[..], &["--forget", "second"]] {
        let schema = ["--schema", "nope"];
        let refused = fixture.cleanup(&[flags, &schema].concat());
        let complaint = refused.complaint(3);
        let expected = "error: schema \"nope\" has no outbox: name the schema that was set up with --schema, or run";
        assert!(complaint.starts_with(expected), "{complaint}");
    }
}
