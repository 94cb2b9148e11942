//! Times, sizes and counts: their units and limits.

use super::relay;
use crate::support::{postbox, run};

#[test]
fn a_number_is_refused_beyond_its_limit_and_the_help_states_that() {
    for (command, flag, good, bad, range) in [
        (
            "relay",
            "--in-flight-max",
            ["1", "1000000"],
            ["0", "1000001"],
            "1 to 1000000",
        ),
        (
            "relay",
            "--in-flight-bytes-max",
            ["1", "1GiB"],
            ["0", "1073741825"],
            "1 to 1GiB",
        ),
        (
            "relay",
            "--status-interval",
            ["10ms", "10s"],
            ["9ms", "10001ms"],
            "10ms to 10s",
        ),
        (
            "relay",
            "--heartbeat-interval",
            ["1s", "10m"],
            ["999ms", "600001ms"],
            "1s to 10m",
        ),
        (
            "relay",
            "--wal-sender-timeout",
            ["1s", "10m"],
            ["999ms", "600001ms"],
            "1s to 10m",
        ),
        (
            "relay",
            "--shutdown-timeout",
            ["0ms", "1h"],
            ["-1s", "3600001ms"],
            "0ms to 1h",
        ),
        ("relay", "--shards", ["1", "64"], ["0", "65"], "1 to 64"),
        (
            "demo",
            "--duration",
            ["1s", "10m"],
            ["999ms", "600001ms"],
            "1s to 10m",
        ),
        (
            "demo",
            "--rate",
            ["1", "100000"],
            ["0", "100001"],
            "1 to 100000",
        ),
    ] {
        let help = run(&mut postbox(&[command, "--help"]));
        let (_, entry) = help.results().split_once(&format!("{flag} <")).unwrap();
        let (entry, _) = entry.split_once("[env: ").unwrap();
        let entry = entry.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(entry.contains(&format!("; {range}")), "{flag}: {entry}");

        for value in bad {
            let output = run(&mut postbox(&[
                command,
                "--brokers",
                "x",
                &format!("{flag}={value}"),
            ]));
            let complaint = output.complaint(2);
            let named = complaint.contains(&format!("invalid value '{value}' for '{flag}"));
            let range =
                complaint.contains(range) || complaint.contains(&range.replace(" to ", "..="));
            assert!(named && range, "{complaint}");
        }
        for value in good {
            // Read, and then refused for another reason.
            let broken = ["--database-url", "mysql://db/app"];
            let mut postbox =
                postbox(&[&[command, "--brokers", "x", flag, value], &broken[..]].concat());
            postbox.env("POSTBOX_WAL_SENDER_TIMEOUT", "1m");
            if flag == "--shards" {
                postbox.env("POSTBOX_MODE", "poll");
            }
            let output = run(&mut postbox);
            let complaint = output.complaint(2);
            assert!(
                complaint.contains("postgresql://"),
                "{flag} {value}: {complaint}"
            );
        }
    }
}

#[test]
fn what_is_wrong_with_a_number_is_said() {
    for (flag, value, expected) in [
        ("--status-interval", "50", "no unit: use ms, s, m, h or d"),
        (
            "--status-interval",
            "1y",
            "an unknown unit: use ms, s, m, h or d",
        ),
        (
            "--status-interval",
            "0.5s",
            "not a whole number: use a smaller unit",
        ),
        (
            "--status-interval",
            "soon",
            "not a number with a unit: use 10ms to 10s",
        ),
        ("--status-interval", "1h", "out of range: use 10ms to 10s"),
        (
            "--in-flight-bytes-max",
            "32MB",
            "an unknown unit: use KiB, MiB or GiB",
        ),
        (
            "--in-flight-bytes-max",
            "1.5MiB",
            "not a whole number: use a smaller unit",
        ),
        (
            "--in-flight-bytes-max",
            "99999999999GiB",
            "out of range: use 1 to 1GiB",
        ),
        ("--in-flight-max", "many", "invalid digit"),
    ] {
        let output = run(&mut relay(&[flag, value]));
        let complaint = output.complaint(2);
        let named = complaint.contains(&format!("invalid value '{value}' for '{flag}"));
        assert!(named && complaint.contains(expected), "{complaint}");
    }
}
