//! A slot that is dropped, or that the server gives up.

use super::assert_recoverable;
use crate::support::{Fixture, Relay, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_dropped_while_it_is_read_stops_the_relay() {
    let fixture = Fixture::new().await;
    let mut relay = Relay::streaming(&fixture, &[]).await;
    let slot = &fixture.contract.slot;
    let (terminate, drop) = (
        "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active",
        "SELECT pg_drop_replication_slot($1)",
    );
    wait_until("the slot is dropped", async || {
        fixture.client.execute(terminate, &[slot]).await.unwrap();
        fixture.client.execute(drop, &[slot]).await.is_ok()
    })
    .await;
    fixture.insert("missed", "{}").await;
    assert_eq!(relay.exit_code().await, 4, "{}", relay.log());
    let mut next = Relay::start(&fixture, &[]);
    assert_eq!(next.exit_code().await, 4, "{}", next.log());
    let log = next.log();
    assert!(log.contains(" is gone: run `postbox recover`"), "{log}");
    assert_recoverable(&fixture, "missed").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_the_server_gave_up_stops_the_relay() {
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
    wait_until("the slot is lost", async || {
        for _ in 0..3 {
            let fill = "SELECT pg_logical_emit_message(false, 'fill', 'x'), pg_switch_wal()";
            fixture.client.batch_execute(fill).await.unwrap();
        }
        fixture.client.batch_execute("CHECKPOINT").await.unwrap();
        let status = "SELECT wal_status FROM pg_replication_slots WHERE wal_status = 'lost'";
        !fixture.client.query(status, &[]).await.unwrap().is_empty()
    })
    .await;
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
    assert!(log.contains("then run `postbox recover`"), "{log}");
    assert_recoverable(&fixture, "missed").await;
}
