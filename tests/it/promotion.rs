//! A server that was promoted: the same cluster on another timeline.

use std::path::Path;

use crate::support::{Fixture, Proxy, Relay};

/// Starts the test's Postgres again as a standby.
pub(crate) async fn demote(fixture: &mut Fixture) {
    let postgres = fixture.postgres.as_mut().expect("a Postgres of its own");
    postgres.command("stop fast").unwrap();
    let signal = Path::new(postgres.fact("data_dir")).join("standby.signal");
    std::fs::write(signal, "").unwrap();
    postgres.command("start").unwrap();
    fixture.reconnect().await;
}

/// The log says once that the server has gone from its first timeline to the second.
pub(crate) fn assert_told_of_timeline(log: &str) {
    let warning = "the server is on another timeline than at the last start";
    let warned: Vec<_> = log.lines().filter(|line| line.contains(warning)).collect();
    let [warned] = warned[..] else {
        panic!("{log}");
    };
    assert!(warned.contains("stored=1 found=2"), "{warned}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_timeline_is_told_once_and_events_go_on() {
    let mut fixture = Fixture::with_postgres(&[]).await;
    fixture.setup(&[]).results();
    fixture.insert("before", "{}").await;
    demote(&mut fixture).await;
    let mut relay = Relay::start(&fixture, &[]);
    relay.wait_for_log("waiting for a primary").await;
    let promote = "SELECT pg_promote()";
    fixture.client.batch_execute(promote).await.unwrap();
    relay.wait_for_log("streaming").await;
    assert_told_of_timeline(&relay.log());
    fixture.insert("after", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 2);

    let relay = Relay::streaming(&fixture, &[]).await;
    assert!(!relay.log().contains("timeline"), "{}", relay.log());
    relay.drain().await;
}

/// A server behind the proxy, the URL of its database there, and another server with a
/// database of that name.
async fn two_servers(proxy: &Proxy) -> (Fixture, String, Fixture) {
    let (old, url) = Fixture::behind(proxy).await;
    let new = Fixture::with_postgres(&[]).await;
    let database = format!("CREATE DATABASE {}", old.contract.slot);
    new.client.batch_execute(&database).await.unwrap();
    (old, url, new)
}

/// While an address moves, the session that checks, the stream, and the one that reads
/// what the slot had lost, may be with different servers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_from_another_server_than_the_session_is_refused() {
    let proxy = Proxy::start().await;
    let (old, url, new) = two_servers(&proxy).await;
    let (ours, other) = (old.postgres_address(), new.postgres_address());
    for turns in [&[&ours[..], &other[..]][..], &[&ours, &ours, &other]] {
        if turns.len() == 3 {
            old.drop_slot().await;
        }
        old.insert("a", "{}").await;
        old.recover(&[]).results();
        proxy.pass_on_in_turn(turns);
        let mut command = Relay::command(&old, &[]);
        let mut relay = Relay::spawn(command.env("POSTBOX_DATABASE_URL", &url));
        relay.wait_for_log("the address leads to two servers").await;
        assert!(!relay.log().contains("streaming"), "{}", relay.log());
        proxy.pass_on_to(&ours);
        relay.wait_for_log("streaming").await;
        old.wait_for_confirmation().await;
        relay.drain().await;
    }
    assert!(old.keys().await.len() >= 2);
}

/// It would drop the slot of one, and make it anew on the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_recovery_on_two_servers_is_refused_and_changes_neither() {
    let proxy = Proxy::start().await;
    let (old, url, new) = two_servers(&proxy).await;
    old.drop_slot().await;
    old.insert("a", "{}").await;
    let (ours, other) = (old.postgres_address(), new.postgres_address());
    proxy.pass_on_in_turn(&[&ours, &other]);
    let recovery = old.recover_as(&url, &[]);
    let complaint = recovery.complaint(3);
    assert!(complaint.contains("two servers"), "{complaint}");
    let slots = "SELECT count(*) FROM pg_replication_slots";
    for client in [&old.client, &new.client] {
        let slots: i64 = client.query_one(slots, &[]).await.unwrap().get(0);
        assert_eq!(slots, 0);
    }
    let begun = "SELECT count(*) FROM postbox.checkpoint WHERE lsn IS NULL";
    let begun: i64 = old.client.query_one(begun, &[]).await.unwrap().get(0);
    assert_eq!(begun, 0);
    old.recover(&[]).results();
    let relay = Relay::streaming(&old, &[]).await;
    old.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(old.records().await.len(), 1);
}
