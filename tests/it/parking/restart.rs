//! What a relay that begins knows of what waits.

use super::policies::UNROUTABLE;
use super::scheduled::schedule;
use super::{RARELY, parked, wait_for_parked};
use crate::support::{Fixture, Relay, connect, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_counts_what_there_is_from_its_first_event_on() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &RARELY).await;
    for _ in 0..3 {
        fixture.client.batch_execute(UNROUTABLE).await.unwrap();
    }
    for _ in 0..2 {
        schedule(&fixture, "b", "1", "1 h").await;
    }
    fixture.wait_for_confirmation().await;
    let before = [
        "waiting a 1",
        "waiting a 1",
        "waiting a 1",
        "scheduled b 0",
        "scheduled b 0",
    ];
    wait_for_parked(&fixture, &before).await;
    // What is dead counts too.
    let give_up = "UPDATE postbox.parked SET status = 'dead' \
                   WHERE number = (SELECT min(number) FROM postbox.parked)";
    fixture.client.batch_execute(give_up).await.unwrap();
    let sql =
        "SELECT sum(octet_length(message))::float8 FROM postbox.parked WHERE status <> 'scheduled'";
    let bytes: f64 = fixture.client.query_one(sql, &[]).await.unwrap().get(0);
    relay.drain().await;

    let relay = Relay::streaming(&fixture, &RARELY).await;
    for (metric, expected) in [
        ("postbox_parked_events{status=\"waiting\"}", 2.0),
        ("postbox_parked_events{status=\"dead\"}", 1.0),
        ("postbox_parked_events{status=\"scheduled\"}", 2.0),
        ("postbox_parked_bytes", bytes),
    ] {
        let is_told = |line: &str| line == format!("{metric} {expected}");
        wait_until(metric, async || {
            relay.get("/metrics").1.lines().any(is_told)
        })
        .await;
    }
    relay.drain().await;

    // What sends them cannot begin: it has counted nothing for the stream.
    let take = "UPDATE postbox.parked SET taken_at = now() WHERE status = 'waiting'";
    fixture.client.batch_execute(take).await.unwrap();
    let lock = connect(&fixture.database_url).await;
    let rows = "BEGIN; SELECT FROM postbox.parked FOR UPDATE";
    lock.batch_execute(rows).await.unwrap();
    fixture.client.batch_execute(UNROUTABLE).await.unwrap();
    let flags = [&RARELY[..], &["--parked-max", "3"]].concat();
    let mut relay = Relay::start(&fixture, &flags);
    assert_eq!(relay.exit_code().await, 8, "{}", relay.log());
    let log = relay.log();
    assert!(
        log.contains("3 events are parked, as many as --parked-max allows"),
        "{log}"
    );
    assert_eq!(parked(&fixture).await.len(), 5);
}

/// Before the first of them is in the table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_parks_no_more_bytes_than_may_be() {
    let fixture = Fixture::new().await;
    let mut relay = Relay::streaming(&fixture, &["--parked-bytes-max", "1MiB"]).await;
    let burst = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload, topic) \
                 SELECT 'order', 'a', 'changed', to_json(repeat('x', 100000)), 'no topic''s name' \
                 FROM generate_series(1, 20)";
    fixture.client.batch_execute(burst).await.unwrap();
    assert_eq!(relay.exit_code().await, 8, "{}", relay.log());
    assert!(
        relay.log().contains("--parked-bytes-max"),
        "{}",
        relay.log()
    );
    let sql = "SELECT coalesce(sum(octet_length(message)), 0)::bigint FROM postbox.parked";
    let bytes: i64 = fixture.client.query_one(sql, &[]).await.unwrap().get(0);
    assert!(bytes <= 1 << 20, "{bytes}");
}
