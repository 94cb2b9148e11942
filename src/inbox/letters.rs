//! Copies of dead letters, for those who look into a topic and not into a table.
//!
//! A letter is the message as a handler gets it, with what it is called in headers, so that whoever
//! consumes it finds the same id, and why it was given up behind its own headers. It is owed until
//! a broker has it, and a crash may send it again; what no broker ever takes is kept in the table
//! alone. The table stays what counts: `postbox inbox retry` and `skip` do not look into the topic.
//!
//! Letters of the topic of dead letters are not owed, so that a group that reads it, too, does not
//! go on writing to it for ever.

use std::time::Duration;

use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{FutureProducer, FutureRecord};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::util::Timeout;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_postgres::Row;
use tokio_postgres::types::Type;
use tracing::{debug, error, warn};
use uuid::Uuid;

use super::InboxSettings;
use super::columns::Parameter;
use crate::backoff::doubled;
use crate::database::{Session, sort};
use crate::error::{Error, ErrorKind, Result, joined};
use crate::publisher::codes::explain;
use crate::publisher::{BATCH_BYTES, Verdict, invalid, verdict};

/// How often it is looked whether some are owed.
const INTERVAL: Duration = Duration::from_secs(1);

/// How long to wait where none could be sent; each further time twice as long.
const PAUSE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(60);

/// How long a broker has for one.
const REPORT_MAX: Duration = Duration::from_secs(30);

/// How many are sent at once, at most.
const LETTERS: i64 = 100;

/// Sends what is owed, for ever.
pub(super) async fn run(settings: InboxSettings) {
    let Some(topic) = settings.dead_letter_topic.clone() else {
        return std::future::pending().await;
    };
    let mut desk = Desk::new(settings, topic);
    let mut failures = 0;
    loop {
        match desk.write().await {
            Ok(0) => failures = 0,
            Ok(_) => {
                failures = 0;
                continue;
            }
            Err(error) => {
                desk.session = None;
                desk.producer = None;
                failures += 1;
                // That Postgres is away, the inbox itself says.
                match error.kind() {
                    ErrorKind::DatabaseAway => debug!("{}", error.chain()),
                    _ => warn!("copies of dead letters wait: {}", error.chain()),
                }
            }
        }
        match failures {
            0 => sleep(INTERVAL).await,
            _ => sleep(doubled(PAUSE_MIN, PAUSE_MAX, failures)).await,
        }
    }
}

struct Desk {
    settings: InboxSettings,
    topic: String,
    owed: String,
    sent: String,
    session: Option<Session>,
    producer: Option<FutureProducer>,
}

/// What one is told from others by.
type Name = (i32, Uuid);

impl Desk {
    fn new(settings: InboxSettings, topic: String) -> Self {
        let sql = |text: &str| settings.contract.sql(text);
        Self {
            // Each consumer of the group sends some, and none waits for another.
            owed: sql(
                "SELECT m.source, m.id, m.message_id, s.topic, m.partition, m.kafka_offset, m.key, m.event_type,
                     m.schema_version, m.headers::text, m.payload::text, m.body, m.attempts, m.error
                 FROM :\"schema\".inbox_message AS m
                 JOIN :\"schema\".inbox_source AS s ON s.id = m.source
                 WHERE s.consumer_group = $1 AND m.owes_letter AND m.status = 'dead'
                 ORDER BY m.source, m.seq
                 LIMIT $2
                 FOR UPDATE OF m SKIP LOCKED",
            ),
            sent: sql("UPDATE :\"schema\".inbox_message AS m SET owes_letter = false
                 FROM unnest($1::integer[], $2::uuid[]) AS r (source, id)
                 WHERE m.source = r.source AND m.id = r.id"),
            settings,
            topic,
            session: None,
            producer: None,
        }
    }

    /// How many went out.
    async fn write(&mut self) -> Result<usize> {
        let doing = "look for dead letters";
        let failed = |error| sort(doing, error);
        if self.session.is_none() {
            let database = &self.settings.database;
            self.session = Some(database.connect_pooled("postbox inbox letters").await?);
        }
        let session = self.session.as_mut().expect("it was just made");
        let transaction = session.client.transaction().await.map_err(failed)?;
        let parameters: [Parameter<'_>; 2] =
            [(&self.settings.group, Type::TEXT), (&LETTERS, Type::INT8)];
        let rows = transaction.query_typed(&self.owed, &parameters).await;
        let rows = rows.map_err(failed)?;
        if rows.is_empty() {
            transaction.commit().await.map_err(failed)?;
            // Most inboxes have no dead letters for days.
            self.producer = None;
            return Ok(0);
        }
        let producer = match &self.producer {
            Some(producer) => producer,
            None => self.producer.insert(producer(&self.settings)?),
        };
        let mut sending = JoinSet::new();
        for row in &rows {
            let letter = Letter::of(row, &self.settings.group);
            sending.spawn(letter.send(producer.clone(), self.topic.clone()));
        }
        let (mut sources, mut ids) = (Vec::new(), Vec::new());
        let mut why = None;
        while let Some(sent) = sending.join_next().await {
            match joined(sent) {
                Ok((source, id)) => {
                    sources.push(source);
                    ids.push(id);
                }
                Err(error) => why = Some(error),
            }
        }
        let parameters: [Parameter<'_>; 2] =
            [(&sources, Type::INT4_ARRAY), (&ids, Type::UUID_ARRAY)];
        let marked = transaction.execute_typed(&self.sent, &parameters).await;
        marked.map_err(failed)?;
        transaction.commit().await.map_err(failed)?;
        why.map_or(Ok(ids.len()), Err)
    }
}

/// One that gives up in time, as the transaction in which letters are sent is open meanwhile; and
/// that sends each alone, so that none is refused for another.
fn producer(settings: &InboxSettings) -> Result<FutureProducer> {
    let mut config = settings.kafka.producer(BATCH_BYTES)?;
    config.set("message.timeout.ms", REPORT_MAX.as_millis().to_string());
    config.set("batch.num.messages", "1");
    config.create().map_err(invalid)
}

struct Letter {
    name: Name,
    id: String,
    key: Option<String>,
    value: Option<Vec<u8>>,
    headers: OwnedHeaders,
}

impl Letter {
    fn of(row: &Row, group: &str) -> Self {
        let text = |column: &str| row.get::<_, Option<String>>(column);
        let id: String = row.get("message_id");
        let own: serde_json::Map<String, Value> =
            serde_json::from_str(row.get("headers")).unwrap_or_default();
        let named = [
            ("id", Some(id.clone())),
            ("event_type", text("event_type")),
            ("schema_version", text("schema_version")),
        ];
        // What the record said itself stands as it did.
        let named = named
            .into_iter()
            .filter(|(name, _)| !own.contains_key(*name));
        let why = [
            ("postbox_error", text("error")),
            ("postbox_group", Some(group.to_owned())),
            ("postbox_topic", text("topic")),
            (
                "postbox_partition",
                Some(row.get::<_, i32>("partition").to_string()),
            ),
            (
                "postbox_offset",
                Some(row.get::<_, i64>("kafka_offset").to_string()),
            ),
            (
                "postbox_attempts",
                Some(row.get::<_, i32>("attempts").to_string()),
            ),
        ];
        let mut headers = OwnedHeaders::new();
        for (key, value) in &own {
            headers = insert(headers, key, header(value).as_deref());
        }
        for (key, value) in named.chain(why) {
            headers = insert(headers, key, value.as_ref().map(String::as_bytes));
        }
        Self {
            name: (row.get("source"), row.get("id")),
            key: text("key"),
            value: text("payload").map_or_else(|| row.get("body"), |json| Some(json.into_bytes())),
            headers,
            id,
        }
    }

    /// Sends it. One that can never go out counts as sent.
    async fn send(self, producer: FutureProducer, topic: String) -> Result<Name> {
        let record = FutureRecord {
            topic: &topic,
            partition: None,
            payload: self.value.as_deref(),
            key: self.key.as_deref(),
            timestamp: None,
            headers: Some(self.headers),
        };
        let Err((error, _)) = producer.send(record, Timeout::Never).await else {
            return Ok(self.name);
        };
        let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail);
        if verdict(code) == Verdict::Row {
            error!(
                "the copy of dead letter {} cannot go out, and is kept in the table alone: {}",
                self.id,
                explain(code)
            );
            return Ok(self.name);
        }
        let message = format!("topic {topic} takes none: {}", explain(code));
        Err(Error::new(ErrorKind::BrokerAway, message))
    }
}

fn insert(headers: OwnedHeaders, key: &str, value: Option<&[u8]>) -> OwnedHeaders {
    headers.insert(Header { key, value })
}

/// The bytes of a header, which the table has as text, or as digits.
fn header(value: &Value) -> Option<Vec<u8>> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone().into_bytes()),
        other => {
            let digits = other.get("hex").and_then(Value::as_str).unwrap_or_default();
            let byte = |at: usize| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok();
            (0..digits.len()).step_by(2).map(byte).collect()
        }
    }
}
