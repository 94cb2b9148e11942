//! What people decide about messages in the table: another try, or none.
//!
//! A decision only changes rows: the consumer does what they say when it looks next, within a
//! second. What must hold between the two:
//!
//! - Of the waiting messages of a lane the first by number is its *head*, and it alone has a time
//!   at which it is due. So whoever makes a head, or takes one away, settles the lane.
//! - What is being handled at this moment is left as it is. The consumer has its row locked
//!   meanwhile, and between the count of an attempt and that lock it looks whether the row is as
//!   it was. What the application has claimed is left to it until the lease is over.
//! - A message that was given up has let later ones of its lane pass. Tried again, it comes after
//!   those that were handled, and before those that still wait. What arrives meanwhile does not
//!   wait for it, unless another of its lane waits too: whoever reads the stream knows lanes that
//!   are held from what failed in it, or waited when the partition became its own.
//! - What was given up waits again, whoever is to handle it: who that is only the consumer knows,
//!   which hands it to the application if that claims by itself.
//!
//! A decision is one transaction, under a lock that lets decisions into a schema one by one. It
//! waits for no row that another has locked, and so takes part in no deadlock.

use std::collections::HashSet;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, IsolationLevel, Transaction};
use uuid::Uuid;

use super::{Filter, Place, ROWS, Status, Stored, check_ids, refused, select};
use crate::contract::Contract;
use crate::error::Result;
use crate::selection::BEGIN;

/// What a person decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision<'a> {
    /// They are tried again, from the first attempt on: those that wait for it, at once, and those
    /// that were given up, before those of their lane that still wait.
    Retry,
    /// They are given up, for this reason: they are never handled, and hold nobody.
    Skip {
        /// Why.
        reason: &'a str,
    },
}

/// Why a message was left as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Left {
    /// Its handler is at work.
    BeingHandled,
    /// The application is at work on it.
    Claimed,
    /// Somebody gave it up before.
    Skipped,
}

impl Left {
    /// Why, and what can be done.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::BeingHandled => "being handled just now: look again in a minute",
            Self::Claimed => "claimed by the application: look again when its lease is over",
            Self::Skipped => "skipped already",
        }
    }

    /// A short name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BeingHandled => "being_handled",
            Self::Claimed => "claimed",
            Self::Skipped => "skipped_already",
        }
    }
}

/// A message as it was before the decision, and why that was not carried out, if it was not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decided {
    /// The message.
    pub message: Stored,
    /// Why it was left as it is.
    pub left: Option<Left>,
}

/// How long a handler is waited for: most take less.
const PATIENCE: Duration = Duration::from_secs(2);

/// How often it is asked whether that is done.
const ASK_AGAIN: Duration = Duration::from_millis(100);

/// What would be decided, if nothing happened until then. Nothing is changed.
///
/// # Errors
/// `Settings`: there is no message with one of the filter's ids. Those of the database.
pub async fn rehearse(
    client: &mut Client,
    contract: &Contract,
    filter: &Filter,
    decision: Decision<'_>,
) -> Result<Vec<Decided>> {
    decide_patiently(client, contract, filter, decision, None).await
}

/// Decides about the messages that fit: about all of them, or with an error about none. `by` is who
/// decides. They are returned in the order in which they were received.
///
/// It waits up to a minute for other decisions, and two seconds for handlers. It holds the messages
/// in memory, without what is in them: about a kilobyte each.
///
/// # Errors
/// `Settings`: there is no message with one of the filter's ids. Those of the database.
pub async fn decide(
    client: &mut Client,
    contract: &Contract,
    filter: &Filter,
    decision: Decision<'_>,
    by: &str,
) -> Result<Vec<Decided>> {
    decide_patiently(client, contract, filter, decision, Some(by)).await
}

/// Without `by` nothing is written.
async fn decide_patiently(
    client: &mut Client,
    contract: &Contract,
    filter: &Filter,
    decision: Decision<'_>,
    by: Option<&str>,
) -> Result<Vec<Decided>> {
    check_ids(client, contract, filter).await?;
    let begun = Instant::now();
    loop {
        let is_last = begun.elapsed() >= PATIENCE;
        let decided = decide_once(client, contract, filter, decision, by, is_last).await;
        if let Some(decided) = decided.map_err(|error| refused("decide about", contract, error))? {
            return Ok(decided);
        }
        tokio::time::sleep(ASK_AGAIN).await;
    }
}

/// None: something is being handled, and that is not to be left yet.
async fn decide_once(
    client: &mut Client,
    contract: &Contract,
    filter: &Filter,
    decision: Decision<'_>,
    by: Option<&str>,
    leaves_what_is_handled: bool,
) -> Result<Option<Vec<Decided>>, tokio_postgres::Error> {
    // Each statement must see what was committed before it.
    let level = IsolationLevel::ReadCommitted;
    let begin = client.build_transaction().isolation_level(level);
    let transaction = begin.read_only(false).start().await?;
    transaction.batch_execute(&contract.sql(BEGIN)).await?;
    let free = lock(&transaction, contract, filter).await?;
    let found = find(&transaction, contract, filter, &free).await?;
    let decided: Vec<Decided> = found
        .into_iter()
        .map(|message| Decided {
            left: match free.places.contains(&message.place) {
                true => decision.leaves(&message),
                false => Some(Left::BeingHandled),
            },
            message,
        })
        .collect();
    let is_handled = |decided: &Decided| decided.left == Some(Left::BeingHandled);
    if !leaves_what_is_handled && decided.iter().any(is_handled) {
        return Ok(None);
    }
    let Some(by) = by else {
        return Ok(Some(decided));
    };
    let changed = decided.iter().filter(|decided| decided.left.is_none());
    let changed: Vec<Place> = changed.map(|decided| decided.message.place).collect();
    write(&transaction, contract, &changed, decision, by).await?;
    transaction.commit().await?;
    Ok(Some(decided))
}

impl Decision<'_> {
    fn leaves(&self, message: &Stored) -> Option<Left> {
        match (message.status, self) {
            _ if message.is_claimed => Some(Left::Claimed),
            (Status::Skipped, Self::Skip { .. }) => Some(Left::Skipped),
            _ => None,
        }
    }
}

/// The messages that fit.
struct Chosen {
    sources: Vec<i32>,
    ids: Vec<Uuid>,
    /// Those of them that nobody is at work on, and which are locked now.
    places: HashSet<Place>,
}

async fn lock(
    transaction: &Transaction<'_>,
    contract: &Contract,
    filter: &Filter,
) -> Result<Chosen, tokio_postgres::Error> {
    let condition = Filter::columns().condition();
    let choose = format!("SELECT m.source, m.id FROM {ROWS} WHERE {condition}");
    let parameters = filter.parameters();
    let choose = contract.sql(&choose);
    let rows = transaction
        .query_typed(&choose, &parameters.typed())
        .await?;
    let sources: Vec<i32> = rows.iter().map(|row| row.get(0)).collect();
    let ids: Vec<Uuid> = rows.iter().map(|row| row.get(1)).collect();
    let chosen: [(&(dyn ToSql + Sync), Type); 2] =
        [(&sources, Type::INT4_ARRAY), (&ids, Type::UUID_ARRAY)];
    let locked = transaction
        .query_typed(&contract.sql(LOCK), &chosen)
        .await?;
    let place = |row: &tokio_postgres::Row| Place {
        source: row.get(0),
        id: row.get(1),
    };
    Ok(Chosen {
        places: locked.iter().map(place).collect(),
        sources,
        ids,
    })
}

/// Those that were chosen and still fit: a statement of its own, which sees them as they were locked.
async fn find(
    transaction: &Transaction<'_>,
    contract: &Contract,
    filter: &Filter,
    chosen: &Chosen,
) -> Result<Vec<Stored>, tokio_postgres::Error> {
    let condition = Filter::columns().condition();
    let still = format!(
        "{condition} AND (m.source, m.id) IN (SELECT * FROM unnest($9::integer[], $10::uuid[])) \
         ORDER BY m.seq, m.source"
    );
    let parameters = filter.parameters();
    let chosen: [(&(dyn ToSql + Sync), Type); 2] = [
        (&chosen.sources, Type::INT4_ARRAY),
        (&chosen.ids, Type::UUID_ARRAY),
    ];
    let parameters = [&parameters.typed()[..], &chosen].concat();
    select(transaction.client(), contract, &still, &parameters).await
}

async fn write(
    transaction: &Transaction<'_>,
    contract: &Contract,
    messages: &[Place],
    decision: Decision<'_>,
    by: &str,
) -> Result<(), tokio_postgres::Error> {
    if messages.is_empty() {
        return Ok(());
    }
    let sources: Vec<i32> = messages.iter().map(|place| place.source).collect();
    let ids: Vec<Uuid> = messages.iter().map(|place| place.id).collect();
    let messages: [(&(dyn ToSql + Sync), Type); 2] =
        [(&sources, Type::INT4_ARRAY), (&ids, Type::UUID_ARRAY)];
    let (sql, reason) = match decision {
        Decision::Retry => (RETRY, None),
        Decision::Skip { reason } => (SKIP, Some(reason)),
    };
    let by: [(&(dyn ToSql + Sync), Type); 2] = [(&by, Type::TEXT), (&reason, Type::TEXT)];
    let parameters = [&messages[..], &by].concat();
    transaction
        .query_typed(&contract.sql(sql), &parameters)
        .await?;
    transaction
        .query_typed(&contract.sql(SETTLE), &messages)
        .await?;
    Ok(())
}

const LOCK: &str = "SELECT m.source, m.id FROM :\"schema\".inbox_message AS m
     JOIN unnest($1::integer[], $2::uuid[]) AS chosen (source, id) ON chosen.source = m.source AND chosen.id = m.id
     ORDER BY m.seq
     FOR UPDATE OF m SKIP LOCKED";

/// One that the application may claim stays where it is.
const RETRY: &str = "UPDATE :\"schema\".inbox_message AS m
     SET status = CASE WHEN m.status = 'stored' THEN 'stored' ELSE 'waiting' END,
         due_at = CASE WHEN m.status = 'stored' THEN now() ELSE 'infinity' END,
         attempts = 0, is_claimed = false, owes_letter = false,
         decided_by = $3, decided_at = now(), reason = $4
     FROM unnest($1::integer[], $2::uuid[]) AS chosen (source, id)
     WHERE m.source = chosen.source AND m.id = chosen.id";

const SKIP: &str = "UPDATE :\"schema\".inbox_message AS m
     SET status = 'skipped', due_at = 'infinity', is_claimed = false, owes_letter = false,
         decided_by = $3, decided_at = now(), reason = $4
     FROM unnest($1::integer[], $2::uuid[]) AS chosen (source, id)
     WHERE m.source = chosen.source AND m.id = chosen.id";

/// Settles the lanes of these messages. Who was the head and is being handled keeps its time; the
/// consumer settles the lane once that has ended.
const SETTLE: &str = "WITH lanes AS (
         SELECT DISTINCT m.source, m.partition, m.lane
         FROM :\"schema\".inbox_message AS m
         JOIN unnest($1::integer[], $2::uuid[]) AS chosen (source, id)
           ON chosen.source = m.source AND chosen.id = m.id
     ), queue AS (
         SELECT q.source, q.id,
                row_number() OVER (PARTITION BY q.source, q.partition, q.lane ORDER BY q.seq) = 1 AS is_head
         FROM lanes AS l
         JOIN :\"schema\".inbox_message AS q
           ON q.source = l.source AND q.partition = l.partition AND q.lane = l.lane
         WHERE q.status = 'waiting'
     ), free AS MATERIALIZED (
         SELECT m.source, m.id, queue.is_head
         FROM queue
         JOIN :\"schema\".inbox_message AS m ON m.source = queue.source AND m.id = queue.id
         -- As in the consumer's statements: found by its id, and by no index of a status.
         WHERE m.status || '' = 'waiting' AND queue.is_head = (m.due_at = 'infinity')
         FOR UPDATE OF m SKIP LOCKED
     )
     UPDATE :\"schema\".inbox_message AS m
     SET due_at = CASE WHEN free.is_head THEN now() ELSE 'infinity'::timestamptz END
     FROM free
     WHERE m.source = free.source AND m.id = free.id";
