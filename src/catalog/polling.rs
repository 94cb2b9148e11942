//! What polling stands on.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::{Checkpoint, Mode, lease};
use crate::contract::Contract;
use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};

/// Checks everything a relay in poll mode stands on, and returns where it is: on the
/// server's present timeline. `owner` is who asks.
///
/// # Errors
///
/// `DatabaseAway`: the server is a standby. `SlotInUse`: another relay holds the lease.
/// `Database`, `Slot`: definite, and the message says what mends it.
pub async fn check_polling(
    client: &Client,
    contract: &Contract,
    owner: &str,
) -> Result<Checkpoint> {
    contract.validate()?;
    super::check_server(client).await?;
    super::check_schema_version(client, contract, Mode::Poll).await?;
    let checkpoint = super::whole(client, contract, Mode::Poll).await?;
    let system = super::system(client).await?;
    checkpoint.check_system(contract, &system)?;
    check_table(client, contract).await?;
    lease::check_free(client, contract, owner).await?;
    Ok(Checkpoint {
        system,
        ..checkpoint
    })
}

/// Whether the checkpoint says that the row with this `seq`, which was sent, is delivered,
/// and so all that were sent before it. If the relay is divided, whether each of its slices
/// is past it.
pub async fn is_delivered(client: &Client, contract: &Contract, seq: u64) -> Result<bool> {
    let sql = contract.sql(
        "WITH slice AS (SELECT snapshot, second_snapshot, seq FROM :\"schema\".slice WHERE name = $1), \
         place AS (TABLE slice UNION ALL SELECT snapshot, second_snapshot, seq FROM :\"schema\".checkpoint \
                   WHERE name = $1 AND NOT EXISTS (TABLE slice)) \
         SELECT NOT EXISTS ( \
             SELECT FROM :\"schema\".outbox AS o, place AS p \
             WHERE o.seq = $2 AND NOT pg_visible_in_snapshot(o.xid, p.snapshot) \
               AND (p.second_snapshot IS NULL OR p.seq < o.seq OR NOT pg_visible_in_snapshot(o.xid, p.second_snapshot)))",
    );
    let parameters = [
        (&contract.slot as _, Type::TEXT),
        (&seq.cast_signed() as _, Type::INT8),
    ];
    let row = client.query_typed_one(&sql, &parameters).await;
    let row = row.map_err(|error| sort(format!("read checkpoint \"{}\"", contract.slot), error))?;
    Ok(row.get(0))
}

/// Checks that the table has its order, and the index without which each look at it
/// would be at all of it.
async fn check_table(client: &Client, contract: &Contract) -> Result<()> {
    let outbox = contract.table("outbox");
    check_order(client, contract).await?;
    match has_xid_index(client, contract).await? {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Database,
            format!("{outbox} has no valid index on xid: run `postbox setup --mode poll`"),
        )),
    }
}

/// What is wrong with rows that were copied from another cluster, if there are any whose
/// numbers are still to come here: until then no snapshot sees them, and no relay sends them.
pub(crate) async fn rows_to_come(client: &Client, contract: &Contract) -> Result<Option<Error>> {
    let outbox = contract.table("outbox");
    let to_come = "xid >= pg_snapshot_xmax(pg_current_snapshot())";
    let sql = format!("SELECT EXISTS (SELECT FROM {outbox} WHERE {to_come})");
    let rows = client.query_typed(&sql, &[]).await;
    let rows = rows.map_err(|error| sort(format!("look at the rows of {outbox}"), error))?;
    let message = format!(
        "rows of {outbox} have a number in xid that no transaction of this cluster has had yet, as rows have that were \
         copied from another one, and would not be sent: UPDATE {outbox} SET xid = DEFAULT WHERE {to_come}"
    );
    let found = rows.first().is_some_and(|row| row.get(0));
    Ok(found.then(|| Error::new(ErrorKind::Database, message)))
}

/// Whether rows are found by their transaction.
pub(crate) async fn has_xid_index(client: &Client, contract: &Contract) -> Result<bool> {
    let outbox = contract.table("outbox");
    let sql = "SELECT EXISTS (SELECT FROM pg_index AS i \
                              JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] \
                              WHERE i.indrelid = $1::text::regclass AND a.attname = 'xid' \
                                AND i.indisvalid AND i.indpred IS NULL)";
    let rows = client.query_typed(sql, &[(&outbox, Type::TEXT)]).await;
    let rows = rows.map_err(|error| sort(format!("look at the indexes of {outbox}"), error))?;
    Ok(rows.first().is_some_and(|row| row.get(0)))
}

/// Refuses a `seq` whose numbers sessions take in blocks: it would not rise with the
/// commits of writers that wait for each other.
pub(crate) async fn check_order(client: &Client, contract: &Contract) -> Result<()> {
    let outbox = contract.table("outbox");
    let sql = "SELECT seqcache, seqincrement FROM pg_sequence \
               WHERE seqrelid = pg_get_serial_sequence($1, 'seq')::regclass";
    let rows = client.query_typed(sql, &[(&outbox, Type::TEXT)]).await;
    let rows = rows.map_err(|error| sort(format!("look at the sequence of {outbox}"), error))?;
    let found = rows
        .first()
        .map(|row| (row.get::<_, i64>(0), row.get::<_, i64>(1)));
    match found {
        Some((1, increment)) if increment > 0 => Ok(()),
        Some(_) => Err(Error::new(
            ErrorKind::Database,
            format!(
                "numbers of {outbox} do not rise with its rows: \
                 ALTER TABLE {outbox} ALTER COLUMN seq SET CACHE 1 SET INCREMENT BY 1"
            ),
        )),
        None => Err(Error::new(
            ErrorKind::Database,
            format!(
                "the column seq of {outbox} is not an identity column: polling has no order to go by"
            ),
        )),
    }
}
