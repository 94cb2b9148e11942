//! `postbox recover --skip-missed`: what was missed is given up.

use super::{FAST, missed};
use crate::support::{Fixture, Relay};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_skipped_is_counted() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &FAST).await;
    fixture.insert("before", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    fixture.drop_slot().await;
    for key in ["missed", "missed too"] {
        fixture.insert(key, "{}").await;
    }
    let recovery = fixture.recover(&["--skip-missed"]);
    let results = recovery.results();
    assert!(results.contains("; they stay unpublished)"), "{results}");
    assert!((2..=3).contains(&missed(results)), "{results}");
    fixture.insert("after", "{}").await;
    let relay = Relay::streaming(&fixture, &FAST).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let keys = fixture.keys().await;
    assert_eq!(keys, ["after", "before"]);
}

/// A row of the gap that can never go out: what is left can be given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_of_the_gap_that_cannot_go_out_is_named_and_can_be_skipped() {
    let fixture = Fixture::new().await;
    fixture.drop_slot().await;
    fixture.insert("a", "{}").await;
    let unroutable = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload, topic) \
                      VALUES ('x', 'b', 'changed', '{}', 'not a topic') RETURNING id::text, seq";
    let row = fixture.client.query_one(unroutable, &[]).await.unwrap();
    let (id, seq): (String, i64) = (row.get(0), row.get(1));
    fixture.insert("c", "{}").await;
    fixture.recover(&[]).results();
    let mut relay = Relay::start(&fixture, &FAST);
    assert_eq!(relay.exit_code().await, 8, "{}", relay.log());
    let named = format!("event with seq {seq}, id {id} (read from the table) cannot go out");
    assert!(relay.log().contains(&named), "{}", relay.log());
    let skipped = fixture.recover(&["--skip-missed"]);
    let results = skipped.results();
    assert!(
        results
            .contains("already there (rows of a recovery not sent yet: 3; they stay unpublished)"),
        "{results}"
    );
    fixture.insert("d", "{}").await;
    let relay = Relay::streaming(&fixture, &FAST).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let keys = fixture.keys().await;
    assert_eq!(keys, ["a", "d"]);
}
