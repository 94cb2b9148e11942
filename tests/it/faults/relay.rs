//! Relays that are killed, or told to stop.

use std::fmt::Write as _;
use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::SinkExt;

use crate::support::{Fixture, Relay, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigkill_in_a_loop_loses_nothing() {
    let fixture = Fixture::new().await;
    let writers = fixture.writers(fixture.load());
    for round in 0..8 {
        let relay = Relay::streaming(&fixture, &["--in-flight-max", "500"]).await;
        tokio::time::sleep(Duration::from_millis(300 + round * 100)).await;
        relay.kill();
    }
    writers.stop().await.unwrap();
    let relay = Relay::streaming(&fixture, &[]).await;
    let verdict = fixture.judge(relay).await;
    // A slow machine may stretch a status interval.
    assert!(
        verdict.committed > 500 && verdict.is_clean(8 * 2000),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_in_a_loop_repeats_nothing() {
    let fixture = Fixture::new().await;
    let writers = fixture.writers(fixture.load());
    for round in 0..8 {
        let relay = Relay::streaming(&fixture, &[]).await;
        tokio::time::sleep(Duration::from_millis(300 + round * 100)).await;
        relay.drain().await;
    }
    writers.stop().await.unwrap();
    let relay = Relay::streaming(&fixture, &[]).await;
    let verdict = fixture.judge(relay).await;
    assert!(verdict.committed > 500 && verdict.is_clean(0), "{verdict}");
}

/// Puts 500,000 rows into the outbox with one COPY, whose rows share WAL
/// positions, and enters them in the ledger.
async fn copy_half_a_million(fixture: &Fixture) {
    let mut rows = String::with_capacity(32 << 20);
    for number in 0..500_000 {
        let topic = &fixture.topic;
        writeln!(
            rows,
            "{topic}\tk{}\tchanged\t{{\"version\": {number}}}",
            number % 100
        )
        .unwrap();
    }
    let copy = "COPY postbox.outbox (aggregate_type, aggregate_id, event_type, payload) FROM STDIN";
    let sink = fixture.client.copy_in::<_, Bytes>(copy).await.unwrap();
    let mut sink = pin!(sink);
    sink.send(Bytes::from(rows)).await.unwrap();
    sink.finish().await.unwrap();
    fixture.enter_in_ledger().await;
}

/// Waits until some of the topic's records are there, and not all.
async fn wait_for_the_middle(relay: &Relay, fixture: &Fixture) {
    wait_until("a part is delivered", || async {
        relay.published(&fixture.topic) > 50_000
    })
    .await;
    let published = relay.published(&fixture.topic);
    assert!(published < 450_000, "the middle has passed");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigkill_in_the_middle_of_a_copy_repeats_it_and_loses_nothing() {
    let fixture = Fixture::new().await;
    copy_half_a_million(&fixture).await;
    let relay = Relay::streaming(&fixture, &[]).await;
    wait_for_the_middle(&relay, &fixture).await;
    relay.kill();
    let relay = Relay::streaming(&fixture, &[]).await;
    let verdict = fixture.judge(relay).await;
    // Only the commit's end is a position: all that was delivered is repeated.
    assert!(verdict.is_clean(500_000), "{verdict}");
    assert!(verdict.duplicates > 0, "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_in_the_middle_of_a_copy_reads_on_to_its_end() {
    let fixture = Fixture::new().await;
    copy_half_a_million(&fixture).await;
    let relay = Relay::streaming(&fixture, &["--shutdown-timeout", "2m"]).await;
    wait_for_the_middle(&relay, &fixture).await;
    relay.drain().await;
    let verdict = fixture.verdict().await;
    assert!(verdict.is_clean(0), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_that_cannot_drain_in_time_says_so_and_loses_nothing() {
    let fixture = Fixture::new().await;
    copy_half_a_million(&fixture).await;
    let mut relay = Relay::streaming(&fixture, &["--shutdown-timeout", "100ms"]).await;
    wait_for_the_middle(&relay, &fixture).await;
    relay.signal("TERM");
    assert_eq!(relay.exit_code().await, 9);
    assert!(
        relay.log().contains("will be sent again"),
        "{}",
        relay.log()
    );
    let relay = Relay::streaming(&fixture, &[]).await;
    let verdict = fixture.judge(relay).await;
    assert!(verdict.is_clean(500_000), "{verdict}");
}
