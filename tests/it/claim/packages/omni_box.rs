//! omni-box: what it makes and writes, what it reads, and its workers and tools beside our
//! relay.

use std::time::{Duration, Instant};

use postbox::oracle;
use serde_json::{Value, json};

use super::Package;
use crate::claim::crash::REPEATED_MAX;
use crate::claim::{OMNI_BOX, claiming};
use crate::support::{Fixture, Relay, SMALL_WINDOW, wait_until};

const PACKAGE: Package = Package {
    name: "omni-box",
    script: "omni-box.py",
};

/// What the catalog says of a table: columns, constraints and indexes.
const SHAPE: &str = "\
    SELECT a.attname || ' ' || format_type(a.atttypid, a.atttypmod) || ' ' || a.attnotnull || ' ' \
           || coalesce(pg_get_expr(d.adbin, d.adrelid), '') AS line \
    FROM pg_attribute AS a LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
    WHERE a.attrelid = $1::text::regclass AND a.attnum > 0 AND NOT a.attisdropped \
    UNION ALL \
    SELECT conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint \
    WHERE conrelid = $1::text::regclass AND contype <> 'n' \
    UNION ALL \
    SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename = $1 \
    ORDER BY line";

pub(super) async fn shape(fixture: &Fixture, table: &str) -> Vec<String> {
    let rows = fixture.client.query(SHAPE, &[&table]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

/// Its table, as it makes it, through which the oracle writes. Nothing where there is no
/// omni-box.
async fn made_by_omni_box() -> Option<Fixture> {
    if !PACKAGE.is_there() {
        return None;
    }
    let fixture = Fixture::empty().await;
    make(&fixture).await;
    Some(fixture)
}

async fn make(fixture: &Fixture) {
    PACKAGE.ask(fixture, &["create"]);
    let copy = include_str!("../omni_box.sql");
    let view = &copy[copy.find("CREATE SCHEMA").unwrap()..];
    fixture.client.batch_execute(view).await.unwrap();
    oracle::prepare(&fixture.client, "postbox").await.unwrap();
}

async fn execute(fixture: &Fixture, sql: &str) -> u64 {
    fixture.client.execute(sql, &[]).await.unwrap()
}

async fn ids(fixture: &Fixture, what: &str) -> Vec<String> {
    let sql = format!("SELECT id::text FROM outbox_events WHERE {what} ORDER BY created_at, id");
    let rows = fixture.client.query(&sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_copy_of_its_table_is_what_it_makes() {
    let Some(made) = made_by_omni_box().await else {
        return;
    };
    let ours = Fixture::omni_box().await;
    let table = "outbox_events";
    let expected = shape(&made, table).await;
    assert_eq!(expected.len(), 23 + 4 + 8, "{expected:#?}");
    assert_eq!(shape(&ours, table).await, expected);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_its_partitioned_class_go_out() {
    if !PACKAGE.is_there() {
        return;
    }
    let fixture = Fixture::empty().await;
    let ask = |arguments: &[&str]| -> Value {
        let mut command = PACKAGE.command(&fixture, arguments);
        let output = crate::support::run(command.env("PARTITIONED", "yes"));
        assert_eq!(output.code, 0, "{arguments:?}: {}", output.stderr);
        serde_json::from_str(&output.stdout).unwrap()
    };
    ask(&["create"]);
    let partitions = "CREATE TABLE old PARTITION OF outbox_events_partitioned FOR VALUES FROM (MINVALUE) TO (now() - interval '1 day'); \
                      CREATE TABLE new PARTITION OF outbox_events_partitioned FOR VALUES FROM (now() - interval '1 day') TO (MAXVALUE)";
    fixture.client.batch_execute(partitions).await.unwrap();
    let written = ask(&["write", &fixture.topic]);
    let spread = "UPDATE outbox_events_partitioned SET created_at = created_at - interval '2 days' WHERE partition_key = 'c'";
    assert_eq!(execute(&fixture, spread).await, 2);
    let relay = claiming(&fixture, &["--table", "outbox_events_partitioned"]).await;
    let due = written["due"].as_array().unwrap().len();
    wait_until("all are delivered", async || {
        fixture.keys().await.len() == due
    })
    .await;
    relay.drain().await;
    let expected = json!({"states": {"completed": due, "pending": 1}, "refused": []});
    assert_eq!(ask(&["read_back"]), expected);
}

/// The same rows by both, one after the other, in each of its converters: what its
/// consumer makes of our records is what it makes of its own, also of old rows. Ours have an
/// `id` in the envelope besides.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_records_are_those_of_its_publisher() {
    let Some(fixture) = made_by_omni_box().await else {
        return;
    };
    let written = PACKAGE.ask(&fixture, &["write", &fixture.topic]);
    let due = written["due"].as_array().unwrap().len();
    // As few fraction digits as there are.
    let whole = "UPDATE outbox_events SET created_at = date_trunc('second', created_at) - interval '1 day' WHERE partition_key = 'b'";
    assert_eq!(execute(&fixture, whole).await, 1);
    for format in ["raw", "versioned", "envelope"] {
        let [ours, theirs] =
            ["ours", "theirs"].map(|whose| format!("{}-{format}-{whose}", fixture.topic));
        let again = |topic: &str| {
            format!(
                "UPDATE outbox_events SET status = 'pending', completed_at = NULL, topic = '{topic}'"
            )
        };
        execute(&fixture, &again(&ours)).await;
        let relay = claiming(&fixture, &["--format", format]).await;
        wait_until("all are delivered", async || {
            fixture.rows_that_are("status = 'completed'").await as usize == due
        })
        .await;
        relay.drain().await;
        execute(&fixture, &again(&theirs)).await;
        assert_eq!(PACKAGE.ask(&fixture, &["publish", format]), due);
        let [ours, theirs] = [ours, theirs].map(|topic| {
            let records = PACKAGE.ask(&fixture, &["read", &topic, &due.to_string()]);
            by_id(records, &topic)
        });
        for ((id, mut ours), (_, theirs)) in ours.into_iter().zip(theirs) {
            if format == "envelope" {
                let own = ours["value"].as_object_mut().unwrap().remove("id");
                assert_eq!(own, Some(json!(id)));
            }
            assert_eq!(ours, theirs, "{format}");
        }
    }
    let later = written["later"][0].as_str().unwrap();
    assert_eq!(
        ids(&fixture, "attempts_made = 0 AND status = 'pending'").await,
        [later]
    );
}

/// Records by the event's id, without the name of their topic.
fn by_id(records: Value, topic: &str) -> std::collections::BTreeMap<String, Value> {
    let Value::Array(records) = records else {
        panic!("{records}")
    };
    let by_id = records.into_iter().map(|mut record| {
        let headers = record["headers"].as_array().unwrap();
        let id = headers
            .iter()
            .find(|header| header[0] == "event_id")
            .unwrap()[1]
            .clone();
        let source = &mut record["message"]["source"];
        if source == topic {
            *source = json!("its topic");
        }
        (id.as_str().unwrap().to_owned(), record)
    });
    by_id.collect()
}

/// Notes each row that is completed, and by whom.
const COMPLETIONS: &str = "\
    CREATE TABLE completion (id uuid, worker text); \
    CREATE FUNCTION complete() RETURNS trigger LANGUAGE plpgsql AS $$ \
    BEGIN INSERT INTO completion VALUES (NEW.id, OLD.locked_by); RETURN NEW; END $$; \
    CREATE TRIGGER complete AFTER UPDATE ON outbox_events FOR EACH ROW \
    WHEN (NEW.status = 'completed') EXECUTE FUNCTION complete()";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_workers_and_our_relay_share_a_table() {
    let Some(fixture) = made_by_omni_box().await else {
        return;
    };
    fixture.client.batch_execute(COMPLETIONS).await.unwrap();
    let theirs = PACKAGE.start(&fixture, &["work", "3", "50"], "working");
    let theirs = theirs.await;
    let writers = fixture.writers(fixture.steady_load());
    let relay = claiming(&fixture, &[]).await;
    let shares = "SELECT count(*), count(DISTINCT id), count(*) FILTER (WHERE worker LIKE 'theirs%') FROM completion";
    let shares = async || {
        let row = fixture.client.query_one(shares, &[]).await.unwrap();
        [0, 1, 2].map(|column| row.get::<_, i64>(column) as usize)
    };
    wait_until("each has a share", async || {
        let [_, rows, of_theirs] = shares().await;
        of_theirs > 100 && rows - of_theirs > 1_000
    })
    .await;
    writers.stop().await.unwrap();
    fixture.wait_until_completed().await;
    theirs.drain().await;
    let verdict = fixture.judge_claims(relay).await;
    let [completions, rows, of_theirs] = shares().await;
    println!("{of_theirs} of {rows} rows are theirs: {verdict}");
    assert!(verdict.is_clean(0), "{verdict}");
    assert_eq!((completions, rows), (verdict.committed, verdict.committed));
    let expected = json!({"states": {"completed": rows}, "refused": []});
    assert_eq!(PACKAGE.ask(&fixture, &["read_back"]), expected);
}

/// They take a claim of ours for dead after seconds, as it looks minutes old to them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_workers_take_over_from_our_killed_relay() {
    let Some(fixture) = made_by_omni_box().await else {
        return;
    };
    let mut command = Relay::command(&fixture, &OMNI_BOX);
    let relay = Relay::spawn(command.env("FAILPOINTS", "completing=pause"));
    fixture.insert_many("a", "{\"n\": 1}", 5).await;
    wait_until("all are claimed", async || {
        fixture.rows_that_are("locked_by IS NOT NULL").await == 5
    })
    .await;
    relay.kill();
    let since = Instant::now();
    let theirs = PACKAGE.start(&fixture, &["work", "1", "100"], "working");
    let theirs = theirs.await;
    fixture.wait_until_completed().await;
    assert!(since.elapsed() < Duration::from_secs(30));
    theirs.drain().await;
    fixture.enter_payloads_in_ledger().await;
    let verdict = fixture.verdict().await;
    assert!(verdict.committed == 5 && verdict.is_clean(5), "{verdict}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kills_of_both_lose_nothing() {
    const ROUNDS: usize = 3;
    let Some(fixture) = made_by_omni_box().await else {
        return;
    };
    let writers = fixture.writers(fixture.steady_load());
    for _ in 0..ROUNDS {
        let theirs = PACKAGE.start(&fixture, &["work", "2", "50"], "working");
        let theirs = theirs.await;
        let relay = claiming(&fixture, &SMALL_WINDOW).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        relay.kill();
        theirs.kill();
    }
    writers.stop().await.unwrap();
    let relay = claiming(&fixture, &[]).await;
    let verdict = fixture.judge_claims(relay).await;
    let repeated_max = ROUNDS * (REPEATED_MAX + 2 * 50);
    println!("repeated at most {repeated_max}: {verdict}");
    assert!(verdict.is_clean(repeated_max), "{verdict}");
    let expected = json!({"states": {"completed": verdict.committed}, "refused": []});
    assert_eq!(PACKAGE.ask(&fixture, &["read_back"]), expected);
}

/// What it repeats is what it had sent of its batch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_of_a_killed_worker_goes_out() {
    let Some(fixture) = made_by_omni_box().await else {
        return;
    };
    fixture.omni_box_backlog(20_000, 10_000).await;
    let working = PACKAGE
        .start(&fixture, &["work", "1", "500"], "working")
        .await;
    // It is amid the next batch then, and far from the last.
    wait_until("it has completed a batch", async || {
        fixture.rows_that_are("status = 'completed'").await > 0
    })
    .await;
    working.kill();
    let locks = "SELECT count(*) FROM pg_locks WHERE relation = 'outbox_events'::regclass";
    wait_until("its session is over", async || {
        let row = fixture.client.query_one(locks, &[]).await.unwrap();
        row.get::<_, i64>(0) == 0
    })
    .await;
    // A worker that commits its locks before it sends leaves them.
    let holding = PACKAGE
        .start(&fixture, &["hold", "300"], "holding 300")
        .await;
    holding.kill();
    let relay = claiming(&fixture, &[]).await;
    let held = "status = 'pending' AND locked_by = 'theirs'";
    wait_until(
        "all but those of the keys that it holds are delivered",
        async || fixture.rows_that_are("status = 'pending'").await <= 600,
    )
    .await;
    assert_eq!(fixture.rows_that_are(held).await, 300);
    let late =
        format!("UPDATE outbox_events SET locked_at = now() - interval '301 s' WHERE {held}");
    assert_eq!(execute(&fixture, &late).await, 300);
    let verdict = fixture.judge_claims(relay).await;
    assert!(
        verdict.committed == 20_000 && verdict.is_clean(500),
        "{verdict}"
    );
}

/// It checks each row that it reads, and a row that it refuses ends each batch of its
/// workers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_reads_each_row_that_we_have_written() {
    let Some(fixture) = made_by_omni_box().await else {
        return;
    };
    for key in ["good", "ahead"] {
        fixture.insert(key, "{\"n\": 1}").await;
    }
    let spoilt = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
                  SELECT 'not a topic ' || repeat('ü', 200), key, 'changed', '{\"n\": 1}' \
                  FROM unnest(ARRAY['put off', 'last', 'old', 'ahead of it']) AS key";
    execute(&fixture, spoilt).await;
    for (change, key) in [
        // Clocks that differ by as much as it allows.
        ("created_at = now() + interval '59 s'", "ahead"),
        ("created_at = now() + interval '59 s'", "ahead of it"),
        ("attempts_made = 5", "last"),
        // When a row is tried again is at most a year after it was made.
        ("created_at = now() - interval '365 days'", "old"),
    ] {
        let change = format!("UPDATE outbox_events SET {change} WHERE partition_key = '{key}'");
        assert_eq!(execute(&fixture, &change).await, 1);
    }
    let relay = claiming(&fixture, &[]).await;
    wait_until("each is tried", async || {
        fixture
            .rows_that_are("attempts_made > 0 OR status = 'completed'")
            .await
            == 6
    })
    .await;
    relay.drain().await;
    let read_back = || PACKAGE.ask(&fixture, &["read_back"]);
    let answer = read_back();
    assert_eq!(answer["refused"], json!([]));
    assert_eq!(answer["states"]["completed"], 2);
    // One that is claimed, for as long as this takes.
    let mut command = Relay::command(&fixture, &OMNI_BOX);
    let relay = Relay::spawn(command.env("FAILPOINTS", "completing=pause"));
    fixture.insert("claimed", "{\"n\": 1}").await;
    wait_until("it is claimed", async || {
        fixture.rows_that_are("locked_by IS NOT NULL").await == 1
    })
    .await;
    let answer = read_back();
    assert_eq!(answer["refused"], json!([]));
    // Another may be tried again by then.
    assert!(answer["states"]["pending, locked"].as_u64() >= Some(1));
    relay.kill();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_maintenance_works_beside_our_relay() {
    if !PACKAGE.is_there() {
        return;
    }
    let mut fixture = Fixture::with_servers(&[], &[]).await;
    let drop = "DROP SCHEMA postbox CASCADE; DROP SCHEMA postbox_oracle CASCADE";
    fixture.client.batch_execute(drop).await.unwrap();
    make(&fixture).await;
    let relay = claiming(&fixture, &[]).await;
    fixture.insert("old", "{}").await;
    fixture.wait_until_completed().await;
    let old = "UPDATE outbox_events SET created_at = created_at - interval '3 days', \
               scheduled_at = scheduled_at - interval '3 days', completed_at = completed_at - interval '2 days'";
    assert_eq!(execute(&fixture, old).await, 1);
    assert_eq!(PACKAGE.ask(&fixture, &["cleanup_old_events", "1"]), 1);

    // What is claimed and alive is not taken for stale.
    fixture.kafka("pause");
    fixture.insert_many("a", "{\"n\": 1}", 5).await;
    wait_until("all are claimed", async || {
        fixture.rows_that_are("locked_by IS NOT NULL").await == 5
    })
    .await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!(PACKAGE.ask(&fixture, &["release_stale_locks", "300"]), 0);
    // What is unlocked by force is claimed again.
    let claimed = ids(&fixture, "locked_by IS NOT NULL").await;
    assert_eq!(PACKAGE.ask(&fixture, &["force_unlock", &claimed[1]]), true);
    fixture.kafka("resume");

    // What has failed goes out once it can, and is asked for.
    let last = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
                VALUES ('not a topic', 'b', 'changed', '{\"n\": 1}'); \
                UPDATE outbox_events SET attempts_made = 5 WHERE partition_key = 'b'";
    fixture.client.batch_execute(last).await.unwrap();
    wait_until("it has failed", async || {
        fixture.rows_that_are("status = 'failed'").await == 1
    })
    .await;
    let mend = format!(
        "UPDATE outbox_events SET topic = '{}' WHERE status = 'failed'",
        fixture.topic
    );
    execute(&fixture, &mend).await;
    let failed = ids(&fixture, "status = 'failed'").await;
    assert_eq!(PACKAGE.ask(&fixture, &["requeue_failed", &failed[0]]), true);
    fixture.wait_until_completed().await;
    fixture.enter_payloads_in_ledger().await;
    let verdict = fixture.judge_claims(relay).await;
    // The one that was completed and is gone is not in the ledger.
    assert!(
        verdict.lost.is_empty() && verdict.inversions.is_empty(),
        "{verdict}"
    );
    assert_eq!(
        (verdict.committed, verdict.ghosts.len()),
        (6, 1),
        "{verdict}"
    );
    let expected = json!({"states": {"completed": 6}, "refused": []});
    assert_eq!(PACKAGE.ask(&fixture, &["read_back"]), expected);
}
