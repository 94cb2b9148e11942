//! Events that should go out later.

use std::time::Duration;

use super::{SOON, wait_for_parked};
use crate::support::{Fixture, Relay, connect, wait_until};

async fn schedule(fixture: &Fixture, key: &str, payload: &str, delay: &str) -> String {
    let sql = "SELECT postbox.emit($1, $2, 'changed', $3::text::json, scheduled_at => clock_timestamp() + $4::text::interval)::text";
    let row = fixture
        .client
        .query_one(sql, &[&fixture.topic, &key, &payload, &delay])
        .await;
    row.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scheduled_event_goes_out_in_its_time_and_holds_nobody() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &SOON).await;
    schedule(&fixture, "a", "1", "3 s").await;
    fixture.insert("a", "2").await;
    fixture.wait_for_confirmation().await;
    assert_eq!(fixture.keys().await, ["a"]);
    wait_for_parked(&fixture, &["scheduled a 0"]).await;
    wait_until("it is sent", async || fixture.keys().await.len() == 2).await;
    let late = "SELECT extract(epoch FROM clock_timestamp() - max(scheduled_at))::float8 FROM postbox.outbox";
    let late: f64 = fixture.client.query_one(late, &[]).await.unwrap().get(0);
    // That the test itself looks takes its time, too.
    assert!((0.0..3.0).contains(&late), "{late}");
    wait_for_parked(&fixture, &[]).await;
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_event_is_never_sent() {
    let fixture = Fixture::new().await;
    // One that the relay has not seen yet, and one that it has.
    let early = schedule(&fixture, "a", "1", "2 s").await;
    let cancel = async |id: &str| {
        let sql = "SELECT postbox.cancel($1::text::uuid)";
        let row = fixture.client.query_one(sql, &[&id]).await.unwrap();
        row.get::<_, bool>(0)
    };
    assert!(cancel(&early).await);
    let relay = Relay::streaming(&fixture, &SOON).await;
    let late = schedule(&fixture, "b", "1", "2 s").await;
    fixture.wait_for_confirmation().await;
    assert!(cancel(&late).await);
    // One of a transaction that is open beyond the event's time.
    let open = schedule(&fixture, "c", "1", "5 s").await;
    fixture.wait_for_confirmation().await;
    let canceller = connect(&fixture.database_url).await;
    let sql = format!("BEGIN; SELECT 1 / postbox.cancel('{open}')::integer");
    canceller.batch_execute(&sql).await.unwrap();
    schedule(&fixture, "d", "1", "6 s").await;
    wait_until("what is due after it is sent", async || {
        !fixture.keys().await.is_empty()
    })
    .await;
    canceller.batch_execute("COMMIT").await.unwrap();
    wait_for_parked(&fixture, &[]).await;
    assert!(!cancel(&late).await);
    assert_eq!(fixture.keys().await, ["d"]);
    tokio::time::sleep(Duration::from_millis(100)).await;
    relay.drain().await;
}
