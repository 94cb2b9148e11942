//! The table of `inbox::strategy`, cell by cell.

use super::{Event, Stage};
use crate::support::{Relay, wait_until};

const AT_MOST_ONCE: &[&str] = &["--ack", "at-most-once"];
const ON_PERSIST: &[&str] = &["--ack", "at-least-once", "--commit", "on-persist"];
const ON_SUCCESS: &[&str] = &["--ack", "at-least-once", "--commit", "on-success"];
const EXACTLY_ONCE: &[&str] = &["--ack", "exactly-once"];

const STRATEGIES: [&[&str]; 4] = [AT_MOST_ONCE, ON_PERSIST, ON_SUCCESS, EXACTLY_ONCE];

/// One that comes back under its name need not wait until the group has missed it.
const ONE: [&str; 2] = ["--instance", "one"];

/// Ten messages for each of ten keys, in turns.
fn events() -> Vec<Event> {
    (0..100)
        .map(|n| Event::of(&format!("k{}", n % 10), n / 10))
        .collect()
}

async fn sql(stage: &Stage, sql: &str) {
    stage.fixture.client.batch_execute(sql).await.unwrap();
}

async fn wait_until_none_waits(stage: &Stage) {
    wait_until("none waits", async || {
        let waiting = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'waiting'";
        stage.count(waiting).await == 0
    })
    .await;
}

async fn wait_until_read(stage: &Stage, offset: i64) {
    wait_until("all is read", async || {
        let read = "SELECT coalesce(sum(next_offset), 0)::bigint FROM postbox.inbox_offset";
        stage.count(read).await == offset
    })
    .await;
}

const DEAD: &str =
    "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead' AND message_id = 'k3-4'";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_fails_is_tried_again_but_for_at_most_once() {
    for strategy in STRATEGIES {
        let stage = Stage::new(1).await;
        sql(&stage, "INSERT INTO poison VALUES ('k3-4')").await;
        stage.produce(&events());
        let inbox = stage.handling(strategy);
        let others = if strategy == AT_MOST_ONCE { 99 } else { 94 };
        stage.wait_for_effects(others).await;
        wait_until_read(&stage, 100).await;
        sql(&stage, "TRUNCATE poison").await;
        wait_until_none_waits(&stage).await;
        inbox.drain().await;
        let mut handled = events();
        let is_dead = stage.count(DEAD).await == 1;
        assert_eq!(is_dead, strategy == AT_MOST_ONCE, "{strategy:?}");
        if is_dead {
            handled.retain(|event| event.id.as_deref() != Some("k3-4"));
        }
        stage.assert_once_and_in_order(&handled).await;
    }
}

/// The table is empty when the planner first looks at it, and nothing is known of it: no statement
/// may read all that waits to find one. Counted by the server, and the same on any machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_is_found_without_reading_all_that_waits() {
    const MESSAGES: usize = 5_000;
    let stage = Stage::new(1).await;
    let schema = &stage.fixture.contract.schema;
    let no_statistics =
        format!("ALTER TABLE \"{schema}\".inbox_message SET (autovacuum_enabled = false)");
    sql(&stage, &no_statistics).await;
    let events: Vec<Event> = (0..MESSAGES)
        .map(|n| Event::of(&format!("k{}", n % 500), n / 500))
        .collect();
    stage.produce(&events);
    let inbox = stage.handling(ON_PERSIST);
    stage.wait_for_effects(MESSAGES as i64).await;
    wait_until_none_waits(&stage).await;
    inbox.drain().await;
    // Of each index, what was read to find messages, live or dead.
    let read = format!(
        "SELECT max(idx_tup_read) FROM pg_stat_user_indexes
         WHERE schemaname = '{schema}' AND relname = 'inbox_message'"
    );
    let read = stage.count(&read).await as usize;
    assert!(read > MESSAGES, "not counted yet: {read}");
    assert!(read < 30 * MESSAGES, "{read} read for {MESSAGES}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_that_fails_for_good_has_its_key_go_on() {
    for strategy in STRATEGIES {
        let stage = Stage::new(1).await;
        sql(&stage, "INSERT INTO poison VALUES ('k3-4')").await;
        stage.produce(&events());
        let inbox = stage.handling(&[strategy, &["--max-attempts", "3"]].concat());
        stage.wait_for_effects(99).await;
        inbox.drain().await;
        let attempts = if strategy == AT_MOST_ONCE { 1 } else { 3 };
        let dead = format!("{DEAD} AND attempts = {attempts}");
        assert_eq!(stage.count(&dead).await, 1, "{strategy:?}");
        let mut handled = events();
        handled.retain(|event| event.id.as_deref() != Some("k3-4"));
        stage.assert_once_and_in_order(&handled).await;
    }
}

/// What was handled after a crash, and that nothing was handled twice.
async fn assert_after_a_crash(stage: &Stage, strategy: &[&str]) {
    if strategy != AT_MOST_ONCE {
        stage.wait_for_effects(100).await;
        return stage.assert_once_and_in_order(&events()).await;
    }
    let effects = stage.effects().await;
    let handled = |event: &Event| effects.iter().any(|(id, ..)| event.id.as_ref() == Some(id));
    let mut expected = events();
    expected.retain(handled);
    stage.assert_once_and_in_order(&expected).await;
    // Those that were received, and no others, are lost.
    let received = "SELECT count(*) FROM postbox.inbox";
    assert_eq!(stage.count(received).await, 100);
    assert!(effects.len() < 100, "nothing was at work");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_ends_before_it_has_handled_a_message_loses_it_at_most_once_alone() {
    for strategy in STRATEGIES {
        let stage = Stage::new(1).await;
        stage.produce(&events());
        let handler = ["--handler", "sql:handle"];
        let mut command = stage.command(&[&handler, strategy, &ONE[..]].concat());
        let mut inbox = Relay::spawn(command.env("FAILPOINTS", "inbox_handling=panic"));
        assert_eq!(inbox.exit_code().await, -1);
        assert_eq!(stage.effects().await.len(), 0, "{strategy:?}");
        let mut inbox = stage.handling(&[strategy, &ONE[..]].concat());
        inbox.wait_for_log("reading on").await;
        wait_until_read(&stage, 100).await;
        wait_until_none_waits(&stage).await;
        assert_after_a_crash(&stage, strategy).await;
        inbox.drain().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_ends_with_a_handler_at_work_repeats_no_effect() {
    for strategy in STRATEGIES {
        let stage = Stage::new(1).await;
        sql(&stage, "INSERT INTO poison VALUES ('k3-4', 'hang')").await;
        stage.produce(&events());
        let inbox = stage.handling(&[strategy, &ONE[..]].concat());
        wait_until("a handler hangs", async || {
            let hangs = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' \
                         AND datname = current_database()";
            stage.count(hangs).await == 1
        })
        .await;
        inbox.kill();
        sql(&stage, "TRUNCATE poison").await;
        let mut inbox = stage.handling(&[strategy, &ONE[..]].concat());
        inbox.wait_for_log("reading on").await;
        wait_until_read(&stage, 100).await;
        wait_until_none_waits(&stage).await;
        assert_after_a_crash(&stage, strategy).await;
        inbox.drain().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_that_is_produced_again_is_not_handled_again() {
    for strategy in STRATEGIES {
        let stage = Stage::new(1).await;
        // One of them fails for good, and that counts.
        sql(&stage, "INSERT INTO poison VALUES ('k3-4')").await;
        stage.produce(&events());
        stage.produce(&events()[..50]);
        let inbox = stage.handling(&[strategy, &["--max-attempts", "1"]].concat());
        wait_until_read(&stage, 150).await;
        stage.produce(&events());
        wait_until_read(&stage, 250).await;
        wait_until_none_waits(&stage).await;
        stage.wait_for_effects(99).await;
        inbox.drain().await;
        let mut handled = events();
        handled.retain(|event| event.id.as_deref() != Some("k3-4"));
        stage.assert_once_and_in_order(&handled).await;
    }
}

/// Where a consumer is ended.
pub(crate) const STEPS: [&str; 8] = [
    "inbox_assigned",
    "inbox_claimed",
    "inbox_received",
    "inbox_handling",
    "inbox_handled",
    "inbox_committed",
    "inbox_taken",
    "inbox_retried",
];

/// At each step, at the first passage and at a later one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_step_loses_and_repeats_nothing() {
    for strategy in &STRATEGIES[1..] {
        let stage = Stage::new(2).await;
        // So that something is tried again.
        sql(&stage, "INSERT INTO poison VALUES ('k3-4', 'retry 100ms')").await;
        stage.produce(&events());
        for (n, step) in STEPS.into_iter().enumerate() {
            let flags = [
                "--handler",
                "sql:handle",
                "--batch-max",
                "7",
                "--retry-backoff-min",
                "100ms",
            ];
            let more = ["--max-attempts", "1000", "--retry-backoff-max", "200ms"];
            let mut command = stage.command(&[&flags[..], *strategy, &more, &ONE[..]].concat());
            let passages = if n < 2 { 0 } else { 2 };
            let failpoint = format!("{step}={passages}*off->panic");
            let mut inbox = Relay::spawn(command.env("FAILPOINTS", failpoint));
            stage.produce(&events()[..1]);
            let more: Vec<Event> = (0..50)
                .map(|m| Event::of(&format!("k{}", m % 10), 10 + n * 5 + m / 10))
                .collect();
            stage.produce(&more);
            assert_eq!(inbox.exit_code().await, -1, "{strategy:?} {step}");
        }
        sql(&stage, "TRUNCATE poison").await;
        let inbox = stage.handling(&[*strategy, &ONE[..]].concat());
        stage.wait_for_effects(500).await;
        inbox.drain().await;
        let later = (0..400).map(|m| Event::of(&format!("k{}", m % 10), 10 + m / 10));
        let all: Vec<Event> = events().into_iter().chain(later).collect();
        stage.assert_once_and_in_order(&all).await;
    }
}

#[test]
fn strategies_that_mean_nothing_are_refused() {
    let refused = |flags: &[&str]| {
        let needed = ["inbox", "--topics", "t", "--group", "g", "--brokers", "b:1"];
        let flags = [&needed, flags].concat();
        let output = crate::support::run(&mut crate::support::postbox(&flags));
        assert_eq!(output.code, 2, "{output:?}");
        output.stderr
    };
    let commit = refused(&["--handler", "sql:f", "--commit", "on-persist"]);
    assert!(
        commit.contains("use it with --ack at-least-once"),
        "{commit}"
    );
    for strategy in [AT_MOST_ONCE, ON_SUCCESS] {
        let none = refused(strategy);
        assert!(none.contains("or name a handler"), "{none}");
    }
}

/// All fail, and what is not read stays in Kafka.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_is_read_while_too_much_waits() {
    for strategy in &STRATEGIES[1..] {
        let stage = Stage::new(1).await;
        let poison = "INSERT INTO poison SELECT 'k' || k || '-' || v FROM generate_series(0, 9) AS k, \
                      generate_series(0, 99) AS v";
        sql(&stage, poison).await;
        let all: Vec<Event> = (0..1_000)
            .map(|n| Event::of(&format!("k{}", n % 10), n / 10))
            .collect();
        stage.produce(&all);
        let few = ["--waiting-max", "50", "--batch-max", "10"];
        let patient = ["--retry-backoff-max", "500ms", "--max-attempts", "1000"];
        let inbox = stage.handling(&[strategy, &few[..], &patient].concat());
        let waiting = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'waiting'";
        wait_until("it is full", async || stage.count(waiting).await >= 50).await;
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
        assert!(stage.count(waiting).await < 70, "{strategy:?}");
        sql(&stage, "TRUNCATE poison").await;
        stage.wait_for_effects(1_000).await;
        inbox.drain().await;
        stage.assert_once_and_in_order(&all).await;
    }
}
