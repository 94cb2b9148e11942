//! What there is to be claimed, as `/metrics` tells it.

use super::claiming;
use crate::support::{Fixture, connect, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_wait_are_counted_and_those_that_are_done_or_scheduled_are_not() {
    let fixture = Fixture::omni_box().await;
    for key in ["due", "claimed", "again", "later", "completed", "failed"] {
        fixture.insert(key, "{}").await;
    }
    let states = "UPDATE outbox_events SET created_at = now() - interval '1 hour' WHERE partition_key = 'due'; \
        UPDATE outbox_events SET locked_at = now(), locked_by = 'another' WHERE partition_key = 'claimed'; \
        UPDATE outbox_events SET last_error = 'once', attempts_made = 1, scheduled_at = now() + interval '1 day' \
        WHERE partition_key = 'again'; \
        UPDATE outbox_events SET scheduled_at = now() + interval '1 day' WHERE partition_key = 'later'; \
        UPDATE outbox_events SET status = 'completed', completed_at = now() WHERE partition_key = 'completed'; \
        UPDATE outbox_events SET status = 'failed', attempts_made = 6 WHERE partition_key = 'failed'";
    fixture.client.batch_execute(states).await.unwrap();
    // Nobody can claim what is due.
    let locker = connect(&fixture.database_url).await;
    let lock = "BEGIN; SELECT FROM outbox_events WHERE partition_key = 'due' FOR UPDATE";
    locker.batch_execute(lock).await.unwrap();
    let relay = claiming(&fixture, &[]).await;
    wait_until("three are pending", async || {
        let text = relay.get("/metrics").1;
        text.contains("\npostbox_pending_events 3\n")
            && text.contains(&format!(
                "\npostbox_topic_pending_events{{topic=\"{}\"}} 3\n",
                fixture.topic
            ))
    })
    .await;
    let oldest = relay.metric("postbox_oldest_pending_seconds");
    assert!((3600.0..3700.0).contains(&oldest), "{oldest}");
    locker.batch_execute("ROLLBACK").await.unwrap();
    wait_until("two are pending", async || {
        relay
            .get("/metrics")
            .1
            .contains("\npostbox_pending_events 2\n")
    })
    .await;
    relay.drain().await;
}
