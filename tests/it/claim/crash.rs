//! A crash at each step of a row's way.

use tokio::task::JoinSet;

use super::{OMNI_BOX, claiming};
use crate::support::{Fixture, Relay, SMALL_WINDOW, WINDOW, wait_until};

/// The steps, and at which passage the relay crashes.
const STEPS: [(&str, u32); 7] = [
    ("claiming_rows", 5),
    ("rows_claimed", 5),
    ("received", 500),
    ("sent", 500),
    ("delivered", 500),
    ("completing", 5),
    ("completed", 5),
];

/// What a crash repeats: what was delivered and not completed.
pub(super) const REPEATED_MAX: usize = WINDOW + 1_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_step_loses_nothing() {
    let mut crashing = JoinSet::new();
    for (step, passage) in STEPS {
        crashing.spawn(crash_at(step, passage));
    }
    while let Some(crashed) = crashing.join_next().await {
        crashed.unwrap();
    }
}

async fn crash_at(step: &str, passage: u32) {
    let fixture = Fixture::omni_box().await;
    let writers = fixture.writers(fixture.steady_load());
    let flags = [&OMNI_BOX[..], &SMALL_WINDOW].concat();
    let mut command = Relay::command(&fixture, &flags);
    let failpoint = format!("{step}={}*off->panic", passage - 1);
    let mut relay = Relay::spawn(command.env("FAILPOINTS", failpoint));
    assert_eq!(relay.exit_code().await, -1, "{step}: {}", relay.log());
    wait_until("more is committed than may be repeated", async || {
        writers.committed() > REPEATED_MAX as u64
    })
    .await;
    writers.stop().await.unwrap();
    let relay = claiming(&fixture, &SMALL_WINDOW).await;
    let verdict = fixture.judge_claims(relay).await;
    println!("{step}: repeated at most {REPEATED_MAX}: {verdict}");
    assert!(verdict.is_clean(REPEATED_MAX), "{step}: {verdict}");
}

/// A row that was refused is not lost with the note of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_before_a_refusal_is_written_has_it_tried_again() {
    let fixture = Fixture::omni_box().await;
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
               VALUES ('not a topic', 'a', 'changed', '{}')";
    fixture.client.batch_execute(sql).await.unwrap();
    let mut command = Relay::command(&fixture, &OMNI_BOX);
    let mut relay = Relay::spawn(command.env("FAILPOINTS", "refusing=panic"));
    assert_eq!(relay.exit_code().await, -1, "{}", relay.log());
    assert_eq!(fixture.rows_that_are("attempts_made = 0").await, 1);
    let relay = claiming(&fixture, &[]).await;
    wait_until("it is tried again", async || {
        fixture.rows_that_are("attempts_made = 1").await == 1
    })
    .await;
    relay.drain().await;
}
