//! The whole set-up as one script for a DBA.

use std::fmt::Write;

use super::grants::{CLEANUP, HANDLER, INBOX, OPERATOR, RELAY, WRITER};
use super::migrations::{MIGRATIONS, SCHEMA};
use super::partitioned::{GRANT, MAKE, PARTITIONED, WIDTH};
use super::polling::{NOTIFY, PARTITION_INDEXES, XID_INDEX, XID_INDEX_PARTITIONED};
use super::{LOCK, PATIENCE, Reading, SetupOptions, Width};
use crate::catalog::{Mode, PUBLICATION, SCHEMA_VERSION};
use crate::contract::Contract;
use crate::error::{Error, ErrorKind, Result};

const SERVER: &str = include_str!("../../sql/server.sql");
const SLOT: &str = include_str!("../../sql/slot.sql");
const POLLING: &str = include_str!("../../sql/polling.sql");

/// What [`setup`](super::setup) does, as a script for `psql -f`, which can be run
/// again. Not with `psql -1`: a slot cannot be made in a transaction that has
/// written. For a slot, unless the options say otherwise.
///
/// # Errors
/// `Settings`: what a script cannot do was asked for; of another library's table, what lies before a slot is copied under the
/// snapshot that the slot is made with, which a script cannot see.
pub fn print_sql(contract: &Contract, options: &SetupOptions) -> Result<String> {
    if !contract.outbox.is_ours() {
        let message = format!(
            "--table-preset {} fights --print: run `postbox setup` as a role that may replicate and create",
            contract.outbox.preset.name()
        );
        return Err(Error::new(ErrorKind::Settings, message));
    }
    let mode = match options.mode {
        Reading::By(mode) => mode,
        Reading::AsItWas => Mode::Wal,
        Reading::Auto => {
            let why = "--mode auto fights --print: a script decides nothing; say wal or poll";
            return Err(Error::new(ErrorKind::Settings, why));
        }
    };
    if options.adopt {
        let why = "--adopt fights --print: a script takes nothing over; leave one of them out";
        return Err(Error::new(ErrorKind::Settings, why));
    }
    if options.notify == Some(false) {
        let why = "--notify false fights --print: a script drops no trigger; leave it out";
        return Err(Error::new(ErrorKind::Settings, why));
    }
    options.check_notify(mode)?;
    let mut script =
        format!("{HEAD}SET lock_timeout = '{PATIENCE}';\nSELECT pg_advisory_lock({LOCK});\n\n");
    if mode == Mode::Wal {
        script.push_str(SERVER);
    }
    let schema_is_missing =
        "SELECT to_regnamespace(quote_ident(:'schema')) IS NULL AS missing \\gset";
    section(&mut script, schema_is_missing, SCHEMA);
    script.push_str(READ_VERSION);
    for (version, migration) in (1..).zip(MIGRATIONS) {
        let is_missing = format!("SELECT :version < {version} AS missing \\gset");
        let body = format!("BEGIN;\n{migration}COMMIT;\n");
        section(&mut script, &is_missing, &body);
    }
    script.push_str(REFUSE_NEWER);
    if options.partitioned.is_some() {
        let body = format!("BEGIN;\n{PARTITIONED}COMMIT;\n");
        section(&mut script, IS_NOT_PARTITIONED, &body);
        let _ = write!(script, "\n{WIDTH}{MAKE}");
    }
    match mode {
        Mode::Wal => {
            section(&mut script, PUBLICATION_IS_MISSING, PUBLICATION);
            script.push('\n');
            script.push_str(SLOT);
        }
        Mode::Poll => {
            // Who builds an index beside writers waits for all statements that have begun,
            // such as one that waits for the lock.
            let _ = writeln!(script, "\nSELECT pg_advisory_unlock({LOCK});");
            section(&mut script, IS_NOT_PARTITIONED, XID_INDEX);
            let indexes = PARTITION_INDEXES.trim_end();
            let body = format!("{XID_INDEX_PARTITIONED}{indexes} \\gexec\n");
            section(&mut script, IS_PARTITIONED, &body);
            let _ = write!(script, "SELECT pg_advisory_lock({LOCK});\n\n{POLLING}");
        }
    }
    if options.notify == Some(true) {
        section(&mut script, TRIGGER_IS_MISSING, NOTIFY);
    }
    let version = SCHEMA_VERSION.to_string();
    let width = options.partitioned.map_or("", Width::name);
    let names = [
        ("partitioned", width),
        ("backfill", options.backfill.name()),
        ("known_version", &version),
    ];
    let mut script = contract.sql_with(&script, &names);
    if let Some(role) = &options.relay_role {
        if mode == Mode::Wal {
            script.push_str(&contract.sql_with(REPLICATION, &[("role", role)]));
        }
        script.push('\n');
        script.push_str(&contract.sql_with(RELAY, &[("role", role)]));
        let mut grant = String::new();
        section(&mut grant, HAS_PARTITIONS, GRANT);
        script.push_str(&contract.sql_with(&grant, &[("role", role)]));
    }
    for (role, grants) in [
        (&options.writer_role, WRITER),
        (&options.operator_role, OPERATOR),
        (&options.cleanup_role, CLEANUP),
        (&options.inbox_role, INBOX),
        (&options.handler_role, HANDLER),
    ] {
        if let Some(role) = role {
            script.push('\n');
            script.push_str(&contract.sql_with(grants, &[("role", role)]));
        }
    }
    let _ = writeln!(script, "\nSELECT pg_advisory_unlock({LOCK});");
    Ok(script)
}

/// `body`, run where the query says that something is missing.
fn section(script: &mut String, is_missing: &str, body: &str) {
    let _ = write!(script, "\n{is_missing}\n\\if :missing\n{body}\\endif\n");
}

const HEAD: &str = "\
-- Sets postbox up in the database that psql is connected to. Can be run again.
-- Not with psql -1: a slot cannot be made in a transaction that has written.
\\set ON_ERROR_STOP on
";

const PUBLICATION_IS_MISSING: &str = "\
SELECT NOT EXISTS (SELECT FROM pg_publication WHERE pubname = :'publication')
    AND NOT EXISTS (SELECT FROM :\"schema\".checkpoint WHERE name = :'slot' AND lsn IS NOT NULL) AS missing \\gset";

const TRIGGER_IS_MISSING: &str = "\
SELECT NOT EXISTS (SELECT FROM pg_trigger WHERE tgname = 'notify_relay'
    AND tgrelid = (quote_ident(:'schema') || '.outbox')::regclass) AS missing \\gset";

const IS_NOT_PARTITIONED: &str = "\
SELECT relkind <> 'p' AS missing FROM pg_class WHERE oid = to_regclass(quote_ident(:'schema') || '.outbox') \\gset";

/// What is missing here is its index.
const IS_PARTITIONED: &str = "\
SELECT relkind = 'p' AS missing FROM pg_class WHERE oid = to_regclass(quote_ident(:'schema') || '.outbox') \\gset";

/// Here, a right to them.
const HAS_PARTITIONS: &str = "\
SELECT to_regprocedure(quote_ident(:'schema') || '.make_partitions()') IS NOT NULL AS missing \\gset";

const READ_VERSION: &str = "
\\set version 0
SELECT to_regclass(quote_ident(:'schema') || '.migration') IS NOT NULL AS found \\gset
\\if :found
SELECT max(version) AS version FROM :\"schema\".migration \\gset
\\endif
";

const REFUSE_NEWER: &str = "
SELECT :version > :'known_version' AS newer \\gset
\\if :newer
DO 'BEGIN RAISE ''the schema is newer than this script''; END';
\\endif
";

const REPLICATION: &str = "
SELECT NOT (rolsuper OR rolreplication) AS missing FROM pg_roles WHERE rolname = :'role' \\gset
\\if :missing
ALTER ROLE :\"role\" REPLICATION;
\\endif
";

#[cfg(test)]
mod tests {
    use super::*;

    fn script(options: &SetupOptions) -> String {
        let contract = Contract::new("my \"box", "slot_1", "Pub").unwrap();
        print_sql(&contract, options).unwrap()
    }

    #[test]
    fn every_name_is_filled_in() {
        let options = SetupOptions {
            relay_role: Some("relay".to_owned()),
            writer_role: Some("app".to_owned()),
            operator_role: Some("ops".to_owned()),
            ..SetupOptions::default()
        };
        let script = script(&options);
        for token in [
            "schema",
            "slot",
            "publication",
            "role",
            "backfill",
            "known_version",
        ] {
            assert!(!script.contains(&format!(":\"{token}\"")), "{token}");
            assert!(!script.contains(&format!(":'{token}'")), "{token}");
        }
        for part in [
            "CREATE TABLE \"my \"\"box\".outbox",
            "CREATE PUBLICATION \"Pub\" FOR TABLE \"my \"\"box\".\"outbox\"",
            "pg_create_logical_replication_slot('slot_1', 'pgoutput')",
            "SET postbox.backfill = 'refuse'",
            "ALTER ROLE \"relay\" REPLICATION",
            "GRANT INSERT ON \"my \"\"box\".outbox TO \"app\"",
            "ON \"my \"\"box\".parked TO \"ops\"",
            // psql knows this one itself.
            "GRANT CONNECT ON DATABASE :\"DBNAME\" TO \"relay\"",
        ] {
            assert!(script.contains(part), "{part}");
        }
    }

    #[test]
    fn grants_come_last_and_only_when_asked_for() {
        let options = SetupOptions {
            writer_role: Some("app".to_owned()),
            ..SetupOptions::default()
        };
        let with = script(&options);
        assert!(with.find("GRANT").unwrap() > with.find("pg_create_logical").unwrap());
        assert!(!script(&SetupOptions::default()).contains("GRANT "));
    }

    #[test]
    fn every_condition_is_closed() {
        let script = script(&SetupOptions::default());
        let count = |word: &str| script.lines().filter(|line| line.starts_with(word)).count();
        assert_eq!(count("\\if "), count("\\endif"));
        assert!(!script.contains("backfill = none';"));
    }
}
