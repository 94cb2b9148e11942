//! The partitions of an outbox that `postbox setup --partitioned` has made: they are made ahead,
//! and dropped when all of their rows may go.
//!
//! `sql/partitioned.sql` is the contract: a table partitioned by `created_at`, a default partition
//! for rows of any other time, and functions which list the partitions, make those that are
//! to be there, and drop one, for roles that own no table. What is misleading about it:
//!
//! - **A partition is not a time that is over.** A row has the time at which its transaction began,
//!   or one that the application chose. So a transaction that stays open, or a clock that is behind,
//!   writes to a partition long after its end, and what it has not committed nobody sees. Whoever
//!   looks at the rows first and drops the table then loses what came in between.
//! - **Detaching is no preparation for dropping.** A relay that polls, or a recovery, reads the rows of
//!   the outbox between two snapshots, once. Rows of a table that is detached at that moment are in no
//!   window any more, and to attach the table again does not bring them back.
//! - **A row that is moved is sent twice**: a slot gives an insert, wherever it comes from. So rows
//!   stay in the default partition.
//!
//! So a partition is dropped in one transaction:
//!
//! ```text
//!   hold_partition    LOCK TABLE … IN SHARE MODE: its writers have ended, and no other begins;
//!                     those of all other partitions go on
//!   SELECT …          rows that may not go, however long that takes
//!   drop_partition    DROP TABLE …, which detaches it, too: for a moment, the outbox is locked
//!   COMMIT
//! ```
//!
//! A crash leaves all or nothing, and never a table that was detached. The last lock conflicts with
//! everything, and whoever comes waits behind whoever waits: so it is waited for but a moment, and
//! tried again. `DETACH … CONCURRENTLY` needs none, but is refused beside a default partition, and in
//! a transaction.

use std::time::Duration;

use postgres_protocol::escape::escape_literal;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{ToSql, Type};
use tracing::debug;

use crate::cleanup;
use crate::contract::Contract;
use crate::database::{query_after, sort, sort_with};
use crate::error::{Error, Result};

/// What [`make`] found and did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Made {
    /// How many partitions it has made.
    pub made: u64,
    /// How many it has not, as the default partition has rows of their times.
    pub skipped: u64,
    /// For how long from now on there is a partition for each row.
    pub ahead: Duration,
    /// How many rows are in the default partition; [`DEFAULT_ROWS_MAX`] if they are more.
    pub default_rows: u64,
}

/// More rows of the default partition are not counted.
pub const DEFAULT_ROWS_MAX: u64 = 100_000;

/// A partition that is not the default one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    /// The table, as SQL takes it.
    pub table: String,
    /// From when on its rows were created, in UTC.
    pub since: String,
    /// And before when.
    pub until: String,
}

/// What became of an old partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fate {
    /// It is gone, and all of its rows with it.
    Dropped,
    /// It has rows that may not go.
    Needed,
    /// Somebody reads or writes it, or the outbox, all the time.
    Busy,
    /// Somebody else has dropped it, or taken it out of the outbox.
    Missing,
}

/// What a role needs to drop partitions, beside the right to read the outbox and what is compared with
/// it: SQL for psql.
pub const DROP_RIGHTS: &str = include_str!("../sql/grant_drop_partitions.sql");

/// What a new partition must not be in the way of, the default partition is searched for: rarely it has
/// rows, and never should it have so many that this takes long. What another has made meanwhile is seen.
const BEGIN: &str = "BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = 5000";

/// Whether the outbox of this contract is partitioned by us.
///
/// # Errors
/// If the catalogue cannot be read.
pub async fn are_ours(client: &Client, contract: &Contract) -> Result<bool> {
    let sql = "SELECT to_regprocedure($1) IS NOT NULL";
    let function = format!("{}()", contract.table("make_partitions"));
    let found = client
        .query_typed_one(sql, &[(&function, Type::TEXT)])
        .await;
    Ok(found.map_err(|error| sort(doing(contract), error))?.get(0))
}

/// Makes the partitions that are to be there by now: a day's for a week ahead, an hour's for a day
/// ahead. Two may do so at once. Not cancel-safe: it may leave its transaction open.
///
/// # Errors
/// If the server refuses: `Rights` to a role that was not granted it. A lock that was waited for in
/// vain is transient.
pub async fn make(client: &Client, contract: &Contract) -> Result<Made> {
    let sql = contract.sql(
        "SELECT made, skipped, seconds_ahead, default_rows FROM :\"schema\".make_partitions()",
    );
    let made = query_after(BEGIN, client, &sql, &[]).await;
    let rows = made.map_err(|error| sort(format!("make {}", object(contract)), error))?;
    let number = |column| rows[0].get::<_, i64>(column).unsigned_abs();
    Ok(Made {
        made: number(0),
        skipped: number(1),
        ahead: Duration::try_from_secs_f64(rows[0].get(2)).unwrap_or(Duration::MAX),
        default_rows: number(3),
    })
}

/// The partitions that there are, but for the default one, in the order of their times.
///
/// # Errors
/// If the catalogue cannot be read; `Rights` to who may not clean up.
pub async fn list(client: &Client, contract: &Contract) -> Result<Vec<Partition>> {
    find(client, contract, None).await
}

/// Those of them whose end was as long ago, or longer, by the server's clock: no row of them is younger.
///
/// # Errors
/// As [`list`].
pub async fn older_than(
    client: &Client,
    contract: &Contract,
    age: Duration,
) -> Result<Vec<Partition>> {
    find(client, contract, Some(age)).await
}

async fn find(
    client: &Client,
    contract: &Contract,
    age: Option<Duration>,
) -> Result<Vec<Partition>> {
    let sql = contract.sql(
        "SELECT partition::text, (since AT TIME ZONE 'UTC')::text, (until AT TIME ZONE 'UTC')::text \
         FROM :\"schema\".partitions() \
         WHERE $1::float8 IS NULL OR until <= now() - make_interval(secs => $1) ORDER BY since",
    );
    let seconds = age.map(|age| age.as_secs_f64());
    let rows = client.query_typed(&sql, &[(&seconds, Type::FLOAT8)]).await;
    let rows = rows.map_err(|error| refused(doing(contract), error))?;
    let partition = |row: &tokio_postgres::Row| Partition {
        table: row.get(0),
        since: row.get(1),
        until: row.get(2),
    };
    Ok(rows.iter().map(partition).collect())
}

/// Drops a partition if all of its rows may go, in the transaction that is open, which must be READ
/// COMMITTED. It takes as long as it takes to look at all of its rows. If it is [`Fate::Busy`], the
/// transaction can only be rolled back: try again later.
///
/// `may_go` is an SQL condition: whether the row `o` of the outbox may be deleted, as in `DELETE FROM
/// outbox AS o WHERE …`. It must not be true of what any relay may still have to send.
/// `pg_visible_in_snapshot(o.xid, …)`, in a snapshot that all relays have passed, is right: what is
/// committed later it does not see.
///
/// The default partition is never dropped: its rows are deleted one by one.
///
/// # Errors
/// `Rights` to who lacks [`DROP_RIGHTS`]; what the server says of the condition.
pub async fn drop_if(
    client: &Client,
    contract: &Contract,
    partition: &Partition,
    may_go: &str,
) -> Result<Fate> {
    match drop_held(client, contract, partition, may_go).await {
        Ok(fate) => Ok(fate),
        // A writer to the partition may hold what we wait for, and wait for what we hold: either is ended.
        Err(error)
            if [
                Some(&SqlState::LOCK_NOT_AVAILABLE),
                Some(&SqlState::T_R_DEADLOCK_DETECTED),
            ]
            .contains(&error.code()) =>
        {
            debug!("partition {} is in use: {error}", partition.table);
            Ok(Fate::Busy)
        }
        Err(error) => Err(refused(
            format!("drop partition {}", partition.table),
            error,
        )),
    }
}

/// What would become of a partition: whether all of its rows may go, without a lock.
///
/// # Errors
/// As [`drop_if`].
pub async fn fate(
    client: &Client,
    contract: &Contract,
    partition: &Partition,
    may_go: &str,
) -> Result<Fate> {
    let looked = async {
        client.batch_execute(SETTINGS).await?;
        let is_needed = is_needed(contract, partition, may_go);
        client.query_typed_one(&is_needed, &[]).await
    };
    match looked.await {
        Ok(row) if row.get(0) => Ok(Fate::Needed),
        Ok(_) => Ok(Fate::Dropped),
        Err(error) => Err(refused(
            format!("look at partition {}", partition.table),
            error,
        )),
    }
}

/// A policy that hides rows must be an error, and a look may take long.
const SETTINGS: &str = "SET LOCAL row_security = off; SET LOCAL statement_timeout = 0; SET LOCAL enable_seqscan = on; \
                        SET LOCAL enable_bitmapscan = on";

/// Whether a row of the partition may not go, in SQL. Of this partition alone, as its bounds
/// are constants; by a role that may only read the outbox.
fn is_needed(contract: &Contract, partition: &Partition, may_go: &str) -> String {
    format!(
        "SELECT EXISTS (SELECT FROM {} AS o WHERE o.created_at >= {} AND o.created_at < {} AND ({may_go}) IS NOT TRUE)",
        contract.table("outbox"),
        bound(&partition.since),
        bound(&partition.until)
    )
}

/// A bound of a partition, in SQL.
fn bound(text: &str) -> String {
    format!("{}::timestamp AT TIME ZONE 'UTC'", escape_literal(text))
}

async fn drop_held(
    client: &Client,
    contract: &Contract,
    partition: &Partition,
    may_go: &str,
) -> Result<Fate, tokio_postgres::Error> {
    client.batch_execute(SETTINGS).await?;
    let is_needed = is_needed(contract, partition, may_go);
    // Of most that are needed still this is known without a lock.
    if client.query_typed_one(&is_needed, &[]).await?.get(0) {
        return Ok(Fate::Needed);
    }
    let table: &[(&(dyn ToSql + Sync), Type)] = &[(&partition.table, Type::TEXT)];
    let hold = contract.sql("SELECT :\"schema\".hold_partition($1::text::regclass)");
    let is_held = match client.query_typed_one(&hold, table).await {
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => false,
        held => held?.get(0),
    };
    if !is_held {
        return Ok(Fate::Missing);
    }
    // Nor may it have got other bounds since it was looked for.
    let is_same = contract.sql(&format!(
        "SELECT EXISTS (SELECT FROM :\"schema\".partitions() WHERE partition = $1::text::regclass \
                                                             AND since = {} AND until = {})",
        bound(&partition.since),
        bound(&partition.until)
    ));
    if !client
        .query_typed_one(&is_same, table)
        .await?
        .get::<_, bool>(0)
    {
        return Ok(Fate::Missing);
    }
    if client.query_typed_one(&is_needed, &[]).await?.get(0) {
        return Ok(Fate::Needed);
    }
    let drop = contract.sql("SELECT :\"schema\".drop_partition($1::text::regclass)::text");
    client.query_typed(&drop, table).await?;
    Ok(Fate::Dropped)
}

/// What is made, for messages.
pub(crate) fn object(contract: &Contract) -> String {
    format!("partitions of {}", contract.table("outbox"))
}

/// Sorts an error of a statement that only who cleans up needs.
fn refused(doing: String, error: tokio_postgres::Error) -> Error {
    sort_with(doing, error, |sqlstate, message| {
        cleanup::is_refused(sqlstate, message).then(|| cleanup::RIGHTS.to_owned())
    })
}

fn doing(contract: &Contract) -> String {
    format!("look at the {}", object(contract))
}
