//! Rows that cannot go out: they are put off, as their table says.

use super::claiming;
use crate::support::{Fixture, wait_until};

async fn insert(fixture: &Fixture, topic: &str, key: &str, payload: &str) {
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
               VALUES ($1, $2, 'changed', $3::text::json)";
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 3] = [&topic, &key, &payload];
    fixture.client.execute(sql, &parameters).await.unwrap();
}

/// What the row of this topic says of its attempts.
async fn attempts(fixture: &Fixture, topic: &str) -> (String, i32, Option<String>, f64) {
    let sql = "SELECT status, attempts_made, last_error, extract(epoch FROM scheduled_at - now())::float8 \
               FROM outbox_events WHERE topic = $1 ORDER BY created_at LIMIT 1";
    let row = fixture.client.query_one(sql, &[&topic]).await.unwrap();
    (row.get(0), row.get(1), row.get(2), row.get(3))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_cannot_go_out_is_tried_again_later_and_holds_only_its_key() {
    let fixture = Fixture::omni_box().await;
    let relay = claiming(&fixture, &[]).await;
    insert(&fixture, "not a topic", "a", "{}").await;
    for key in ["b", "c"] {
        insert(&fixture, &fixture.topic, key, "{}").await;
    }
    wait_until("others are delivered", async || {
        fixture.keys().await == ["b", "c"]
    })
    .await;
    wait_until("it is put off", async || {
        attempts(&fixture, "not a topic").await.1 == 1
    })
    .await;
    let (status, _, error, seconds) = attempts(&fixture, "not a topic").await;
    assert_eq!(status, "pending");
    assert!(
        error
            .unwrap()
            .contains("\"not a topic\" is not a topic name")
    );
    assert!((1.0..=10.0).contains(&seconds), "{seconds}");
    // Its own key waits.
    insert(&fixture, "not a topic", "a", "2").await;
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    assert_eq!(fixture.rows_that_are("attempts_made > 0").await, 1);
    relay.drain().await;
    assert_eq!(fixture.rows_that_are("locked_by IS NOT NULL").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_at_the_end_of_its_attempts_fails_and_holds_nobody() {
    let fixture = Fixture::omni_box().await;
    insert(&fixture, "not a topic", "a", "1").await;
    let last = "UPDATE outbox_events SET attempts_made = 5";
    fixture.client.batch_execute(last).await.unwrap();
    insert(&fixture, "not a topic", "a", "2").await;
    let relay = claiming(&fixture, &[]).await;
    wait_until("the next of its key is tried", async || {
        fixture.rows_that_are("attempts_made = 1").await == 1
    })
    .await;
    let (status, made, ..) = attempts(&fixture, "not a topic").await;
    assert_eq!((status.as_str(), made), ("failed", 6));
    relay.drain().await;
}

/// omni-box cannot read a row that is to be tried later than a year after it was made, and
/// stops at each batch that has one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_of_last_year_is_tried_again_at_once() {
    let fixture = Fixture::omni_box().await;
    insert(&fixture, "not a topic", "a", "1").await;
    let old = "UPDATE outbox_events SET created_at = now() - interval '366 days', \
               scheduled_at = now() - interval '366 days'";
    fixture.client.batch_execute(old).await.unwrap();
    let relay = claiming(&fixture, &[]).await;
    wait_until("it is at the end of its attempts", async || {
        fixture.rows_that_are("status = 'failed'").await == 1
    })
    .await;
    let late = "scheduled_at > created_at + interval '31536000 s'";
    assert_eq!(fixture.rows_that_are(late).await, 0);
    relay.drain().await;
}

/// Of many at once, among others: none of these is late, none out of order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_rows_that_cannot_go_out_hold_up_no_others() {
    let fixture = Fixture::omni_box().await;
    fixture.omni_box_backlog(6_000, 50).await;
    let spoil =
        "UPDATE outbox_events SET topic = 'not a topic' WHERE (payload ->> 'n')::integer % 50 < 10";
    fixture.client.batch_execute(spoil).await.unwrap();
    let ledger = "DELETE FROM postbox_oracle.ledger AS l USING outbox_events AS o \
                  WHERE o.id = l.id AND o.topic = 'not a topic'";
    fixture.client.batch_execute(ledger).await.unwrap();
    let relay = claiming(&fixture, &[]).await;
    wait_until("all others are delivered", async || {
        fixture.rows_that_are("status = 'completed'").await == 4_800
    })
    .await;
    // The first of each key, and no other, until it is tried again.
    assert_eq!(fixture.rows_that_are("attempts_made = 1").await, 10);
    assert_eq!(fixture.rows_that_are("attempts_made > 1").await, 0);
    relay.drain().await;
    let verdict = fixture.verdict().await;
    assert!(
        verdict.committed == 4_800 && verdict.is_clean(0),
        "{verdict}"
    );
    assert_eq!(fixture.rows_that_are("locked_by IS NOT NULL").await, 0);
}

/// librdkafka refuses it before it is sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_is_too_large_is_put_off() {
    let fixture = Fixture::omni_box().await;
    // What compresses well would pass.
    let filler: String = (0..90_000)
        .map(|_| uuid::Uuid::new_v4().to_string())
        .collect();
    let large = format!("{{\"filler\": \"{filler}\"}}");
    insert(&fixture, &fixture.topic, "a", &large).await;
    insert(&fixture, &fixture.topic, "a", "{}").await;
    for n in 0..300 {
        insert(&fixture, &fixture.topic, &format!("b{n}"), "{}").await;
    }
    let relay = claiming(&fixture, &[]).await;
    wait_until("the other keys are delivered", async || {
        fixture.keys().await.len() == 300
    })
    .await;
    wait_until("it is put off", async || {
        attempts(&fixture, &fixture.topic).await.1 == 1
    })
    .await;
    relay.drain().await;
    assert!(!fixture.keys().await.contains(&"a".to_owned()));
}
