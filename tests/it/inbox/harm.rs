//! Consumers that come and go, and end in the middle of something.

use std::time::Duration;

use super::{Event, Stage};
use crate::support::Relay;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumers_that_are_killed_in_a_loop_handle_each_message_once() {
    let stage = Stage::new(4).await;
    let mut events = Vec::new();
    let flags = ["--batch-max", "50", "-X", "session.timeout.ms=6000"];
    let mut inboxes: Vec<Relay> = (0..2).map(|_| stage.handling(&flags)).collect();
    for turn in 0..10 {
        let more: Vec<Event> = (0..1_000)
            .map(|n| Event::of(&format!("k{}", n % 100), turn * 10 + n / 100))
            .collect();
        stage.produce(&more);
        events.extend(more);
        tokio::time::sleep(Duration::from_millis(700)).await;
        inboxes.remove(0).kill();
        inboxes.push(stage.handling(&flags));
    }
    stage.wait_for_effects(events.len() as i64).await;
    for inbox in inboxes {
        inbox.drain().await;
    }
    stage.assert_once_and_in_order(&events).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_that_move_between_consumers_repeat_nothing() {
    let stage = Stage::new(6).await;
    let mut events = Vec::new();
    let first = stage.handling(&["--batch-max", "50"]);
    let mut others: Vec<Relay> = Vec::new();
    for turn in 0..6 {
        let more: Vec<Event> = (0..1_000)
            .map(|n| Event::of(&format!("k{}", n % 100), turn * 10 + n / 100))
            .collect();
        stage.produce(&more);
        events.extend(more);
        match others.pop() {
            Some(other) if turn % 2 == 1 => other.drain().await,
            Some(other) => others.push(other),
            None => others.push(stage.handling(&["--batch-max", "50"])),
        }
    }
    stage.wait_for_effects(events.len() as i64).await;
    for inbox in others {
        inbox.drain().await;
    }
    first.drain().await;
    stage.assert_once_and_in_order(&events).await;
}
