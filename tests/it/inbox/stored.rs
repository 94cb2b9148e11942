//! `postbox inbox list`, `show`, `retry` and `skip`.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Event, Stage};
use crate::support::{Fixture, Output, Relay, connect, run, wait_until};

impl Stage {
    fn messages(&self, flags: &[&str]) -> Output {
        self.fixture.inbox_as(&self.fixture.database_url, flags)
    }

    async fn sql(&self, sql: &str) {
        let schema = &self.fixture.contract.schema;
        let sql = sql.replace("postbox.", &format!("\"{schema}\"."));
        self.fixture.client.batch_execute(&sql).await.unwrap();
    }

    async fn poison(&self, id: &str, what: &str) {
        let poison = format!(
            "INSERT INTO poison VALUES ('{id}', '{what}') ON CONFLICT (message_id) DO UPDATE SET what = excluded.what"
        );
        self.sql(&poison).await;
    }

    /// Waits until so many have this status.
    async fn wait_for(&self, count: i64, status: &str) {
        let sql =
            format!("SELECT count(*) FROM postbox.inbox_message AS m WHERE status = '{status}'");
        wait_until(&format!("{count} are {status}"), async || {
            self.count(&sql).await == count
        })
        .await;
    }

    async fn handled(&self) -> Vec<String> {
        let effects = self.effects().await;
        effects.into_iter().map(|(id, ..)| id).collect()
    }

    /// The versions of `k` from 0 on, of which the first waits for an hour; the others are behind it.
    async fn blocked(&self, count: usize) -> Relay {
        self.poison("k-0", "raise").await;
        let events: Vec<Event> = (0..count).map(|n| Event::of("k", n)).collect();
        self.produce(&events);
        let inbox = self.start(&["--handler", "sql:handle", "--retry-backoff-min", "1h"]);
        self.wait_for(count as i64, "waiting").await;
        inbox
    }
}

fn objects(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Each message and its state, in the order of their numbers.
async fn states(fixture: &Fixture) -> String {
    let sql = format!(
        "SELECT string_agg(message_id || ' ' || status || ' ' || CASE WHEN due_at = 'infinity' THEN 'behind' \
                           WHEN due_at <= now() THEN 'due' ELSE 'later' END, '|' ORDER BY seq) \
         FROM \"{}\".inbox_message",
        fixture.contract.schema
    );
    fixture.client.query_one(&sql, &[]).await.unwrap().get(0)
}

/// One that was written as the consumer would: `id:status`, with when it is due behind it if it has a
/// time. What its id begins with is its key, and its lane.
async fn insert(fixture: &Fixture, text: &str) {
    let schema = &fixture.contract.schema;
    let (id, status) = text.split_once(':').unwrap();
    let (status, due) = match status.split_once('+') {
        None => (status, "'infinity'".to_owned()),
        Some((status, due)) => (status, format!("now() + interval '{due}'")),
    };
    let key = &id[..1];
    let sql = format!(
        "INSERT INTO \"{schema}\".inbox_source (consumer_group, topic) VALUES ('bills', 'order') ON CONFLICT DO NOTHING; \
         INSERT INTO \"{schema}\".inbox_message (source, lane, partition, kafka_offset, due_at, id, message_id, \
             status, attempts, key, event_type, headers, payload, error, decided_by) \
         SELECT s.id, ascii('{key}'), 0, 7, {due}, \"{schema}\".message_uuid('{id}'), '{id}', '{status}', 3, \
             '{key}', 'order_paid', '{{}}', '{{\"secret\":1}}', \
             CASE WHEN '{status}' = 'stored' THEN NULL ELSE 'no such order' END, \
             CASE WHEN '{status}' = 'skipped' THEN 'ann' END \
         FROM \"{schema}\".inbox_source AS s WHERE s.consumer_group = 'bills'"
    );
    fixture.client.batch_execute(&sql).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_letter_is_seen_and_tried_again_from_the_first_attempt_on() {
    let stage = Stage::new(1).await;
    stage.poison("k-1", "raise").await;
    stage.produce(&[Event::of("k", 0), Event::of("k", 1), Event::of("k", 2)]);
    let inbox = stage.handling(&["--max-attempts", "2"]);
    stage.wait_for(1, "dead").await;
    stage.wait_for_effects(2).await;

    let listed = stage.messages(&["list"]);
    let lines: Vec<&str> = listed.results().lines().collect();
    assert!(
        lines[0].starts_with("ID   STATUS  RECEIVED  TRIES  DUE  TOPIC"),
        "{listed:?}"
    );
    assert!(lines[1].starts_with("k-1  dead    "), "{listed:?}");
    assert!(lines[2].starts_with("  poisoned k-1"), "{listed:?}");
    assert_eq!(lines.len(), 3);
    let shown = stage.messages(&["show", "k-1"]);
    for text in [
        "message k-1\n",
        "\n  partition    0\n",
        "\n  offset       1\n",
        "\n  attempts     2\n",
        "\n    payload  (14 bytes: --payload shows them)\n",
        "\n    body     NULL\n",
    ] {
        assert!(shown.results().contains(text), "{text:?} in {shown:?}");
    }
    let shown = stage.messages(&["show", "k-1", "--payload", "--output", "json"]);
    let shown = &objects(shown.results())[0];
    assert_eq!(shown["columns"]["payload"], "{\"version\": 1}");
    assert_eq!(shown["group"], stage.group());
    assert_eq!(
        (&shown["offset"], &shown["key"], &shown["status"]),
        (&1.into(), &"k".into(), &"dead".into())
    );

    // In vain: as often as before.
    let retry = ["retry", "k-1", "--by", "ann"];
    let retried = stage.messages(&retry);
    assert!(
        retried
            .results()
            .ends_with("1 of 1 messages will be tried again\n"),
        "{retried:?}"
    );
    let dead_again = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead' AND attempts = 2 \
                      AND decided_by = 'ann' AND reason IS NULL";
    wait_until("it is dead again", async || {
        stage.count(dead_again).await == 1
    })
    .await;
    stage.sql("TRUNCATE poison").await;
    let begun = Instant::now();
    stage.messages(&retry).results();
    stage.wait_for_effects(3).await;
    assert!(begun.elapsed() < Duration::from_secs(5));
    stage.wait_for(0, "waiting").await;
    assert_eq!(stage.handled().await, ["k-0", "k-2", "k-1"]);
    inbox.drain().await;
    let gone = stage.messages(&["retry", "k-1"]);
    assert!(
        gone.complaint(2)
            .starts_with("error: no message \"k-1\" is in the inbox of schema"),
        "{gone:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_behind_a_message_goes_on_once_it_is_skipped() {
    let stage = Stage::new(1).await;
    let inbox = stage.blocked(3).await;
    let begun = Instant::now();
    let skip = ["skip", "k-0", "--reason", "no such order", "--by", "ann"];
    let skipped = stage.messages(&skip);
    assert!(
        skipped.results().ends_with("1 of 1 messages are skipped\n"),
        "{skipped:?}"
    );
    stage.wait_for_effects(2).await;
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(stage.handled().await, ["k-1", "k-2"]);
    let table = stage.messages(&["list", "--status", "skipped"]);
    let why = "\n  skipped by ann: no such order\n";
    assert!(table.results().contains(why), "{table:?}");
    let again = stage.messages(&skip);
    assert_eq!(again.code, 3);
    assert!(again.stderr.ends_with("1 skipped already\n"), "{again:?}");
    // Nothing holds the key.
    stage.produce(&[Event::of("k", 3)]);
    stage.wait_for_effects(3).await;
    // Taken back.
    stage.sql("TRUNCATE poison").await;
    stage.messages(&["retry", "--status", "skipped"]).results();
    stage.wait_for_effects(4).await;
    assert_eq!(stage.handled().await, ["k-1", "k-2", "k-3", "k-0"]);
    inbox.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_is_tried_at_once_and_in_its_order() {
    let stage = Stage::new(1).await;
    let inbox = stage.blocked(3).await;
    stage.sql("TRUNCATE poison").await;
    stage.messages(&["retry", "--all"]).results();
    stage.wait_for_effects(3).await;
    assert_eq!(stage.handled().await, ["k-0", "k-1", "k-2"]);
    inbox.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_was_given_up_comes_before_those_of_its_key_that_still_wait() {
    let stage = Stage::new(1).await;
    let inbox = stage.blocked(3).await;
    stage.messages(&["skip", "k-0", "--reason", "r"]).results();
    stage.wait_for_effects(2).await;
    stage.poison("k-3", "raise").await;
    stage.produce(&[Event::of("k", 3), Event::of("k", 4)]);
    stage.wait_for(2, "waiting").await;
    stage.sql("TRUNCATE poison").await;
    // Nobody has to say that those behind it go on.
    stage.messages(&["retry", "k-0"]).results();
    stage.wait_for_effects(5).await;
    let expected = ["k-1", "k-2", "k-0", "k-3", "k-4"];
    assert_eq!(stage.handled().await, expected);
    inbox.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_being_handled_is_left_as_it_is() {
    let stage = Stage::new(1).await;
    let inbox = stage.blocked(2).await;
    stage.poison("other-0", "raise").await;
    stage.produce(&[Event::of("other", 0)]);
    stage.wait_for(3, "waiting").await;
    stage.poison("k-0", "hang").await;
    stage.messages(&["retry", "k-0"]).results();
    let sleeps =
        "FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()";
    wait_until("it is at work", async || {
        stage.count(&format!("SELECT count(*) {sleeps}")).await == 1
    })
    .await;
    for command in [&["retry", "k-0"][..], &["skip", "k-0", "--reason", "r"]] {
        let begun = Instant::now();
        let left = stage.messages(command);
        assert_eq!(left.code, 3, "{left:?}");
        let why = "1 of 1 messages were left as they are: 1 being handled just now: look again in a minute\n";
        assert!(left.stderr.ends_with(why), "{left:?}");
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
    let others = stage.messages(&["skip", "other-0", "--reason", "r", "--output", "json"]);
    let others = &objects(others.results())[0];
    assert_eq!(
        (&others["outcome"], &others["left_because"]),
        (&"skipped".into(), &Value::Null)
    );
    // What is cancelled with others is tried once more, alone.
    wait_until("it is skipped", async || {
        stage
            .sql(&format!("SELECT pg_cancel_backend(pid) {sleeps}"))
            .await;
        let skipped = stage.messages(&["skip", "k-0", "--reason", "r"]);
        skipped.code == 0
    })
    .await;
    stage.wait_for_effects(1).await;
    assert_eq!(
        states(&stage.fixture).await,
        "k-0 skipped behind|other-0 skipped behind"
    );
    inbox.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_application_has_given_up_is_given_back_to_it() {
    let stage = Stage::new(1).await;
    stage.produce(&[Event::of("k", 0), Event::of("k", 1), Event::of("k", 2)]);
    let inbox = stage.start(&[]);
    stage.wait_for(3, "stored").await;
    let group = stage.group();
    let claim = format!(
        "SELECT count(*) FROM postbox.inbox_claim('{group}', 1, '1 hour') AS c WHERE c.message_id = "
    );
    assert_eq!(stage.count(&format!("{claim}'k-0'")).await, 1);
    let table = stage.messages(&["list", "--status", "stored"]);
    assert!(table.results().contains(" claimed "), "{table:?}");
    for command in [&["retry", "k-0"][..], &["skip", "k-0", "--reason", "r"]] {
        let left = stage.messages(command);
        assert_eq!(left.code, 3, "{left:?}");
        let why = "1 claimed by the application: look again when its lease is over\n";
        assert!(left.stderr.ends_with(why), "{left:?}");
    }
    // What has failed is nobody's: it need not wait for its time.
    let fail =
        format!("SELECT postbox.inbox_fail('{group}', 'k-0', 'no', 2, backoff_min => '1 hour')");
    stage.sql(&fail).await;
    stage.messages(&["retry", "k-0"]).results();
    assert_eq!(stage.count(&format!("{claim}'k-0'")).await, 1);
    stage.sql(&fail.replace("', 2,", "', 1,")).await;
    stage.wait_for(1, "dead").await;
    stage.messages(&["retry", "k-0"]).results();
    stage.wait_for(3, "stored").await;
    let again =
        "SELECT count(*) FROM postbox.inbox_message WHERE message_id = 'k-0' AND attempts = 0";
    assert_eq!(stage.count(again).await, 1);
    // In its place, and the next of its key once it is skipped.
    assert_eq!(stage.count(&format!("{claim}'k-0'")).await, 1);
    stage.sql(&fail.replace("', 2,", "', 5,")).await;
    stage.messages(&["skip", "k-0", "--reason", "r"]).results();
    assert_eq!(stage.count(&format!("{claim}'k-1'")).await, 1);
    inbox.drain().await;
}

/// Without a consumer: those of the key, a command, and what becomes of each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_key_the_first_that_waits_is_due_wherever_the_decision_falls() {
    let fixture = Fixture::new().await;
    let clear = format!("TRUNCATE \"{}\".inbox_message", fixture.contract.schema);
    for (messages, command, ids, expected) in [
        (
            "a1:dead a2:waiting+1h a3:waiting",
            "retry",
            "a1",
            "a1 waiting due|a2 waiting behind|a3 waiting behind",
        ),
        (
            "a1:waiting+1h a2:dead",
            "retry",
            "a2",
            "a1 waiting later|a2 waiting behind",
        ),
        (
            "a1:waiting+1h a2:waiting",
            "retry",
            "a1",
            "a1 waiting due|a2 waiting behind",
        ),
        (
            "a1:dead a2:skipped",
            "retry",
            "a1 a2",
            "a1 waiting due|a2 waiting behind",
        ),
        (
            "a1:waiting+1h a2:waiting a3:waiting",
            "skip",
            "a1 a2",
            "a1 skipped behind|a2 skipped behind|a3 waiting due",
        ),
        (
            "a1:waiting+1h a2:waiting",
            "skip",
            "a2",
            "a1 waiting later|a2 skipped behind",
        ),
        // Others have lanes of their own.
        (
            "a1:dead b1:waiting+1h b2:waiting",
            "retry",
            "a1",
            "a1 waiting due|b1 waiting later|b2 waiting behind",
        ),
        // The application's is claimed again at once.
        (
            "a1:stored+1h a2:stored+1h",
            "retry",
            "a1",
            "a1 stored due|a2 stored later",
        ),
    ] {
        for message in messages.split(' ') {
            insert(&fixture, message).await;
        }
        let mut flags = vec![command];
        if command == "skip" {
            flags.extend(["--reason", "r"]);
        }
        flags.extend(ids.split(' '));
        let before = states(&fixture).await;
        let dry = [&flags[..], &["--dry-run"]].concat();
        let dry = fixture.inbox_as(&fixture.database_url, &dry);
        assert!(
            dry.results().ends_with("; nothing was changed\n"),
            "{dry:?}"
        );
        assert_eq!(states(&fixture).await, before);
        fixture.inbox_as(&fixture.database_url, &flags).results();
        assert_eq!(states(&fixture).await, expected, "{messages}: {flags:?}");
        fixture.client.batch_execute(&clear).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_filter_leaves_the_messages_that_fit() {
    let fixture = Fixture::new().await;
    for message in [
        "a1:waiting+1h",
        "a2:waiting",
        "b1:dead",
        "c1:stored+0s",
        "d1:skipped",
    ] {
        insert(&fixture, message).await;
    }
    let schema = &fixture.contract.schema;
    let change = format!(
        "UPDATE \"{schema}\".inbox_message SET received_at = now() - interval '2 h', event_type = 'lost', \
         error = '100%_no', payload = NULL, body = '\\x00ff' WHERE message_id = 'b1'"
    );
    fixture.client.batch_execute(&change).await.unwrap();
    let inbox = |flags: &[&str]| fixture.inbox_as(&fixture.database_url, flags);
    for (flags, expected) in [
        (&[][..], "a1 a2 b1"),
        (&["--group", "bills"], "a1 a2 b1"),
        (&["--group", "mails"], ""),
        (&["--topic", "order", "--status", "dead"], "b1"),
        (&["--topic", "bill"], ""),
        (&["--status", "stored,skipped"], "c1 d1"),
        (&["--key", "a"], "a1 a2"),
        (&["--type", "lost"], "b1"),
        (&["--error", "0%_"], "b1"),
        (&["--older-than", "1h"], "b1"),
        (&["c1", "a2"], "a2 c1"),
    ] {
        let output = inbox(&[&["list", "--output", "json"], flags].concat());
        let found = objects(output.results());
        let ids: Vec<_> = found
            .iter()
            .map(|one| one["id"].as_str().unwrap())
            .collect();
        assert_eq!(ids.join(" "), expected, "{flags:?}");
    }
    let first = inbox(&["list", "--limit", "1"]);
    assert_eq!(first.stderr, "2 more: --limit lists them too\n");
    assert_eq!(first.code, 0);
    let shown = inbox(&["show", "b1", "--payload", "--output", "json"]);
    let shown = &objects(shown.results())[0];
    assert_eq!(shown["columns"]["body"]["hex"], "00ff");
    assert_eq!(shown["columns"]["payload"], Value::Null);
    let hidden = inbox(&["show", "b1", "--output", "json"]);
    let hidden = &objects(hidden.results())[0];
    assert_eq!(
        hidden["hidden"],
        Value::from(vec!["headers", "payload", "body"])
    );
    for flags in [
        &["show", "a1"][..],
        &["list"],
        &["retry", "a1", "--dry-run"],
    ] {
        assert!(!inbox(flags).results().contains("secret"), "{flags:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_command_is_said_and_nothing_is_changed() {
    let fixture = Fixture::new().await;
    for message in ["a1:dead", "b1:stored+0s", "c1:skipped"] {
        insert(&fixture, message).await;
    }
    let before = states(&fixture).await;
    let inbox = |flags: &[&str]| fixture.inbox_as(&fixture.database_url, flags);
    for (flags, expected) in [
        (
            &["retry"][..],
            "error: say which messages: ids, a flag such as --topic or --status, or --all\n",
        ),
        (&["skip", "--reason", "r"], "error: say which messages"),
        (&["skip", "--all"], "--reason <TEXT>"),
        (&["skip", "--all", "--reason", " "], "--reason: say why"),
        (&["retry", "a1", "--by", ""], "--by: say who decides"),
        (
            &["retry", "a1", "--status", "scheduled"],
            "[possible values: stored, waiting, dead, skipped]",
        ),
        (
            &["retry", "a1", "x\ny", "z"],
            "error: no message \"x\\ny\" is in the inbox of schema",
        ),
        (
            &["retry", "x", "z"],
            ", nor with 1 others of the ids: it may have been handled",
        ),
        (
            &["retry", "a1", "--group", "mails"],
            "error: no message \"a1\"",
        ),
        (&["show"], "<ID>..."),
        (&["show", "x"], "error: no message \"x\""),
        (&["drop"], "unrecognized subcommand 'drop'"),
        (&["list", "--limit", "0"], "'--limit <ROWS>'"),
        // What is the consumer's own.
        (&["--group", "bills", "list"], "'--group <NAME>'"),
        (&["list", "--handler", "none"], "'--handler'"),
        (&["list", "--topics", "order"], "'--topics'"),
    ] {
        let output = inbox(flags);
        let complaint = output.complaint(2);
        assert!(complaint.contains(expected), "{flags:?}: {complaint}");
    }
    assert_eq!(states(&fixture).await, before);
    // The consumer still needs what it needs.
    let bare = run(crate::support::postbox(&["inbox"]).args(["--group", "g"]));
    for flag in ["--brokers <LIST>", "--topics <LIST>"] {
        assert!(bare.complaint(2).contains(flag), "{bare:?}");
    }
    // Variables of a consumer hinder nobody.
    let mut list = crate::support::postbox(&["inbox", "list", "--output", "json"]);
    list.env("POSTBOX_GROUP", "bills")
        .env("POSTBOX_BROKERS", "nowhere:1")
        .env("POSTBOX_HANDLER", "sql:f")
        .env("POSTBOX_SCHEMA", &fixture.contract.schema)
        .env("POSTBOX_DATABASE_URL", &fixture.database_url);
    assert_eq!(objects(run(&mut list).results()).len(), 1);
    let empty = Fixture::empty().await;
    let output = empty.inbox_as(&empty.database_url, &["list"]);
    let mend = "run `postbox setup`";
    assert!(output.complaint(3).contains(mend), "{output:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_operator_decides_about_messages_and_does_nothing_else() {
    let fixture = Fixture::new().await;
    for message in ["a1:dead", "b1:waiting+1h"] {
        insert(&fixture, message).await;
    }
    let (role, url) = fixture.role("operator").await;
    let refused = fixture.inbox_as(&url, &["list"]);
    let mend = "`postbox setup --grant-operator-to ROLE`, run by the owner, gives the right to";
    assert!(refused.complaint(6).contains(mend), "{refused:?}");
    fixture.setup(&["--grant-operator-to", &role]).results();
    for flags in [
        &["list"][..],
        &["show", "a1", "--payload"],
        &["retry", "a1"],
        &["skip", "b1", "--reason", "r"],
    ] {
        fixture.inbox_as(&url, flags).results();
    }
    assert_eq!(states(&fixture).await, "a1 waiting due|b1 skipped behind");
    let operator = connect(&url).await;
    for statement in [
        "DELETE FROM postbox.inbox_message",
        "UPDATE postbox.inbox_message SET payload = NULL",
        "UPDATE postbox.inbox_message SET seq = DEFAULT",
        "SELECT FROM postbox.inbox",
        "SELECT FROM postbox.inbox_offset",
        "SELECT FROM postbox.inbox_claim('bills', 1)",
    ] {
        let schema = format!("\"{}\".", fixture.contract.schema);
        let statement = statement.replace("postbox.", &schema);
        let refused = operator.batch_execute(&statement).await.unwrap_err();
        assert_eq!(refused.code().unwrap().code(), "42501", "{statement}");
    }
}
