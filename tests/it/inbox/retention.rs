//! What was received is forgotten one window later, and not before all of that was read.

use super::{Event, Stage};
use crate::support::{Relay, wait_until};

/// Looks every second.
const WINDOW: [&str; 2] = ["--dedup-window", "1m"];

impl Stage {
    async fn run(&self, sql: &str) {
        let sql = self.filled(sql);
        self.fixture.client.batch_execute(&sql).await.unwrap();
    }

    fn filled(&self, sql: &str) -> String {
        let schema = format!("\"{}\".", self.fixture.contract.schema);
        sql.replace("postbox.", &schema)
    }

    /// As if nothing had happened in the last hour.
    async fn an_hour_passes(&self) {
        self.run(
            "UPDATE postbox.inbox SET received_at = received_at - interval '1 hour'; \
             UPDATE postbox.inbox_message SET received_at = received_at - interval '1 hour', \
                 decided_at = decided_at - interval '1 hour'; \
             UPDATE postbox.inbox_offset SET updated_at = updated_at - interval '1 hour'; \
             UPDATE postbox.inbox_mark SET marked_at = marked_at - interval '1 hour', \
                 read_until = read_until - interval '1 hour', gone_since = gone_since - interval '1 hour'",
        )
        .await;
    }

    async fn ids(&self) -> i64 {
        self.count("SELECT count(*) FROM postbox.inbox").await
    }

    async fn wait_for_ids(&self, count: i64) {
        wait_until(&format!("{count} ids"), async || self.ids().await == count).await;
    }

    /// Until all that was there a moment ago is known to be read.
    async fn wait_until_read(&self) {
        let marked =
            "SELECT count(*) FROM postbox.inbox_mark WHERE read_until > now() - interval '20 s'";
        let all = self
            .count("SELECT count(*) FROM postbox.inbox_offset")
            .await;
        wait_until("all is read", async || self.count(marked).await == all).await;
    }

    /// Until the partitions were looked at so often.
    async fn wait_for_looks(&self, inbox: &Relay, count: usize) {
        wait_until("partitions are looked at", async || {
            inbox.log().matches("looked at partitions").count() >= count
        })
        .await;
    }
}

fn events(range: std::ops::Range<usize>) -> Vec<Event> {
    range.map(|n| Event::of("k", n)).collect()
}

#[tokio::test]
async fn what_is_older_than_the_window_goes_and_what_is_younger_stays() {
    let stage = Stage::new(2).await;
    stage.produce(&events(0..3));
    let inbox = stage.handling(&WINDOW);
    stage.wait_for_effects(3).await;
    stage.an_hour_passes().await;
    stage.produce(&events(3..5));
    stage.wait_for_effects(5).await;
    stage.wait_for_ids(2).await;
    // A repeated one that is old is new, and one that is not is not.
    stage.produce(&[Event::of("k", 1), Event::of("k", 4), Event::of("k", 5)]);
    stage.wait_for_effects(7).await;
    assert_eq!(stage.ids().await, 4);
    wait_until("it is counted", async || {
        inbox.metric("postbox_inbox_cleaned_rows_total{table=\"inbox\"}") >= 3.0
    })
    .await;
    inbox.drain().await;
}

#[tokio::test]
async fn time_in_which_nobody_reads_does_not_count() {
    let stage = Stage::new(2).await;
    stage.produce(&events(0..1));
    let inbox = stage.handling(&WINDOW);
    stage.wait_for_effects(1).await;
    stage.wait_until_read().await;
    inbox.drain().await;
    stage.produce(&events(0..1));
    stage.an_hour_passes().await;
    // It may look, and not read yet.
    let mut holder = crate::support::connect(&stage.fixture.database_url).await;
    let transaction = holder.transaction().await.unwrap();
    let lock = stage.filled("LOCK TABLE postbox.inbox_offset IN SHARE MODE");
    transaction.batch_execute(&lock).await.unwrap();
    let inbox = stage.handling(&WINDOW);
    stage.wait_for_looks(&inbox, 3).await;
    assert_eq!(stage.ids().await, 1);
    transaction.rollback().await.unwrap();
    let repeated = "SELECT sum(next_offset)::bigint FROM postbox.inbox_offset";
    wait_until("it is read", async || stage.count(repeated).await == 2).await;
    assert_eq!(stage.effects().await.len(), 1);
    // All of it is read now.
    stage.wait_for_ids(0).await;
    inbox.drain().await;
}

#[tokio::test]
async fn what_a_partition_that_is_new_has_counts_too() {
    let stage = Stage::new(1).await;
    stage.produce(&events(0..1));
    let inbox = stage.handling(&WINDOW);
    stage.wait_for_effects(1).await;
    inbox.drain().await;
    stage.an_hour_passes().await;
    let more = rdkafka::admin::NewPartitions::new(&stage.topic, 8);
    let (admin, options) = (stage.admin(), Default::default());
    let made = admin.create_partitions(&[more], &options).await;
    made.unwrap()[0].as_ref().unwrap();
    // Whichever its key belongs to now.
    for n in 0..50 {
        stage.produce(&[Event {
            id: Some("k-0".to_owned()),
            ..Event::of(&format!("other{n}"), 0)
        }]);
    }
    let mut holder = crate::support::connect(&stage.fixture.database_url).await;
    let transaction = holder.transaction().await.unwrap();
    let lock = stage.filled("LOCK TABLE postbox.inbox_offset IN SHARE MODE");
    transaction.batch_execute(&lock).await.unwrap();
    let inbox = stage.handling(&WINDOW);
    stage.wait_for_looks(&inbox, 3).await;
    assert_eq!(stage.ids().await, 1);
    transaction.rollback().await.unwrap();
    stage.wait_for_ids(0).await;
    assert_eq!(stage.effects().await.len(), 1);
    inbox.drain().await;
}

#[tokio::test]
async fn a_topic_that_nobody_will_read_again_holds_nothing_for_ever() {
    let stage = Stage::new(1).await;
    stage.produce(&events(0..2));
    let flags = [&WINDOW[..], &["--dedup-scope", "group"]].concat();
    let inbox = stage.handling(&flags);
    stage.wait_for_effects(2).await;
    stage.an_hour_passes().await;
    // One that it does not subscribe to, and one that is no longer there.
    let offset = |topic: &str, ago: &str| {
        format!(
            "INSERT INTO postbox.inbox_offset (consumer_group, topic, partition, next_offset, epoch, updated_at) \
             VALUES ('{}', '{topic}', 0, 3, 1, now() - interval '{ago}')",
            stage.group()
        )
    };
    stage.run(&offset("unsubscribed", "30 s")).await;
    stage.wait_for_looks(&inbox, 3).await;
    assert_eq!(stage.ids().await, 2);
    let gone = "SELECT count(*) FROM postbox.inbox_mark WHERE gone_since IS NOT NULL";
    wait_until("it is gone", async || stage.count(gone).await == 1).await;
    stage
        .run("UPDATE postbox.inbox_mark SET gone_since = now() - interval '1 hour' WHERE gone_since IS NOT NULL")
        .await;
    stage.wait_for_ids(0).await;
    inbox.drain().await;
}

#[tokio::test]
async fn a_partition_that_ends_with_a_transaction_is_read_to_its_end() {
    use rdkafka::ClientConfig;
    use rdkafka::message::{Header, OwnedHeaders};
    use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
    let stage = Stage::new(1).await;
    let producer: BaseProducer = ClientConfig::new()
        .set("bootstrap.servers", &stage.fixture.brokers)
        .set("transactional.id", &stage.topic)
        .create()
        .unwrap();
    producer
        .init_transactions(crate::support::PATIENCE)
        .unwrap();
    producer.begin_transaction().unwrap();
    let headers = OwnedHeaders::new().insert(Header {
        key: "id",
        value: Some("one"),
    });
    let record = BaseRecord::<str, str>::to(&stage.topic)
        .headers(headers)
        .payload("{}");
    producer.send(record).map_err(|(error, _)| error).unwrap();
    producer
        .commit_transaction(crate::support::PATIENCE)
        .unwrap();
    let inbox = stage.handling(&WINDOW);
    stage.wait_for_effects(1).await;
    stage.an_hour_passes().await;
    stage.wait_for_ids(0).await;
    inbox.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_go_in_batches_and_by_two_consumers_at_once() {
    let stage = Stage::new(4).await;
    let noted: Vec<Event> = (0..4).map(|n| Event::of(&format!("k{n}"), 0)).collect();
    stage.produce(&noted);
    let inboxes = [stage.handling(&WINDOW), stage.handling(&WINDOW)];
    stage.wait_for_effects(4).await;
    // Half of them at one time, as those of a large batch are.
    stage
        .run(
            "CREATE TABLE gone (rows bigint); \
             CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
                 INSERT INTO gone SELECT count(*) FROM went; RETURN NULL; END $$; \
             CREATE TRIGGER note AFTER DELETE ON postbox.inbox REFERENCING OLD TABLE AS went \
                 EXECUTE FUNCTION note(); \
             INSERT INTO postbox.inbox (kafka_offset, received_at, id, source, partition) \
             SELECT 0, now() - interval '1 hour' - n % 2 * n * interval '1 ms', gen_random_uuid(), s.id, -1 \
             FROM postbox.inbox_source AS s, generate_series(1, 25000) AS n",
        )
        .await;
    stage.wait_for_ids(4).await;
    let most = stage.count("SELECT max(rows) FROM gone").await;
    assert!(most <= 1_000, "{most}");
    assert_eq!(
        stage.count("SELECT sum(rows)::bigint FROM gone").await,
        25_000
    );
    for inbox in inboxes {
        assert!(!inbox.log().contains("WARN"), "{}", inbox.log());
        inbox.drain().await;
    }
}

#[tokio::test]
async fn skipped_messages_go_and_dead_ones_stay() {
    let stage = Stage::new(1).await;
    stage
        .run("INSERT INTO poison (message_id) VALUES ('k-0'), ('k-1')")
        .await;
    stage.produce(&events(0..2));
    let inbox = stage.handling(&[&WINDOW[..], &["--max-attempts", "1"]].concat());
    let dead = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead'";
    wait_until("both are dead", async || stage.count(dead).await == 2).await;
    stage
        .run(
            "UPDATE postbox.inbox_message SET status = 'skipped', decided_by = 'me', decided_at = now() \
             WHERE message_id = 'k-0'",
        )
        .await;
    stage.wait_for_looks(&inbox, 2).await;
    let all = "SELECT count(*) FROM postbox.inbox_message";
    assert_eq!(stage.count(all).await, 2);
    stage.an_hour_passes().await;
    wait_until("one goes", async || stage.count(all).await == 1).await;
    stage.wait_for_ids(0).await;
    assert_eq!(stage.count(dead).await, 1);
    inbox.drain().await;
}
