//! Partitions that relays keep made ahead.

use std::time::{Duration, Instant};

use postbox::partitions::Fate;

use super::insert_at;
use crate::support::{Fixture, PATIENCE, Relay, connect, wait_until};

/// A relay makes partitions, old ones are dropped behind it, and none of that stops it, is taken for
/// a change of its publication, or is sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_come_and_go_while_events_flow() {
    let fixture = Fixture::empty().await;
    let (role, url) = fixture.role("relay").await;
    fixture
        .setup(&["--partitioned", "hour", "--grant-to", &role])
        .results();
    postbox::oracle::prepare(&fixture.client, "postbox")
        .await
        .unwrap();
    fixture.make_partitions_narrow().await;
    let first = fixture.partitions().await;
    let identity = "SELECT postbox.publication_identity('postbox')";
    let before: String = fixture
        .client
        .query_one(identity, &[])
        .await
        .unwrap()
        .get(0);

    let flags = ["--database-url", &url, "--heartbeat-interval", "1s"];
    let relay = Relay::streaming(&fixture, &flags).await;
    let writers = fixture.writers(postbox::oracle::Load {
        pause_percent: 10,
        ..fixture.load()
    });
    let client = connect(&fixture.database_url).await;
    let deadline = Instant::now() + PATIENCE;
    let mut dropped = 0;
    while dropped < 5 {
        assert!(
            Instant::now() < deadline,
            "{:?}",
            fixture.partitions().await
        );
        let snapshot = fixture.snapshot().await;
        let lsn = fixture.wal_end().await;
        fixture.wait_until_confirmed(lsn).await;
        let fates = fixture.drop_seen_by(&client, &snapshot, Duration::from_secs(1));
        let is_dropped = |(_, fate): &(String, Fate)| *fate == Fate::Dropped;
        dropped += fates.await.into_iter().filter(is_dropped).count();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let there = fixture.partitions().await;
    assert!(
        there.iter().all(|partition| !first.contains(partition)),
        "{there:?}"
    );
    writers.stop().await.unwrap();
    assert_eq!(relay.metric("postbox_default_partition_rows"), 0.0);
    assert!(relay.metric("postbox_partitions_ahead_seconds") > 3.0);
    let log = relay.log();
    let verdict = fixture.judge(relay).await;
    assert!(verdict.committed > 500 && verdict.is_clean(0), "{verdict}");
    assert!(!log.contains("WARN"), "{log}");
    let after: String = fixture
        .client
        .query_one(identity, &[])
        .await
        .unwrap()
        .get(0);
    assert_eq!(before, after);
}

/// One that is killed while it makes them leaves all or nothing, and the next makes the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_while_partitions_are_made_leaves_them_to_the_next() {
    for step in ["making_partitions", "partitions_made"] {
        let fixture = Fixture::partitioned(&[]).await;
        fixture.drop_partitions().await;
        let mut command = Relay::command(&fixture, &[]);
        let mut relay = Relay::spawn(command.env("FAILPOINTS", format!("{step}=panic")));
        assert_eq!(relay.exit_code().await, -1, "{step}: {}", relay.log());
        let made = fixture.partitions().await.len();
        assert_eq!(made > 0, step == "partitions_made", "{made}");
        let relay = Relay::streaming(&fixture, &[]).await;
        wait_until("partitions are made", async || {
            fixture.partitions().await.len() > 24
        })
        .await;
        relay.drain().await;
    }
}

/// A row never fails for want of a partition, and goes out as all others do; of its time no partition is
/// made then, and that is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_without_a_partition_are_in_the_default_one_and_are_sent() {
    let fixture = Fixture::partitioned(&[]).await;
    let mut relay = Relay::streaming(&fixture, &[]).await;
    wait_until("there is a partition for each row", async || {
        let (_, metrics) = relay.get("/metrics");
        metrics.contains("postbox_default_partition_rows 0\n")
    })
    .await;
    assert!(relay.metric("postbox_partitions_ahead_seconds") > 23.0 * 3600.0);
    relay.drain().await;

    fixture.drop_partitions().await;
    for (key, created_at) in [("past", "'2001-01-01'"), ("now", "now()")] {
        let insert = insert_at(&fixture, key, created_at);
        fixture.client.batch_execute(&insert).await.unwrap();
    }
    relay = Relay::streaming(&fixture, &[]).await;
    let warning = "WARN rows are in \"postbox\".\"outbox_default\"";
    relay.wait_for_log(warning).await;
    assert!(relay.log().contains("rows=2 not_made=1"), "{}", relay.log());
    assert_eq!(relay.metric("postbox_default_partition_rows"), 2.0);
    assert_eq!(relay.metric("postbox_partitions_ahead_seconds"), 0.0);
    // The one of the hour before, and those from the next on.
    assert_eq!(fixture.partitions().await.len(), 25);
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["now", "past"]);
    let rows = "SELECT count(*) FROM postbox.outbox_default";
    let row = fixture.client.query_one(rows, &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 2);
}

/// Also of those that come later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_come_to_the_default_partition_of_a_relay_at_work_are_told() {
    let fixture = Fixture::partitioned(&[]).await;
    // Little is left, so that it looks each second.
    fixture.make_partitions_narrow().await;
    let mut relay = Relay::streaming(&fixture, &[]).await;
    wait_until("it has looked", async || {
        let (_, metrics) = relay.get("/metrics");
        metrics.contains("postbox_default_partition_rows 0\n")
    })
    .await;
    let insert = insert_at(&fixture, "past", "'2001-01-01'");
    fixture.client.batch_execute(&insert).await.unwrap();
    relay
        .wait_for_log("WARN rows are in \"postbox\".\"outbox_default\"")
        .await;
    assert_eq!(relay.metric("postbox_default_partition_rows"), 1.0);
    relay.drain().await;
}

/// Relays look each minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_look_at_partitions_that_are_there_keeps_nobody_waiting() {
    let fixture = Fixture::partitioned(&[]).await;
    let insert = insert_at(&fixture, "past", "'2001-01-01'");
    fixture.client.batch_execute(&insert).await.unwrap();
    let look = "BEGIN; SELECT made = 0 AND default_rows = 1 FROM postbox.make_partitions()";
    fixture.client.batch_execute(look).await.unwrap();
    let locks = "SELECT DISTINCT relation::regclass::text, mode FROM pg_locks AS l JOIN pg_class AS c ON c.oid = relation \
                 WHERE pid = pg_backend_pid() AND relnamespace = 'postbox'::regnamespace \
                   AND relname LIKE 'outbox%' AND mode <> 'AccessShareLock'";
    let rows = fixture.client.query(locks, &[]).await.unwrap();
    assert!(rows.is_empty(), "{rows:?}");
    fixture.client.batch_execute("COMMIT").await.unwrap();
}

/// The rows of now have no partition: one is being made. A row that comes at that moment must wait for
/// it, as it would be refused if it were sent to the default partition.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_comes_while_its_partition_is_made_is_not_refused() {
    let fixture = Fixture::partitioned(&[]).await;
    fixture.drop_partitions().await;
    // Not beside what drops them, which locks the outbox.
    let make = "BEGIN; SELECT postbox.make_partitions()";
    fixture.client.batch_execute(make).await.unwrap();
    let writer = connect(&fixture.database_url).await;
    let insert = insert_at(&fixture, "a", "now()");
    let writing = tokio::spawn(async move { writer.batch_execute(&insert).await });
    wait_until("the writer waits", async || {
        let sql = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'postbox.outbox'::regclass) \
                       OR EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = 'postbox.outbox_default'::regclass)";
        fixture.client.query_one(sql, &[]).await.unwrap().get(0)
    })
    .await;
    fixture.client.batch_execute("COMMIT").await.unwrap();
    writing.await.unwrap().unwrap();
    let sql = "SELECT tableoid::regclass::text <> 'postbox.outbox_default' FROM postbox.outbox";
    assert!(
        fixture
            .client
            .query_one(sql, &[])
            .await
            .unwrap()
            .get::<_, bool>(0)
    );
}

/// Nor do writers wait for partitions of a time that is still to come, whatever they have open.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn writers_do_not_wait_for_partitions_to_come() {
    let fixture = Fixture::partitioned(&[]).await;
    let writer = connect(&fixture.database_url).await;
    let insert = insert_at(&fixture, "a", "now()");
    writer
        .batch_execute(&format!("BEGIN; {insert}"))
        .await
        .unwrap();
    let sql = "UPDATE postbox.partitioning SET ahead = '30 hours'; BEGIN; SELECT postbox.make_partitions()";
    fixture.client.batch_execute(sql).await.unwrap();
    let limited = format!("SET LOCAL lock_timeout = 1000; {insert}; COMMIT; {insert}");
    writer.batch_execute(&limited).await.unwrap();
    fixture.client.batch_execute("COMMIT").await.unwrap();
    assert!(fixture.partitions().await.len() > 30);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_may_not_make_partitions_says_so_and_goes_on() {
    let fixture = Fixture::empty().await;
    let (role, url) = fixture.role("relay").await;
    fixture
        .setup(&["--partitioned", "hour", "--grant-to", &role])
        .results();
    let revoke = format!("REVOKE EXECUTE ON FUNCTION postbox.make_partitions FROM \"{role}\"");
    fixture.client.batch_execute(&revoke).await.unwrap();
    let mut relay = Relay::streaming(&fixture, &["--database-url", &url]).await;
    relay
        .wait_for_log("WARN partitions are not made ahead")
        .await;
    let log = relay.log();
    assert!(log.contains("`postbox setup --grant-to ROLE`"), "{log}");
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let report = fixture.setup(&["--grant-to", &role]);
    assert!(
        report
            .results()
            .contains(&format!("role \"{role}\": created")),
        "{report:?}"
    );
}
