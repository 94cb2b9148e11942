//! Debezium itself, in Kafka Connect, and our relay on its table; and its table alone.

mod handover;
mod records;
mod table;

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

/// Debezium at work.
struct Debezium(Server);

impl Debezium {
    /// Stops it, such as by `stop kill`.
    fn stop(&mut self, how: &str) {
        tokio::task::block_in_place(|| self.0.command(how)).unwrap();
    }
}

impl Drop for Debezium {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.0.fact("log")).unwrap_or_default();
            let words = [" ERROR ", " WARN ", "Caused by", "Exception"];
            let complaints = log
                .lines()
                .filter(|line| words.iter().any(|word| line.contains(word)));
            let complaints: Vec<&str> = complaints.collect();
            eprintln!("--- Debezium's log ---\n{}", complaints.join("\n"));
        }
    }
}

/// Starts Debezium with these connectors, by name, each with what differs from its defaults,
/// and waits until all of them stream.
fn debezium(fixture: &Fixture, connectors: &[(&str, &[&str])]) -> Debezium {
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
        // Our heartbeats: it would make records of them, which not all of its converters take.
        "message.prefix.exclude.list=postbox".to_owned(),
    ];
    let mut words = Vec::new();
    for (name, settings) in connectors {
        words.extend(["--connector", name]);
        words.extend(common.iter().map(String::as_str));
        words.extend(*settings);
    }
    let server = tokio::task::block_in_place(|| Server::debezium(&fixture.brokers, &words));
    Debezium(server.unwrap())
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
