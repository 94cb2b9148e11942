//! What comes out of Kafka, on real servers.

mod application;
mod failures;
mod gauges;
mod handling;
mod harm;
mod letters;
mod position;
mod record;
mod retention;
mod rust;
mod service;
mod stored;
pub(crate) mod strategies;

use std::process::Command;
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};

use crate::support::{Fixture, PATIENCE, Relay, postbox, wait_until};

/// A topic, a group, and a handler that notes what it does.
struct Stage {
    fixture: Fixture,
    topic: String,
}

/// What is produced.
#[derive(Debug, Clone)]
struct Event {
    key: Option<String>,
    id: Option<String>,
    value: Option<Vec<u8>>,
    /// Besides the id.
    headers: &'static [(&'static str, &'static [u8])],
}

impl Event {
    /// The `version` of a key.
    fn of(key: &str, version: usize) -> Self {
        Self {
            key: Some(key.to_owned()),
            id: Some(format!("{key}-{version}")),
            value: Some(format!(r#"{{"version":{version}}}"#).into_bytes()),
            headers: &[],
        }
    }
}

/// Notes each message that it handles, and refuses those that are named in `poison`.
const HANDLER: &str = "CREATE TABLE owing (n integer PRIMARY KEY); CREATE TABLE effect (seq bigserial PRIMARY KEY, message_id text, key text, version integer); \
     CREATE TABLE poison (message_id text PRIMARY KEY, what text DEFAULT 'raise'); \
     CREATE TABLE owed (n integer REFERENCES owing DEFERRABLE INITIALLY DEFERRED); \
     CREATE FUNCTION handle(m postbox.message) RETURNS text LANGUAGE plpgsql AS $$ \
     DECLARE p poison; BEGIN \
         SELECT * INTO p FROM poison WHERE message_id = m.message_id; \
         INSERT INTO effect (message_id, key, version) VALUES (m.message_id, m.key, (m.payload->>'version')::integer); \
         IF p.what = 'raise' THEN RAISE 'poisoned %', m.message_id; END IF; \
         IF p.what = 'hang' THEN PERFORM pg_sleep(3600); END IF; \
         IF p.what = 'defer' THEN INSERT INTO owed VALUES (1); RETURN NULL; END IF; \
         IF p.what = 'die' THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF; \
         RETURN p.what; \
     END $$";

impl Stage {
    async fn new(partitions: i32) -> Self {
        Self::on(Fixture::new().await, partitions).await
    }

    async fn on(fixture: Fixture, partitions: i32) -> Self {
        let topic = format!("{}_inbox", fixture.topic);
        let schema = &fixture.contract.schema;
        let handler = HANDLER.replace("postbox.message", &format!("\"{schema}\".message"));
        fixture.client.batch_execute(&handler).await.unwrap();
        let stage = Self { fixture, topic };
        stage.create_topic(partitions).await;
        stage
    }

    /// Named as its topic, as brokers are shared.
    fn group(&self) -> &str {
        &self.topic
    }

    fn admin(&self) -> AdminClient<DefaultClientContext> {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.fixture.brokers);
        config.create().unwrap()
    }

    async fn create_topic(&self, partitions: i32) {
        let topic = NewTopic::new(&self.topic, partitions, TopicReplication::Fixed(1));
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        let admin = self.admin();
        wait_until("a topic is made", async || {
            let made = admin.create_topics([&topic], &options).await.unwrap();
            made[0].is_ok()
        })
        .await;
    }

    async fn delete_topic(&self) {
        let options = AdminOptions::new().operation_timeout(Some(PATIENCE));
        let deleted = self.admin().delete_topics(&[&self.topic], &options).await;
        deleted.unwrap()[0].as_ref().unwrap();
    }

    /// All in this order, and delivered.
    fn produce(&self, events: &[Event]) {
        let producer: BaseProducer = ClientConfig::new()
            .set("bootstrap.servers", &self.fixture.brokers)
            .set("partitioner", "murmur2_random")
            .set("linger.ms", "1")
            .create()
            .unwrap();
        for event in events {
            let mut headers = OwnedHeaders::new();
            if let Some(id) = &event.id {
                let (key, value) = ("id", Some(id));
                headers = headers.insert(Header { key, value });
            }
            for (key, value) in event.headers {
                let value = Some(*value);
                headers = headers.insert(Header { key, value });
            }
            let mut record = BaseRecord::<str, [u8]>::to(&self.topic).headers(headers);
            if let Some(key) = &event.key {
                record = record.key(key);
            }
            if let Some(value) = &event.value {
                record = record.payload(value);
            }
            producer.send(record).map_err(|(error, _)| error).unwrap();
            producer.poll(Duration::ZERO);
        }
        producer.flush(PATIENCE).unwrap();
        assert_eq!(producer.in_flight_count(), 0);
    }

    fn command(&self, flags: &[&str]) -> Command {
        let mut command = postbox(&["inbox"]);
        command
            .args(["--topics", &self.topic, "--group", self.group()])
            .args(flags)
            .env("POSTBOX_SCHEMA", &self.fixture.contract.schema)
            .env("POSTBOX_DATABASE_URL", &self.fixture.database_url)
            .env("POSTBOX_BROKERS", &self.fixture.brokers)
            .env("RUST_LOG", "postbox=debug")
            .env("POSTBOX_HTTP", "127.0.0.1:0");
        command
    }

    fn start(&self, flags: &[&str]) -> Relay {
        Relay::spawn(&mut self.command(flags))
    }

    /// One whose handler is the function.
    fn handling(&self, flags: &[&str]) -> Relay {
        let handler = ["--handler", "sql:handle", "--retry-backoff-min", "100ms"];
        self.start(&[&handler, flags].concat())
    }

    async fn count(&self, sql: &str) -> i64 {
        let sql = sql.replace(
            "postbox.",
            &format!("\"{}\".", self.fixture.contract.schema),
        );
        let row = self.fixture.client.query_one(&sql, &[]).await.unwrap();
        row.get(0)
    }

    async fn effects(&self) -> Vec<(String, Option<String>, Option<i32>)> {
        let sql = "SELECT message_id, key, version FROM effect ORDER BY seq";
        let rows = self.fixture.client.query(sql, &[]).await.unwrap();
        rows.iter()
            .map(|row| (row.get(0), row.get(1), row.get(2)))
            .collect()
    }

    async fn wait_for_effects(&self, count: i64) {
        wait_until(&format!("{count} effects"), async || {
            self.count("SELECT count(*) FROM effect").await >= count
        })
        .await;
    }

    /// Each of these once, and those of a key in order.
    async fn assert_once_and_in_order(&self, events: &[Event]) {
        let effects = self.effects().await;
        let mut ids: Vec<&str> = effects.iter().map(|(id, ..)| &**id).collect();
        let mut expected: Vec<&str> = events
            .iter()
            .map(|event| event.id.as_deref().unwrap())
            .collect();
        ids.sort_unstable();
        expected.sort_unstable();
        expected.dedup();
        assert_eq!(ids.len(), expected.len());
        assert_eq!(ids, expected);
        let mut last = std::collections::HashMap::new();
        for (id, key, version) in &effects {
            if let Some(before) = last.insert(key, version) {
                assert!(before < version, "{id} after version {before:?}");
            }
        }
    }
}
