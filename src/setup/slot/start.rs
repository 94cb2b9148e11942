//! Where a slot begins, and what lies before it.
//!
//! A slot is created over the replication protocol, with an *exported snapshot*:
//! it sees what committed before the slot's consistent point, and the slot streams
//! the rest. Under that snapshot, once ordinary sessions see as much, we read three things. Rows it sees the slot will
//! never give. Itself, as text, is what tells them from those it gives. And the publication's identity is taken as of
//! the very point where the slot begins.

use std::time::Duration;

use pgwire_replication::{PgWireError, ReplicationClient};
use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, IsolationLevel, Transaction};

use super::{drop_slot, object};
use crate::catalog::{self, SlotState};
use crate::contract::Contract;
use crate::database::{sort, sort_replication, within};
use crate::error::{Error, ErrorKind, Result};
use crate::setup::backfill;
use crate::setup::{ANSWER_MAX, PATIENCE, UNLIMITED};

/// Where a slot begins.
pub(in crate::setup) struct Start {
    pub(in crate::setup) lsn: PgLsn,
    pub(in crate::setup) snapshot: String,
    /// Rows that the slot does not give. Of a slot that someone else made: rows
    /// that it may not give.
    pub(in crate::setup) rows_before: i64,
    /// None of those rows has this `seq` or a smaller one.
    pub(in crate::setup) seq_before: i64,
    pub(in crate::setup) publication_identity: Option<String>,
}

/// How long the server may take to begin a slot. It waits for each open transaction in
/// turn, and says nothing meanwhile, as if it had died.
const CREATION_MAX: Duration = Duration::from_secs(600);

/// How often it is tried, and how long to wait in between, where too many transactions are
/// on their way for a slot's snapshot: the next one may find fewer.
const CREATIONS: usize = 5;
const CREATION_PAUSE: Duration = Duration::from_secs(1);

/// Transaction ids below 3 are reserved: this snapshot sees no row of ours.
pub(in crate::setup) const SEES_NOTHING: &str = "3:3:";

/// Makes the slot, in place of the one there is, and looks at what there was before it
/// that the snapshot `since` does not see.
///
/// Of a table of others it looks at all rows that are not published, and, if it `copies`,
/// keeps them for the relay: see `setup/backfill.rs`.
///
/// Whether standbys keep a copy is not ours to choose: it is as it was. Of a slot that
/// is gone, nobody knows.
pub(in crate::setup) async fn create_slot(
    client: &mut Client,
    replication: &mut ReplicationClient,
    contract: &Contract,
    existing: Option<&SlotState>,
    since: &str,
    copies: bool,
) -> Result<Start> {
    if existing.is_some() {
        drop_slot(replication, contract).await?;
        failpoint!("slot_dropped");
    }
    let slot = &contract.slot;
    // The older syntax where it can say it: Postgres 14 has no other, and all later
    // ones know it.
    let options = match existing.is_some_and(|slot| slot.failover) {
        true => "(SNAPSHOT 'export', FAILOVER)",
        false => "EXPORT_SNAPSHOT",
    };
    let command = format!("CREATE_REPLICATION_SLOT {slot} LOGICAL pgoutput {options}");
    let doing = format!("create {}", object(contract));
    let created = async {
        for _ in 1..CREATIONS {
            let created = replication.simple_query(&command).await;
            if !created.as_ref().is_err_and(|error| is(error, TOO_LARGE)) {
                return Ok(created);
            }
            tokio::time::sleep(CREATION_PAUSE).await;
        }
        Ok(replication.simple_query(&command).await)
    };
    let rows = match within(CREATION_MAX, &doing, created).await? {
        Ok(rows) => rows,
        Err(error) => {
            let (too_large, too_late) = (is(&error, TOO_LARGE), is(&error, LOCK_TIMEOUT));
            let error = sort_replication(doing, error);
            let failover = existing.is_some_and(|slot| slot.failover);
            let why = match (too_large, too_late) {
                (true, _) => snapshot_too_large(contract, failover),
                (_, true) => open_transaction(client, contract, failover).await?,
                _ => return Err(error),
            };
            return Err(why.caused_by(error));
        }
    };
    failpoint!("slot_created");
    // Slot, consistent point, snapshot, plugin.
    let text = |column: usize| {
        let value = rows.first().and_then(|row| row.get(column)?.as_ref());
        value.and_then(|bytes| std::str::from_utf8(bytes).ok())
    };
    let (Some(lsn), Some(exported)) = (text(1).and_then(|lsn| lsn.parse().ok()), text(2)) else {
        return Err(Error::new(
            ErrorKind::Unexpected,
            format!(
                "the server created {} and did not say where",
                object(contract)
            ),
        ));
    };
    let doing = format!("read the outbox before {}", object(contract));
    let snapshot = text_of(client, exported).await;
    let snapshot = snapshot.map_err(|error| sort(&doing, error))?;
    let seen = async {
        let seen = catalog::wait_until_seen(client, &snapshot).await;
        seen.map_err(|error| sort(&doing, error))
    };
    within(
        ANSWER_MAX,
        "see all that was committed before the slot",
        seen,
    )
    .await?;
    let start = match contract.outbox.is_ours() {
        true => look_before(client, contract, since, lsn, exported, snapshot).await,
        false => look_aside(client, contract, copies, lsn, exported, snapshot).await,
    };
    start.map_err(|error| sort(&doing, error))
}

/// The exported snapshot as text. Reads no table: see `catalog/snapshot.rs`.
async fn text_of(client: &mut Client, exported: &str) -> Result<String, tokio_postgres::Error> {
    let transaction = import(client, exported, true).await?;
    let sql = "SELECT pg_current_snapshot()::text";
    let row = transaction.query_one(sql, &[]).await?;
    transaction.commit().await?;
    Ok(in_order(row.get(0)))
}

/// What there was before the slot, through its exported snapshot.
async fn look_before(
    client: &mut Client,
    contract: &Contract,
    since: &str,
    lsn: PgLsn,
    exported: &str,
    snapshot: String,
) -> Result<Start, tokio_postgres::Error> {
    let transaction = import(client, exported, true).await?;
    transaction.batch_execute(UNLIMITED).await?;
    let sql = contract.sql(
        "SELECT count(*), coalesce(min(seq) - 1, 0), :\"schema\".publication_identity(:'publication') \
         FROM :\"schema\".outbox WHERE NOT pg_visible_in_snapshot(xid, $1::text::pg_snapshot)",
    );
    let row = transaction.query_one(&sql, &[&since]).await?;
    transaction.commit().await?;
    Ok(Start {
        lsn,
        snapshot,
        rows_before: row.get(0),
        seq_before: row.get(1),
        publication_identity: row.get(2),
    })
}

/// The same, of a table that does not say when a row was committed.
async fn look_aside(
    client: &mut Client,
    contract: &Contract,
    copies: bool,
    lsn: PgLsn,
    exported: &str,
    snapshot: String,
) -> Result<Start, tokio_postgres::Error> {
    let transaction = import(client, exported, !copies).await?;
    transaction.batch_execute(UNLIMITED).await?;
    let rows_before = match copies {
        true => backfill::copy(&transaction, contract).await?,
        false => backfill::count(&transaction, contract).await?,
    };
    let sql = contract.sql("SELECT :\"schema\".publication_identity(:'publication')");
    let row = transaction.query_one(&sql, &[]).await?;
    transaction.commit().await?;
    Ok(Start {
        lsn,
        snapshot,
        rows_before,
        seq_before: 0,
        publication_identity: row.get(0),
    })
}

/// A transaction that sees what the exported snapshot sees.
async fn import<'c>(
    client: &'c mut Client,
    exported: &str,
    read_only: bool,
) -> Result<Transaction<'c>, tokio_postgres::Error> {
    let transaction = client
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(read_only)
        .start()
        .await?;
    let exported = postgres_protocol::escape::escape_literal(exported);
    let import = format!("SET TRANSACTION SNAPSHOT {exported}");
    transaction.batch_execute(&import).await?;
    Ok(transaction)
}

/// A snapshot as the type `pg_snapshot` takes it.
///
/// The server puts a slot's snapshot together from the WAL. Its `xmin` follows the
/// oldest transaction that runs when the slot begins; its `xmax` follows commits only,
/// and not those from before the last wait for transactions that were open. So `xmin`
/// may be past `xmax`, as in `7366:7365:`, which the type refuses. The server looks at
/// `xmin` first: whatever is below it has ended, is visible if it committed, and is not
/// given by the slot, whichever side of `xmax` it is on.
fn in_order(snapshot: String) -> String {
    let mut parts = snapshot.split(':').map(str::parse::<u64>);
    match (parts.next(), parts.next()) {
        (Some(Ok(xmin)), Some(Ok(xmax))) if xmin > xmax => format!("{xmin}:{xmin}:"),
        _ => snapshot,
    }
}

/// What the server says where a slot's snapshot would hold more transactions than there is
/// room for, and where it has waited for one for as long as it may.
const TOO_LARGE: &str = "40001";
const LOCK_TIMEOUT: &str = "55P03";

fn is(error: &PgWireError, state: &str) -> bool {
    error.to_string().contains(&format!("SQLSTATE {state}"))
}

/// Those that were rolled back count, if they began since the oldest that is open.
fn snapshot_too_large(contract: &Contract, failover: bool) -> Error {
    let message = format!(
        "{} was not made, as too many transactions had begun since the oldest that was open, {CREATIONS} times: \
         end those that stay open, or write less meanwhile, and run the command again{}",
        object(contract),
        and_follow(contract, failover)
    );
    Error::new(ErrorKind::Slot, message)
}

/// What else is to be done where the slot is gone that was to be made anew.
fn and_follow(contract: &Contract, failover: bool) -> String {
    match failover {
        true => format!(
            ", then, as the next slot will not follow a fail-over as this one did, \
             ALTER_REPLICATION_SLOT {} (FAILOVER) in a replication session",
            contract.slot
        ),
        false => String::new(),
    }
}

/// A slot begins when every transaction that was open has ended.
async fn open_transaction(client: &Client, contract: &Contract, failover: bool) -> Result<Error> {
    let sql = "SELECT format('process %s of database \"%s\" has been in one since %s', pid, datname, \
                             date_trunc('second', xact_start)) \
               FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid() \
               UNION ALL \
               SELECT format('\"%s\" of database \"%s\" has been prepared since %s', gid, database, \
                             date_trunc('second', prepared)) \
               FROM pg_prepared_xacts LIMIT 3";
    let rows = client
        .query(sql, &[])
        .await
        .map_err(|error| sort("look for open transactions", error))?;
    let found: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let named = match found.is_empty() {
        true => "pg_stat_activity names it in backend_xid".to_owned(),
        false => found.join(", "),
    };
    let mut message = format!(
        "{} was not made, as a transaction stayed open for {PATIENCE}: {named}; end it and run the command again",
        object(contract)
    );
    message += &and_follow(contract, failover);
    Ok(Error::new(ErrorKind::Slot, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_in_order_stays_as_it_is() {
        for text in ["5:5:", "5:9:", "5:9:5,7", "nonsense", "5:x:"] {
            assert_eq!(in_order(text.to_owned()), text);
        }
    }

    #[test]
    fn a_snapshot_that_ends_before_it_begins_sees_all_below_its_beginning() {
        for (text, expected) in [("7366:7365:", "7366:7366:"), ("9:5:6,7", "9:9:")] {
            assert_eq!(in_order(text.to_owned()), expected);
        }
    }
}
