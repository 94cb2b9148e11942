//! spakky's table. Its records have no key, so that there is nothing to keep in order; what
//! must hold is that none is lost, and few are repeated.

use std::time::Duration;

use postbox::oracle::{self, Verdict};

use crate::support::{Fixture, Relay, WINDOW, wait_until};

pub(super) const SPAKKY: [&str; 4] = ["--mode", "poll", "--table-preset", "spakky"];

impl Fixture {
    /// On the servers that all tests share, with spakky's table, through which the oracle
    /// writes.
    pub(crate) async fn spakky() -> Self {
        let fixture = Self::empty().await;
        let sql = include_str!("spakky.sql");
        fixture.client.batch_execute(sql).await.unwrap();
        oracle::prepare(&fixture.client, "postbox").await.unwrap();
        fixture
    }

    /// The same with one column more, which has the key, and is null for some.
    pub(super) async fn spakky_with_key() -> Self {
        let fixture = Self::spakky().await;
        let sql = "ALTER TABLE spakky_event_outbox ADD COLUMN customer text; \
                   CREATE INDEX ON spakky_event_outbox (event_name, customer, created_at); \
                   CREATE FUNCTION customer() RETURNS trigger LANGUAGE plpgsql AS $$ \
                   BEGIN NEW.customer = NEW.headers ->> 'key'; RETURN NEW; END $$; \
                   CREATE TRIGGER customer BEFORE INSERT ON spakky_event_outbox \
                   FOR EACH ROW EXECUTE FUNCTION customer()";
        fixture.client.batch_execute(sql).await.unwrap();
        fixture
    }

    /// How many rows of spakky's table are so.
    pub(crate) async fn messages_that_are(&self, what: &str) -> i64 {
        let sql = format!("SELECT count(*) FROM spakky_event_outbox WHERE {what}");
        self.client.query_one(&sql, &[]).await.unwrap().get(0)
    }

    pub(super) async fn wait_until_sent(&self) {
        wait_until("all is published", async || {
            self.messages_that_are("published_at IS NULL").await == 0
        })
        .await;
    }

    /// Waits until all is published, stops the relay, and asks the oracle.
    async fn judge_messages(&self, relay: Relay) -> Verdict {
        self.wait_until_sent().await;
        relay.drain().await;
        self.verdict().await
    }
}

/// Starts a relay that claims rows of spakky's table, with these flags besides, and waits
/// until it does.
pub(super) async fn claiming(fixture: &Fixture, flags: &[&str]) -> Relay {
    let mut relay = Relay::start(fixture, &[&SPAKKY, flags].concat());
    relay.wait_for_log("polling, by claims").await;
    relay
}

/// Whether all is well but for the keys, which there are none of.
pub(crate) fn is_clean_without_keys(verdict: &Verdict, duplicates_max: usize) -> bool {
    verdict.misplaced.len() == verdict.records
        && verdict.lost.is_empty()
        && verdict.ghosts.is_empty()
        && verdict.duplicates <= duplicates_max
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steady_load_arrives_complete_and_once() {
    let fixture = Fixture::spakky().await;
    let relay = claiming(&fixture, &[]).await;
    fixture.write_for_a_while().await;
    let verdict = fixture.judge_messages(relay).await;
    assert!(
        verdict.committed > 500 && is_clean_without_keys(&verdict, 0),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigkill_in_a_loop_loses_nothing() {
    let fixture = Fixture::spakky().await;
    let writers = fixture.writers(fixture.load());
    for round in 0..4 {
        let relay = claiming(&fixture, &["--in-flight-max", "500"]).await;
        tokio::time::sleep(Duration::from_millis(400 + round * 200)).await;
        relay.kill();
    }
    writers.stop().await.unwrap();
    let relay = claiming(&fixture, &[]).await;
    let verdict = fixture.judge_messages(relay).await;
    assert!(
        verdict.committed > 500 && is_clean_without_keys(&verdict, 4 * (500 + WINDOW)),
        "{verdict}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_relays_share_a_table() {
    let fixture = Fixture::spakky().await;
    let writers = fixture.writers(fixture.load());
    let relays = [claiming(&fixture, &[]).await, claiming(&fixture, &[]).await];
    tokio::time::sleep(Duration::from_secs(4)).await;
    writers.stop().await.unwrap();
    fixture.wait_until_sent().await;
    let shares = relays
        .iter()
        .map(|relay| relay.published(&fixture.topic))
        .collect::<Vec<_>>();
    assert!(shares.iter().all(|share| *share > 100), "{shares:?}");
    let [first, second] = relays;
    first.drain().await;
    let verdict = fixture.judge_messages(second).await;
    assert!(
        verdict.committed > 500 && is_clean_without_keys(&verdict, 0),
        "{verdict}"
    );
}

/// It is tried as often as is said, and then no more; others go on meanwhile. A relay
/// that stops leaves no claims but those of rows that wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_cannot_go_out_is_parked_and_holds_up_nobody() {
    let fixture = Fixture::spakky().await;
    let relay = claiming(&fixture, &["--max-attempts", "2"]).await;
    let sql = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, payload) VALUES ('not a topic', 'a', '{}')";
    fixture.client.batch_execute(sql).await.unwrap();
    fixture.insert_many("a", "{}", 10).await;
    wait_until("others are published", async || {
        fixture.messages_that_are("published_at IS NOT NULL").await == 10
    })
    .await;
    wait_until("it is put off", async || {
        fixture.messages_that_are("retry_count = 1").await == 1
    })
    .await;
    let seconds = "SELECT extract(epoch FROM claimed_at + interval '300 s' - now())::float8 \
                   FROM spakky_event_outbox WHERE retry_count = 1";
    let seconds = fixture.client.query_one(seconds, &[]).await.unwrap();
    let seconds: f64 = seconds.get(0);
    assert!((1.0..=10.0).contains(&seconds), "{seconds}");
    wait_until("it is tried again", async || {
        fixture.messages_that_are("retry_count = 2").await == 1
    })
    .await;
    let due = "UPDATE spakky_event_outbox SET claimed_at = NULL WHERE retry_count = 2";
    fixture.client.batch_execute(due).await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(fixture.messages_that_are("retry_count = 2").await, 1);
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 10);
}

pub(super) const BY_CUSTOMER: [&str; 2] = ["--column", "partition_key=customer"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_that_has_the_key_keeps_its_order() {
    let fixture = Fixture::spakky_with_key().await;
    let writers = fixture.writers(fixture.load());
    let relays = [
        claiming(&fixture, &BY_CUSTOMER).await,
        claiming(&fixture, &BY_CUSTOMER).await,
    ];
    tokio::time::sleep(Duration::from_secs(4)).await;
    writers.stop().await.unwrap();
    let [first, second] = relays;
    fixture.wait_until_sent().await;
    first.drain().await;
    let verdict = fixture.judge_messages(second).await;
    assert!(verdict.committed > 500 && verdict.is_clean(0), "{verdict}");
}

/// They wait for nobody, and nobody for them; the id is their key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_whose_key_is_null_go_out_too() {
    let fixture = Fixture::spakky_with_key().await;
    fixture.insert_many("none", "{}", 1_500).await;
    let sql = "UPDATE spakky_event_outbox SET customer = NULL";
    fixture.client.batch_execute(sql).await.unwrap();
    fixture.insert("a", "{}").await;
    let bad = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, payload) VALUES ('not a topic', NULL, '{}')";
    fixture.client.batch_execute(bad).await.unwrap();
    let relay = claiming(&fixture, &BY_CUSTOMER).await;
    wait_until("all that can are published", async || {
        fixture.messages_that_are("published_at IS NULL").await == 1
    })
    .await;
    relay.drain().await;
    let records = fixture.records().await;
    assert_eq!(records.len(), 1_501);
    let by_id = |seen: &&oracle::Seen| seen.key == seen.id.to_string();
    assert_eq!(records.iter().filter(by_id).count(), 1_500);
}
