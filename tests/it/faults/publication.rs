//! A publication that was not there for a while. Before Postgres 18 the slot says so
//! if the publication is gone, and nothing if its table is; since then it never does.

use postbox::servers::Server;

use super::assert_recoverable;
use crate::support::{Fixture, Relay, shared_brokers};

const CHANGES: &[(&str, &str, &str)] = &[
    (
        "DROP PUBLICATION postbox",
        "CREATE PUBLICATION postbox FOR TABLE postbox.outbox \
         WITH (publish = 'insert', publish_via_partition_root = true)",
        "was dropped and made again after the slot was set up",
    ),
    (
        "ALTER PUBLICATION postbox DROP TABLE postbox.outbox",
        "ALTER PUBLICATION postbox ADD TABLE postbox.outbox",
        "had its tables taken out and put back after the slot was set up",
    ),
    (
        "ALTER PUBLICATION postbox SET (publish = 'delete')",
        "ALTER PUBLICATION postbox SET (publish = 'insert')",
        "was altered after the slot was set up",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_a_publication_hid_are_noticed_on_postgres_15() {
    rows_that_a_publication_hid_are_noticed("15").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_a_publication_hid_are_noticed_on_postgres_18() {
    rows_that_a_publication_hid_are_noticed("18").await;
}

async fn rows_that_a_publication_hid_are_noticed(major: &str) {
    let postgres = Server::postgres_of(major, &[]).unwrap();
    let brokers = &shared_brokers();
    for (hide, show, what) in CHANGES {
        for up in [true, false] {
            let fixture = Fixture::beside(&postgres, brokers).await;
            let relay = Relay::streaming(&fixture, &["--heartbeat-interval", "1s"]).await;
            fixture.insert("before", "{}").await;
            fixture.wait_for_confirmation().await;
            let mut running = Some(relay);
            if !up && let Some(relay) = running.take() {
                relay.drain().await;
            }
            for step in [hide, show] {
                fixture.client.batch_execute(step).await.unwrap();
                fixture.insert("hidden", "{}").await;
            }
            if let Some(mut relay) = running {
                assert_eq!(
                    relay.exit_code().await,
                    5,
                    "{major}, {hide}: {}",
                    relay.log()
                );
            }
            let mut next = Relay::start(&fixture, &[]);
            assert_eq!(next.exit_code().await, 5, "{major}, {hide}: {}", next.log());
            let log = next.log();
            assert!(
                log.contains(what) && log.contains("run `postbox recover`"),
                "{log}"
            );
            assert_recoverable(&fixture, "hidden").await;
        }
    }
}

/// There is a publication, but there was none where the slot is. Before Postgres 18 the
/// server refuses to decode what lies there, and nobody has to look.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_younger_than_the_slots_position_is_not_one_that_is_gone() {
    let fixture = Fixture::new().await;
    let sql = "SELECT current_setting('server_version_num')::integer >= 180000";
    let is_silent: bool = fixture.client.query_one(sql, &[]).await.unwrap().get(0);
    let (interval, why) = match is_silent {
        true => (
            "1s",
            "publication \"postbox\" was dropped and made again after the slot was set up",
        ),
        false => (
            "10m",
            "publication \"postbox\" does not exist (SQLSTATE 42704); there was none at this point of the WAL",
        ),
    };
    let mut relay = Relay::streaming(&fixture, &["--heartbeat-interval", interval]).await;
    fixture.insert("before", "{}").await;
    fixture.wait_for_confirmation().await;
    let (hide, show, _) = CHANGES[0];
    let younger = format!(
        "{hide}; INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
         VALUES ('{}', 'hidden', 'changed', '{{}}')",
        fixture.topic
    );
    relay.signal("STOP");
    fixture.client.batch_execute(&younger).await.unwrap();
    fixture.client.batch_execute(show).await.unwrap();
    relay.signal("CONT");
    assert_eq!(relay.exit_code().await, 5, "{}", relay.log());
    let log = relay.log();
    assert!(
        log.contains(why) && log.contains("run `postbox recover`"),
        "{log}"
    );
    assert!(!log.contains("CREATE PUBLICATION"), "{log}");
    assert_recoverable(&fixture, "hidden").await;
}
