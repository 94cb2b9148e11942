//! `postbox parked list`, `show` and `export`.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use serde_json::Value;

use super::queue::Row;
use crate::support::{Fixture, Output};

fn parked(fixture: &Fixture, flags: &[&str]) -> Output {
    fixture.parked(flags)
}

/// The objects of the lines.
fn objects(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn ids(text: &str) -> Vec<String> {
    let id = |object: &Value| object["id"].as_str().unwrap().to_owned();
    objects(text).iter().map(id).collect()
}

async fn insert(fixture: &Fixture, row: Row<'_>) {
    row.insert(&fixture.client, &fixture.contract).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_filter_leaves_those_that_fit() {
    let fixture = Fixture::new().await;
    insert(&fixture, Row::head("a", "1h")).await;
    insert(
        &fixture,
        Row {
            relay: "bills",
            ..Row::new("b", "dead")
        },
    )
    .await;
    insert(
        &fixture,
        Row {
            topic: Some("bill"),
            parked: "2h",
            ..Row::new("c", "dead")
        },
    )
    .await;
    insert(
        &fixture,
        Row {
            topic: None,
            key: None,
            event_type: None,
            ..Row::new("d", "dead")
        },
    )
    .await;
    insert(
        &fixture,
        Row {
            error: Some("100%_no"),
            ..Row::new("e", "dead")
        }
        .key(""),
    )
    .await;
    insert(
        &fixture,
        Row {
            event_type: Some("lost"),
            error: None,
            ..Row::new("f", "skipped")
        },
    )
    .await;
    insert(
        &fixture,
        Row {
            due_in: Some("1h"),
            error: None,
            ..Row::new("g", "scheduled")
        },
    )
    .await;
    // An id is of one relay.
    insert(
        &fixture,
        Row {
            relay: "bills",
            ..Row::new("a", "skipped")
        },
    )
    .await;
    for (flags, expected) in [
        (&[][..], "a b c d e"),
        (&["--relay", "bills"], "b"),
        (&["--status", "dead"], "b c d e"),
        (&["--status", "scheduled,skipped"], "f g a"),
        (&["--topic", "bill"], "c"),
        (&["--key", "k"], "a b c"),
        (&["--key", ""], "e"),
        (&["--type", "order_paid"], "a b c e"),
        (&["--error", "0%_"], "e"),
        (&["--error", "Refused"], ""),
        (&["--older-than", "1h"], "c"),
        (&["--older-than", "3h"], ""),
        (&["a", "g"], "a g a"),
        (&["a", "--relay", "bills"], "a"),
        (&["--key", "k", "--status", "dead", "--topic", "order"], "b"),
    ] {
        for action in ["list", "export"] {
            let output = match action {
                "list" => parked(&fixture, &[&["list", "--output", "json"], flags].concat()),
                _ => parked(&fixture, &[&["export"], flags].concat()),
            };
            assert_eq!(
                ids(output.results()).join(" "),
                expected,
                "{action} {flags:?}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_table_has_120_columns_whatever_is_in_it() {
    let fixture = Fixture::new().await;
    let (topic, key) = (
        "a.very.long.topic.name.of.somebody".repeat(3),
        "ü".repeat(200),
    );
    let error = format!("line one\nline two \u{1b}[2J{}", "x".repeat(300));
    let id = "0a6d2c9e-9a43-4f4e-8f43-1b1c70e8f5b1";
    let long = Row {
        topic: Some(&topic),
        error: Some(&error),
        parked: "75m",
        ..Row::new(id, "dead")
    };
    insert(&fixture, long.key(&key)).await;
    insert(
        &fixture,
        Row {
            parked: "3d",
            ..Row::head("h", "90m")
        },
    )
    .await;
    insert(
        &fixture,
        Row {
            error: None,
            ..Row::new("f", "waiting")
        },
    )
    .await;
    insert(
        &fixture,
        Row {
            awaits_topic: true,
            error: None,
            ..Row::new("t", "waiting")
        },
    )
    .await;
    insert(
        &fixture,
        Row {
            taken: Some("1s"),
            error: None,
            ..Row::head("s", "0s")
        }
        .key("other"),
    )
    .await;
    let output = parked(&fixture, &["list"]);
    let table = output.results();
    let lines: Vec<&str> = table.lines().collect();
    for line in &lines {
        assert!(line.chars().count() <= 120, "{table}");
        assert!(!line.chars().any(char::is_control), "{table}");
    }
    // Each event, what is wrong with two of them, and the head.
    assert_eq!(lines.len(), 1 + 5 + 2, "{table}");
    assert!(lines[0].starts_with("ID    "), "{table}");
    let words =
        |line: &str| -> Vec<String> { line.split_whitespace().map(str::to_owned).collect() };
    assert_eq!(
        words(lines[1])[..5],
        [id, "dead", "1h", "3", "-"],
        "{table}"
    );
    assert!(
        lines[1].contains('…') && lines[1].ends_with("order_paid"),
        "{table}"
    );
    assert!(
        lines[2].starts_with(r"  line one\nline two \u{1b}[2Jxx"),
        "{table}"
    );
    assert_eq!(
        words(lines[3])[..5],
        ["h", "waiting", "3d", "3", "1h"],
        "{table}"
    );
    assert_eq!(words(lines[5])[4], "behind", "{table}");
    assert_eq!(words(lines[6])[4], "topic", "{table}");
    assert_eq!(words(lines[7])[4], "sending", "{table}");

    // How many more there are is no result.
    let output = parked(&fixture, &["list", "--limit", "2", "--output", "json"]);
    assert_eq!(
        (output.code, ids(&output.stdout).len()),
        (0, 2),
        "{output:?}"
    );
    let more = "3 more: --limit lists them too, export has no limit\n";
    assert_eq!(output.stderr, more);
    parked(&fixture, &["list", "--limit", "5"]).results();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_waits_is_a_table_without_rows() {
    let fixture = Fixture::new().await;
    let head = "ID  STATUS  PARKED  TRIES  DUE  TOPIC  KEY  TYPE\n";
    assert_eq!(parked(&fixture, &["list"]).results(), head);
    let json = parked(&fixture, &["list", "--output", "json"]);
    assert_eq!(json.results(), "");
    assert_eq!(parked(&fixture, &["export"]).results(), "");
}

/// Scripts go by them.
const FIELDS: [&str; 23] = [
    "id",
    "relay",
    "number",
    "status",
    "topic",
    "key",
    "event_type",
    "attempts",
    "error",
    "parked_at",
    "due_at",
    "tried_at",
    "is_being_sent",
    "is_cancelled",
    "awaits_topic",
    "owes_letter",
    "decided_by",
    "decided_at",
    "reason",
    "committed_at",
    "commit_lsn",
    "xid",
    "row_bytes",
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn json_has_its_fields_and_times_of_utc() {
    let mut fixture = Fixture::new().await;
    insert(&fixture, Row::head("a", "0s")).await;
    insert(&fixture, Row::new("b", "waiting")).await;
    let set = "UPDATE postbox.parked SET parked_at = '2026-03-01 13:00:00.5+01', commit_lsn = '1/2A', xid = '77'";
    fixture.client.batch_execute(set).await.unwrap();
    // Whatever the database says of times.
    let name = fixture.database.name();
    let zone = format!(
        "ALTER DATABASE {name} SET timezone = 'Asia/Tokyo'; ALTER DATABASE {name} SET datestyle = 'SQL'"
    );
    fixture.client.batch_execute(&zone).await.unwrap();
    fixture.reconnect().await;
    let output = parked(&fixture, &["list", "--output", "json"]);
    let objects = objects(output.results());
    let fields =
        |object: &Value| -> Vec<String> { object.as_object().unwrap().keys().cloned().collect() };
    let mut expected = FIELDS.map(str::to_owned);
    expected.sort_unstable();
    assert_eq!(fields(&objects[0]), expected);
    let first = output.stdout.lines().next().unwrap();
    assert!(
        first.starts_with(
            r#"{"id":"a","relay":"orders","number":1,"status":"waiting","topic":"order","#
        ),
        "{first}"
    );
    assert_eq!(objects[0]["parked_at"], "2026-03-01T12:00:00.500000+00:00");
    assert_eq!(objects[0]["commit_lsn"], "1/2A");
    assert_eq!(objects[0]["xid"], "77");
    assert!(objects[0]["due_at"].is_string());
    assert_eq!(objects[1]["due_at"], Value::Null);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payload_is_shown_only_to_who_asks_for_it() {
    let fixture = Fixture::new().await;
    let mut row = Row::new("a", "dead");
    // A column that may be anything, as in a table of others.
    row.columns.push(("body", Some(b"secret 4111")));
    insert(&fixture, row).await;
    for flags in [
        &["list"][..],
        &["list", "--output", "json"],
        &["show", "a"],
        &["show", "a", "--output", "json"],
        &["export"],
        &["retry", "a", "--dry-run"],
        &[
            "skip",
            "a",
            "--reason",
            "r",
            "--dry-run",
            "--output",
            "json",
        ],
    ] {
        let output = parked(&fixture, flags);
        let text = output.results();
        assert!(!text.contains("4111") && !text.contains("078-05"), "{text}");
        assert!(text.contains("order_paid"), "{text}");
    }
    for flags in [
        &["show", "a"][..],
        &["show", "a", "--output", "json"],
        &["export"],
    ] {
        let output = parked(&fixture, &[flags, &["--payload"]].concat());
        let text = output.results().replace('\\', "");
        for value in [r#"{"card": "4111"}"#, r#"{"ssn": "078-05"}"#, "secret 4111"] {
            assert!(text.contains(value), "{text}");
        }
    }
    let hidden = objects(parked(&fixture, &["export"]).results());
    assert_eq!(
        hidden[0]["hidden"],
        serde_json::json!(["payload", "headers", "body"])
    );
    assert_eq!(hidden[0]["columns"]["aggregate_id"], "k");
    assert_eq!(hidden[0]["columns"]["topic"], Value::Null);
    let shown = parked(&fixture, &["show", "a"]);
    let shown = shown.results();
    assert!(
        shown.contains("payload         (16 bytes: --payload shows them)"),
        "{shown}"
    );
    assert!(shown.contains("\n  error        refused\n"), "{shown}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_bytes_are_shown_for_what_they_are() {
    let fixture = Fixture::new().await;
    let mut row = Row::new("a", "dead");
    row.columns.push(("xid", Some(b"nul\0 and \x1b[31m")));
    row.columns.push(("trace_id", Some(b"\xff\xfe")));
    insert(&fixture, row).await;
    insert(&fixture, Row::new("broken", "dead")).await;
    let cut = "UPDATE postbox.parked SET message = substr(message, 1, 20) WHERE id = 'broken'";
    fixture.client.batch_execute(cut).await.unwrap();

    let output = parked(&fixture, &["export"]);
    let objects = objects(output.results());
    assert_eq!(objects[0]["columns"]["xid"], "nul\0 and \u{1b}[31m");
    assert_eq!(objects[0]["columns"]["trace_id"]["hex"], "fffe");
    // One that cannot be read keeps nobody from the others.
    assert_eq!(objects[1]["columns"], Value::Null);
    let why = objects[1]["unreadable"].as_str().unwrap();
    assert!(why.contains("ends early"), "{why}");

    let output = parked(&fixture, &["show", "a", "broken"]);
    let text = output.results();
    assert!(text.contains(r"nul\u{0} and \u{1b}[31m"), "{text}");
    assert!(text.contains("(not UTF-8) fffe"), "{text}");
    assert!(
        text.contains("row          cannot be read: pgoutput message ends early"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_that_does_not_wait_is_refused_before_anything_is_done() {
    let fixture = Fixture::new().await;
    insert(&fixture, Row::new("a", "dead")).await;
    let file = tempfile::tempdir().unwrap();
    let path = file.path().join("events");
    let path = path.to_str().unwrap();
    for flags in [
        &["list", "a", "no\u{1b}pe"][..],
        &["show", "a", "no\u{1b}pe"],
        &["retry", "a", "no\u{1b}pe"],
        &["retry", "a", "no\u{1b}pe", "--dry-run"],
        &["skip", "a", "no\u{1b}pe", "--reason", "r"],
        &["export", "a", "no\u{1b}pe"],
        &["export", "a", "no\u{1b}pe", "--to", path],
    ] {
        let output = parked(&fixture, flags);
        let complaint = output.complaint(2);
        let expected =
            r#"error: no event "no\u{1b}pe" waits in schema "postbox": it may have been delivered"#;
        assert!(complaint.starts_with(expected), "{complaint}");
    }
    assert!(!std::path::Path::new(path).exists());
    let states = super::queue::states(&fixture.client, &fixture.contract).await;
    assert_eq!(states, ["a dead behind"]);
    // Also where a flag leaves it out.
    let output = parked(&fixture, &["list", "a", "--status", "waiting"]);
    assert!(output.complaint(2).contains("or the flags leave it out"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_exported_can_be_written_again() {
    let fixture = Fixture::new().await;
    let id = "0a6d2c9e-9a43-4f4e-8f43-1b1c70e8f5b1";
    let payload = br#"{ "n":12345678901234567890.10 ,"n":1, "e":"\u0000\"" }"#;
    let mut row = Row::new(id, "dead");
    row.columns[6].1 = Some(payload);
    insert(&fixture, row).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events");
    let to = ["export", "--payload", "--to", path.to_str().unwrap()];
    let done = parked(&fixture, &to);
    assert_eq!(done.results(), format!("1 events: {}\n", path.display()));
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let line = std::fs::read_to_string(&path).unwrap();

    // As the README has it.
    let write = "INSERT INTO postbox.outbox (id, aggregate_type, aggregate_id, event_type, payload, headers) \
         SELECT (c->>'id')::uuid, c->>'aggregate_type', c->>'aggregate_id', c->>'event_type', \
                (c->>'payload')::json, (c->>'headers')::json \
         FROM (SELECT $1::text::json->'columns' AS c) AS line RETURNING payload::text";
    let written = fixture.client.query_one(write, &[&line]).await.unwrap();
    assert_eq!(written.get::<_, String>(0).as_bytes(), payload);

    let complaint = parked(&fixture, &to);
    let complaint = complaint.complaint(2);
    let expected = format!(
        "error: --to {}: cannot write a new file there",
        path.display()
    );
    assert!(complaint.starts_with(&expected), "{complaint}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), line);
}

/// 80 MB of rows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_holds_one_event_at_a_time_and_ends_when_nobody_reads() {
    const EVENTS: i32 = 40_000;
    let fixture = Fixture::new().await;
    let large = vec![b'x'; 1900];
    let mut row = Row::new("a", "dead");
    row.columns[6].1 = Some(&large);
    row.insert_many(&fixture.client, &fixture.contract, EVENTS)
        .await;

    let start = || {
        let mut command = fixture.parked_command(&["export", "--payload"]);
        command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let mut export = start();
    let mut lines = BufReader::new(export.stdout.take().unwrap()).lines();
    let first: Vec<_> = lines.by_ref().take(EVENTS as usize - 1000).collect();
    let status = std::fs::read_to_string(format!("/proc/{}/status", export.id()));
    let rest = lines.count();
    assert_eq!(first.len() + rest, EVENTS as usize);
    assert!(export.wait().unwrap().success());
    if let Ok(status) = status {
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes: u64 = peak
            .unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap();
        assert!(kilobytes < 40_000, "{kilobytes} kB");
    }

    let mut export = start();
    let mut stdout = export.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 100]).unwrap();
    drop(stdout);
    let output = export.wait_with_output().unwrap();
    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), complaint.as_str()), (Some(0), ""));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_has_no_right_is_told_who_gives_it() {
    let fixture = Fixture::new().await;
    insert(&fixture, Row::new("a", "dead")).await;
    let (role, url) = fixture.role("nobody").await;
    let usage = format!("GRANT USAGE ON SCHEMA postbox TO {role}");
    for flags in [
        &["list"][..],
        &["export"],
        &["retry", "--all"],
        &["show", "a"],
    ] {
        let output = fixture.parked_as(&url, flags);
        let complaint = output.complaint(6);
        let mend = "`postbox setup --grant-operator-to ROLE`, run by the owner, gives the right to";
        assert!(complaint.contains(mend), "{complaint}");
        fixture.client.batch_execute(&usage).await.unwrap();
    }
    let empty = Fixture::empty().await;
    let output = empty.parked(&["list"]);
    assert!(
        output.complaint(3).contains("run `postbox setup`"),
        "{output:?}"
    );
}
