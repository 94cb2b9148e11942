//! Servers that encrypt, ask who is there, and do not let everyone do everything.

mod acls;
pub(crate) mod certificates;
mod kafka;
mod middleman;
mod postgres;
mod rights;
mod servers;

use std::time::Duration;

use crate::support::Relay;
use servers::{PASSWORD, SecurePostgres, issuers, kafka_flags};

/// Neither a password nor any line of a key.
fn assert_no_secret(log: &str, keys: &[&str]) {
    assert!(!log.contains(PASSWORD), "{log}");
    let lines = keys.iter().flat_map(|key| key.lines());
    for line in lines.filter(|line| !line.starts_with("-----")) {
        assert!(!log.contains(line), "{line} in {log}");
    }
}

/// What a relay said when it ended; a library's thread may have logged more.
fn complaint(log: &str) -> &str {
    let line = log.lines().find(|line| line.starts_with("error: "));
    line.unwrap_or_else(|| panic!("no complaint in {log}"))
}

fn borrowed(flags: &[String]) -> Vec<&str> {
    flags.iter().map(String::as_str).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_flow_where_both_servers_encrypt_and_ask_for_certificate_and_password() {
    let postgres = SecurePostgres::start().await;
    let fixture = &postgres.fixture;
    let parameters = postgres.parameters("verify-full", "ca.pem", "relay");
    let url = postgres.url("localhost", PASSWORD, &parameters);
    let mut flags = kafka_flags("IN", &[]);
    flags.extend(["--database-url".to_owned(), url]);
    // All that the libraries have to say, which nobody should turn on.
    let mut command = Relay::command(fixture, &borrowed(&flags));
    let mut relay = Relay::spawn(command.env("RUST_LOG", "trace"));
    relay.wait_for_log("streaming").await;

    let sessions = "SELECT application_name, version, client_dn FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) \
                    WHERE usename = $1 AND ssl AND client_dn = '/CN=' || usename ORDER BY 1";
    let sessions = fixture
        .client
        .query(sessions, &[&postgres.role])
        .await
        .unwrap();
    // The stream's, the control session, and three on the parked events.
    assert_eq!(sessions.len(), 5, "{sessions:?}");

    let writers = fixture.writers(fixture.load());
    tokio::time::sleep(Duration::from_secs(2)).await;
    writers.stop().await.unwrap();
    fixture.wait_for_confirmation().await;
    let log = relay.log();
    assert!(log.contains("TRACE"), "{log}");
    assert_no_secret(&log, &[&postgres.key(), &issuers().kafka_client.key]);
    let verdict = fixture.judge(relay).await;
    assert!(verdict.committed > 100 && verdict.is_clean(0), "{verdict}");
}
