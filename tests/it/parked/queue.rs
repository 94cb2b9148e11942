//! Rows of `postbox.parked`, written by hand as a relay writes them.

use postbox::contract::Contract;
use tokio_postgres::Client;
use tokio_postgres::types::ToSql;

/// A row. What it does not say is as in a row that a relay has just parked.
#[derive(Clone)]
pub(super) struct Row<'a> {
    pub(super) id: &'a str,
    pub(super) relay: &'a str,
    pub(super) status: &'a str,
    pub(super) topic: Option<&'a str>,
    pub(super) key: Option<&'a str>,
    pub(super) event_type: Option<&'a str>,
    /// From now on; none: infinity.
    pub(super) due_in: Option<&'a str>,
    /// How long ago.
    pub(super) taken: Option<&'a str>,
    pub(super) parked: &'a str,
    pub(super) awaits_topic: bool,
    pub(super) attempts: i32,
    pub(super) error: Option<&'a str>,
    pub(super) columns: Vec<(&'a str, Option<&'a [u8]>)>,
}

impl<'a> Row<'a> {
    pub(super) fn new(id: &'a str, status: &'a str) -> Self {
        Self {
            id,
            relay: "orders",
            status,
            topic: Some("order"),
            key: Some("k"),
            event_type: Some("order_paid"),
            due_in: None,
            taken: None,
            parked: "0s",
            awaits_topic: false,
            attempts: 3,
            error: Some("refused"),
            columns: vec![
                ("seq", Some(b"7")),
                ("id", Some(id.as_bytes())),
                ("aggregate_type", Some(b"order")),
                ("aggregate_id", Some(b"k")),
                ("event_type", Some(b"order_paid")),
                ("topic", None),
                ("payload", Some(br#"{"card": "4111"}"#)),
                ("headers", Some(br#"{"ssn": "078-05"}"#)),
            ],
        }
    }

    /// The first waiting row of its key: it is due then.
    pub(super) fn head(id: &'a str, due_in: &'a str) -> Self {
        Self {
            due_in: Some(due_in),
            ..Self::new(id, "waiting")
        }
    }

    pub(super) fn key(self, key: &'a str) -> Self {
        Self {
            key: Some(key),
            ..self
        }
    }

    pub(super) async fn insert(&self, client: &Client, contract: &Contract) {
        self.insert_many(client, contract, 1).await;
    }

    /// Inserts so many of them. With several, each has its number behind its id.
    pub(super) async fn insert_many(&self, client: &Client, contract: &Contract, rows: i32) {
        let names: Vec<&str> = self.columns.iter().map(|(name, _)| *name).collect();
        let parameters: [&(dyn ToSql + Sync); 15] = [
            &self.id,
            &self.relay,
            &self.status,
            &self.topic,
            &self.key,
            &self.event_type,
            &self.due_in,
            &self.taken,
            &self.parked,
            &self.awaits_topic,
            &self.attempts,
            &self.error,
            &message(&self.columns),
            &names,
            &rows,
        ];
        let sql = format!(
            "INSERT INTO {} (id, relay, status, topic, key, event_type, due_at, taken_at, parked_at, awaits_topic, \
                 attempts, error, tried_at, decided_by, committed_at, message, column_names, column_types) \
             SELECT CASE $15 WHEN 1 THEN $1::text ELSE $1 || n END, $2::text, $3::text, $4::text, $5::text, $6::text, \
                    coalesce(now() + $7::text::interval, 'infinity'), now() - $8::text::interval, \
                    now() - $9::text::interval, $10::boolean, $11::integer, $12::text, now(), \
                    CASE $3 WHEN 'skipped' THEN 'ann' END, now(), $13::bytea, $14::text[], \
                    array_fill(25::oid, ARRAY[cardinality($14::text[])]) \
             FROM generate_series(1, $15::integer) AS n",
            contract.table("parked")
        );
        client.execute(&sql, &parameters).await.unwrap();
    }
}

/// The message Insert of pgoutput.
fn message(columns: &[(&str, Option<&[u8]>)]) -> Vec<u8> {
    let count = u16::try_from(columns.len()).unwrap();
    let mut bytes = [&b"I\0\0\0\x07N"[..], &count.to_be_bytes()].concat();
    for (_, value) in columns {
        match value {
            None => bytes.push(b'n'),
            Some(value) => {
                bytes.push(b't');
                bytes.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
                bytes.extend(*value);
            }
        }
    }
    bytes
}

/// Each row by its number: its id, its status, and when it is due.
pub(super) async fn states(client: &Client, contract: &Contract) -> Vec<String> {
    let sql = format!(
        "SELECT format('%s %s %s', id, status, CASE WHEN due_at = 'infinity' THEN 'behind' \
                WHEN due_at <= now() THEN 'due' ELSE 'later' END) \
         FROM {} ORDER BY number",
        contract.table("parked")
    );
    let rows = client.query(&sql, &[]).await.unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}
