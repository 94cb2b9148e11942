//! What is written about claims while something else is.

use tokio_postgres::Client;

use super::spakky::{BY_CUSTOMER, claiming as claiming_messages};
use super::{LATE_MARKS, OMNI_BOX, claiming};
use crate::support::{Fixture, Relay, connect, wait_until};

/// Holds up renewals of claims on spakky's rows until this session ends.
async fn hold_up_renewals(fixture: &Fixture) -> Client {
    let sql = "CREATE FUNCTION hold_up() RETURNS trigger LANGUAGE plpgsql AS $$ \
               BEGIN PERFORM pg_advisory_xact_lock_shared(1); RETURN NEW; END $$; \
               CREATE TRIGGER hold_up BEFORE UPDATE ON spakky_event_outbox FOR EACH ROW \
               WHEN (OLD.claimed_at IS NOT NULL AND NEW.claimed_at <> OLD.claimed_at AND NEW.retry_count = OLD.retry_count) \
               EXECUTE FUNCTION hold_up()";
    fixture.client.batch_execute(sql).await.unwrap();
    let holder = connect(&fixture.database_url).await;
    let lock = "SELECT pg_advisory_lock(1)";
    holder.batch_execute(lock).await.unwrap();
    holder
}

async fn is_held_up(fixture: &Fixture) -> bool {
    let sql = "SELECT EXISTS (SELECT FROM pg_locks AS l JOIN pg_database AS d ON d.oid = l.database \
               WHERE l.locktype = 'advisory' AND NOT l.granted AND d.datname = current_database())";
    fixture.client.query_one(sql, &[]).await.unwrap().get(0)
}

/// The token of a row's claim is another by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_completed_while_its_claim_is_renewed_is_completed() {
    let fixture = Fixture::spakky().await;
    let relay = claiming_messages(&fixture, &LATE_MARKS).await;
    fixture.insert("first", "{}").await;
    fixture.wait_until_sent().await;
    let holder = hold_up_renewals(&fixture).await;
    fixture.insert("a", "{}").await;
    wait_until("a renewal is under way", async || {
        is_held_up(&fixture).await
    })
    .await;
    assert_eq!(fixture.records().await.len(), 2);
    // The end completes what is delivered.
    relay.signal("TERM");
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    drop(holder);
    let mut relay = relay;
    assert_eq!(relay.exit_code().await, 0, "{}", relay.log());
    let left = fixture.messages_that_are("published_at IS NULL").await;
    assert_eq!(left, 0, "{}", relay.log());
}

/// The first is put off, and the one behind it given back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_are_refused_while_their_claims_are_renewed_are_put_off_and_given_back() {
    let fixture = Fixture::spakky_with_key().await;
    let holder = hold_up_renewals(&fixture).await;
    // It takes some seconds until their turn has come: by then their claims are renewed.
    fixture.insert_many("good", "{}", 36).await;
    for _ in 0..2 {
        let bad = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, payload) VALUES ('not a topic', 'bad', '{}')";
        fixture.client.batch_execute(bad).await.unwrap();
    }
    let slow = ["--in-flight-max", "1", "-X", "linger.ms=100"];
    let mut relay = claiming_messages(&fixture, &[&BY_CUSTOMER[..], &slow].concat()).await;
    relay.wait_for_log("put off, as its table says").await;
    assert!(is_held_up(&fixture).await, "no renewal is under way");
    drop(holder);
    relay.drain().await;
    let bad = "event_name = 'not a topic' AND";
    let refused = format!("{bad} retry_count = 1 AND claimed_at IS NOT NULL");
    assert_eq!(fixture.messages_that_are(&refused).await, 1);
    let given_back = format!("{bad} retry_count = 0 AND claimed_at IS NULL");
    assert_eq!(fixture.messages_that_are(&given_back).await, 1);
}

/// The row that is refused is at the end of its attempts, and holds nobody. What was just
/// being claimed of its key goes back, and only then is more of it claimed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_behind_those_that_are_given_back_do_not_overtake_them() {
    let fixture = Fixture::omni_box().await;
    fixture.omni_box_backlog(2_500, 1).await;
    // The second claim is slow, and so is its way back.
    let sql = "UPDATE outbox_events SET headers = '[1]', attempts_made = 5 WHERE payload ->> 'n' = '900'; \
               DELETE FROM postbox_oracle.ledger AS l USING outbox_events AS o WHERE o.id = l.id AND o.attempts_made = 5; \
               CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ \
               BEGIN PERFORM pg_sleep(0.5); RETURN NEW; END $$; \
               CREATE TRIGGER slow BEFORE UPDATE ON outbox_events FOR EACH ROW \
               WHEN (OLD.locked_by IS DISTINCT FROM NEW.locked_by AND NEW.status = 'pending' AND OLD.payload ->> 'n' = '1500') \
               EXECUTE FUNCTION slow()";
    fixture.client.batch_execute(sql).await.unwrap();
    let relay = claiming(&fixture, &[]).await;
    let verdict = fixture.judge_claims(relay).await;
    assert!(
        verdict.committed == 2_499 && verdict.is_clean(0),
        "{verdict}"
    );
    assert_eq!(fixture.rows_that_are("status = 'failed'").await, 1);
}

/// Another may send them next. Only what is on its way to a broker by then may arrive.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_are_given_back_leave_no_more() {
    let mut fixture = Fixture::omni_box_with_servers().await;
    let one_by_one = ["-X", "batch.num.messages=1"];
    let mut command = Relay::command(&fixture, &[&OMNI_BOX[..], &one_by_one].concat());
    let mut relay = Relay::spawn(command.env("FAILPOINTS", "released=1*sleep(2000)->off"));
    relay.wait_for_log("polling, by claims").await;
    fixture.insert("a", "{}").await;
    fixture.wait_until_completed().await;
    fixture.kafka("pause");
    fixture.insert_many("a", "{}", 500).await;
    wait_until("all are sent", async || {
        relay.metric("postbox_in_flight_events") == 500.0
    })
    .await;
    let take = "UPDATE outbox_events SET locked_by = 'another' WHERE created_at = (SELECT max(created_at) FROM outbox_events)";
    fixture.client.batch_execute(take).await.unwrap();
    wait_until("the others are given back", async || {
        fixture.rows_that_are("locked_by IS NOT NULL").await == 1
    })
    .await;
    fixture.kafka("resume");
    let give =
        "UPDATE outbox_events SET locked_at = NULL, locked_by = NULL WHERE locked_by = 'another'";
    fixture.client.batch_execute(give).await.unwrap();
    fixture.enter_payloads_in_ledger().await;
    let verdict = fixture.judge_claims(relay).await;
    // librdkafka has five requests on the way.
    assert!(verdict.committed == 501 && verdict.is_clean(5), "{verdict}");
}
