//! The outbox.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::batch::failed;
use super::proof::Proof;
use super::{Done, Run};
use crate::contract::Contract;
use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};
use crate::partitions::{self, Fate, Partition};

/// Who may clean our tables.
pub(crate) const RIGHTS: &str =
    "`postbox setup --grant-cleanup-to ROLE`, run by the owner, gives a role what it needs";

/// How often it is tried to drop a partition that others use.
const DROP_ATTEMPTS: usize = 10;

/// How many places are looked at behind a batch that had nothing to go.
const PROBES: i64 = 100;

/// Removes what may go.
pub(super) async fn clean(run: &mut Run<'_>) -> Result<()> {
    let outbox = run.contract.table("outbox");
    run.count("outbox", &outbox, Done::Removed, 0);
    match is_partitioned(run.client, run.contract).await? {
        false => clean_rows(run, &outbox).await,
        true if partitions::are_ours(run.client, run.contract).await? => {
            drop_partitions(run).await?;
            let rest = run.contract.table("outbox_default");
            clean_rows(run, &rest).await
        }
        true => {
            let message = format!(
                "{outbox} is partitioned, and not by `postbox setup --partitioned`: drop what is old by hand"
            );
            Err(Error::new(ErrorKind::Database, message))
        }
    }
}

/// Drops partitions that are old, if all of their rows may go.
async fn drop_partitions(run: &mut Run<'_>) -> Result<()> {
    let outbox = run.contract.table("outbox");
    run.count("partitions", &outbox, Done::Dropped, 0);
    let old = partitions::older_than(run.client, run.contract, run.options.older_than).await?;
    for partition in old {
        // Who reads the outbox is in the way of all of them.
        let attempts = match run.report.busy.is_empty() {
            true => DROP_ATTEMPTS,
            false => 1,
        };
        let mut fate = Fate::Busy;
        for _ in 0..attempts {
            if !run.has_time() {
                return Ok(());
            }
            fate = run.long_batch(drop(run, &partition)).await?;
            if fate != Fate::Busy {
                break;
            }
        }
        match fate {
            Fate::Busy => run.report.busy.push(partition.table),
            Fate::Dropped => run.count("partitions", &outbox, Done::Dropped, 1),
            Fate::Needed | Fate::Missing => {}
        }
    }
    Ok(())
}

async fn drop(run: &Run<'_>, partition: &Partition) -> Result<Fate> {
    let proof = Proof::read(run.client, run.contract, run.options.older_than).await?;
    let may_go = may_go(run, &proof);
    failpoint!("dropping_partition");
    match run.options.dry_run {
        true => partitions::fate(run.client, run.contract, partition, &may_go).await,
        false => partitions::drop_if(run.client, run.contract, partition, &may_go).await,
    }
}

async fn is_partitioned(client: &Client, contract: &Contract) -> Result<bool> {
    let outbox = contract.table("outbox");
    let sql = "SELECT relkind = 'p' FROM pg_class WHERE oid = to_regclass($1)";
    let rows = client.query_typed(sql, &[(&outbox, Type::TEXT)]).await;
    let rows = rows.map_err(|error| sort(format!("look at {outbox}"), error))?;
    Ok(rows.first().is_some_and(|row| row.get(0)))
}

/// What a batch has found.
struct Looked {
    rows: i64,
    /// The last of them.
    seq: Option<i64>,
    removed: i64,
    /// Whether there is anything to do behind it.
    has_more: bool,
}

async fn clean_rows(run: &mut Run<'_>, outbox: &str) -> Result<()> {
    let mut last = i64::MIN;
    while run.has_time() {
        let looked = run.batch(look(run, outbox, last)).await?;
        run.count(
            "outbox",
            outbox,
            Done::Removed,
            looked.removed.unsigned_abs(),
        );
        match looked.seq {
            Some(seq) if looked.has_more => last = seq,
            _ => break,
        }
    }
    Ok(())
}

/// Deletes what may go of the next rows.
async fn look(run: &Run<'_>, outbox: &str, last: i64) -> Result<Looked> {
    let client = run.client;
    let retention = run.options.older_than;
    let proof = Proof::read(client, run.contract, retention).await?;
    let may_go = may_go(run, &proof);
    let sql = format!(
        "WITH looked AS MATERIALIZED ( \
             SELECT o.ctid AS place, o.seq, {may_go} AS goes \
             FROM {outbox} AS o WHERE o.seq > $1 ORDER BY o.seq LIMIT $2), \
         gone AS ({}) \
         SELECT (SELECT count(*) FROM looked), (SELECT max(seq) FROM looked), (SELECT count(*) FROM gone)",
        match run.options.dry_run {
            true => "SELECT FROM looked WHERE goes".to_owned(),
            // Rows of the outbox are never updated: they stay in their place.
            false => format!(
                "DELETE FROM {outbox} AS o WHERE o.ctid = ANY (ARRAY(SELECT place FROM looked WHERE goes)) RETURNING 1"
            ),
        }
    );
    let batch = i64::from(run.options.batch);
    let parameters = [(&last as _, Type::INT8), (&batch as _, Type::INT8)];
    failpoint!("cleaning");
    let row = client.query_typed_one(&sql, &parameters).await;
    let row = row.map_err(|error| failed(outbox, RIGHTS, error))?;
    let mut looked = Looked {
        rows: row.get(0),
        seq: row.get(1),
        removed: row.get(2),
        has_more: false,
    };
    looked.has_more = match (looked.rows == batch, looked.removed, looked.seq) {
        (true, 0, Some(seq)) => has_more(client, outbox, &may_go, seq).await?,
        (is_whole, ..) => is_whole,
    };
    Ok(looked)
}

/// Whether the row `o` may go, in SQL. What is cheap to tell comes first.
fn may_go(run: &Run<'_>, proof: &Proof) -> String {
    format!(
        "(o.created_at < {} AND {} AND coalesce(o.scheduled_at <= now(), true) \
          AND NOT EXISTS (SELECT FROM {} AS p WHERE p.id = o.id::text AND p.status <> 'skipped'))",
        run.cutoff(),
        proof.condition(),
        run.contract.table("parked"),
    )
}

/// Whether a row that may go is at one of some places behind this one. A stretch of rows that
/// may not, such as of those with a time far ahead, so ends no run for good: what is behind
/// it grows old, and then most of the places say so.
async fn has_more(client: &Client, outbox: &str, may_go: &str, last: i64) -> Result<bool> {
    let sql = format!(
        "SELECT EXISTS ( \
             SELECT FROM (SELECT max(seq) AS seq FROM {outbox}) AS m, generate_series(0, {PROBES} - 1) AS i, \
                  LATERAL (SELECT * FROM {outbox} AS n WHERE n.seq > $1 + (m.seq - $1) / {PROBES} * i \
                           ORDER BY n.seq LIMIT 1) AS o \
             WHERE {may_go})"
    );
    let row = client.query_typed_one(&sql, &[(&last, Type::INT8)]).await;
    let row = row.map_err(|error| failed(outbox, RIGHTS, error))?;
    Ok(row.get(0))
}
