//! How long claims last: ours, and those that others have left.

use std::time::{Duration, Instant};

use super::spakky::claiming as claiming_messages;
use super::{LATE_MARKS, claiming};
use crate::support::{Fixture, wait_until};

/// More than are given back at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_claims_that_have_run_out_are_given_back_within_seconds() {
    let fixture = Fixture::omni_box().await;
    fixture.omni_box_backlog(4_001, 1).await;
    let dead = "UPDATE outbox_events SET locked_at = now() - interval '301 s', locked_by = 'dead'";
    fixture.client.batch_execute(dead).await.unwrap();
    let since = Instant::now();
    let relay = claiming(&fixture, &[]).await;
    let verdict = fixture.judge_claims(relay).await;
    assert!(
        verdict.committed == 4_001 && verdict.is_clean(0),
        "{verdict}"
    );
    assert!(
        since.elapsed() < Duration::from_secs(8),
        "{:?}",
        since.elapsed()
    );
}

/// As they may be where a partitioned table has its primary key over both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_on_equal_ids_of_two_partitions_are_renewed_each() {
    let fixture = Fixture::omni_box().await;
    fixture.partition_omni_box().await;
    let relay = claiming(&fixture, &LATE_MARKS).await;
    fixture.insert("first", "{}").await;
    fixture.wait_until_completed().await;
    let sql = "INSERT INTO outbox_events SELECT (jsonb_populate_record(o, jsonb_build_object( \
                   'created_at', at, 'status', 'pending', 'completed_at', NULL, 'partition_key', key))).* \
               FROM outbox_events AS o, (VALUES ('2020-01-01Z'::timestamptz, 'a'), (now(), 'b')) AS n (at, key)";
    assert_eq!(fixture.client.execute(sql, &[]).await.unwrap(), 2);
    fixture.wait_until_completed().await;
    assert_eq!(fixture.keys().await, ["a", "b", "first"]);
    assert!(!relay.log().contains("taken away"), "{}", relay.log());
    relay.drain().await;
}

/// It has sent some of them, and could not write that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_stops_waits_for_claims_that_it_could_not_give_back() {
    let fixture = Fixture::spakky().await;
    let relay = claiming_messages(&fixture, &LATE_MARKS).await;
    fixture.insert("first", "{}").await;
    fixture.wait_until_sent().await;
    fixture.insert("a", "{}").await;
    wait_until("it is delivered", async || {
        fixture.records().await.len() == 2
    })
    .await;
    let cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity \
               WHERE datname = current_database() AND pid <> pg_backend_pid()";
    fixture.client.batch_execute(cut).await.unwrap();
    wait_until("it has begun again", async || {
        relay.log().matches("polling, by claims").count() == 2
    })
    .await;
    relay.drain().await;
    assert_eq!(fixture.messages_that_are("published_at IS NULL").await, 0);
}

/// By then it may be over: it is renewed before its rows are sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_takes_as_long_as_it_lasts_is_not_in_vain() {
    let fixture = Fixture::omni_box().await;
    let slow = "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ \
                BEGIN PERFORM pg_sleep(9.5); RETURN NEW; END $$; \
                CREATE TRIGGER slow BEFORE UPDATE ON outbox_events FOR EACH ROW \
                WHEN (OLD.locked_by IS NULL AND NEW.locked_by IS NOT NULL) EXECUTE FUNCTION slow()";
    fixture.client.batch_execute(slow).await.unwrap();
    fixture.insert("a", "{}").await;
    let relay = claiming(&fixture, &[]).await;
    let since = Instant::now();
    let verdict = {
        fixture.enter_payloads_in_ledger().await;
        fixture.judge_claims(relay).await
    };
    assert!(since.elapsed() < Duration::from_secs(20));
    assert!(verdict.committed == 1 && verdict.is_clean(0), "{verdict}");
}

/// What is written about claims must be done, however short others' statements must be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_whose_statements_must_be_short_completes_its_rows() {
    let mut fixture = Fixture::omni_box().await;
    let (role, url) = fixture.role("relay").await;
    let sql = format!(
        "GRANT SELECT, UPDATE ON outbox_events TO \"{role}\"; ALTER ROLE \"{role}\" SET statement_timeout = 500; \
         CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ \
         BEGIN PERFORM pg_sleep(0.8); RETURN NEW; END $$; \
         CREATE TRIGGER slow BEFORE UPDATE ON outbox_events FOR EACH ROW EXECUTE FUNCTION slow()"
    );
    fixture.client.batch_execute(&sql).await.unwrap();
    fixture.insert("a", "{\"n\": 1}").await;
    fixture.enter_payloads_in_ledger().await;
    fixture.database_url = url;
    let relay = claiming(&fixture, &[]).await;
    let verdict = fixture.judge_claims(relay).await;
    assert!(verdict.committed == 1 && verdict.is_clean(0), "{verdict}");
}
