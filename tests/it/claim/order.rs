//! What holds a key back, and what does not.

use super::{OMNI_BOX, claiming};
use crate::support::{Fixture, Relay, connect, wait_until};

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
    let state = "scheduled_at = now() + interval '1 h', last_error = 'once', attempts_made = 1";
    first_of_a(&fixture, state).await;
    let relay = claiming(&fixture, &[]).await;
    wait_for_keys(&fixture, &["b"]).await;
    stays(&fixture, &["b"]).await;
    let due = "UPDATE outbox_events SET scheduled_at = now() WHERE payload = '1'";
    fixture.client.execute(due, &[]).await.unwrap();
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

/// Not even where claims are slow, so that it takes a while to pass them all over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_rows_of_many_keys_that_are_held_hold_up_no_other() {
    let fixture = Fixture::omni_box().await;
    // Of each key a claim finds more than it can look at.
    fixture.omni_box_backlog(6_060, 6).await;
    // One key after the other, the first row of each claimed.
    let hold = "UPDATE outbox_events SET scheduled_at = created_at + right(partition_key, 1)::integer * interval '1 minute'; \
                UPDATE outbox_events SET locked_at = now(), locked_by = 'another' WHERE (payload ->> 'n')::integer <= 6";
    fixture.client.batch_execute(hold).await.unwrap();
    fixture.insert("b", "{}").await;
    let mut command = Relay::command(&fixture, &OMNI_BOX);
    let relay = Relay::spawn(command.env("FAILPOINTS", "claiming_rows=sleep(300)"));
    wait_for_keys(&fixture, &["b"]).await;
    drop(relay);
}

/// It is not claimed, and nothing behind it; nor is the table looked at all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_rows_behind_one_that_is_locked_hold_up_no_other_and_keep_nobody_busy() {
    let fixture = Fixture::omni_box().await;
    fixture.omni_box_backlog(1_500, 1).await;
    fixture.insert("b", "{}").await;
    let locker = connect(&fixture.database_url).await;
    let lock = "BEGIN; SELECT FROM outbox_events WHERE payload ->> 'n' = '1' FOR UPDATE";
    locker.batch_execute(lock).await.unwrap();
    let relay = claiming(&fixture, &["--poll-interval-max", "2s"]).await;
    wait_for_keys(&fixture, &["b"]).await;
    // The server counts late.
    let pause = std::time::Duration::from_secs(3);
    tokio::time::sleep(pause).await;
    let before = fixture.transactions().await;
    tokio::time::sleep(pause).await;
    let transactions = fixture.transactions().await - before;
    // Two claims each two seconds, and what else a relay asks.
    println!("{transactions} transactions in {pause:?}");
    assert!(transactions < 20, "{transactions}");
    locker.batch_execute("ROLLBACK").await.unwrap();
    fixture.enter_payloads_in_ledger().await;
    let verdict = fixture.judge_claims(relay).await;
    assert!(
        verdict.committed == 1_501 && verdict.is_clean(0),
        "{verdict}"
    );
}

impl Fixture {
    /// How many transactions there were in the test's database.
    async fn transactions(&self) -> i64 {
        let sql = "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()";
        self.client.query_one(sql, &[]).await.unwrap().get(0)
    }

    /// Enters what is not in the oracle's ledger, in the order of creation.
    pub(super) async fn enter_payloads_in_ledger(&self) {
        let sql = "INSERT INTO postbox_oracle.ledger \
                   SELECT id, partition_key, (extract(epoch FROM created_at) * 1000000)::bigint FROM outbox_events AS o \
                   WHERE NOT EXISTS (SELECT FROM postbox_oracle.ledger AS l WHERE l.id = o.id)";
        self.client.batch_execute(sql).await.unwrap();
    }
}
