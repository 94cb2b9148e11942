//! One short transaction of a cleanup.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::Client;

use super::Run;
use crate::database::{sort, sort_with, within};
use crate::error::{Error, ErrorKind, Result};
use crate::setup;

/// It waits for no lock longer than that, and takes none that a writer waits for. A row that is
/// deleted twice, as a crash has forgotten it, does no harm. A policy that hides a checkpoint must
/// be an error. With these ways off, the planner goes by the indexes, however old its
/// statistics are.
pub(crate) const BEGIN: &str = "BEGIN; SET LOCAL lock_timeout = '1s'; SET LOCAL statement_timeout = '30s'; \
    SET LOCAL idle_in_transaction_session_timeout = '10s'; SET LOCAL synchronous_commit = off; \
    SET LOCAL row_security = off; SET LOCAL jit = off; SET LOCAL max_parallel_workers_per_gather = 0; \
    SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off";

/// Names our advisory lock. Locks of this kind are per database.
const LOCK: i64 = i64::from_be_bytes(*b"\0pbclean");

/// How long the server may take for a batch: longer than for its statements.
const ANSWER_MAX: Duration = Duration::from_secs(90);

/// The same where there may be a hundred million rows.
const LONG_ANSWER_MAX: Duration = Duration::from_secs(3600);

/// How many times as long to pause as a batch took. With batches of 2,000 rows and pauses as long as they took, on
/// two cores that had more to do, a tenth of 1,000 events a second took more than 38 ms to their consumer, and
/// without a cleanup 3. With pauses three times as long a session that writes as fast as it can wrote 22 % less;
/// with nine, 9 and 14 %.
pub(crate) const PAUSE: u32 = 9;

/// How often the lock is asked for.
const LOCK_INTERVAL: Duration = Duration::from_millis(50);

impl Run<'_> {
    /// Does this in a transaction of its own, beside no other cleanup and no set-up, and pauses,
    /// so that others have most of the server. Both locks
    /// go with the transaction, also behind a pooler.
    pub(super) async fn batch<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.batch_within(ANSWER_MAX, work).await
    }

    /// The same for what looks at all the rows of a partition.
    pub(super) async fn long_batch<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        self.batch_within(LONG_ANSWER_MAX, work).await
    }

    async fn batch_within<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let until = Instant::now() + self.options.patience;
        let mut since = Instant::now();
        while !within(ANSWER_MAX, "clean up", begin(self.client)).await? {
            if Instant::now() >= until {
                let message = "another cleanup, or a set-up, is at work in this database";
                return Err(Error::new(ErrorKind::SlotInUse, message));
            }
            sleep(LOCK_INTERVAL).await;
            since = Instant::now();
        }
        let done = within(limit, "clean up", async {
            let done = work.await;
            failpoint!("cleaned");
            // What has failed is rolled back by this, too.
            let ended = end(self.client).await;
            let done = done?;
            ended?;
            Ok(done)
        });
        let done = done.await?;
        failpoint!("clean_committed");
        sleep(since.elapsed() * PAUSE).await;
        Ok(done)
    }
}

/// Begins a transaction that has both locks, if they are free. Whether they were.
async fn begin(client: &Client) -> Result<bool> {
    let lock = format!(
        "SELECT pg_try_advisory_xact_lock({LOCK}) AND pg_try_advisory_xact_lock_shared({})",
        setup::LOCK
    );
    let (begun, locked) = tokio::join!(client.batch_execute(BEGIN), client.query_typed(&lock, &[]));
    let locked = begun.and(locked);
    let is_locked = matches!(&locked, Ok(rows) if rows.first().is_some_and(|row| row.get(0)));
    if !is_locked {
        end(client).await?;
    }
    locked.map_err(|error| sort("begin a batch", error))?;
    Ok(is_locked)
}

async fn end(client: &Client) -> Result<()> {
    let ended = client.batch_execute("COMMIT").await;
    ended.map_err(|error| sort("end a batch", error))
}

/// Whether a right is missing.
pub(crate) fn is_refused(sqlstate: &str, message: &str) -> bool {
    sqlstate == "42501" && !message.contains("row-level security")
}

/// Sorts an error of a statement that cleans a table; `rights` are what it takes.
pub(super) fn failed(table: &str, rights: &str, error: tokio_postgres::Error) -> Error {
    let next_step = |sqlstate: &str, message: &str| match sqlstate {
        _ if is_refused(sqlstate, message) => Some(rights.to_owned()),
        "55P03" => Some(format!(
            "somebody holds a lock on {table} for longer than a second: pg_locks says who; run it again later"
        )),
        "57014" => Some("make the batches smaller with --batch".to_owned()),
        _ => None,
    };
    sort_with(format!("clean {table}"), error, next_step)
}
