//! `postbox recover --skip-missed`: what was missed is given up.

use super::{FAST, missed};
use crate::poison::{STOP, assert_repeats_nothing, insert_with_one_refused};
use crate::support::{Fixture, Output, Relay, connect, wait_until};

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
    let named = format!("event with seq {seq}, id {id} (read from the table) cannot go out");
    // As often as it is started: what is before it is not repeated.
    for _ in 0..2 {
        let mut relay = Relay::start(&fixture, &[&FAST[..], &STOP].concat());
        assert_eq!(relay.exit_code().await, 8, "{}", relay.log());
        assert!(relay.log().contains(&named), "{}", relay.log());
    }
    let skipped = fixture.recover(&["--skip-missed"]);
    let results = skipped.results();
    assert!(
        results
            .contains("already there (rows of a recovery not sent yet: 2; they stay unpublished)"),
        "{results}"
    );
    fixture.insert("d", "{}").await;
    let relay = Relay::streaming(&fixture, &FAST).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let keys = fixture.keys().await;
    assert_eq!(keys, ["a", "d"]);
}

/// As from a slot: what is behind it is not repeated by each relay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_of_the_gap_that_is_refused_repeats_nothing() {
    let fixture = Fixture::new().await;
    fixture.drop_slot().await;
    insert_with_one_refused(&fixture).await;
    fixture.recover(&[]).results();
    assert_repeats_nothing(&fixture, &[&FAST[..], &STOP].concat()).await;
}

/// A row that no slot would give an event for is named, whichever column it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_of_the_gap_without_a_time_is_named() {
    // The last of them is more microseconds than 64 bits hold.
    for time in ["infinity", "-infinity", "294276-12-31"] {
        let fixture = Fixture::new().await;
        fixture.drop_slot().await;
        let timeless = format!(
            "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, created_at) \
             VALUES ('x', 'a', 'changed', '{time}')"
        );
        fixture.client.batch_execute(&timeless).await.unwrap();
        fixture.recover(&[]).results();
        let mut relay = Relay::start(&fixture, &[&FAST[..], &STOP].concat());
        assert_eq!(relay.exit_code().await, 8, "{}", relay.log());
        assert!(relay.log().contains("created_at"), "{}", relay.log());
    }
}

/// `recover --skip-missed`, while another is about to change the checkpoint like this.
async fn skip_while(fixture: &Fixture, change: &str) -> Output {
    let other = connect(&fixture.database_url).await;
    let change = format!("BEGIN; UPDATE postbox.checkpoint SET {change}");
    other.batch_execute(&change).await.unwrap();
    std::thread::scope(|scope| {
        let skip = scope.spawn(|| fixture.recover(&["--skip-missed"]));
        let meanwhile = async {
            wait_until("recovery waits for the checkpoint", async || {
                let waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() \
                             AND application_name = 'postbox recover' AND wait_event = 'transactionid'";
                fixture.client.query_one(waits, &[]).await.unwrap().get(0)
            })
            .await;
            other.batch_execute("COMMIT").await.unwrap();
        };
        let handle = tokio::runtime::Handle::current();
        tokio::task::block_in_place(|| handle.block_on(meanwhile));
        skip.join().unwrap()
    })
}

/// A relay that starts between two looks at the checkpoint has the rows to send.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_relay_has_begun_to_send_is_not_skipped() {
    let fixture = Fixture::new().await;
    fixture.drop_slot().await;
    fixture.insert("missed", "{}").await;
    fixture.recover(&[]).results();
    let refused = skip_while(&fixture, "epoch = epoch + 1").await;
    let complaint = refused.complaint(4);
    let slot = &fixture.contract.slot;
    let why = format!(
        "checkpoint \"{slot}\" was taken over meanwhile: stop its relay, and run the command again"
    );
    assert!(complaint.contains(&why), "{complaint}");
    let relay = Relay::streaming(&fixture, &FAST).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["missed"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_sent_meanwhile_is_not_counted_as_skipped() {
    let fixture = Fixture::new().await;
    fixture.drop_slot().await;
    for key in ["sent", "missed"] {
        fixture.insert(key, "{}").await;
    }
    fixture.recover(&[]).results();
    let first_is_sent = "seq = (SELECT min(seq) FROM postbox.outbox)";
    let skipped = skip_while(&fixture, first_is_sent).await;
    let note = "rows of a recovery not sent yet: 1; they stay unpublished";
    assert!(skipped.results().contains(note), "{skipped:?}");
}
