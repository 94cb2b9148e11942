//! What the handler of an inbox has done.

use postgres_protocol::escape::escape_identifier;
use tokio_postgres::Client;

use super::Seen;
use super::writers::oracle_schema;
use crate::database;
use crate::error::Result;

/// Makes the oracle's handler, and says how it is called: it notes each message that it is given,
/// in the transaction that says that the message was received.
///
/// # Errors
/// If the database refuses.
pub async fn prepare_handler(client: &Client, schema: &str) -> Result<String> {
    let oracle = oracle_schema(schema);
    let outbox = escape_identifier(schema);
    // No constraint keeps an effect from being there twice: that is what is looked for.
    let sql = format!(
        "CREATE TABLE {oracle}.effect (seq bigint GENERATED ALWAYS AS IDENTITY, id uuid NOT NULL, key text NOT NULL);
         CREATE FUNCTION {oracle}.handle(m {outbox}.message) RETURNS void
         LANGUAGE sql
         AS 'INSERT INTO {oracle}.effect (id, key) VALUES (m.message_id::uuid, m.key)'"
    );
    let created = client.batch_execute(&sql).await;
    created.map_err(|error| database::sort("create the oracle's handler", error))?;
    Ok(format!("sql:{oracle}.handle"))
}

/// What was handled so far, in its order; for [`judge`](super::judge), as if it were records.
///
/// # Errors
/// If the database refuses.
pub async fn effects(client: &Client, schema: &str) -> Result<Vec<Seen>> {
    let oracle = oracle_schema(schema);
    let sql = format!("SELECT id, key FROM {oracle}.effect ORDER BY seq");
    let rows = client.query(&sql, &[]).await;
    let rows = rows.map_err(|error| database::sort("read what was handled", error))?;
    let seen = |row: &tokio_postgres::Row| Seen {
        id: row.get(0),
        key: row.get(1),
        timestamp_millis: 0,
    };
    Ok(rows.iter().map(seen).collect())
}

/// How many messages were handled so far.
///
/// # Errors
/// If the database refuses.
pub async fn handled(client: &Client, schema: &str) -> Result<usize> {
    let oracle = oracle_schema(schema);
    let sql = format!("SELECT count(*) FROM {oracle}.effect");
    let row = client.query_one(&sql, &[]).await;
    let row = row.map_err(|error| database::sort("count what was handled", error))?;
    Ok(usize::try_from(row.get::<_, i64>(0)).unwrap_or_default())
}
