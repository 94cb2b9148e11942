//! What waits in the table of parked events when a slot is lost.

use crate::parking::{LARGE, SMALL, SOON, limit, parked};
use crate::poison::{create_topic, incompressible};
use crate::support::{Fixture, Relay, wait_until};

use super::missed;

/// The relay reads all rows of the gap again, parked ones too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_is_neither_lost_nor_overtaken_when_a_slot_is_recovered() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, SMALL).await;
    let flags = [
        &SOON[..],
        &["--max-attempts", "1000", "-X", "compression.codec=none"],
    ]
    .concat();
    // Nothing that is written to the slot makes the gap smaller.
    let quiet = [&flags[..], &["--heartbeat-interval", "10m"]].concat();
    let relay = Relay::streaming(&fixture, &quiet).await;
    let large = incompressible(5000);
    for (key, payload) in [
        ("a", "1"),
        ("a", &large),
        ("c", &large),
        ("a", "3"),
        ("b", "1"),
    ] {
        fixture.insert(key, payload).await;
    }
    let emit =
        "SELECT postbox.emit($1, 'd', 'changed', '{}', scheduled_at => now() + interval '1 h')";
    fixture
        .client
        .execute(emit, &[&fixture.topic])
        .await
        .unwrap();
    fixture.wait_for_confirmation().await;
    wait_until("they wait", async || parked(&fixture).await.len() == 4).await;
    let skip = "SELECT id FROM postbox.parked WHERE key = 'c'";
    let skipped: String = fixture.client.query_one(skip, &[]).await.unwrap().get(0);
    wait_until("it is skipped", async || {
        fixture.parked(&["skip", &skipped, "--reason", "test"]);
        let is_skipped = "SELECT status = 'skipped' FROM postbox.parked WHERE key = 'c'";
        fixture
            .client
            .query_one(is_skipped, &[])
            .await
            .unwrap()
            .get(0)
    })
    .await;
    relay.kill();
    fixture.drop_slot().await;
    for key in ["a", "b"] {
        fixture.insert(key, "4").await;
    }
    assert!(missed(fixture.recover(&[]).results()) >= 2);
    let relay = Relay::streaming(&fixture, &flags).await;
    fixture.wait_for_confirmation().await;
    limit(&fixture, LARGE).await;
    wait_until("what can be sent is", async || {
        parked(&fixture).await.len() == 2
    })
    .await;
    relay.drain().await;
    let states = "SELECT string_agg(status || ' ' || key, ', ' ORDER BY key) FROM postbox.parked";
    let states: String = fixture.client.query_one(states, &[]).await.unwrap().get(0);
    assert_eq!(states, "skipped c, scheduled d");
    let due = "UPDATE postbox.parked SET due_at = now() WHERE status = 'scheduled'";
    fixture.client.batch_execute(due).await.unwrap();
    let relay = Relay::streaming(&fixture, &flags).await;
    wait_until("what was scheduled is sent", async || {
        let parked = parked(&fixture).await;
        parked.len() == 1 && parked[0].starts_with("skipped c")
    })
    .await;
    let keys = fixture.keys().await;
    assert!(!keys.contains(&"c".to_owned()), "{keys:?}");
    fixture.enter_in_ledger().await;
    let given_up = "DELETE FROM postbox_oracle.ledger WHERE key = 'c'";
    fixture.client.batch_execute(given_up).await.unwrap();
    let verdict = fixture.judge(relay).await;
    // The two that were delivered before.
    assert!(verdict.is_clean(2), "{verdict}");
}
