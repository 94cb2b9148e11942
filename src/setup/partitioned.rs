//! A partitioned outbox, where one is asked for, and partitions for the time that comes.

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::{LOCK_INTERVAL, PATIENCE_TIME, Report, State, Width};
use crate::contract::Contract;
use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};
use crate::partitions;

pub(super) const PARTITIONED: &str = include_str!("../../sql/partitioned.sql");
pub(super) const WIDTH: &str = include_str!("../../sql/partition_width.sql");
pub(super) const MAKE: &str = include_str!("../../sql/make_partitions.sql");
pub(super) const GRANT: &str = include_str!("../../sql/grant_partitions.sql");

/// Makes the outbox partitioned, if it is to be and is not, or changes the width of partitions to come.
/// Of one that is, it makes the partitions that are to be there by now.
pub(super) async fn apply(
    client: &mut Client,
    contract: &Contract,
    wanted: Option<Width>,
    report: &mut Report,
) -> Result<()> {
    if partitions::are_ours(client, contract).await? {
        return keep(client, contract, wanted, report).await;
    }
    let Some(width) = wanted else {
        return Ok(());
    };
    refuse_what_is_in_use(client, contract).await?;
    let doing = || format!("partition {}", contract.table("outbox"));
    let made = async {
        let transaction = client.transaction().await?;
        transaction
            .batch_execute(&contract.sql(PARTITIONED))
            .await?;
        transaction
            .batch_execute(&sql(contract, WIDTH, width))
            .await?;
        transaction.batch_execute(&contract.sql(MAKE)).await?;
        transaction.commit().await
    };
    made.await.map_err(|error| sort(doing(), error))?;
    report.add(object(contract, width.name()), State::Created);
    Ok(())
}

/// What is there stays, but for its width.
async fn keep(
    client: &Client,
    contract: &Contract,
    wanted: Option<Width>,
    report: &mut Report,
) -> Result<()> {
    let mut is_changed = false;
    if let Some(width) = wanted {
        let doing = || format!("change the width of {}", partitions::object(contract));
        let changed = client.execute(&sql(contract, WIDTH, width), &[]).await;
        is_changed = changed.map_err(|error| sort(doing(), error))? > 0;
    }
    make(client, contract).await?;
    let (state, note) = match is_changed {
        true => (
            State::Upgraded,
            Some("those that were there stay as they are"),
        ),
        false => (State::AlreadyThere, None),
    };
    let object = object(contract, &width(client, contract).await?);
    report.add_with_note(object, state, note.map(str::to_owned));
    Ok(())
}

/// Unless this role may not: relays do so, too. Somebody who reads all the outbox holds it up.
async fn make(client: &Client, contract: &Contract) -> Result<()> {
    let function = format!("{}()", contract.table("make_partitions"));
    let sql = "SELECT has_function_privilege(to_regprocedure($1), 'EXECUTE')";
    let may = client
        .query_typed_one(sql, &[(&function, Type::TEXT)])
        .await;
    let may = may.map_err(|error| sort("read rights of this role", error))?;
    if !may.get::<_, bool>(0) {
        return Ok(());
    }
    let deadline = std::time::Instant::now() + PATIENCE_TIME;
    loop {
        match partitions::make(client, contract).await {
            Err(error) if error.kind().is_transient() && !client.is_closed() => {
                if std::time::Instant::now() > deadline {
                    return Err(Error::new(ErrorKind::Database, error.chain()));
                }
                tokio::time::sleep(LOCK_INTERVAL).await;
            }
            made => return made.map(drop),
        }
    }
}

/// A table that a relay reads, or that has rows, cannot become another one.
async fn refuse_what_is_in_use(client: &Client, contract: &Contract) -> Result<()> {
    let outbox = contract.table("outbox");
    let sql = contract.sql(
        "SELECT (SELECT relkind = 'p' FROM pg_class WHERE oid = to_regclass($1)), \
                EXISTS (SELECT FROM :\"schema\".checkpoint), EXISTS (SELECT FROM :\"schema\".outbox)",
    );
    let found = client.query_typed_one(&sql, &[(&outbox, Type::TEXT)]).await;
    let found = found.map_err(|error| sort(format!("look at {outbox}"), error))?;
    let why = match (found.get(0), found.get(1), found.get(2)) {
        (true, ..) => {
            "was partitioned by somebody else, who has to make its partitions: leave --partitioned out"
        }
        (_, false, false) => return Ok(()),
        (_, true, _) => IN_USE,
        (_, _, true) => HAS_ROWS,
    };
    Err(Error::new(ErrorKind::Database, format!("{outbox} {why}")))
}

fn sql(contract: &Contract, text: &str, width: Width) -> String {
    contract.sql_with(text, &[("partitioned", width.name())])
}

const IN_USE: &str = "is not partitioned, and a relay was set up for it: set a partitioned one up in another --schema, with \
     another --slot and --publication, have applications write there, and let this relay end its work";
const HAS_ROWS: &str =
    "is not partitioned, and has rows: set a partitioned one up in another --schema";

/// As `--partitioned` says it, of the partitions to come.
async fn width(client: &Client, contract: &Contract) -> Result<String> {
    let sql = contract.sql(
        "SELECT CASE width WHEN '1 day' THEN 'day' WHEN '1 hour' THEN 'hour' ELSE width::text END \
         FROM :\"schema\".partitioning",
    );
    let row = client.query_one(&sql, &[]).await;
    Ok(row
        .map_err(|error| sort("read the width of partitions", error))?
        .get(0))
}

fn object(contract: &Contract, width: &str) -> String {
    format!("{}, one for each {width}", partitions::object(contract))
}
