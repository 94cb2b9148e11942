//! `postbox parked retry` and `skip`.

use std::time::Duration;

use postbox::parked::Filter;
use postbox::parked::decisions::{Decision, decide};
use tokio_postgres::Client;

use super::queue::{Row, states};
use crate::support::{Fixture, Output, PATIENCE, connect, run};

async fn insert(fixture: &Fixture, row: Row<'_>) {
    row.insert(&fixture.client, &fixture.contract).await;
}

async fn clear(fixture: &Fixture) {
    let clear = "TRUNCATE postbox.parked";
    fixture.client.batch_execute(clear).await.unwrap();
}

/// A row as it is written in a scenario: `id:status`, with a time behind it if it has one.
fn row(text: &'static str) -> Row<'static> {
    let (id, status) = text.split_once(':').unwrap();
    match status.split_once('+') {
        None => Row::new(id, status),
        Some((status, due)) => Row {
            due_in: Some(due),
            ..Row::new(id, status)
        },
    }
}

fn skip(fixture: &Fixture, flags: &[&str]) -> Output {
    fixture.parked(&[&["skip", "--reason", "too old"], flags].concat())
}

/// A dead event, one that the relay is sending just now, and one behind it.
async fn insert_one_being_sent(fixture: &Fixture) {
    insert(fixture, Row::new("a", "dead")).await;
    insert(
        fixture,
        Row {
            taken: Some("1s"),
            ..Row::head("b", "0s")
        },
    )
    .await;
    insert(fixture, Row::new("c", "waiting")).await;
}

/// One key's queue, a command, and what becomes of each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_keeps_its_order_wherever_the_decision_falls() {
    let fixture = Fixture::new().await;
    for (queue, command, ids, expected) in [
        // Another try, of the dead: before the head, behind it, last, alone.
        (
            "a:dead b:waiting+1h c:waiting",
            "retry",
            "a",
            "a waiting due|b waiting behind|c waiting behind",
        ),
        (
            "a:waiting+1h b:dead c:waiting",
            "retry",
            "b",
            "a waiting later|b waiting behind|c waiting behind",
        ),
        (
            "a:waiting+1h b:waiting c:dead",
            "retry",
            "c",
            "a waiting later|b waiting behind|c waiting behind",
        ),
        ("a:dead", "retry", "a", "a waiting due"),
        (
            "a:dead b:dead c:dead",
            "retry",
            "a c",
            "a waiting due|b dead behind|c waiting behind",
        ),
        (
            "a:skipped b:waiting+1h",
            "retry",
            "a",
            "a waiting due|b waiting behind",
        ),
        // Of those that wait.
        (
            "a:waiting+1h b:waiting",
            "retry",
            "a",
            "a waiting due|b waiting behind",
        ),
        (
            "a:waiting+1h b:waiting",
            "retry",
            "b",
            "a waiting later|b waiting behind",
        ),
        (
            "a:waiting+1h b:dead c:waiting",
            "retry",
            "a b c",
            "a waiting due|b waiting behind|c waiting behind",
        ),
        // None at all: the first, amid them, the last, several.
        (
            "a:waiting+1h b:waiting c:waiting",
            "skip",
            "a",
            "a skipped behind|b waiting due|c waiting behind",
        ),
        (
            "a:waiting+1h b:waiting c:waiting",
            "skip",
            "b",
            "a waiting later|b skipped behind|c waiting behind",
        ),
        (
            "a:waiting+1h b:waiting c:waiting",
            "skip",
            "c",
            "a waiting later|b waiting behind|c skipped behind",
        ),
        (
            "a:waiting+1h b:waiting c:waiting",
            "skip",
            "a b",
            "a skipped behind|b skipped behind|c waiting due",
        ),
        (
            "a:waiting+1h b:waiting",
            "skip",
            "a b",
            "a skipped behind|b skipped behind",
        ),
        (
            "a:dead b:waiting+1h",
            "skip",
            "a",
            "a skipped behind|b waiting later",
        ),
    ] {
        clear(&fixture).await;
        for text in queue.split(' ') {
            insert(&fixture, row(text)).await;
        }
        // Neighbours, of which none is touched.
        let other_topic = Row {
            topic: Some("other"),
            ..Row::head("x", "1h")
        };
        let other_relay = Row {
            relay: "other",
            ..Row::head("y", "1h")
        };
        for other in [other_topic, other_relay, Row::head("z", "1h").key("other")] {
            insert(&fixture, other).await;
        }
        let ids: Vec<&str> = ids.split(' ').collect();
        let output = match command {
            "retry" => fixture.parked(&[&["retry"], &ids[..]].concat()),
            _ => skip(&fixture, &ids),
        };
        output.results();
        let states = states(&fixture.client, &fixture.contract).await.join("|");
        let expected = format!("{expected}|x waiting later|y waiting later|z waiting later");
        assert_eq!(states, expected, "{queue}: {command} {ids:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_without_a_key_or_a_topic_waits_for_nobody() {
    let fixture = Fixture::new().await;
    let no_key = |row| Row { key: None, ..row };
    let no_topic = |row| Row { topic: None, ..row };
    for row in [
        no_key(Row::new("a", "dead")),
        no_key(Row::new("b", "dead")),
        no_key(Row::head("c", "1h")),
        no_key(Row::head("d", "1h")),
        no_topic(Row::new("e", "dead")),
        no_topic(Row::head("f", "1h")),
        no_topic(Row::head("g", "1h")),
    ] {
        insert(&fixture, row).await;
    }
    fixture
        .parked(&["retry", "a", "b", "c", "e", "f"])
        .results();
    skip(&fixture, &["a"]).results();
    let expected = [
        "a skipped behind",
        "b waiting due",
        "c waiting due",
        "d waiting later",
        "e waiting due",
        "f waiting due",
        "g waiting later",
    ];
    assert_eq!(states(&fixture.client, &fixture.contract).await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_awaits_its_topic_is_left_to_the_relay() {
    let fixture = Fixture::new().await;
    let awaits = |row| Row {
        awaits_topic: true,
        ..row
    };
    insert(&fixture, Row::head("a", "1h")).await;
    insert(&fixture, awaits(Row::new("b", "waiting"))).await;
    insert(&fixture, Row::new("c", "dead")).await;
    // It does not come to be due because it is the first now.
    skip(&fixture, &["a"]).results();
    let output = fixture.parked(&["retry", "b", "c"]);
    assert_eq!(output.code, 3);
    let expected = "error: 1 of 2 events were left as they are: 1 waits for its topic, which the relay tries by itself";
    assert!(output.stderr.starts_with(expected), "{output:?}");
    assert!(
        output
            .stdout
            .ends_with("1 of 2 events will be tried again\n"),
        "{output:?}"
    );
    let expected = ["a skipped behind", "b waiting behind", "c waiting behind"];
    assert_eq!(states(&fixture.client, &fixture.contract).await, expected);
    // It can be given up, and those behind it are tried; taken back, it is tried too.
    skip(&fixture, &["b"]).results();
    let expected = ["a skipped behind", "b skipped behind", "c waiting due"];
    assert_eq!(states(&fixture.client, &fixture.contract).await, expected);
    fixture.parked(&["retry", "b"]).results();
    let expected = ["a skipped behind", "b waiting due", "c waiting behind"];
    assert_eq!(states(&fixture.client, &fixture.contract).await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_being_sent_is_left_as_it_is() {
    let fixture = Fixture::new().await;
    insert_one_being_sent(&fixture).await;
    for (command, flags) in [("retry", &["b"][..]), ("skip", &["b", "--reason", "r"])] {
        let output = fixture.parked(&[&[command], flags].concat());
        assert_eq!(output.code, 3, "{output:?}");
        let why =
            "1 of 1 events were left as they are: 1 being sent just now: look again in a minute";
        assert!(output.stderr.contains(why), "{output:?}");
        assert!(
            output
                .stdout
                .contains("\n  left as it is: being sent just now"),
            "{output:?}"
        );
        let before = ["a dead behind", "b waiting due", "c waiting behind"];
        assert_eq!(states(&fixture.client, &fixture.contract).await, before);
    }
    // The others of its key can be decided about. It keeps its time until the relay knows.
    let output = fixture.parked(&["retry", "--all", "--output", "json"]);
    assert_eq!(output.code, 3, "{output:?}");
    let outcomes: Vec<serde_json::Value> = output
        .stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(outcomes[0]["outcome"], "retried");
    assert_eq!(outcomes[0]["left_because"], serde_json::Value::Null);
    assert_eq!(outcomes[1]["outcome"], "left");
    assert_eq!(outcomes[1]["left_because"], "being_sent");
    skip(&fixture, &["c"]).results();
    let after = ["a waiting due", "b waiting due", "c skipped behind"];
    assert_eq!(states(&fixture.client, &fixture.contract).await, after);

    // A relay that was killed does not say that it stopped.
    let age = "UPDATE postbox.parked SET taken_at = now() - interval '61 s' WHERE id = 'b'";
    fixture.client.batch_execute(age).await.unwrap();
    skip(&fixture, &["b"]).results();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decision_says_who_when_and_why() {
    let fixture = Fixture::new().await;
    for id in ["a", "b"] {
        insert(&fixture, Row::new(id, "dead").key(id)).await;
    }
    let owe = "UPDATE postbox.parked SET owes_letter = true";
    fixture.client.batch_execute(owe).await.unwrap();
    skip(&fixture, &["a", "--by", "ann of billing"]).results();
    skip(&fixture, &["b"]).results();
    let sql = "SELECT decided_by, coalesce(reason, '-'), decided_at > now() - interval '1 minute', attempts, owes_letter \
               FROM postbox.parked ORDER BY id";
    let read = async || {
        let rows = fixture.client.query(sql, &[]).await.unwrap();
        let row = |row: &tokio_postgres::Row| -> (String, String, bool, i32, bool) {
            (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4))
        };
        rows.iter().map(row).collect::<Vec<_>>()
    };
    let decided = read().await;
    let expected = (
        "ann of billing".to_owned(),
        "too old".to_owned(),
        true,
        3,
        false,
    );
    assert_eq!(decided[0], expected);
    let (by, ..) = &decided[1];
    let role = format!(", role {}", fixture.database.user());
    let whoami = std::process::Command::new("id")
        .arg("-un")
        .output()
        .unwrap();
    let whoami = String::from_utf8(whoami.stdout).unwrap();
    assert!(
        by.starts_with(&format!("{}@", whoami.trim())) && by.ends_with(&role) && !by.contains('\n'),
        "{by}"
    );
    let table = fixture.parked(&["list", "--status", "skipped"]);
    let expected = "\n  skipped by ann of billing: too old\n";
    assert!(table.results().contains(expected), "{table:?}");

    // A second one takes nobody's place.
    let again = skip(&fixture, &["a", "--by", "bob"]);
    assert_eq!(again.code, 3);
    assert!(again.stderr.ends_with("1 skipped already\n"), "{again:?}");
    assert_eq!(read().await[0].0, "ann of billing");

    // Taken back: the reason was that of the skip.
    fixture
        .parked(&["retry", "--status", "skipped", "--by", "bob"])
        .results();
    let expected = ("bob".to_owned(), "-".to_owned(), true, 0, false);
    assert_eq!(read().await, [expected.clone(), expected]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dry_run_says_what_would_be_done_and_does_nothing() {
    let fixture = Fixture::new().await;
    insert_one_being_sent(&fixture).await;
    let rows = "SELECT p::text FROM postbox.parked AS p ORDER BY number";
    let all = async || -> Vec<String> {
        let rows = fixture.client.query(rows, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    };
    let before = all().await;
    // Nor does it lock anything.
    let mut other = connect(&fixture.database_url).await;
    let lock = other.transaction().await.unwrap();
    lock.batch_execute("SELECT FROM postbox.parked FOR UPDATE")
        .await
        .unwrap();
    for flags in [&["retry"][..], &["skip", "--reason", "r"]] {
        let output = fixture.parked(&[flags, &["--all", "--dry-run"]].concat());
        assert_eq!(output.code, 3, "{output:?}");
        assert!(
            output.stdout.contains("2 of 3 events would be "),
            "{output:?}"
        );
        assert!(
            output
                .stderr
                .contains("1 of 3 events were left as they are"),
            "{output:?}"
        );
    }
    assert_eq!(all().await, before);
    lock.rollback().await.unwrap();
    let output = fixture.parked(&["retry", "a", "c", "--dry-run", "--output", "json"]);
    assert_eq!(
        output
            .results()
            .matches(r#""outcome":"retried","left_because":null,"dry_run":true}"#)
            .count(),
        2
    );
    assert_eq!(all().await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_decided_about_everything_by_accident() {
    let fixture = Fixture::new().await;
    insert(&fixture, Row::new("a", "dead")).await;
    insert(&fixture, Row::new("b", "skipped")).await;
    insert(
        &fixture,
        Row {
            due_in: Some("1h"),
            ..Row::new("c", "scheduled")
        },
    )
    .await;
    for (flags, expected) in [
        (
            &["retry"][..],
            "say which events: ids, a flag such as --topic or --status, or --all",
        ),
        (&["skip", "--reason", "r"], "say which events"),
        (&["skip", "--all"], "--reason <TEXT>"),
        (&["skip", "--all", "--reason", " "], "--reason: say why"),
        (
            &["skip", "--all", "--reason", "r", "--by", ""],
            "--by: say who decides, or leave it out",
        ),
        (&["retry", "--all", "--by", " "], "--by: say who decides"),
        (&["show"], "<ID>"),
        (&["list", "--older-than", "1"], "no unit"),
        (&["list", "--status", "lost"], "invalid value 'lost'"),
        (&["list", "--limit", "0"], "0 is not in 1..=1000000"),
    ] {
        let output = fixture.parked(flags);
        assert!(output.complaint(2).contains(expected), "{output:?}");
    }
    // Scheduled events are cancelled, and go out by themselves.
    for flags in [
        &["retry", "c"][..],
        &["skip", "--status", "scheduled", "--reason", "r"],
    ] {
        let output = fixture.parked(flags);
        assert_eq!(output.code, 3, "{output:?}");
        let why = "1 scheduled: `postbox cancel` takes it back before its time";
        assert!(output.stderr.contains(why), "{output:?}");
    }
    let before = ["a dead behind", "b skipped behind", "c scheduled later"];
    assert_eq!(states(&fixture.client, &fixture.contract).await, before);
    // What was given up by a person is not meant, unless it is named.
    let all = fixture.parked(&["retry", "--all"]);
    assert!(
        all.results()
            .ends_with("1 of 1 events will be tried again\n"),
        "{all:?}"
    );
    let after = ["a waiting due", "b skipped behind", "c scheduled later"];
    assert_eq!(states(&fixture.client, &fixture.contract).await, after);
    let none = fixture.parked(&["retry", "--topic", "none"]);
    assert_eq!(none.results(), "0 of 0 events will be tried again\n");
}

/// The first waiting row of each key is due, and no other.
async fn assert_heads_are_due(client: &Client) {
    let sql = "SELECT count(*) FROM (
         SELECT due_at < 'infinity' AS is_due,
                row_number() OVER (PARTITION BY relay, topic, key ORDER BY number) = 1 AS is_head
         FROM postbox.parked WHERE status = 'waiting'
     ) AS queue WHERE is_due <> is_head";
    let wrong: i64 = client.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(wrong, 0, "heads that are not due, or others that are");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn decisions_at_the_same_time_wait_for_each_other() {
    const ROUNDS: usize = 15;
    let fixture = Fixture::new().await;
    for n in 0..20 {
        let (key, dead, waiting) = (format!("k{n}"), format!("d{n}_"), format!("w{n}_"));
        let rows = [Row::new(&dead, "dead"), Row::new(&waiting, "waiting")];
        for row in rows {
            row.key(&key)
                .insert_many(&fixture.client, &fixture.contract, 20)
                .await;
        }
    }
    // Each by a different part of the keys, so that none has the rows of another in their order.
    let filters = ["d1", "w", "_1", ""].map(|part| {
        let error = (!part.is_empty()).then(|| part.to_owned());
        Filter {
            error,
            ..Filter::default()
        }
    });
    let mark = "UPDATE postbox.parked SET error = id";
    fixture.client.batch_execute(mark).await.unwrap();
    let mut tasks = Vec::new();
    for (n, filter) in filters.into_iter().enumerate() {
        let (url, contract) = (fixture.database_url.clone(), fixture.contract.clone());
        tasks.push(tokio::spawn(async move {
            let mut client = connect(&url).await;
            for _ in 0..ROUNDS {
                let decision = match n % 2 {
                    0 => Decision::Retry,
                    _ => Decision::Skip { reason: "test" },
                };
                let mut filter = filter.clone();
                if n % 2 == 0 {
                    filter.statuses = postbox::parked::Status::ALL.to_vec();
                }
                let decided = decide(&mut client, &contract, &filter, decision, "test");
                decided.await.unwrap();
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }));
    }
    for task in tasks {
        let done = tokio::time::timeout(PATIENCE, task).await;
        done.expect("decisions wait for each other without end")
            .unwrap();
    }
    assert_heads_are_due(&fixture.client).await;
    let sql = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()";
    // Statistics are told a little later.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let deadlocks: i64 = fixture.client.query_one(sql, &[]).await.unwrap().get(0);
    assert_eq!(deadlocks, 0);
}

/// A relay takes a row between our look and our lock; also where the database begins transactions
/// with one look for all their statements.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_the_relay_takes_meanwhile_is_left_as_it_is() {
    let fixture = Fixture::new().await;
    insert(&fixture, Row::head("a", "0s")).await;
    insert(&fixture, Row::new("b", "waiting")).await;
    let level = format!(
        "ALTER DATABASE {} SET default_transaction_isolation = 'repeatable read'",
        fixture.database.name()
    );
    fixture.client.batch_execute(&level).await.unwrap();
    let mut relay = connect(&fixture.database_url).await;
    let take = relay.transaction().await.unwrap();
    let taken = "UPDATE postbox.parked SET taken_at = now() WHERE id = 'a'";
    take.batch_execute(taken).await.unwrap();
    let (url, contract) = (fixture.database_url.clone(), fixture.contract.clone());
    let skipped = tokio::spawn(async move {
        let mut client = connect(&url).await;
        let filter = Filter {
            ids: vec!["a".to_owned()],
            ..Filter::default()
        };
        decide(
            &mut client,
            &contract,
            &filter,
            Decision::Skip { reason: "r" },
            "ann",
        )
        .await
    });
    let waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' \
                 AND datname = current_database())";
    crate::support::wait_until("the decision waits for the relay", async || {
        fixture.client.query_one(waits, &[]).await.unwrap().get(0)
    })
    .await;
    take.commit().await.unwrap();
    let decided = skipped.await.unwrap().unwrap();
    assert_eq!(decided.len(), 1);
    assert!(decided[0].left.is_some(), "{decided:?}");
    let before = ["a waiting due", "b waiting behind"];
    assert_eq!(states(&fixture.client, &fixture.contract).await, before);
}

/// Also where the role's transactions begin in another level.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_can_look_and_decide_and_nothing_else() {
    let fixture = Fixture::empty().await;
    let (role, url) = fixture.role("Operator").await;
    let first = fixture.setup(&["--grant-operator-to", &role]);
    let line = format!("grants to operator role \"{role}\": created\n");
    assert!(first.results().ends_with(&line), "{first:?}");
    let second = fixture.setup(&["--grant-operator-to", &role]);
    let line = format!("grants to operator role \"{role}\": already there\n");
    assert!(second.results().ends_with(&line), "{second:?}");
    let strict =
        format!("ALTER ROLE \"{role}\" SET default_transaction_isolation = 'serializable'");
    fixture.client.batch_execute(&strict).await.unwrap();

    insert(&fixture, Row::new("a", "dead")).await;
    insert(&fixture, Row::head("b", "1h")).await;
    let later = "INSERT INTO postbox.outbox (id, aggregate_type, aggregate_id, event_type, scheduled_at) \
                 VALUES ('0a6d2c9e-9a43-4f4e-8f43-1b1c70e8f5b1', 'a', 'b', 'c', now() + interval '1 h')";
    fixture.client.batch_execute(later).await.unwrap();
    for flags in [
        &["list"][..],
        &["show", "a", "--payload"],
        &["export"],
        &["retry", "a"],
        &["skip", "b", "--reason", "r"],
    ] {
        fixture.parked_as(&url, flags).results();
    }
    let expected = ["a waiting due", "b skipped behind"];
    assert_eq!(states(&fixture.client, &fixture.contract).await, expected);
    let id = "0a6d2c9e-9a43-4f4e-8f43-1b1c70e8f5b1";
    fixture.cancel_as(&url, &[id]).results();

    let operator = connect(&url).await;
    for statement in [
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type) VALUES ('a', 'b', 'c')",
        "SELECT payload FROM postbox.outbox",
        "SELECT postbox.emit('a', 'b', 'c', NULL)",
        "UPDATE postbox.parked SET message = ''",
        "UPDATE postbox.parked SET topic = 'x'",
        "UPDATE postbox.parked SET number = 1",
        "DELETE FROM postbox.parked",
        "TRUNCATE postbox.parked",
        "INSERT INTO postbox.cancellation (id) VALUES ('a')",
        "DELETE FROM postbox.cancellation",
        "UPDATE postbox.checkpoint SET lsn = NULL",
        "SELECT FROM postbox.checkpoint",
    ] {
        let refused = operator.batch_execute(statement).await.unwrap_err();
        let code = refused.code().unwrap().code();
        assert_eq!(code, "42501", "{statement}");
    }
}

/// Of two that wait for each other, Postgres ends one: here it is the decision.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_decision_that_the_relay_locks_out_is_taken_after_it() {
    let fixture = Fixture::new().await;
    fixture.end_others_at_deadlocks().await;
    for id in ["a", "b"] {
        insert(&fixture, Row::new(id, "dead").key(id)).await;
    }
    let relay = connect(&fixture.database_url).await;
    let lock = |id: &str| format!("SELECT FROM postbox.parked WHERE id = '{id}' FOR UPDATE");
    let begin = format!("SET deadlock_timeout = '10min'; BEGIN; {}", lock("b"));
    relay.batch_execute(&begin).await.unwrap();
    let mut retry = fixture.parked_command(&["retry", "--all"]);
    let retry = tokio::task::spawn_blocking(move || run(&mut retry));
    fixture.wait_for_lock().await;
    relay.batch_execute(&lock("a")).await.unwrap();
    relay.batch_execute("COMMIT").await.unwrap();
    retry.await.unwrap().results();
    let expected = ["a waiting due", "b waiting due"];
    assert_eq!(states(&fixture.client, &fixture.contract).await, expected);
}
