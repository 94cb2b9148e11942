//! The checkpoint: what the relay has stored about itself.

use tokio_postgres::error::SqlState;
use tokio_postgres::types::{PgLsn, ToSql, Type};
use tokio_postgres::{Client, Row};
use tracing::warn;

use super::slot::AFTER_LOSS;
use super::{System, check_publication, lease, publication, publication_identity};
use crate::contract::Contract;
use crate::database::{query_after, sort};
use crate::error::{Error, ErrorKind, Result};

/// Where a relay is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// How it reads.
    pub mode: Mode,
    /// Everything that committed before it is delivered. The slot's own position
    /// may be further on. Zero with polling.
    pub lsn: PgLsn,
    /// A `pg_snapshot`: every row it sees is delivered or given up.
    pub snapshot: String,
    /// The cluster that `lsn` and `snapshot` belong to.
    pub system: System,
    /// The publication the slot was set up with.
    pub publication: String,
    /// What that publication was then: see `publication_identity()` in
    /// `sql/0001_outbox.sql`.
    pub publication_identity: String,
    /// What was committed between a lost slot and the present one, as far as it
    /// is not delivered yet. With polling, what was being read.
    pub gap: Option<Gap>,
    /// Rises whenever a relay or a recovery takes the checkpoint over; each write
    /// names the epoch it was taken over in.
    pub epoch: i64,
}

/// How a relay reads the outbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Mode {
    /// From a replication slot.
    #[default]
    Wal,
    /// From the table.
    Poll,
}

impl Mode {
    /// As it is written in the checkpoint, and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Wal => "wal",
            Self::Poll => "poll",
        }
    }
}

/// Rows that no slot gives: those that one snapshot sees and another does not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// The `pg_snapshot` whose rows are delivered.
    pub since: String,
    /// The `pg_snapshot` at which it ends: where the slot begins.
    pub until: String,
    /// Rows of the gap up to this `seq` are delivered.
    pub seq: i64,
}

/// What the database has stored under the relay's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored {
    /// Nothing: there never was a slot, or it was given up.
    Missing,
    /// A set-up began and has not finished. Its slot, if it got that far, was
    /// never read.
    Unfinished,
    /// A recovery began and has not finished: `lsn` is zero. Its slot, if it got
    /// that far, was never read.
    Recovering(Checkpoint),
    /// The relay has a slot and a position.
    At(Checkpoint),
}

pub(super) const COLUMNS: &str = "mode, lsn, snapshot::text, system_identifier, timeline, publication, publication_identity, \
                       second_snapshot::text, seq, epoch";

/// Reads the checkpoint of the contract's slot.
pub async fn stored(client: &Client, contract: &Contract) -> Result<Stored> {
    let sql = contract.sql(&format!(
        "SELECT {COLUMNS} FROM :\"schema\".checkpoint WHERE name = $1"
    ));
    let rows = match client
        .query_typed(&sql, &[(&contract.slot, Type::TEXT)])
        .await
    {
        Ok(rows) => rows,
        Err(error) if is_missing(&error) => return Ok(Stored::Missing),
        Err(error) => return Err(sort(doing("read", contract), error)),
    };
    match rows.first() {
        None => Ok(Stored::Missing),
        Some(row) => read(row, contract),
    }
}

pub(super) fn read(row: &Row, contract: &Contract) -> Result<Stored> {
    let mode = match row.get(0) {
        "wal" => Mode::Wal,
        "poll" => Mode::Poll,
        other => {
            let message = format!("{}: unknown mode {other}", doing("read", contract));
            return Err(Error::new(ErrorKind::Database, message));
        }
    };
    let (Some(snapshot), Some(identifier)) = (row.get::<_, Option<String>>(2), row.get(3)) else {
        return Ok(Stored::Unfinished);
    };
    let lsn: Option<PgLsn> = row.get(1);
    let checkpoint = Checkpoint {
        mode,
        lsn: lsn.unwrap_or_else(|| PgLsn::from(0)),
        gap: row.get::<_, Option<String>>(7).map(|until| Gap {
            since: snapshot.clone(),
            until,
            seq: row.get::<_, Option<i64>>(8).unwrap_or_default(),
        }),
        snapshot,
        system: System {
            identifier,
            timeline: row.get::<_, Option<i32>>(4).unwrap_or_default(),
        },
        publication: row.get::<_, Option<String>>(5).unwrap_or_default(),
        publication_identity: row.get::<_, Option<String>>(6).unwrap_or_default(),
        epoch: row.get(9),
    };
    Ok(match (mode, lsn) {
        (Mode::Wal, None) => Stored::Recovering(checkpoint),
        _ => Stored::At(checkpoint),
    })
}

/// Makes the checkpoint this relay's, once it holds the slot: from here on, no relay
/// before it, however late it wakes, can write it, nor this one after a recovery.
/// Takes it as it was `checked` and returns it as it is now. Stores the server's
/// timeline and the position, before which everything is delivered: the slot may know
/// that, and forget it in a crash.
///
/// # Errors
/// `SlotInUse` if another relay has claimed it since it was checked: that one has got
/// the slot from a server that gave us up. `Slot` if a recovery has begun meanwhile, or
/// the checkpoint was deleted.
pub async fn claim(
    client: &Client,
    contract: &Contract,
    checked: &Checkpoint,
) -> Result<Checkpoint> {
    let timeline = super::system(client).await?.timeline;
    let sql = contract.sql(&format!(
        "UPDATE :\"schema\".checkpoint \
         SET epoch = epoch + 1, timeline = $2, lsn = greatest(lsn, $3), updated_at = now() \
         WHERE name = $1 AND epoch = $4 AND lsn IS NOT NULL RETURNING {COLUMNS}"
    ));
    let parameters = [
        (&contract.slot as _, Type::TEXT),
        (&timeline as _, Type::INT4),
        (&checked.lsn as _, Type::PG_LSN),
        (&checked.epoch as _, Type::INT8),
    ];
    let claimed = async {
        client.batch_execute("BEGIN").await?;
        failpoint!("claiming");
        let rows = client.query_typed(&sql, &parameters).await?;
        failpoint!("claim_written");
        client.batch_execute("COMMIT").await?;
        failpoint!("claimed");
        Ok(rows)
    };
    let rows = claimed
        .await
        .map_err(|error| sort(doing("claim", contract), error))?;
    match rows.first().map(|row| read(row, contract)).transpose()? {
        Some(Stored::At(checkpoint)) => Ok(checkpoint),
        _ => match stored(client, contract).await? {
            Stored::Missing => Err(super::not_set_up(contract, Some(Mode::Wal))),
            Stored::At(_) => Err(taken_over(contract)),
            _ => Err(super::recovery_is_unfinished(contract)),
        },
    }
}

pub(super) fn taken_over(contract: &Contract) -> Error {
    let message = format!(
        "checkpoint \"{}\" was taken over by another relay, or by a recovery",
        contract.slot
    );
    Error::new(ErrorKind::SlotInUse, message)
}

impl Checkpoint {
    /// Stores that everything before `lsn` is delivered.
    pub async fn store_position(
        &self,
        client: &Client,
        contract: &Contract,
        lsn: PgLsn,
    ) -> Result<()> {
        let set = "lsn = greatest(lsn, $3)";
        let position = (&lsn as _, Type::PG_LSN);
        failpoint!("storing_position");
        self.store(client, contract, set, &[position]).await?;
        failpoint!("position_stored");
        Ok(())
    }

    /// Stores that the gap's rows up to its `seq` are delivered.
    pub async fn store_seq(&self, client: &Client, contract: &Contract, gap: &Gap) -> Result<()> {
        failpoint!("storing_seq");
        let set = "snapshot = $3::pg_snapshot, second_snapshot = $4::pg_snapshot, seq = $5";
        let values = [
            (&gap.since as _, Type::TEXT),
            (&gap.until as _, Type::TEXT),
            (&gap.seq as _, Type::INT8),
        ];
        self.store(client, contract, set, &values).await?;
        failpoint!("seq_stored");
        Ok(())
    }

    /// Stores that everything before `lsn`, and every row that `snapshot` sees, is
    /// delivered, which ends a gap. Recovery starts from there if the slot is lost.
    pub async fn store_fence(
        &self,
        client: &Client,
        contract: &Contract,
        lsn: PgLsn,
        snapshot: &str,
    ) -> Result<()> {
        let set = "lsn = greatest(lsn, nullif($3, '0/0')), snapshot = $4::pg_snapshot, \
                   second_snapshot = NULL, seq = NULL";
        let values = [(&lsn as _, Type::PG_LSN), (&snapshot as _, Type::TEXT)];
        self.store(client, contract, set, &values).await?;
        failpoint!("fenced");
        Ok(())
    }

    pub(super) async fn store(
        &self,
        client: &Client,
        contract: &Contract,
        set: &str,
        values: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<()> {
        let (lease, is_whole) = match self.mode {
            Mode::Wal => ("", "lsn IS NOT NULL"),
            Mode::Poll => (lease::RENEWED, "true"),
        };
        let sql = contract.sql(&format!(
            "UPDATE :\"schema\".checkpoint SET {set}{lease}, updated_at = now() \
             WHERE name = $1 AND epoch = $2 AND {is_whole} RETURNING name"
        ));
        let mut parameters: Vec<(&(dyn ToSql + Sync), Type)> =
            vec![(&contract.slot, Type::TEXT), (&self.epoch, Type::INT8)];
        parameters.extend_from_slice(values);
        let written = match self.mode {
            Mode::Wal => client.query_typed(&sql, &parameters).await,
            Mode::Poll => query_after(lease::BEGIN, client, &sql, &parameters).await,
        };
        let rows = written.map_err(|error| sort(doing("write", contract), error))?;
        match rows.is_empty() {
            true => Err(taken_over(contract)),
            false => Ok(()),
        }
    }

    /// What holds in SQL, of the relay $1, until another takes it over.
    pub(crate) fn fence(&self) -> String {
        format!(
            "EXISTS (SELECT FROM :\"schema\".checkpoint WHERE name = $1 AND epoch = {})",
            self.epoch
        )
    }

    /// Whether the slot of a relay that polls by now may still be there: as long as the
    /// checkpoint names a publication.
    pub(crate) fn has_left_slot(&self) -> bool {
        self.mode == Mode::Poll && !self.publication.is_empty()
    }

    /// Refuses to read in another way than the checkpoint was made for.
    pub(crate) fn check_mode(&self, contract: &Contract, wanted: Mode) -> Result<()> {
        if self.mode == wanted {
            return Ok(());
        }
        let (mode, wanted) = (self.mode.name(), wanted.name());
        let message = format!(
            "relay \"{}\" was set up with mode {mode}: start it with `--mode {mode}`, or change it by \
             `postbox setup --mode {wanted}`",
            contract.slot
        );
        Err(Error::new(ErrorKind::Slot, message))
    }
}

/// Refuses a publication that is not the one the slot was set up with, or is not
/// right.
pub(crate) async fn compare_publication(
    client: &Client,
    contract: &Contract,
    checkpoint: &Checkpoint,
) -> Result<()> {
    checkpoint.check_publication_name(contract)?;
    let present = publication_identity(client, contract).await?;
    let stored = &checkpoint.publication_identity;
    if present.as_ref() != Some(stored) {
        return Err(publication::changed(client, contract, stored, present.as_deref()).await?);
    }
    let checked = check_publication(client, contract).await;
    checked.map_err(|error| match error.kind() {
        ErrorKind::Publication => is_of_another_table(contract),
        _ => error,
    })
}

/// Refuses a slot that was set up for another table than the contract's, which no relay of
/// this table may take for its own.
pub(crate) async fn check_table(
    client: &Client,
    contract: &Contract,
    checkpoint: &Checkpoint,
) -> Result<()> {
    if publication::held_outbox(client, contract, &checkpoint.publication_identity).await? {
        return Ok(());
    }
    // A table that was made again has another identity, too: that says how to go on.
    compare_publication(client, contract, checkpoint).await?;
    Err(is_of_another_table(contract))
}

/// It was right when the slot was set up, and is the same. (What would make it right for
/// this table would break the relay of the other.)
fn is_of_another_table(contract: &Contract) -> Error {
    let message = format!(
        "replication slot \"{}\" was not set up for {}: say --table-preset and --table as they were said then, or \
         name another --slot and --publication",
        contract.slot,
        contract.outbox.quoted()
    );
    Error::new(ErrorKind::Publication, message)
}

impl Checkpoint {
    /// Refuses to read the slot through another publication.
    pub(crate) fn check_publication_name(&self, contract: &Contract) -> Result<()> {
        if self.publication == contract.publication {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Publication,
            format!(
                "replication slot \"{}\" was set up with publication \"{}\", not with \"{}\"",
                contract.slot, self.publication, contract.publication
            ),
        ))
    }

    /// Refuses another cluster; warns of another timeline.
    pub(crate) fn check_system(&self, contract: &Contract, system: &System) -> Result<()> {
        if self.system.identifier != system.identifier {
            // Of what is given up, set-up no longer knows the mode.
            let mode = match self.mode {
                Mode::Wal => "",
                Mode::Poll => " --mode poll",
            };
            return Err(Error::new(
                ErrorKind::Database,
                format!(
                    "checkpoint \"{}\" belongs to the cluster with system identifier {}, and this one has {}: \
                     its positions mean nothing here; connect to that cluster, or {}{}",
                    contract.slot,
                    self.system.identifier,
                    system.identifier,
                    match contract.outbox.is_ours() {
                        true => format!(
                            "run `postbox setup{mode} --adopt`, after which the relay publishes what was not, or "
                        ),
                        false => String::new(),
                    },
                    give_up(contract, mode)
                ),
            ));
        }
        if self.system.timeline != system.timeline {
            warn!(
                slot = contract.slot,
                stored = self.system.timeline,
                found = system.timeline,
                "the server is on another timeline than at the last start"
            );
        }
        Ok(())
    }

    /// The slot that this checkpoint names does not exist.
    pub(crate) fn slot_is_gone(&self, contract: &Contract) -> Error {
        Error::new(
            ErrorKind::Slot,
            format!(
                "replication slot \"{}\" is gone: {AFTER_LOSS}",
                contract.slot
            ),
        )
    }
}

/// How to begin anew, without what was not published.
fn give_up(contract: &Contract, mode: &str) -> String {
    format!(
        "to give up what was not published, DELETE FROM {} WHERE name = {}; then run `postbox setup{mode} --backfill none`",
        contract.table("checkpoint"),
        postgres_protocol::escape::escape_literal(&contract.slot)
    )
}

fn is_missing(error: &tokio_postgres::Error) -> bool {
    let missing = [SqlState::UNDEFINED_TABLE, SqlState::INVALID_SCHEMA_NAME];
    error.code().is_some_and(|code| missing.contains(code))
}

pub(super) fn doing(verb: &str, contract: &Contract) -> String {
    format!("{verb} checkpoint \"{}\"", contract.slot)
}
