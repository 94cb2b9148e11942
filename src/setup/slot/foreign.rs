//! A slot that someone else made, and its take-over.
//!
//! It has no exported snapshot. If the outbox is empty *now*, and no transaction is
//! left that may have been committed before the slot and is not seen yet (see
//! `catalog/snapshot.rs`), nothing lies before
//! the slot, and the present snapshot is as good. If it has rows, we cannot tell
//! which of them the slot still holds: they must be given up by name, and the
//! checkpoint gets a snapshot that sees nothing, so that a recovery before the
//! first heartbeat repeats rows rather than losing any. Or all are sent first, and those
//! that the slot still holds twice.

use tokio_postgres::types::PgLsn;
use tokio_postgres::{Client, IsolationLevel};

use super::object;
use super::start::{SEES_NOTHING, Start};
use crate::catalog::{self, SlotState};
use crate::contract::Contract;
use crate::database::{sort, within};
use crate::error::{Error, ErrorKind, Result};
use crate::setup::{ANSWER_MAX, Backfill, UNLIMITED, backfill};

/// Where the slot begins for us, if it can be read without losing rows.
pub(super) async fn take_over(
    client: &mut Client,
    contract: &Contract,
    slot: &SlotState,
    publication_is_new: bool,
    backfill: Backfill,
) -> Result<Start> {
    if publication_is_new || !is_older_than_slot(client, contract).await? {
        return Err(Error::new(
            ErrorKind::Slot,
            format!(
                "replication slot \"{slot}\" is not surely younger than publication \"{}\", and cannot be read past \
                 the point where there was none: if its reader has only just begun, let it go on for a while and run \
                 `postbox setup` again; or, if nothing needs what it holds, SELECT pg_drop_replication_slot('{slot}') first",
                contract.publication,
                slot = contract.slot,
            ),
        ));
    }
    let doing = format!("read the outbox beside {}", object(contract));
    let ended = async {
        let ended = catalog::wait_until_ended(client).await;
        ended.map_err(|error| sort(&doing, error))
    };
    let waiting = "wait until all transactions that are open now have ended";
    within(ANSWER_MAX, waiting, ended).await?;
    let (snapshot, rows_before, publication_identity) = look(client, contract, backfill)
        .await
        .map_err(|error| sort(doing, error))?;
    if rows_before > 0 && backfill == Backfill::Refuse {
        return Err(rows_beside_the_slot(contract, rows_before));
    }
    Ok(Start {
        lsn: slot.confirmed_flush_lsn.unwrap_or_else(|| PgLsn::from(0)),
        snapshot: match backfill {
            Backfill::None if rows_before > 0 => SEES_NOTHING.to_owned(),
            _ => snapshot,
        },
        rows_before,
        seq_before: 0,
        publication_identity,
    })
}

/// The snapshot of now, how many rows it sees that may lie before the slot, and the
/// publication's identity.
async fn look(
    client: &mut Client,
    contract: &Contract,
    backfill: Backfill,
) -> Result<(String, i64, Option<String>), tokio_postgres::Error> {
    let transaction = client
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .start()
        .await?;
    transaction.batch_execute(UNLIMITED).await?;
    let sql = contract.sql(
        "SELECT pg_current_snapshot()::text, :\"schema\".publication_identity(:'publication')",
    );
    let row = transaction.query_one(&sql, &[]).await?;
    let copies = !contract.outbox.is_ours() && backfill == Backfill::Pending;
    let rows = match copies {
        true => backfill::copy(&transaction, contract).await?,
        false => backfill::count(&transaction, contract).await?,
    };
    transaction.commit().await?;
    Ok((row.get(0), rows, row.get(1)))
}

/// Whether the publication was there at the slot's position. Every transaction
/// before the slot's `catalog_xmin` had ended by then.
async fn is_older_than_slot(client: &Client, contract: &Contract) -> Result<bool> {
    let sql = contract.sql(
        "SELECT bool_and(age(made.by) > age(s.catalog_xmin)) \
         FROM pg_replication_slots AS s, LATERAL ( \
             SELECT p.xmin FROM pg_publication AS p WHERE p.pubname = :'publication' \
             UNION ALL \
             SELECT r.xmin FROM pg_publication_rel AS r JOIN pg_publication AS p ON p.oid = r.prpubid \
             WHERE p.pubname = :'publication' \
         ) AS made (by) \
         WHERE s.slot_name = :'slot'",
    );
    let row = client
        .query_one(&sql, &[])
        .await
        .map_err(|error| sort(format!("read {}", object(contract)), error))?;
    Ok(row.get::<_, Option<bool>>(0).unwrap_or(false))
}

fn rows_beside_the_slot(contract: &Contract, rows: i64) -> Error {
    // A row that is deleted once it is published may be in the slot and nowhere else.
    let order = match contract.outbox.is_ours() || contract.outbox.preset.tracking().is_some() {
        true => "",
        false => {
            ", and a later row of a key before an earlier one, where rows are deleted that the slot still holds"
        }
    };
    Error::new(
        ErrorKind::Slot,
        format!(
            "replication slot \"{slot}\" was made by someone else, and {outbox} has rows: {rows}; those that were \
             committed before the slot's position would never be published; `postbox setup --backfill none` takes \
             the slot over and leaves them unpublished, `--backfill pending` sends all of them first, also those that \
             the slot still holds{order}",
            slot = contract.slot,
            outbox = contract.outbox.quoted()
        ),
    )
}
