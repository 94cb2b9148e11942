//! Copies of dead letters, and a topic that does not take them.

use std::time::Instant;

use rdkafka::admin::{AdminOptions, NewTopic, TopicReplication};

use super::policies::UNROUTABLE;
use super::scheduled::schedule;
use super::topics::create;
use super::{SMALL, SOON, limit, parked};
use crate::poison::{admin, incompressible};
use crate::support::{Fixture, PATIENCE, Relay, wait_until};

/// They wait for it, and nothing else does. What is too large for it too is kept in the
/// table alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn letters_wait_for_their_topic_and_hold_up_nobody() {
    let fixture = Fixture::with_servers(&[], &["auto.create.topics.enable=false"]).await;
    create(&fixture, &fixture.topic).await;
    limit(&fixture, SMALL).await;
    let letters = format!("{}-dead", fixture.topic);
    let flags = ["--max-attempts", "1", "--dead-letter-topic", &letters];
    let mut relay = Relay::streaming(&fixture, &[&SOON[..], &flags].concat()).await;
    let told = "copies of dead letters wait for their topic";
    let since = Instant::now();
    fixture.insert("b", &incompressible(5000)).await;
    relay.wait_for_log(told).await;
    // Each is due when it looks anew.
    for number in 1..=4i64 {
        schedule(&fixture, "b", "1", "1 s").await;
        fixture.client.batch_execute(UNROUTABLE).await.unwrap();
        wait_until("it is sent, and another is dead", async || {
            let sql =
                "SELECT count(*) FILTER (WHERE status = 'dead'), count(*) FROM postbox.parked";
            let row = fixture.client.query_one(sql, &[]).await.unwrap();
            (row.get(0), row.get(1)) == (number + 1, number + 1)
        })
        .await;
    }
    // After a second, two, four, and so on.
    let times = relay.log().matches(told).count();
    let most = 2 + (1 + since.elapsed().as_secs()).ilog2();
    assert!(times as u32 <= most, "{}", relay.log());
    assert_eq!(fixture.keys().await, ["b"; 4]);

    let topic = NewTopic::new(&letters, 1, TopicReplication::Fixed(1));
    let topic = topic.set("max.message.bytes", SMALL);
    let created = admin(&fixture)
        .create_topics(&[topic], &AdminOptions::new())
        .await;
    created.unwrap().remove(0).unwrap();
    let owed = "SELECT count(*) FROM postbox.parked WHERE owes_letter";
    wait_until("nothing is owed", async || {
        let row = fixture.client.query_one(owed, &[]).await.unwrap();
        row.get::<_, i64>(0) == 0
    })
    .await;
    let log = relay.log();
    assert_eq!(log.matches("cannot go out either").count(), 1, "{log}");
    relay.drain().await;
    let rows = parked(&fixture).await;
    let are_dead = rows.iter().all(|line| line.starts_with("dead "));
    assert!(are_dead && rows.len() == 5, "{rows:?}");
    let admin = admin(&fixture);
    let offsets = admin.inner().fetch_watermarks(&letters, 0, PATIENCE);
    assert_eq!(offsets.unwrap(), (0, 4));
}
