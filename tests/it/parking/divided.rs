//! Relays that share a table, and each its part of what waits.

use postbox::servers::Server;

use super::topics::create;
use super::{SOON, parked, wait_for_parked};
use crate::poll::shards::{judge, start, wait_for_division, wait_for_slices};
use crate::support::{Fixture, Relay, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relays_that_share_a_topic_that_is_refused_each_send_their_part_once_it_is_not() {
    let postgres = Server::postgres(&[]).unwrap();
    let brokers = Server::kafka(&["auto.create.topics.enable=false"]).unwrap();
    let mut fixture = Fixture::empty_beside(&postgres, brokers.fact("brokers")).await;
    fixture.set_up_polling().await;
    let there = fixture.topic.clone();
    create(&fixture, &there).await;
    let missing = format!("{there}-missing");
    let relays = [start(&fixture, &SOON), start(&fixture, &SOON)];
    wait_for_division(&fixture, &[32, 32]).await;
    for number in 0..60 {
        fixture.topic.clone_from(&missing);
        fixture.insert(&(number % 20).to_string(), "{}").await;
        fixture.topic.clone_from(&there);
        fixture.insert(&(number % 20).to_string(), "{}").await;
    }
    wait_for_slices(&fixture).await;
    assert_eq!(fixture.records().await.len(), 60);
    let untried = parked(&fixture).await;
    assert_eq!(untried.len(), 60);
    assert!(
        untried.iter().all(|line| line.ends_with(" 0")),
        "{untried:?}"
    );
    fixture.topic.clone_from(&missing);
    create(&fixture, &missing).await;
    wait_for_parked(&fixture, &[]).await;
    for number in 0..20 {
        fixture.insert(&number.to_string(), "{}").await;
    }
    wait_until("they are sent directly", async || {
        relays
            .iter()
            .map(|relay| relay.published(&missing))
            .sum::<usize>()
            == 80
    })
    .await;
    for relay in &relays {
        assert!(relay.published(&missing) > 0, "{}", relay.log());
    }
    let enter = "INSERT INTO postbox_oracle.ledger SELECT id, aggregate_id, seq FROM postbox.outbox \
                 WHERE aggregate_type LIKE '%-missing'";
    fixture.client.batch_execute(enter).await.unwrap();
    let verdict = judge(&fixture, relays).await;
    assert!(verdict.is_clean(0), "{verdict}");
}

/// Its brokers are frozen, so nothing of its slices is stored to be delivered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_in_one_relays_slices_does_not_wait_for_anothers() {
    let fixture = Fixture::empty().await;
    fixture.set_up_polling().await;
    let mut brokers = Server::kafka(&[]).unwrap();
    let flags = [&SOON[..], &["--max-attempts", "1000"]].concat();
    let relay = start(&fixture, &flags);
    let mut command = Relay::command(
        &fixture,
        &[&crate::poll::shards::SHARDS, &flags[..]].concat(),
    );
    let other = Relay::spawn(command.env("POSTBOX_BROKERS", brokers.fact("brokers")));
    wait_for_division(&fixture, &[32, 32]).await;
    for number in 0..64 {
        fixture.insert(&number.to_string(), "{}").await;
    }
    wait_for_slices(&fixture).await;
    brokers.command("pause").unwrap();
    for number in 0..64 {
        fixture.insert(&number.to_string(), "{}").await;
    }
    let unroutable = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, topic) \
                      SELECT 'order', n::text, 'changed', 'no topic''s name' FROM generate_series(1, 32) AS n";
    fixture.client.batch_execute(unroutable).await.unwrap();
    wait_until("they are tried again", async || {
        let sql = "SELECT count(*) FROM postbox.parked WHERE attempts > 2";
        let row = fixture.client.query_one(sql, &[]).await.unwrap();
        row.get::<_, i64>(0) > 0
    })
    .await;
    // The other had not gone on.
    let lagging = "SELECT count(*) FROM postbox.slice AS s WHERE EXISTS ( \
                       SELECT FROM postbox.outbox AS o WHERE NOT pg_visible_in_snapshot(o.xid, s.snapshot))";
    let row = fixture.client.query_one(lagging, &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 32);
    brokers.command("resume").unwrap();
    wait_for_slices(&fixture).await;
    other.drain().await;
    relay.drain().await;
}
