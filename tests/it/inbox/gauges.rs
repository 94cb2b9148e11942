//! What is told of the table.

use super::{Event, Stage};
use crate::support::wait_until;

#[tokio::test]
async fn what_waits_and_what_is_dead_is_counted() {
    let stage = Stage::new(1).await;
    let poison = "INSERT INTO poison (message_id) VALUES ('k-0')";
    stage.fixture.client.batch_execute(poison).await.unwrap();
    stage.produce(&[Event::of("k", 0), Event::of("k", 1), Event::of("other", 0)]);
    let inbox = stage.start(&["--handler", "sql:handle", "--retry-backoff-min", "1h"]);
    stage.wait_for_effects(1).await;
    let told = |name: &str, value: &str| {
        let (_, text) = inbox.get("/metrics");
        text.contains(&format!("postbox_inbox_{name} {value}\n"))
    };
    wait_until("it is counted", async || {
        told("messages{status=\"waiting\"}", "2")
    })
    .await;
    assert!(told("messages{status=\"stored\"}", "0"));
    assert!(inbox.metric("postbox_inbox_oldest_pending_seconds") > 0.0);
    let schema = &stage.fixture.contract.schema;
    let dead = format!("UPDATE \"{schema}\".inbox_message SET status = 'dead'");
    stage.fixture.client.batch_execute(&dead).await.unwrap();
    wait_until("they are dead", async || {
        told("messages{status=\"dead\"}", "2")
    })
    .await;
    assert!(told("messages{status=\"waiting\"}", "0"));
    assert!(told("oldest_pending_seconds", "0"));
    inbox.drain().await;
}
