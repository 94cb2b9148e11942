//! An outbox that came from another cluster, with a dump: what was not published there
//! is published here.
//!
//! The numbers of transactions in its rows, and the snapshot of its checkpoint, are the
//! other cluster's, and still tell each other which rows are published. Those that are
//! not become rows of *this* transaction, which the new snapshot does not see; those that
//! are, and have numbers that are still to come here, get one that every snapshot sees.
//! Writers wait meanwhile.
//!
//! Of a relay that was divided, each slice tells which of its rows are published; then the
//! slices are done with.
//!
//! Rows that were written since the dump was restored have this cluster's numbers, which
//! the other's snapshot may well see. A row with a number from then on counts as not
//! published: rather some are sent twice.

use postgres_protocol::escape::escape_literal;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::slot::taken_over;
use super::{Report, State};
use crate::catalog::{self, Checkpoint, Gap, KEY_COLUMNS, Mode, System, slice_of};
use crate::contract::Contract;
use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};

/// Makes this cluster's what the checkpoint of another one says, and returns the
/// checkpoint as it is then. That of a relay with a slot is left as a recovery that has
/// not finished.
pub(super) async fn adopt(
    client: &mut Client,
    contract: &Contract,
    checkpoint: &Checkpoint,
    system: &System,
    report: &mut Report,
) -> Result<Checkpoint> {
    // Rows of a slice that is gone are neither published nor not.
    catalog::look(client, contract).await?;
    let doing = format!("adopt {}", contract.table("outbox"));
    let adopted = restamp(client, contract, checkpoint, system).await;
    let adopted = adopted.map_err(|error| sort(doing, error))?;
    let (snapshot, rows) = adopted.ok_or_else(|| taken_over(contract))?;
    report.add_with_note(
        format!("checkpoint \"{}\"", contract.slot),
        State::TakenOver,
        Some(format!("rows not published in the other cluster: {rows}")),
    );
    Ok(Checkpoint {
        snapshot,
        gap: None,
        system: system.clone(),
        epoch: checkpoint.epoch + 1,
        ..checkpoint.clone()
    })
}

/// Refuses where another relay of the same outbox came along: its snapshot would see what
/// is restamped for this one.
pub(super) async fn check_alone(
    client: &Client,
    contract: &Contract,
    system: &System,
) -> Result<()> {
    let sql = contract.sql(
        "SELECT name FROM :\"schema\".checkpoint WHERE name <> :'slot' AND system_identifier <> $1",
    );
    let identifier = [(&system.identifier as _, Type::TEXT)];
    let rows = client.query_typed(&sql, &identifier).await;
    let rows = rows.map_err(|error| sort("read the checkpoints", error))?;
    let Some(row) = rows.first() else {
        return Ok(());
    };
    let message = format!(
        "relay \"{}\" came from the other cluster, too, and only one can be adopted: to give up what it had not \
         published, DELETE FROM {} WHERE name = {}",
        row.get::<_, &str>(0),
        contract.table("checkpoint"),
        escape_literal(row.get(0))
    );
    Err(Error::new(ErrorKind::Database, message))
}

/// The new snapshot, and how many rows it does not see; `None` if the checkpoint is no
/// longer what it was.
async fn restamp(
    client: &mut Client,
    contract: &Contract,
    checkpoint: &Checkpoint,
    system: &System,
) -> Result<Option<(String, i64)>, tokio_postgres::Error> {
    let transaction = client.transaction().await?;
    let lock = contract.sql("LOCK TABLE :\"schema\".outbox IN SHARE ROW EXCLUSIVE MODE");
    transaction.batch_execute(&lock).await?;
    let sql = "SELECT pg_current_xact_id()::text, pg_current_snapshot()::text";
    let row = transaction.query_typed_one(sql, &[]).await?;
    let (own, now): (&str, &str) = (row.get(0), row.get(1));
    let sql = contract.sql("SELECT min(xmin::text::bigint) FROM :\"schema\".migration");
    let restored: i64 = transaction.query_typed_one(&sql, &[]).await?.get(0);
    let restored = since_restored(own, restored.cast_unsigned()).to_string();
    // What has been read up to `seq`, of the gap that was open.
    let gap = checkpoint.gap.clone().unwrap_or_else(|| Gap {
        since: checkpoint.snapshot.clone(),
        until: checkpoint.snapshot.clone(),
        seq: 0,
    });
    let slice = slice_of(&KEY_COLUMNS.map(|column| format!("o.{column}")));
    let sql = contract.sql(&format!(
        "WITH slice AS ( \
             SELECT slice, snapshot AS since, coalesce(second_snapshot, snapshot) AS until, coalesce(seq, 0) AS seq \
             FROM :\"schema\".slice WHERE name = :'slot'), \
         place AS ( \
             TABLE slice \
             UNION ALL \
             SELECT n, $1::text::pg_snapshot, $2::text::pg_snapshot, $3 FROM generate_series(0, 63) AS n \
             WHERE NOT EXISTS (TABLE slice)), \
         published AS MATERIALIZED ( \
             SELECT o.seq, (pg_visible_in_snapshot(o.xid, p.since) \
                            OR (pg_visible_in_snapshot(o.xid, p.until) AND o.seq <= p.seq)) \
                           AND NOT (o.xid >= $6::text::xid8 AND o.xid <= $4::text::xid8) AS is_so \
             FROM :\"schema\".outbox AS o JOIN place AS p ON p.slice = {slice}), \
         restamped AS ( \
             UPDATE :\"schema\".outbox AS o \
             SET xid = CASE WHEN p.is_so THEN '3'::xid8 ELSE $4::text::xid8 END \
             FROM published AS p \
             WHERE p.seq = o.seq AND (NOT p.is_so OR o.xid >= pg_snapshot_xmin($5::text::pg_snapshot))), \
         merged AS (DELETE FROM :\"schema\".slice WHERE name = :'slot') \
         SELECT count(*) FROM published WHERE NOT is_so"
    ));
    let parameters = [
        (&gap.since as _, Type::TEXT),
        (&gap.until as _, Type::TEXT),
        (&gap.seq as _, Type::INT8),
        (&own as _, Type::TEXT),
        (&now as _, Type::TEXT),
        (&restored as _, Type::TEXT),
    ];
    let rows: i64 = transaction.query_typed_one(&sql, &parameters).await?.get(0);
    // What waits is behind a relay like its row in the outbox, of which it is a copy; positions
    // in the WAL mean nothing here. Joined, as no index of the outbox is by text.
    let sql = contract.sql(
        "UPDATE :\"schema\".parked AS p SET commit_lsn = NULL, xid = coalesce(f.xid, '3') \
         FROM (SELECT w.id, max(o.xid) AS xid \
               FROM :\"schema\".parked AS w LEFT JOIN :\"schema\".outbox AS o ON o.id::text = w.id \
               WHERE w.relay = :'slot' GROUP BY w.id) AS f \
         WHERE p.relay = :'slot' AND p.id = f.id",
    );
    transaction.batch_execute(&sql).await?;
    let snapshot = without(now, own);
    let lsn = match checkpoint.mode {
        Mode::Wal => "lsn = NULL",
        Mode::Poll => "owner = NULL, expires_at = NULL",
    };
    let sql = contract.sql(&format!(
        "UPDATE :\"schema\".checkpoint \
         SET {lsn}, snapshot = $1::text::pg_snapshot, second_snapshot = NULL, seq = NULL, system_identifier = $2, \
             timeline = $3, epoch = epoch + 1, updated_at = now() \
         WHERE name = :'slot' AND epoch = $4 RETURNING name"
    ));
    let parameters = [
        (&snapshot as _, Type::TEXT),
        (&system.identifier as _, Type::TEXT),
        (&system.timeline as _, Type::INT4),
        (&checkpoint.epoch as _, Type::INT8),
    ];
    let written = transaction.query_typed(&sql, &parameters).await?;
    if written.is_empty() {
        return Ok(None);
    }
    failpoint!("adopting");
    transaction.commit().await?;
    Ok(Some((snapshot, rows)))
}

/// A snapshot in which this transaction, which took it, is still running. Its own it does
/// not name among those that run.
fn without(snapshot: &str, own: &str) -> String {
    let number = |text: &str| text.parse::<u64>().unwrap_or_default();
    let mut parts = snapshot.split(':');
    let (xmin, xmax) = (
        parts.next().map_or(0, number),
        parts.next().map_or(0, number),
    );
    let own = number(own);
    if own >= xmax {
        return snapshot.to_owned();
    }
    let running = parts.next().unwrap_or_default();
    let mut running: Vec<u64> = running
        .split(',')
        .filter(|xid| !xid.is_empty())
        .map(number)
        .chain([own])
        .collect();
    running.sort_unstable();
    running.dedup();
    let running: Vec<String> = running.iter().map(u64::to_string).collect();
    format!("{}:{xmax}:{}", xmin.min(own), running.join(","))
}

/// The transaction that restored the schema, of which the system columns keep the lower
/// half: the last with it.
fn since_restored(own: &str, lower: u64) -> u64 {
    let own = own.parse::<u64>().unwrap_or_default();
    let restored = (own >> 32 << 32) | lower;
    match restored <= own {
        true => restored,
        false => restored.saturating_sub(1 << 32),
    }
}

#[cfg(test)]
mod tests {
    use super::{since_restored, without};

    #[test]
    fn the_upper_half_of_a_number_is_that_of_the_last() {
        assert_eq!(since_restored("900", 700), 700);
        assert_eq!(since_restored("4294968196", 700), 4_294_967_996);
        assert_eq!(since_restored("4294968196", 4_294_967_000), 4_294_967_000);
    }

    #[test]
    fn the_own_transaction_is_among_those_that_run() {
        assert_eq!(without("10:20:", "15"), "10:20:15");
        assert_eq!(without("10:20:12,17", "15"), "10:20:12,15,17");
        assert_eq!(without("20:20:", "15"), "15:20:15");
        // It has not begun, for this snapshot.
        assert_eq!(without("10:20:12", "20"), "10:20:12");
    }
}
