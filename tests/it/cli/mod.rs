//! The command line: what it refuses, what it shows, what it keeps to itself.

mod help;
mod logs;

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
fn settings_that_cannot_work_are_refused_in_words() {
    let database = "POSTBOX_DATABASE_URL";
    let brokers = "POSTBOX_BROKERS";
    let property = "POSTBOX_KAFKA_PROPERTY";
    for (flags, environment, expected) in [
        // What clap knows.
        (
            &["--nope"][..],
            &[][..],
            &["unexpected argument '--nope'"][..],
        ),
        (
            &["--mode", "poll"],
            &[],
            &["invalid value 'poll' for '--mode", "wal"],
        ),
        (
            &["--log-level", "loud"],
            &[],
            &["invalid value 'loud' for '--log-level", "trace"],
        ),
        (
            &["--log-format", "xml"],
            &[],
            &["invalid value 'xml' for '--log-format", "text, json"],
        ),
        (
            &["--format", "xml"],
            &[],
            &["unknown format \"xml\": use envelope, raw or versioned"],
        ),
        (
            &["--route", "{tenant}"],
            &[],
            &["unknown field \"{tenant}\": use {aggregate_type} or {event_type}"],
        ),
        (
            &["--route", "a{aggregate_type"],
            &[],
            &["has a brace that is not closed"],
        ),
        (
            &["--route", "no spaces"],
            &[],
            &["\"no spaces\" does not make a topic name"],
        ),
        // Kafka.
        (&[], &[(brokers, "")], &["--brokers", "host:port"]),
        (&["--brokers", " , "], &[], &["--brokers", "host:port"]),
        (&["-X", "linger.ms"], &[], &["-X", "KEY=VALUE"]),
        (&["-X", "=5"], &[], &["-X", "KEY=VALUE"]),
        (
            &["-X", "acks=1"],
            &[],
            &["-X acks=1 fights acks=all", "in-sync replica"],
        ),
        (
            &["-X", "enable.idempotence=false"],
            &[],
            &["-X enable.idempotence=false fights enable.idempotence=true"],
        ),
        (
            &["-X", "bootstrap.servers=x:1"],
            &[],
            &["-X bootstrap.servers is not for you to set: use --brokers"],
        ),
        (
            &["-X", "linger.msec=5"],
            &[],
            &["-X linger.msec: no such configuration property"],
        ),
        (&["-X", "linger.ms=soon"], &[], &["-X linger.ms: "]),
        (
            &[],
            &[(property, "linger.ms=5\nacks=0\n")],
            &["-X acks=0 fights acks=all"],
        ),
        (
            &[],
            &[(property, "linger.ms=5\nnonsense\n")],
            &["KEY=VALUE"],
        ),
        // Limits.
        (
            &["--in-flight-max", "0"],
            &[],
            &["--in-flight-max", "at least 1"],
        ),
        (
            &["--in-flight-max", "many"],
            &[],
            &["--in-flight-max", "many"],
        ),
        (
            &["--in-flight-bytes-max", "0"],
            &[],
            &["--in-flight-bytes-max 0", "at least 1"],
        ),
        (
            &["--in-flight-bytes-max", "32MB"],
            &[],
            &["\"32MB\" has an unknown unit: use KiB, MiB or GiB"],
        ),
        (
            &["--in-flight-bytes-max", "99999999999GiB"],
            &[],
            &["is too large"],
        ),
        (
            &["--status-interval", "50"],
            &[],
            &["\"50\" has no unit: use ms, s or m"],
        ),
        (
            &["--status-interval", "soon"],
            &[],
            &["\"soon\" is not a time: use 500ms, 10s or 2m"],
        ),
        (
            &["--status-interval", "9ms"],
            &[],
            &["--status-interval 9ms is out of range: 10ms to 10s"],
        ),
        (
            &["--status-interval", "5s"],
            &[],
            &["--status-interval 5s fights --wal-sender-timeout 8s"],
        ),
        (
            &[],
            &[
                ("POSTBOX_WAL_SENDER_TIMEOUT", "1s"),
                ("POSTBOX_STATUS_INTERVAL", "501ms"),
            ],
            &["--status-interval 501ms fights --wal-sender-timeout 1s"],
        ),
        (
            &["--wal-sender-timeout", "999ms"],
            &[],
            &["--wal-sender-timeout 999ms is out of range: 1s to 10m"],
        ),
        (
            &["--heartbeat-interval", "0s"],
            &[],
            &["--heartbeat-interval 0s is out of range: 1s to 10m"],
        ),
        (
            &["--heartbeat-interval", "11m"],
            &[],
            &["--heartbeat-interval 11m is out of range: 1s to 10m"],
        ),
        // Names.
        (
            &["--slot", "Upper"],
            &[],
            &["slot \"Upper\" may only have a to z, 0 to 9 and _"],
        ),
        (
            &["--slot", "x; DROP"],
            &[],
            &["slot \"x; DROP\" may only have"],
        ),
        (&["--schema", ""], &[], &["schema \"\" needs a name"]),
        (
            &["--publication", &"p".repeat(64)],
            &[],
            &["longer than 63 bytes"],
        ),
        // Postgres.
        (
            &[],
            &[(database, "postgresql://app:hunter2@db/app?colour=red")],
            &["database parameter \"colour\" is not supported"],
        ),
        (
            &[],
            &[(database, "postgresql://app:hunter2@db/app?sslmode=allow")],
            &["\"sslmode\"", "prefer"],
        ),
        (
            &[],
            &[(database, "postgresql://app:hunter2@one,two/app")],
            &["names several hosts"],
        ),
        (
            &[],
            &[(database, "mysql://app:hunter2@db/app")],
            &["neither postgresql:// nor postgres://"],
        ),
        (
            &[],
            &[(database, "postgresql://app:hun%ter2@db/app")],
            &["\"%\" that no two hexadecimal digits follow"],
        ),
        (
            &[],
            &[(database, "postgresql://app:a/hunter2@db/app")],
            &["write %40 and %2F"],
        ),
        (
            &[],
            &[(database, "host=db user=app password=a hunter2 dbname=app")],
            &["key=value pairs"],
        ),
        (
            &[],
            &[(database, "host=db user=app password=a hunter2=b")],
            &["encode or quote"],
        ),
        (
            &[],
            &[(database, ""), ("PGPORT", "hunter2")],
            &["PGPORT is not a port number"],
        ),
        (
            &["--database-url", "postgresql://app@db:hunter2/app"],
            &[],
            &["is not a port number"],
        ),
        (
            &[],
            &[
                (database, "postgresql://db/app"),
                ("USER", ""),
                ("LOGNAME", ""),
            ],
            &["no database user"],
        ),
        (
            &[],
            &[("PGSSLROOTCERT", "/does/not/exist")],
            &["/does/not/exist"],
        ),
        (
            &[],
            &[("PGSSLMODE", "disable"), ("PGSSLCERT", "/c.pem")],
            &["PGSSLCERT needs sslkey beside it"],
        ),
        (
            &[],
            &[(database, "host=/run/pg user=app sslkey=/k.pem")],
            &["\"sslkey\" needs sslcert beside it"],
        ),
        // The place where http is served.
        (
            &["--http", "nowhere"],
            &[],
            &["use ADDRESS:PORT, such as 127.0.0.1:9464, or none"],
        ),
        (&["--http", "127.0.0.1"], &[], &["use ADDRESS:PORT"]),
        (
            &["--http", "203.0.113.1:9464"],
            &[],
            &["--http 203.0.113.1:9464: cannot listen there; use another address, or none"],
        ),
    ] {
        let mut command = relay(flags);
        let output = run(command.envs(environment.iter().copied()));
        let complaint = output.complaint(2);
        assert!(complaint.starts_with("error: "), "{complaint}");
        for text in expected {
            assert!(
                complaint.contains(text),
                "no \"{text}\" for {flags:?} {environment:?}: {complaint}"
            );
        }
        assert_no_secret(complaint);
    }
}

#[test]
fn a_command_that_does_not_exist_or_lacks_something_is_refused() {
    for (arguments, expected) in [
        (&[][..], "Usage: postbox"),
        (&["relais"], "unrecognized subcommand 'relais'"),
        (&["--nope"], "unexpected argument '--nope'"),
        (&["relay"], "--brokers <LIST>"),
        (
            &["setup", "--backfill", "pending"],
            "invalid value 'pending' for '--backfill",
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
        (&["demo", "--rate", "0"], "invalid value '0' for '--rate"),
        (
            &["demo", "--duration", "20"],
            "\"20\" has no unit: use ms, s or m",
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

/// It may be a password that was written in another way.
#[test]
fn a_property_that_is_no_property_is_not_quoted() {
    for flags in [
        &["-X", "sasl.password:hunter2"][..],
        &["-Xhunter2"],
        &["--kafka-property", "=hunter2"],
    ] {
        assert_no_secret(run(&mut relay(flags)).complaint(2));
    }
    for value in ["hunter2", "sasl.username=app\nhunter2", "=hunter2\n"] {
        let output = run(relay(&[]).env("POSTBOX_KAFKA_PROPERTY", value));
        assert_no_secret(output.complaint(2));
    }
}
