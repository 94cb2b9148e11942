//! Two relays that poll under one name.

use std::time::{Duration, Instant};

use super::{POLL, polling};
use crate::support::{Fixture, PATIENCE, Relay, trials, wait_until};

/// Two relays, of which the first is at work.
async fn two(fixture: &Fixture) -> (Relay, Relay) {
    let active = polling(fixture, &[]).await;
    let mut other = Relay::start(fixture, &POLL);
    other.wait_for_log("standing by").await;
    (active, other)
}

/// Kills the active relay; how long nothing is published after it.
async fn take_over() -> Duration {
    let fixture = Fixture::polling().await;
    let writers = fixture.writers(fixture.load());
    let (active, other) = two(&fixture).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    active.kill();
    let since = Instant::now();
    while other.published(&fixture.topic) == 0 {
        assert!(since.elapsed() < PATIENCE, "{}", other.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let taken = since.elapsed();
    writers.stop().await.unwrap();
    let verdict = fixture.judge_polling(other).await;
    assert!(verdict.is_clean(12_000), "{verdict}");
    taken
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_stands_by_takes_over_after_a_kill() {
    take_over().await;
}

/// How long it takes, and that it does not take longer than is promised.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures: make trials"]
async fn trials_of_a_lease() {
    let name = "Kill: the other relay that polls publishes after";
    trials(name, Duration::from_secs(4), take_over).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_stopped_lets_the_other_take_over_at_once() {
    let fixture = Fixture::polling().await;
    let writers = fixture.writers(fixture.load());
    let (active, mut other) = two(&fixture).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    active.drain().await;
    let since = Instant::now();
    other.wait_for_log("polling").await;
    let taken = since.elapsed();
    writers.stop().await.unwrap();
    let verdict = fixture.judge_polling(other).await;
    assert!(verdict.is_clean(0), "{verdict}");
    assert!(taken < Duration::from_secs(2), "{taken:?}");
}

/// It has lost its lease in its sleep, and sends nothing more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_wakes_up_finds_its_lease_taken() {
    let fixture = Fixture::polling().await;
    let (mut active, other) = two(&fixture).await;
    fixture.insert_many("a", "{}", 100).await;
    fixture.wait_for_checkpoint().await;
    active.signal("STOP");
    for _ in 0..20 {
        fixture.insert_many("b", "{}", 100).await;
    }
    wait_until("the other has delivered them", async || {
        other.published(&fixture.topic) == 2_000
    })
    .await;
    active.signal("CONT");
    active.wait_for_log("standing by").await;
    active.stop().await;
    fixture.wait_for_checkpoint().await;
    other.drain().await;
    assert_eq!(fixture.records().await.len(), 2_100);
}

/// Nothing was delivered between the two.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_frozen_twice_notices_it_twice() {
    let fixture = Fixture::polling().await;
    let relay = polling(&fixture, &[]).await;
    for times in 1..=2 {
        wait_until("it polls", async || {
            relay.log().matches("INFO polling").count() == times
        })
        .await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        relay.signal("STOP");
        tokio::time::sleep(Duration::from_secs(3)).await;
        relay.signal("CONT");
        wait_until("it is noticed", async || {
            relay.log().matches("this process did not run for").count() == times
        })
        .await;
    }
    relay.drain().await;
}

/// It has taken the lease, and another may have it by the time it begins to read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_frozen_behind_its_claim_notices_it() {
    let fixture = Fixture::polling().await;
    let mut command = Relay::command(&fixture, &POLL);
    let mut relay = Relay::spawn(command.env("FAILPOINTS", "claimed=1*sleep(4000)"));
    relay.wait_for_log("this process did not run for").await;
    relay.drain().await;
}
