//! Of a partitioned outbox whole partitions go.

use tokio_postgres::types::ToSql;

use super::{FENCES, WEEK};
use crate::support::{Fixture, Relay, connect};

/// An event of so many days ago, in its own partition or in the default one.
async fn insert(fixture: &Fixture, key: &str, days: i32) {
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload, created_at) \
               VALUES ($1, $2, 'changed', '{}', now() - make_interval(days => $3))";
    let parameters: [&(dyn ToSql + Sync); 3] = [&fixture.topic, &key, &days];
    fixture.client.execute(sql, &parameters).await.unwrap();
}

/// Partitions for the last days, as if they had been made ahead then.
async fn set_up() -> Fixture {
    let fixture = Fixture::empty().await;
    fixture.setup(&["--partitioned", "day"]).results();
    let make = "DO $$ DECLARE day date; BEGIN \
                    FOR day IN SELECT current_date - n FROM generate_series(2, 12) AS n LOOP \
                        EXECUTE format('CREATE TABLE postbox.outbox_%s PARTITION OF postbox.outbox \
                                        FOR VALUES FROM (%L) TO (%L)', \
                                       to_char(day, 'YYYYMMDD'), day::timestamp AT TIME ZONE 'UTC', \
                                       (day + 1)::timestamp AT TIME ZONE 'UTC'); \
                    END LOOP; END $$";
    fixture.sql("SET timezone = 'UTC'").await;
    fixture.sql(make).await;
    fixture
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_partitions_go_if_all_of_their_rows_are_published_and_none_waits() {
    let fixture = set_up().await;
    let relay = Relay::streaming(&fixture, &FENCES).await;
    insert(&fixture, "gone", 10).await;
    insert(&fixture, "young", 3).await;
    insert(&fixture, "waits", 9).await;
    insert(&fixture, "default", 100).await;
    fixture.wait_for_fence(&fixture.contract.slot).await;
    relay.drain().await;
    insert(&fixture, "unpublished", 11).await;
    fixture
        .sql(
            "INSERT INTO postbox.parked (id, relay, status, due_at, committed_at, message, column_names, column_types) \
             SELECT id::text, 'postbox', 'dead', now(), now(), '', '{}', '{}' FROM postbox.outbox \
             WHERE aggregate_id = 'waits'",
        )
        .await;
    let before = fixture.outbox().await;
    let partitions = async || fixture.count("postbox.partitions()").await;
    let there = partitions().await;
    let rehearsed = fixture.cleanup(&[&WEEK[..], &["--dry-run"]].concat());
    let told = |done: &str, number: i64| format!("\"postbox\".\"outbox\": {done}: {number}\n");
    // Of the five that are a week old one holds what waits, one what nobody has published.
    let old = rehearsed.results().to_owned();
    assert!(old.contains(&told("partitions to drop", 3)), "{old}");
    assert_eq!(fixture.outbox().await, before);
    let killed = fixture.cleanup_until("dropping_partition", &WEEK);
    assert!(killed.stderr.contains("failpoint"), "{killed:?}");
    assert_eq!(fixture.outbox().await, before);
    let cleaned = fixture.cleanup(&WEEK);
    let cleaned = cleaned.results();
    assert!(
        cleaned.contains(&told("partitions dropped", 3)),
        "{cleaned}"
    );
    assert!(
        cleaned.contains("\"postbox\".\"outbox_default\": rows removed: 1\n"),
        "{cleaned}"
    );
    assert_eq!(partitions().await, there - 3);
    assert_eq!(fixture.outbox().await, ["unpublished", "waits", "young"]);
    // It goes once it is published.
    let relay = Relay::streaming(&fixture, &FENCES).await;
    fixture.wait_for_fence(&fixture.contract.slot).await;
    relay.drain().await;
    fixture.cleanup(&WEEK).results();
    assert_eq!(fixture.outbox().await, ["waits", "young"]);
}

/// As long as somebody has read the outbox in a transaction, no partition goes; that is no success.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_partitions_that_stay_as_they_are_in_use_are_told_and_the_rest_goes() {
    let fixture = set_up().await;
    let relay = Relay::streaming(&fixture, &FENCES).await;
    insert(&fixture, "default", 100).await;
    fixture.wait_for_fence(&fixture.contract.slot).await;
    relay.drain().await;
    let reader = connect(&fixture.database_url).await;
    let read = "BEGIN; SELECT FROM postbox.outbox";
    reader.batch_execute(read).await.unwrap();
    let busy = fixture.cleanup(&WEEK);
    let results = "\"postbox\".\"outbox\": partitions dropped: 0\n\
                   \"postbox\".\"outbox_default\": rows removed: 1\n";
    assert!(busy.stdout.contains(results), "{busy:?}");
    let complaint = "error: drop partition postbox.outbox_";
    assert!(busy.stderr.starts_with(complaint), "{busy:?}");
    let why = " and of 4 others: somebody holds a lock on it, or on the outbox, all the time: pg_locks says who";
    assert!(busy.stderr.contains(why), "{busy:?}");
    assert_eq!(busy.code, 3);

    // So does a relay, which goes on.
    let flags = [
        &FENCES[..],
        &["--cleanup-interval", "1s", "--cleanup-older-than", "7d"],
    ];
    let mut relay = Relay::streaming(&fixture, &flags.concat()).await;
    relay
        .wait_for_log("WARN cleaning up again later: drop partition postbox.outbox_")
        .await;
    reader.batch_execute("COMMIT").await.unwrap();
    relay.wait_for_log("dropped old partitions").await;
    relay.drain().await;
    fixture.cleanup(&WEEK).results();
}
