//! A relay that is divided into slices, made one again.
//!
//! What else set-up does to a relay, it does from the one place in its checkpoint. So where
//! all slices stand at one place, and no relay serves any, that becomes the checkpoint's,
//! and the slices go. One relay that serves all of them brings them there.

use tokio_postgres::Client;

use super::{Report, State};
use crate::catalog;
use crate::contract::Contract;
use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};

/// Merges the slices, if there are any.
pub(super) async fn merge(
    client: &mut Client,
    contract: &Contract,
    report: &mut Report,
) -> Result<()> {
    let doing = || format!("merge the slices of relay \"{}\"", contract.slot);
    let transaction = client.transaction().await;
    let transaction = transaction.map_err(|error| sort(doing(), error))?;
    // Whoever claims slices waits for it, and finds another epoch.
    let lock = contract.sql(
        "UPDATE :\"schema\".checkpoint SET epoch = epoch + 1 \
         WHERE name = :'slot' AND EXISTS (SELECT FROM :\"schema\".slice WHERE name = :'slot')",
    );
    let locked = transaction.execute(&lock, &[]).await;
    if locked.map_err(|error| sort(doing(), error))? == 0 {
        return Ok(());
    }
    check_unserved(transaction.client(), contract).await?;
    let sql = contract.sql(
        "WITH place AS ( \
             SELECT min(snapshot::text) AS snapshot FROM :\"schema\".slice WHERE name = :'slot' \
             HAVING count(DISTINCT snapshot::text) = 1 AND count(second_snapshot) = 0), \
         merged AS ( \
             UPDATE :\"schema\".checkpoint AS c \
             SET snapshot = place.snapshot::pg_snapshot, second_snapshot = NULL, seq = NULL, updated_at = now() \
             FROM place WHERE c.name = :'slot' RETURNING c.name) \
         DELETE FROM :\"schema\".slice AS s USING merged WHERE s.name = merged.name",
    );
    let merged = transaction.execute(&sql, &[]).await;
    if merged.map_err(|error| sort(doing(), error))? == 0 {
        return Err(apart(contract));
    }
    failpoint!("merging");
    let committed = transaction.commit().await;
    committed.map_err(|error| sort(doing(), error))?;
    let object = format!("slices of relay \"{}\"", contract.slot);
    report.add_with_note(
        object,
        State::Dropped,
        Some("all stood at one place".to_owned()),
    );
    Ok(())
}

/// Refuses while a relay serves any.
async fn check_unserved(client: &Client, contract: &Contract) -> Result<()> {
    let look = catalog::look(client, contract).await?;
    let served = look.slices.iter().find_map(|slice| {
        let owner = slice.served_by()?;
        Some((owner, slice.remaining?))
    });
    let Some((owner, seconds)) = served else {
        return Ok(());
    };
    let message = format!(
        "relay \"{}\" is at work: {owner} has its lease for {seconds:.1} s more",
        contract.slot
    );
    Err(Error::new(ErrorKind::SlotInUse, message))
}

fn apart(contract: &Contract) -> Error {
    let message = format!(
        "relay \"{}\" is divided, and its slices stand at several places: stop all its relays, start one with \
         `--mode poll --shards 1`, let it catch up, stop it, and run the command again",
        contract.slot
    );
    Error::new(ErrorKind::Slot, message)
}
