//! Sizes at their limit, which flow, and one above it, which are refused by name and
//! number. Flags have theirs in `cli/numbers.rs`.

use postbox::contract::Contract;

use crate::poison::{STOP, assert_stopped_by, create_topic, insert_returning_id};
use crate::support::{Fixture, Relay, postbox, run, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_of_63_bytes_work_and_longer_ones_are_refused() {
    let mut fixture = Fixture::empty().await;
    let slot = format!("{:_<63}", fixture.contract.slot);
    fixture.contract = Contract::new("s".repeat(63), slot, "p".repeat(63)).unwrap();
    fixture.setup(&[]).results();
    let relay = Relay::streaming(&fixture, &["--heartbeat-interval", "1s"]).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 1);
    for flag in ["--schema", "--slot", "--publication"] {
        let long = "x".repeat(64);
        let refused = run(&mut postbox(&["setup", flag, &long]));
        let what = format!(
            "{} \"{long}\" has a name of 64 bytes, longer than 63",
            &flag[2..]
        );
        assert!(refused.complaint(2).contains(&what), "{refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topics_name_has_249_bytes_at_most() {
    let mut fixture = Fixture::new().await;
    fixture.topic = format!("{:x<249}", fixture.topic);
    let relay = Relay::streaming(&fixture, &STOP).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    assert_eq!(fixture.records().await.len(), 1);
    fixture.topic += "x";
    let id = insert_returning_id(&fixture, "a", "{}").await;
    let why = format!(
        "\"{}\" is not a topic name: Kafka allows 1 to 249",
        fixture.topic
    );
    assert_stopped_by(relay, &fixture, &id, &why).await;
}

/// A batch of one record, as Kafka counts it: 61 bytes of the batch's own, then the
/// record behind its length, in numbers of variable length.
fn batch_size(key: &str, value: usize) -> usize {
    let varint = |number: usize| (usize::BITS - (number * 2).leading_zeros()).div_ceil(7) as usize;
    let sized = |bytes: usize| varint(bytes) + bytes;
    let headers = [("id", 36), ("event_type", "changed".len())];
    let headers: usize = headers
        .map(|(name, value)| sized(name.len()) + sized(value))
        .iter()
        .sum();
    // Attributes, and two differences to the batch's first record.
    61 + sized(3 + sized(key.len()) + sized(value) + varint(2) + headers)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_at_the_topics_limit_flows_and_one_byte_more_is_refused() {
    const LIMIT: usize = 20_000;
    let fixture = Fixture::new().await;
    create_topic(&fixture, &LIMIT.to_string()).await;
    let flags = ["--format", "raw", "-X", "compression.codec=none"];
    let relay = Relay::streaming(&fixture, &[&flags[..], &STOP].concat()).await;
    let fits = (0..LIMIT)
        .rev()
        .find(|value| batch_size("a", *value) <= LIMIT)
        .unwrap();
    let payload = |bytes: usize| format!("\"{}\"", "x".repeat(bytes - 2));
    fixture.insert("a", &payload(fits)).await;
    fixture.wait_for_confirmation().await;
    let id = insert_returning_id(&fixture, "a", &payload(fits + 1)).await;
    let size = fits + 1 + "a".len() + "id".len() + 36 + "event_type".len() + "changed".len();
    let why = format!("{size} bytes, and max.message.bytes is {LIMIT}: ");
    assert_stopped_by(relay, &fixture, &id, &why).await;
    assert_eq!(fixture.records().await.len(), 1);
}

/// Beyond `message.max.bytes` no broker is asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_at_our_own_limit_flows_and_one_byte_more_is_refused() {
    const LIMIT: usize = 50_000;
    // librdkafka counts the longest numbers that there are, and two for each header.
    const NUMBERS: usize = 36 + 2 * 2;
    let fixture = Fixture::new().await;
    let own = format!("message.max.bytes={LIMIT}");
    let flags = [&["--format", "raw", "-X", &own][..], &STOP].concat();
    let relay = Relay::streaming(&fixture, &flags).await;
    let rest = "a".len() + "id".len() + 36 + "event_type".len() + "changed".len();
    let payload = |size: usize| format!("\"{}\"", "x".repeat(size - rest - 2));
    let fits = LIMIT - NUMBERS;
    fixture.insert("a", &payload(fits)).await;
    fixture.wait_for_confirmation().await;
    let id = insert_returning_id(&fixture, "a", &payload(fits + 1)).await;
    let why = format!("{} bytes, and message.max.bytes is {LIMIT}: ", fits + 1);
    assert_stopped_by(relay, &fixture, &id, &why).await;
    assert_eq!(fixture.records().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_smallest_bounds_of_what_is_in_flight_let_everything_pass() {
    let fixture = Fixture::new().await;
    let flags = ["--in-flight-max", "1", "--in-flight-bytes-max", "1"];
    let relay = Relay::streaming(&fixture, &flags).await;
    for key in ["a", "b"].repeat(10) {
        fixture.insert(key, "{}").await;
    }
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 20);
}

/// Neither Kafka nor the relay counts them: the record's size is the limit.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_and_keys_are_bounded_by_the_record_alone() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &[]).await;
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload, headers) \
               SELECT $1, repeat('k', 500000), 'changed', '{}', json_object_agg('name-' || n, n) \
               FROM generate_series(1, 10000) AS n";
    fixture
        .client
        .execute(sql, &[&fixture.topic])
        .await
        .unwrap();
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.records().await[0].key.len(), 500_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_head_of_a_request_is_bounded() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &[]).await;
    for (size, status) in [(16_384, 200), (16_385, 431)] {
        let head = "GET /healthz HTTP/1.0\r\nX: ";
        let request = format!("{head}{}\r\n\r\n", "x".repeat(size - head.len() - 4));
        assert_eq!(relay.ask(&request).0, status, "{size}");
    }
    wait_until("the relay is ready", async || relay.get("/readyz").0 == 200).await;
}

/// Rows come in pages, turns and buffers: 64 to a page of the table and in the buffer of
/// the stream, 256 in a turn of the relay, 1024 between two marks of a recovery.
const ROWS: [i32; 6] = [64, 65, 256, 257, 1024, 1025];

async fn insert_rows(fixture: &Fixture, rows: i32) {
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
               SELECT $1, $2::integer || '-' || n, 'changed', '{}' FROM generate_series(1, $2::integer) AS n";
    let inserted = fixture.client.execute(sql, &[&fixture.topic, &rows]).await;
    inserted.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transactions_as_large_as_a_buffer_and_a_row_more_go_out_once() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &[]).await;
    let mut sent = 0;
    for rows in ROWS {
        insert_rows(&fixture, rows).await;
        fixture.wait_for_confirmation().await;
        sent += rows as usize;
        assert_eq!(fixture.records().await.len(), sent, "{rows}");
    }
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gaps_as_large_as_a_page_and_a_row_more_are_recovered_whole() {
    let fixture = Fixture::new().await;
    let mut missed = 0;
    for rows in ROWS {
        fixture.drop_slot().await;
        insert_rows(&fixture, rows).await;
        missed += rows as usize;
        fixture.recover(&[]).results();
        let relay = Relay::streaming(&fixture, &[]).await;
        fixture.wait_for_confirmation().await;
        relay.drain().await;
        assert_eq!(fixture.keys().await.len(), missed, "{rows}");
    }
}
