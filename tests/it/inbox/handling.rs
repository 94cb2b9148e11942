//! Messages that are handled, or stored for the application.

use super::{Event, Stage};
use crate::support::wait_until;

#[tokio::test]
async fn each_message_is_handled_once_however_often_it_is_produced() {
    let stage = Stage::new(3).await;
    let events: Vec<Event> = (0..2_000)
        .map(|n| Event::of(&format!("k{}", n % 50), n / 50))
        .collect();
    // Within a batch, across batches, and while it is at work.
    stage.produce(&[events.clone(), events.clone()].concat());
    let inbox = stage.handling(&["--batch-max", "300"]);
    stage.wait_for_effects(2_000).await;
    stage.produce(&events);
    let more = [Event::of("last", 0)];
    stage.produce(&more);
    wait_until("all is read", async || {
        stage
            .count("SELECT coalesce(sum(next_offset), 0)::bigint FROM postbox.inbox_offset")
            .await
            == 6_001
    })
    .await;
    let topic = &stage.topic;
    for (metric, value) in [
        (format!("consumed_total{{topic=\"{topic}\"}}"), 6_001),
        (format!("duplicates_total{{topic=\"{topic}\"}}"), 4_000),
        (
            format!("handled_total{{event_type=\"{topic}\",outcome=\"completed\"}}"),
            2_001,
        ),
        (format!("lag{{partition=\"0\",topic=\"{topic}\"}}"), 0),
    ] {
        let line = format!("postbox_inbox_{metric} {value}\n");
        wait_until(&line, async || inbox.get("/metrics").1.contains(&line)).await;
    }
    assert!(inbox.metric("postbox_inbox_batch_messages_count") > 20.0);
    assert!(inbox.metric("postbox_inbox_handler_seconds_count") > 0.0);
    assert_eq!(inbox.metric("postbox_ready"), 1.0);
    inbox.drain().await;
    stage
        .assert_once_and_in_order(&[&events[..], &more].concat())
        .await;
    let held = stage.count("SELECT count(*) FROM postbox.inbox_offset WHERE owner IS NOT NULL");
    assert_eq!(held.await, 0);
}

#[tokio::test]
async fn messages_of_any_kind_are_stored_for_the_application() {
    let stage = Stage::new(1).await;
    let value = |value: &[u8]| Event {
        key: None,
        id: None,
        value: Some(value.to_owned()),
        headers: &[],
    };
    let long = "i".repeat(3_000);
    let events = [
        Event::of("k", 1),
        Event {
            value: None,
            ..Event::of("k", 2)
        },
        value(b"{"),
        value(b"[1, 2]"),
        value(br#"{"a":"\u0000"}"#),
        value(b"1e200000"),
        value(b"\xff\x00"),
        value(&vec![b'x'; 900_000]),
        Event {
            id: Some(long.clone()),
            ..Event::of("k", 3)
        },
        Event {
            id: Some(long),
            ..Event::of("k", 4)
        },
    ];
    stage.produce(&events);
    let inbox = stage.start(&[]);
    wait_until("all are stored", async || {
        stage
            .count("SELECT count(*) FROM postbox.inbox_message")
            .await
            == 9
    })
    .await;
    inbox.drain().await;
    let kept = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'stored' AND ";
    for (condition, count) in [
        ("body IS NOT NULL", 5),
        ("payload IS NULL AND body IS NULL AND message_id = 'k-2'", 1),
        ("payload = '[1, 2]' AND key IS NULL", 1),
        ("original_id IS NOT NULL AND message_id LIKE 'sha256:%'", 1),
        ("length(body) = 900000", 1),
        ("id = postbox.message_uuid(message_id)", 9),
    ] {
        let sql = format!("{kept}{condition}");
        assert_eq!(stage.count(&sql).await, count, "{condition}");
    }
}
