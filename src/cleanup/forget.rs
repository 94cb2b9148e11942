//! A relay that is gone for good.

use postgres_protocol::escape::escape_literal;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::batch::failed;
use crate::contract::Contract;
use crate::database::{Database, sort};
use crate::error::{Error, ErrorKind, Result};
use crate::setup;

/// It is the owner's to decide, and not granted to who cleans up.
const RIGHTS: &str = "forgetting a relay is for the owner of the schema";

/// What there is of it. The lock keeps relays from taking the checkpoint over meanwhile.
const LOOK: &str = "\
    SELECT (SELECT active_pid FROM pg_replication_slots \
            WHERE slot_name = c.name AND database = current_database()), \
           EXISTS (SELECT FROM pg_replication_slots WHERE slot_name = c.name AND database = current_database()), \
           greatest(c.expires_at, (SELECT max(expires_at) FROM :\"schema\".slice WHERE name = c.name)) \
               > clock_timestamp(), \
           (SELECT count(*) FROM :\"schema\".parked AS p \
            WHERE p.relay = c.name AND p.status <> 'skipped' \
              AND NOT EXISTS (SELECT FROM :\"schema\".cancellation AS n WHERE n.id = p.id)) \
    FROM :\"schema\".checkpoint AS c WHERE c.name = $1 FOR UPDATE OF c";

/// Removes what is stored of a relay that will not come back, and says in lines what it did. What it
/// has not published is then published, if others have done so. Events that it has parked must
/// have been sent, skipped or cancelled; those that are left go with it.
///
/// # Errors
/// `SlotInUse`: it is at work, or a set-up is. `Slot`: there is no such relay. `Event`: it has
/// parked events. `Rights`: this role may not.
pub async fn forget(database: &Database, contract: &Contract, relay: &str) -> Result<String> {
    let mut session = super::open(database, "postbox cleanup").await?;
    super::check_schema(&session.client, contract, RIGHTS).await?;
    let doing = || format!("forget relay \"{relay}\"");
    let transaction = session.client.transaction().await;
    let transaction = transaction.map_err(|error| sort(doing(), error))?;
    let has_slot = check(transaction.client(), contract, relay).await?;
    // Slices go with it.
    let sql = contract.sql(
        "WITH given_up AS (DELETE FROM :\"schema\".parked WHERE relay = $1 RETURNING 1), \
              forgotten AS (DELETE FROM :\"schema\".checkpoint WHERE name = $1) \
         SELECT count(*) FROM given_up",
    );
    let row = transaction
        .query_typed_one(&sql, &[(&relay, Type::TEXT)])
        .await;
    let row = row.map_err(|error| failed(&contract.table("checkpoint"), RIGHTS, error))?;
    let given_up: i64 = row.get(0);
    failpoint!("forgetting");
    let committed = transaction.commit().await;
    committed.map_err(|error| sort(doing(), error))?;
    let mut lines = format!("relay \"{relay}\": forgotten\n");
    if given_up > 0 {
        lines += &format!("{}: rows removed: {given_up}\n", contract.table("parked"));
    }
    if has_slot {
        let slot = escape_literal(relay);
        lines += &format!(
            "replication slot \"{relay}\": left, and keeps WAL until the disk is full: SELECT pg_drop_replication_slot({slot})\n"
        );
    }
    Ok(lines)
}

/// Refuses what would be missed. Whether there is a slot.
async fn check(client: &Client, contract: &Contract, relay: &str) -> Result<bool> {
    let settings = format!(
        "SET LOCAL lock_timeout = '1s'; SET LOCAL row_security = off; SELECT pg_advisory_xact_lock_shared({})",
        setup::LOCK
    );
    let set = client.batch_execute(&settings).await;
    set.map_err(|error| failed("the checkpoint", RIGHTS, error))?;
    let rows = client
        .query_typed(&contract.sql(LOOK), &[(&relay, Type::TEXT)])
        .await;
    let rows = rows.map_err(|error| failed(&contract.table("checkpoint"), RIGHTS, error))?;
    let refuse = |kind, why: String| Err(Error::new(kind, format!("relay \"{relay}\" {why}")));
    let Some(row) = rows.first() else {
        let table = contract.table("checkpoint");
        return refuse(
            ErrorKind::Slot,
            format!("is not known: {table} names those that are"),
        );
    };
    let reader: Option<i32> = row.get(0);
    if let Some(pid) = reader {
        let why = format!("is at work: process {pid} reads its slot; stop it first");
        return refuse(ErrorKind::SlotInUse, why);
    }
    if row.get::<_, Option<bool>>(2) == Some(true) {
        let why = "is at work: a process has its lease; stop it first, and wait 3 s";
        return refuse(ErrorKind::SlotInUse, why.to_owned());
    }
    let parked: i64 = row.get(3);
    if parked > 0 {
        let table = contract.table("parked");
        let why = format!(
            "has parked {parked} events that were not sent: start it until they are, or have them skipped or cancelled; to \
             give them up, DELETE FROM {table} WHERE relay = {}",
            escape_literal(relay)
        );
        return refuse(ErrorKind::Event, why);
    }
    Ok(row.get(1))
}
