//! A new slot in place of one that was lost, and nothing lost with it.
//!
//! A slot can be dropped, invalidated (`max_slot_wal_keep_size`), left behind by a
//! fail-over, or blind for a while because its publication was changed. What was
//! committed since the last fence that came out of it is in the outbox still:
//!
//! ```text
//!   commits  ───────┬──────────────────┬───────▶
//!         checkpoint's snapshot   new slot's snapshot
//!     delivered     │   the gap        │  streamed
//! ```
//!
//! Recovery makes the slot and stores both snapshots; the relay that starts next
//! reads the gap from the table before it reads the slot. What was delivered after
//! the last fence is in the gap too, and is sent again: that of one heartbeat
//! interval, if the relay kept up.
//!
//! The checkpoint's LSN is taken away first and comes back last. Without one, no
//! relay starts, and a recovery that was interrupted begins again: the slot that
//! it left has given nothing. Its epoch rises, so that a relay that has lost the
//! slot and does not know it yet can no longer write it.
//!
//! A relay that polls and is to read a slot goes on polling until that is there: the mode
//! changes with the LSN, in one statement. Until then the checkpoint names a publication, as
//! that of a change to polling that was cut short does: there may be a slot, which nobody has
//! read. So either mode can be set up from there. A relay that polls meanwhile raises the
//! epoch, and the slot is made for nothing: what lies before it was not known.

use pgwire_replication::ReplicationClient;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::slot::start::create_slot;
use super::slot::{finish, identify_system, is_in_the_way, object, taken_over};
use super::{
    ANSWER_MAX, Missed, Report, SETTINGS, State, check_rows, create_publication, lock,
    open_replication, publication, stop_it_first,
};
use crate::catalog::{self, Checkpoint, Gap, Mode, Stored};
use crate::contract::Contract;
use crate::database::{Database, sort, within};
use crate::error::{Error, ErrorKind, Result};
use crate::source::BACKFILL_SEQ;

/// Makes a lost slot anew, so that the next relay first sends what was committed
/// since the last checkpoint, unless something else is to become of that.
///
/// Does nothing where nothing is lost. Can be run again at any time, also after it
/// was interrupted.
///
/// # Errors
///
/// `SlotInUse`: a relay reads the slot. `Slot`: there is no checkpoint to start
/// from, another took it over meanwhile, or the slot is another's. `Database`: the
/// checkpoint belongs to another cluster. `Publication`: it is wrong, and the message
/// has the statement that mends it.
pub async fn recover(database: &Database, contract: &Contract, missed: Missed) -> Result<Report> {
    let done = recover_slot(database, contract, missed).await;
    done.map_err(stop_it_first)
}

async fn recover_slot(database: &Database, contract: &Contract, missed: Missed) -> Result<Report> {
    contract.validate()?;
    let mut session = database.connect_alone("postbox recover", &SETTINGS).await?;
    let client = &mut session.client;
    lock(client).await?;
    catalog::check_server(client).await?;
    catalog::check_wal_level(client).await?;
    catalog::check_schema_version(client, contract, Mode::Wal).await?;
    let (checkpoint, finished) = match catalog::stored(client, contract).await? {
        Stored::At(checkpoint) => (checkpoint, true),
        Stored::Recovering(checkpoint) => (checkpoint, false),
        Stored::Missing | Stored::Unfinished => {
            return Err(catalog::not_set_up(contract, Some(Mode::Wal)));
        }
    };
    checkpoint.check_mode(contract, Mode::Wal)?;
    checkpoint.check_system(contract, &catalog::system(client).await?)?;
    checkpoint.check_publication_name(contract)?;
    let mut report = Report::default();
    if finished && is_whole(client, contract, &checkpoint).await? {
        let note = match (&checkpoint.gap, missed) {
            (Some(_), Missed::Skip) => Some(skip_rest(client, contract, checkpoint.epoch).await?),
            _ => None,
        };
        report.add(publication(contract), State::AlreadyThere);
        report.add_with_note(object(contract), State::AlreadyThere, note);
        return Ok(report);
    }
    if !contract.outbox.is_ours() && missed == Missed::Send {
        return Err(unknown_rows(contract));
    }
    check_rows(client, contract).await?;
    make_slot(database, client, contract, &checkpoint, missed, &mut report).await?;
    Ok(report)
}

/// Makes a slot for a relay that has polled: what was committed since its last snapshot
/// is sent first.
pub(super) async fn take_over_polling(
    database: &Database,
    client: &mut Client,
    contract: &Contract,
    checkpoint: &Checkpoint,
    report: &mut Report,
) -> Result<()> {
    checkpoint.check_system(contract, &catalog::system(client).await?)?;
    catalog::check_lease_is_free(client, contract, "").await?;
    if let Some(gap) = &checkpoint.gap {
        return Err(unfinished_gap(contract, gap));
    }
    if let Some(slot) = catalog::find_slot(client, &contract.slot).await? {
        // That of a change to polling that was cut short is ours.
        slot.check_ours(&contract.slot)?;
        match checkpoint.has_left_slot() {
            true => slot.check_unused(&contract.slot)?,
            false => return Err(is_in_the_way(contract, &slot)),
        }
    }
    let missed = Missed::Send;
    make_slot(database, client, contract, checkpoint, missed, report).await
}

/// Makes a slot, and what it was not there for yet a gap before it.
pub(super) async fn make_slot(
    database: &Database,
    client: &mut Client,
    contract: &Contract,
    checkpoint: &Checkpoint,
    missed: Missed,
    report: &mut Report,
) -> Result<()> {
    let replication = Box::pin(open_replication(database, client, contract)).await?;
    let made = create_publication(client, contract).await?;
    catalog::check_publication(client, contract).await?;
    report.add(publication(contract), made);
    let note = remake(client, replication, contract, checkpoint, missed).await?;
    report.add_with_note(object(contract), State::Created, Some(note));
    Ok(())
}

/// Only the checkpoint of a relay that polls can tell what of a gap is delivered.
fn unfinished_gap(contract: &Contract, gap: &Gap) -> Error {
    let message = format!(
        "relay \"{}\" has stopped amid what it was reading, at seq {}: start it with `--mode poll`, let it catch up, \
         stop it, and run the command again",
        contract.slot, gap.seq
    );
    Error::new(ErrorKind::Slot, message)
}

/// Of another library's table nobody can tell which rows are missing.
fn unknown_rows(contract: &Contract) -> Error {
    let (table, preset) = (contract.outbox.quoted(), contract.outbox.preset);
    let resent = match preset.tracking() {
        Some(_) => {
            "--resend sends all rows first that are not marked published, which are few if the relay runs with --mark"
        }
        None => "--resend sends all rows first that are in the table, also those that were sent",
    };
    let message = format!(
        "{} is lost, and rows of {table} do not say when they were committed, so that those which it did not give \
         are not known: {resent}; --skip-missed leaves them unpublished",
        object(contract)
    );
    Error::new(ErrorKind::Slot, message)
}

/// Whether the slot still gives everything since it was set up.
async fn is_whole(client: &Client, contract: &Contract, checkpoint: &Checkpoint) -> Result<bool> {
    let Some(slot) = catalog::find_slot(client, &contract.slot).await? else {
        return Ok(false);
    };
    slot.check_ours(&contract.slot)?;
    slot.check_unused(&contract.slot)?;
    let present = catalog::publication_identity(client, contract).await?;
    let is_same = present.as_ref() == Some(&checkpoint.publication_identity);
    if is_same {
        // It may be for another table.
        catalog::compare_publication(client, contract, checkpoint).await?;
    }
    Ok(is_same && !slot.is_lost())
}

/// Drops what there is of the slot and makes it anew; says what there was between.
async fn remake(
    client: &mut Client,
    mut replication: ReplicationClient,
    contract: &Contract,
    checkpoint: &Checkpoint,
    missed: Missed,
) -> Result<String> {
    let system = identify_system(client, &mut replication).await?;
    // Of a relay that polls the mode stays, and nobody has its lease.
    let begin = contract.sql(
        "UPDATE :\"schema\".checkpoint \
         SET lsn = NULL, second_snapshot = NULL, seq = NULL, publication = :'publication', \
             owner = NULL, expires_at = NULL, epoch = epoch + 1, updated_at = now() \
         WHERE name = :'slot' AND epoch = $1 RETURNING epoch",
    );
    failpoint!("recovery_beginning");
    let doing = || format!("write checkpoint \"{}\"", contract.slot);
    let begun = async {
        let epoch = [(&checkpoint.epoch as _, Type::INT8)];
        let begun = client.query_typed(&begin, &epoch).await;
        begun.map_err(|error| sort(doing(), error))
    };
    let begun = within(ANSWER_MAX, &doing(), begun).await?;
    let epoch: i64 = begun.first().ok_or_else(|| taken_over(contract))?.get(0);
    failpoint!("recovery_begun");
    let existing = catalog::find_slot(client, &contract.slot).await?;
    let (existing, since) = (existing.as_ref(), &checkpoint.snapshot);
    let skips = missed == Missed::Skip;
    let start = create_slot(client, &mut replication, contract, existing, since, !skips).await?;
    let rows = start.rows_before;
    let gap = (rows > 0 && !skips).then(|| Gap {
        since: since.clone(),
        until: start.snapshot.clone(),
        seq: start.seq_before,
    });
    failpoint!("recovery_finishing");
    finish(client, contract, &system, &start, gap.as_ref(), Some(epoch)).await?;
    failpoint!("recovery_finished");
    let found = match (contract.outbox.is_ours(), contract.outbox.preset.tracking()) {
        (true, _) => format!("rows committed since the last checkpoint: {rows}"),
        (false, Some(_)) => format!("rows that are not marked published: {rows}"),
        (false, None) => format!("rows in the table: {rows}"),
    };
    Ok(match (rows, gap) {
        (0, _) => found,
        (_, Some(_)) => format!("{found}; the relay sends them before all others"),
        (_, None) => format!("{found}; they stay unpublished"),
    })
}

/// Gives up what a recovery has left to be sent, unless a relay has taken the
/// checkpoint over since this epoch. One of this epoch that has lost its session may
/// still write how far it came: the gap is taken as it is once its row is locked.
async fn skip_rest(client: &Client, contract: &Contract, epoch: i64) -> Result<String> {
    let rest = match contract.outbox.is_ours() {
        true => format!(
            "{} AS o \
             WHERE NOT pg_visible_in_snapshot(o.xid, skipped.since) \
               AND pg_visible_in_snapshot(o.xid, skipped.until) AND o.seq > skipped.seq",
            contract.outbox.quoted()
        ),
        false => format!(
            "{} AS o WHERE o.{BACKFILL_SEQ} > skipped.seq",
            contract.backfill_table()
        ),
    };
    let sql = contract.sql(&format!(
        "WITH gap AS (
             SELECT name, snapshot AS since, second_snapshot AS until, coalesce(seq, 0) AS seq
             FROM :\"schema\".checkpoint
             WHERE name = :'slot' AND epoch = $1 AND second_snapshot IS NOT NULL
             FOR UPDATE
         ), skipped AS (
             UPDATE :\"schema\".checkpoint AS c
             SET snapshot = gap.until, second_snapshot = NULL, seq = NULL, epoch = epoch + 1,
                 updated_at = now()
             FROM gap WHERE c.name = gap.name RETURNING gap.*
         )
         SELECT (SELECT count(*) FROM {rest}) FROM skipped",
    ));
    let rows = client
        .query_typed(&sql, &[(&epoch as _, Type::INT8)])
        .await
        .map_err(|error| sort(format!("write checkpoint \"{}\"", contract.slot), error))?;
    let row = rows.first().ok_or_else(|| taken_over(contract))?;
    let rows: i64 = row.get(0);
    Ok(format!(
        "rows of a recovery not sent yet: {rows}; they stay unpublished"
    ))
}
