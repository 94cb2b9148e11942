//! Partitions all of whose rows may go.

use std::time::Duration;

use postbox::ErrorKind;
use postbox::partitions::{self, Fate};

use super::{HOUR, insert_at};
use crate::support::{Fixture, Relay, connect, wait_until};

const LAST_HOUR: &str = "date_trunc('hour', now()) - interval '1 hour'";

/// The one for the hour before this, with a row in it.
async fn with_old_row() -> (Fixture, String) {
    let fixture = Fixture::partitioned(&[]).await;
    let insert = insert_at(&fixture, "old", LAST_HOUR);
    fixture.client.batch_execute(&insert).await.unwrap();
    let old = fixture.partitions().await.remove(0);
    (fixture, old)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_goes_when_it_is_old_and_all_of_its_rows_may() {
    let (fixture, old) = with_old_row().await;
    let client = connect(&fixture.database_url).await;
    let before = "3:3:";
    let after = fixture.snapshot().await;
    let there = fixture.partitions().await;
    let hours = |hours: u32| HOUR * hours;
    assert_eq!(fixture.drop_seen_by(&client, &after, hours(2)).await, []);
    let fates = fixture.drop_seen_by(&client, before, Duration::ZERO).await;
    assert_eq!(fates, [(old.clone(), Fate::Needed)]);
    assert_eq!(fixture.partitions().await, there);
    let fates = fixture.drop_seen_by(&client, &after, Duration::ZERO).await;
    assert_eq!(fates, [(old, Fate::Dropped)]);
    assert_eq!(fixture.partitions().await, there[1..]);
    // It is not made again: its rows go to the default partition.
    fixture
        .client
        .batch_execute("SELECT postbox.make_partitions()")
        .await
        .unwrap();
    assert_eq!(fixture.partitions().await, there[1..]);
    let late = insert_at(&fixture, "late", LAST_HOUR);
    fixture.client.batch_execute(&late).await.unwrap();
}

/// Who cleans up need not own anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_may_clean_up_drops_partitions_and_no_other_tables() {
    let (fixture, old) = with_old_row().await;
    let (role, url) = fixture.role("cleaner").await;
    let client = connect(&url).await;
    let snapshot = fixture.snapshot().await;
    let base = format!(
        "GRANT USAGE ON SCHEMA postbox TO \"{role}\"; GRANT SELECT ON postbox.outbox TO \"{role}\""
    );
    fixture.client.batch_execute(&base).await.unwrap();
    let refused = fixture.drop_older_than(&client, Duration::ZERO, "true");
    assert_eq!(refused.await.unwrap_err().kind(), ErrorKind::Rights);
    let rights = partitions::DROP_RIGHTS
        .replace(":\"schema\"", "postbox")
        .replace(":\"role\"", &format!("\"{role}\""));
    fixture.client.batch_execute(&rights).await.unwrap();
    for (table, says) in [
        ("outbox_default", "is no partition of the outbox"),
        ("checkpoint", "is no partition of the outbox"),
    ] {
        let drop = format!("SELECT postbox.drop_partition('postbox.{table}')");
        let refused = client.batch_execute(&drop).await.unwrap_err();
        let refused = refused.as_db_error().unwrap().message();
        assert!(refused.contains(says), "{refused}");
    }
    let fates = fixture
        .drop_seen_by(&client, &snapshot, Duration::ZERO)
        .await;
    assert_eq!(fates, [(old, Fate::Dropped)]);
    client
        .batch_execute("DELETE FROM postbox.outbox_default")
        .await
        .unwrap();
}

/// It began to write in that hour, and commits when nobody looks for its row any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_open_transaction_has_written_is_not_dropped() {
    let (fixture, old) = with_old_row().await;
    let writer = connect(&fixture.database_url).await;
    let insert = insert_at(&fixture, "late", LAST_HOUR);
    writer
        .batch_execute(&format!("BEGIN; {insert}"))
        .await
        .unwrap();
    let snapshot = fixture.snapshot().await;
    let client = connect(&fixture.database_url).await;
    let (fates, ()) = tokio::join!(
        fixture.drop_seen_by(&client, &snapshot, Duration::ZERO),
        async {
            wait_until("somebody waits for it", async || {
                let sql = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = $1::text::regclass)";
                fixture.client.query_one(sql, &[&old]).await.unwrap().get(0)
            })
            .await;
            writer.batch_execute("COMMIT").await.unwrap();
        }
    );
    assert_eq!(fates, [(old, Fate::Needed)]);
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["late", "old"]);
}

/// Whoever reads the outbox for long is not waited for, as all others would wait behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_do_not_wait_for_a_partition_that_is_read() {
    let (fixture, old) = with_old_row().await;
    let reader = connect(&fixture.database_url).await;
    reader
        .batch_execute("BEGIN; SELECT FROM postbox.outbox")
        .await
        .unwrap();
    let snapshot = fixture.snapshot().await;
    let client = connect(&fixture.database_url).await;
    let mut slowest = Duration::ZERO;
    let dropping = fixture.drop_seen_by(&client, &snapshot, Duration::ZERO);
    let writing = async {
        for _ in 0..20 {
            let since = std::time::Instant::now();
            fixture.insert("new", "{}").await;
            slowest = slowest.max(since.elapsed());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        reader.batch_execute("COMMIT").await.unwrap();
    };
    let (fates, ()) = tokio::join!(dropping, writing);
    assert_eq!(fates, [(old, Fate::Dropped)]);
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
}

/// A slot gives rows as they were: also those of a table that is no longer there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_gives_the_rows_of_a_partition_that_was_dropped() {
    let (fixture, old) = with_old_row().await;
    fixture.insert("new", "{}").await;
    for sql in [
        format!("ALTER TABLE postbox.outbox DETACH PARTITION {old}"),
        format!("DROP TABLE {old}"),
    ] {
        fixture.client.batch_execute(&sql).await.unwrap();
    }
    fixture.insert("newer", "{}").await;
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["new", "newer", "old"]);
}
