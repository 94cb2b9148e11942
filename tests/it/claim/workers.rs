//! Several who claim from one table.

use std::time::Duration;

use super::{OMNI_BOX, claiming};
use crate::support::{Fixture, Relay, WINDOW, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_relays_share_a_table_and_keep_its_order() {
    let fixture = Fixture::omni_box().await;
    fixture.omni_box_backlog(20_000, 10).await;
    let writers = fixture.writers(fixture.load());
    let relays = [claiming(&fixture, &[]).await, claiming(&fixture, &[]).await];
    tokio::time::sleep(Duration::from_secs(3)).await;
    writers.stop().await.unwrap();
    fixture.wait_until_completed().await;
    let shares = relays
        .iter()
        .map(|relay| relay.published(&fixture.topic))
        .collect::<Vec<_>>();
    assert!(shares.iter().all(|share| *share > 100), "{shares:?}");
    let [first, second] = relays;
    first.drain().await;
    let verdict = fixture.judge_claims(second).await;
    assert!(
        verdict.committed > 20_000 && verdict.is_clean(0),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigkill_in_a_loop_loses_nothing() {
    let fixture = Fixture::omni_box().await;
    let writers = fixture.writers(fixture.load());
    for round in 0..4 {
        let relay = claiming(&fixture, &["--in-flight-max", "500"]).await;
        tokio::time::sleep(Duration::from_millis(400 + round * 200)).await;
        relay.kill();
    }
    writers.stop().await.unwrap();
    let relay = claiming(&fixture, &[]).await;
    let verdict = fixture.judge_claims(relay).await;
    assert!(
        verdict.committed > 500 && verdict.is_clean(4 * (500 + WINDOW)),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_in_a_loop_repeats_nothing_and_leaves_no_claim() {
    let fixture = Fixture::omni_box().await;
    fixture.omni_box_backlog(20_000, 100).await;
    let writers = fixture.writers(fixture.load());
    for round in 0..4 {
        let relay = claiming(&fixture, &[]).await;
        tokio::time::sleep(Duration::from_millis(100 + round * 100)).await;
        relay.drain().await;
        assert_eq!(fixture.rows_that_are("locked_by IS NOT NULL").await, 0);
    }
    writers.stop().await.unwrap();
    let relay = claiming(&fixture, &[]).await;
    let verdict = fixture.judge_claims(relay).await;
    assert!(verdict.is_clean(0), "{verdict}");
}

/// What a killed relay had claimed is free after seconds, not after the five minutes that
/// others give a claim.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_relay_had_claimed_goes_out_within_seconds() {
    let mut fixture = Fixture::omni_box_with_servers().await;
    let relay = claiming(&fixture, &[]).await;
    fixture.insert("first", "{}").await;
    fixture.wait_until_completed().await;
    fixture.kafka("pause");
    fixture.insert("a", "{}").await;
    wait_until("it is claimed", async || {
        fixture.rows_that_are("locked_by IS NOT NULL").await == 1
    })
    .await;
    // And stays so, as long as the relay lives.
    tokio::time::sleep(Duration::from_secs(4)).await;
    let left = "SELECT extract(epoch FROM locked_at + interval '300 s' - now())::float8 FROM outbox_events \
                WHERE locked_by IS NOT NULL";
    let left: f64 = fixture.client.query_one(left, &[]).await.unwrap().get(0);
    assert!((4.0..=10.5).contains(&left), "{left}");
    relay.kill();
    fixture.kafka("resume");
    let since = std::time::Instant::now();
    let relay = claiming(&fixture, &[]).await;
    fixture.wait_until_completed().await;
    assert!(since.elapsed() < Duration::from_secs(25));
    relay.drain().await;
}

/// While Kafka is away, the rows that were claimed ahead of those in flight stay claimed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_claimed_and_cannot_be_sent_yet_stays_claimed() {
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let drop = "DROP SCHEMA postbox CASCADE; DROP SCHEMA postbox_oracle CASCADE";
    fixture.client.batch_execute(drop).await.unwrap();
    fixture.make_omni_box().await;
    let relay = claiming(&fixture, &["--in-flight-max", "700"]).await;
    fixture.omni_box_backlog(1, 1).await;
    fixture.wait_until_completed().await;
    fixture.kafka("pause");
    fixture.omni_box_backlog(3_000, 1).await;
    // A second claim is made when half of the first is sent, and there is no room for it.
    wait_until("two claims are made", async || {
        fixture.rows_that_are("locked_by IS NOT NULL").await == 2_000
    })
    .await;
    tokio::time::sleep(Duration::from_secs(12)).await;
    let lasts = "locked_at > now() - interval '300 s'";
    assert_eq!(fixture.rows_that_are(lasts).await, 2_000);
    fixture.kafka("resume");
    fixture.wait_until_completed().await;
    let log = relay.log();
    assert!(!log.contains("may be over"), "{log}");
    let verdict = fixture.judge_claims(relay).await;
    assert!(
        verdict.committed == 3_001 && verdict.is_clean(0),
        "{verdict}"
    );
}

/// A relay that was frozen finds its claims taken, and sends none of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_wakes_late_sends_nothing_of_what_it_had_claimed() {
    let fixture = Fixture::omni_box().await;
    let writers = fixture.writers(fixture.load());
    let mut frozen = claiming(&fixture, &[]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    frozen.signal("STOP");
    let other = claiming(&fixture, &[]).await;
    tokio::time::sleep(Duration::from_secs(14)).await;
    frozen.signal("CONT");
    frozen.wait_for_log("this process did not run for").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    writers.stop().await.unwrap();
    fixture.wait_until_completed().await;
    frozen.drain().await;
    let verdict = fixture.judge_claims(other).await;
    assert!(
        verdict.committed > 500 && verdict.is_clean(2 * WINDOW),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_others_have_taken_is_not_touched() {
    let fixture = Fixture::omni_box().await;
    let flags = [&OMNI_BOX[..], &["--status-interval", "3s"]].concat();
    let mut relay = Relay::start(&fixture, &flags);
    relay.wait_for_log("polling, by claims").await;
    fixture.insert("first", "{}").await;
    fixture.wait_until_completed().await;
    fixture.insert("a", "{}").await;
    wait_until("it is delivered", async || {
        fixture.keys().await == ["a", "first"]
    })
    .await;
    let take = "UPDATE outbox_events SET locked_by = 'another' WHERE status = 'pending'";
    assert_eq!(fixture.client.execute(take, &[]).await.unwrap(), 1);
    // When it completes the row, or when it renews its claim before.
    wait_until("it is told that the row is another's", async || {
        let log = relay.log();
        log.contains("rows were no longer claimed by this relay")
            || log.contains("were taken away from this relay")
    })
    .await;
    assert_eq!(fixture.rows_that_are("locked_by = 'another'").await, 1);
    // It was delivered, and another says when it is completed.
    assert!([0, 9].contains(&relay.stop().await));
    assert_eq!(fixture.rows_that_are("locked_by = 'another'").await, 1);
}
