//! What a row becomes, byte for byte, on its whole way.

use std::time::{Duration, Instant};

use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message, OwnedMessage};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use crate::support::{Fixture, Relay, wait_until};

/// The first `count` records of a topic, those of a key in order.
pub(crate) fn consume(fixture: &Fixture, topic: &str, count: usize) -> Vec<OwnedMessage> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &fixture.brokers)
        .set("group.id", "it")
        .create()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let partitions = loop {
        let metadata = consumer.fetch_metadata(Some(topic), Duration::from_secs(10));
        let partitions = metadata.unwrap().topics()[0].partitions().len();
        if partitions > 0 {
            break partitions;
        }
        assert!(Instant::now() < deadline, "no topic {topic}");
        std::thread::sleep(Duration::from_millis(50));
    };
    let mut list = TopicPartitionList::new();
    for partition in 0..partitions {
        let partition = i32::try_from(partition).unwrap();
        list.add_partition_offset(topic, partition, Offset::Beginning)
            .unwrap();
    }
    consumer.assign(&list).unwrap();
    let mut records = Vec::new();
    while records.len() < count {
        assert!(
            Instant::now() < deadline,
            "{} of {count} records",
            records.len()
        );
        if let Some(message) = consumer.poll(Duration::from_millis(100)) {
            records.push(message.unwrap().detach());
        }
    }
    records
}

fn value(record: &OwnedMessage) -> &str {
    std::str::from_utf8(record.payload().unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_text_arrives_unchanged() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &["--format", "raw"]).await;
    let payloads = [
        r#"{"b": 1,   "a" : 2}"#,
        r#"{"a": 1, "a": 2}"#,
        r#"{"n": 123456789012345678901234567890.123456789}"#,
        "{\"text\": \"ünïcödé 漢字 🦀 \\\"quoted\\\" \\\\ \\u0041 \\n\"}",
        "[\n  1,\n\t2\n]",
        "\"\"",
        "null",
        " 1e400 ",
    ];
    for payload in payloads {
        fixture.insert("a", payload).await;
    }
    let records = consume(&fixture, &fixture.topic, payloads.len());
    let values: Vec<&str> = records.iter().map(value).collect();
    assert_eq!(values, payloads);
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_is_what_the_wire_contract_says() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &["--route", "shop.{aggregate_type}"]).await;
    let sql = "INSERT INTO postbox.outbox (id, aggregate_type, aggregate_id, event_type, partition_key, payload, headers,
                   schema_version, trace_id, correlation_id, causation_id, traceparent, created_at)
               VALUES ('0b9e7f64-6f0e-4a9a-8a39-0f9d0f6a7c11', $1, '42', 'order_placed', 'customer-7', '{\"total\": 1.50}',
                   '{\"source\": \"web\", \"n\": 1, \"none\": null, \"id\": \"not ours\"}', '2.0', 't-1', 'c-1', 'c-2', '00-ab-cd-01',
                   '2026-03-01 13:00:00.25+01')";
    fixture
        .client
        .execute(sql, &[&fixture.topic])
        .await
        .unwrap();
    let topic = format!("shop.{}", fixture.topic);
    fixture.wait_for_confirmation().await;
    let record = consume(&fixture, &topic, 1).remove(0);
    assert_eq!(record.key(), Some(&b"customer-7"[..]));
    assert_eq!(record.timestamp().to_millis(), Some(1_772_366_400_250));
    assert_eq!(
        value(&record),
        format!(
            "{{\"id\":\"0b9e7f64-6f0e-4a9a-8a39-0f9d0f6a7c11\",\"schema_version\":\"2.0\",\"event_type\":\"order_placed\",\
             \"aggregate_type\":\"{}\",\"aggregate_id\":\"42\",\"payload\":{{\"total\": 1.50}},\
             \"timestamp\":\"2026-03-01T12:00:00.250000+00:00\",\"trace_id\":\"t-1\",\"correlation_id\":\"c-1\",\"causation_id\":\"c-2\"}}",
            fixture.topic
        )
    );
    let headers: Vec<_> = record
        .headers()
        .unwrap()
        .iter()
        .map(|header| {
            (
                header.key,
                header
                    .value
                    .map(|value| std::str::from_utf8(value).unwrap()),
            )
        })
        .collect();
    let expected = [
        ("id", Some("0b9e7f64-6f0e-4a9a-8a39-0f9d0f6a7c11")),
        ("event_type", Some("order_placed")),
        ("schema_version", Some("2.0")),
        ("trace_id", Some("t-1")),
        ("correlation_id", Some("c-1")),
        ("causation_id", Some("c-2")),
        ("traceparent", Some("00-ab-cd-01")),
        ("source", Some("web")),
        ("n", Some("1")),
        ("none", None),
    ];
    assert_eq!(headers, expected);
    relay.drain().await;
}

/// As Debezium's outbox router: neither what else is known of the event, nor what the row has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_with_debeziums_headers_has_its_id_and_nothing_else() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &["--headers", "debezium"]).await;
    let sql = "INSERT INTO postbox.outbox (id, aggregate_type, aggregate_id, event_type, payload, headers,
                   schema_version, trace_id, correlation_id, causation_id, traceparent)
               VALUES ('0b9e7f64-6f0e-4a9a-8a39-0f9d0f6a7c11', $1, '42', 'order_placed', '{}',
                   '{\"source\": \"web\", \"id\": \"not ours\"}', '2.0', 't-1', 'c-1', 'c-2', '00-ab-cd-01')";
    fixture
        .client
        .execute(sql, &[&fixture.topic])
        .await
        .unwrap();
    let record = consume(&fixture, &fixture.topic, 1).remove(0);
    let headers: Vec<_> = record.headers().unwrap().iter().collect();
    let [id] = &headers[..] else {
        panic!("{headers:?}");
    };
    let expected = b"0b9e7f64-6f0e-4a9a-8a39-0f9d0f6a7c11";
    assert_eq!((id.key, id.value), ("id", Some(&expected[..])));
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_null_payload_is_a_tombstone() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &[]).await;
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type) VALUES ($1, 'a', 'deleted')";
    fixture
        .client
        .execute(sql, &[&fixture.topic])
        .await
        .unwrap();
    fixture.insert("a", "{}").await;
    let records = consume(&fixture, &fixture.topic, 2);
    assert_eq!(records[0].payload(), None);
    assert!(records[1].payload().is_some());
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn columns_may_come_and_go_while_events_flow() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &["--format", "raw"]).await;
    fixture.insert("a", "1").await;
    let alter = "ALTER TABLE postbox.outbox ADD COLUMN tenant text DEFAULT 'x'; ALTER TABLE postbox.outbox DROP COLUMN trace_id";
    fixture.client.batch_execute(alter).await.unwrap();
    fixture.insert("a", "2").await;
    let records = consume(&fixture, &fixture.topic, 2);
    assert_eq!((value(&records[0]), value(&records[1])), ("1", "2"));
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_column_may_have_another_type() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &["--format", "versioned"]).await;
    for (column, literal, value_expected) in [
        ("jsonb", "'{\"b\":1,\"aa\":2}'", "{\"b\": 1, \"aa\": 2}"),
        ("text", "'{ \"x\":1}'", "{ \"x\":1}"),
        ("bytea", "'\\x7b7d'", "{}"),
    ] {
        let alter = format!(
            "ALTER TABLE postbox.outbox DROP COLUMN payload; ALTER TABLE postbox.outbox ADD COLUMN payload {column}"
        );
        fixture.client.batch_execute(&alter).await.unwrap();
        let topic = format!("{}-{column}", fixture.topic);
        let insert = format!(
            "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ('{topic}', 'a', 'b', {literal})"
        );
        fixture.client.batch_execute(&insert).await.unwrap();
        fixture.wait_for_confirmation().await;
        let record = consume(&fixture, &topic, 1).remove(0);
        assert_eq!(
            value(&record),
            format!("{{\"schema_version\":null,\"payload\":{value_expected}}}")
        );
    }
    relay.drain().await;
}

/// The same row, through the slot and from the table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_read_from_the_table_makes_the_same_record() {
    let fixture = Fixture::new().await;
    let sql = "INSERT INTO postbox.outbox \
               (aggregate_type, aggregate_id, event_type, payload, headers, schema_version, trace_id, \
                correlation_id, causation_id, partition_key, traceparent, created_at) \
               VALUES ($1, 'a', 'changed', '{ \"ü\" : 1.50,\n \"x\":null}', '{\"h\": \"1\"}', '2', 't', 'c', 'd', \
                       'a', '00-x', '2026-01-02 03:04:05.678901+05:30'), \
                      ($1, 'a', 'deleted', NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '2026-01-02')";
    // Formats that a role may have.
    let odd = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET datestyle = ''German, DMY''', current_database()); \
               EXECUTE format('ALTER DATABASE %I SET timezone = ''Asia/Kathmandu''', current_database()); END $$";
    fixture.client.batch_execute(odd).await.unwrap();
    fixture
        .client
        .execute(sql, &[&fixture.topic])
        .await
        .unwrap();
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    let everything = "UPDATE postbox.checkpoint SET snapshot = '3:3:'";
    fixture.client.batch_execute(everything).await.unwrap();
    fixture.drop_slot().await;
    fixture.recover(&[]).results();
    let relay = Relay::streaming(&fixture, &[]).await;
    wait_until("both are sent again", async || {
        relay.published(&fixture.topic) == 2
    })
    .await;
    relay.drain().await;
    let records = consume(&fixture, &fixture.topic, 4);
    let content = |record: &OwnedMessage| {
        let headers = record.headers().into_iter().flat_map(Headers::iter);
        let headers: Vec<String> = headers.map(|header| format!("{header:?}")).collect();
        let (key, payload) = (record.key().map(<[u8]>::to_vec), record.payload());
        (
            key,
            payload.map(<[u8]>::to_vec),
            headers,
            record.timestamp(),
        )
    };
    let records: Vec<_> = records.iter().map(content).collect();
    assert_eq!(records[..2], records[2..]);
}
