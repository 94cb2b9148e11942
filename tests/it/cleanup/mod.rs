//! `postbox cleanup`, and relays that clean up: what goes, and above all what does not.

mod claims;
mod crash;
mod partitions;
mod relays;
mod rights;
mod rows;

use std::collections::HashSet;

use crate::support::{Fixture, Output, Relay, wait_until};

/// The flags of a relay whose fences come soon.
const FENCES: [&str; 2] = ["--heartbeat-interval", "1s"];

const WEEK: [&str; 2] = ["--older-than", "7d"];

impl Fixture {
    /// Makes all rows of the outbox so old that only what else speaks for them keeps them.
    async fn age(&self) {
        self.sql("UPDATE postbox.outbox SET created_at = now() - interval '8 days'")
            .await;
    }

    async fn sql(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap();
    }

    async fn count(&self, rows: &str) -> i64 {
        let sql = format!("SELECT count(*) FROM {rows}");
        self.client.query_one(&sql, &[]).await.unwrap().get(0)
    }

    /// The keys of what is in the outbox, in order.
    async fn outbox(&self) -> Vec<String> {
        let sql = "SELECT DISTINCT aggregate_id FROM postbox.outbox ORDER BY aggregate_id";
        let rows = self.client.query(sql, &[]).await.unwrap();
        rows.iter().map(|row| row.get(0)).collect()
    }

    /// Waits until the checkpoint of this relay sees every row.
    async fn wait_for_fence(&self, relay: &str) {
        let sql = format!(
            "postbox.outbox AS o, postbox.checkpoint AS c \
             WHERE c.name = '{relay}' AND NOT pg_visible_in_snapshot(o.xid, c.snapshot)"
        );
        wait_until("a fence is stored behind all rows", async || {
            self.count(&sql).await == 0
        })
        .await;
    }

    /// Fails if a row is gone that is not in Kafka. How many are gone.
    async fn assert_gone_is_published(&self) -> usize {
        let sql = "SELECT id FROM postbox_oracle.ledger AS l \
                   WHERE NOT EXISTS (SELECT FROM postbox.outbox AS o WHERE o.id = l.id)";
        let gone = self.client.query(sql, &[]).await.unwrap();
        let published: HashSet<uuid::Uuid> =
            self.records().await.iter().map(|seen| seen.id).collect();
        for row in &gone {
            let id: uuid::Uuid = row.get(0);
            assert!(published.contains(&id), "{id} is gone and not published");
        }
        gone.len()
    }

    /// Rows of these keys, delivered, and all rows old; nobody reads the slot any more.
    async fn publish_old(&self, keys: &[&str]) {
        let relay = Relay::streaming(self, &FENCES).await;
        for key in keys {
            self.insert(key, "{}").await;
        }
        self.wait_for_fence(&self.contract.slot).await;
        relay.drain().await;
        self.age().await;
    }
}

/// How many rows of this table were removed, or would be.
fn removed(output: &Output, table: &str) -> u64 {
    let line = output.results().lines().find_map(|line| {
        let rest = line.strip_prefix(&format!("\"postbox\".\"{table}\": rows "))?;
        rest.split_once(": ")?.1.parse().ok()
    });
    line.unwrap_or_else(|| panic!("nothing about {table} in {output:?}"))
}
