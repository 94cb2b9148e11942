//! Debezium itself, in Kafka Connect, and our relay on its table.

mod handover;
mod records;

use std::path::PathBuf;
use std::process::Command;

use postbox::servers::Server;

use crate::support::{Fixture, Relay};

/// A database on a Postgres of its own, as the names of Debezium's slots are those of
/// everybody. Nothing where Debezium is not to be had, which is said also when a test
/// passes.
async fn fixture() -> Option<Fixture> {
    use std::io::Write;

    let fetch = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("dev/fetch");
    let fetched = Command::new(fetch).arg("connect").status();
    if !fetched.is_ok_and(|status| status.success()) {
        let _ = writeln!(std::io::stderr(), "not tested: there is no Debezium here");
        return None;
    }
    Some(Fixture::with_postgres(&[]).await)
}

/// Starts Debezium with these connectors, by name, each with what differs from its defaults,
/// and waits until all of them stream.
fn debezium(fixture: &Fixture, connectors: &[(&str, &[&str])]) -> Server {
    let address = fixture.postgres_address();
    let (host, port) = address.split_once(':').unwrap();
    let database = fixture.database_url.split('?').next().unwrap();
    let database = database.rsplit('/').next().unwrap();
    let common = [
        format!("database.hostname={host}"),
        format!("database.port={port}"),
        "database.user=postgres".to_owned(),
        format!("database.dbname={database}"),
        "poll.interval.ms=50".to_owned(),
    ];
    let mut words = Vec::new();
    for (name, settings) in connectors {
        words.extend(["--connector", name]);
        words.extend(common.iter().map(String::as_str));
        words.extend(*settings);
    }
    tokio::task::block_in_place(|| Server::debezium(&fixture.brokers, &words)).unwrap()
}

const PRESET: [&str; 2] = ["--table-preset", "debezium"];

/// Sets up to read Debezium's table, with these flags besides, through the slot and the
/// publication of the contract.
fn set_up(fixture: &Fixture, flags: &[&str]) {
    let flags = [&PRESET, flags, &["--backfill", "none"]].concat();
    fixture.setup(&flags).results();
}

/// Starts a relay that reads Debezium's table.
async fn relay(fixture: &Fixture, flags: &[&str]) -> Relay {
    Relay::streaming(fixture, &[&PRESET, flags].concat()).await
}
