//! What people decide about events that wait: another try, or none.
//!
//! A decision only changes rows: the relay does what they say when it looks next, within a
//! second. What must hold between the two:
//!
//! - Of the waiting events of a topic and key, the first by number is its *head*, and it
//!   alone has a time at which it is due; one without a topic or a key that can be read is a
//!   head of its own. So whoever makes a head, or takes one away, settles the key: its
//!   head is due, unless it awaits its topic, and the others are due at infinity.
//! - What the relay is sending at this moment is left as it is: Kafka may have it already.
//! - An event that was given up has let later ones of its key pass. Tried again, it comes
//!   before those of its key that still wait, by its number, and after those that were sent.
//!
//! A decision is one transaction, under a lock that lets decisions into a schema one by one.
//! It locks the rows it will change in the order of their numbers, as the relay does. The
//! relay may settle a key at the same time for reasons of its own: it looks at each head
//! again before it is sent, and mends what two transactions could not see of each other.

use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, IsolationLevel, Transaction};

use super::event::{Parked, check_ids, refused, select};
use super::filter::{Filter, Status};
use super::same_key;
use crate::contract::Contract;
use crate::error::Result;
use crate::selection::BEGIN;

/// What a person decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision<'a> {
    /// They are tried again, from the first attempt on: those that wait for it, at once, and
    /// those that were given up, in their place in the queue of their key.
    Retry,
    /// They are given up, for this reason: they are never sent, and hold nobody.
    Skip {
        /// Why.
        reason: &'a str,
    },
}

/// Why an event was left as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Left {
    /// The relay is sending it.
    BeingSent,
    /// It goes out at its time, unless it is cancelled.
    Scheduled,
    /// The relay asks the brokers for its topic by itself.
    AwaitsTopic,
    /// Somebody gave it up before.
    Skipped,
}

impl Left {
    /// Why, and what can be done.
    pub const fn reason(self) -> &'static str {
        match self {
            Self::BeingSent => "being sent just now: look again in a minute",
            Self::Scheduled => "scheduled: `postbox cancel` takes it back before its time",
            Self::AwaitsTopic => {
                "waits for its topic, which the relay tries by itself: create the topic, or allow it"
            }
            Self::Skipped => "skipped already",
        }
    }

    /// A short name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BeingSent => "being_sent",
            Self::Scheduled => "scheduled",
            Self::AwaitsTopic => "awaits_topic",
            Self::Skipped => "skipped_already",
        }
    }
}

/// An event as it was before the decision, and why that was not carried out, if it was not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decided {
    /// The event.
    pub event: Parked,
    /// Why it was left as it is.
    pub left: Option<Left>,
}

impl Decision<'_> {
    fn leaves(&self, event: &Parked) -> Option<Left> {
        match (event.status, self) {
            _ if event.is_being_sent => Some(Left::BeingSent),
            (Status::Scheduled, _) => Some(Left::Scheduled),
            (Status::Waiting, Self::Retry) if event.awaits_topic => Some(Left::AwaitsTopic),
            (Status::Skipped, Self::Skip { .. }) => Some(Left::Skipped),
            _ => None,
        }
    }
}

/// What would be decided, if nothing happened until then. Nothing is changed.
///
/// # Errors
/// `Settings`: there is no event with one of the filter's ids. Those of the database.
pub async fn rehearse(
    client: &Client,
    contract: &Contract,
    filter: &Filter,
    decision: Decision<'_>,
) -> Result<Vec<Decided>> {
    check_ids(client, contract, filter).await?;
    let found = select(client, contract, filter, None).await;
    let found = found.map_err(|error| refused("read", contract, error))?;
    Ok(sorted(found, decision))
}

/// Decides about the events that fit: about all of them, or with an error about none. `by` is
/// who decides. They are returned in the order in which the relay read them.
///
/// It waits up to a minute for each lock that somebody else has, and holds the events in
/// memory, without their rows: about a kilobyte each.
///
/// # Errors
/// `Settings`: there is no event with one of the filter's ids. Those of the database.
pub async fn decide(
    client: &mut Client,
    contract: &Contract,
    filter: &Filter,
    decision: Decision<'_>,
    by: &str,
) -> Result<Vec<Decided>> {
    check_ids(client, contract, filter).await?;
    loop {
        match decide_once(client, contract, filter, decision, by).await {
            // With the relay: it was ended, and nothing is changed yet.
            Err(error) if error.code() == Some(&SqlState::T_R_DEADLOCK_DETECTED) => {}
            decided => return decided.map_err(|error| refused("decide about", contract, error)),
        }
    }
}

async fn decide_once(
    client: &mut Client,
    contract: &Contract,
    filter: &Filter,
    decision: Decision<'_>,
    by: &str,
) -> Result<Vec<Decided>, tokio_postgres::Error> {
    // Each statement must see what was committed while the one before it waited.
    let level = IsolationLevel::ReadCommitted;
    let begin = client.build_transaction().isolation_level(level);
    let transaction = begin.read_only(false).start().await?;
    transaction.batch_execute(&contract.sql(BEGIN)).await?;
    let parameters = filter.parameters();
    let lock = contract.sql(&lock());
    transaction.query_typed(&lock, &parameters.typed()).await?;
    let found = select(transaction.client(), contract, filter, None).await?;
    let decided = sorted(found, decision);
    let changed: Vec<&Parked> = decided
        .iter()
        .filter(|decided| decided.left.is_none())
        .map(|decided| &decided.event)
        .collect();
    write(&transaction, contract, &changed, decision, by).await?;
    transaction.commit().await?;
    Ok(decided)
}

async fn write(
    transaction: &Transaction<'_>,
    contract: &Contract,
    events: &[&Parked],
    decision: Decision<'_>,
    by: &str,
) -> Result<(), tokio_postgres::Error> {
    if events.is_empty() {
        return Ok(());
    }
    let ids: Vec<&str> = events.iter().map(|event| &*event.id).collect();
    let relays: Vec<&str> = events.iter().map(|event| &*event.relay).collect();
    let events: [(&(dyn ToSql + Sync), Type); 2] =
        [(&ids, Type::TEXT_ARRAY), (&relays, Type::TEXT_ARRAY)];
    let (sql, reason) = match decision {
        Decision::Retry => (RETRY, None),
        Decision::Skip { reason } => (SKIP, Some(reason)),
    };
    let by: [(&(dyn ToSql + Sync), Type); 2] = [(&by, Type::TEXT), (&reason, Type::TEXT)];
    let parameters = [&events[..], &by].concat();
    transaction
        .query_typed(&contract.sql(sql), &parameters)
        .await?;
    transaction
        .query_typed(&contract.sql(SETTLE), &events)
        .await?;
    Ok(())
}

fn sorted(found: Vec<Parked>, decision: Decision<'_>) -> Vec<Decided> {
    let decided = |event| Decided {
        left: decision.leaves(&event),
        event,
    };
    found.into_iter().map(decided).collect()
}

/// Locks the events that fit, and of each of their keys the first waiting one that does not
/// fit: it will be the head, or will no longer be.
fn lock() -> String {
    format!(
        "WITH chosen AS MATERIALIZED (
             SELECT p.id, p.relay, p.topic, p.key FROM :\"schema\".parked AS p WHERE {}
         ), keys AS (
             SELECT DISTINCT relay, topic, key FROM chosen WHERE topic IS NOT NULL AND key IS NOT NULL
         ), heads AS (
             SELECT head.id, k.relay FROM keys AS k CROSS JOIN LATERAL (
                 SELECT q.id FROM :\"schema\".parked AS q
                 WHERE q.status = 'waiting' AND q.relay = k.relay AND {} AND ({}) IS NOT TRUE
                 ORDER BY q.number LIMIT 1
             ) AS head
         )
         SELECT count(*) FROM (
             SELECT FROM :\"schema\".parked AS p
             JOIN (SELECT id, relay FROM chosen UNION SELECT id, relay FROM heads) AS wanted
               ON wanted.id = p.id AND wanted.relay = p.relay
             ORDER BY p.number, p.relay FOR UPDATE OF p
         ) AS locked",
        Filter::condition("p"),
        same_key("q", "k"),
        Filter::condition("q")
    )
}

const RETRY: &str = "UPDATE :\"schema\".parked AS p \
     SET status = 'waiting', attempts = 0, taken_at = NULL, awaits_topic = false, owes_letter = false, \
         due_at = CASE WHEN p.topic IS NULL OR p.key IS NULL THEN now() ELSE 'infinity' END, \
         decided_by = $3, decided_at = now(), reason = $4 \
     FROM unnest($1::text[], $2::text[]) AS chosen (id, relay) \
     WHERE p.id = chosen.id AND p.relay = chosen.relay";

const SKIP: &str = "UPDATE :\"schema\".parked AS p \
     SET status = 'skipped', taken_at = NULL, awaits_topic = false, owes_letter = false, due_at = 'infinity', \
         decided_by = $3, decided_at = now(), reason = $4 \
     FROM unnest($1::text[], $2::text[]) AS chosen (id, relay) \
     WHERE p.id = chosen.id AND p.relay = chosen.relay";

/// Settles the keys of these events. Who was the head and is being sent keeps its time, which
/// the relay writes when it knows how that went.
const SETTLE: &str = "WITH keys AS (
         SELECT DISTINCT p.relay, p.topic, p.key
         FROM :\"schema\".parked AS p
         JOIN unnest($1::text[], $2::text[]) AS chosen (id, relay) ON p.id = chosen.id AND p.relay = chosen.relay
         WHERE p.topic IS NOT NULL AND p.key IS NOT NULL
     ), queue AS (
         SELECT q.id, q.relay,
                row_number() OVER (PARTITION BY q.relay, q.topic, q.key ORDER BY q.number) = 1 AS is_head
         FROM keys AS k JOIN :\"schema\".parked AS q
           ON q.relay = k.relay AND q.key = k.key AND q.topic = k.topic
         WHERE q.status = 'waiting'
     )
     UPDATE :\"schema\".parked AS p
     SET due_at = CASE WHEN queue.is_head THEN now() ELSE 'infinity' END
     FROM queue
     WHERE p.id = queue.id AND p.relay = queue.relay AND CASE
         WHEN queue.is_head THEN p.due_at = 'infinity' AND NOT p.awaits_topic
         ELSE p.due_at < 'infinity'
             AND (p.taken_at > clock_timestamp() - interval '1 minute') IS NOT TRUE
     END";
