//! Messages that fail.

use super::{Event, Stage};
use crate::support::wait_until;

/// Ten messages for each of twenty keys, in turns.
fn events() -> Vec<Event> {
    (0..200)
        .map(|n| Event::of(&format!("k{}", n % 20), n / 20))
        .collect()
}

/// The same, without these.
fn events_but(ids: &[&str]) -> Vec<Event> {
    let mut events = events();
    events.retain(|event| !ids.contains(&event.id.as_deref().unwrap()));
    events
}

async fn poison(stage: &Stage, ids: &[&str], what: &str) {
    for id in ids {
        let insert = format!("INSERT INTO poison VALUES ('{id}', '{what}')");
        stage.fixture.client.batch_execute(&insert).await.unwrap();
    }
}

#[tokio::test]
async fn a_message_that_fails_holds_its_key_and_nothing_else() {
    let stage = Stage::new(2).await;
    // The first, one in the middle, and the last.
    poison(&stage, &["k0-0", "k7-5", "k19-9"], "raise").await;
    stage.produce(&events());
    let inbox = stage.handling(&["--max-attempts", "1000", "--retry-backoff-max", "100ms"]);
    stage.wait_for_effects(200 - 10 - 5 - 1).await;
    wait_until("they are tried again", async || {
        let tried = "SELECT count(*) FROM postbox.inbox_message WHERE attempts > 2";
        stage.count(tried).await == 3
    })
    .await;
    assert_eq!(stage.effects().await.len(), 184);
    let error = "SELECT count(*) FROM postbox.inbox_message WHERE error LIKE 'poisoned k%(SQLSTATE P0001)%'";
    assert_eq!(stage.count(error).await, 3);
    let waiting = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'waiting'";
    assert_eq!(stage.count(waiting).await, 16);
    let cure = "TRUNCATE poison";
    stage.fixture.client.batch_execute(cure).await.unwrap();
    wait_until("none waits", async || stage.count(waiting).await == 0).await;
    // What comes now is handled at once again.
    let more: Vec<Event> = (0..20).map(|n| Event::of(&format!("k{n}"), 10)).collect();
    stage.produce(&more);
    stage.wait_for_effects(220).await;
    inbox.drain().await;
    stage
        .assert_once_and_in_order(&[events(), more].concat())
        .await;
}

#[tokio::test]
async fn a_message_that_fails_too_often_is_a_dead_letter_and_its_key_goes_on() {
    let stage = Stage::new(1).await;
    poison(&stage, &["k3-0"], "raise").await;
    poison(&stage, &["k4-2"], "failed: no such order").await;
    poison(&stage, &["k5-1"], "skipped").await;
    stage.produce(&events());
    let inbox = stage.handling(&["--max-attempts", "3"]);
    stage.wait_for_effects(198).await;
    inbox.drain().await;
    let dead = |id: &str, attempts: i32, error: &str| {
        format!(
            "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead' AND message_id = '{id}' \
             AND attempts = {attempts} AND error LIKE '{error}%' AND payload IS NOT NULL"
        )
    };
    assert_eq!(stage.count(&dead("k3-0", 3, "poisoned k3-0")).await, 1);
    assert_eq!(stage.count(&dead("k4-2", 1, "no such order")).await, 1);
    assert_eq!(
        stage
            .count("SELECT count(*) FROM postbox.inbox_message")
            .await,
        2
    );
    stage
        .assert_once_and_in_order(&events_but(&["k3-0", "k4-2"]))
        .await;
}

#[tokio::test]
async fn what_waits_is_handled_by_whoever_handles_from_now_on() {
    let stage = Stage::new(1).await;
    poison(&stage, &["k3-4"], "raise").await;
    stage.produce(&events());
    let patient = ["--retry-backoff-min", "1h", "--handler", "sql:handle"];
    let inbox = stage.start(&patient);
    stage.wait_for_effects(194).await;
    inbox.drain().await;
    // The application, which does nothing about them,
    let stored =
        "SELECT count(*) FROM postbox.inbox_message WHERE status = 'stored' AND attempts = 0";
    let inbox = stage.start(&[]);
    wait_until("they are the application's", async || {
        stage.count(stored).await == 6
    })
    .await;
    inbox.drain().await;
    // and the function again, which does.
    stage
        .fixture
        .client
        .batch_execute("TRUNCATE poison")
        .await
        .unwrap();
    let inbox = stage.start(&patient);
    stage.wait_for_effects(200).await;
    inbox.drain().await;
    stage.assert_once_and_in_order(&events()).await;
}

#[tokio::test]
async fn a_message_that_would_fail_at_the_commit_costs_itself() {
    let stage = Stage::new(1).await;
    poison(&stage, &["k3-4", "k5-9"], "defer").await;
    stage.produce(&events());
    let inbox = stage.handling(&["--max-attempts", "1"]);
    stage.wait_for_effects(198).await;
    inbox.drain().await;
    let dead = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead' AND error LIKE '%foreign key%'";
    assert_eq!(stage.count(dead).await, 2);
}

#[tokio::test]
async fn a_message_that_hangs_is_cancelled_and_costs_itself() {
    let stage = Stage::new(1).await;
    poison(&stage, &["k3-4"], "hang").await;
    stage.produce(&events());
    let inbox = stage.handling(&["--max-attempts", "2", "--handler-timeout", "500ms"]);
    let dead = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead' AND error = 'not done within 500ms'";
    wait_until("it is given up", async || stage.count(dead).await == 1).await;
    stage.wait_for_effects(199).await;
    inbox.drain().await;
    stage.assert_once_and_in_order(&events_but(&["k3-4"])).await;
}

#[tokio::test]
async fn a_message_that_ends_the_session_is_found_and_given_up() {
    let stage = Stage::new(1).await;
    poison(&stage, &["k3-4"], "die").await;
    stage.produce(&events());
    let inbox = stage.handling(&["--max-attempts", "2"]);
    let dead = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead' AND message_id = 'k3-4' \
                AND attempts > 2";
    wait_until("it is given up", async || stage.count(dead).await == 1).await;
    stage.wait_for_effects(199).await;
    inbox.drain().await;
    stage.assert_once_and_in_order(&events_but(&["k3-4"])).await;
}
