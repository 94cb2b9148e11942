//! Tables of others, whose rows say themselves whether they are published.
//!
//! As with omni-box's own maintenance, rows go by when they were published, those that failed
//! never, and claims that nobody renews are taken away. A row that somebody is about to write is passed
//! over. What our relay has parked of such a table stays, too.

use tokio_postgres::types::Type;

use super::batch::failed;
use super::{Done, Run};
use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};
use crate::source::claim::{self, ClaimSettings};

/// What it takes to clean such a table.
pub(crate) const RIGHTS: &str = "GRANT USAGE ON SCHEMA :\"table_schema\" TO :\"role\";\n\
     GRANT SELECT, UPDATE, DELETE ON :\"table_schema\".:\"table\" TO :\"role\";\n";
pub(crate) const HAS: &str = "SELECT has_schema_privilege($1::text::name, :'table_schema', 'USAGE') \
     AND has_table_privilege($1::text::name, quote_ident(:'table_schema') || '.' || quote_ident(:'table'), 'SELECT') \
     AND has_table_privilege($1::text::name, quote_ident(:'table_schema') || '.' || quote_ident(:'table'), 'UPDATE') \
     AND has_table_privilege($1::text::name, quote_ident(:'table_schema') || '.' || quote_ident(:'table'), 'DELETE')";

/// Takes stale claims away, and removes what may go.
pub(super) async fn clean(run: &mut Run<'_>, settings: &ClaimSettings) -> Result<()> {
    let table = settings.table.quoted();
    claim::shape(run.client, &settings.table).await?;
    let rights = format!("GRANT SELECT, UPDATE, DELETE ON {table} TO the role that cleans up");
    release(run, settings, &table, &rights).await?;
    remove(run, settings, &table, &rights).await
}

async fn release(
    run: &mut Run<'_>,
    settings: &ClaimSettings,
    table: &str,
    rights: &str,
) -> Result<()> {
    let (is_dry, most) = (run.options.dry_run, claim::ROWS);
    let sql = match is_dry {
        true => settings.count_stale()?,
        false => settings.release_stale()?,
    };
    run.count(table, table, Done::Released, 0);
    while run.has_time() {
        let released = run.batch(count_of(run, &sql, table, rights)).await?;
        run.count(table, table, Done::Released, released.unsigned_abs());
        if is_dry || released < most {
            break;
        }
    }
    Ok(())
}

async fn remove(
    run: &mut Run<'_>,
    settings: &ClaimSettings,
    table: &str,
    rights: &str,
) -> Result<()> {
    let name = &settings.table.name;
    let published = settings.published_before(&run.cutoff())?;
    let may_go = format!("{}{}", published.condition, unless_parked(run).await?);
    let (at, batch) = (&published.at, run.options.batch);
    run.count(name, table, Done::Removed, 0);
    if run.options.dry_run {
        let sql = format!("SELECT count(*) FROM {table} AS e WHERE {may_go}");
        let rows = run.batch(count_of(run, &sql, table, rights)).await?;
        run.count(name, table, Done::Removed, rows.unsigned_abs());
        return Ok(());
    }
    // By the time they were published at, of which these libraries have an index: what was deleted
    // before is not gone through again. The time of creation, too, as it is in the key of a
    // partitioned table.
    let sql = format!(
        "WITH old AS MATERIALIZED ( \
             SELECT {id} AS id, {created_at} AS created_at, {at} AS published_at FROM {table} AS e \
             WHERE {may_go} AND {at} >= $1::text::timestamptz \
             ORDER BY {at} LIMIT {batch} FOR UPDATE OF e SKIP LOCKED), \
         gone AS (DELETE FROM {table} AS e USING old WHERE {id} = old.id AND {created_at} = old.created_at RETURNING 1) \
         SELECT (SELECT count(*) FROM old), (SELECT max(published_at)::text FROM old), (SELECT count(*) FROM gone)",
        id = published.id,
        created_at = published.created_at,
    );
    let mut last = "-infinity".to_owned();
    while run.has_time() {
        let removed = async {
            failpoint!("cleaning");
            let last = [(&last as _, Type::TEXT)];
            let row = run.client.query_typed_one(&sql, &last).await;
            let row = row.map_err(|error| failed(table, rights, error))?;
            Ok((row.get(0), row.get(1), row.get(2)))
        };
        let (found, newest, removed): (i64, Option<String>, i64) = run.batch(removed).await?;
        run.count(name, table, Done::Removed, removed.unsigned_abs());
        match newest {
            Some(newest) if found == i64::from(batch) => last = newest,
            _ => break,
        }
    }
    Ok(())
}

/// The count that this statement answers with.
async fn count_of(run: &Run<'_>, sql: &str, table: &str, rights: &str) -> Result<i64> {
    let row = run.client.query_typed_one(sql, &[]).await;
    let row = row.map_err(|error| failed(table, rights, error))?;
    Ok(row.get(0))
}

/// A condition more, where our schema is there and may have parked rows of this table.
async fn unless_parked(run: &Run<'_>) -> Result<String> {
    let parked = run.contract.table("parked");
    let sql = "SELECT to_regclass($1) IS NOT NULL, \
                      coalesce(has_table_privilege(to_regclass($1), 'SELECT'), true)";
    let name = [(&parked as _, Type::TEXT)];
    let found = run.client.query_typed_one(sql, &name).await;
    let found = found.map_err(|error| sort(format!("look for {parked}"), error))?;
    match (found.get(0), found.get(1)) {
        (false, _) => Ok(String::new()),
        (true, true) => Ok(format!(
            " AND NOT EXISTS (SELECT FROM {parked} AS p WHERE p.id = e.id::text AND p.status <> 'skipped')"
        )),
        (true, false) => {
            let message = format!(
                "{parked} says what must stay: GRANT SELECT ON {parked} TO the role that cleans up"
            );
            Err(Error::new(ErrorKind::Rights, message))
        }
    }
}
