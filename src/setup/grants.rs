//! What the roles may do.

use postgres_protocol::escape::escape_identifier;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::Type;

use super::{Report, SetupOptions, State, backfill, partitioned};
use crate::catalog::{MAY_REPLICATE, Mode};
use crate::cleanup::{CLAIMS_HAS, CLAIMS_RIGHTS};
use crate::contract::Contract;
use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};
use crate::partitions;

pub(super) const RELAY: &str = include_str!("../../sql/grant_relay.sql");
pub(super) const WRITER: &str = include_str!("../../sql/grant_writer.sql");
pub(super) const OPERATOR: &str = include_str!("../../sql/grant_operator.sql");
pub(super) const CLEANUP: &str = include_str!("../../sql/grant_cleanup.sql");
pub(super) const INBOX: &str = include_str!("../../sql/grant_inbox.sql");
pub(super) const HANDLER: &str = include_str!("../../sql/grant_handler.sql");

/// Amazon's servers lend the attribute through a role of this name.
const LENDING_ROLE: &str = "rds_replication";

/// Whether the role has what its file grants.
const RELAY_HAS: &str = "SELECT has_database_privilege($1::text::name, current_database(), 'CONNECT') \
     AND has_schema_privilege($1::text::name, :'schema', 'USAGE') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.checkpoint', 'SELECT') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.checkpoint', 'UPDATE') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.slice', 'SELECT') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.slice', 'INSERT') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.slice', 'UPDATE') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.migration', 'SELECT') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.outbox', 'SELECT') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.parked', 'SELECT') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.parked', 'INSERT') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.parked', 'UPDATE') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.parked', 'DELETE') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.cancellation', 'SELECT') \
     AND (SELECT bool_and(has_function_privilege($1::text::name, oid, 'EXECUTE')) FROM pg_proc \
          WHERE proname IN ('publication_identity', 'is_settled', 'make_partitions') \
            AND pronamespace = quote_ident(:'schema')::regnamespace)";
const WRITER_HAS: &str = "SELECT has_schema_privilege($1::text::name, :'schema', 'USAGE') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.outbox', 'INSERT') \
     AND has_column_privilege($1::text::name, quote_ident(:'schema') || '.outbox', 'id', 'SELECT') \
     AND has_column_privilege($1::text::name, quote_ident(:'schema') || '.idempotency', 'id', 'SELECT') \
     AND (SELECT bool_and(has_function_privilege($1::text::name, oid, 'EXECUTE')) FROM pg_proc \
          WHERE proname IN ('emit', 'cancel') AND pronamespace = quote_ident(:'schema')::regnamespace)";
const OPERATOR_HAS: &str = "SELECT has_schema_privilege($1::text::name, :'schema', 'USAGE') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.parked', 'SELECT') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.cancellation', 'SELECT') \
     AND (SELECT bool_and(has_column_privilege($1::text::name, quote_ident(:'schema') || '.parked', name, 'UPDATE')) \
          FROM unnest('{status, due_at, taken_at, awaits_topic, attempts, owes_letter, decided_by, decided_at, \
                       reason}'::text[]) AS name) \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.inbox_source', 'SELECT') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.inbox_message', 'SELECT') \
     AND (SELECT bool_and(has_column_privilege($1::text::name, quote_ident(:'schema') || '.inbox_message', name, \
                                               'UPDATE')) \
          FROM unnest('{status, due_at, attempts, is_claimed, owes_letter, decided_by, decided_at, reason}'::text[]) \
               AS name) \
     AND has_column_privilege($1::text::name, quote_ident(:'schema') || '.outbox', 'id', 'SELECT') \
     AND has_column_privilege($1::text::name, quote_ident(:'schema') || '.outbox', 'scheduled_at', 'SELECT') \
     AND (SELECT bool_and(has_function_privilege($1::text::name, oid, 'EXECUTE')) FROM pg_proc \
          WHERE proname = 'cancel' AND pronamespace = quote_ident(:'schema')::regnamespace)";

const DROP_HAS: &str = "SELECT has_table_privilege($1::text::name, quote_ident(:'schema') || '.outbox_default', 'SELECT') \
     AND has_table_privilege($1::text::name, quote_ident(:'schema') || '.outbox_default', 'DELETE') \
     AND (SELECT bool_and(has_function_privilege($1::text::name, oid, 'EXECUTE')) FROM pg_proc \
          WHERE proname IN ('partitions', 'hold_partition', 'drop_partition') \
            AND pronamespace = quote_ident(:'schema')::regnamespace)";
const CLEANUP_HAS: &str = "SELECT has_database_privilege($1::text::name, current_database(), 'CONNECT') \
     AND has_schema_privilege($1::text::name, :'schema', 'USAGE') \
     AND (SELECT bool_and(has_table_privilege($1::text::name, quote_ident(:'schema') || '.' || t, 'SELECT')) \
          FROM unnest('{migration,checkpoint,slice,outbox,parked,cancellation,idempotency}'::text[]) AS t) \
     AND (SELECT bool_and(has_table_privilege($1::text::name, quote_ident(:'schema') || '.' || t, 'DELETE')) \
          FROM unnest('{outbox,parked,cancellation,idempotency}'::text[]) AS t) \
     AND (SELECT bool_and(has_function_privilege($1::text::name, oid, 'EXECUTE')) FROM pg_proc \
          WHERE proname IN ('publication_identity', 'is_settled') \
            AND pronamespace = quote_ident(:'schema')::regnamespace)";

const INBOX_HAS: &str = "SELECT has_database_privilege($1::text::name, current_database(), 'CONNECT') \
     AND has_schema_privilege($1::text::name, :'schema', 'USAGE') \
     AND (SELECT bool_and(has_table_privilege($1::text::name, quote_ident(:'schema') || '.' || t, 'SELECT')) \
          FROM unnest('{migration,inbox,inbox_source,inbox_offset,inbox_mark,inbox_message}'::text[]) AS t) \
     AND (SELECT bool_and(has_table_privilege($1::text::name, quote_ident(:'schema') || '.' || t, 'INSERT')) \
          FROM unnest('{inbox,inbox_source,inbox_offset,inbox_mark,inbox_message}'::text[]) AS t) \
     AND (SELECT bool_and(has_table_privilege($1::text::name, quote_ident(:'schema') || '.' || t, 'UPDATE')) \
          FROM unnest('{inbox_offset,inbox_mark,inbox_message}'::text[]) AS t) \
     AND (SELECT bool_and(has_table_privilege($1::text::name, quote_ident(:'schema') || '.' || t, 'DELETE')) \
          FROM unnest('{inbox,inbox_message}'::text[]) AS t)";
const HANDLER_HAS: &str = "SELECT has_schema_privilege($1::text::name, :'schema', 'USAGE') \
     AND (SELECT bool_and(has_function_privilege($1::text::name, oid, 'EXECUTE')) FROM pg_proc \
          WHERE proname IN ('inbox_claim', 'inbox_done', 'inbox_fail', 'inbox_record', 'inbox_seen', 'inbox_forget') \
            AND pronamespace = quote_ident(:'schema')::regnamespace)";

/// What a relay needs of another library's table, to mark its rows.
const MARK: &str = "GRANT USAGE ON SCHEMA :\"table_schema\" TO :\"role\";\n\
     GRANT SELECT, UPDATE ON :\"table_schema\".:\"table\" TO :\"role\";\n";
const MARK_HAS: &str = "SELECT has_schema_privilege($1::text::name, :'table_schema', 'USAGE') \
     AND has_table_privilege($1::text::name, quote_ident(:'table_schema') || '.' || quote_ident(:'table'), 'SELECT') \
     AND has_table_privilege($1::text::name, quote_ident(:'table_schema') || '.' || quote_ident(:'table'), 'UPDATE')";

/// What a relay needs of another library's table that a slot gives: to find it.
const FIND: &str = "GRANT USAGE ON SCHEMA :\"table_schema\" TO :\"role\";\n";
const FIND_HAS: &str = "SELECT has_schema_privilege($1::text::name, :'table_schema', 'USAGE')";

/// Refuses roles that do not exist, before anything is done.
pub(super) async fn check_roles(client: &Client, options: &SetupOptions) -> Result<()> {
    for role in options.roles() {
        let sql = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1::text::name)";
        if !ask(client, sql, role).await? {
            return Err(Error::new(
                ErrorKind::Rights,
                format!(
                    "role \"{role}\" does not exist: CREATE ROLE {} LOGIN",
                    escape_identifier(role)
                ),
            ));
        }
    }
    Ok(())
}

/// Gives each role what it needs.
pub(super) async fn apply(
    client: &Client,
    contract: &Contract,
    options: &SetupOptions,
    mode: Mode,
    report: &mut Report,
) -> Result<()> {
    if let Some(role) = &options.relay_role {
        if mode == Mode::Wal {
            let state = match ask(client, MAY_REPLICATE, role).await? {
                true => State::AlreadyThere,
                false => lend_replication(client, role).await?,
            };
            report.add(format!("replication by role \"{role}\""), state);
        }
        let partitions = match partitions::are_ours(client, contract).await? {
            true => partitioned::GRANT,
            false => "",
        };
        let state = grant(
            client,
            contract,
            role,
            &[RELAY, partitions].concat(),
            RELAY_HAS,
        )
        .await?;
        report.add(format!("grants to relay role \"{role}\""), state);
        if !contract.outbox.is_ours() {
            let (file, has) = match contract.outbox.preset.tracking() {
                Some(_) => (MARK, MARK_HAS),
                None => (FIND, FIND_HAS),
            };
            let state = grant(client, contract, role, file, has).await?;
            let table = contract.outbox.quoted();
            report.add(format!("{table}: grants to relay role \"{role}\""), state);
            let copied = backfill::grant(client, contract).await;
            copied.map_err(|error| sort(format!("grant rights to role \"{role}\""), error))?;
        }
    }
    if let Some(role) = &options.writer_role {
        let state = grant(client, contract, role, WRITER, WRITER_HAS).await?;
        report.add(format!("grants to writer role \"{role}\""), state);
    }
    if let Some(role) = &options.operator_role {
        let state = grant(client, contract, role, OPERATOR, OPERATOR_HAS).await?;
        report.add(format!("grants to operator role \"{role}\""), state);
    }
    if let Some(role) = &options.inbox_role {
        let state = grant(client, contract, role, INBOX, INBOX_HAS).await?;
        report.add(format!("grants to inbox role \"{role}\""), state);
    }
    if let Some(role) = &options.handler_role {
        let state = grant(client, contract, role, HANDLER, HANDLER_HAS).await?;
        report.add(format!("grants to handler role \"{role}\""), state);
    }
    if let Some(role) = &options.cleanup_role {
        let state = grant(client, contract, role, CLEANUP, CLEANUP_HAS).await?;
        report.add(format!("grants to cleanup role \"{role}\""), state);
        if contract.outbox.is_ours() && partitions::are_ours(client, contract).await? {
            let state = grant(client, contract, role, partitions::DROP_RIGHTS, DROP_HAS).await?;
            let object = partitions::object(contract);
            report.add(
                format!("{object}: grants to cleanup role \"{role}\""),
                state,
            );
        }
        if contract.outbox.preset.tracking().is_some() {
            let state = grant(client, contract, role, CLAIMS_RIGHTS, CLAIMS_HAS).await?;
            let table = contract.outbox.quoted();
            report.add(format!("{table}: grants to cleanup role \"{role}\""), state);
        }
    }
    Ok(())
}

async fn grant(
    client: &Client,
    contract: &Contract,
    role: &str,
    file: &str,
    has: &str,
) -> Result<State> {
    let has = contract.sql(has);
    if ask(client, &has, role).await? {
        return Ok(State::AlreadyThere);
    }
    let doing = format!("grant rights to role \"{role}\"");
    let database: String = client
        .query_one("SELECT current_database()::text", &[])
        .await
        .map_err(|error| sort(&*doing, error))?
        .get(0);
    let sql = contract.sql_with(file, &[("role", role), ("DBNAME", &database)]);
    client
        .batch_execute(&sql)
        .await
        .map_err(|error| sort(&*doing, error))?;
    // Without a grant option, GRANT is a warning and not an error.
    if ask(client, &has, role).await? {
        return Ok(State::Created);
    }
    Err(Error::new(
        ErrorKind::Rights,
        format!("{doing}: this role may not give them; run as the owner:\n{sql}"),
    ))
}

async fn lend_replication(client: &Client, role: &str) -> Result<State> {
    let statement = replication_statement(client, role).await?;
    match client.batch_execute(&statement).await {
        Ok(()) => Ok(State::Created),
        Err(error) if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            Err(replication_is_missing(client, role).await?.caused_by(error))
        }
        Err(error) => Err(sort(format!("let role \"{role}\" replicate"), error)),
    }
}

/// What to say when `role` may not open replication sessions.
pub(super) async fn replication_is_missing(client: &Client, role: &str) -> Result<Error> {
    let statement = replication_statement(client, role).await?;
    Ok(Error::new(
        ErrorKind::Rights,
        format!("role \"{role}\" may not replicate: {statement}"),
    ))
}

async fn replication_statement(client: &Client, role: &str) -> Result<String> {
    let sql = "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1::text::name)";
    let role = escape_identifier(role);
    Ok(match ask(client, sql, LENDING_ROLE).await? {
        true => format!("GRANT {LENDING_ROLE} TO {role}"),
        false => format!("ALTER ROLE {role} REPLICATION"),
    })
}

pub(super) async fn current_role(client: &Client) -> Result<String> {
    let row = client
        .query_one("SELECT session_user::text", &[])
        .await
        .map_err(|error| sort("read the session's role", error))?;
    Ok(row.get(0))
}

/// Sorts an error of a statement that needs CREATE on the database.
pub(super) async fn sort_create(
    client: &Client,
    doing: String,
    error: tokio_postgres::Error,
) -> Error {
    if error.code() != Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
        return sort(doing, error);
    }
    // Quoted by the server; whatever goes wrong here, the first error is the one to tell.
    let names = "SELECT quote_ident(current_database()), quote_ident(current_user)";
    match client.query_one(names, &[]).await {
        Ok(row) => {
            let (database, role): (String, String) = (row.get(0), row.get(1));
            let mend = format!("{doing}: GRANT CREATE ON DATABASE {database} TO {role}");
            Error::new(ErrorKind::Rights, mend).caused_by(error)
        }
        Err(_) => sort(doing, error),
    }
}

/// The answer to a question about a role.
async fn ask(client: &Client, sql: &str, role: &str) -> Result<bool> {
    let rows = client
        .query_typed(sql, &[(&role, Type::TEXT)])
        .await
        .map_err(|error| sort(format!("read rights of role \"{role}\""), error))?;
    Ok(rows.first().is_some_and(|row| row.get(0)))
}
