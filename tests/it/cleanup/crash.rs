//! A relay that cleans up while it carries events, killed at each step.

use super::FENCES;
use crate::support::{Fixture, Relay, SMALL_WINDOW, WINDOW, wait_until};

/// Steps of cleaning up and of what that goes by, and at which passage the relay is killed.
const STEPS: [(&str, u32); 8] = [
    ("cleaning", 2),
    ("cleaned", 2),
    ("clean_committed", 1),
    ("fencing", 3),
    ("fenced", 3),
    ("delivering", 800),
    ("delivered", 800),
    ("confirming", 40),
];

/// It removes what it has just published.
const EAGER: [&str; 4] = ["--cleanup-interval", "1s", "--cleanup-older-than", "1s"];

/// Where a relay polls, what goes out of a gap before a mark of it is stored.
const REPEATED_MAX: usize = STEPS.len() * (WINDOW + 1_024);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_with_a_slot_that_is_killed_at_any_step_has_removed_nothing_unpublished() {
    let fixture = Fixture::new().await;
    kill_at_each_step(&fixture, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_polls_and_is_killed_at_any_step_has_removed_nothing_unpublished() {
    let fixture = Fixture::empty().await;
    fixture.set_up_polling().await;
    kill_at_each_step(&fixture, &["--mode", "poll"]).await;
}

async fn kill_at_each_step(fixture: &Fixture, mode: &[&str]) {
    let flags = [mode, &FENCES, &EAGER, &SMALL_WINDOW].concat();
    // Each row may go as soon as it is published, so that one that goes before is missed.
    fixture
        .sql(
            "CREATE FUNCTION long_ago() RETURNS trigger LANGUAGE plpgsql AS \
             $$BEGIN NEW.created_at = now() - interval '1 hour'; RETURN NEW; END$$; \
             CREATE TRIGGER long_ago BEFORE INSERT ON postbox.outbox FOR EACH ROW EXECUTE FUNCTION long_ago()",
        )
        .await;
    let writers = fixture.writers(fixture.steady_load());
    let mut gone = 0;
    for (step, passage) in STEPS {
        let mut command = Relay::command(fixture, &flags);
        // So slow that there always is something that is not published yet.
        let slow = if step.starts_with("clean") {
            "sent=sleep(2);"
        } else {
            ""
        };
        let failpoint = format!("{slow}{step}={}*off->panic", passage - 1);
        let mut relay = Relay::spawn(command.env("FAILPOINTS", failpoint));
        assert_eq!(relay.exit_code().await, -1, "{step}: {}", relay.log());
        let log = relay.log();
        assert!(log.contains(&format!("failpoint {step} panic")), "{log}");
        gone = fixture.assert_gone_is_published().await;
    }
    assert!(gone > 0, "nothing was removed");
    writers.stop().await.unwrap();
    let mut relay = Relay::start(fixture, &flags);
    relay.wait_for_log("serving http").await;
    wait_until("all is published, removed and counted", async || {
        let cleaned = relay.metric("postbox_cleaned_rows_total{table=\"outbox\"}");
        cleaned > 0.0 && fixture.count("postbox.outbox").await == 0
    })
    .await;
    relay.drain().await;
    let verdict = fixture.verdict().await;
    println!("{verdict}");
    assert!(
        verdict.committed > WINDOW && verdict.is_clean(REPEATED_MAX),
        "{verdict}"
    );
}
