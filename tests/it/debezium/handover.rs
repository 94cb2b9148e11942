//! Debezium stops, and our relay goes on from its slot, while events are written.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use postbox::contract::Contract;
use postbox::oracle::{self, Load, Reader, Seen};
use postbox::pgoutput::{self, Message, Value};
use uuid::Uuid;

use super::{debezium, fixture, relay, set_up};
use crate::support::{Fixture, PATIENCE, wait_until};

/// Its default table, and a view of it by which the oracle writes.
const TABLES: &str = "
    CREATE TABLE outbox (
        id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL, aggregateid varchar(255) NOT NULL,
        type varchar(255) NOT NULL, payload jsonb
    );
    CREATE SCHEMA shop;
    CREATE VIEW shop.outbox AS SELECT id, aggregatetype AS aggregate_type, aggregateid AS aggregate_id,
                                      type AS event_type, payload FROM public.outbox;
    ALTER VIEW shop.outbox ALTER COLUMN id SET DEFAULT gen_random_uuid();";

/// All records of the test's topic.
async fn records(fixture: &Fixture) -> Vec<Seen> {
    let kafka = fixture.kafka_settings();
    let topic = format!("outbox.event.{}", fixture.topic);
    let read = tokio::task::spawn_blocking(move || {
        Reader::open(&kafka, &topic, Instant::now() + PATIENCE)?.read_to_end()
    });
    read.await.unwrap().unwrap()
}

/// The ids of the events that the slot still has, as nobody has confirmed them.
async fn unconfirmed(fixture: &Fixture) -> HashSet<Uuid> {
    let sql = "SELECT data FROM pg_logical_slot_peek_binary_changes('debezium', NULL, NULL, \
               'proto_version', '1', 'publication_names', 'dbz_publication')";
    let mut outbox = None;
    let mut ids = HashSet::new();
    for row in fixture.client.query(sql, &[]).await.unwrap() {
        let message: &[u8] = row.get(0);
        if matches!(message.first(), Some(b'B' | b'C')) {
            continue;
        }
        match pgoutput::decode(message).unwrap() {
            Message::Relation(relation) if relation.name == "outbox" => outbox = Some(relation.id),
            Message::Insert(insert) if Some(insert.relation_id) == outbox => {
                let Some(Value::Text(id)) = insert.row.values().next() else {
                    panic!("a row without an id");
                };
                ids.insert(Uuid::try_parse_ascii(id).unwrap());
            }
            _ => {}
        }
    }
    ids
}

/// Nothing is lost, each key keeps its order, and nothing is repeated but what Debezium had
/// not confirmed.
async fn hand_over(stop: &str) {
    let Some(mut fixture) = fixture().await else {
        return;
    };
    // By the names that Debezium gives them.
    fixture.contract = Contract::new("postbox", "debezium", "dbz_publication").unwrap();
    fixture.client.batch_execute(TABLES).await.unwrap();
    oracle::prepare(&fixture.client, "shop").await.unwrap();
    let connector = ["table.include.list=public.outbox"];
    let mut debezium = debezium(&fixture, &[("outbox", &connector)]);
    let writers = fixture.writers(Load {
        events_per_second: 1_000.0,
        pause_percent: 5,
        ..Load::new("shop", &fixture.topic)
    });
    wait_until("Debezium sends", async || {
        records(&fixture).await.len() > 1_000
    })
    .await;
    debezium.stop(stop);
    let by_debezium = records(&fixture).await.len();
    let unconfirmed = unconfirmed(&fixture).await;
    set_up(&fixture, &[]);
    let relay = relay(&fixture, &[]).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    writers.stop().await.unwrap();
    fixture.wait_for_confirmation().await;
    relay.drain().await;

    let records = records(&fixture).await;
    let ledger = oracle::ledger(&fixture.client, "shop").await.unwrap();
    let verdict = oracle::judge(&ledger, &records);
    let by_postbox = records.len() - by_debezium;
    assert!(
        by_debezium > 1_000 && by_postbox > 500 && verdict.is_clean(unconfirmed.len()),
        "{by_debezium} by Debezium: {verdict}"
    );
    let mut counts: HashMap<Uuid, usize> = HashMap::new();
    for record in &records {
        *counts.entry(record.id).or_default() += 1;
    }
    for (id, count) in counts {
        let expected = if unconfirmed.contains(&id) { 2 } else { 1 };
        assert!(count <= expected, "{id} {count} times: {verdict}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_an_orderly_stop() {
    hand_over("stop fast").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_sigkill() {
    hand_over("stop kill").await;
}
