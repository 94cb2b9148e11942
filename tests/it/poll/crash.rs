//! A crash at each step of an event's way, and of a change of the mode.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::{POLL, polling};
use crate::support::{Fixture, Relay, SMALL_WINDOW, WINDOW, wait_until};

/// The steps, and at which passage the relay crashes.
const STEPS: [(&str, u32); 13] = [
    ("checked", 1),
    ("opened", 1),
    ("claiming", 1),
    ("claimed", 1),
    ("received", 500),
    ("positioned", 20),
    ("sending", 500),
    ("sent", 500),
    ("delivering", 500),
    ("delivered", 500),
    ("fencing", 5),
    ("fenced", 5),
    ("renewing", 2),
];

/// What two crashes may repeat. While the lease of the first ends, rows gather: those of
/// one gap, of which a mark is stored every 1,024, and go out faster than they came.
const REPEATED_MAX: usize = 2 * (WINDOW + 1_024);

/// How many fixtures are harmed at once: most of their time is waiting.
const AT_ONCE: usize = 6;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_step_loses_nothing() {
    let mut crashing = JoinSet::new();
    let at_once = Arc::new(Semaphore::new(AT_ONCE));
    for (step, passage) in STEPS {
        let at_once = Arc::clone(&at_once);
        crashing.spawn(async move {
            let _permit = at_once.acquire().await;
            crash_at(step, passage).await;
        });
    }
    while let Some(crashed) = crashing.join_next().await {
        crashed.unwrap();
    }
}

/// Two relays in turn end at this step; what they leave is another's.
async fn crash_at(step: &str, passage: u32) {
    let fixture = Fixture::polling().await;
    let writers = fixture.writers(fixture.steady_load());
    let flags = [&POLL[..], &SMALL_WINDOW].concat();
    for _ in 0..2 {
        let mut command = Relay::command(&fixture, &flags);
        let failpoint = format!("{step}={}*off->panic", passage - 1);
        let mut relay = Relay::spawn(command.env("FAILPOINTS", failpoint));
        assert_eq!(relay.exit_code().await, -1, "{step}: {}", relay.log());
        let log = relay.log();
        assert!(log.contains(&format!("failpoint {step} panic")), "{log}");
    }
    wait_until("more is committed than may be repeated", async || {
        writers.committed() > 2 * REPEATED_MAX as u64
    })
    .await;
    writers.stop().await.unwrap();
    let relay = polling(&fixture, &SMALL_WINDOW).await;
    let verdict = fixture.judge_polling(relay).await;
    println!("{step}: repeated at most {REPEATED_MAX}: {verdict}");
    assert!(verdict.is_clean(REPEATED_MAX), "{step}: {verdict}");
}

/// A change that was cut short has left a slot, which keeps WAL: the next run drops it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_of_the_mode_that_was_cut_short_is_finished_by_the_next_run() {
    let fixture = Fixture::new().await;
    fixture.insert("a", "{}").await;
    let crashed = fixture.setup_until("polling_begun", &POLL);
    assert!(
        crashed
            .complaint(-1)
            .contains("failpoint polling_begun panic")
    );
    let setup = fixture.setup(&POLL);
    let slot = format!("replication slot \"{}\": dropped", fixture.contract.slot);
    assert!(setup.results().contains(&slot), "{setup:?}");
    assert!(!fixture.setup(&POLL).results().contains("dropped"));
    let relay = polling(&fixture, &[]).await;
    fixture.wait_for_checkpoint().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["a"]);
}
