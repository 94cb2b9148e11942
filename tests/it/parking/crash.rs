//! Relays that are killed while events wait, are tried, and go out.

use std::time::Duration;

use postbox::oracle::Load;

use super::{LARGE, SMALL, limit};
use crate::poison::create_topic;
use crate::support::{Fixture, Relay, wait_until};

/// So often tried that what is too large for a while is not given up, and what can never go
/// out is.
const FLAGS: [&str; 10] = [
    "--retry-backoff-min",
    "50ms",
    "--retry-backoff-max",
    "400ms",
    "--max-attempts",
    "20",
    "--heartbeat-interval",
    "1s",
    "--in-flight-max",
    "500",
];

fn load(fixture: &Fixture) -> Load {
    Load {
        keys: 40,
        pause_percent: 5,
        poison_per_mille: 2,
        bulky_per_mille: 5,
        bulk: 5000,
        scheduled_per_mille: 20,
        events_per_second: 500.0,
        ..fixture.load()
    }
}

/// Waits until nothing is left that a relay could send.
async fn wait_until_done(fixture: &Fixture) {
    let sql = "SELECT count(*) FROM postbox.parked WHERE status IN ('scheduled', 'waiting')";
    wait_until("nothing waits", async || {
        let row = fixture.client.query_one(sql, &[]).await.unwrap();
        row.get::<_, i64>(0) == 0
    })
    .await;
}

/// Each committed event is in Kafka or a dead letter, those of a key in order, though a
/// topic takes large ones only now and then, and relays end as `next` says.
async fn assert_loses_nothing(
    fixture: &Fixture,
    next: impl AsyncFn(usize) -> Relay,
    rounds: usize,
) {
    create_topic(fixture, SMALL).await;
    let writers = fixture.writers(load(fixture));
    for round in 0..rounds {
        let mut relay = next(round).await;
        limit(fixture, [SMALL, LARGE][round % 2]).await;
        tokio::time::sleep(Duration::from_millis(900)).await;
        if relay.is_running() {
            relay.kill();
        }
    }
    writers.stop().await.unwrap();
    limit(fixture, LARGE).await;
    let relay = next(rounds).await;
    let sql = "SELECT count(*) FROM postbox_oracle.ledger";
    let committed: i64 = fixture.client.query_one(sql, &[]).await.unwrap().get(0);
    wait_until("all is read", async || {
        let sql = "SELECT count(*) FROM postbox.parked WHERE status = 'dead'";
        let dead: i64 = fixture.client.query_one(sql, &[]).await.unwrap().get(0);
        let mut ids: Vec<_> = fixture.records().await.iter().map(|seen| seen.id).collect();
        ids.sort_unstable();
        ids.dedup();
        ids.len() as i64 + dead >= committed
    })
    .await;
    wait_until_done(fixture).await;
    relay.drain().await;
    let verdict = fixture.verdict().await;
    println!("{verdict}");
    assert!(verdict.is_clean(usize::MAX), "{verdict}");
    assert!(verdict.dead > 0 && verdict.committed > 500, "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_a_slot_a_kill_loop_loses_nothing() {
    let fixture = Fixture::new().await;
    let next = async |_| Relay::streaming(&fixture, &FLAGS).await;
    assert_loses_nothing(&fixture, next, 6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn polling_a_kill_loop_loses_nothing() {
    let fixture = Fixture::empty().await;
    fixture.set_up_polling().await;
    let flags = [
        &FLAGS[..],
        &["--mode", "poll", "-X", "compression.codec=none"],
    ]
    .concat();
    let next = async |_| {
        let mut relay = Relay::start(&fixture, &flags);
        relay.wait_for_log(" INFO polling ").await;
        relay
    };
    assert_loses_nothing(&fixture, next, 6).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn divided_a_kill_loop_loses_nothing() {
    let fixture = Fixture::empty().await;
    fixture.set_up_polling().await;
    let flags = [&FLAGS[..], &["--mode", "poll", "--shards", "2"]].concat();
    let mut other = Relay::start(&fixture, &flags);
    other.wait_for_log("slices").await;
    let next = async |_| {
        let mut relay = Relay::start(&fixture, &flags);
        relay.wait_for_log("slices").await;
        relay
    };
    assert_loses_nothing(&fixture, next, 5).await;
    other.drain().await;
}

/// At each step of parking and of trying again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_step_of_what_waits_loses_nothing() {
    let fixture = Fixture::new().await;
    let steps = ["parking", "parked", "settling", "settled"];
    let next = async |round: usize| {
        let Some(step) = steps.get(round / 2) else {
            return Relay::streaming(&fixture, &FLAGS).await;
        };
        let mut command = Relay::command(&fixture, &FLAGS);
        let failpoint = format!("{step}={}*off->panic", 2 + round % 2 * 5);
        let mut relay = Relay::spawn(command.env("FAILPOINTS", failpoint));
        assert_eq!(relay.exit_code().await, -1, "{step}: {}", relay.log());
        relay
    };
    assert_loses_nothing(&fixture, next, 2 * steps.len()).await;
}
