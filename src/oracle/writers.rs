//! Applications that write events, and what they committed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use postgres_protocol::escape::escape_identifier;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Statement, Transaction};

use super::{Choices, Entry, Ledger};
use crate::database::{self, Database};
use crate::error::{Error, ErrorKind, Result};

/// What the writers do.
#[derive(Debug, Clone)]
pub struct Load {
    /// The outbox's schema.
    pub schema: String,
    /// The aggregate type of all events, and so by default their topic.
    pub aggregate_type: String,
    /// How many sessions write at once.
    pub writers: usize,
    /// How many keys they share.
    pub keys: u64,
    /// The most events in one transaction.
    pub events_max: u64,
    /// How many transactions of a hundred are rolled back.
    pub rollback_percent: u64,
    /// How many events of a hundred are rolled back to a savepoint.
    pub savepoint_percent: u64,
    /// How many transactions of a hundred stay open for up to [`PAUSE_MAX`] before
    /// they end, while others begin and end.
    pub pause_percent: u64,
    /// How many transactions of a thousand raise every key at once,
    /// `large_rounds` times each.
    pub large_per_mille: u64,
    /// How many events of each key a large transaction has.
    pub large_rounds: i32,
    /// How many events of a thousand can never go out, for the name of their topic.
    pub poison_per_mille: u64,
    /// How many of a thousand have `bulk` bytes more, which do not compress, and may be more
    /// than their topic takes.
    pub bulky_per_mille: u64,
    /// How many bytes those are.
    pub bulk: i32,
    /// How many of a thousand are scheduled, up to [`SCHEDULE_MAX`] ahead.
    pub scheduled_per_mille: u64,
    /// The most events a second, over all writers.
    pub events_per_second: f64,
    /// What the choices are drawn from: the same seed, the same choices.
    pub seed: u64,
}

impl Load {
    /// A mixed load into one topic.
    pub fn new(schema: &str, aggregate_type: &str) -> Self {
        Self {
            schema: schema.to_owned(),
            aggregate_type: aggregate_type.to_owned(),
            writers: 4,
            keys: 50,
            events_max: 10,
            rollback_percent: 10,
            savepoint_percent: 10,
            pause_percent: 0,
            large_per_mille: 0,
            large_rounds: 0,
            poison_per_mille: 0,
            bulky_per_mille: 0,
            bulk: 0,
            scheduled_per_mille: 0,
            events_per_second: f64::INFINITY,
            seed: 1,
        }
    }
}

impl Load {
    /// How many events of a thousand do not just go out.
    fn odd_per_mille(&self) -> u64 {
        self.poison_per_mille + self.bulky_per_mille + self.scheduled_per_mille
    }
}

/// How long a transaction that pauses may stay open.
pub const PAUSE_MAX: Duration = Duration::from_millis(300);

/// How far ahead events are scheduled.
pub const SCHEDULE_MAX: Duration = Duration::from_secs(2);

/// Sessions that write until they are stopped.
pub struct Writers {
    tasks: JoinSet<Result<()>>,
    shared: Arc<Shared>,
}

struct Shared {
    database: Database,
    load: Load,
    committed: AtomicU64,
    rolled_back: AtomicU64,
    stop: watch::Sender<bool>,
    started: Instant,
}

/// Creates the ledger and the keys' versions, in a schema beside the outbox'.
///
/// # Errors
/// If the database refuses.
pub async fn prepare(client: &Client, schema: &str) -> Result<()> {
    let oracle = oracle_schema(schema);
    let sql = format!(
        "CREATE SCHEMA {oracle};
         CREATE TABLE {oracle}.key (key text PRIMARY KEY, version bigint NOT NULL);
         CREATE TABLE {oracle}.ledger (id uuid NOT NULL, key text NOT NULL, version bigint NOT NULL,
                                       is_ordered boolean NOT NULL DEFAULT true)"
    );
    let created = client.batch_execute(&sql).await;
    created.map_err(|error| database::sort("create the oracle's tables", error))
}

/// What was committed so far to this schema's outbox.
///
/// # Errors
/// If the database refuses.
pub async fn ledger(client: &Client, schema: &str) -> Result<Ledger> {
    let oracle = oracle_schema(schema);
    let parked = format!("{}.parked", escape_identifier(schema));
    let read = async {
        let sql = format!("SELECT id, key, version, is_ordered FROM {oracle}.ledger");
        let events = client.query(&sql, &[]).await?;
        // There is none where rows are claimed.
        let sql = "SELECT to_regclass($1) IS NOT NULL";
        let is_there: bool = client.query_one(sql, &[&parked]).await?.get(0);
        let dead = match is_there {
            true => {
                let sql = format!("SELECT id::uuid FROM {parked} WHERE status = 'dead'");
                client.query(&sql, &[]).await?
            }
            false => Vec::new(),
        };
        Ok((events, dead))
    };
    let (events, dead) = read
        .await
        .map_err(|error| database::sort("read the oracle's ledger", error))?;
    let entry = |row: &tokio_postgres::Row| Entry {
        key: row.get(1),
        version: row.get(2),
        is_ordered: row.get(3),
    };
    Ok(Ledger {
        events: events.iter().map(|row| (row.get(0), entry(row))).collect(),
        dead: dead.iter().map(|row| row.get(0)).collect(),
    })
}

impl Writers {
    /// Starts to write. [`prepare`] comes first.
    pub fn start(database: &Database, load: Load) -> Self {
        let shared = Arc::new(Shared {
            database: database.clone(),
            load,
            committed: AtomicU64::new(0),
            rolled_back: AtomicU64::new(0),
            stop: watch::Sender::new(false),
            started: Instant::now(),
        });
        let mut tasks = JoinSet::new();
        for writer in 0..shared.load.writers {
            tasks.spawn(write(Arc::clone(&shared), writer as u64));
        }
        Self { tasks, shared }
    }

    /// How many events were committed, as far as the writers saw.
    pub fn committed(&self) -> u64 {
        self.shared.committed.load(Ordering::Relaxed)
    }

    /// How many events were written and rolled back.
    pub fn rolled_back(&self) -> u64 {
        self.shared.rolled_back.load(Ordering::Relaxed)
    }

    /// Ends the transactions that are open, and then the sessions.
    ///
    /// # Errors
    /// If a writer failed for a reason that waiting will not mend.
    pub async fn stop(mut self) -> Result<()> {
        self.shared.stop.send_replace(true);
        while let Some(writer) = self.tasks.join_next().await {
            writer.map_err(|error| {
                Error::new(ErrorKind::Unexpected, "a writer panicked").caused_by(error)
            })??;
        }
        Ok(())
    }
}

/// What a session writes by.
struct Inserts {
    plain: Statement,
    /// Tables of others may lack what it writes: it is only there if there are such events.
    odd: Option<Statement>,
    large: Statement,
}

/// One session after another, until told to stop.
async fn write(shared: Arc<Shared>, writer: u64) -> Result<()> {
    let mut choices = Choices::new(shared.load.seed.wrapping_mul(1000) + writer);
    while !*shared.stop.borrow() {
        match session(&shared, &mut choices).await {
            // Deadlocks and servers that go away are part of the harm.
            Err(error) if error.kind().is_transient() => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            done => return done,
        }
    }
    Ok(())
}

async fn session(shared: &Shared, choices: &mut Choices) -> Result<()> {
    let mut session = shared.database.connect("postbox oracle").await?;
    let schema = &shared.load.schema;
    let prepared = async {
        let client = &session.client;
        Ok(Inserts {
            plain: client.prepare(&insert(schema)).await?,
            odd: match shared.load.odd_per_mille() {
                0 => None,
                _ => Some(client.prepare(&insert_odd(schema)).await?),
            },
            large: client.prepare(&insert_large(schema)).await?,
        })
    };
    let inserts = prepared
        .await
        .map_err(|error| database::sort("prepare to write", error))?;
    while !*shared.stop.borrow() {
        let written = match choices.below(1000) < shared.load.large_per_mille {
            true => large_transaction(shared, &session.client, &inserts.large).await,
            false => transaction(shared, &mut session.client, &inserts, choices).await,
        };
        written.map_err(|error| database::sort("write events", error))?;
        shared.keep_rate().await;
    }
    Ok(())
}

async fn transaction(
    shared: &Shared,
    client: &mut Client,
    inserts: &Inserts,
    choices: &mut Choices,
) -> Result<(), tokio_postgres::Error> {
    let load = &shared.load;
    // In order, so that two transactions do not wait for each other.
    let mut keys: Vec<u64> = (0..1 + choices.below(load.events_max))
        .map(|_| choices.below(load.keys))
        .collect();
    keys.sort_unstable();
    let mut transaction = client.transaction().await?;
    let mut kept = 0;
    for key in &keys {
        if choices.percent(load.savepoint_percent) {
            let savepoint = transaction.savepoint("undone").await?;
            shared.insert(&savepoint, inserts, *key, choices).await?;
            savepoint.rollback().await?;
        } else {
            shared.insert(&transaction, inserts, *key, choices).await?;
            kept += 1;
        }
    }
    if choices.percent(load.pause_percent) {
        let pause = PAUSE_MAX.mul_f64(choices.below(100) as f64 / 100.0);
        tokio::time::sleep(pause).await;
    }
    let undone = keys.len() as u64 - kept;
    if choices.percent(load.rollback_percent) {
        transaction.rollback().await?;
        shared
            .rolled_back
            .fetch_add(kept + undone, Ordering::Relaxed);
    } else {
        transaction.commit().await?;
        shared.committed.fetch_add(kept, Ordering::Relaxed);
        shared.rolled_back.fetch_add(undone, Ordering::Relaxed);
    }
    Ok(())
}

async fn large_transaction(
    shared: &Shared,
    client: &Client,
    insert: &Statement,
) -> Result<(), tokio_postgres::Error> {
    let load = &shared.load;
    let parameters: [&(dyn ToSql + Sync); 2] = [&load.large_rounds, &load.aggregate_type];
    let events = client.execute(insert, &parameters).await?;
    shared.committed.fetch_add(events, Ordering::Relaxed);
    Ok(())
}

impl Shared {
    async fn insert(
        &self,
        transaction: &Transaction<'_>,
        inserts: &Inserts,
        key: u64,
        choices: &mut Choices,
    ) -> Result<(), tokio_postgres::Error> {
        let load = &self.load;
        let key = format!("{}-{key}", load.aggregate_type);
        let parameters: [&(dyn ToSql + Sync); 2] = [&key, &load.aggregate_type];
        // A load without odd events draws the same choices as ever.
        let chosen = inserts.odd.as_ref().map(|odd| (odd, choices.below(1000)));
        let chosen = chosen.filter(|(_, chosen)| *chosen < load.odd_per_mille());
        let Some((odd, chosen)) = chosen else {
            let inserted = transaction.execute(&inserts.plain, &parameters).await;
            return inserted.map(drop);
        };
        let is_poison = chosen < load.poison_per_mille;
        let is_bulky = !is_poison && chosen < load.poison_per_mille + load.bulky_per_mille;
        let topic = is_poison.then_some("no topic's name");
        let bulk = if is_bulky { load.bulk } else { 0 };
        let delay = (!is_poison && !is_bulky).then(|| {
            let percent = choices.below(100) as f64 / 100.0;
            SCHEDULE_MAX.mul_f64(percent).as_secs_f64()
        });
        let parameters: [&(dyn ToSql + Sync); 5] =
            [&key, &load.aggregate_type, &topic, &bulk, &delay];
        transaction.execute(odd, &parameters).await.map(drop)
    }

    async fn keep_rate(&self) {
        let due = self.committed.load(Ordering::Relaxed) as f64 / self.load.events_per_second;
        let ahead = due - self.started.elapsed().as_secs_f64();
        if ahead > 0.0 {
            let stopped = async { self.stop.subscribe().wait_for(|stop| *stop).await.is_ok() };
            let _ = tokio::time::timeout(Duration::from_secs_f64(ahead), stopped).await;
        }
    }
}

/// One event.
fn insert(schema: &str) -> String {
    insert_one(
        schema,
        "payload",
        "json_build_object('version', version, 'status', 'paid')",
        "true",
    )
}

/// One event that cannot go out, or may be too large, or is scheduled.
fn insert_odd(schema: &str) -> String {
    insert_one(
        schema,
        "payload, topic, scheduled_at",
        "json_build_object('version', version, 'bulk', (
             SELECT string_agg(gen_random_uuid()::text, '') FROM generate_series(1, $4::integer / 36))),
         $3::text, clock_timestamp() + $5::float8 * interval '1 s'",
        "$5 IS NULL",
    )
}

/// One event with these values besides: the key's version is locked and raised first, so that
/// versions rise in commit order.
fn insert_one(schema: &str, columns: &str, values: &str, is_ordered: &str) -> String {
    let outbox = format!("{}.outbox", escape_identifier(schema));
    let oracle = oracle_schema(schema);
    format!(
        "WITH raised AS (
             INSERT INTO {oracle}.key AS k VALUES ($1, 1)
             ON CONFLICT (key) DO UPDATE SET version = k.version + 1 RETURNING version
         ), event AS (
             INSERT INTO {outbox} (aggregate_type, aggregate_id, event_type, {columns})
             SELECT $2, $1, 'order_changed', {values} FROM raised RETURNING id
         )
         INSERT INTO {oracle}.ledger SELECT event.id, $1, raised.version, {is_ordered} FROM event, raised"
    )
}

/// Many events of every key that there is. The keys are locked in the order in
/// which other transactions lock them.
fn insert_large(schema: &str) -> String {
    let outbox = format!("{}.outbox", escape_identifier(schema));
    let oracle = oracle_schema(schema);
    format!(
        "WITH locked AS MATERIALIZED (
             SELECT key, version FROM {oracle}.key ORDER BY length(key), key FOR UPDATE
         ), raised AS (
             UPDATE {oracle}.key AS k SET version = k.version + $1::integer FROM locked WHERE k.key = locked.key
             RETURNING k.key, k.version - $1::integer AS version
         ), event AS (
             INSERT INTO {outbox} (aggregate_type, aggregate_id, event_type, payload)
             SELECT $2, key, 'order_changed', json_build_object('version', version + round, 'status', 'paid')
             FROM raised, generate_series(1, $1::integer) AS round ORDER BY round
             RETURNING id, aggregate_id, payload
         )
         INSERT INTO {oracle}.ledger
         SELECT id, aggregate_id, (payload ->> 'version')::bigint FROM event"
    )
}

pub(super) fn oracle_schema(schema: &str) -> String {
    escape_identifier(&format!("{schema}_oracle"))
}
