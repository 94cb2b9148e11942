//! A partitioned outbox, read in each way.

use std::time::Duration;

use postbox::oracle::Load;
use postbox::partitions::Fate;

use crate::poll::{POLL, polling};
use crate::support::{Fixture, Relay, SMALL_WINDOW, connect, wait_until};

fn load(fixture: &Fixture) -> Load {
    Load {
        rollback_percent: 20,
        pause_percent: 10,
        events_per_second: 2_000.0,
        ..fixture.load()
    }
}

/// Rows of a key are in several partitions, and come in their order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn polling_reads_partitions_as_one_table() {
    let fixture = Fixture::partitioned(&POLL).await;
    fixture.make_partitions_narrow().await;
    let writers = fixture.writers(load(&fixture));
    let client = connect(&fixture.database_url).await;
    let mut dropped = 0;
    for _ in 0..2 {
        let relay = polling(&fixture, &SMALL_WINDOW).await;
        for _ in 0..6 {
            tokio::time::sleep(Duration::from_millis(500)).await;
            let sql = "SELECT snapshot::text FROM postbox.checkpoint";
            let row = fixture.client.query_one(sql, &[]).await.unwrap();
            let fates = fixture.drop_seen_by(&client, row.get(0), Duration::ZERO);
            dropped += fates
                .await
                .iter()
                .filter(|(_, fate)| *fate == Fate::Dropped)
                .count();
        }
        assert!(!relay.log().contains("WARN"), "{}", relay.log());
        relay.drain().await;
    }
    // Pages behind the first.
    tokio::time::sleep(Duration::from_secs(1)).await;
    writers.stop().await.unwrap();
    let relay = polling(&fixture, &[]).await;
    let verdict = fixture.judge_polling(relay).await;
    assert!(verdict.committed > 500 && verdict.is_clean(0), "{verdict}");
    assert!(dropped > 1, "{dropped}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn relays_share_a_partitioned_outbox() {
    let fixture = Fixture::partitioned(&POLL).await;
    fixture.make_partitions_narrow().await;
    let writers = fixture.writers(load(&fixture));
    let flags = [&POLL[..], &["--shards", "2"]].concat();
    let relays = [
        Relay::start(&fixture, &flags),
        Relay::start(&fixture, &flags),
    ];
    let published = || {
        relays
            .iter()
            .map(|relay| relay.published(&fixture.topic))
            .collect::<Vec<_>>()
    };
    wait_until("both publish", async || {
        relays
            .iter()
            .all(|relay| relay.log().contains("serving http"))
            && published().iter().all(|published| *published > 200)
    })
    .await;
    writers.stop().await.unwrap();
    wait_until("all is published", async || {
        published().iter().sum::<usize>() >= fixture.ledger().await.events.len()
    })
    .await;
    for relay in relays {
        relay.drain().await;
    }
    let verdict = fixture.verdict().await;
    assert!(verdict.is_clean(0), "{verdict}");
}

/// What a lost slot has not given is read from all partitions, and so is what a change of the mode
/// leaves to be read: with rows in partitions that had no index on `xid` before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_is_recovered_and_the_mode_is_changed_both_ways() {
    let fixture = Fixture::partitioned(&[]).await;
    fixture.make_partitions_narrow().await;
    let writers = fixture.writers(load(&fixture));
    let flags = ["--heartbeat-interval", "1s"];
    let relay = Relay::streaming(&fixture, &flags).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    relay.drain().await;
    fixture.drop_slot().await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let recovery = fixture.recover(&[]);
    assert!(
        recovery
            .results()
            .contains("the relay sends them before all others"),
        "{recovery:?}"
    );
    let relay = Relay::streaming(&fixture, &flags).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    relay.drain().await;

    // One that was cut short is there, and not valid; the next time it is made anew.
    let partition = fixture.partitions().await.remove(0);
    let cut_short = format!(
        "CREATE INDEX {}_xid_idx ON {partition} (seq)",
        &partition["postbox.".len()..]
    );
    fixture.client.batch_execute(&cut_short).await.unwrap();
    let setup = fixture.setup(&POLL);
    assert!(
        setup.results().contains("outbox_xid_idx\": created"),
        "{setup:?}"
    );
    let again = fixture.setup(&POLL);
    assert!(
        again.results().contains("outbox_xid_idx\": already there"),
        "{again:?}"
    );
    let relay = polling(&fixture, &[]).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    relay.drain().await;
    fixture.setup(&["--mode", "wal"]).results();
    let relay = Relay::streaming(&fixture, &flags).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge(relay).await;
    // Since the fence before the slot was lost, and the one before it was given up.
    assert!(
        verdict.committed > 1_000 && verdict.is_clean(12_000),
        "{verdict}"
    );
}
