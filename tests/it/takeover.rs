//! Two relays on one slot: what becomes of the active one, and how soon the other
//! publishes.

use std::time::{Duration, Instant};

use crate::support::{
    Fixture, PATIENCE, Proxy, Relay, SMALL_WINDOW, WINDOW, Weather, trials, wait_until,
};

/// What happens to the active relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Harm {
    Kill,
    /// SIGSTOP, and SIGCONT once the other publishes.
    Freeze,
    /// Its connection to Postgres passes nothing on until the other publishes.
    Isolate,
}

/// From the harm until the other relay has delivered something.
async fn take_over(harm: Harm) -> Duration {
    let proxy = Proxy::start().await;
    let (fixture, server) = Fixture::behind(&proxy).await;
    let writers = fixture.writers(fixture.steady_load());
    let [flag, events] = SMALL_WINDOW;
    let flags = [flag, events, "--database-url", &server];
    let active = Relay::streaming(&fixture, &flags).await;
    let mut other = Relay::start(&fixture, &SMALL_WINDOW);
    other.wait_for_log("standing by").await;
    fixture.outgrow(&active, WINDOW).await;
    let since = Instant::now();
    let frozen = match harm {
        Harm::Kill => {
            active.kill();
            None
        }
        Harm::Freeze => {
            active.signal("STOP");
            Some(active)
        }
        Harm::Isolate => {
            proxy.weather(Weather::Silent);
            Some(active)
        }
    };
    while other.published(&fixture.topic) == 0 {
        assert!(since.elapsed() < PATIENCE, "{}", other.log());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let taken = since.elapsed();
    proxy.weather(Weather::Fair);
    if let Some(mut woken) = frozen {
        woken.signal("CONT");
        woken.wait_for_log("standing by").await;
        // It has left things unconfirmed, which the other has delivered.
        let code = woken.stop().await;
        assert!([0, 9].contains(&code), "exit code {code}");
    }
    writers.stop().await.unwrap();
    fixture.assert_repeats_at_most(WINDOW, other).await;
    taken
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_stands_by_takes_over_from_one_that_is_killed() {
    take_over(Harm::Kill).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_stands_by_takes_over_from_one_that_is_frozen() {
    take_over(Harm::Freeze).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_stands_by_takes_over_from_one_that_is_cut_off() {
    take_over(Harm::Isolate).await;
}

/// What lies in the buffers of its connection is not its to send any more: the other has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_wakes_up_sends_nothing_of_what_came_in_its_sleep() {
    let proxy = Proxy::start().await;
    let (fixture, server) = Fixture::behind(&proxy).await;
    let mut active = Relay::streaming(&fixture, &["--database-url", &server]).await;
    let mut other = Relay::start(&fixture, &[]);
    other.wait_for_log("standing by").await;
    fixture.insert_many("a", "{}", 100).await;
    fixture.wait_for_confirmation().await;
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
    other.drain().await;
    assert_eq!(fixture.records().await.len(), 2_100);
}

/// A relay that has the slot and sleeps at this failpoint, as if it were frozen, until
/// the server has long given it up; and another, which streams.
async fn asleep_at(step: &str) -> (Fixture, Relay, Relay) {
    let fixture = Fixture::new().await;
    let mut command = Relay::command(&fixture, &["--wal-sender-timeout", "2s"]);
    let frozen = Relay::spawn(command.env("FAILPOINTS", format!("{step}=1*sleep(20000)")));
    fixture.wait_for_reader().await;
    let other = Relay::streaming(&fixture, &[]).await;
    (fixture, frozen, other)
}

/// It had the slot before the other, and finds that out before it does anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_frozen_before_it_claims_the_checkpoint_does_not_claim_it_later() {
    let (fixture, mut frozen, other) = asleep_at("opened").await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    frozen.wait_for_log("standing by: checkpoint").await;
    assert_eq!(frozen.stop().await, 0);
    assert_eq!(other.log().matches("INFO streaming").count(), 1);
    other.drain().await;
}

/// The lock that it holds does not keep the other from its work.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_frozen_while_it_claims_the_checkpoint_holds_nobody_up() {
    let (_fixture, mut frozen, other) = asleep_at("claim_written").await;
    assert!(!other.log().contains("trying again"), "{}", other.log());
    frozen.wait_for_log("trying again").await;
    assert_eq!(frozen.stop().await, 0);
    other.drain().await;
}

/// What a relay could not store, the one that took over has: an orderly end is one again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_stands_by_learns_what_the_other_has_stored() {
    let proxy = Proxy::start().await;
    let (fixture, server) = Fixture::behind(&proxy).await;
    let flags = ["--database-url", &server, "--status-interval", "4s"];
    let mut left = Relay::streaming(&fixture, &flags).await;
    let locking = fixture.lock_checkpoint().await;
    fixture.insert("a", "{}").await;
    wait_until("it is delivered", async || {
        left.published(&fixture.topic) == 1
    })
    .await;
    proxy.weather(Weather::Silent);
    proxy.cut();
    left.wait_for_log("trying again").await;
    drop(locking);
    let before = fixture.wal_end().await;
    let other = Relay::streaming(&fixture, &[]).await;
    fixture.insert("b", "{}").await;
    wait_until("what is delivered is stored", async || {
        fixture.stored().await > before
    })
    .await;
    proxy.weather(Weather::Fair);
    left.wait_for_log("standing by").await;
    assert_eq!(left.stop().await, 0);
    other.drain().await;
}

/// Finding the slot with another relay ends a series of failures, so that the next one
/// does not keep a relay from taking over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_stands_by_begins_its_pauses_anew() {
    let proxy = Proxy::start().await;
    let (fixture, server) = Fixture::behind(&proxy).await;
    let active = Relay::streaming(&fixture, &[]).await;
    let other = Relay::start(&fixture, &["--database-url", &server]);
    let lines = |what: &str| other.log().matches(what).count();
    for round in 1..=2 {
        proxy.pass_on_to(&fixture.postgres_address());
        wait_until("it stands by", async || lines("standing by") == round).await;
        let failures = lines("trying again in ");
        proxy.pass_on_to("127.0.0.1:1");
        wait_until("it has failed some times", async || {
            lines("trying again in ") >= failures + 5
        })
        .await;
        let log = other.log();
        let pauses: Vec<&str> = log.split("trying again in ").skip(1).collect();
        assert!(pauses[failures] < "0.3", "{log}");
    }
    active.drain().await;
}

/// How long it takes, and that it does not take longer than is promised.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures: make trials"]
async fn trials_of_takeover() {
    for (harm, promised) in [(Harm::Kill, 3), (Harm::Freeze, 10), (Harm::Isolate, 10)] {
        let name = format!("{harm:?}: the other relay publishes after");
        trials(&name, Duration::from_secs(promised), async || {
            take_over(harm).await
        })
        .await;
    }
}
