//! The checkpoint: what the relay has stored about itself.

use postgres_protocol::escape::escape_literal;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{PgLsn, Type};
use tracing::warn;

use super::slot::AFTER_LOSS;
use super::{System, check_publication, publication, publication_identity};
use crate::contract::Contract;
use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};

/// Where a relay is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// `wal` or `poll`.
    pub mode: String,
    /// Everything that committed before it is delivered. The slot's own position
    /// may be further on.
    pub lsn: PgLsn,
    /// A `pg_snapshot`: every row it sees is delivered or given up.
    pub snapshot: String,
    /// The cluster that `lsn` and `snapshot` belong to.
    pub system: System,
    /// The publication the slot was set up with.
    pub publication: String,
    /// What that publication was then; `None`: take it as it is now, and what the
    /// one before hid is given up.
    pub publication_identity: Option<String>,
}

/// What the database has stored under the relay's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stored {
    /// Nothing: there never was a slot, or it was given up.
    Missing,
    /// A set-up began and has not finished. Its slot, if it got that far, was
    /// never read.
    Unfinished,
    /// The relay has a slot and a position.
    At(Checkpoint),
}

/// Reads the checkpoint of the contract's slot.
pub async fn stored(client: &Client, contract: &Contract) -> Result<Stored> {
    let sql = contract.sql(
        "SELECT mode, lsn, snapshot::text, system_identifier, timeline, publication, publication_identity \
         FROM :\"schema\".checkpoint WHERE name = $1",
    );
    let rows = match client
        .query_typed(&sql, &[(&contract.slot, Type::TEXT)])
        .await
    {
        Ok(rows) => rows,
        Err(error) if is_missing(&error) => return Ok(Stored::Missing),
        Err(error) => return Err(sort(doing("read", contract), error)),
    };
    let Some(row) = rows.first() else {
        return Ok(Stored::Missing);
    };
    let mode: String = row.get(0);
    if mode != "wal" {
        return Err(Error::new(
            ErrorKind::Slot,
            format!("relay \"{}\" was set up with mode {mode}", contract.slot),
        ));
    }
    let (Some(lsn), Some(snapshot)) = (row.get(1), row.get(2)) else {
        return Ok(Stored::Unfinished);
    };
    Ok(Stored::At(Checkpoint {
        mode,
        lsn,
        snapshot,
        system: System {
            identifier: row.get::<_, Option<String>>(3).unwrap_or_default(),
            timeline: row.get::<_, Option<i32>>(4).unwrap_or_default(),
        },
        publication: row.get::<_, Option<String>>(5).unwrap_or_default(),
        publication_identity: row.get(6),
    }))
}

/// Stores that everything before `lsn`, and every row that `snapshot` sees, is
/// delivered. Recovery starts from there if the slot is lost.
pub async fn store_heartbeat(
    client: &Client,
    contract: &Contract,
    lsn: PgLsn,
    snapshot: &str,
) -> Result<()> {
    let sql = contract.sql(
        "UPDATE :\"schema\".checkpoint SET lsn = $2, snapshot = $3::pg_snapshot, updated_at = now() \
         WHERE name = $1 AND lsn IS NOT NULL RETURNING name",
    );
    let parameters = [
        (&contract.slot as _, Type::TEXT),
        (&lsn as _, Type::PG_LSN),
        (&snapshot as _, Type::TEXT),
    ];
    update(client, contract, &sql, &parameters).await
}

/// Stores the server's timeline where it is not the checkpoint's, once the
/// stream runs on it.
pub async fn store_timeline(
    client: &Client,
    contract: &Contract,
    checkpoint: &Checkpoint,
) -> Result<()> {
    let timeline = super::system(client).await?.timeline;
    if timeline == checkpoint.system.timeline {
        return Ok(());
    }
    let sql = contract.sql(
        "UPDATE :\"schema\".checkpoint SET timeline = $2, updated_at = now() \
         WHERE name = $1 AND lsn IS NOT NULL RETURNING name",
    );
    let parameters = [
        (&contract.slot as _, Type::TEXT),
        (&timeline as _, Type::INT4),
    ];
    update(client, contract, &sql, &parameters).await
}

/// Refuses a publication that is not the one the slot was set up with, or is not
/// right. Stores the present one's identity where the checkpoint has none.
pub(crate) async fn reconcile_publication(
    client: &Client,
    contract: &Contract,
    checkpoint: Checkpoint,
) -> Result<Checkpoint> {
    checkpoint.check_publication_name(contract)?;
    let present = publication_identity(client, contract).await?;
    if let Some(stored) = &checkpoint.publication_identity
        && Some(stored) != present.as_ref()
    {
        return Err(publication::changed(client, contract, stored, present.as_deref()).await?);
    }
    check_publication(client, contract).await?;
    if checkpoint.publication_identity.is_none()
        && let Some(present) = &present
    {
        store_publication_identity(client, contract, present).await?;
    }
    Ok(Checkpoint {
        publication_identity: present,
        ..checkpoint
    })
}

async fn store_publication_identity(
    client: &Client,
    contract: &Contract,
    identity: &str,
) -> Result<()> {
    let sql = contract.sql(
        "UPDATE :\"schema\".checkpoint SET publication_identity = $2, updated_at = now() \
         WHERE name = $1 AND publication_identity IS NULL RETURNING name",
    );
    let parameters = [
        (&contract.slot as _, Type::TEXT),
        (&identity as _, Type::TEXT),
    ];
    update(client, contract, &sql, &parameters).await
}

async fn update(
    client: &Client,
    contract: &Contract,
    sql: &str,
    parameters: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)],
) -> Result<()> {
    let rows = client
        .query_typed(sql, parameters)
        .await
        .map_err(|error| sort(doing("write", contract), error))?;
    if rows.is_empty() {
        // Someone gave the slot up while we were reading it.
        return Err(Error::new(
            ErrorKind::Slot,
            format!("checkpoint \"{}\" is gone", contract.slot),
        ));
    }
    Ok(())
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
            return Err(Error::new(
                ErrorKind::Database,
                format!(
                    "checkpoint \"{}\" belongs to the cluster with system identifier {}, and this one has {}: \
                     its positions mean nothing here",
                    contract.slot, self.system.identifier, system.identifier
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
                "replication slot \"{}\" is gone: {AFTER_LOSS}; to give that up, \
                 DELETE FROM {} WHERE name = {}; then run `postbox setup --backfill none`",
                contract.slot,
                contract.table("checkpoint"),
                escape_literal(&contract.slot)
            ),
        )
    }
}

fn is_missing(error: &tokio_postgres::Error) -> bool {
    let missing = [SqlState::UNDEFINED_TABLE, SqlState::INVALID_SCHEMA_NAME];
    error.code().is_some_and(|code| missing.contains(code))
}

fn doing(verb: &str, contract: &Contract) -> String {
    format!("{verb} checkpoint \"{}\"", contract.slot)
}
