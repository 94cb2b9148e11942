//! `postbox.cancel`, from SQL, from Rust and from the command line.

use std::time::Duration;

use postbox::ErrorKind;
use postbox::outbox::{self, NewEvent};
use tokio_postgres::{Client, IsolationLevel};
use uuid::Uuid;

use super::queue::Row;
use crate::support::{Fixture, connect};

/// Writes an event for this time from now: its id.
async fn schedule(client: &Client, after: &str) -> Uuid {
    let sql = "SELECT postbox.emit('order', '1', 'order_due', '{}', scheduled_at => now() + $1::text::interval)";
    client.query_one(sql, &[&after]).await.unwrap().get(0)
}

async fn is_cancelled(client: &Client, id: Uuid) -> bool {
    let sql = "SELECT EXISTS (SELECT FROM postbox.cancellation WHERE id = $1::uuid::text)";
    client.query_one(sql, &[&id]).await.unwrap().get(0)
}

/// There is no relay: none of them has been read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_is_cancelled_before_its_time_and_not_after() {
    let fixture = Fixture::new().await;
    let client = &fixture.client;
    let (later, second) = (schedule(client, "1h").await, schedule(client, "2h").await);
    let (past, unknown) = (schedule(client, "-1s").await, Uuid::new_v4());
    let now: Uuid = {
        let sql = "SELECT postbox.emit('order', '1', 'order_paid', '{}')";
        client.query_one(sql, &[]).await.unwrap().get(0)
    };
    let [a, b, c, d, e] = [later, past, unknown, now, second].map(|id| id.to_string());
    let output = fixture.cancel_as(&fixture.database_url, &[&a, &b, &c, &d, &e]);
    let expected = format!(
        "{a}: cancelled\n{b}: not cancelled: its time has come\n{c}: not cancelled: no scheduled event has this id\n\
         {d}: not cancelled: no scheduled event has this id\n{e}: cancelled\n"
    );
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (3, expected.as_str())
    );
    assert_eq!(output.stderr, "error: 3 of 5 events were not cancelled\n");
    for (id, expected) in [
        (later, true),
        (past, false),
        (unknown, false),
        (now, false),
        (second, true),
    ] {
        assert_eq!(is_cancelled(client, id).await, expected);
    }
    // Again: it will not be sent, which is what was asked.
    let again = fixture.cancel_as(&fixture.database_url, &[&a]);
    assert_eq!(again.results(), format!("{a}: cancelled\n"));
    // Also once its time has come.
    let soon = schedule(client, "4s").await.to_string();
    let cancel = || fixture.cancel_as(&fixture.database_url, &[&soon]);
    assert_eq!(cancel().results(), format!("{soon}: cancelled\n"));
    tokio::time::sleep(Duration::from_millis(4100)).await;
    assert_eq!(cancel().results(), format!("{soon}: cancelled before\n"));
    let odd = fixture.cancel_as(&fixture.database_url, &["42"]);
    assert!(
        odd.complaint(2)
            .contains("invalid value '42' for '<ID>...'"),
        "{odd:?}"
    );
}

/// As where rows of the outbox are deleted soon: the relay has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_that_only_the_relay_has_is_cancelled_too() {
    let fixture = Fixture::new().await;
    let ids = [(); 4].map(|()| Uuid::new_v4());
    let [later, due, waiting, skipped] = ids.map(|id| id.to_string());
    for (id, status, due_in) in [
        (&later, "scheduled", Some("1h")),
        (&due, "scheduled", Some("-1s")),
        (&waiting, "waiting", Some("1h")),
        (&skipped, "skipped", None),
    ] {
        let row = Row {
            due_in,
            ..Row::new(id, status)
        };
        row.insert(&fixture.client, &fixture.contract).await;
    }
    let output = fixture.cancel_as(&fixture.database_url, &[&later, &due, &waiting, &skipped]);
    let expected = format!(
        "{later}: cancelled\n{due}: not cancelled: its time has come\n\
         {waiting}: not cancelled: its time has come, and it is waiting: `postbox parked skip` gives it up\n\
         {skipped}: not cancelled: its time has come, and it is skipped\n"
    );
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (3, expected.as_str())
    );
    let list = fixture.parked(&["list", "--status", "scheduled"]);
    let line = list.results().lines().find(|line| line.starts_with(&later));
    assert!(line.unwrap().contains(" cancelled "), "{list:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancellation_is_part_of_the_applications_transaction() {
    let fixture = Fixture::new().await;
    let id = schedule(&fixture.client, "1h").await;
    let mut application = connect(&fixture.database_url).await;

    let transaction = application.transaction().await.unwrap();
    assert!(outbox::cancel(&transaction, id).await.unwrap());
    transaction.rollback().await.unwrap();
    assert!(!is_cancelled(&fixture.client, id).await);

    // Also of an event that it has written itself.
    let transaction = application.transaction().await.unwrap();
    let later = std::time::SystemTime::now() + Duration::from_secs(3600);
    let event = NewEvent::tombstone("order", "1", "order_due").scheduled_at(later);
    let own = outbox::append(&transaction, event).await.unwrap();
    assert!(outbox::cancel(&transaction, own).await.unwrap());
    assert!(outbox::cancel(&transaction, id).await.unwrap());
    assert!(!outbox::cancel(&transaction, Uuid::new_v4()).await.unwrap());
    transaction.commit().await.unwrap();
    for id in [own, id] {
        assert!(is_cancelled(&fixture.client, id).await);
    }

    let transaction = application.transaction().await.unwrap();
    let refused = outbox::cancel_in("nowhere", &transaction, id)
        .await
        .unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Database);
    let expected = "cancel an event of \"nowhere.outbox\": has `postbox setup` been run here?";
    assert!(refused.to_string().starts_with(expected), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_can_cancel() {
    let fixture = Fixture::empty().await;
    let (role, url) = fixture.role("Writer").await;
    let (_, stranger) = fixture.role("Stranger").await;
    fixture.setup(&["--grant-writer-to", &role]).results();
    let mut writer = connect(&url).await;
    let ids = [
        schedule(&writer, "1h").await.to_string(),
        schedule(&writer, "1h").await.to_string(),
        schedule(&writer, "-1s").await.to_string(),
    ];
    let output = fixture.cancel_as(&url, &[&ids[0], &ids[2]]);
    // It may not see why.
    let expected = format!(
        "{}: cancelled\n{}: not cancelled: its time has come, or no scheduled event has this id\n",
        ids[0], ids[2]
    );
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (3, expected.as_str())
    );
    let transaction = writer.transaction().await.unwrap();
    let second = ids[1].parse().unwrap();
    assert!(outbox::cancel(&transaction, second).await.unwrap());
    transaction.commit().await.unwrap();
    assert!(is_cancelled(&fixture.client, second).await);

    let output = fixture.cancel_as(&stranger, &[&ids[1]]);
    let complaint = output.complaint(6);
    assert!(
        complaint.contains(
            "`postbox setup --grant-writer-to` or `--grant-operator-to` gives the right to"
        ),
        "{complaint}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_repeatable_read_a_cancellation_is_of_what_the_transaction_sees() {
    let fixture = Fixture::new().await;
    let before = schedule(&fixture.client, "1h").await;
    let other = schedule(&fixture.client, "1h").await;
    let mut application = connect(&fixture.database_url).await;
    let begin = application.build_transaction();
    let begin = begin.isolation_level(IsolationLevel::RepeatableRead);
    let transaction = begin.start().await.unwrap();
    transaction.batch_execute("SELECT").await.unwrap();
    // After its snapshot.
    let after = schedule(&fixture.client, "1h").await;
    let taken = "SELECT postbox.cancel($1)";
    fixture.client.query_one(taken, &[&other]).await.unwrap();

    assert!(outbox::cancel(&transaction, before).await.unwrap());
    assert!(!outbox::cancel(&transaction, after).await.unwrap());
    // Somebody else has cancelled it: the transaction is to be tried again.
    let refused = outbox::cancel(&transaction, other).await.unwrap_err();
    assert_eq!(
        refused.kind(),
        ErrorKind::DatabaseAway,
        "{}",
        refused.chain()
    );
    drop(transaction);
    assert!(!is_cancelled(&fixture.client, before).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_event_of_another_schema_is_cancelled() {
    let mut fixture = Fixture::empty().await;
    let slot = &fixture.contract.slot;
    fixture.contract = postbox::contract::Contract::new("my \"box", slot, "postbox").unwrap();
    fixture.setup(&[]).results();
    let emit =
        "SELECT \"my \"\"box\".emit('a', 'b', 'c', '{}', scheduled_at => now() + interval '1 h')";
    let id: Uuid = fixture.client.query_one(emit, &[]).await.unwrap().get(0);
    let id = id.to_string();
    let output = fixture.cancel_as(&fixture.database_url, &[&id]);
    assert_eq!(output.results(), format!("{id}: cancelled\n"));
    Row::new(&id, "dead")
        .insert(&fixture.client, &fixture.contract)
        .await;
    fixture.parked(&["retry", &id]).results();
    fixture.parked(&["skip", &id, "--reason", "r"]).results();
}
