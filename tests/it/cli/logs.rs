//! What is logged, how, and what is not.

use super::{SECRET_PROPERTIES, assert_no_secret, relay};
use crate::support::{Fixture, Relay, postbox, run};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_has_neither_passwords_nor_payloads_even_at_trace() {
    let fixture = Fixture::new().await;
    let (role, url) = fixture.role("relay").await;
    fixture.setup(&["--grant-to", &role]).results();
    let trace = ["--log-level", "trace", "--heartbeat-interval", "1s"];

    let mut no_postgres = Relay::spawn(&mut relay(&trace));
    no_postgres.wait_for_log("trying again").await;
    assert_no_secret(&no_postgres.log());
    assert_eq!(no_postgres.stop().await, 0);

    let mut command = relay(&trace);
    command
        .env("POSTBOX_DATABASE_URL", &url)
        .env("POSTBOX_SLOT", &fixture.contract.slot)
        .env("POSTBOX_KAFKA_PROPERTY", SECRET_PROPERTIES);
    let mut no_kafka = Relay::spawn(&mut command);
    no_kafka.wait_for_log("trying again").await;
    let log = no_kafka.log();
    assert!(log.contains("no broker answers"), "{log}");
    assert_no_secret(&no_kafka.log());
    assert_eq!(no_kafka.stop().await, 0);

    let flags = [&trace[..], &["--database-url", &url]].concat();
    let relay = Relay::streaming(&fixture, &flags).await;
    let sql = "SELECT postbox.emit($1, 'a', 'b', '\"hunter2\"', headers => '{\"h\": \"hunter2\"}')";
    fixture.client.query(sql, &[&fixture.topic]).await.unwrap();
    fixture.wait_for_confirmation().await;
    assert!(relay.log().contains("TRACE"), "{}", relay.log());
    assert_no_secret(&relay.log());
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 1);

    let mut command = postbox(&["setup", "--log-level", "trace"]);
    command
        .env("POSTBOX_DATABASE_URL", &url)
        .env("POSTBOX_SLOT", &fixture.contract.slot);
    let setup = run(&mut command);
    assert!(setup.stderr.contains("TRACE"), "{setup:?}");
    assert_no_secret(&setup.stderr);
}

/// Each line is a JSON object with a time, a level and a message.
fn assert_json(log: &str) {
    assert_ne!(log, "");
    for line in log.lines() {
        let line: serde_json::Value =
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
        for name in ["timestamp", "level", "message"] {
            assert!(line[name].is_string(), "no {name} in {line}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_in_json_is_json_to_its_last_line() {
    let json = ["--log-format", "json", "--log-level", "debug"];
    let mut away = Relay::spawn(&mut relay(&json));
    away.wait_for_log("trying again").await;
    assert_json(&away.log());
    assert_eq!(away.stop().await, 0);

    // Also of what ends it.
    let fixture = Fixture::empty().await;
    let mut never_set_up = Relay::start(&fixture, &json);
    assert_eq!(never_set_up.exit_code().await, 4);
    let log = never_set_up.log();
    assert!(log.contains("run `postbox setup`"), "{log}");
    assert_json(&log);
    let output = run(&mut relay(&[&json[..], &["-X", "acks=1"]].concat()));
    assert_json(output.complaint(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flag_wins_over_its_variable_and_rust_log_over_the_level() {
    let mut command = relay(&["--log-level", "warn"]);
    command.env("POSTBOX_LOG_LEVEL", "info");
    let mut quiet = Relay::spawn(&mut command);
    quiet.wait_for_log("trying again").await;
    assert!(!quiet.log().contains(" INFO "), "{}", quiet.log());
    assert_eq!(quiet.stop().await, 0);

    let mut command = relay(&["--log-level", "error"]);
    let mut loud = Relay::spawn(command.env("RUST_LOG", "postbox=info"));
    loud.wait_for_log(" INFO ").await;
    loud.wait_for_log("trying again").await;
    assert_eq!(loud.stop().await, 0);

    let output = run(relay(&[]).env("RUST_LOG", "postbox=loud"));
    let complaint = output.complaint(2);
    assert!(complaint.contains("RUST_LOG=postbox=loud"), "{complaint}");
}
