//! A crash at each step of an event's way, and again while the next relay recovers
//! from it; and at each step of the recovery of a slot.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::support::{Fixture, Relay, SLOT_WINDOW, SMALL_WINDOW, WINDOW, wait_until};

/// What all crashes of a step may repeat.
const REPEATED_MAX: usize = 3 * WINDOW;

/// So many events that they cannot all be repeated.
const MANY: u32 = 2 * REPEATED_MAX as u32;

/// The steps, and at which passages the relays that follow each other crash: in the
/// midst of things, and then twice at the start of what is repeated. The failpoints
/// are where src/ says `failpoint!`.
const STEPS: &[(&str, [u32; 3])] = &[
    ("checked", [1, 1, 1]),
    ("opened", [1, 1, 1]),
    ("claiming", [1, 1, 1]),
    ("claim_written", [1, 1, 1]),
    ("claimed", [1, 1, 1]),
    ("received", [MANY, 1, 2]),
    ("positioned", [MANY / 10, 1, 2]),
    ("sending", [MANY, 1, 2]),
    ("sent", [MANY, 1, 2]),
    ("reported", [MANY, 1, 2]),
    ("delivering", [MANY, 1, 2]),
    ("delivered", [MANY, 1, 2]),
    ("confirming", [MANY / 10, 1, 2]),
    ("confirmed", [MANY / 10, 1, 2]),
    ("storing_position", [5, 1, 2]),
    ("position_stored", [5, 1, 2]),
    ("fencing", [5, 1, 1]),
    ("fenced", [5, 1, 1]),
    ("drained", [1, 1, 1]),
    ("told", [1, 1, 1]),
];

/// Steps that only a relay takes that is told to stop.
const STOPPING: [&str; 2] = ["drained", "told"];

/// The steps of `postbox recover`.
const RECOVERY: [&str; 6] = [
    "recovery_beginning",
    "recovery_begun",
    "slot_dropped",
    "slot_created",
    "recovery_finishing",
    "recovery_finished",
];

/// The steps of a relay that reads what a lost slot did not give.
const GAP: [&str; 2] = ["storing_seq", "seq_stored"];

/// How many fixtures are harmed at once: most of their time is waiting.
const AT_ONCE: usize = 6;

fn flags() -> Vec<&'static str> {
    [&SMALL_WINDOW[..], &["--heartbeat-interval", "1s"]].concat()
}

/// A relay that ends at this failpoint, as what `FAILPOINTS` takes.
fn start(fixture: &Fixture, failpoint: &str) -> Relay {
    let mut command = Relay::command(fixture, &flags());
    Relay::spawn(command.env("FAILPOINTS", failpoint))
}

async fn assert_crashed(mut relay: Relay, step: &str) {
    // None: a signal ended it.
    assert_eq!(relay.exit_code().await, -1, "{step}: {}", relay.log());
    let log = relay.log();
    assert!(log.contains(&format!("failpoint {step} panic")), "{log}");
}

/// Steps that tests elsewhere cross: the taking over of a slot, in `setup::slot`, and what
/// only polling, tables of others and partitions have, in `poll`, `claim`, `tables` and
/// `partitions`; what waits, in `parking`; and cleaning up, in `cleanup`.
const ELSEWHERE: [&str; 35] = [
    "making_partitions",
    "partitions_made",
    "taking_over",
    "renewing",
    "polling_begun",
    "adopting",
    "dividing",
    "divided",
    "claiming_slices",
    "slices_claimed",
    "wanting",
    "wanted",
    "storing_slices",
    "slices_stored",
    "renewing_slices",
    "handing_over",
    "handed_over",
    "merging",
    "claiming_rows",
    "rows_claimed",
    "completing",
    "completed",
    "refusing",
    "marking",
    "marked",
    "released",
    "parking",
    "parked",
    "settling",
    "settled",
    "dropping_partition",
    "cleaning",
    "cleaned",
    "clean_committed",
    "forgetting",
];

#[test]
fn every_failpoint_is_crossed() {
    let steps = STEPS.iter().map(|(step, _)| *step);
    let relay = steps.chain(RECOVERY).chain(GAP).chain(ELSEWHERE);
    let crossed: BTreeSet<&str> = relay.chain(crate::inbox::strategies::STEPS).collect();
    let source = sources(Path::new(env!("CARGO_MANIFEST_DIR")).join("src"));
    let calls = source.split("failpoint!(\"").skip(1);
    let placed: BTreeSet<&str> = calls
        .filter_map(|call| Some(call.split_once('"')?.0))
        .collect();
    assert_eq!(crossed, placed);
}

/// Everything below a folder, in one text.
fn sources(folder: PathBuf) -> String {
    let entries = std::fs::read_dir(folder).unwrap();
    let texts = entries.map(|entry| match entry.unwrap().path() {
        folder if folder.is_dir() => sources(folder),
        file => std::fs::read_to_string(file).unwrap(),
    });
    texts.collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_step_and_again_in_recovery_loses_nothing() {
    let mut crashing = JoinSet::new();
    let at_once = Arc::new(Semaphore::new(AT_ONCE));
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
    let writers = fixture.writers(fixture.steady_load());
    let first = Relay::streaming(&fixture, &flags()).await;
    if passages[0] == 1 {
        // There is something to repeat.
        fixture.outgrow(&first, REPEATED_MAX).await;
    }
    first.drain().await;
    for passage in passages {
        let relay = start(&fixture, &format!("{step}={}panic", before(passage)));
        if STOPPING.contains(&step) {
            wait_until("an event is delivered", || async {
                relay.log().contains("streaming") && relay.published(&fixture.topic) > 0
            })
            .await;
            relay.signal("TERM");
        }
        assert_crashed(relay, step).await;
    }
    wait_until("more is committed than may be repeated", || async {
        writers.committed() > u64::from(MANY)
    })
    .await;
    writers.stop().await.unwrap();
    let relay = Relay::streaming(&fixture, &flags()).await;
    fixture.assert_repeats_at_most(REPEATED_MAX, relay).await;
}

/// The passages that nothing happens at.
fn before(passage: u32) -> String {
    match passage - 1 {
        0 => String::new(),
        passages => format!("{passages}*off->"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_step_of_a_recovery_loses_nothing_and_it_can_be_run_again() {
    let fixture = Fixture::new().await;
    let writers = fixture.writers(fixture.steady_load());
    let relay = Relay::streaming(&fixture, &flags()).await;
    // Each step is another recovery, of another slot.
    let bound = RECOVERY.len() * SLOT_WINDOW;
    let mut relay = Some(relay);
    for step in RECOVERY {
        let running = relay.take().unwrap();
        fixture.outgrow(&running, SLOT_WINDOW).await;
        running.kill();
        match step {
            // There is a slot left to drop, which has missed something.
            "slot_dropped" => hide_from_slot(&fixture).await,
            _ => fixture.drop_slot().await,
        }
        let crashed = fixture.recover_until(step);
        let panicked = format!("failpoint {step} panic");
        assert!(crashed.complaint(-1).contains(&panicked), "{crashed:?}");
        // It would skip what the slot has missed.
        if step != "recovery_finished" {
            let mut early = Relay::start(&fixture, &flags());
            assert!([4, 5].contains(&early.exit_code().await), "{}", early.log());
        }
        assert_eq!(fixture.recover(&[]).code, 0, "{step}");
        if step == "recovery_begun" {
            for step in GAP {
                assert_crashed(start(&fixture, &format!("{step}=panic")), step).await;
            }
        }
        relay = Some(Relay::streaming(&fixture, &flags()).await);
    }
    writers.stop().await.unwrap();
    let relay = relay.unwrap();
    fixture.assert_repeats_at_most(bound, relay).await;
}

/// Changes the publication, so that the slot may have missed rows.
async fn hide_from_slot(fixture: &Fixture) {
    let again = "BEGIN; ALTER PUBLICATION postbox DROP TABLE postbox.outbox; \
                 ALTER PUBLICATION postbox ADD TABLE postbox.outbox; COMMIT";
    fixture.client.batch_execute(again).await.unwrap();
}
