//! What holds a key back, and what does not.

use super::claiming;
use crate::support::{Fixture, connect, wait_until};

/// Rows of two keys, `a` twice; the first of `a` is in this state.
async fn first_of_a(fixture: &Fixture, state: &str) {
    for (key, payload) in [("a", "1"), ("a", "2"), ("b", "3")] {
        let sql = format!(
            "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
             VALUES ('{}', '{key}', 'changed', '{payload}')",
            fixture.topic
        );
        fixture.client.batch_execute(&sql).await.unwrap();
    }
    let sql = format!("UPDATE outbox_events SET {state} WHERE payload = '1'");
    fixture.client.batch_execute(&sql).await.unwrap();
}

async fn wait_for_keys(fixture: &Fixture, expected: &[&str]) {
    let what = format!("{expected:?} are delivered");
    wait_until(&what, async || fixture.keys().await == expected).await;
}

/// Long enough for what must not come to have come.
async fn stays(fixture: &Fixture, expected: &[&str]) {
    tokio::time::sleep(std::time::Duration::from_millis(700)).await;
    assert_eq!(fixture.keys().await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_another_has_claimed_holds_its_key() {
    let fixture = Fixture::omni_box().await;
    let state = "locked_at = now(), locked_by = 'another'";
    first_of_a(&fixture, state).await;
    let relay = claiming(&fixture, &[]).await;
    wait_for_keys(&fixture, &["b"]).await;
    stays(&fixture, &["b"]).await;
    let done = "UPDATE outbox_events SET status = 'completed', completed_at = now(), locked_at = NULL, locked_by = NULL \
                WHERE locked_by = 'another'";
    fixture.client.batch_execute(done).await.unwrap();
    wait_for_keys(&fixture, &["a", "b"]).await;
    relay.drain().await;
}

/// And its claim is released when it has run out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_whose_claim_has_run_out_is_claimed_in_its_place() {
    let fixture = Fixture::omni_box().await;
    let state = "locked_at = now() - interval '301 s', locked_by = 'dead'";
    first_of_a(&fixture, state).await;
    let relay = claiming(&fixture, &[]).await;
    wait_for_keys(&fixture, &["a", "a", "b"]).await;
    fixture.enter_payloads_in_ledger().await;
    let verdict = fixture.judge_claims(relay).await;
    assert!(verdict.committed == 3 && verdict.is_clean(0), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_waits_to_be_tried_again_holds_its_key() {
    let fixture = Fixture::omni_box().await;
    let state = "scheduled_at = now() + interval '3 s', last_error = 'once', attempts_made = 1";
    first_of_a(&fixture, state).await;
    let relay = claiming(&fixture, &[]).await;
    wait_for_keys(&fixture, &["b"]).await;
    stays(&fixture, &["b"]).await;
    wait_for_keys(&fixture, &["a", "a", "b"]).await;
    fixture.enter_payloads_in_ledger().await;
    let verdict = fixture.judge_claims(relay).await;
    assert!(verdict.committed == 3 && verdict.is_clean(0), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_scheduled_for_later_or_has_failed_holds_nobody() {
    for state in [
        "scheduled_at = now() + interval '1 day'",
        "status = 'failed', attempts_made = 6, last_error = 'six times'",
        "status = 'completed', completed_at = now()",
    ] {
        let fixture = Fixture::omni_box().await;
        first_of_a(&fixture, state).await;
        let relay = claiming(&fixture, &[]).await;
        wait_for_keys(&fixture, &["a", "b"]).await;
        relay.drain().await;
        stays(&fixture, &["a", "b"]).await;
    }
}

/// A transaction that has the row locked, as a worker has that is just claiming it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_behind_one_that_is_just_being_claimed_are_not() {
    let fixture = Fixture::omni_box().await;
    first_of_a(&fixture, "updated_at = now()").await;
    let other = connect(&fixture.database_url).await;
    let lock = "BEGIN; SELECT FROM outbox_events WHERE payload = '1' FOR UPDATE";
    other.batch_execute(lock).await.unwrap();
    let relay = claiming(&fixture, &[]).await;
    wait_for_keys(&fixture, &["b"]).await;
    stays(&fixture, &["b"]).await;
    other.batch_execute("ROLLBACK").await.unwrap();
    wait_for_keys(&fixture, &["a", "a", "b"]).await;
    fixture.enter_payloads_in_ledger().await;
    let verdict = fixture.judge_claims(relay).await;
    assert!(verdict.committed == 3 && verdict.is_clean(0), "{verdict}");
}

/// They fill many claims.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_rows_of_a_key_that_is_held_hold_up_no_other() {
    let fixture = Fixture::omni_box().await;
    fixture.omni_box_backlog(5_000, 1).await;
    let hold = "UPDATE outbox_events SET locked_at = now(), locked_by = 'another' \
                WHERE created_at = (SELECT min(created_at) FROM outbox_events)";
    fixture.client.batch_execute(hold).await.unwrap();
    fixture.insert("b", "{}").await;
    let relay = claiming(&fixture, &[]).await;
    wait_for_keys(&fixture, &["b"]).await;
    let free = "UPDATE outbox_events SET locked_at = NULL, locked_by = NULL";
    fixture.client.batch_execute(free).await.unwrap();
    fixture.enter_payloads_in_ledger().await;
    let verdict = fixture.judge_claims(relay).await;
    assert!(
        verdict.committed == 5_001 && verdict.is_clean(0),
        "{verdict}"
    );
}

impl Fixture {
    /// Enters what is not in the oracle's ledger, in the order of creation.
    pub(super) async fn enter_payloads_in_ledger(&self) {
        let sql = "INSERT INTO postbox_oracle.ledger \
                   SELECT id, partition_key, (extract(epoch FROM created_at) * 1000000)::bigint FROM outbox_events AS o \
                   WHERE NOT EXISTS (SELECT FROM postbox_oracle.ledger AS l WHERE l.id = o.id)";
        self.client.batch_execute(sql).await.unwrap();
    }
}
