//! The command line: what it refuses, what it shows, what it keeps to itself.

use std::io::Write;
use std::net::TcpListener;
use std::process::{Command, Stdio};

use crate::support::{Fixture, Relay, postbox, run};

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

/// Everything that librdkafka is told when there are secrets.
const SECRET_PROPERTIES: &str = "security.protocol=SASL_PLAINTEXT
sasl.mechanism=PLAIN
sasl.username=app
sasl.password=hunter2
ssl.key.password=hunter2
debug=all
";

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

/// The name, its lines, and what follows, of each flag in a help text.
fn flags(help: &str) -> Vec<(&str, &str)> {
    let starts: Vec<usize> = help
        .match_indices("\n      --")
        .chain(help.match_indices("\n  -X, --"))
        .map(|(at, _)| at)
        .collect();
    let mut flags = Vec::new();
    for start in starts {
        let text = &help[start..];
        let name = &text[text.find("--").unwrap() + 2..];
        let end = name.find(|c: char| !c.is_ascii_lowercase() && c != '-');
        let text_end = text[1..].find("\n      --").unwrap_or(text.len() - 1);
        flags.push((&name[..end.unwrap()], &text[..=text_end]));
    }
    flags
}

/// Flags that have no default: what they name only their users know.
const WITHOUT_DEFAULT: [&str; 7] = [
    "database-url",
    "brokers",
    "kafka-property",
    "print",
    "grant-to",
    "grant-writer-to",
    "backfill",
];

#[test]
fn help_tells_of_each_flag_its_variable_its_default_and_its_unit() {
    for (command, count) in [("relay", 18), ("setup", 10), ("demo", 6)] {
        let output = run(&mut postbox(&[command, "--help"]));
        let help = output.results();
        let flags = flags(help);
        assert_eq!(flags.len(), count, "{command}: {flags:#?}");
        for (name, text) in flags {
            let variable = match (command, name) {
                // The same names as in the tests.
                ("demo", "database-url") => "DATABASE_URL".to_owned(),
                ("demo", "brokers") => "KAFKA_BROKERS".to_owned(),
                _ => format!("POSTBOX_{}", name.to_uppercase().replace('-', "_")),
            };
            assert!(
                text.contains(&format!("[env: {variable}")),
                "{command}: {text}"
            );
            let default = text.split("[default: ").nth(1);
            assert_eq!(
                default.is_none(),
                WITHOUT_DEFAULT.contains(&name),
                "{command}: {text}"
            );
            let unit = default
                .and_then(|default| default.split(']').next())
                .unwrap_or_default();
            let unit = unit.trim_start_matches(|c: char| c.is_ascii_digit());
            match name {
                _ if text.contains("<TIME>") => assert!(["ms", "s", "m"].contains(&unit), "{text}"),
                _ if text.contains("<SIZE>") => assert_eq!(unit, "MiB", "{text}"),
                "in-flight-max" => assert!(text.contains("<EVENTS>"), "{text}"),
                "rate" => assert!(
                    text.contains("<ORDERS>") && text.contains("a second"),
                    "{text}"
                ),
                _ => {}
            }
        }
    }
}

#[test]
fn help_shows_no_secret_that_is_in_a_variable() {
    for command in [&["relay"][..], &["setup"], &["demo"], &["completions"], &[]] {
        for help in ["--help", "-h"] {
            let url = format!("postgresql://app:{SECRET}@db/app");
            let output = run(postbox(&[command, &[help]].concat())
                .env("POSTBOX_DATABASE_URL", &url)
                .env("DATABASE_URL", &url)
                .env("PGPASSWORD", SECRET)
                .env("POSTBOX_KAFKA_PROPERTY", SECRET_PROPERTIES));
            assert!(output.results().contains("Usage: postbox"));
            assert_no_secret(output.results());
        }
    }
}

#[test]
fn help_lists_the_commands_and_the_exit_codes() {
    let output = run(&mut postbox(&["--help"]));
    let help = output.results();
    for text in [
        "\n  setup ",
        "\n  relay ",
        "\n  demo ",
        "\n  completions ",
        "Exit codes:",
        "9  not drained in time",
    ] {
        assert!(help.contains(text), "no \"{text}\" in {help}");
    }
}

#[test]
fn the_version_is_that_of_the_package() {
    let expected = format!("postbox {}\n", env!("CARGO_PKG_VERSION"));
    for flag in ["--version", "-V"] {
        assert_eq!(run(&mut postbox(&[flag])).results(), expected);
    }
}

#[test]
fn completions_are_scripts_that_know_the_flags() {
    for (shell, mark) in [
        ("bash", "complete -F _postbox"),
        ("zsh", "#compdef postbox"),
        ("fish", "complete -c postbox"),
    ] {
        let output = run(&mut postbox(&["completions", shell]));
        let script = output.results();
        assert!(script.contains(mark), "{script}");
        assert!(
            script.contains("in-flight-bytes-max") && script.contains("grant-writer-to"),
            "{script}"
        );
    }
    let script = run(&mut postbox(&["completions", "bash"])).stdout;
    let mut bash = Command::new("bash")
        .arg("-n")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    bash.stdin
        .take()
        .unwrap()
        .write_all(script.as_bytes())
        .unwrap();
    assert!(bash.wait().unwrap().success());
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
