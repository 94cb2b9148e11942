//! The examples do what they say.

use std::path::PathBuf;
use std::process::Command;

use crate::support::{Fixture, Relay, run, run_script};

/// The built example, beside the folder of the test program.
fn example(name: &str) -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let built = tests.parent().unwrap().parent().unwrap();
    let path = built.join("examples").join(name);
    assert!(path.exists(), "not built: cargo build --example {name}");
    path
}

/// A relay that sends the examples' events, all about orders, to a topic of the
/// test's own.
async fn relay(fixture: &mut Fixture) -> Relay {
    let route = format!("{}.{{aggregate_type}}", fixture.topic);
    fixture.topic = format!("{}.order", fixture.topic);
    Relay::streaming(fixture, &["--route", &route]).await
}

/// The keys of what arrived, in order.
async fn keys(fixture: &Fixture) -> Vec<String> {
    let records = fixture.records().await;
    records.into_iter().map(|record| record.key).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_append_example_writes_an_order_and_its_event_once() {
    let mut fixture = Fixture::new().await;
    let relay = relay(&mut fixture).await;
    let append = || run(Command::new(example("append")).arg(&fixture.database_url));
    let first = append();
    let id = first.results().strip_prefix("event ").unwrap().trim_end();
    fixture.wait_for_confirmation().await;
    let records = fixture.records().await;
    assert_eq!(records.len(), 1);
    assert_eq!(
        (records[0].id.to_string().as_str(), records[0].key.as_str()),
        (id, "42")
    );

    // Its idempotency key is taken now.
    assert_eq!(append().results(), first.results());
    let other = run(Command::new(example("append")).args([&fixture.database_url, "43"]));
    assert_ne!(other.results(), first.results());
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let mut keys = keys(&fixture).await;
    keys.sort_unstable();
    assert_eq!(keys, ["42", "43"]);
    let orders = "SELECT count(*) FROM shop_order";
    let orders: i64 = fixture.client.query_one(orders, &[]).await.unwrap().get(0);
    assert_eq!(orders, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_append_example_says_what_is_missing() {
    let usage = run(&mut Command::new(example("append")));
    assert!(usage.complaint(1).contains("usage: append "), "{usage:?}");
    let fixture = Fixture::empty().await;
    let never_set_up = run(Command::new(example("append")).arg(&fixture.database_url));
    let complaint = never_set_up.complaint(1);
    assert!(
        complaint.contains("has `postbox setup` been run here?"),
        "{complaint}"
    );
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_statements_of_emit_sql_write_two_events() {
    let mut fixture = Fixture::new().await;
    let relay = relay(&mut fixture).await;
    // Beside the other example, in either order.
    run(Command::new(example("append")).arg(&fixture.database_url)).results();
    let script = include_str!("../../examples/emit.sql");
    run_script(&fixture.client, script).await.unwrap();
    fixture.wait_for_confirmation().await;
    let sql = "SELECT event_type, traceparent IS NOT NULL FROM postbox.outbox WHERE aggregate_id = '43' ORDER BY seq";
    let rows = fixture.client.query(sql, &[]).await.unwrap();
    let events: Vec<(String, bool)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(
        events,
        [
            ("order_placed".to_owned(), true),
            ("order_paid".to_owned(), true)
        ]
    );

    // Again: what has an idempotency key is not written twice.
    run_script(&fixture.client, script).await.unwrap();
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let mut keys = keys(&fixture).await;
    keys.sort_unstable();
    assert_eq!(keys, ["42", "43", "43", "43"]);
}
