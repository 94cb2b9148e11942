//! A partitioned outbox: made, kept ahead, read, and dropped behind.

mod ahead;
mod drop;
mod read;
mod setup;

use std::time::Duration;

use postbox::oracle;
use postbox::partitions::{self, Fate};
use tokio_postgres::Client;
use tokio_postgres::types::PgLsn;

use crate::support::{Fixture, wait_until};

impl Fixture {
    /// On the servers that all tests share, set up with a partitioned outbox and these flags.
    async fn partitioned(flags: &[&str]) -> Self {
        let fixture = Self::empty().await;
        let flags = [&["--partitioned", "hour"], flags].concat();
        fixture.setup(&flags).results();
        oracle::prepare(&fixture.client, "postbox").await.unwrap();
        fixture
    }

    /// Drops all partitions but the default one.
    async fn drop_partitions(&self) {
        let sql = "DO $$ DECLARE old regclass; BEGIN \
                       FOR old IN SELECT partition FROM postbox.partitions() LOOP \
                           EXECUTE format('DROP TABLE %s', old); \
                       END LOOP; \
                   END $$";
        self.client.batch_execute(sql).await.unwrap();
    }

    /// From now on a partition is for two seconds, and there are some for six.
    async fn make_partitions_narrow(&self) {
        self.drop_partitions().await;
        let sql = "UPDATE postbox.partitioning SET width = '2 s', ahead = '6 s'; SELECT postbox.make_partitions()";
        self.client.batch_execute(sql).await.unwrap();
    }

    /// The partitions but for the default one.
    async fn partitions(&self) -> Vec<String> {
        let partitions = partitions::list(&self.client, &self.contract).await;
        let tables = partitions.unwrap().into_iter();
        tables.map(|partition| partition.table).collect()
    }

    async fn snapshot(&self) -> String {
        let sql = "SELECT pg_current_snapshot()::text";
        self.client.query_one(sql, &[]).await.unwrap().get(0)
    }

    /// Drops old partitions, with rows that this snapshot sees.
    async fn drop_seen_by(
        &self,
        client: &Client,
        snapshot: &str,
        age: Duration,
    ) -> Vec<(String, Fate)> {
        let may_go = format!("pg_visible_in_snapshot(o.xid, '{snapshot}')");
        self.drop_older_than(client, age, &may_go).await.unwrap()
    }

    /// Drops old partitions whose rows may go, each in a transaction of its own, as often as it
    /// takes.
    async fn drop_older_than(
        &self,
        client: &Client,
        age: Duration,
        may_go: &str,
    ) -> postbox::Result<Vec<(String, Fate)>> {
        let mut fates = Vec::new();
        for partition in partitions::older_than(client, &self.contract, age).await? {
            let mut fate = Fate::Busy;
            for _ in 0..10 {
                let begin = "BEGIN ISOLATION LEVEL READ COMMITTED";
                client.batch_execute(begin).await.unwrap();
                let dropped = partitions::drop_if(client, &self.contract, &partition, may_go).await;
                client.batch_execute("COMMIT").await.unwrap();
                fate = dropped?;
                if fate != Fate::Busy {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            fates.push((partition.table, fate));
        }
        Ok(fates)
    }

    /// Waits until the slot is past this place.
    async fn wait_until_confirmed(&self, lsn: PgLsn) {
        wait_until("the slot is past", async || self.confirmed().await >= lsn).await;
    }
}

const HOUR: Duration = Duration::from_secs(3600);

/// An event that was created so long ago, or is to be.
fn insert_at(fixture: &Fixture, key: &str, created_at: &str) -> String {
    format!(
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload, created_at) \
         VALUES ('{}', '{key}', 'changed', '{{}}', {created_at})",
        fixture.topic
    )
}
