//! The tables beside the outbox, page by page: rows that may go are found by no index, and an
//! index for that would cost each writer.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::batch::failed;
use super::outbox::RIGHTS;
use super::{Done, Run};
use crate::error::Result;

/// About how many rows of these tables a page holds.
const ROWS_IN_PAGE: u32 = 64;

/// Removes what may go of each.
pub(super) async fn clean(run: &mut Run<'_>) -> Result<()> {
    let (parked, outbox) = (run.contract.table("parked"), run.contract.table("outbox"));
    let is_settled = run.contract.table("is_settled");
    let cutoff = run.cutoff();
    // Of a relay that is forgotten nothing is read again. A cancellation is the text of a
    // uuid, if nobody has written another by hand.
    let tables = [
        (
            "parked",
            format!(
                "t.status = 'skipped' AND coalesce(t.decided_at, t.parked_at) < {cutoff} \
                 AND coalesce({is_settled}(t), true)"
            ),
        ),
        (
            "cancellation",
            format!(
                "t.cancelled_at < {cutoff} \
                 AND NOT EXISTS (SELECT FROM {parked} AS p WHERE p.id = t.id AND p.status <> 'skipped') \
                 AND NOT EXISTS (SELECT FROM {outbox} AS o WHERE o.scheduled_at IS NOT NULL \
                                 AND o.id = CASE WHEN t.id ~ '^[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}$' THEN t.id::uuid END)"
            ),
        ),
        ("idempotency", format!("t.created_at < {cutoff}")),
    ];
    for (table, may_go) in tables {
        clean_table(run, table, &may_go).await?;
    }
    Ok(())
}

async fn clean_table(run: &mut Run<'_>, name: &str, may_go: &str) -> Result<()> {
    let table = run.contract.table(name);
    run.count(name, &table, Done::Removed, 0);
    let step = i64::from((run.options.batch / ROWS_IN_PAGE).max(1));
    let pages = pages(run, &table).await?;
    let mut page = 0;
    while page < pages && run.has_time() {
        let end = page + step;
        let rows = format!(
            "{table} AS t WHERE t.ctid >= '({page},0)'::tid AND t.ctid < '({end},0)'::tid AND {may_go}"
        );
        let sql = match run.options.dry_run {
            true => format!("SELECT count(*) FROM {rows}"),
            false => {
                format!("WITH gone AS (DELETE FROM {rows} RETURNING 1) SELECT count(*) FROM gone")
            }
        };
        let removed = run.batch(count_of(run.client, &sql, &table)).await?;
        run.count(name, &table, Done::Removed, removed.unsigned_abs());
        page = end;
    }
    Ok(())
}

/// The count that this statement answers with.
async fn count_of(client: &Client, sql: &str, table: &str) -> Result<i64> {
    let row = client.query_typed_one(sql, &[]).await;
    let row = row.map_err(|error| failed(table, RIGHTS, error))?;
    Ok(row.get(0))
}

/// How many pages there are. Rows that come behind them are young.
async fn pages(run: &Run<'_>, table: &str) -> Result<i64> {
    let sql = "SELECT pg_relation_size(to_regclass($1)) / current_setting('block_size')::bigint";
    let name = [(&table as _, Type::TEXT)];
    let pages = run.client.query_typed_one(sql, &name).await;
    let pages = pages.map_err(|error| failed(table, RIGHTS, error))?;
    Ok(pages.get::<_, Option<i64>>(0).unwrap_or_default())
}
