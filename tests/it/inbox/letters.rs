//! Copies of dead letters.

use std::collections::HashMap;

use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Headers as _, Message as _};
use rdkafka::{ClientConfig, Offset, TopicPartitionList};

use super::{Event, Stage};
use crate::support::{PATIENCE, wait_until};

/// A letter: its key, its value, and its headers.
type Letter = (Option<String>, Option<Vec<u8>>, HashMap<String, Vec<u8>>);

/// So many of a topic.
async fn read(stage: &Stage, topic: &str, count: usize) -> Vec<Letter> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &stage.fixture.brokers)
        .set("group.id", "of no interest")
        .create()
        .unwrap();
    // The first of them makes it.
    wait_until("the topic is there", async || {
        let metadata = consumer.fetch_metadata(Some(topic), PATIENCE).unwrap();
        metadata.topics()[0].error().is_none()
    })
    .await;
    let mut partitions = TopicPartitionList::new();
    let metadata = consumer.fetch_metadata(Some(topic), PATIENCE).unwrap();
    for partition in metadata.topics()[0].partitions() {
        let added = partitions.add_partition_offset(topic, partition.id(), Offset::Beginning);
        added.unwrap();
    }
    consumer.assign(&partitions).unwrap();
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let mut letters = Vec::new();
    while letters.len() < count {
        let record = consumer.poll(PATIENCE).expect("a letter").unwrap();
        let headers = record.headers().unwrap().iter();
        let headers = headers.map(|header| {
            let value = header.value.unwrap_or_default().to_vec();
            (header.key.to_owned(), value)
        });
        letters.push((
            record.key().map(text),
            record.payload().map(<[u8]>::to_vec),
            headers.collect(),
        ));
    }
    letters
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_dead_letter_is_copied_with_where_it_came_from() {
    let stage = Stage::new(1).await;
    let topic = format!("{}_dead", stage.topic);
    let poison = "INSERT INTO poison SELECT 'k-' || n, 'failed: no such order' FROM generate_series(0, 2) AS n";
    stage.fixture.client.batch_execute(poison).await.unwrap();
    stage.produce(&[
        Event {
            headers: &[("event_type", b"created"), ("bytes", &[0xff, 0x00])],
            ..Event::of("k", 0)
        },
        Event {
            value: None,
            ..Event::of("k", 1)
        },
        Event {
            value: Some(b"\xff".to_vec()),
            ..Event::of("k", 2)
        },
        Event::of("k", 3),
    ]);
    let inbox = stage.handling(&["--dead-letter-topic", &topic]);
    stage.wait_for_effects(1).await;
    wait_until("none is owed", async || {
        let owed =
            "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead' AND NOT owes_letter";
        stage.count(owed).await == 3
    })
    .await;
    inbox.drain().await;
    let letters = read(&stage, &topic, 3).await;
    let values: Vec<Option<&[u8]>> = letters
        .iter()
        .map(|(_, value, _)| value.as_deref())
        .collect();
    assert_eq!(
        values,
        [Some(&br#"{"version": 0}"#[..]), None, Some(b"\xff")]
    );
    for (n, (key, _, headers)) in letters.iter().enumerate() {
        assert_eq!(key.as_deref(), Some("k"));
        let offset = n.to_string();
        let id = format!("k-{n}");
        for (name, expected) in [
            ("id", &*id),
            ("event_type", if n == 0 { "created" } else { &stage.topic }),
            ("postbox_error", "no such order"),
            ("postbox_group", stage.group()),
            ("postbox_topic", &stage.topic),
            ("postbox_partition", "0"),
            ("postbox_offset", &offset),
            ("postbox_attempts", "1"),
        ] {
            let value = headers
                .get(name)
                .map(|value| String::from_utf8_lossy(value));
            assert_eq!(value.as_deref(), Some(expected), "{name} of {n}");
        }
    }
    assert_eq!(letters[0].2["bytes"], [0xff, 0x00]);
}

/// Also those that the application gives up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_letter_is_owed_until_its_topic_takes_it() {
    let stage = Stage::new(1).await;
    let topic = format!("{}_dead", stage.topic);
    stage.produce(&[Event::of("k", 0)]);
    let refused = crate::support::run(&mut stage.command(&["--dead-letter-topic", "a b"]));
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(
        refused.stderr.contains("is not a topic name"),
        "{refused:?}"
    );
    let inbox = stage.start(&["--dead-letter-topic", &topic]);
    wait_until("it is stored", async || {
        stage
            .count("SELECT count(*) FROM postbox.inbox_message WHERE status = 'stored'")
            .await
            == 1
    })
    .await;
    inbox.kill();
    let group = stage.group();
    let fail = format!(
        "SELECT count(*) FROM postbox.inbox_claim('{group}', 1, '1 hour') AS c, \
         LATERAL (SELECT postbox.inbox_fail('{group}', c.message_id, 'no', 1)) AS f"
    );
    assert_eq!(stage.count(&fail).await, 1);
    let owed = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead' AND owes_letter";
    assert_eq!(stage.count(owed).await, 1);
    let inbox = stage.start(&["--dead-letter-topic", &topic]);
    let letters = read(&stage, &topic, 1).await;
    assert_eq!(letters[0].2["postbox_error"], b"no");
    wait_until("none is owed", async || stage.count(owed).await == 0).await;
    inbox.drain().await;
}
