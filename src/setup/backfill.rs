//! Rows of another library's table that lie before a slot, kept for the relay to send
//! first.
//!
//! A row of ours says which transaction wrote it, so that the relay finds what a slot will
//! never give in the outbox itself, between two snapshots. Other tables do not say that: what
//! lies before a slot is known only as long as the snapshot is there that the slot was made
//! with. So under that snapshot those rows are copied, in the order in which they are to go out:
//!
//! | table | rows | order |
//! |---|---|---|
//! | tracks its status | not published and not given up | by time, then by id, as they are claimed |
//! | does not | all that there are | as they lie in the table, mostly as they were inserted |
//!
//! A time says less than that of rows that are not claimed by it: those of one transaction
//! have the same.
//!
//! What becomes of a row after that, or of the table, is of no matter to the copy. The relay
//! empties it once all are delivered, and the next set-up drops it.
//!
//! Nobody may claim rows while that is done, as those would be sent twice.

use tokio_postgres::types::Type;
use tokio_postgres::{Client, GenericClient};

use crate::contract::Contract;
use crate::database::sort;
use crate::error::Result;
use crate::source::{BACKFILL_SEQ, claim};

/// How many rows there are to send.
pub(super) async fn count(
    client: &impl GenericClient,
    contract: &Contract,
) -> Result<i64, tokio_postgres::Error> {
    let rows = rows(contract);
    let sql = format!("SELECT count(*) FROM {rows}");
    Ok(client.query_one(&sql, &[]).await?.get(0))
}

/// Copies these rows, for the relay's roles, and says how many they are.
pub(super) async fn copy(
    client: &impl GenericClient,
    contract: &Contract,
) -> Result<i64, tokio_postgres::Error> {
    let (table, copy) = (&contract.outbox, contract.backfill_table());
    let column = |field: &str| table.quoted_column(field).expect("a field of the preset");
    let order = match table.preset.tracking() {
        Some(_) => format!("e.{}, e.{}", column("created_at"), column("id")),
        None => "e.tableoid, e.ctid".to_owned(),
    };
    let rows = rows(contract);
    let sql = format!(
        "DROP TABLE IF EXISTS {copy}; \
         CREATE TABLE {copy} AS SELECT row_number() OVER (ORDER BY {order}) AS {BACKFILL_SEQ}, e.* FROM {rows}; \
         ALTER TABLE {copy} ADD PRIMARY KEY ({BACKFILL_SEQ}); \
         ANALYZE {copy}"
    );
    client.batch_execute(&sql).await?;
    grant(client, contract).await?;
    let sql = format!("SELECT count(*) FROM {copy}");
    Ok(client.query_one(&sql, &[]).await?.get(0))
}

/// Lets those roles read and empty the copy, if there is one, that may write the checkpoint.
pub(super) async fn grant(
    client: &impl GenericClient,
    contract: &Contract,
) -> Result<(), tokio_postgres::Error> {
    let sql = contract.sql(
        "SELECT DISTINCT format('GRANT SELECT, TRUNCATE ON %s TO %s', copy, \
                    CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END) \
         FROM to_regclass($1) AS copy, pg_class AS c, aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) AS a \
         WHERE c.oid = (quote_ident(:'schema') || '.checkpoint')::regclass AND a.privilege_type = 'UPDATE' \
           AND NOT (has_table_privilege(a.grantee, copy, 'SELECT') AND has_table_privilege(a.grantee, copy, 'TRUNCATE'))",
    );
    let copy = contract.backfill_table();
    for row in client.query_typed(&sql, &[(&copy, Type::TEXT)]).await? {
        client.batch_execute(row.get(0)).await?;
    }
    Ok(())
}

/// Drops the copy of a slot whose rows before it are delivered.
pub(super) async fn drop_copy(client: &Client, contract: &Contract) -> Result<()> {
    if contract.outbox.is_ours() {
        return Ok(());
    }
    let copy = contract.backfill_table();
    let dropped = client
        .batch_execute(&format!("DROP TABLE IF EXISTS {copy}"))
        .await;
    dropped.map_err(|error| sort(format!("drop {copy}"), error))
}

/// The rows to send, as `e`.
fn rows(contract: &Contract) -> String {
    let (table, quoted) = (&contract.outbox, contract.outbox.quoted());
    let Some(unpublished) = claim::unpublished(table) else {
        return format!("{quoted} AS e");
    };
    // Where a row that is given up does not say so, it says how often it was tried.
    let given_up = match table.quoted_column("retry_count") {
        Some(tries) => format!(" AND e.{tries} < {}", table.attempts_max),
        None => String::new(),
    };
    format!("{quoted} AS e WHERE {unpublished}{given_up}")
}
