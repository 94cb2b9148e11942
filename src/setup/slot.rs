//! The replication slot and the checkpoint that names it.
//!
//! A slot that once existed is never made again in silence: what was committed
//! in between would be lost. So it is the *checkpoint* that decides:
//!
//! | checkpoint | slot    | what it means, what is done                                  |
//! | ---------- | ------- | ------------------------------------------------------------ |
//! | at an LSN  | there   | set up: checked                                              |
//! | at an LSN  | missing | lost: refused                                                |
//! | none       | missing | new: a slot is made                                          |
//! | unfinished | missing | interrupted before the slot: the slot is made                |
//! | unfinished | there   | interrupted after it; nobody has read it: it is made anew    |
//! | none       | there   | another's: taken over, if that can be done without losing rows |
//!
//! To make one, the checkpoint is written first, without an LSN, which is how an
//! interrupted set-up is known. The relay does not start on such a checkpoint, so
//! the slot of an interrupted set-up has confirmed nothing and can be dropped.
//!
//! Then the slot is created over the replication protocol, with an *exported
//! snapshot*: it sees what committed before the slot's consistent point, and the
//! slot streams the rest. Under that snapshot we read three things. Rows it sees
//! would never be published, so any is an error unless they are given up. Itself,
//! as text, is the first snapshot of the checkpoint. And the publication's
//! identity is taken as of the very point where the slot begins.
//!
//! A slot that someone else made has no such snapshot. If the outbox is empty
//! *now*, nothing lies before the slot, and the present snapshot is as good. If it
//! has rows, we cannot tell which of them the slot still holds: they must be given
//! up by name, and the checkpoint gets a snapshot that sees nothing, so that a
//! recovery before the first heartbeat repeats rows rather than losing any.

use pgwire_replication::ReplicationClient;
use tokio_postgres::types::{PgLsn, Type};
use tokio_postgres::{Client, IsolationLevel};

use super::{PATIENCE, Report, State, create_publication};
use crate::catalog::{self, Checkpoint, SlotState, Stored, System};
use crate::contract::Contract;
use crate::database::{sort, sort_replication};
use crate::error::{Error, ErrorKind, Result};

/// Transaction ids below 3 are reserved: this snapshot sees no row of ours.
const SEES_NOTHING: &str = "3:3:";

/// Checks the slot that the checkpoint names, and its publication.
pub(super) async fn check(
    client: &Client,
    contract: &Contract,
    checkpoint: Checkpoint,
    report: &mut Report,
) -> Result<()> {
    checkpoint.check_system(contract, &catalog::system(client).await?)?;
    let slot = catalog::find_slot(client, &contract.slot).await?;
    let slot = slot.ok_or_else(|| checkpoint.slot_is_gone(contract))?;
    slot.check(&contract.slot)?;
    checkpoint.check_publication_name(contract)?;
    let publication = match checkpoint.publication_identity {
        Some(_) => State::AlreadyThere,
        // What the one before hid was given up, so there may be a new one.
        None => create_publication(client, contract).await?,
    };
    catalog::reconcile_publication(client, contract, checkpoint).await?;
    report.add(super::publication(contract), publication);
    report.add(object(contract), State::AlreadyThere);
    Ok(())
}

/// Makes the slot, or takes over one that someone else made.
pub(super) async fn create(
    client: &mut Client,
    mut replication: ReplicationClient,
    contract: &Contract,
    publication_is_new: bool,
    backfill_none: bool,
    report: &mut Report,
) -> Result<()> {
    let system = identify_system(&mut replication).await?;
    let unfinished = catalog::stored(client, contract).await? == Stored::Unfinished;
    let existing = catalog::find_slot(client, &contract.slot).await?;
    if let (Some(slot), false) = (&existing, unfinished) {
        slot.check(&contract.slot)?;
        slot.check_unused(&contract.slot)?;
        let start = take_over(client, contract, slot, publication_is_new, backfill_none).await?;
        note_intention(client, contract).await?;
        finish(client, contract, &system, &start).await?;
        let rows = start.rows_before;
        let note =
            format!("rows in the outbox: {rows}; those before its position stay unpublished");
        report.add_with_note(
            object(contract),
            State::TakenOver,
            (rows > 0).then_some(note),
        );
        return Ok(());
    }
    note_intention(client, contract).await?;
    if existing.is_some() {
        drop_slot(&mut replication, contract).await?;
    }
    let start = create_slot(client, &mut replication, contract).await?;
    if start.rows_before > 0 && !backfill_none {
        drop_slot(&mut replication, contract).await?;
        forget_intention(client, contract).await?;
        return Err(rows_before_the_slot(contract, start.rows_before));
    }
    finish(client, contract, &system, &start).await?;
    let rows = start.rows_before;
    let note = format!("rows in the outbox before it: {rows}; they stay unpublished");
    report.add_with_note(object(contract), State::Created, (rows > 0).then_some(note));
    Ok(())
}

/// Where a slot begins.
struct Start {
    lsn: PgLsn,
    snapshot: String,
    /// Of a slot that someone else made: rows that may be before it.
    rows_before: i64,
    publication_identity: Option<String>,
}

async fn identify_system(replication: &mut ReplicationClient) -> Result<System> {
    let system = replication
        .identify_system()
        .await
        .map_err(|error| sort_replication("identify the system", error))?;
    Ok(System {
        identifier: system.system_id,
        timeline: system.timeline.cast_signed(),
    })
}

async fn create_slot(
    client: &mut Client,
    replication: &mut ReplicationClient,
    contract: &Contract,
) -> Result<Start> {
    let slot = &contract.slot;
    // The older syntax: Postgres 14 has no other, and all later ones know it.
    let command = format!("CREATE_REPLICATION_SLOT {slot} LOGICAL pgoutput EXPORT_SNAPSHOT");
    let rows = match replication.simple_query(&command).await {
        Ok(rows) => rows,
        Err(error) if error.to_string().contains("SQLSTATE 55P03") => {
            let error = sort_replication(format!("create {}", object(contract)), error);
            return Err(open_transaction(client, contract).await?.caused_by(error));
        }
        Err(error) => {
            return Err(sort_replication(
                format!("create {}", object(contract)),
                error,
            ));
        }
    };
    // Slot, consistent point, snapshot, plugin.
    let text = |column: usize| {
        let value = rows.first().and_then(|row| row.get(column)?.as_ref());
        value.and_then(|bytes| std::str::from_utf8(bytes).ok())
    };
    let (Some(lsn), Some(exported)) = (text(1).and_then(|lsn| lsn.parse().ok()), text(2)) else {
        return Err(Error::new(
            ErrorKind::Unexpected,
            format!(
                "the server created {} and did not say where",
                object(contract)
            ),
        ));
    };
    look_before(client, contract, lsn, exported)
        .await
        .map_err(|error| {
            sort(
                format!("read the outbox before {}", object(contract)),
                error,
            )
        })
}

/// What there was before the slot, through its exported snapshot.
async fn look_before(
    client: &mut Client,
    contract: &Contract,
    lsn: PgLsn,
    exported: &str,
) -> Result<Start, tokio_postgres::Error> {
    let transaction = client
        .build_transaction()
        .isolation_level(IsolationLevel::RepeatableRead)
        .read_only(true)
        .start()
        .await?;
    let exported = postgres_protocol::escape::escape_literal(exported);
    transaction
        .batch_execute(&format!("SET TRANSACTION SNAPSHOT {exported}"))
        .await?;
    let sql = contract.sql(
        "SELECT pg_current_snapshot()::text, (SELECT count(*) FROM :\"schema\".outbox), \
                :\"schema\".publication_identity(:'publication')",
    );
    let row = transaction.query_one(&sql, &[]).await?;
    transaction.commit().await?;
    Ok(Start {
        lsn,
        snapshot: in_order(row.get(0)),
        rows_before: row.get(1),
        publication_identity: row.get(2),
    })
}

/// A snapshot as the type `pg_snapshot` takes it, which sees no more than the
/// one given.
///
/// The server puts a slot's snapshot together from the WAL: while transactions
/// come and go, `xmin` follows the oldest that runs, and `xmax` only those that
/// commit. If the newest rolled back, `xmin` is past `xmax`, as in `7366:7365:`.
/// To see rows that is no harm, but the type refuses it. A fence may see less than
/// was there, and then recovery repeats; it must never see more. So the end is
/// the smaller of the two, and what runs below it still runs.
fn in_order(snapshot: String) -> String {
    let parts: Vec<&str> = snapshot.split(':').collect();
    let [xmin, xmax, running] = parts[..] else {
        return snapshot;
    };
    let (Ok(xmin), Ok(xmax)) = (xmin.parse::<u64>(), xmax.parse::<u64>()) else {
        return snapshot;
    };
    if xmin <= xmax {
        return snapshot;
    }
    let running = running.split(',').filter_map(|xid| xid.parse().ok());
    let running: Vec<u64> = running.filter(|xid| *xid < xmax).collect();
    let xmin = running.iter().copied().min().unwrap_or(xmax);
    let running: Vec<String> = running.iter().map(u64::to_string).collect();
    format!("{xmin}:{xmax}:{}", running.join(","))
}

async fn take_over(
    client: &Client,
    contract: &Contract,
    slot: &SlotState,
    publication_is_new: bool,
    backfill_none: bool,
) -> Result<Start> {
    if publication_is_new || !is_older_than_slot(client, contract).await? {
        return Err(Error::new(
            ErrorKind::Slot,
            format!(
                "replication slot \"{slot}\" is not surely younger than publication \"{}\", and cannot be read past \
                 the point where there was none: if nothing else needs it, SELECT pg_drop_replication_slot('{slot}') \
                 and run `postbox setup` again",
                contract.publication,
                slot = contract.slot,
            ),
        ));
    }
    let sql = contract.sql(
        "SELECT pg_current_snapshot()::text, (SELECT count(*) FROM :\"schema\".outbox), \
                :\"schema\".publication_identity(:'publication')",
    );
    let row = client.query_one(&sql, &[]).await.map_err(|error| {
        sort(
            format!("read the outbox beside {}", object(contract)),
            error,
        )
    })?;
    let (snapshot, rows_before) = (row.get(0), row.get(1));
    if rows_before > 0 && !backfill_none {
        return Err(rows_beside_the_slot(contract, rows_before));
    }
    Ok(Start {
        lsn: slot.confirmed_flush_lsn.unwrap_or_else(|| PgLsn::from(0)),
        snapshot: match rows_before {
            0 => snapshot,
            _ => SEES_NOTHING.to_owned(),
        },
        rows_before,
        publication_identity: row.get(2),
    })
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

async fn drop_slot(replication: &mut ReplicationClient, contract: &Contract) -> Result<()> {
    let command = format!("DROP_REPLICATION_SLOT {}", contract.slot);
    replication
        .simple_query(&command)
        .await
        .map_err(|error| sort_replication(format!("drop {}", object(contract)), error))?;
    Ok(())
}

async fn note_intention(client: &Client, contract: &Contract) -> Result<()> {
    let sql = contract.sql(
        "INSERT INTO :\"schema\".checkpoint (name, mode, publication) VALUES (:'slot', 'wal', :'publication') \
         ON CONFLICT (name) DO UPDATE SET publication = excluded.publication, updated_at = now() \
         WHERE checkpoint.lsn IS NULL",
    );
    write(client, contract, &sql).await
}

async fn forget_intention(client: &Client, contract: &Contract) -> Result<()> {
    let sql =
        contract.sql("DELETE FROM :\"schema\".checkpoint WHERE name = :'slot' AND lsn IS NULL");
    write(client, contract, &sql).await
}

async fn write(client: &Client, contract: &Contract, sql: &str) -> Result<()> {
    client
        .batch_execute(sql)
        .await
        .map_err(|error| sort(format!("write checkpoint \"{}\"", contract.slot), error))
}

async fn finish(
    client: &Client,
    contract: &Contract,
    system: &System,
    start: &Start,
) -> Result<()> {
    let sql = contract.sql(
        "UPDATE :\"schema\".checkpoint \
         SET lsn = $1, snapshot = $2::pg_snapshot, system_identifier = $3, timeline = $4, \
             publication_identity = $5, updated_at = now() \
         WHERE name = :'slot' AND lsn IS NULL RETURNING name",
    );
    let parameters = [
        (&start.lsn as _, Type::PG_LSN),
        (&start.snapshot as _, Type::TEXT),
        (&system.identifier as _, Type::TEXT),
        (&system.timeline as _, Type::INT4),
        (&start.publication_identity as _, Type::TEXT),
    ];
    let rows = client
        .query_typed(&sql, &parameters)
        .await
        .map_err(|error| sort(format!("write checkpoint \"{}\"", contract.slot), error))?;
    if rows.is_empty() {
        return Err(Error::new(
            ErrorKind::Slot,
            format!(
                "checkpoint \"{}\" was changed during set-up: run `postbox setup` again",
                contract.slot
            ),
        ));
    }
    Ok(())
}

/// A slot begins when every transaction that was open has ended.
async fn open_transaction(client: &Client, contract: &Contract) -> Result<Error> {
    let sql = "SELECT format('process %s of database \"%s\" has been in one since %s', pid, datname, \
                             date_trunc('second', xact_start)) \
               FROM pg_stat_activity WHERE backend_xid IS NOT NULL AND pid <> pg_backend_pid() \
               UNION ALL \
               SELECT format('\"%s\" of database \"%s\" has been prepared since %s', gid, database, \
                             date_trunc('second', prepared)) \
               FROM pg_prepared_xacts LIMIT 3";
    let rows = client
        .query(sql, &[])
        .await
        .map_err(|error| sort("look for open transactions", error))?;
    let found: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    let named = match found.is_empty() {
        true => "pg_stat_activity names it in backend_xid".to_owned(),
        false => found.join(", "),
    };
    Ok(Error::new(
        ErrorKind::Slot,
        format!(
            "{} was not made, as a transaction stayed open for {PATIENCE}: {named}; end it and run `postbox setup` again",
            object(contract)
        ),
    ))
}

fn rows_before_the_slot(contract: &Contract, rows: i64) -> Error {
    Error::new(
        ErrorKind::Slot,
        format!(
            "{} has rows committed before the slot, which would never be published: {rows}; \
             `postbox setup --backfill none` leaves them unpublished (nothing was kept of the slot)",
            contract.table("outbox")
        ),
    )
}

fn rows_beside_the_slot(contract: &Contract, rows: i64) -> Error {
    Error::new(
        ErrorKind::Slot,
        format!(
            "replication slot \"{slot}\" was made by someone else, and {outbox} has rows: {rows}; those that were \
             committed before the slot's position would never be published; `postbox setup --backfill none` takes \
             the slot over and leaves them unpublished",
            slot = contract.slot,
            outbox = contract.table("outbox")
        ),
    )
}

fn object(contract: &Contract) -> String {
    format!("replication slot \"{}\"", contract.slot)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_in_order_stays_as_it_is() {
        for text in ["5:5:", "5:9:", "5:9:5,7", "nonsense", "5:x:"] {
            assert_eq!(in_order(text.to_owned()), text);
        }
    }

    #[test]
    fn a_snapshot_that_ends_before_it_begins_sees_what_both_its_ends_see() {
        for (text, expected) in [
            ("7366:7365:", "7365:7365:"),
            ("9:5:6,7", "5:5:"),
            ("9:5:3,4,7", "3:5:3,4"),
        ] {
            assert_eq!(in_order(text.to_owned()), expected);
        }
    }
}
