//! The command line: what it refuses, what it shows, what it keeps to itself.

mod help;
mod logs;
mod numbers;
mod properties;
mod settings;

use std::net::TcpListener;
use std::process::Command;

use crate::support::{postbox, run};

/// A password that is in every place where one can be.
const SECRET: &str = "hunter2";

/// Nobody listens there.
const CLOSED: &str = "127.0.0.1:1";

/// A relay's command with all that it needs, and secrets.
fn relay(flags: &[&str]) -> Command {
    let mut command = postbox(&["relay"]);
    command
        .args(flags)
        .env("POSTBOX_HTTP", "127.0.0.1:0")
        .env("POSTBOX_BROKERS", CLOSED)
        .env(
            "POSTBOX_DATABASE_URL",
            format!("postgresql://app:{SECRET}@{CLOSED}/app"),
        )
        .env("PGPASSWORD", SECRET);
    command
}

fn assert_no_secret(text: &str) {
    assert!(!text.contains(SECRET), "{text}");
}

/// Everything that librdkafka is told when there are secrets.
const SECRET_PROPERTIES: &str = "security.protocol=SASL_PLAINTEXT
sasl.mechanism=PLAIN
sasl.username=app
sasl.password=hunter2
ssl.key.password=hunter2
debug=all
";

#[test]
fn a_command_that_does_not_exist_or_lacks_something_is_refused() {
    for (arguments, expected) in [
        (&[][..], "Usage: postbox"),
        (&["relais"], "unrecognized subcommand 'relais'"),
        (&["--nope"], "unexpected argument '--nope'"),
        (&["relay"], "--brokers <LIST>"),
        (
            &["setup", "--backfill", "all"],
            "invalid value 'all' for '--backfill",
        ),
        (
            &["setup", "--slot", "Upper"],
            "slot \"Upper\" may only have",
        ),
        (
            &["setup", "--brokers", "x:1"],
            "unexpected argument '--brokers'",
        ),
        (&["setup", "--grant-to", ""], "role \"\" needs a name"),
        (
            &["demo", "--brokers", "a:1,"],
            "--brokers: \"\" has no host",
        ),
        (
            &["demo", "--database-url", "mysql://db/app"],
            "neither postgresql:// nor postgres://",
        ),
        (&["completions", "csh"], "invalid value 'csh' for '<SHELL>'"),
    ] {
        let output = run(&mut postbox(arguments));
        let complaint = output.complaint(2);
        assert!(complaint.contains(expected), "{arguments:?}: {complaint}");
    }
}

#[test]
fn an_address_that_is_taken_is_refused() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let output = run(relay(&[]).env("POSTBOX_HTTP", address.to_string()));
    let complaint = output.complaint(2);
    let expected =
        format!("error: --http {address}: cannot listen there; use another address, or none");
    assert!(complaint.starts_with(&expected), "{complaint}");
}
