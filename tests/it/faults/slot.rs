//! A slot that the server gives up.

use super::assert_recoverable;
use crate::support::{Fixture, Relay, connect, run_script, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_given_up_beside_a_frozen_relay_is_recovered() {
    let settings = [
        "max_slot_wal_keep_size=1MB",
        "min_wal_size=32MB",
        "max_wal_size=32MB",
    ];
    let fixture = Fixture::with_postgres(&settings).await;
    fixture.setup(&[]).results();
    let mut relay = Relay::streaming(&fixture, &["--wal-sender-timeout", "1m"]).await;
    fixture.insert("before", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.signal("STOP");
    fixture.insert("missed", "{}").await;
    fixture.outrun_slot().await;
    relay.signal("CONT");
    let mut code = relay.exit_code().await;
    for _ in 0..2 {
        assert_eq!(code, 4, "{}", relay.log());
        relay = Relay::start(&fixture, &[]);
        code = relay.exit_code().await;
    }
    let log = relay.log();
    assert!(
        log.contains("was invalidated by the server (wal_removed)"),
        "{log}"
    );
    assert!(log.contains("run `postbox recover`"), "{log}");
    let again = fixture.setup(&[]);
    let complaint = again.complaint(4);
    assert!(
        complaint.contains("was invalidated by the server"),
        "{complaint}"
    );
    let script = fixture.setup(&["--print"]);
    let client = connect(&fixture.database_url).await;
    let refused = run_script(&client, script.results()).await.unwrap_err();
    let refused = refused.as_db_error().unwrap().message();
    assert!(
        refused.contains("was invalidated by the server"),
        "{refused}"
    );
    // With it goes its lock.
    drop(client);
    assert_recoverable(&fixture, "missed").await;
}

/// A relay that reads nothing while Kafka is away must not hold up the server that gives
/// its slot up, nor the checkpoint that does so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_given_up_beside_a_relay_that_waits_for_kafka_is_recovered() {
    let mut fixture = Fixture::with_servers(&["max_slot_wal_keep_size=1MB"], &[]).await;
    let flags = ["--in-flight-max", "20"];
    let mut relay = Relay::streaming(&fixture, &flags).await;
    fixture.insert("before", "{}").await;
    fixture.wait_for_confirmation().await;
    fixture.kafka("pause");
    // More than any buffer between the server and the relay holds.
    let payload = format!("\"{}\"", "x".repeat(1000));
    fixture.insert_many("many", &payload, 30_000).await;
    fixture.outrun_slot().await;
    assert_eq!(relay.exit_code().await, 4, "{}", relay.log());
    fixture.kafka("resume");
    assert!(
        relay.log().contains("run `postbox recover`"),
        "{}",
        relay.log()
    );
    fixture.recover(&[]).results();
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert!(fixture.keys().await.len() > 30_000);
}

/// A relay that gets on, however slowly, keeps a slot that the server would give up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_would_be_given_up_is_kept_while_events_are_delivered() {
    let fixture = Fixture::with_postgres(&["max_slot_wal_keep_size=1MB"]).await;
    fixture.setup(&[]).results();
    // The slot needs the WAL since the oldest open transaction began.
    let open = connect(&fixture.database_url).await;
    let begin = "BEGIN; SELECT pg_current_xact_id()";
    open.batch_execute(begin).await.unwrap();
    let relay = Relay::streaming(&fixture, &["--in-flight-max", "1"]).await;
    let unreserved = "SELECT wal_status = 'unreserved' FROM pg_replication_slots";
    wait_until("the server keeps no more WAL", async || {
        let fill = "SELECT pg_logical_emit_message(false, 'fill', 'x'), pg_switch_wal()";
        fixture.client.batch_execute(fill).await.unwrap();
        let row = fixture.client.query_one(unreserved, &[]).await;
        row.unwrap().get(0)
    })
    .await;
    let is_told = || {
        let status = "postbox_slot_wal_status{status=\"unreserved\"} 1";
        relay.get("/metrics").1.contains(status)
    };
    wait_until("the relay knows", async || is_told()).await;
    // Nothing of a transaction can be confirmed before its end.
    fixture.insert_many("a", "{}", 500).await;
    fixture.wait_for_confirmation().await;
    assert!(is_told());
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 500);
}
