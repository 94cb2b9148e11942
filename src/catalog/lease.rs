//! Which relay polls: a lease in the checkpoint.
//!
//! The server lets one session at a time read a slot; a table anybody may read. So the
//! relay that polls holds a lease, by the server's clock, and each of its writes renews
//! it. It is not a lock of a session, which a pooler lends to others between two
//! transactions. A relay that comes too late finds another's epoch in the checkpoint and
//! can no longer write it. What such a relay may still send is what the next one sends,
//! too, in the same order: the lease bounds repetitions, the order holds without it.

use std::time::Duration;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::checkpoint::{COLUMNS, doing, read, taken_over};
use super::{Checkpoint, Mode, Stored, not_set_up, stored, system};
use crate::contract::Contract;
use crate::database::{query_after, sort};
use crate::error::{Error, ErrorKind, Result};

/// How long a lease holds that is not renewed. A relay renews it three times as often.
pub const LEASE: Duration = Duration::from_secs(3);

/// Begins what its holder writes. A synchronous standby that is away must not end a
/// lease; what a fail-over loses of it is repeated. And a session that waits for a lock
/// does not notice that its client has given it up: it must not stay behind. Nor may one
/// whose client was cut off, or frozen, before its COMMIT: others wait for what it has locked.
pub(super) const BEGIN: &str = "BEGIN; SET LOCAL synchronous_commit = local; \
    SET LOCAL lock_timeout = '2s'; SET LOCAL idle_in_transaction_session_timeout = '2s'";

/// What each write of its holder sets.
pub(super) const RENEWED: &str = ", expires_at = clock_timestamp() + interval '3 s'";

/// Refuses while another holds the lease.
pub(crate) async fn check_free(client: &Client, contract: &Contract, owner: &str) -> Result<()> {
    let sql = contract.sql(
        "SELECT owner, extract(epoch FROM expires_at - clock_timestamp())::float8 \
         FROM :\"schema\".checkpoint \
         WHERE name = $1 AND owner <> $2 AND expires_at > clock_timestamp()",
    );
    let parameters = [(&contract.slot as _, Type::TEXT), (&owner as _, Type::TEXT)];
    let rows = client.query_typed(&sql, &parameters).await;
    let rows = rows.map_err(|error| sort(doing("read", contract), error))?;
    let Some(row) = rows.first() else {
        return Ok(());
    };
    let (owner, seconds): (&str, f64) = (row.get(0), row.get(1));
    let message = format!(
        "relay \"{}\" is at work: {owner} has its lease for {seconds:.1} s more",
        contract.slot
    );
    Err(Error::new(ErrorKind::SlotInUse, message))
}

/// Takes the lease, and with it the checkpoint: from here on, no relay before it can
/// write it. Takes it as it was `checked` and returns it as it is now.
///
/// # Errors
/// `SlotInUse` if another has been faster. `Slot` if the checkpoint was deleted.
pub async fn claim_lease(
    client: &Client,
    contract: &Contract,
    checked: &Checkpoint,
    owner: &str,
) -> Result<Checkpoint> {
    let timeline = system(client).await?.timeline;
    let sql = contract.sql(&format!(
        "UPDATE :\"schema\".checkpoint \
         SET epoch = epoch + 1, timeline = $2, owner = $3{RENEWED}, updated_at = now() \
         WHERE name = $1 AND epoch = $4 AND mode = 'poll' \
           AND (owner IS NULL OR owner = $3 OR expires_at <= clock_timestamp()) RETURNING {COLUMNS}"
    ));
    let parameters = [
        (&contract.slot as _, Type::TEXT),
        (&timeline as _, Type::INT4),
        (&owner as _, Type::TEXT),
        (&checked.epoch as _, Type::INT8),
    ];
    failpoint!("claiming");
    let rows = query_after(BEGIN, client, &sql, &parameters).await;
    failpoint!("claimed");
    let rows = rows.map_err(|error| sort(doing("claim", contract), error))?;
    match rows.first().map(|row| read(row, contract)).transpose()? {
        Some(Stored::At(checkpoint)) => Ok(checkpoint),
        _ => match stored(client, contract).await? {
            Stored::Missing => Err(not_set_up(contract, Some(Mode::Poll))),
            _ => Err(taken_over(contract)),
        },
    }
}

impl Checkpoint {
    /// Goes on holding the lease.
    ///
    /// # Errors
    /// `SlotInUse` if another relay has taken it.
    pub async fn renew(&self, client: &Client, contract: &Contract) -> Result<()> {
        debug_assert_eq!(self.mode, Mode::Poll);
        failpoint!("renewing");
        self.store(client, contract, "epoch = epoch", &[]).await
    }

    /// Lets another relay have the lease at once.
    pub async fn release(&self, client: &Client, contract: &Contract) -> Result<()> {
        let sql = contract.sql(
            "UPDATE :\"schema\".checkpoint SET owner = NULL, expires_at = NULL, updated_at = now() \
             WHERE name = $1 AND epoch = $2 AND mode = 'poll'",
        );
        let parameters = [
            (&contract.slot as _, Type::TEXT),
            (&self.epoch as _, Type::INT8),
        ];
        let released = query_after(BEGIN, client, &sql, &parameters).await;
        released.map_err(|error| sort(doing("release", contract), error))?;
        Ok(())
    }
}
