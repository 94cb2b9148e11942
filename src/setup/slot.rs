//! The replication slot and the checkpoint that names it.
//!
//! A slot that once existed is never made again in silence: what was committed
//! in between would be lost. So it is the *checkpoint* that decides:
//!
//! | checkpoint | slot    | what it means, what is done                                  |
//! | ---------- | ------- | ------------------------------------------------------------ |
//! | at an LSN  | there   | set up: checked                                              |
//! | at an LSN  | missing | lost: refused, `recover.rs` makes it anew                    |
//! | none       | missing | new: a slot is made                                          |
//! | unfinished | missing | interrupted before the slot: the slot is made                |
//! | unfinished | there   | interrupted after it; nobody has read it: it is made anew    |
//! | none       | there   | another's: taken over, if that can be done without losing rows |
//!
//! To make one, the checkpoint is written first, without an LSN, which is how an
//! interrupted set-up is known. The relay does not start on such a checkpoint, so
//! the slot of an interrupted set-up has confirmed nothing and can be dropped.

mod foreign;
pub(super) mod start;

use pgwire_replication::ReplicationClient;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use self::start::{SEES_NOTHING, Start, create_slot};
use super::{ANSWER_MAX, Backfill, Report, State, UNLIMITED, backfill};
use crate::catalog::{self, Checkpoint, Gap, SlotState, Stored, System};
use crate::contract::Contract;
use crate::database::{sort, sort_replication, within};
use crate::error::{Error, ErrorKind, Result};

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
    catalog::compare_publication(client, contract, &checkpoint).await?;
    if checkpoint.gap.is_none() {
        backfill::drop_copy(client, contract).await?;
    }
    report.add(super::publication(contract), State::AlreadyThere);
    report.add(object(contract), State::AlreadyThere);
    Ok(())
}

/// Makes the slot, or takes over one that someone else made.
pub(super) async fn create(
    client: &mut Client,
    mut replication: ReplicationClient,
    contract: &Contract,
    publication_is_new: bool,
    backfill: Backfill,
    report: &mut Report,
) -> Result<()> {
    let system = identify_system(client, &mut replication).await?;
    let unfinished = catalog::stored(client, contract).await? == Stored::Unfinished;
    let existing = catalog::find_slot(client, &contract.slot).await?;
    if let (Some(slot), false) = (&existing, unfinished) {
        slot.check(&contract.slot)?;
        slot.check_unused(&contract.slot)?;
        let start =
            foreign::take_over(client, contract, slot, publication_is_new, backfill).await?;
        let gap = pending(&start, backfill);
        // At once: an unfinished set-up is taken to have left a slot that nobody has read.
        write(client, contract, "BEGIN").await?;
        note_intention(client, contract).await?;
        failpoint!("taking_over");
        finish(client, contract, &system, &start, gap.as_ref(), None).await?;
        write(client, contract, "COMMIT").await?;
        let rows = start.rows_before;
        let fate = match gap {
            Some(_) => "all are sent first, those that it still holds twice",
            None => "those before its position stay unpublished",
        };
        let note = format!("rows in the outbox: {rows}; {fate}");
        report.add_with_note(
            object(contract),
            State::TakenOver,
            (rows > 0).then_some(note),
        );
        return Ok(());
    }
    note_intention(client, contract).await?;
    let existing = existing.as_ref();
    let copies = backfill == Backfill::Pending;
    let start = create_slot(
        client,
        &mut replication,
        contract,
        existing,
        SEES_NOTHING,
        copies,
    )
    .await?;
    if start.rows_before > 0 && backfill == Backfill::Refuse {
        drop_slot(&mut replication, contract).await?;
        forget_intention(client, contract).await?;
        return Err(rows_before_the_slot(contract, start.rows_before));
    }
    let gap = pending(&start, backfill);
    finish(client, contract, &system, &start, gap.as_ref(), None).await?;
    let rows = start.rows_before;
    let fate = match gap {
        Some(_) => "they are sent first",
        None => "they stay unpublished",
    };
    let note = format!("rows in the outbox before it: {rows}; {fate}");
    report.add_with_note(object(contract), State::Created, (rows > 0).then_some(note));
    Ok(())
}

/// Refuses rows that no slot would give, before anything is made. More may come until the
/// slot begins.
pub(super) async fn refuse_rows(client: &mut Client, contract: &Contract) -> Result<()> {
    if catalog::find_slot(client, &contract.slot).await?.is_some() {
        // It may hold them.
        return Ok(());
    }
    let outbox = contract.outbox.quoted();
    let counted = async {
        let sql = "SELECT to_regclass($1) IS NOT NULL";
        let found = client
            .query_typed_one(sql, &[(&outbox, Type::TEXT)])
            .await?;
        if !found.get::<_, bool>(0) {
            return Ok(0);
        }
        let transaction = client.build_transaction().read_only(true).start().await?;
        transaction.batch_execute(UNLIMITED).await?;
        let rows = backfill::count(&transaction, contract).await?;
        transaction.commit().await?;
        Ok(rows)
    };
    match counted
        .await
        .map_err(|error| sort(format!("read {outbox}"), error))?
    {
        0 => Ok(()),
        rows => Err(rows_before_the_slot(contract, rows)),
    }
}

/// The rows before the slot, if they are to be sent.
fn pending(start: &Start, backfill: Backfill) -> Option<Gap> {
    (start.rows_before > 0 && backfill == Backfill::Pending).then(|| Gap {
        since: SEES_NOTHING.to_owned(),
        until: start.snapshot.clone(),
        seq: start.seq_before,
    })
}

/// The server that both sessions are with: what one drops, the other must make anew.
pub(super) async fn identify_system(
    client: &Client,
    replication: &mut ReplicationClient,
) -> Result<System> {
    let doing = "identify the system";
    let found = async {
        let found = replication.identify_system().await;
        found.map_err(|error| sort_replication(doing, error))
    };
    let found = within(ANSWER_MAX, doing, found).await.map(System::from)?;
    catalog::system(client).await?.check_same(&found, doing)?;
    Ok(found)
}

async fn drop_slot(replication: &mut ReplicationClient, contract: &Contract) -> Result<()> {
    let command = format!("DROP_REPLICATION_SLOT {}", contract.slot);
    let doing = format!("drop {}", object(contract));
    let dropped = async {
        let dropped = replication.simple_query(&command).await;
        dropped.map_err(|error| sort_replication(&doing, error))
    };
    within(ANSWER_MAX, &doing, dropped).await?;
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

pub(super) async fn write(client: &Client, contract: &Contract, sql: &str) -> Result<()> {
    let doing = format!("write checkpoint \"{}\"", contract.slot);
    let written = async {
        let written = client.batch_execute(sql).await;
        written.map_err(|error| sort(&doing, error))
    };
    within(ANSWER_MAX, &doing, written).await
}

/// Writes where the slot begins, and the gap before it that is to be sent: in the epoch, if
/// there is one, in which what lies before it was found out.
pub(super) async fn finish(
    client: &Client,
    contract: &Contract,
    system: &System,
    start: &Start,
    gap: Option<&Gap>,
    epoch: Option<i64>,
) -> Result<()> {
    let sql = contract.sql(
        "UPDATE :\"schema\".checkpoint \
         SET mode = 'wal', lsn = $1, snapshot = $2::pg_snapshot, second_snapshot = $3::pg_snapshot, seq = $4, \
             system_identifier = $5, timeline = $6, publication_identity = $7, updated_at = now() \
         WHERE name = :'slot' AND lsn IS NULL AND epoch = coalesce($8, epoch) RETURNING name",
    );
    let snapshot = gap.map_or(&start.snapshot, |gap| &gap.since);
    let second_snapshot = gap.map(|gap| &gap.until);
    let seq = gap.map(|gap| gap.seq);
    let parameters = [
        (&start.lsn as _, Type::PG_LSN),
        (snapshot as _, Type::TEXT),
        (&second_snapshot as _, Type::TEXT),
        (&seq as _, Type::INT8),
        (&system.identifier as _, Type::TEXT),
        (&system.timeline as _, Type::INT4),
        (&start.publication_identity as _, Type::TEXT),
        (&epoch as _, Type::INT8),
    ];
    let doing = format!("write checkpoint \"{}\"", contract.slot);
    let written = async {
        let rows = client.query_typed(&sql, &parameters).await;
        rows.map_err(|error| sort(&doing, error))
    };
    if within(ANSWER_MAX, &doing, written).await?.is_empty() {
        return Err(taken_over(contract));
    }
    Ok(())
}

/// The checkpoint is no longer what it was when the command looked at it.
pub(super) fn taken_over(contract: &Contract) -> Error {
    Error::new(
        ErrorKind::Slot,
        format!(
            "checkpoint \"{}\" was taken over meanwhile: stop its relay, and run the command again",
            contract.slot
        ),
    )
}

/// A slot of this name is another's, where one is to be made. One that cannot be ours is
/// not for us to have dropped.
pub(super) fn is_in_the_way(contract: &Contract, slot: &SlotState) -> Error {
    if let Err(error) = slot.check_ours(&contract.slot) {
        return error;
    }
    let active = slot.active_pid.map_or("", |_| ", and somebody reads it");
    let message = format!(
        "{} is there already{active}: if nothing needs it, SELECT pg_drop_replication_slot('{}') and run the command again",
        object(contract),
        contract.slot
    );
    Error::new(ErrorKind::Slot, message)
}

pub(super) fn setup_is_unfinished(contract: &Contract) -> Error {
    Error::new(
        ErrorKind::Slot,
        format!(
            "the set-up of {} has not finished: run `postbox setup` again, and then change the mode",
            object(contract)
        ),
    )
}

fn rows_before_the_slot(contract: &Contract, rows: i64) -> Error {
    Error::new(
        ErrorKind::Slot,
        format!(
            "{} has rows committed before the slot, which would never be published: {rows}; \
             `postbox setup --backfill pending` has the relay send them first, `--backfill none` leaves them \
             unpublished (nothing was kept of the slot)",
            contract.outbox.quoted()
        ),
    )
}

pub(super) fn object(contract: &Contract) -> String {
    format!("replication slot \"{}\"", contract.slot)
}
