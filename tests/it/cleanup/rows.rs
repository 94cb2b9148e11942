//! Which rows go, of which table.

use super::{FENCES, WEEK, removed};
use crate::support::{Fixture, Relay, connect};

/// A row of `parked` for each of these events, by their keys.
const PARK: &str = "\
    INSERT INTO postbox.parked \
        (id, relay, status, due_at, topic, key, decided_by, decided_at, commit_lsn, committed_at, message, column_names, column_types) \
    SELECT o.id::text, c.name, o.aggregate_id, CASE o.aggregate_id WHEN 'scheduled' THEN now() ELSE 'infinity' END, 't', \
        o.aggregate_id, CASE o.aggregate_id WHEN 'skipped' THEN 'me' END, now() - interval '8 days', '0/1', now(), '', '{}', '{}' \
    FROM postbox.outbox AS o, postbox.checkpoint AS c \
    WHERE o.aggregate_id IN ('scheduled', 'waiting', 'dead', 'skipped')";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_old_and_published_goes_and_nothing_else() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &FENCES).await;
    // More than a batch of rows that are too young for long stand before those that are old.
    fixture.insert_many("ahead", "{}", 350).await;
    fixture.insert_many("old", "{}", 1_000).await;
    for key in ["scheduled", "waiting", "dead", "skipped", "later", "young"] {
        fixture.insert(key, "{}").await;
    }
    fixture.wait_for_fence(&fixture.contract.slot).await;
    relay.drain().await;
    fixture.insert_many("unpublished", "{}", 250).await;
    fixture.age().await;
    fixture
        .sql(
            "UPDATE postbox.outbox SET created_at = '2099-01-01' WHERE aggregate_id = 'ahead'; \
             UPDATE postbox.outbox SET created_at = now() - interval '6 days' WHERE aggregate_id = 'young'; \
             UPDATE postbox.outbox SET scheduled_at = now() + interval '1 hour' WHERE aggregate_id = 'later'",
        )
        .await;
    fixture.sql(PARK).await;
    let all = fixture.count("postbox.outbox").await;

    let small = [&WEEK[..], &["--batch", "100"]].concat();
    let dry = fixture.cleanup(&[&small[..], &["--dry-run"]].concat());
    assert!(dry.results().contains("rows to remove: 1001\n"), "{dry:?}");
    assert_eq!(removed(&dry, "outbox"), 1_001);
    assert_eq!(removed(&dry, "parked"), 1);
    assert_eq!(fixture.count("postbox.outbox").await, all);
    assert_eq!(fixture.count("postbox.parked").await, 4);

    // A writer that holds its rows, and one that holds the table, but for reading.
    let other = connect(&fixture.database_url).await;
    let lock = "BEGIN; LOCK TABLE postbox.outbox IN SHARE MODE";
    other.batch_execute(lock).await.unwrap();
    let locked = fixture.cleanup(&small);
    let complaint = locked.complaint(3);
    assert!(
        complaint.contains("clean \"postbox\".\"outbox\"")
            && complaint.contains("somebody holds a lock on \"postbox\".\"outbox\""),
        "{complaint}"
    );
    other.batch_execute("ROLLBACK").await.unwrap();
    let writing = "BEGIN; INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, created_at) \
                   VALUES ('x', 'open', 'changed', '2020-01-01')";
    other.batch_execute(writing).await.unwrap();

    let done = fixture.cleanup(&small);
    assert_eq!(removed(&done, "outbox"), 1_001);
    assert_eq!(removed(&done, "parked"), 1);
    other.batch_execute("COMMIT").await.unwrap();
    assert_eq!(removed(&fixture.cleanup(&small), "outbox"), 0);
    let kept = [
        "ahead",
        "dead",
        "later",
        "open",
        "scheduled",
        "unpublished",
        "waiting",
        "young",
    ];
    assert_eq!(fixture.outbox().await, kept);
    assert_eq!(fixture.count("postbox.outbox").await, all - 1_001 + 1);

    // What is published now goes, too.
    fixture
        .sql("DELETE FROM postbox.outbox WHERE aggregate_id = 'open'")
        .await;
    let relay = Relay::streaming(&fixture, &FENCES).await;
    fixture.wait_for_fence(&fixture.contract.slot).await;
    assert_eq!(removed(&fixture.cleanup(&WEEK), "outbox"), 250);
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_and_cancellations_go_when_nobody_looks_for_them() {
    let fixture = Fixture::new().await;
    fixture.publish_old(&["a"]).await;
    let key = "SELECT postbox.emit('x', 'k', 'changed', NULL, idempotency_key => 'k1')::text";
    let emit = async || -> String { fixture.client.query_one(key, &[]).await.unwrap().get(0) };
    let first = emit().await;
    assert_eq!(emit().await, first);
    fixture
        .sql(
            "INSERT INTO postbox.idempotency (key, id) SELECT 'old ' || n, gen_random_uuid() FROM generate_series(1, 3000) AS n; \
             UPDATE postbox.idempotency SET created_at = now() - interval '8 days' WHERE key LIKE 'old %'; \
             SELECT postbox.emit('x', 'c', 'changed', NULL, scheduled_at => now() + interval '1 hour', id => '00000000-0000-0000-0000-000000000001'); \
             SELECT postbox.cancel('00000000-0000-0000-0000-000000000001'); \
             INSERT INTO postbox.cancellation (id) VALUES ('00000000-0000-0000-0000-000000000002'), \
                 ('00000000-0000-0000-0000-000000000003'), ('not a uuid'); \
             UPDATE postbox.cancellation SET cancelled_at = now() - interval '8 days'; \
             INSERT INTO postbox.cancellation (id) VALUES ('young'); \
             INSERT INTO postbox.parked (id, relay, status, due_at, committed_at, message, column_names, column_types) \
             VALUES ('00000000-0000-0000-0000-000000000003', 'x', 'scheduled', now(), now(), '', '{}', '{}')",
        )
        .await;
    let done = fixture.cleanup(&[&WEEK[..], &["--batch", "100"]].concat());
    assert_eq!(removed(&done, "idempotency"), 3_000);
    assert_eq!(removed(&done, "cancellation"), 2);
    let left = "SELECT string_agg(right(id, 5), ',' ORDER BY id) FROM postbox.cancellation";
    let left: String = fixture.client.query_one(left, &[]).await.unwrap().get(0);
    assert_eq!(left, "00001,00003,young");
    assert_eq!(emit().await, first);
    // A key is free again after the retention.
    fixture
        .sql("UPDATE postbox.idempotency SET created_at = now() - interval '8 days'")
        .await;
    assert_eq!(removed(&fixture.cleanup(&WEEK), "idempotency"), 1);
    assert_ne!(emit().await, first);
}

/// A person's decision is known for as long as the row may be read again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_skipped_event_that_may_be_read_again_stays() {
    let fixture = Fixture::new().await;
    fixture.publish_old(&["skipped"]).await;
    fixture.sql(PARK).await;
    fixture
        .sql("UPDATE postbox.parked SET commit_lsn = pg_current_wal_lsn() + 1000")
        .await;
    assert_eq!(removed(&fixture.cleanup(&WEEK), "parked"), 0);
    fixture
        .sql("UPDATE postbox.parked SET commit_lsn = '0/1', decided_at = now()")
        .await;
    assert_eq!(removed(&fixture.cleanup(&WEEK), "parked"), 0);
    fixture
        .sql("UPDATE postbox.parked SET decided_at = now() - interval '8 days'")
        .await;
    assert_eq!(removed(&fixture.cleanup(&WEEK), "parked"), 1);
}
