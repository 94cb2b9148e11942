//! Messages that the application handles by itself.

use std::collections::HashMap;

use tokio_postgres::Client;

use super::{Event, Stage};
use crate::support::{Relay, connect, wait_until};

/// Reads all of these into the table.
async fn stored(stage: &Stage, events: &[Event]) {
    stage.produce(events);
    let inbox = stage.start(&[]);
    wait_until("all are stored", async || {
        let count = stage
            .count("SELECT count(*) FROM postbox.inbox_message")
            .await;
        count == events.len() as i64
    })
    .await;
    inbox.drain().await;
}

async fn claim(stage: &Stage, client: &Client, most: i32, lease: &str) -> Vec<String> {
    let schema = &stage.fixture.contract.schema;
    let sql =
        format!("SELECT message_id FROM \"{schema}\".inbox_claim($1, $2, $3::text::interval)");
    let rows = client
        .query(&sql, &[&stage.group(), &most, &lease])
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

async fn done(stage: &Stage, client: &Client, ids: &[String]) -> i64 {
    let schema = &stage.fixture.contract.schema;
    let sql = format!("SELECT \"{schema}\".inbox_done($1, $2)");
    let row = client.query_one(&sql, &[&stage.group(), &ids]).await;
    row.unwrap().get(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_claim_at_once_are_given_each_message_once_and_keys_in_order() {
    let stage = Stage::new(2).await;
    let events: Vec<Event> = (0..1_000)
        .map(|n| Event::of(&format!("k{}", n % 25), n / 25))
        .collect();
    stored(&stage, &events).await;
    let note = "INSERT INTO effect (message_id, key, version) \
                SELECT i, split_part(i, '-', 1), split_part(i, '-', 2)::integer FROM unnest($1::text[]) AS i";
    let work = async || {
        let mut client = connect(&stage.fixture.database_url).await;
        loop {
            let ids = claim(&stage, &client, 30, "1 minute").await;
            if ids.is_empty() {
                break;
            }
            let mut versions: HashMap<String, usize> = HashMap::new();
            for id in &ids {
                let (key, version) = id.split_once('-').unwrap();
                let version = version.parse().unwrap();
                let before = versions.insert(key.to_owned(), version);
                assert!(before.is_none_or(|before| before + 1 == version), "{ids:?}");
            }
            let transaction = client.transaction().await.unwrap();
            transaction.execute(note, &[&ids]).await.unwrap();
            let sql = format!(
                "SELECT \"{}\".inbox_done($1, $2)",
                stage.fixture.contract.schema
            );
            let row = transaction.query_one(&sql, &[&stage.group(), &ids]).await;
            assert_eq!(row.unwrap().get::<_, i64>(0), ids.len() as i64);
            transaction.commit().await.unwrap();
        }
    };
    // One that finds all lanes claimed ends before the others do.
    while stage
        .count("SELECT count(*) FROM postbox.inbox_message")
        .await
        > 0
    {
        tokio::join!(work(), work(), work());
    }
    stage.assert_once_and_in_order(&events).await;
}

#[tokio::test]
async fn what_is_claimed_and_not_done_comes_again_and_is_dead_in_the_end() {
    let stage = Stage::new(1).await;
    let events: Vec<Event> = (0..3).map(|n| Event::of("k", n)).collect();
    stored(&stage, &events).await;
    let client = &stage.fixture.client;
    assert_eq!(claim(&stage, client, 10, "0").await, ["k-0", "k-1", "k-2"]);
    // It may have ended its worker: nothing else is counted with it.
    for _ in 0..5 {
        assert_eq!(claim(&stage, client, 10, "0").await, ["k-0"]);
    }
    // The seventh finds that six have come to nothing, and that the key goes on.
    assert_eq!(claim(&stage, client, 10, "1 minute").await, ["k-1", "k-2"]);
    assert!(claim(&stage, client, 10, "1 minute").await.is_empty());
    let dead = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead' AND message_id = 'k-0' \
                AND error LIKE 'claimed, and neither%'";
    assert_eq!(stage.count(dead).await, 1);
    let ids = ["k-1".to_owned(), "k-2".to_owned(), "k-9".to_owned()];
    assert_eq!(done(&stage, client, &ids).await, 2);
}

#[tokio::test]
async fn what_fails_holds_its_key_until_it_is_claimed_again() {
    let stage = Stage::new(1).await;
    let mut events: Vec<Event> = (0..3).map(|n| Event::of("k", n)).collect();
    events.push(Event::of("other", 0));
    stored(&stage, &events).await;
    let client = &stage.fixture.client;
    let schema = &stage.fixture.contract.schema;
    let fail = format!(
        "SELECT \"{schema}\".inbox_fail($1, $2, 'out of order', 3, backoff_min => '500 ms', backoff_max => '500 ms')"
    );
    let fail = async |id: &str| -> bool {
        let row = client.query_one(&fail, &[&stage.group(), &id]).await;
        row.unwrap().get(0)
    };
    for turn in 0..3 {
        let mut ids = claim(&stage, client, 10, "1 minute").await;
        ids.retain(|id| id != "other-0");
        // It comes alone, once it has failed.
        let expected: &[&str] = match turn {
            0 => &["k-0", "k-1", "k-2"],
            _ => &["k-0"],
        };
        assert_eq!(ids, expected, "{turn}");
        assert!(fail("k-0").await);
        assert!(!fail("k-7").await);
        if turn < 2 {
            assert!(
                claim(&stage, client, 10, "1 minute").await.is_empty(),
                "{turn}"
            );
        }
        wait_until("its time", async || {
            let due = "SELECT count(*) FROM postbox.inbox_message WHERE message_id = 'k-0' \
                       AND due_at <= clock_timestamp()";
            stage.count(due).await == 1
        })
        .await;
    }
    let dead = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead' AND error = 'out of order' \
                AND attempts = 3";
    assert_eq!(stage.count(dead).await, 1);
    assert_eq!(claim(&stage, client, 10, "1 minute").await, ["k-1", "k-2"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn roles_of_least_rights_consume_and_handle() {
    let stage = Stage::new(1).await;
    let (consumer, consumer_url) = stage.fixture.role("inbox").await;
    let (handler, handler_url) = stage.fixture.role("handler").await;
    let flags = [
        "--grant-inbox-to",
        &consumer,
        "--grant-handler-to",
        &handler,
    ];
    let setup = stage.fixture.setup(&flags);
    let granted = format!("grants to inbox role \"{consumer}\": created");
    assert!(setup.results().contains(&granted), "{setup:?}");
    let again = stage.fixture.setup(&flags);
    let there = granted.replace("created", "already there");
    assert!(again.results().contains(&there), "{again:?}");
    stage.produce(&[Event::of("k", 0)]);
    let inbox = Relay::spawn(
        stage
            .command(&[])
            .env("POSTBOX_DATABASE_URL", &consumer_url),
    );
    wait_until("it is stored", async || {
        stage
            .count("SELECT count(*) FROM postbox.inbox_message")
            .await
            == 1
    })
    .await;
    inbox.drain().await;
    let application = connect(&handler_url).await;
    assert_eq!(claim(&stage, &application, 1, "1 minute").await, ["k-0"]);
    assert_eq!(done(&stage, &application, &["k-0".to_owned()]).await, 1);
    let read = format!(
        "SELECT FROM \"{}\".inbox_message",
        stage.fixture.contract.schema
    );
    application.batch_execute(&read).await.unwrap_err();
}
