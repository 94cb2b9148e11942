//! What polling needs: an index, and a checkpoint that says where to begin.
//!
//! A relay that polls begins at a snapshot: what that sees is not its to send. Without a
//! slot there is nothing that can be lost, so the checkpoint is written in one
//! statement, together with the look at what is in the outbox.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::slot::start::SEES_NOTHING;
use super::slot::{object, taken_over};
use super::{Backfill, PATIENCE_TIME, Report, State};
use crate::catalog::{self, Checkpoint};
use crate::contract::Contract;
use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};

pub(super) const XID_INDEX: &str = include_str!("../../sql/xid_index.sql");
pub(super) const XID_INDEX_PARTITIONED: &str = include_str!("../../sql/xid_index_partitioned.sql");
/// Statements that make the indexes of partitions that have none yet, and make them parts of it.
pub(super) const PARTITION_INDEXES: &str = include_str!("../../sql/partition_indexes.sql");
pub(super) const NOTIFY: &str = include_str!("../../sql/notify.sql");

/// Checks what the checkpoint was made for, and makes the index if it is gone. Of a change
/// that was cut short it drops the slot.
pub(super) async fn check(
    client: &Client,
    contract: &Contract,
    checkpoint: &Checkpoint,
    report: &mut Report,
) -> Result<()> {
    checkpoint.check_system(contract, &catalog::system(client).await?)?;
    make_index(client, contract, report).await?;
    report.add(relay(contract), State::AlreadyThere);
    match checkpoint.has_left_slot() {
        true => drop_slot(client, contract, report).await,
        false => Ok(()),
    }
}

/// Makes the checkpoint, where there is none.
pub(super) async fn create(
    client: &Client,
    contract: &Contract,
    backfill: Backfill,
    report: &mut Report,
) -> Result<()> {
    make_index(client, contract, report).await?;
    let system = catalog::system(client).await?;
    // The statement sees what its snapshot does: rows that come later are in neither.
    let sql = contract.sql(
        "WITH found AS (SELECT count(*) AS rows FROM :\"schema\".outbox), \
              made AS ( \
                  INSERT INTO :\"schema\".checkpoint (name, mode, snapshot, system_identifier, timeline) \
                  SELECT :'slot', 'poll', CASE $1 WHEN 'pending' THEN $2::pg_snapshot ELSE pg_current_snapshot() END, \
                         $3, $4 \
                  FROM found WHERE rows = 0 OR $1 <> 'refuse' \
                  ON CONFLICT (name) DO NOTHING RETURNING name) \
         SELECT rows, (SELECT count(*) FROM made) FROM found",
    );
    let parameters = [
        (&backfill.name() as _, Type::TEXT),
        (&SEES_NOTHING as _, Type::TEXT),
        (&system.identifier as _, Type::TEXT),
        (&system.timeline as _, Type::INT4),
    ];
    let doing = || format!("write checkpoint \"{}\"", contract.slot);
    let row = client.query_typed_one(&sql, &parameters).await;
    let row = row.map_err(|error| sort(doing(), error))?;
    let (rows, made): (i64, i64) = (row.get(0), row.get(1));
    if made == 0 {
        return Err(match rows > 0 && backfill == Backfill::Refuse {
            true => rows_before_the_relay(contract, rows),
            false => taken_over(contract),
        });
    }
    let fate = match backfill {
        Backfill::Pending => "they are sent first",
        _ => "they stay unpublished",
    };
    let note = format!("rows in the outbox before it: {rows}; {fate}");
    report.add_with_note(relay(contract), State::Created, (rows > 0).then_some(note));
    Ok(())
}

/// Turns a relay that read a slot into one that polls, from its last fence on, and drops
/// the slot.
pub(super) async fn take_over_slot(
    client: &Client,
    contract: &Contract,
    checkpoint: &Checkpoint,
    report: &mut Report,
) -> Result<()> {
    checkpoint.check_system(contract, &catalog::system(client).await?)?;
    make_index(client, contract, report).await?;
    let slot = catalog::find_slot(client, &contract.slot).await?;
    if let Some(slot) = &slot {
        slot.check_ours(&contract.slot)?;
        slot.check_unused(&contract.slot)?;
    }
    // As long as it names a publication, it has a slot that is to be dropped.
    let sql = contract.sql(
        "UPDATE :\"schema\".checkpoint \
         SET mode = 'poll', lsn = NULL, epoch = epoch + 1, updated_at = now() \
         WHERE name = :'slot' AND epoch = $1 AND mode = 'wal' AND lsn IS NOT NULL RETURNING name",
    );
    let epoch = [(&checkpoint.epoch as _, Type::INT8)];
    let rows = client.query_typed(&sql, &epoch).await;
    let rows =
        rows.map_err(|error| sort(format!("write checkpoint \"{}\"", contract.slot), error))?;
    if rows.is_empty() {
        return Err(taken_over(contract));
    }
    failpoint!("polling_begun");
    let note = "from its last fence on; what was delivered since is sent again";
    report.add_with_note(relay(contract), State::TakenOver, Some(note.to_owned()));
    drop_slot(client, contract, report).await
}

/// A slot that nobody reads any more keeps WAL until the disk is full.
async fn drop_slot(client: &Client, contract: &Contract, report: &mut Report) -> Result<()> {
    let doing = || format!("drop {}", object(contract));
    let name = [(&contract.slot as _, Type::TEXT)];
    if let Some(slot) = catalog::find_slot(client, &contract.slot).await? {
        slot.check_ours(&contract.slot)?;
        slot.check_unused(&contract.slot)?;
        let sql = "SELECT pg_drop_replication_slot($1::text::name)::text";
        let dropped = client.query_typed(sql, &name).await;
        dropped.map_err(|error| sort(doing(), error))?;
        report.add(object(contract), State::Dropped);
    }
    let sql = contract.sql(
        "UPDATE :\"schema\".checkpoint SET publication = NULL, publication_identity = NULL \
         WHERE name = $1 AND mode = 'poll'",
    );
    let forgotten = client.query_typed(&sql, &name).await;
    forgotten.map_err(|error| sort(doing(), error))?;
    Ok(())
}

async fn make_index(client: &Client, contract: &Contract, report: &mut Report) -> Result<()> {
    catalog::check_order(client, contract).await?;
    let index = contract.table("outbox_xid_idx");
    let doing = || format!("create index {index}");
    let sql = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass($1)";
    let found = client.query_typed(sql, &[(&index, Type::TEXT)]).await;
    let found = found.map_err(|error| sort(doing(), error))?;
    let is_valid = found.first().map(|row| row.get::<_, bool>(0));
    if is_valid == Some(true) {
        report.add(format!("index {index}"), State::AlreadyThere);
        return Ok(());
    }
    let made = match is_partitioned(client, contract).await {
        Ok(true) => make_partition_indexes(client, contract).await,
        Ok(false) => make_plain_index(client, contract, is_valid.is_some()).await,
        Err(error) => Err(error),
    };
    made.map_err(|error| {
        if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) {
            let message = format!(
                "{}: a transaction stayed open for {}; end it and run the command again",
                doing(),
                super::PATIENCE
            );
            return Error::new(ErrorKind::Database, message).caused_by(error);
        }
        sort(doing(), error)
    })?;
    report.add(format!("index {index}"), State::Created);
    Ok(())
}

/// Whoever has partitioned it.
async fn is_partitioned(
    client: &Client,
    contract: &Contract,
) -> Result<bool, tokio_postgres::Error> {
    let sql = "SELECT relkind = 'p' FROM pg_class WHERE oid = to_regclass($1)";
    let outbox = contract.table("outbox");
    let rows = client.query_typed(sql, &[(&outbox, Type::TEXT)]).await?;
    Ok(rows.first().is_some_and(|row| row.get(0)))
}

async fn make_plain_index(
    client: &Client,
    contract: &Contract,
    is_left: bool,
) -> Result<(), tokio_postgres::Error> {
    if is_left {
        // By one that was cut short.
        let index = contract.table("outbox_xid_idx");
        let drop = format!("DROP INDEX CONCURRENTLY {index}");
        client.batch_execute(&drop).await?;
    }
    client.batch_execute(&contract.sql(XID_INDEX)).await
}

/// One of a partition after the other, each beside writers.
async fn make_partition_indexes(
    client: &Client,
    contract: &Contract,
) -> Result<(), tokio_postgres::Error> {
    try_for_a_while(client, &contract.sql(XID_INDEX_PARTITIONED)).await?;
    for row in client.query(&contract.sql(PARTITION_INDEXES), &[]).await? {
        let statement: &str = row.get(0);
        match statement.contains(" CONCURRENTLY ") {
            true => client.batch_execute(statement).await?,
            false => try_for_a_while(client, &format!("{statement};")).await?,
        }
    }
    Ok(())
}

/// Writers wait behind a lock that is waited for: so it is for a moment, again and again.
async fn try_for_a_while(client: &Client, sql: &str) -> Result<(), tokio_postgres::Error> {
    let sql = format!("BEGIN; SET LOCAL lock_timeout = '500ms'; {sql} COMMIT");
    let deadline = Instant::now() + PATIENCE_TIME;
    while let Err(error) = client.batch_execute(&sql).await {
        client.batch_execute("ROLLBACK").await?;
        let is_late = Instant::now() > deadline;
        if is_late || error.code() != Some(&SqlState::LOCK_NOT_AVAILABLE) {
            return Err(error);
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    Ok(())
}

/// Makes the trigger that wakes a relay, or drops it.
pub(super) async fn set_notify(
    client: &Client,
    contract: &Contract,
    wanted: bool,
    report: &mut Report,
) -> Result<()> {
    let outbox = contract.table("outbox");
    let object = format!("trigger notify_relay of {outbox}");
    let sql = "SELECT EXISTS (SELECT FROM pg_trigger \
                              WHERE tgrelid = $1::text::regclass AND tgname = 'notify_relay')";
    let found = client.query_typed_one(sql, &[(&outbox, Type::TEXT)]).await;
    let found = found.map_err(|error| sort(format!("look for {object}"), error))?;
    let (sql, state) = match (found.get(0), wanted) {
        (false, true) => (contract.sql(NOTIFY), State::Created),
        (true, false) => (
            format!("DROP TRIGGER notify_relay ON {outbox}"),
            State::Dropped,
        ),
        (true, true) => {
            report.add(object, State::AlreadyThere);
            return Ok(());
        }
        (false, false) => return Ok(()),
    };
    // Writers wait behind a lock that is waited for.
    let sql = format!("BEGIN; SET LOCAL lock_timeout = '2s'; {sql}; COMMIT");
    let done = client.batch_execute(&sql).await;
    if done.is_err() {
        let _ = client.batch_execute("ROLLBACK").await;
    }
    done.map_err(|error| sort(format!("set {object}"), error))?;
    let note = (state == State::Created).then(|| "relays listen from their next start".to_owned());
    report.add_with_note(object, state, note);
    Ok(())
}

fn rows_before_the_relay(contract: &Contract, rows: i64) -> Error {
    Error::new(
        ErrorKind::Slot,
        format!(
            "{} has rows already: {rows}; `postbox setup --mode poll --backfill pending` has them published, \
             `--backfill none` leaves them unpublished",
            contract.table("outbox")
        ),
    )
}

fn relay(contract: &Contract) -> String {
    format!("relay \"{}\", which polls", contract.slot)
}
