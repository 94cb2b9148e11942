//! What applications record that consume by themselves.

use std::time::Duration;

use postbox::inbox::{already_processed_in, record_in};

use super::{Event, Stage};
use crate::support::connect;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_that_record_an_id_at_once_one_is_told_that_it_is_new() {
    let stage = Stage::new(1).await;
    let (schema, group) = (stage.fixture.contract.schema.clone(), stage.group());
    let url = &stage.fixture.database_url;
    let (mut first, mut second) = (connect(url).await, connect(url).await);
    // Rolled back, it is as if it had not been.
    for (id, is_kept) in [("one", true), ("two", false)] {
        let ours = first.transaction().await.unwrap();
        let theirs = second.transaction().await.unwrap();
        assert!(record_in(&schema, &ours, group, "order", id).await.unwrap());
        assert!(!record_in(&schema, &ours, group, "order", id).await.unwrap());
        let mut waits = Box::pin(record_in(&schema, &theirs, group, "order", id));
        let waited = tokio::time::timeout(Duration::from_millis(300), &mut waits).await;
        assert!(waited.is_err());
        match is_kept {
            true => ours.commit().await.unwrap(),
            false => ours.rollback().await.unwrap(),
        }
        assert_eq!(waits.await.unwrap(), !is_kept, "{id}");
        theirs.commit().await.unwrap();
    }
    let transaction = first.transaction().await.unwrap();
    for (topic, id, is_there) in [
        ("order", "two", true),
        ("order", "three", false),
        ("bill", "two", false),
    ] {
        let is_known = already_processed_in(&schema, &transaction, group, topic, id).await;
        assert_eq!(is_known.unwrap(), is_there, "{topic} {id}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_recorded_and_what_is_received_are_the_same_ids() {
    let stage = Stage::new(1).await;
    let (handler, url) = stage.fixture.role("handler").await;
    stage.fixture.setup(&["--grant-handler-to", &handler]);
    let schema = stage.fixture.contract.schema.clone();
    let long = "x".repeat(300);
    let uuid = "f1d4ec44-6ba8-4d0a-9f0a-0a3e0d9f5f10";
    let mut application = connect(&url).await;
    let mut events = Vec::new();
    for id in ["short", uuid, &long] {
        let transaction = application.transaction().await.unwrap();
        let is_new = record_in(&schema, &transaction, stage.group(), &stage.topic, id).await;
        assert!(is_new.unwrap());
        transaction.commit().await.unwrap();
        let id = Some(id.to_owned());
        events.push(Event {
            id,
            ..Event::of("k", 0)
        });
    }
    events.push(Event::of("k", 1));
    stage.produce(&events);
    let inbox = stage.handling(&[]);
    stage.wait_for_effects(1).await;
    inbox.drain().await;
    assert_eq!(stage.effects().await.len(), 1);
    let transaction = application.transaction().await.unwrap();
    let is_known = already_processed_in(&schema, &transaction, stage.group(), &stage.topic, "k-1");
    assert!(is_known.await.unwrap());
    let forget =
        |older_than: &str| format!("SELECT \"{schema}\".inbox_forget($1, '{older_than}', 2)");
    for (older_than, expected) in [("1 day", 0_i64), ("0", 2), ("0", 1), ("0", 0)] {
        let row = transaction
            .query_one(&forget(older_than), &[&stage.group()])
            .await;
        assert_eq!(row.unwrap().get::<_, i64>(0), expected, "{older_than}");
    }
    // Not in the transaction's time, which is not behind theirs.
    transaction.rollback().await.unwrap();
}
