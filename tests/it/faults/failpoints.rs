//! A crash at each step of an event's way, and again while the next relay recovers
//! from it.

use std::sync::Arc;

use postbox::oracle::Load;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::support::{Fixture, Relay, wait_until};

/// The steps, and at which passages the relays that follow each other crash: in the
/// midst of things, and then twice at the start of what is repeated. The failpoints
/// are where src/ says `failpoint!`.
const STEPS: &[(&str, [u32; 3])] = &[
    ("checked", [1, 1, 1]),
    ("opened", [1, 1, 1]),
    ("received", [500, 1, 2]),
    ("positioned", [100, 1, 2]),
    ("sending", [500, 1, 2]),
    ("sent", [500, 1, 2]),
    ("reported", [500, 1, 2]),
    ("delivering", [500, 1, 2]),
    ("delivered", [500, 1, 2]),
    ("confirming", [50, 1, 2]),
    ("confirmed", [50, 1, 2]),
    ("fencing", [2, 1, 1]),
    ("drained", [1, 1, 1]),
    ("told", [1, 1, 1]),
];

/// Steps that only a relay takes that is told to stop.
const STOPPING: [&str; 2] = ["drained", "told"];

const IN_FLIGHT_MAX: usize = 200;

/// What a crash may repeat: what was in flight, the rest of a transaction, and what
/// was delivered within a status interval, which a slow machine may stretch.
const WINDOW: usize = IN_FLIGHT_MAX + 10 + 1000;

const FLAGS: [&str; 4] = ["--in-flight-max", "200", "--heartbeat-interval", "1s"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_step_and_again_in_recovery_loses_nothing() {
    let mut crashing = JoinSet::new();
    let at_once = Arc::new(Semaphore::new(4));
    for (step, passages) in STEPS {
        let at_once = Arc::clone(&at_once);
        crashing.spawn(async move {
            let _permit = at_once.acquire().await;
            crash_at(step, *passages).await;
        });
    }
    while let Some(crashed) = crashing.join_next().await {
        crashed.unwrap();
    }
}

async fn crash_at(step: &str, passages: [u32; 3]) {
    let fixture = Fixture::new().await;
    let writers = fixture.writers(Load {
        events_per_second: 1000.0,
        ..fixture.load()
    });
    for passage in passages {
        let failpoint = format!("{step}={}panic", before(passage));
        let mut command = Relay::command(&fixture, &FLAGS);
        let mut relay = Relay::spawn(command.env("FAILPOINTS", &failpoint));
        if STOPPING.contains(&step) {
            relay.wait_for_log("streaming").await;
            wait_until("an event is delivered", || async {
                relay.published(&fixture.topic) > 0
            })
            .await;
            relay.signal("TERM");
        }
        // None: a signal ended it.
        assert_eq!(relay.exit_code().await, -1, "{failpoint}: {}", relay.log());
        assert!(
            relay.log().contains(&format!("failpoint {step} panic")),
            "{failpoint}: {}",
            relay.log()
        );
    }
    writers.stop().await.unwrap();
    let relay = Relay::streaming(&fixture, &FLAGS).await;
    let verdict = fixture.judge(relay).await;
    assert!(
        verdict.committed > 100 && verdict.is_clean(passages.len() * WINDOW),
        "{step}: {verdict}"
    );
}

/// The passages that nothing happens at.
fn before(passage: u32) -> String {
    match passage - 1 {
        0 => String::new(),
        passages => format!("{passages}*off->"),
    }
}
