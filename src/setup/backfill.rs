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
//! | tracks its status | not published and not given up | by time, then by id |
//! | does not | all that there are | as they lie in the table, mostly as they were inserted |
//!
//! What becomes of a row after that, or of the table, is of no matter to the copy. The relay
//! empties it once all are delivered, and the next set-up drops it.
//!
//! Nobody may claim rows while that is done, as those would be sent twice.

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

/// Copies these rows, for those roles that may write the checkpoint, and says how many
/// they are.
pub(super) async fn copy(
    client: &impl GenericClient,
    contract: &Contract,
) -> Result<i64, tokio_postgres::Error> {
    let (table, copy) = (&contract.outbox, contract.backfill_table());
    let order = match table.quoted_column("created_at") {
        Some(created_at) => {
            let id = table.quoted_column("id").unwrap_or_default();
            format!("e.{created_at}, e.{id}")
        }
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
    let sql = contract.sql(
        "SELECT DISTINCT CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END \
         FROM pg_class AS c, aclexplode(coalesce(c.relacl, acldefault('r', c.relowner))) AS a \
         WHERE c.oid = (quote_ident(:'schema') || '.checkpoint')::regclass AND a.privilege_type = 'UPDATE'",
    );
    for row in client.query(&sql, &[]).await? {
        let grant = format!(
            "GRANT SELECT, TRUNCATE ON {copy} TO {}",
            row.get::<_, &str>(0)
        );
        client.batch_execute(&grant).await?;
    }
    let sql = format!("SELECT count(*) FROM {copy}");
    Ok(client.query_one(&sql, &[]).await?.get(0))
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
    let table = contract.outbox.quoted();
    match claim::unpublished(&contract.outbox) {
        Some(unpublished) => format!("{table} AS e WHERE {unpublished}"),
        None => format!("{table} AS e"),
    }
}
