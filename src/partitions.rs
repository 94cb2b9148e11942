//! The partitions of an outbox that `postbox setup --partitioned` has made: they are made ahead,
//! and dropped when all of their rows may go.
//!
//! `sql/partitioned.sql` is the contract: a table partitioned by `created_at`, a default partition
//! for rows of any other time, and two functions, of which one lists the partitions and the other
//! makes those that are to be there. What is misleading about it:
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
//!   LOCK TABLE partition IN SHARE MODE     its writers have ended, and no other begins;
//!                                          those of all other partitions go on
//!   SELECT … rows that may not go          however long that takes
//!   DROP TABLE partition                   detaches it, too: for a moment, the outbox is locked
//!   COMMIT
//! ```
//!
//! A crash leaves all or nothing, and never a table that was detached. The last lock conflicts with
//! everything, and whoever comes waits behind whoever waits: so it is waited for but a moment, and
//! tried again. `DETACH … CONCURRENTLY` needs none, but is refused beside a default partition, and in
//! a transaction.

use std::time::Duration;

use postgres_protocol::escape::escape_literal;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, IsolationLevel};
use tracing::debug;

use crate::contract::Contract;
use crate::database::{query_after, sort};
use crate::error::Result;

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
}

/// The outbox is locked against all that use it while it is waited for, this long at most; all that
/// come meanwhile wait, too.
const OUTBOX_LOCK: &str = "SET LOCAL lock_timeout = 200";

/// Only who writes to an old partition waits for this one. Longer than a server takes to end its own
/// vacuum of it. Its rows are looked at for as long as that takes, and a policy that hides some must be
/// an error.
const PARTITION_LOCK: &str = "SET LOCAL lock_timeout = 5000; SET LOCAL statement_timeout = 0; \
                              SET LOCAL row_security = off";

/// How often a lock is asked for, and how long to wait in between.
const ATTEMPTS: usize = 10;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(500);

/// What a new partition must not be in the way of, the default partition is searched for: rarely it has
/// rows, and never should it have so many that this takes long.
const BEGIN: &str = "BEGIN; SET LOCAL statement_timeout = 5000";

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
/// If the catalogue cannot be read; `Rights` to who does not own the outbox.
pub async fn list(client: &Client, contract: &Contract) -> Result<Vec<Partition>> {
    older_than(client, contract, None).await
}

async fn older_than(
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
    let rows = rows.map_err(|error| sort(doing(contract), error))?;
    let partition = |row: &tokio_postgres::Row| Partition {
        table: row.get(0),
        since: row.get(1),
        until: row.get(2),
    };
    Ok(rows.iter().map(partition).collect())
}

/// Drops the partitions all of whose rows may go, and says what became of each that is as old: whose end
/// was `age` ago or longer, by the server's clock.
///
/// `may_go` is an SQL condition: whether the row `o` of the outbox may be deleted, as in `DELETE FROM
/// outbox AS o WHERE …`. It must be false for what any relay may still have to send. What is committed
/// or becomes visible while it is looked at does not count as gone; so `pg_visible_in_snapshot(o.xid, …)`
/// in a snapshot that was taken before, and that all relays have passed, is right.
///
/// The default partition is never dropped: its rows are deleted one by one. Run it as the outbox' owner.
///
/// # Errors
/// `Rights` to who is not the owner; what the server says of the condition. What was dropped before
/// stays so.
pub async fn drop_older_than(
    client: &mut Client,
    contract: &Contract,
    age: Duration,
    may_go: &str,
) -> Result<Vec<(Partition, Fate)>> {
    let mut fates = Vec::new();
    for partition in older_than(client, contract, Some(age)).await? {
        let fate = try_to_drop(client, contract, &partition, may_go).await;
        let doing = || format!("drop partition {} of the outbox", partition.table);
        if let Some(fate) = fate.map_err(|error| sort(doing(), error))? {
            fates.push((partition, fate));
        }
    }
    Ok(fates)
}

/// `None` if somebody else has dropped it.
async fn try_to_drop(
    client: &mut Client,
    contract: &Contract,
    partition: &Partition,
    may_go: &str,
) -> Result<Option<Fate>, tokio_postgres::Error> {
    let mut attempts = 1;
    loop {
        match drop_at_once(client, contract, partition, may_go).await {
            Ok(fate) => return Ok(Some(fate)),
            Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => return Ok(None),
            Err(error) if is_contention(&error) && attempts < ATTEMPTS => {
                debug!("partition {} is in use: {error}", partition.table);
                attempts += 1;
                tokio::time::sleep(ATTEMPT_PAUSE).await;
            }
            Err(error) if is_contention(&error) => return Ok(Some(Fate::Busy)),
            Err(error) => return Err(error),
        }
    }
}

/// A writer to the partition holds what we wait for, and waits for what we hold: either may be ended.
fn is_contention(error: &tokio_postgres::Error) -> bool {
    let code = error.code();
    code == Some(&SqlState::LOCK_NOT_AVAILABLE) || code == Some(&SqlState::T_R_DEADLOCK_DETECTED)
}

async fn drop_at_once(
    client: &mut Client,
    contract: &Contract,
    partition: &Partition,
    may_go: &str,
) -> Result<Fate, tokio_postgres::Error> {
    let table = &partition.table;
    let is_needed =
        format!("SELECT EXISTS (SELECT FROM {table} AS o WHERE ({may_go}) IS NOT TRUE)");
    // Most that are needed still are known without a lock.
    if client.query_one(&is_needed, &[]).await?.get(0) {
        return Ok(Fate::Needed);
    }
    // Each statement sees what was committed by its beginning: all that was written before the lock.
    let transaction = client
        .build_transaction()
        .isolation_level(IsolationLevel::ReadCommitted)
        .start()
        .await?;
    let lock = format!("{PARTITION_LOCK}; LOCK TABLE {table} IN SHARE MODE");
    transaction.batch_execute(&lock).await?;
    // Somebody may have taken it out of the outbox, for a reason of his own.
    let is_partition = contract.sql(&format!(
        "SELECT EXISTS (SELECT FROM :\"schema\".partitions() \
                        WHERE partition = {}::regclass AND (until AT TIME ZONE 'UTC')::text = {})",
        escape_literal(table),
        escape_literal(&partition.until)
    ));
    let is_partition: bool = transaction.query_one(&is_partition, &[]).await?.get(0);
    if !is_partition || transaction.query_one(&is_needed, &[]).await?.get(0) {
        return Ok(Fate::Needed);
    }
    let drop = format!("{OUTBOX_LOCK}; DROP TABLE {table}");
    transaction.batch_execute(&drop).await?;
    transaction.commit().await?;
    Ok(Fate::Dropped)
}

/// What is made, for messages.
pub(crate) fn object(contract: &Contract) -> String {
    format!("partitions of {}", contract.table("outbox"))
}

fn doing(contract: &Contract) -> String {
    format!("look at the {}", object(contract))
}
