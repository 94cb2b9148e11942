//! What a relay reads and writes of the parked table.
//!
//! Everything is a short transaction of its own, with settings that end with it, as the
//! session may be one that a pooler lends to others. Rows are named by relay and id.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio_postgres::types::{PgLsn, ToSql, Type};

use super::statements::Statements;
use super::{Due, NewRow, Status, Taken};
use crate::catalog::{self, Slices, System};
use crate::contract::Contract;
use crate::database::{Database, Session, despite_deadlocks, query_after, sort};
use crate::error::{Error, ErrorKind, Result};
use crate::pgoutput::Column;
use crate::source::{Place, Row};
use crate::timestamp::Timestamp;

/// Begins each transaction. What is parked must outlast a crash once its position is
/// confirmed; a standby that is away is waited for, as by the application. So is a lock:
/// somebody decides about a row. The planner may not know how much there is by now.
const BEGIN: &str = "BEGIN; \
    SELECT set_config('synchronous_commit', 'on', true) \
    WHERE current_setting('synchronous_commit') IN ('off', 'local'); \
    SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0; \
    SET LOCAL idle_in_transaction_session_timeout = '5s'; SET LOCAL row_security = off; \
    SET LOCAL enable_seqscan = off; SET LOCAL jit = off; SET LOCAL max_parallel_workers_per_gather = 0";

/// The most keys or scheduled events that are taken at once, and how many follow of one key.
const TAKE_MAX: i64 = 256;
const RUN_MAX: i64 = 1000;

/// After so many bytes of rows no more are taken at once.
const TAKE_BYTES: i64 = 16 << 20;

/// A parameter of a statement.
type Parameter<'p> = (&'p (dyn ToSql + Sync), Type);

/// A session, and what is done by it.
#[derive(Clone)]
pub(crate) struct Store {
    session: Arc<Session>,
    relay: String,
    statements: Arc<Statements>,
}

/// What holds back events when a relay begins.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// Topics and keys of which an event waits.
    pub(crate) keys: Vec<(String, String)>,
    /// Topics that were refused altogether, and why.
    pub(crate) topics: Vec<(String, String)>,
    /// Events that were given up, and that a restart may read again.
    pub(crate) decided: Vec<String>,
}

/// How much there is.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Count {
    pub(crate) scheduled: i64,
    pub(crate) waiting: i64,
    pub(crate) dead: i64,
    /// Of what is waiting or dead.
    pub(crate) bytes: i64,
    /// The age of the oldest event that waits for another try, in seconds.
    pub(crate) oldest_seconds: f64,
}

impl Count {
    /// One row more.
    pub(crate) fn count(&mut self, row: &NewRow) {
        match row.status {
            Status::Scheduled => self.scheduled += 1,
            Status::Waiting => self.waiting += 1,
            Status::Dead => self.dead += 1,
            Status::Skipped => {}
        }
        if row.status != Status::Scheduled {
            self.bytes += i64::try_from(row.row.bytes.len()).unwrap_or(i64::MAX);
        }
    }

    /// So much less.
    pub(crate) fn take(&mut self, less: &Self) {
        self.scheduled -= less.scheduled;
        self.waiting -= less.waiting;
        self.dead -= less.dead;
        self.bytes -= less.bytes;
    }

    /// So much more.
    pub(crate) fn add(&mut self, more: &Self) {
        self.scheduled += more.scheduled;
        self.waiting += more.waiting;
        self.dead += more.dead;
        self.bytes += more.bytes;
    }
}

/// What became of rows that were taken.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    /// Sent, or cancelled: they are forgotten.
    pub(crate) gone: Vec<String>,
    pub(crate) refused: Vec<Refused>,
    /// Not tried: they are due again.
    pub(crate) untried: Vec<String>,
    /// They wait for their topic, with all others of it: its name, and why.
    pub(crate) topics: Vec<(String, String)>,
    /// They wait for this topic, each of them.
    pub(crate) awaiting: Vec<(String, String)>,
    /// Scheduled events that join the queue of their key, with its topic and key.
    pub(crate) joining: Vec<(String, Option<String>, Option<String>)>,
    /// Events whose time has not come after all.
    pub(crate) early: Vec<(String, Timestamp)>,
    /// Keys of rows that have left their queue.
    pub(crate) keys: HashSet<(String, String)>,
}

/// A row that was tried in vain.
#[derive(Debug)]
pub(crate) struct Refused {
    pub(crate) id: String,
    pub(crate) topic: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) why: String,
    pub(crate) backoff: Duration,
    pub(crate) is_dead: bool,
    pub(crate) owes_letter: bool,
}

impl Store {
    /// Opens a session on the server that was checked: what is parked on another is lost to
    /// this one.
    ///
    /// # Errors
    /// If Postgres cannot be reached.
    pub(crate) async fn open(
        database: &Database,
        contract: &Contract,
        system: &System,
    ) -> Result<Self> {
        let relay = contract.slot.clone();
        let session = database
            .connect_pooled(&format!("postbox {relay} parked"))
            .await?;
        let found = catalog::system(&session.client).await?;
        system.check_same(&found, "open a session to park events by")?;
        Ok(Self {
            session: Arc::new(session),
            statements: Arc::new(Statements::new(contract, Slices::ALL, "true")),
            relay,
        })
    }

    /// The same, for a relay that serves these slices, and writes only while this condition
    /// in SQL holds, by which it is the one that is at work.
    #[must_use]
    pub(crate) fn serving(self, contract: &Contract, slices: Slices, fence: &str) -> Self {
        Self {
            statements: Arc::new(Statements::new(contract, slices, fence)),
            ..self
        }
    }

    /// The relay's name.
    pub(crate) fn relay(&self) -> &str {
        &self.relay
    }

    /// Waits until the session is gone, and says why.
    pub(crate) async fn ended(&self) -> Error {
        self.session.ended().await
    }

    /// What holds back events. `decided`: also what was given up and may be read again.
    pub(crate) async fn held(&self, decided: bool) -> Result<Held> {
        let doing = "read what is parked";
        let relay: [(&(dyn ToSql + Sync), Type); 1] = [(&self.relay, Type::TEXT)];
        let client = &self.session.client;
        let given_up = async {
            match decided {
                true => client.query_typed(&self.statements.decided, &relay).await,
                false => Ok(Vec::new()),
            }
        };
        let (begun, keys, topics, decided, ended) = tokio::join!(
            client.batch_execute(BEGIN),
            client.query_typed(&self.statements.keys, &relay),
            client.query_typed(&self.statements.topics, &relay),
            given_up,
            client.batch_execute("COMMIT"),
        );
        let read = begun.and_then(|()| {
            ended?;
            Ok((keys?, topics?, decided?))
        });
        let (keys, topics, decided) = read.map_err(|error| sort(doing, error))?;
        Ok(Held {
            keys: keys.iter().map(|row| (row.get(0), row.get(1))).collect(),
            topics: topics.iter().map(|row| (row.get(0), row.get(1))).collect(),
            decided: decided.iter().map(|row| row.get(0)).collect(),
        })
    }

    /// How much is waiting or dead. What is scheduled is not counted.
    pub(crate) async fn count(&self) -> Result<Count> {
        let rows = self.run("count what is parked", &self.statements.count, &[]);
        let rows = rows.await?;
        let Some(row) = rows.first() else {
            return Ok(Count::default());
        };
        Ok(Count {
            scheduled: 0,
            waiting: row.get(0),
            dead: row.get(1),
            bytes: row.get(2),
            oldest_seconds: row.get(3),
        })
    }

    /// How many events are scheduled. It reads an index entry of each.
    pub(crate) async fn count_scheduled(&self) -> Result<i64> {
        let counted = self.run(
            "count what is scheduled",
            &self.statements.count_scheduled,
            &[],
        );
        Ok(counted.await?.first().map_or(0, |row| row.get(0)))
    }

    /// Parks rows, in this order, and says which are new. One that is there, and
    /// that a restart could read again, keeps what was decided about it.
    ///
    /// # Errors
    /// `SlotInUse` if another relay is at work.
    pub(crate) async fn park(&self, rows: &[NewRow]) -> Result<HashSet<String>> {
        let mut new = HashSet::new();
        let mut rest = rows;
        while let Some(first) = rest.first() {
            // One statement takes rows of one shape, and no id twice.
            let mut ids = HashSet::new();
            let fits = |row: &NewRow| {
                Arc::ptr_eq(&row.columns, &first.columns) && ids.insert(row.id.clone())
            };
            let count = rest.iter().map(fits).take_while(|fits| *fits).count();
            let (now, later) = rest.split_at(count);
            new.extend(self.park_alike(now).await?);
            rest = later;
        }
        Ok(new)
    }

    async fn park_alike(&self, rows: &[NewRow]) -> Result<Vec<String>> {
        let of = |value: fn(&NewRow) -> Option<&str>| rows.iter().map(value).collect::<Vec<_>>();
        let due = |row: &NewRow| match row.due {
            Due::At(time) => Some(time.to_string()),
            Due::Never => Some("infinity".to_owned()),
            Due::In(_) => None,
        };
        let delay = |row: &NewRow| match row.due {
            Due::In(delay) => i64::try_from(delay.as_millis()).unwrap_or(i64::MAX),
            _ => 0,
        };
        let lsn = |row: &NewRow| Some(row.row.place.commit_lsn).filter(|lsn| u64::from(*lsn) > 0);
        let ids = of(|row| Some(&row.id));
        let statuses = of(|row| Some(row.status.name()));
        let dues: Vec<Option<String>> = rows.iter().map(due).collect();
        let delays: Vec<i64> = rows.iter().map(delay).collect();
        let topics = of(|row| row.topic.as_deref());
        let keys = of(|row| row.key.as_deref());
        let types = of(|row| row.event_type.as_deref());
        let awaiting: Vec<bool> = rows.iter().map(|row| row.awaits_topic).collect();
        let attempts: Vec<i64> = rows.iter().map(|row| row.attempts.into()).collect();
        let errors = of(|row| row.error.as_deref());
        let letters: Vec<bool> = rows.iter().map(|row| row.owes_letter).collect();
        let lsns: Vec<Option<PgLsn>> = rows.iter().map(lsn).collect();
        let xids = of(|row| row.xid.as_deref());
        let committed: Vec<String> = rows
            .iter()
            .map(|row| row.row.committed_at.to_string())
            .collect();
        let messages: Vec<&[u8]> = rows.iter().map(|row| &*row.row.bytes).collect();
        let columns = &rows[0].columns;
        let names: Vec<&str> = columns.iter().map(|column| &*column.name).collect();
        let oids: Vec<u32> = columns.iter().map(|column| column.type_oid).collect();
        let parameters: [(&(dyn ToSql + Sync), Type); 17] = [
            (&ids, Type::TEXT_ARRAY),
            (&statuses, Type::TEXT_ARRAY),
            (&dues, Type::TEXT_ARRAY),
            (&delays, Type::INT8_ARRAY),
            (&topics, Type::TEXT_ARRAY),
            (&keys, Type::TEXT_ARRAY),
            (&types, Type::TEXT_ARRAY),
            (&awaiting, Type::BOOL_ARRAY),
            (&attempts, Type::INT8_ARRAY),
            (&errors, Type::TEXT_ARRAY),
            (&letters, Type::BOOL_ARRAY),
            (&lsns, Type::PG_LSN_ARRAY),
            (&xids, Type::TEXT_ARRAY),
            (&committed, Type::TEXT_ARRAY),
            (&messages, Type::BYTEA_ARRAY),
            (&names, Type::TEXT_ARRAY),
            (&oids, Type::OID_ARRAY),
        ];
        failpoint!("parking");
        let parked = self.run("park events", &self.statements.park, &parameters);
        let parked = parked.await?;
        failpoint!("parked");
        if parked.len() == rows.len() {
            let new = parked.iter().filter(|row| row.get(1));
            return Ok(new.map(|row| row.get(0)).collect());
        }
        let message = format!(
            "relay \"{}\" may park no more: another is at work",
            self.relay
        );
        Err(Error::new(ErrorKind::SlotInUse, message))
    }

    /// Nothing is being tried any more by whoever was at work before.
    pub(crate) async fn release_taken(&self) -> Result<()> {
        let released = self.run("release parked events", &self.statements.release_taken, &[]);
        released.await.map(drop)
    }

    /// Takes what waits for another try and is due: of each key the first, and those behind
    /// it that were never refused, in order.
    pub(crate) async fn take_waiting(&self) -> Result<Vec<Taken>> {
        let parameters: [(&(dyn ToSql + Sync), Type); 3] = [
            (&TAKE_MAX, Type::INT8),
            (&RUN_MAX, Type::INT8),
            (&TAKE_BYTES, Type::INT8),
        ];
        let taken = self.run(
            "take parked events",
            &self.statements.take_waiting,
            &parameters,
        );
        taken.await?.iter().map(taken_of).collect()
    }

    /// Takes scheduled events whose time has come, but for those that somebody is cancelling;
    /// and says from which time on others may be due, once these are gone. None before `from`
    /// is looked at.
    pub(crate) async fn take_scheduled(&self, from: Timestamp) -> Result<(Vec<Taken>, Timestamp)> {
        let doing = "take scheduled events";
        let client = &self.session.client;
        let limits: [(&(dyn ToSql + Sync), Type); 4] = [
            (&self.relay, Type::TEXT),
            (&(TAKE_MAX * 4), Type::INT8),
            (&TAKE_BYTES, Type::INT8),
            (&beginning(from), Type::TEXT),
        ];
        let (begun, locked) = tokio::join!(
            client.batch_execute(BEGIN),
            client.query_typed(&self.statements.lock_scheduled, &limits),
        );
        let due = begun.and(locked).map_err(|error| sort(doing, error))?;
        let (locked, passed): (Vec<_>, Vec<_>) = due.iter().partition(|row| row.get(2));
        let time = |row: &&tokio_postgres::Row| Timestamp::from_unix_micros(row.get(1));
        let first_passed = passed.iter().map(time).min();
        let next = first_passed.or_else(|| locked.iter().map(time).max());
        let next = next.unwrap_or(from);
        let ids: Vec<&str> = locked.iter().map(|row| row.get(0)).collect();
        if ids.is_empty() {
            let ended = client.batch_execute("COMMIT").await;
            return ended
                .map(|()| (Vec::new(), next))
                .map_err(|error| sort(doing, error));
        }
        // A statement of its own: it sees what was committed before the locks were ours.
        let parameters: [(&(dyn ToSql + Sync), Type); 2] =
            [(&self.relay, Type::TEXT), (&ids, Type::TEXT_ARRAY)];
        let (taken, ended) = tokio::join!(
            client.query_typed(&self.statements.take_scheduled, &parameters),
            client.batch_execute("COMMIT"),
        );
        let taken = taken.and_then(|rows| ended.map(|()| rows));
        let taken = taken.map_err(|error| sort(doing, error))?;
        let taken: Result<Vec<Taken>> = taken.iter().map(taken_of).collect();
        Ok((taken?, next))
    }

    /// The time now, by the server's clock, and when the first scheduled event is due that is
    /// not due before `from`.
    pub(crate) async fn next_scheduled(
        &self,
        from: Timestamp,
    ) -> Result<(Timestamp, Option<Timestamp>)> {
        let parameters: [(&(dyn ToSql + Sync), Type); 2] =
            [(&self.relay, Type::TEXT), (&beginning(from), Type::TEXT)];
        let sql = &self.statements.next_scheduled;
        let found = self.session.client.query_typed(sql, &parameters).await;
        let found = found.map_err(|error| sort("look what is scheduled", error))?;
        let due: Option<i64> = found[0].get(1);
        let now = Timestamp::from_unix_micros(found[0].get(0));
        Ok((now, due.map(Timestamp::from_unix_micros)))
    }

    /// How long it is until an event that waits is to be tried; zero if one is.
    pub(crate) async fn next_waiting(&self) -> Result<Option<Duration>> {
        let relay: [(&(dyn ToSql + Sync), Type); 1] = [(&self.relay, Type::TEXT)];
        let next = &self.statements.next_waiting;
        let next = self.session.client.query_typed(next, &relay).await;
        let next = next.map_err(|error| sort("look what is due", error))?;
        let millis: Option<i64> = next.first().and_then(|row| row.get(0));
        Ok(millis.map(|millis| Duration::from_millis(millis.max(0).unsigned_abs())))
    }

    /// Stores what became of rows that were taken, and moves the queues of their keys on.
    pub(crate) async fn settle(&self, outcome: &Outcome) -> Result<()> {
        let doing = "store what became of parked events";
        let client = &self.session.client;
        let refused = &outcome.refused;
        let ids: Vec<&str> = refused.iter().map(|row| &*row.id).collect();
        let topics: Vec<Option<&str>> = refused.iter().map(|row| row.topic.as_deref()).collect();
        let keys: Vec<Option<&str>> = refused.iter().map(|row| row.key.as_deref()).collect();
        let reasons: Vec<&str> = refused.iter().map(|row| &*row.why).collect();
        let millis = |row: &Refused| i64::try_from(row.backoff.as_millis()).unwrap_or(i64::MAX);
        let backoffs: Vec<i64> = refused.iter().map(millis).collect();
        let dead: Vec<bool> = refused.iter().map(|row| row.is_dead).collect();
        let letters: Vec<bool> = refused.iter().map(|row| row.owes_letter).collect();
        let (held, why): (Vec<&str>, Vec<&str>) = outcome
            .topics
            .iter()
            .map(|(topic, why)| (&**topic, &**why))
            .unzip();
        let joining: Vec<&str> = outcome.joining.iter().map(|(id, ..)| &**id).collect();
        let joining_topics: Vec<Option<&str>> = outcome
            .joining
            .iter()
            .map(|(_, topic, _)| topic.as_deref())
            .collect();
        let joining_keys: Vec<Option<&str>> = outcome
            .joining
            .iter()
            .map(|(.., key)| key.as_deref())
            .collect();
        let (awaiting, awaited): (Vec<&str>, Vec<&str>) = outcome
            .awaiting
            .iter()
            .map(|(id, topic)| (&**id, &**topic))
            .unzip();
        let (early, times): (Vec<&str>, Vec<String>) = outcome
            .early
            .iter()
            .map(|(id, time)| (&**id, time.to_string()))
            .unzip();
        let relay = (&self.relay as &(dyn ToSql + Sync), Type::TEXT);
        let forget = [relay.clone(), (&outcome.gone, Type::TEXT_ARRAY)];
        let refuse = [
            relay.clone(),
            (&ids, Type::TEXT_ARRAY),
            (&topics, Type::TEXT_ARRAY),
            (&keys, Type::TEXT_ARRAY),
            (&reasons, Type::TEXT_ARRAY),
            (&backoffs, Type::INT8_ARRAY),
            (&dead, Type::BOOL_ARRAY),
            (&letters, Type::BOOL_ARRAY),
        ];
        let untry = [relay.clone(), (&outcome.untried, Type::TEXT_ARRAY)];
        let hold = [
            relay.clone(),
            (&held, Type::TEXT_ARRAY),
            (&why, Type::TEXT_ARRAY),
        ];
        let join = [
            relay.clone(),
            (&joining, Type::TEXT_ARRAY),
            (&joining_topics, Type::TEXT_ARRAY),
            (&joining_keys, Type::TEXT_ARRAY),
        ];
        let wait = [
            relay.clone(),
            (&awaiting, Type::TEXT_ARRAY),
            (&awaited, Type::TEXT_ARRAY),
        ];
        let postpone = [
            relay.clone(),
            (&early, Type::TEXT_ARRAY),
            (&times, Type::TEXT_ARRAY),
        ];
        let (left_topics, left_keys) = split(&outcome.keys);
        let promote = [
            relay,
            (&left_topics, Type::TEXT_ARRAY),
            (&left_keys, Type::TEXT_ARRAY),
        ];
        let s = &self.statements;
        let steps: [(bool, &str, &[Parameter<'_>]); 8] = [
            (outcome.gone.is_empty(), &s.forget, &forget),
            (joining.is_empty(), &s.join, &join),
            (refused.is_empty(), &s.refuse, &refuse),
            (outcome.untried.is_empty(), &s.untry, &untry),
            (awaiting.is_empty(), &s.await_topic, &wait),
            (held.is_empty(), &s.hold_topics, &hold),
            (early.is_empty(), &s.postpone, &postpone),
            (left_topics.is_empty(), &s.promote, &promote),
        ];
        failpoint!("settling");
        let settled = despite_deadlocks(async || {
            client.batch_execute(BEGIN).await?;
            let stepped = async {
                for (is_idle, sql, parameters) in steps {
                    if !is_idle {
                        client.query_typed(sql, parameters).await?;
                    }
                }
                Ok(())
            };
            let stepped: Result<(), tokio_postgres::Error> = stepped.await;
            // What has failed is rolled back by this, too.
            let ended = client.batch_execute("COMMIT").await;
            stepped?;
            ended
        });
        let settled: Result<(), tokio_postgres::Error> = settled.await;
        failpoint!("settled");
        settled.map_err(|error| sort(doing, error))
    }

    /// The brokers may take records for this topic: what waits for it is due. Whether anything
    /// is that was never refused.
    pub(crate) async fn free_topic(&self, topic: &str) -> Result<bool> {
        let topic = [(&topic as &(dyn ToSql + Sync), Type::TEXT)];
        let freed = self.run("free a topic's events", &self.statements.free_topic, &topic);
        Ok(freed.await?.first().is_some_and(|row| row.get(0)))
    }

    /// Sees to it that the first of each of these keys has its turn, and says of which of
    /// them an event waits.
    pub(crate) async fn look_after(
        &self,
        keys: &HashSet<(String, String)>,
    ) -> Result<HashSet<(String, String)>> {
        let (topics, keys) = split(keys);
        let parameters: [(&(dyn ToSql + Sync), Type); 2] =
            [(&topics, Type::TEXT_ARRAY), (&keys, Type::TEXT_ARRAY)];
        let doing = "look after parked keys";
        self.run(doing, &self.statements.promote, &parameters)
            .await?;
        let held = self.run(doing, &self.statements.still_held, &parameters);
        let held = held.await?;
        Ok(held.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// Dead letters of which a copy is still to be sent.
    pub(crate) async fn letters(&self) -> Result<Vec<Taken>> {
        let parameters: [(&(dyn ToSql + Sync), Type); 2] =
            [(&TAKE_MAX, Type::INT8), (&TAKE_BYTES, Type::INT8)];
        let letters = self.run("read dead letters", &self.statements.letters, &parameters);
        letters.await?.iter().map(taken_of).collect()
    }

    /// Copies of these were sent.
    pub(crate) async fn sent_letters(&self, ids: &[String]) -> Result<()> {
        let ids = [(&ids as &(dyn ToSql + Sync), Type::TEXT_ARRAY)];
        let sent = self.run(
            "store that dead letters were sent",
            &self.statements.sent_letters,
            &ids,
        );
        sent.await.map(drop)
    }

    async fn run(
        &self,
        doing: &str,
        sql: &str,
        parameters: &[(&(dyn ToSql + Sync), Type)],
    ) -> Result<Vec<tokio_postgres::Row>> {
        let mut all: Vec<(&(dyn ToSql + Sync), Type)> = vec![(&self.relay, Type::TEXT)];
        all.extend_from_slice(parameters);
        // With who decides about the same rows.
        let rows = despite_deadlocks(|| query_after(BEGIN, &self.session.client, sql, &all)).await;
        rows.map_err(|error| sort(doing, error))
    }
}

/// Where a look begins, for Postgres.
fn beginning(from: Timestamp) -> String {
    match from {
        Timestamp::MIN => "-infinity".to_owned(),
        from => from.to_string(),
    }
}

fn split(keys: &HashSet<(String, String)>) -> (Vec<&str>, Vec<&str>) {
    keys.iter().map(|(topic, key)| (&**topic, &**key)).unzip()
}

fn taken_of(row: &tokio_postgres::Row) -> Result<Taken> {
    let names: Vec<String> = row.get(9);
    let types: Vec<u32> = row.get(10);
    let message: &[u8] = row.get(8);
    let columns = names.into_iter().zip(types);
    Ok(Taken {
        id: row.get(0),
        status: Status::read(row.get(1)).expect("the table checks it"),
        topic: row.get(2),
        key: row.get(3),
        attempts: u32::try_from(row.get::<_, i64>(4)).unwrap_or(u32::MAX),
        error: row.get(5),
        is_cancelled: row.try_get(12).unwrap_or(false),
        at: Timestamp::from_unix_micros(row.get(11)),
        row: Row {
            bytes: Bytes::copy_from_slice(message),
            place: Place {
                commit_lsn: row.get::<_, Option<PgLsn>>(6).unwrap_or(PgLsn::from(0)),
                ordinal: 0,
            },
            committed_at: Timestamp::from_unix_micros(row.get(7)),
            xid: 0,
        },
        columns: columns
            .map(|(name, type_oid)| Column { name, type_oid })
            .collect(),
    })
}
