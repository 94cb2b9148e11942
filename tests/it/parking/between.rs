//! What happens between two steps of a relay: the row is read, is in the table, is passed by
//! the checkpoint, is tried, and what became of it is stored.

use std::time::Duration;

use super::{LARGE, SMALL, SOON, assert_all_go_out, limit, parked};
use crate::poison::{create_topic, incompressible};
use crate::setup::slot::{HOLDING_UP, hold_up, let_through};
use crate::support::{Fixture, Relay, connect, wait_until};

/// Tried very often, and known to be too large before it is sent.
const FLAGS: [&str; 4] = ["--max-attempts", "1000", "-X", "compression.codec=none"];

fn flags() -> Vec<&'static str> {
    [&SOON[..], &FLAGS].concat()
}

/// Two events of a key in one transaction, of which the last is too large.
async fn insert_two(fixture: &Fixture, first: &str, second: &str) {
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
               VALUES ($1, 'a', 'changed', $2::text::json), ($1, 'a', 'changed', $3::text::json)";
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 3] = [&fixture.topic, &first, &second];
    fixture.client.execute(sql, &values).await.unwrap();
}

/// So long that what must not happen would have.
async fn give_it_time() {
    tokio::time::sleep(Duration::from_secs(2)).await;
}

/// Until its row is committed, its position is not confirmed, and what comes behind it in its
/// key is not sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_confirmed_and_nothing_overtakes_before_a_row_is_in_the_table() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, SMALL).await;
    let relay = Relay::streaming(&fixture, &flags()).await;
    let other = connect(&fixture.database_url).await;
    let lock = "BEGIN; LOCK TABLE postbox.parked IN SHARE MODE";
    other.batch_execute(lock).await.unwrap();
    insert_two(&fixture, &incompressible(5000), "2").await;
    fixture.insert("b", "{}").await;
    let end = fixture.wal_end().await;
    wait_until("the other key flows", async || {
        !fixture.keys().await.is_empty()
    })
    .await;
    give_it_time().await;
    assert!(fixture.confirmed().await < end);
    assert_eq!(fixture.keys().await, ["b"]);
    other.batch_execute("ROLLBACK").await.unwrap();
    fixture.wait_for_confirmation().await;
    assert_eq!(parked(&fixture).await.len(), 2);
    assert_all_go_out(&fixture, relay, 0).await;
}

/// What is parked outlasts the server, as what the application commits does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_confirmed_before_the_standby_has_what_is_parked() {
    let fixture = Fixture::with_postgres(&[HOLDING_UP]).await;
    fixture.set_up().await;
    create_topic(&fixture, SMALL).await;
    let relay = Relay::streaming(&fixture, &flags()).await;
    let insert = format!(
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
         VALUES ('{}', 'a', 'changed', '{}')",
        fixture.topic,
        incompressible(5000)
    );
    let held_up = hold_up(&fixture, &insert).await;
    let end = fixture.wal_end().await;
    wait_until("the relay waits for the standby", async || {
        let sql = "SELECT count(*) > 0 FROM pg_stat_activity \
                   WHERE wait_event = 'SyncRep' AND application_name LIKE 'postbox % parked'";
        fixture.client.query_one(sql, &[]).await.unwrap().get(0)
    })
    .await;
    give_it_time().await;
    assert!(fixture.confirmed().await < end);
    let_through(&fixture, held_up).await;
    fixture.wait_for_confirmation().await;
    assert_eq!(parked(&fixture).await.len(), 1);
    relay.drain().await;
}

/// What is before it in its key may still be on its way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_is_not_tried_before_the_checkpoint_has_passed_it() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, SMALL).await;
    let relay = Relay::streaming(&fixture, &flags()).await;
    fixture.insert("b", "{}").await;
    fixture.wait_for_confirmation().await;
    let locking = fixture.lock_checkpoint().await;
    insert_two(&fixture, &incompressible(5000), "2").await;
    wait_until("both are parked", async || {
        parked(&fixture).await.len() == 2
    })
    .await;
    give_it_time().await;
    assert_eq!(parked(&fixture).await, ["waiting a 1", "waiting a 0"]);
    drop(locking);
    wait_until("it is tried", async || {
        parked(&fixture).await != ["waiting a 1", "waiting a 0"]
    })
    .await;
    relay.drain().await;
}

/// The first of a key was sent, and may not have arrived: read again, it waits, and before
/// those that are in the table already.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_are_read_again_wait_in_the_order_in_which_they_are_read() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, SMALL).await;
    insert_two(&fixture, "1", &incompressible(5000)).await;
    let crash = async |failpoint: &str| {
        let mut command = Relay::command(&fixture, &flags());
        let mut relay = Relay::spawn(command.env("FAILPOINTS", failpoint));
        assert_eq!(relay.exit_code().await, -1, "{}", relay.log());
    };
    crash("parked=panic").await;
    assert_eq!(parked(&fixture).await, ["waiting a 1"]);
    // It stores one after the other.
    crash("parked=1*off->panic").await;
    assert_eq!(parked(&fixture).await, ["waiting a 0", "waiting a 1"]);
    let relay = Relay::streaming(&fixture, &flags()).await;
    assert_all_go_out(&fixture, relay, 1).await;
}

/// What sends it comes to nothing: the table is locked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_starts_holds_what_waits_before_it_reads_anything() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, SMALL).await;
    let relay = Relay::streaming(&fixture, &flags()).await;
    fixture.insert("a", &incompressible(5000)).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    for (key, payload) in [("b", "1"), ("a", "2"), ("b", "2")] {
        fixture.insert(key, payload).await;
    }
    let other = connect(&fixture.database_url).await;
    let lock = "BEGIN; LOCK TABLE postbox.parked IN SHARE MODE";
    other.batch_execute(lock).await.unwrap();
    let relay = Relay::streaming(&fixture, &flags()).await;
    wait_until("the other key flows", async || {
        let keys = fixture.keys().await;
        keys.iter().filter(|key| *key == "b").count() == 2
    })
    .await;
    assert_eq!(fixture.keys().await, ["b", "b"]);
    other.batch_execute("ROLLBACK").await.unwrap();
    assert_all_go_out(&fixture, relay, 0).await;
}

/// Another has claimed the checkpoint meanwhile, and may have parked and sent on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_is_no_longer_at_work_parks_nothing() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, SMALL).await;
    let mut relay = Relay::streaming(&fixture, &flags()).await;
    fixture.insert("b", "{}").await;
    fixture.wait_for_confirmation().await;
    let end = fixture.wal_end().await;
    wait_until("it has nothing to store", async || {
        fixture.stored().await >= end
    })
    .await;
    // A commit may come from the slot before others see it: so these are two.
    let sql = format!(
        "BEGIN; UPDATE postbox.checkpoint SET epoch = epoch + 1; COMMIT; \
         BEGIN; INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
         VALUES ('{}', 'a', 'changed', '{}'); COMMIT",
        fixture.topic,
        incompressible(5000)
    );
    fixture.client.batch_execute(&sql).await.unwrap();
    relay
        .wait_for_log("may park no more: another is at work")
        .await;
    // It is again once it has claimed the checkpoint anew.
    fixture.wait_for_confirmation().await;
    assert_eq!(parked(&fixture).await.len(), 1);
    relay.drain().await;
}

/// A person skips it while the relay stores that it was refused, or sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_skipped_while_it_was_tried_stays_as_that() {
    let fixture = Fixture::new().await;
    create_topic(&fixture, SMALL).await;
    let waits = "CREATE FUNCTION waits() RETURNS trigger LANGUAGE plpgsql AS $$ \
                 BEGIN PERFORM pg_advisory_xact_lock(TG_ARGV[0]::bigint); RETURN NULL; END $$; \
                 CREATE TRIGGER refused BEFORE UPDATE OF attempts ON postbox.parked EXECUTE FUNCTION waits(7); \
                 CREATE TRIGGER sent BEFORE DELETE ON postbox.parked EXECUTE FUNCTION waits(8)";
    fixture.client.batch_execute(waits).await.unwrap();
    let relay = Relay::streaming(&fixture, &flags()).await;
    let other = connect(&fixture.database_url).await;
    let skip_while_it_waits_for = async |lock: i64| {
        let waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted \
                     AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))";
        wait_until("the relay is about to store it", async || {
            other.query_one(waits, &[]).await.unwrap().get(0)
        })
        .await;
        let skip = "UPDATE postbox.parked SET status = 'skipped', decided_by = 'somebody' WHERE status = 'waiting'";
        assert_eq!(other.execute(skip, &[]).await.unwrap(), 1);
        let unlock = format!("SELECT pg_advisory_unlock({lock})");
        other.batch_execute(&unlock).await.unwrap();
    };
    for (number, lock) in [7, 8].into_iter().enumerate() {
        let key = lock.to_string();
        fixture.insert(&key, &incompressible(5000)).await;
        wait_until("it is parked", async || {
            parked(&fixture).await.len() == number + 1
        })
        .await;
        let locked = format!("SELECT pg_advisory_lock({lock})");
        other.batch_execute(&locked).await.unwrap();
        if lock == 8 {
            limit(&fixture, LARGE).await;
        }
        skip_while_it_waits_for(lock).await;
        // The next of its key shows that it is stored.
        fixture.insert(&key, "2").await;
        wait_until("its key is free", async || {
            fixture.keys().await.contains(&key) && parked(&fixture).await.len() == number + 1
        })
        .await;
        assert!(
            parked(&fixture)
                .await
                .iter()
                .all(|line| line.starts_with("skipped")),
            "{:?}",
            parked(&fixture).await
        );
    }
    relay.drain().await;
}
