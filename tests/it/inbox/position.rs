//! Where a partition is read on.

use super::{Event, Stage};
use crate::support::wait_until;

fn events(range: std::ops::Range<usize>) -> Vec<Event> {
    range.map(|n| Event::of("k", n)).collect()
}

#[tokio::test]
async fn reading_goes_on_after_what_was_committed_though_kafka_has_forgotten_it() {
    let stage = Stage::new(1).await;
    stage.produce(&events(0..10));
    let inbox = stage.handling(&[]);
    stage.wait_for_effects(10).await;
    inbox.drain().await;
    // Without the ids, what is read again would be handled again.
    let forget = format!("TRUNCATE \"{}\".inbox", stage.fixture.contract.schema);
    stage.fixture.client.batch_execute(&forget).await.unwrap();
    let deleted = stage
        .admin()
        .delete_groups(&[stage.group()], &Default::default())
        .await;
    deleted.unwrap()[0].as_ref().unwrap();
    stage.produce(&events(10..20));
    let inbox = stage.handling(&[]);
    stage.wait_for_effects(20).await;
    inbox.drain().await;
    stage.assert_once_and_in_order(&events(0..20)).await;
}

#[tokio::test]
async fn a_topic_that_is_made_anew_is_told_and_read_where_it_is_said() {
    // With fewer records than were read, and with more.
    for again in [3, 30] {
        let stage = Stage::new(1).await;
        stage.produce(&events(0..10));
        let inbox = stage.handling(&[]);
        stage.wait_for_effects(10).await;
        inbox.drain().await;
        stage.delete_topic().await;
        stage.create_topic(1).await;
        let anew: Vec<Event> = (0..again).map(|n| Event::of("anew", n)).collect();
        stage.produce(&anew);
        let mut inbox = stage.handling(&[]);
        assert_eq!(inbox.exit_code().await, 7, "{}", inbox.log());
        let told = "is not the one that was read";
        assert!(inbox.log().contains(told), "{}", inbox.log());
        assert_eq!(stage.effects().await.len(), 10);
        let inbox = stage.handling(&["--on-reset", "earliest"]);
        stage.wait_for_effects(10 + again as i64).await;
        inbox.drain().await;
    }
}

#[tokio::test]
async fn a_group_that_has_read_without_us_goes_on_where_it_was() {
    use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer as _};
    use rdkafka::{ClientConfig, Offset, TopicPartitionList};
    let stage = Stage::new(1).await;
    stage.produce(&events(0..10));
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &stage.fixture.brokers)
        .set("group.id", stage.group())
        .create()
        .unwrap();
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(&stage.topic, 0, Offset::Offset(4))
        .unwrap();
    consumer.commit(&list, CommitMode::Sync).unwrap();
    drop(consumer);
    let inbox = stage.handling(&[]);
    stage.wait_for_effects(6).await;
    inbox.drain().await;
    stage.assert_once_and_in_order(&events(4..10)).await;
    // And Kafka's own offset has followed.
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &stage.fixture.brokers)
        .set("group.id", stage.group())
        .create()
        .unwrap();
    wait_until("the group's offset", async || {
        let committed = consumer.committed_offsets(list.clone(), std::time::Duration::from_secs(5));
        committed.unwrap().elements()[0].offset() == Offset::Offset(10)
    })
    .await;
}
