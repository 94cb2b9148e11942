//! From a slot to polling, and back.

use std::time::Duration;

use super::{POLL, polling};
use crate::support::{Fixture, Relay, wait_until};

/// As many as are delivered within a heartbeat interval of a second.
const SINCE_FENCE: usize = 20_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_mode_of_a_live_table_is_changed_both_ways_and_nothing_is_lost() {
    let fixture = Fixture::new().await;
    let writers = fixture.writers(fixture.load());
    for _ in 0..2 {
        let relay = Relay::streaming(&fixture, &["--heartbeat-interval", "1s"]).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        relay.drain().await;
        fixture.setup(&POLL).results();
        let relay = polling(&fixture, &[]).await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        relay.drain().await;
        fixture.setup(&["--mode", "wal"]).results();
    }
    let relay = Relay::streaming(&fixture, &[]).await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge(relay).await;
    assert!(
        verdict.committed > 500 && verdict.is_clean(2 * SINCE_FENCE),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_polling_to_a_slot_nothing_is_repeated() {
    let fixture = Fixture::polling().await;
    let writers = fixture.writers(fixture.load());
    let relay = polling(&fixture, &[]).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    relay.drain().await;
    // Not unless it is told.
    assert!(
        fixture
            .setup(&[])
            .results()
            .contains("which polls: already there")
    );
    fixture.setup(&["--mode", "wal"]).results();
    let relay = Relay::streaming(&fixture, &[]).await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge(relay).await;
    assert!(verdict.committed > 500 && verdict.is_clean(0), "{verdict}");
}

/// However soon after a delivery: that all of a gap is delivered is stored, too, and not only
/// each of its rows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_has_stopped_may_be_changed() {
    let fixture = Fixture::polling().await;
    // Of what is there at its start, a relay stores the first row by itself.
    fixture.insert("a", "{}").await;
    let relay = polling(&fixture, &["--status-interval", "4s"]).await;
    wait_until("it is delivered", async || {
        relay.published(&fixture.topic) == 1
    })
    .await;
    relay.drain().await;
    let setup = fixture.setup(&["--mode", "wal"]);
    let none = "rows committed since the last checkpoint: 0";
    assert!(setup.results().contains(none), "{setup:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_of_the_other_mode_says_how_to_change_it() {
    let fixture = Fixture::new().await;
    let mut relay = Relay::start(&fixture, &POLL);
    assert_eq!(relay.exit_code().await, 4);
    let log = relay.log();
    assert!(log.contains("was set up with mode wal: start it with `--mode wal`, or change it by `postbox setup --mode poll`"), "{log}");
    let fixture = Fixture::polling().await;
    let mut relay = Relay::start(&fixture, &[]);
    assert_eq!(relay.exit_code().await, 4);
    let log = relay.log();
    assert!(log.contains("was set up with mode poll: start it with `--mode poll`, or change it by `postbox setup --mode wal`"), "{log}");
    fixture.recover(&[]).complaint(4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_at_work_is_not_changed() {
    let fixture = Fixture::new().await;
    let relay = Relay::streaming(&fixture, &[]).await;
    let setup = fixture.setup(&POLL);
    let complaint = setup.complaint(4);
    assert!(complaint.contains("is in use by process"), "{setup:?}");
    assert!(complaint.contains("; stop it first"), "{setup:?}");
    relay.drain().await;
    fixture.setup(&POLL).results();
    let relay = polling(&fixture, &[]).await;
    let setup = fixture.setup(&["--mode", "wal"]);
    let complaint = setup.complaint(4);
    assert!(complaint.contains("is at work: process "), "{setup:?}");
    assert!(complaint.contains("; stop it first"), "{setup:?}");
    relay.drain().await;
}

/// Events flow, and the slot keeps WAL: readiness says how to end that, and is green once
/// it has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_a_change_has_left_is_complained_of_until_it_is_dropped() {
    let fixture = Fixture::new().await;
    fixture.setup_until("polling_begun", &POLL).complaint(-1);
    let mut relay = polling(&fixture, &[]).await;
    let complaint = format!(
        "postgres: replication slot \"{}\" is left from before this relay polled",
        fixture.contract.slot
    );
    wait_until("readiness complains", async || {
        let (status, body) = relay.get("/readyz");
        status == 503
            && body.starts_with(&complaint)
            && body.contains("run `postbox setup --mode poll`")
    })
    .await;
    relay.wait_for_log("WARN replication slot ").await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_checkpoint().await;
    wait_until("the WAL that it keeps is told", async || {
        relay.metric("postbox_retained_wal_bytes") > 0.0
    })
    .await;
    // Beside the relay.
    assert!(fixture.setup(&POLL).results().contains("dropped"));
    wait_until("readiness is green", async || relay.get("/readyz").0 == 200).await;
    assert_eq!(relay.metric("postbox_retained_wal_bytes"), 0.0);
    fixture.insert("b", "{}").await;
    fixture.wait_for_checkpoint().await;
    assert_eq!(relay.log().matches("is left from before").count(), 1);
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["a", "b"]);

    let relay = polling(&fixture, &[]).await;
    wait_until("readiness is green", async || relay.get("/readyz").0 == 200).await;
    assert!(!relay.log().contains("is left"), "{}", relay.log());
    relay.drain().await;
}

/// The steps of a change to a slot at which it may be cut short.
const CHANGE: [&str; 4] = [
    "recovery_beginning",
    "recovery_begun",
    "slot_created",
    "recovery_finishing",
];

/// It goes on when it is run again, and goes back when it is told so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_change_to_a_slot_that_was_cut_short_goes_on_and_goes_back() {
    const WAL: [&str; 2] = ["--mode", "wal"];
    let fixture = Fixture::polling().await;
    for step in CHANGE {
        fixture.insert(&format!("{step}-back"), "{}").await;
        fixture.setup_until(step, &WAL).complaint(-1);
        fixture.setup(&POLL).results();
        let slots = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1";
        let name = &fixture.contract.slot;
        let row = fixture.client.query_one(slots, &[name]).await;
        assert_eq!(row.unwrap().get::<_, i64>(0), 0, "{step}");
        fixture.insert(&format!("{step}-on"), "{}").await;
        fixture.setup_until(step, &WAL).complaint(-1);
        // It polls still, as it was set up.
        let relay = polling(&fixture, &[]).await;
        fixture.wait_for_checkpoint().await;
        relay.drain().await;
        fixture.setup_until(step, &WAL).complaint(-1);
        fixture.insert(&format!("{step}-slot"), "{}").await;
        fixture.setup(&WAL).results();
        let relay = Relay::streaming(&fixture, &[]).await;
        fixture.wait_for_confirmation().await;
        relay.drain().await;
        fixture.setup(&POLL).results();
    }
    let mut expected: Vec<String> = Vec::new();
    for step in CHANGE {
        for way in ["back", "on", "slot"] {
            expected.push(format!("{step}-{way}"));
        }
    }
    expected.sort_unstable();
    let mut keys = fixture.keys().await;
    keys.dedup();
    assert_eq!(keys, expected);
}

/// What that has delivered is not known to the slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_polls_while_a_slot_is_made_ends_the_change() {
    const WAL: [&str; 2] = ["--mode", "wal"];
    let fixture = Fixture::polling().await;
    let setup = std::thread::scope(|scope| {
        let setup = scope.spawn(|| fixture.setup_with("recovery_finishing=sleep(8000)", &WAL));
        let meanwhile = async {
            let made = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1";
            wait_until("the slot is made", async || {
                let name = &fixture.contract.slot;
                let row = fixture.client.query_one(made, &[name]).await;
                row.unwrap().get::<_, i64>(0) == 1
            })
            .await;
            let relay = polling(&fixture, &[]).await;
            fixture.insert("a", "{}").await;
            fixture.wait_for_checkpoint().await;
            relay.drain().await;
        };
        let handle = tokio::runtime::Handle::current();
        tokio::task::block_in_place(|| handle.block_on(meanwhile));
        setup.join().unwrap()
    });
    assert!(
        setup.complaint(4).contains("was taken over meanwhile"),
        "{setup:?}"
    );
    let none = "rows committed since the last checkpoint: 0";
    assert!(fixture.setup(&WAL).results().contains(none));
    fixture.insert("b", "{}").await;
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["a", "b"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_of_another_database_is_left_to_it() {
    let (fixture, elsewhere) = (Fixture::polling().await, Fixture::empty().await);
    let slot = &fixture.contract.slot;
    let make = format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')");
    elsewhere.client.batch_execute(&make).await.unwrap();
    let setup = fixture.setup(&["--mode", "wal"]);
    let complaint = setup.complaint(4);
    let why = format!("belongs to database \"{}\"", elsewhere.database.name());
    assert!(complaint.contains(&why), "{complaint}");
    assert!(!complaint.contains("pg_drop"), "{complaint}");
    let drop = format!("SELECT pg_drop_replication_slot('{slot}')");
    elsewhere.client.batch_execute(&drop).await.unwrap();
}
