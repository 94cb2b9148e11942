//! The tables, in the versions they have had.

use tokio_postgres::Client;

use super::grants::sort_create;
use super::{Report, State};
use crate::catalog::{SCHEMA_VERSION, schema_version};
use crate::contract::Contract;
use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};

/// Makes the schema, where it is missing.
pub(super) const SCHEMA: &str = include_str!("../../sql/schema.sql");

/// Each brings the schema from the version before to its own, which is its
/// place in this list, counted from one.
pub(super) const MIGRATIONS: &[&str] = &[
    include_str!("../../sql/0001_outbox.sql"),
    include_str!("../../sql/0002_parked.sql"),
    include_str!("../../sql/0003_inbox.sql"),
];

const _: () = assert!(MIGRATIONS.len() == SCHEMA_VERSION as usize);

/// The version that there is, zero where there is none. Refuses one that is newer than ours.
pub(super) async fn version(client: &Client, contract: &Contract) -> Result<i32> {
    let schema = &contract.schema;
    let found = schema_version(client, contract).await?.unwrap_or(0);
    if found > SCHEMA_VERSION {
        return Err(Error::new(
            ErrorKind::Database,
            format!(
                "schema \"{schema}\" has version {found}, newer than this program knows ({SCHEMA_VERSION}): \
                 use the `postbox` that set it up, or a later one"
            ),
        ));
    }
    Ok(found)
}

/// Applies what is missing, each migration in a transaction of its own.
pub(super) async fn apply(
    client: &mut Client,
    contract: &Contract,
    report: &mut Report,
) -> Result<()> {
    let schema = &contract.schema;
    let found = version(client, contract).await?;
    if found == 0 {
        create_schema(client, contract, report).await?;
    }
    for (version, migration) in (1..)
        .zip(MIGRATIONS)
        .filter(|(version, _)| *version > found)
    {
        let doing = || format!("apply version {version} of schema \"{schema}\"");
        let transaction = client
            .transaction()
            .await
            .map_err(|error| sort(doing(), error))?;
        transaction
            .batch_execute(&contract.sql(migration))
            .await
            .map_err(|error| sort(doing(), error))?;
        transaction
            .commit()
            .await
            .map_err(|error| sort(doing(), error))?;
    }
    let state = match found {
        0 => State::Created,
        SCHEMA_VERSION => State::AlreadyThere,
        _ => State::Upgraded,
    };
    report.add(
        format!("tables of schema \"{schema}\", version {SCHEMA_VERSION}"),
        state,
    );
    Ok(())
}

/// `CREATE SCHEMA IF NOT EXISTS` asks for the right to create even where there
/// is nothing to do.
async fn create_schema(client: &Client, contract: &Contract, report: &mut Report) -> Result<()> {
    let object = format!("schema \"{}\"", contract.schema);
    let exists: bool = client
        .query_one(
            "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1::text::name)",
            &[&contract.schema],
        )
        .await
        .map_err(|error| sort(format!("look for {object}"), error))?
        .get(0);
    if exists {
        report.add(object, State::AlreadyThere);
        return Ok(());
    }
    if let Err(error) = client.batch_execute(&contract.sql(SCHEMA)).await {
        return Err(sort_create(client, format!("create {object}"), error).await);
    }
    report.add(object, State::Created);
    Ok(())
}
