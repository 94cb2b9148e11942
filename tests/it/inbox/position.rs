//! Where a partition is read on.

use rdkafka::admin::{AdminOptions, NewPartitions};

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

/// Also if another member has begun with other partitions of the topic.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_begins_at_the_end_of_all_that_is_there_and_at_the_beginning_of_what_comes_later() {
    let stage = Stage::new(4).await;
    let of = |range: std::ops::Range<usize>| -> Vec<Event> {
        range.map(|n| Event::of(&format!("k{n}"), 0)).collect()
    };
    stage.produce(&of(0..40));
    let begun = async |partitions: i64| {
        let inbox = stage.handling(&["--from", "latest"]);
        wait_until("all partitions are taken", async || {
            let taken = "SELECT count(*) FROM postbox.inbox_offset";
            stage.count(taken).await == partitions
        })
        .await;
        inbox
    };
    begun(4).await.drain().await;
    let others = "DELETE FROM postbox.inbox_offset WHERE partition > 0";
    let others = others.replace(
        "postbox.",
        &format!("\"{}\".", stage.fixture.contract.schema),
    );
    stage.fixture.client.batch_execute(&others).await.unwrap();
    begun(4).await.drain().await;
    let read = "SELECT sum(next_offset)::bigint FROM postbox.inbox_offset";
    assert_eq!(stage.count(read).await, 40);
    let grown = NewPartitions::new(&stage.topic, 5);
    let grown = stage
        .admin()
        .create_partitions([&grown], &AdminOptions::new())
        .await;
    grown.unwrap()[0].as_ref().unwrap();
    // The new one has some of these, though nobody consumes it yet.
    stage.produce(&of(40..80));
    let inbox = begun(5).await;
    stage.wait_for_effects(40).await;
    inbox.drain().await;
    stage.assert_once_and_in_order(&of(40..80)).await;
    let new = "SELECT next_offset FROM postbox.inbox_offset WHERE partition = 4";
    assert!(stage.count(new).await > 0);
}
