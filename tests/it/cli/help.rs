//! `--help`, `--version` and completions.

use std::io::Write;
use std::process::{Command, Stdio};

use super::{SECRET, SECRET_PROPERTIES, assert_no_secret};
use crate::support::{postbox, run};

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
const WITHOUT_DEFAULT: [&str; 45] = [
    "handler-header",
    "commit",
    "dead-letter-topic",
    "mark",
    "table",
    "column",
    "format",
    "headers",
    "placement",
    "database-url",
    "brokers",
    "kafka-property",
    "print",
    "grant-to",
    "grant-writer-to",
    "backfill",
    "adopt",
    "notify",
    "partitioned",
    "shards",
    "grant-operator-to",
    "relay",
    "status",
    "topic",
    "key",
    "type",
    "error",
    "older-than",
    "payload",
    "to",
    "all",
    "dry-run",
    "by",
    "reason",
    "cleanup-interval",
    "cleanup-older-than",
    "grant-cleanup-to",
    "forget",
    "grant-inbox-to",
    "grant-handler-to",
    "topics",
    "topic-regex",
    "group",
    "id-header",
    "instance",
];

#[test]
fn http_is_for_this_machine_alone_unless_told_otherwise() {
    let output = run(&mut postbox(&["relay", "--help"]));
    let flags = flags(output.results());
    let (_, http) = flags.iter().find(|(name, _)| *name == "http").unwrap();
    assert!(http.contains("[default: 127.0.0.1:9464]"), "{http}");
}

#[test]
fn help_says_that_a_relay_can_be_forgotten_without_a_retention() {
    let output = run(&mut postbox(&["cleanup", "--help"]));
    let usage = "Usage: postbox cleanup [OPTIONS] --older-than <TIME>\n       \
                 postbox cleanup [OPTIONS] --forget <RELAY> [--older-than <TIME>]\n";
    assert!(output.results().contains(usage), "{output:?}");
}

#[test]
fn help_tells_of_each_flag_its_variable_its_default_and_its_unit() {
    for (command, count) in [
        ("relay", 39),
        ("setup", 22),
        ("inbox", 32),
        ("inbox list", 13),
        ("inbox show", 7),
        ("inbox retry", 15),
        ("inbox skip", 16),
        ("cleanup", 14),
        ("demo", 6),
        ("parked list", 13),
        ("parked show", 7),
        ("parked retry", 15),
        ("parked skip", 16),
        ("parked export", 13),
        ("cancel", 4),
    ] {
        let words: Vec<&str> = command.split(' ').collect();
        let output = run(postbox(&words).arg("--help"));
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
            // That of set-up is what there is.
            let has_none = WITHOUT_DEFAULT.contains(&name) || (command, name) == ("setup", "mode");
            assert_eq!(default.is_none(), has_none, "{command}: {text}");
            let unit = default
                .and_then(|default| default.split(']').next())
                .unwrap_or_default();
            let unit = unit.trim_start_matches(|c: char| c.is_ascii_digit());
            match name {
                _ if has_none => {}
                _ if text.contains("<TIME>") => {
                    assert!(["ms", "s", "m", "h", "d"].contains(&unit), "{text}");
                }
                _ if text.contains("<SIZE>") => assert!(["MiB", "GiB"].contains(&unit), "{text}"),
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
    for command in [
        &["relay"][..],
        &["setup"],
        &["parked", "list"],
        &["cancel"],
        &["demo"],
        &["completions"],
        &[],
    ] {
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
        "\n  parked ",
        "\n  cancel ",
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
