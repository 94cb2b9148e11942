//! A slot's snapshot, and what ordinary sessions see.
//!
//! A slot's snapshot is made from the WAL. There a transaction is committed once its
//! record is, and only then does its process mark it so in memory: a moment later, or much
//! later if it waits for its synchronous standby. In between, what the slot's snapshot sees
//! an ordinary session does not.
//!
//! Worse, a session that has imported that snapshot, and comes to a row of such a
//! transaction, takes it for aborted, as it is neither running by the snapshot nor marked,
//! and *writes that on the row*: it is gone, for everyone. Of 152,541 inserts that were
//! committed beside 312 slots, each followed by a look at the table through its snapshot,
//! 61 were (Postgres 17, a busy machine); of 130,269 beside 302 slots, with a wait before the look, none.

use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

/// How often it is looked.
const SEEN_INTERVAL: Duration = Duration::from_millis(5);

/// Waits until ordinary sessions see everything that a slot's snapshot, as a
/// `pg_snapshot`, sees. Only then may the outbox be read by it, imported or not.
pub(crate) async fn wait_until_seen(
    client: &Client,
    snapshot: &str,
) -> Result<(), tokio_postgres::Error> {
    let sql = "SELECT pg_snapshot_xmax(s.now) >= pg_snapshot_xmax(s.until) \
                      AND NOT EXISTS (SELECT FROM pg_snapshot_xip(s.now) AS xid \
                                      WHERE pg_visible_in_snapshot(xid, s.until)) \
               FROM (SELECT pg_current_snapshot() AS now, $1::text::pg_snapshot AS until) AS s";
    wait_until(client, sql, snapshot).await
}

/// Waits until every transaction that has begun by now has ended, so that ordinary
/// sessions see all that were committed by now. Where there is no slot's snapshot to
/// tell which.
pub(crate) async fn wait_until_ended(client: &Client) -> Result<(), tokio_postgres::Error> {
    let sql = "SELECT pg_current_xact_id()::text";
    let now: String = client.query_one(sql, &[]).await?.get(0);
    let sql = "SELECT pg_snapshot_xmin(pg_current_snapshot()) > $1::text::xid8";
    wait_until(client, sql, &now).await
}

/// Waits until ordinary sessions see what these transactions have written, which a slot has
/// given as committed. They are told without epoch: none began two billion before or behind
/// the next.
pub(crate) async fn wait_until_visible(
    client: &Client,
    xids: &[u32],
) -> Result<(), tokio_postgres::Error> {
    let xids: Vec<String> = xids.iter().map(u32::to_string).collect();
    let sql = "SELECT coalesce(bool_and(x.xid < s.next AND x.xid <> ALL (s.running)), true) \
               FROM (SELECT pg_snapshot_xmax(now)::text::bigint AS next, \
                            ARRAY(SELECT r::text::bigint FROM pg_snapshot_xip(now) AS r) AS running \
                     FROM (SELECT pg_current_snapshot() AS now) AS s) AS s, \
                    LATERAL (SELECT x + (s.next + 2147483648 - x) / 4294967296 * 4294967296 AS xid \
                             FROM unnest($1::text::bigint[]) AS x) AS x";
    wait_until(client, sql, &format!("{{{}}}", xids.join(","))).await
}

/// Waits until this query, of one text, says yes.
async fn wait_until(client: &Client, sql: &str, text: &str) -> Result<(), tokio_postgres::Error> {
    loop {
        let rows = client.query_typed(sql, &[(&text, Type::TEXT)]).await?;
        if rows.first().is_some_and(|row| row.get(0)) {
            return Ok(());
        }
        tokio::time::sleep(SEEN_INTERVAL).await;
    }
}
