//! Messages in `postbox.inbox_message`, for people: what is stored, waits, or was given up.
//!
//! What is read here is one look: the consumer goes on meanwhile, and a message that is listed may
//! be handled by the time a person reads of it. Times are those of the server's clock.

pub mod decisions;
mod filter;

pub use filter::{Filter, Status};

use std::pin::pin;

use futures_util::StreamExt;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};
use uuid::Uuid;

use crate::contract::Contract;
use crate::error::{Error, ErrorKind};
use crate::parked::row::Column;
use crate::selection;
use crate::timestamp::Timestamp;

/// The table of messages, with the names of their groups and topics.
const ROWS: &str =
    ":\"schema\".inbox_message AS m JOIN :\"schema\".inbox_source AS s ON s.id = m.source";

/// A message in the table, without what is in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// Its id.
    pub id: String,
    /// The consumer group that received it.
    pub group: String,
    /// Its topic,
    pub topic: String,
    /// partition
    pub partition: i32,
    /// and offset.
    pub offset: i64,
    /// Messages of a lane are handled in the order of their numbers.
    pub number: i64,
    /// What is to become of it.
    pub status: Status,
    /// When it is tried, or may be claimed, next; none: not before an earlier one of its lane, or
    /// never.
    pub due_at: Option<Timestamp>,
    /// The application has claimed it, and its lease is not over.
    pub is_claimed: bool,
    /// Its record key.
    pub key: Option<String>,
    /// What happened.
    pub event_type: String,
    /// In which form it says so.
    pub schema_version: Option<String>,
    /// How often it was begun.
    pub attempts: i32,
    /// Why it failed, the last time.
    pub error: Option<String>,
    /// Since when it is there.
    pub received_at: Timestamp,
    /// When it was produced, if it says so.
    pub created_at: Option<Timestamp>,
    /// A copy is still to be sent to the dead-letter topic.
    pub owes_letter: bool,
    /// Who skipped it, or had it tried again.
    pub decided_by: Option<String>,
    /// When.
    pub decided_at: Option<Timestamp>,
    /// Why.
    pub reason: Option<String>,
    /// When this was read.
    pub seen_at: Timestamp,
    place: Place,
}

/// What a message is told from others by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Place {
    source: i32,
    id: Uuid,
}

/// What is in a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contents {
    headers: String,
    payload: Option<String>,
    body: Option<Vec<u8>>,
    original_id: Option<Vec<u8>>,
}

impl Contents {
    /// The columns that have it.
    pub fn columns(&self) -> Vec<Column<'_>> {
        let private = |name, value| Column {
            name,
            value,
            is_private: true,
        };
        let mut columns = vec![
            private("headers", Some(self.headers.as_bytes())),
            private("payload", self.payload.as_deref().map(str::as_bytes)),
            private("body", self.body.as_deref()),
        ];
        // Of an id that fits into its column, it would say the same again.
        if let Some(id) = &self.original_id {
            columns.push(Column {
                name: "original_id",
                value: Some(id),
                is_private: false,
            });
        }
        columns
    }
}

/// The first of the messages that fit, in the order in which they were received, and how many more
/// there are.
///
/// # Errors
/// `Settings`: there is none with one of the filter's ids. Those of the database.
pub async fn list(
    client: &Client,
    contract: &Contract,
    filter: &Filter,
    limit: u32,
) -> crate::Result<(Vec<Stored>, u64)> {
    check_ids(client, contract, filter).await?;
    let found = async {
        let condition = Filter::columns().condition();
        let parameters = filter.parameters();
        let limit = i64::from(limit);
        let limited = [&parameters.typed()[..], &[(&limit as _, Type::INT8)]].concat();
        let fit = format!("{condition} ORDER BY m.seq, m.source LIMIT $9");
        let messages = select(client, contract, &fit, &limited).await?;
        if (messages.len() as u64) < limit.unsigned_abs() {
            return Ok((messages, 0));
        }
        let count = contract.sql(&format!("SELECT count(*) FROM {ROWS} WHERE {condition}"));
        let row = client.query_typed_one(&count, &parameters.typed()).await?;
        let all: i64 = row.try_get(0)?;
        let more = all.unsigned_abs().saturating_sub(messages.len() as u64);
        Ok((messages, more))
    };
    found
        .await
        .map_err(|error| refused("read", contract, error))
}

/// The messages that fit, with what is in them.
///
/// # Errors
/// `Settings`: there is none with one of the filter's ids. Those of the database.
pub async fn show(
    client: &Client,
    contract: &Contract,
    filter: &Filter,
) -> crate::Result<Vec<(Stored, Contents)>> {
    check_ids(client, contract, filter).await?;
    let sql = contract.sql(&format!(
        "SELECT {}, m.headers::text, m.payload::text, m.body, m.original_id FROM {ROWS} WHERE {} \
         ORDER BY m.seq, m.source",
        columns(),
        Filter::columns().condition()
    ));
    let parameters = filter.parameters();
    let found = async {
        let rows = client.query_typed(&sql, &parameters.typed()).await?;
        let read = |row: &Row| Ok((Stored::read(row)?, Contents::read(row)?));
        rows.iter().map(read).collect()
    };
    let found: Result<_, tokio_postgres::Error> = found.await;
    found.map_err(|error| refused("read", contract, error))
}

/// The messages of which `condition` holds, in the order that it says.
async fn select(
    client: &Client,
    contract: &Contract,
    condition: &str,
    parameters: &[(&(dyn ToSql + Sync), Type)],
) -> Result<Vec<Stored>, tokio_postgres::Error> {
    let columns = columns();
    let sql = contract.sql(&format!("SELECT {columns} FROM {ROWS} WHERE {condition}"));
    // Row by row: only what is kept of them is held.
    let rows = client.query_typed_raw(&sql, parameters.to_vec()).await?;
    let mut rows = pin!(rows);
    let mut messages = Vec::new();
    while let Some(row) = rows.next().await {
        messages.push(Stored::read(&row?)?);
    }
    Ok(messages)
}

/// Refuses ids that no message has which fits.
async fn check_ids(client: &Client, contract: &Contract, filter: &Filter) -> crate::Result<()> {
    let (columns, parameters) = (Filter::columns(), filter.parameters());
    let missing = selection::missing(client, contract, ROWS, &columns, &parameters).await;
    let Some((first, others)) = missing.map_err(|error| refused("read", contract, error))? else {
        return Ok(());
    };
    let message = format!(
        "no message \"{}\" is in the inbox of schema \"{}\"{others}: it may have been handled, or the flags leave \
         it out; `postbox inbox list` shows what waits",
        first.escape_debug(),
        contract.schema
    );
    Err(Error::new(ErrorKind::Settings, message))
}

/// Sorts an error of a statement on the table.
fn refused(doing: &str, contract: &Contract, error: tokio_postgres::Error) -> Error {
    selection::refused(
        format!("{doing} \"{}.inbox_message\"", contract.schema),
        error,
    )
}

/// What [`Stored::read`] reads.
fn columns() -> String {
    let micros = |time: &str, name: &str| {
        format!("(extract(epoch FROM {time}) * 1000000)::bigint AS {name}")
    };
    let times: Vec<_> = ["received_at", "created_at", "decided_at"]
        .into_iter()
        .map(|name| micros(&format!("m.{name}"), name))
        .collect();
    format!(
        "m.source, m.id, m.message_id, s.consumer_group, s.topic, m.partition, m.kafka_offset, m.seq, m.status, \
         m.key, m.event_type, m.schema_version, m.attempts, m.error, m.owes_letter, m.decided_by, m.reason, \
         m.status = 'stored' AND m.is_claimed AND m.due_at > clock_timestamp() AS is_claimed, {}, {}, {}",
        times.join(", "),
        micros("CASE WHEN isfinite(m.due_at) THEN m.due_at END", "due_at"),
        micros("clock_timestamp()", "seen_at")
    )
}

impl Stored {
    fn read(row: &Row) -> Result<Self, tokio_postgres::Error> {
        let time = |name: &str| {
            let micros: Option<i64> = row.try_get(name)?;
            Ok::<_, tokio_postgres::Error>(micros.map(Timestamp::from_unix_micros))
        };
        let always = |name: &str| row.try_get(name).map(Timestamp::from_unix_micros);
        let status = Status::read(row.try_get("status")?).expect("the table checks it");
        Ok(Self {
            id: row.try_get("message_id")?,
            group: row.try_get("consumer_group")?,
            topic: row.try_get("topic")?,
            partition: row.try_get("partition")?,
            offset: row.try_get("kafka_offset")?,
            number: row.try_get("seq")?,
            status,
            // Only of what is still to be handled does it say anything.
            due_at: time("due_at")?.filter(|_| status.is_open()),
            is_claimed: row.try_get("is_claimed")?,
            key: row.try_get("key")?,
            event_type: row.try_get("event_type")?,
            schema_version: row.try_get("schema_version")?,
            attempts: row.try_get("attempts")?,
            error: row.try_get("error")?,
            received_at: always("received_at")?,
            created_at: time("created_at")?,
            owes_letter: row.try_get("owes_letter")?,
            decided_by: row.try_get("decided_by")?,
            decided_at: time("decided_at")?,
            reason: row.try_get("reason")?,
            seen_at: always("seen_at")?,
            place: Place {
                source: row.try_get("source")?,
                id: row.try_get("id")?,
            },
        })
    }
}

impl Contents {
    fn read(row: &Row) -> Result<Self, tokio_postgres::Error> {
        Ok(Self {
            headers: row.try_get("headers")?,
            payload: row.try_get("payload")?,
            body: row.try_get("body")?,
            original_id: row.try_get("original_id")?,
        })
    }
}
