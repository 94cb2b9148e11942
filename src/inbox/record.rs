//! For applications that consume by themselves, and want each message handled once.
//!
//! [`record`] writes a message's id in the application's own transaction, and says whether it was
//! there: so what the transaction does happens once for each group, topic and id. It calls the
//! database's `inbox_record`, as other languages do.
//!
//! ```no_run
//! # async fn handle(client: &mut tokio_postgres::Client) -> Result<(), Box<dyn std::error::Error>> {
//! let transaction = client.transaction().await?;
//! if postbox::inbox::record(&transaction, "billing", "order", "4c1d9f").await? {
//!     let sql = "INSERT INTO bill (order_id) VALUES ('42')";
//!     transaction.batch_execute(sql).await?;
//! }
//! transaction.commit().await?;
//! // Only now is the offset committed to Kafka.
//! # Ok(())
//! # }
//! ```
//!
//! # What is misleading
//!
//! - To ask [`already_processed`] and handle then is not enough: another may do the same at once. It
//!   saves the work of a repeated message, and `record` decides.
//! - An id is that of its topic. With `--dedup-scope group` that of all topics is the empty name.
//! - Rows have no place in Kafka, so only their age says when they may go: call
//!   `inbox_forget(group, older_than)` now and then. A `postbox inbox` of the same group removes them with its
//!   own, once its window has passed.

use tokio_postgres::Transaction;
use tokio_postgres::types::Type;

use crate::error::Result;
use crate::outbox::{DEFAULT_SCHEMA, quote_identifier, refused, returned_nothing};

/// Says, in `transaction`, that a message is handled. False: it was before, and is not to be again.
///
/// While another transaction is open that says the same, this waits for its end. In
/// `REPEATABLE READ` and `SERIALIZABLE` an id that was recorded since the transaction began is a
/// serialization failure: try the transaction again.
///
/// An error of the database is the [`source`](std::error::Error::source) of this one, as
/// [`tokio_postgres::Error`]. The transaction is then lost.
pub async fn record(
    transaction: &Transaction<'_>,
    group: &str,
    topic: &str,
    id: &str,
) -> Result<bool> {
    record_in(DEFAULT_SCHEMA, transaction, group, topic, id).await
}

/// [`record`] in another schema.
pub async fn record_in(
    schema: &str,
    transaction: &Transaction<'_>,
    group: &str,
    topic: &str,
    id: &str,
) -> Result<bool> {
    ask("inbox_record", schema, transaction, [group, topic, id]).await
}

/// Whether a message was received by `postbox inbox`, or recorded. One that is being recorded is
/// not seen.
pub async fn already_processed(
    transaction: &Transaction<'_>,
    group: &str,
    topic: &str,
    id: &str,
) -> Result<bool> {
    already_processed_in(DEFAULT_SCHEMA, transaction, group, topic, id).await
}

/// [`already_processed`] in another schema.
pub async fn already_processed_in(
    schema: &str,
    transaction: &Transaction<'_>,
    group: &str,
    topic: &str,
    id: &str,
) -> Result<bool> {
    ask("inbox_seen", schema, transaction, [group, topic, id]).await
}

async fn ask(
    function: &str,
    schema: &str,
    transaction: &Transaction<'_>,
    of: [&str; 3],
) -> Result<bool> {
    let sql = format!("SELECT {}.{function}($1, $2, $3)", quote_identifier(schema));
    let [group, topic, id] = &of;
    let parameters = [
        (group as _, Type::TEXT),
        (topic as _, Type::TEXT),
        (id as _, Type::TEXT),
    ];
    // Typed: one round trip, and nothing prepared that a pooler could lose.
    let rows = transaction.query_typed(&sql, &parameters).await;
    let doing = format!("call {schema}.{function}");
    let value = rows.and_then(|rows| rows.first().map(|row| row.try_get(0)).transpose());
    let answer = value.map_err(|error| refused(&doing, "--grant-handler-to", error))?;
    answer.ok_or_else(|| returned_nothing(schema, function))
}
