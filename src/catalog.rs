//! What Postgres knows of us: server, slot, publication and checkpoint.
//!
//! [`check`] is called before every start of the relay, because each of these
//! can be changed behind its back, and most changes lose rows without an error:
//!
//! - A slot that is gone is never made again in silence: the new one would begin
//!   at its own creation. (One that someone drops and makes again by hand under
//!   the same name cannot be told from the first.)
//! - A publication that was dropped and made again, or that the table was taken
//!   out of for a while, hides what was committed meanwhile; Postgres 18 says
//!   nothing even while it is missing. So its identity is compared, not its name.
//! - Another cluster (a restored dump, a copy) has other LSNs and transaction ids.
//! - A promoted standby keeps the cluster's identifier and changes the timeline:
//!   that is an ordinary fail-over, and only worth a warning.

mod checkpoint;
mod division;
mod held;
mod identity;
mod lease;
mod polling;
mod publication;
mod slices;
mod slot;
mod snapshot;

use pgwire_replication::IdentifySystem;
use tokio_postgres::Client;
use tokio_postgres::types::Type;
use tracing::warn;

use crate::contract::Contract;
use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};

pub use checkpoint::{Checkpoint, Gap, Mode, Stored, claim, stored};
pub use division::{Look, Slice, check_undivided, claim_slices, divide, leave, look, want_slices};
pub use held::Held;
pub use lease::{LEASE, claim_lease};
pub use polling::{check_polling, is_delivered};
pub use publication::{check_publication, publication_identity};
pub use slices::{SLICES, Slices, Standing};
pub use slot::{SlotState, find_slot, slot_state};

pub(crate) use checkpoint::{check_table, compare_publication};
pub(crate) use division::{FREE_MAX, where_slices_stand};
pub(crate) use lease::check_free as check_lease_is_free;
pub(crate) use polling::{check_order, has_xid_index, rows_to_come};
pub(crate) use publication::{PUBLICATION, exists as publication_exists};
pub(crate) use slices::{KEY_COLUMNS, slice_of};
pub(crate) use slot::{MAY_REPLICATE, what_prevents_a_slot};
pub(crate) use snapshot::{wait_until_ended, wait_until_seen, wait_until_visible};

/// The oldest Postgres whose pgoutput sends logical messages.
const VERSION_MIN: i32 = 140_000;

/// The version of our schema that this program was written for.
pub const SCHEMA_VERSION: i32 = 3;

/// Which cluster this is, and which branch of its history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct System {
    /// Made by initdb; kept by standbys and file-level copies.
    pub identifier: String,
    /// Rises with each promotion.
    pub timeline: i32,
}

impl From<IdentifySystem> for System {
    fn from(found: IdentifySystem) -> Self {
        Self {
            identifier: found.system_id,
            timeline: found.timeline.cast_signed(),
        }
    }
}

impl System {
    /// Refuses to do this on another server than this one, which was checked: in a
    /// fail-over, one address may lead to the old one and then to the new one.
    pub(crate) fn check_same(&self, found: &Self, doing: &str) -> Result<()> {
        if self == found {
            return Ok(());
        }
        let message = format!(
            "{doing}: the address leads to two servers, one with system identifier {} on timeline {}, one with {} on {}",
            self.identifier, self.timeline, found.identifier, found.timeline
        );
        Err(Error::new(ErrorKind::DatabaseAway, message))
    }
}

/// Checks everything a relay in WAL mode stands on, and returns where it is: on the
/// server's present timeline, and not before the slot's own position. Of a slot that is
/// told to begin before it, servers older than August 2025 forget the later one.
///
/// Another timeline is a warning; [`claim`] stores it once the stream runs. So is a role
/// that may not see its walsender.
///
/// # Errors
///
/// `DatabaseAway`: the server is a standby. `SlotInUse`: another session reads
/// the slot. `Database`, `Slot`, `Publication`: definite, and the message says
/// what mends it.
pub async fn check(client: &Client, contract: &Contract) -> Result<Checkpoint> {
    contract.validate()?;
    check_server(client).await?;
    check_schema_version(client, contract, Mode::Wal).await?;
    let checkpoint = whole(client, contract, Mode::Wal).await?;
    check_wal_level(client).await?;
    let system = system(client).await?;
    checkpoint.check_system(contract, &system)?;
    let slot = find_slot(client, &contract.slot).await?;
    let slot = slot.ok_or_else(|| checkpoint.slot_is_gone(contract))?;
    slot.check(&contract.slot)?;
    slot.check_unused(&contract.slot)?;
    compare_publication(client, contract, &checkpoint).await?;
    warn_of_hidden_walsender(client).await?;
    let confirmed = slot.confirmed_flush_lsn.unwrap_or(checkpoint.lsn);
    Ok(Checkpoint {
        system,
        lsn: checkpoint.lsn.max(confirmed),
        ..checkpoint
    })
}

/// The checkpoint of a relay that was set up to read so.
async fn whole(client: &Client, contract: &Contract, mode: Mode) -> Result<Checkpoint> {
    let checkpoint = match stored(client, contract).await? {
        Stored::At(checkpoint) => checkpoint,
        Stored::Recovering(_) => return Err(recovery_is_unfinished(contract)),
        Stored::Unfinished | Stored::Missing => return Err(not_set_up(contract, Some(mode))),
    };
    if (checkpoint.mode, mode) == (Mode::Wal, Mode::Poll) {
        // It cannot be changed by a set-up for this table.
        check_table(client, contract, &checkpoint).await?;
    }
    checkpoint.check_mode(contract, mode)?;
    Ok(checkpoint)
}

/// A session that has taken another role on is not shown what processes of its own login
/// wait for: see [`SlotState::is_ending`].
async fn warn_of_hidden_walsender(client: &Client) -> Result<()> {
    let sql = "SELECT current_user::text, \
                      pg_has_role(session_user, 'USAGE') OR pg_has_role('pg_read_all_stats', 'USAGE')";
    let row = client.query_typed_one(sql, &[]).await;
    let row = row.map_err(|error| sort("read what the role may see", error))?;
    let (role, is_shown): (&str, bool) = (row.get(0), row.get(1));
    if !is_shown {
        warn!(
            "role \"{role}\" is not shown its walsender: while Kafka is away, a checkpoint that gives up a slot \
             beyond max_slot_wal_keep_size waits: GRANT pg_read_all_stats TO \"{role}\""
        );
    }
    Ok(())
}

/// Checks that the server is a primary of a version that we know.
pub async fn check_server(client: &Client) -> Result<()> {
    let sql = "SELECT current_setting('server_version_num')::integer, current_setting('server_version'), \
               pg_is_in_recovery()";
    let row = client
        .query_typed_one(sql, &[])
        .await
        .map_err(|error| sort("read the server's settings", error))?;
    let (version, version_text): (i32, String) = (row.get(0), row.get(1));
    if version < VERSION_MIN {
        return Err(Error::new(
            ErrorKind::Database,
            format!("Postgres {version_text} is too old: postbox needs 14 or later"),
        ));
    }
    if row.get(2) {
        // Transient: this is what a fail-over looks like from here.
        return Err(Error::new(
            ErrorKind::DatabaseAway,
            "the server is a standby; waiting for a primary",
        ));
    }
    Ok(())
}

/// Checks that the server writes what logical decoding needs.
pub async fn check_wal_level(client: &Client) -> Result<()> {
    let sql = "SELECT current_setting('wal_level')";
    let row = client.query_typed_one(sql, &[]).await;
    let row = row.map_err(|error| sort("read wal_level", error))?;
    let wal_level: String = row.get(0);
    if wal_level != "logical" {
        return Err(Error::new(
            ErrorKind::Database,
            format!(
                "wal_level is \"{wal_level}\" and must be \"logical\": \
                 ALTER SYSTEM SET wal_level = logical; then restart Postgres"
            ),
        ));
    }
    Ok(())
}

/// The timeline, in SQL. Not from pg_control_checkpoint(): after a promotion that names the
/// old one until the next checkpoint. A WAL file's name begins with the present one.
pub(crate) const TIMELINE: &str =
    "('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer";

/// Which cluster the session is on.
///
/// Every role may call these functions, unless someone took the right away.
pub async fn system(client: &Client) -> Result<System> {
    let sql = format!("SELECT system_identifier::text, {TIMELINE} FROM pg_control_system()");
    let row = client
        .query_typed_one(&sql, &[])
        .await
        .map_err(|error| sort("read the system identifier", error))?;
    Ok(System {
        identifier: row.get(0),
        timeline: row.get(1),
    })
}

/// The version of our schema in the database; `None` where there is none.
pub(crate) async fn schema_version(client: &Client, contract: &Contract) -> Result<Option<i32>> {
    let found = find_schema_version(client, contract).await;
    found.map_err(|error| {
        let table = contract.table("migration");
        sort(format!("read schema version from {table}"), error)
    })
}

/// The same, for those who say other things of an error.
pub(crate) async fn find_schema_version(
    client: &Client,
    contract: &Contract,
) -> Result<Option<i32>, tokio_postgres::Error> {
    let table = contract.table("migration");
    let sql = "SELECT to_regclass($1::text) IS NOT NULL";
    let found = client.query_typed_one(sql, &[(&table, Type::TEXT)]).await?;
    if !found.get::<_, bool>(0) {
        return Ok(None);
    }
    let sql = format!("SELECT max(version) FROM {table}");
    Ok(client.query_typed_one(&sql, &[]).await?.get(0))
}

/// A relay needs what its version of the schema has. A later version may have
/// more: set-up comes before the relays when both are upgraded.
pub(crate) async fn check_schema_version(
    client: &Client,
    contract: &Contract,
    mode: Mode,
) -> Result<()> {
    let Some(version) = schema_version(client, contract).await? else {
        return Err(not_set_up(contract, Some(mode)));
    };
    check_version(contract, version)
}

/// Whether this program knows what is in a schema of this version.
pub(crate) fn check_version(contract: &Contract, version: i32) -> Result<()> {
    let schema = &contract.schema;
    if version < SCHEMA_VERSION {
        return Err(Error::new(
            ErrorKind::Database,
            format!(
                "schema \"{schema}\" has version {version}, this program needs {SCHEMA_VERSION}: \
                 run `postbox setup`"
            ),
        ));
    }
    if version > SCHEMA_VERSION {
        warn!(
            schema,
            version, "schema is newer than this program, which knows version {SCHEMA_VERSION}"
        );
    }
    Ok(())
}

/// A recovery was interrupted, and its slot lacks what it was made for.
pub(crate) fn recovery_is_unfinished(contract: &Contract) -> Error {
    let message = format!(
        "the recovery of replication slot \"{}\" has not finished: run `postbox recover` again",
        contract.slot
    );
    Error::new(ErrorKind::Slot, message)
}

/// There is nothing for a relay that is to read so; none: as it was set up.
pub(crate) fn not_set_up(contract: &Contract, mode: Option<Mode>) -> Error {
    let (object, command) = match mode {
        Some(Mode::Wal) => ("replication slot", "postbox setup"),
        Some(Mode::Poll) => ("relay", "postbox setup --mode poll"),
        None => ("relay", "postbox setup --mode auto"),
    };
    let claims = match contract.outbox.preset.tracking() {
        Some(_) => ", or read the table by claims, with --mode poll",
        None => "",
    };
    Error::new(
        ErrorKind::Slot,
        format!(
            "{object} \"{}\" has not been set up in schema \"{}\": run `{command}`{claims}",
            contract.slot, contract.schema
        ),
    )
}
