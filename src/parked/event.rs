//! Events that wait, as they are found in the table.
//!
//! What is read here is one look: the relay goes on meanwhile, and an event that is listed
//! may be delivered by the time a person reads of it. Times are those of the server's clock.

use std::pin::pin;

use futures_util::StreamExt;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Row};

use super::filter::{Filter, Status};
use super::row::StoredRow;
use crate::contract::Contract;
use crate::error::{Error, ErrorKind, Result};
use crate::selection;
use crate::timestamp::Timestamp;

/// For how long an event counts as being sent since the relay has taken it: a relay that was
/// killed meanwhile does not say that it has stopped.
const TAKEN_FOR: &str = "interval '1 minute'";

/// An event that waits, without its row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parked {
    /// The event's id; of a row that has none that can be read, its place in the stream.
    pub id: String,
    /// The relay that parked it, and sends it.
    pub relay: String,
    /// Events of a key are sent in the order of their numbers.
    pub number: i64,
    /// What it waits for.
    pub status: Status,
    /// When it is sent or tried next; none: not before an earlier event of its key, or its
    /// topic, or never.
    pub due_at: Option<Timestamp>,
    /// The relay is trying it at this moment.
    pub is_being_sent: bool,
    /// It is scheduled, and cancelled: at its time it is dropped.
    pub is_cancelled: bool,
    /// It was not tried, as the brokers refuse its topic; the relay asks them again by itself.
    pub awaits_topic: bool,
    /// Where it goes, if the row says so that it can be read.
    pub topic: Option<String>,
    /// Its record key.
    pub key: Option<String>,
    /// What happened.
    pub event_type: Option<String>,
    /// How often it was refused.
    pub attempts: i32,
    /// Why, the last time.
    pub error: Option<String>,
    /// Since when it waits.
    pub parked_at: Timestamp,
    /// When it was tried last.
    pub tried_at: Option<Timestamp>,
    /// A copy is still to be sent to the relay's dead-letter topic.
    pub owes_letter: bool,
    /// Who skipped it, or had it tried again.
    pub decided_by: Option<String>,
    /// When.
    pub decided_at: Option<Timestamp>,
    /// Why.
    pub reason: Option<String>,
    /// Where its transaction's commit begins in the WAL, if it came from a slot.
    pub commit_lsn: Option<String>,
    /// The transaction that wrote it, where its table says.
    pub xid: Option<String>,
    /// When that was committed.
    pub committed_at: Timestamp,
    /// What its row takes, in bytes.
    pub row_bytes: i64,
    /// When this was read.
    pub seen_at: Timestamp,
}

/// The first of the events that fit, in the order the relay read them, and how many more there are.
///
/// # Errors
/// `Settings`: there is none with one of the filter's ids. Those of the database.
pub async fn list(
    client: &Client,
    contract: &Contract,
    filter: &Filter,
    limit: u32,
) -> Result<(Vec<Parked>, u64)> {
    let limit = i64::from(limit);
    check_ids(client, contract, filter).await?;
    let found = async {
        let events = select(client, contract, filter, Some(limit)).await?;
        if (events.len() as u64) < limit.unsigned_abs() {
            return Ok((events, 0));
        }
        let count = contract.sql(&format!(
            "SELECT count(*) FROM :\"schema\".parked AS p WHERE {}",
            Filter::condition("p")
        ));
        let parameters = filter.parameters();
        let row = client.query_typed_one(&count, &parameters.typed()).await?;
        let all: i64 = row.try_get(0)?;
        let more = all.unsigned_abs().saturating_sub(events.len() as u64);
        Ok((events, more))
    };
    found
        .await
        .map_err(|error| refused("read", contract, error))
}

/// Hands each of the events that fit to `each`, with its row, in the order the relay read them.
/// One at a time is held, however many there are.
///
/// # Errors
/// What `each` returns, which ends it. `Settings`: there is none with one of the filter's
/// ids. Those of the database.
pub async fn for_each(
    client: &Client,
    contract: &Contract,
    filter: &Filter,
    mut each: impl FnMut(&Parked, &StoredRow) -> Result<()>,
) -> Result<u64> {
    check_ids(client, contract, filter).await?;
    let sql = contract.sql(&format!(
        "SELECT {}, p.message, p.column_names FROM :\"schema\".parked AS p WHERE {} \
         ORDER BY p.number, p.relay",
        columns(),
        Filter::condition("p")
    ));
    let sorted = |error| refused("read", contract, error);
    let parameters = filter.parameters();
    let rows = client.query_typed_raw(&sql, parameters.typed()).await;
    let mut rows = pin!(rows.map_err(sorted)?);
    let mut count = 0;
    while let Some(row) = rows.next().await {
        let row = row.map_err(sorted)?;
        let read = || Ok((Parked::read(&row)?, StoredRow::read(&row)?));
        let (event, stored) = read().map_err(sorted)?;
        each(&event, &stored)?;
        count += 1;
    }
    Ok(count)
}

/// The events that fit, in order.
pub(super) async fn select(
    client: &Client,
    contract: &Contract,
    filter: &Filter,
    limit: Option<i64>,
) -> Result<Vec<Parked>, tokio_postgres::Error> {
    let sql = contract.sql(&format!(
        "SELECT {} FROM :\"schema\".parked AS p WHERE {} ORDER BY p.number, p.relay LIMIT $9",
        columns(),
        Filter::condition("p")
    ));
    let parameters = filter.parameters();
    let parameters = [&parameters.typed()[..], &[(&limit as _, Type::INT8)]].concat();
    // Row by row: only what is kept of them is held.
    let rows = client.query_typed_raw(&sql, parameters).await?;
    let mut rows = pin!(rows);
    let mut events = Vec::new();
    while let Some(row) = rows.next().await {
        events.push(Parked::read(&row?)?);
    }
    Ok(events)
}

/// Refuses ids that no event has which fits.
pub(super) async fn check_ids(client: &Client, contract: &Contract, filter: &Filter) -> Result<()> {
    let (columns, parameters) = (Filter::columns("p"), filter.parameters());
    let rows = ":\"schema\".parked AS p";
    let missing = selection::missing(client, contract, rows, &columns, &parameters).await;
    let Some((first, others)) = missing.map_err(|error| refused("read", contract, error))? else {
        return Ok(());
    };
    let message = format!(
        "no event \"{}\" waits in schema \"{}\"{others}: it may have been delivered, or the flags leave it out; \
         `postbox parked list` shows what waits",
        first.escape_debug(),
        contract.schema
    );
    Err(Error::new(ErrorKind::Settings, message))
}

/// Sorts an error of a statement on the table.
pub(super) fn refused(doing: &str, contract: &Contract, error: tokio_postgres::Error) -> Error {
    selection::refused(format!("{doing} \"{}.parked\"", contract.schema), error)
}

/// What [`Parked::read`] reads.
fn columns() -> String {
    let micros = |time: &str| format!("(extract(epoch FROM {time}) * 1000000)::bigint");
    let times: Vec<_> = ["parked_at", "tried_at", "decided_at", "committed_at"]
        .into_iter()
        .map(|name| format!("{} AS {name}", micros(&format!("p.{name}"))))
        .collect();
    format!(
        "p.id, p.relay, p.number, p.status, p.topic, p.key, p.event_type, p.awaits_topic, p.attempts, p.error, \
         p.owes_letter, p.decided_by, p.reason, p.commit_lsn::text AS commit_lsn, p.xid::text AS xid, {}, \
         CASE WHEN isfinite(p.due_at) THEN {} END AS due_at, \
         coalesce(p.status = 'waiting' AND p.taken_at > clock_timestamp() - {TAKEN_FOR}, false) AS is_being_sent, \
         p.status = 'scheduled' AND EXISTS (SELECT FROM :\"schema\".cancellation AS c WHERE c.id = p.id) \
             AS is_cancelled, \
         octet_length(p.message)::bigint AS row_bytes, {} AS seen_at",
        times.join(", "),
        micros("p.due_at"),
        micros("clock_timestamp()")
    )
}

impl Parked {
    fn read(row: &Row) -> Result<Self, tokio_postgres::Error> {
        let time = |name: &str| {
            let micros: Option<i64> = row.try_get(name)?;
            Ok::<_, tokio_postgres::Error>(micros.map(Timestamp::from_unix_micros))
        };
        let always = |name: &str| row.try_get(name).map(Timestamp::from_unix_micros);
        let status = Status::read(row.try_get("status")?).expect("the table checks it");
        // Only of what is still to be sent does it say anything.
        let is_due = matches!(status, Status::Scheduled | Status::Waiting);
        Ok(Self {
            id: row.try_get("id")?,
            relay: row.try_get("relay")?,
            number: row.try_get("number")?,
            status,
            due_at: time("due_at")?.filter(|_| is_due),
            is_being_sent: row.try_get("is_being_sent")?,
            is_cancelled: row.try_get("is_cancelled")?,
            awaits_topic: row.try_get("awaits_topic")?,
            topic: row.try_get("topic")?,
            key: row.try_get("key")?,
            event_type: row.try_get("event_type")?,
            attempts: row.try_get("attempts")?,
            error: row.try_get("error")?,
            parked_at: always("parked_at")?,
            tried_at: time("tried_at")?,
            owes_letter: row.try_get("owes_letter")?,
            decided_by: row.try_get("decided_by")?,
            decided_at: time("decided_at")?,
            reason: row.try_get("reason")?,
            commit_lsn: row.try_get("commit_lsn")?,
            xid: row.try_get("xid")?,
            committed_at: always("committed_at")?,
            row_bytes: row.try_get("row_bytes")?,
            seen_at: always("seen_at")?,
        })
    }
}
