//! What a consumer reads and writes of its tables.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use tokio_postgres::types::Type;
use tokio_postgres::{Client, Row, Transaction};
use tracing::warn;
use uuid::Uuid;

use super::InboxSettings;
use super::batch::{Entry, Lane, Work};
use super::columns::{Columns, Parameter};
use super::consumer::{Assigned, Place};
use super::message::{Id, Message};
use super::position::{From, Last, OnReset, Start, Stored};
use super::retries::Ours;
pub(super) use super::stored::Status;
use crate::contract::Contract;
use crate::database::sort;
use crate::error::{Error, ErrorKind, Result};
use crate::timestamp::Timestamp;

/// The statements of a group, with its names filled in.
pub(super) struct Store {
    group: String,
    /// Who holds its partitions.
    owner: String,
    /// Whether an id means the same in all topics of the group.
    shares_ids: bool,
    /// Where copies of dead letters go.
    dead_letter_topic: Option<String>,
    sql: Sql,
}

/// How a topic is called in the tables.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source {
    /// In `inbox`.
    pub(super) dedup: i32,
    /// In `inbox_message`.
    pub(super) messages: i32,
    /// How many partitions the topic had when the group began with it.
    partitions: i32,
}

struct Sql {
    name_sources: String,
    describe_sources: String,
    sources: String,
    look: String,
    claim: String,
    lanes: String,
    adopt: String,
    count_waiting: String,
    promote: String,
    take_run: String,
    hold_place: String,
    hold: String,
    forget: String,
    put_back: String,
    fail: String,
    give_up: String,
    hand_over: String,
    go_to: String,
    release: String,
    advance: String,
    receive: String,
    store: String,
}

/// A partition that is ours.
#[derive(Debug, Clone)]
pub(super) struct Claimed {
    pub(super) source: Source,
    pub(super) epoch: i64,
    pub(super) start: Start,
    /// Whether whoever had it before may have ended in the middle of something.
    pub(super) was_held: bool,
}

/// How far a batch has read a partition.
#[derive(Debug, Clone)]
pub(super) struct Advance<'a> {
    pub(super) place: &'a Place,
    pub(super) epoch: i64,
    pub(super) last: &'a Message,
}

/// A message that goes to the table, and why.
#[derive(Debug, Clone)]
pub(super) struct Kept<'a> {
    pub(super) message: &'a Message,
    pub(super) lane: Lane,
    pub(super) status: Status,
    pub(super) attempts: i32,
    /// When it may be tried; `None`: not before those before it.
    pub(super) due_in: Option<Duration>,
    pub(super) error: Option<String>,
}

/// A message whose next attempt has begun.
#[derive(Debug)]
pub(super) struct Due {
    /// Which of the partitions it is of.
    pub(super) place: usize,
    pub(super) lane: Lane,
    pub(super) id: Uuid,
    /// Where it is in its lane.
    seq: i64,
    /// This one counts.
    pub(super) attempts: u32,
    pub(super) message: Message,
}

impl Due {
    /// As the table counts.
    fn counted(&self) -> i32 {
        i32::try_from(self.attempts).unwrap_or(i32::MAX)
    }

    fn read(row: &Row, ours: &[Ours]) -> Self {
        let n: i64 = row.get("n");
        let place = usize::try_from(n - 1).expect("from one on");
        let produced: Option<i64> = row.get("produced");
        let attempts: i32 = row.get("attempts");
        let message = Message {
            id: Id {
                text: row.get("message_id"),
                original: row.get("original_id"),
            },
            topic: ours[place].place.topic.clone(),
            partition: row.get("partition"),
            offset: row.get("kafka_offset"),
            produced_at: produced.map(Timestamp::from_unix_micros),
            key: row.get("key"),
            event_type: row.get("event_type"),
            schema_version: row.get("schema_version"),
            headers: row.get("headers"),
            payload: row.get("payload"),
            body: row.get("body"),
        };
        Self {
            place,
            lane: Lane {
                source: row.get("source"),
                partition: row.get("partition"),
                number: row.get("lane"),
            },
            id: row.get("id"),
            seq: row.get("seq"),
            attempts: u32::try_from(attempts).unwrap_or_default(),
            message,
        }
    }
}

impl Store {
    pub(super) fn new(settings: &InboxSettings, owner: String) -> Self {
        Self {
            group: settings.group.clone(),
            owner,
            shares_ids: settings.shares_ids,
            dead_letter_topic: settings.dead_letter_topic.clone(),
            sql: Sql::new(&settings.contract),
        }
    }

    /// Takes partitions from whoever has them, and says where each begins. All or none.
    ///
    /// # Errors
    /// `Broker` if a log is no longer the one that was read, and that is to be told.
    pub(super) async fn claim(
        &self,
        client: &mut Client,
        assigned: &[Assigned],
        cluster_id: Option<&str>,
        from: From,
        on_reset: OnReset,
    ) -> Result<Vec<Claimed>> {
        let doing = || "take partitions".to_owned();
        let failed = |error| sort(doing(), error);
        let (topics, partitions) = by_column(assigned.iter().map(|one| &one.place));
        let places = [
            (&self.group as _, Type::TEXT),
            (&topics as _, Type::TEXT_ARRAY),
            (&partitions as _, Type::INT4_ARRAY),
        ];
        let transaction = client.transaction().await.map_err(failed)?;
        let sources = self.name_sources(&transaction, assigned).await;
        let sources = sources.map_err(failed)?;
        // Waits for the transaction of whoever has them.
        let rows = transaction
            .query_typed(&self.sql.look, &places)
            .await
            .map_err(failed)?;
        let mut known = HashMap::new();
        for row in rows {
            let last = row.get::<_, Option<String>>("last_id").map(|id| Last {
                id,
                timestamp: row.get("last_timestamp"),
            });
            let stored = Stored {
                next_offset: row.get("next_offset"),
                last,
                cluster_id: row.get("cluster_id"),
            };
            let place: (String, i32) = (row.get("topic"), row.get("partition"));
            known.insert(place, (stored, row.get("was_held")));
        }
        let mut starts = Vec::new();
        for one in assigned {
            let Place { topic, partition } = &one.place;
            let stored = known.get(&(topic.to_string(), *partition));
            let start = match (stored, one.committed) {
                (Some((stored, _)), _) => Start::known(one, stored, cluster_id),
                (None, Some(offset)) => Start::committed(one, offset),
                // One that was there when the group began with the topic.
                (None, None) if *partition < sources[&**topic].partitions => {
                    Ok(Start::end(one, from))
                }
                (None, None) => Ok(Start::end(one, From::Earliest)),
            };
            let start = start.or_else(|why| reset(one, &why, on_reset))?;
            starts.push((start, stored.is_some_and(|(_, was_held)| *was_held)));
        }
        let next_offsets: Vec<i64> = starts.iter().map(|(start, _)| start.next_offset).collect();
        let witnesses = || starts.iter().map(|(start, _)| start.witness.as_ref());
        let ids: Vec<Option<&str>> = witnesses().map(|last| Some(&*last?.id)).collect();
        let times: Vec<Option<i64>> = witnesses().map(|last| last?.timestamp).collect();
        let mut parameters = places.to_vec();
        parameters.extend::<[Parameter<'_>; 5]>([
            (&next_offsets, Type::INT8_ARRAY),
            (&ids, Type::TEXT_ARRAY),
            (&times, Type::INT8_ARRAY),
            (&cluster_id, Type::TEXT),
            (&self.owner, Type::TEXT),
        ]);
        let rows = transaction
            .query_typed(&self.sql.claim, &parameters)
            .await
            .map_err(failed)?;
        let epochs: HashMap<(String, i32), i64> = rows
            .iter()
            .map(|row| ((row.get(0), row.get(1)), row.get(2)))
            .collect();
        transaction.commit().await.map_err(failed)?;
        let claimed = assigned.iter().zip(starts).map(|(one, (start, was_held))| {
            let place = (one.place.topic.to_string(), one.place.partition);
            Claimed {
                source: sources[&*one.place.topic],
                epoch: epochs[&place],
                start,
                was_held,
            }
        });
        Ok(claimed.collect())
    }

    /// What is known of topics, made where there is nothing.
    async fn name_sources<'a>(
        &self,
        transaction: &Transaction<'_>,
        assigned: &'a [Assigned],
    ) -> std::result::Result<HashMap<&'a str, Source>, tokio_postgres::Error> {
        let topics: BTreeMap<&str, i32> = assigned
            .iter()
            .map(|one| (&*one.place.topic, one.partitions))
            .collect();
        let (mut names, mut partitions): (Vec<&str>, Vec<i32>) = topics.into_iter().unzip();
        if self.shares_ids {
            names.push("");
            partitions.push(0);
        }
        let parameters: [Parameter<'_>; 4] = [
            (&self.group, Type::TEXT),
            (&names, Type::TEXT_ARRAY),
            (&partitions, Type::INT4_ARRAY),
            (&self.dead_letter_topic, Type::TEXT),
        ];
        let (named, asked) = (&parameters[..3], &parameters[..2]);
        let sql = &self.sql;
        transaction.execute_typed(&sql.name_sources, named).await?;
        transaction
            .execute_typed(&sql.describe_sources, &parameters)
            .await?;
        // A statement of its own: it sees what another session has named meanwhile.
        let rows = transaction.query_typed(&sql.sources, asked).await?;
        let known: HashMap<&str, (i32, i32)> = rows
            .iter()
            .map(|row| (row.get(0), (row.get(1), row.get(2))))
            .collect();
        let sources = assigned.iter().map(|one| {
            let topic = &*one.place.topic;
            let (messages, partitions) = known[topic];
            let dedup = if self.shares_ids {
                known[""].0
            } else {
                messages
            };
            let source = Source {
                dedup,
                messages,
                partitions,
            };
            (topic, source)
        });
        Ok(sources.collect())
    }

    /// Has those who are at work now handle what waits for others: the application what a handler
    /// has failed at, and the other way round.
    pub(super) async fn adopt(
        &self,
        client: &Client,
        places: &[Place],
        is_for_application: bool,
    ) -> Result<()> {
        let (topics, partitions) = by_column(places);
        let parameters: [Parameter<'_>; 4] = [
            (&self.group, Type::TEXT),
            (&topics, Type::TEXT_ARRAY),
            (&partitions, Type::INT4_ARRAY),
            (&is_for_application, Type::BOOL),
        ];
        let adopted = client.execute_typed(&self.sql.adopt, &parameters).await;
        adopted.map_err(|error| sort("adopt messages that wait", error))?;
        Ok(())
    }

    /// The lanes of which a message waits.
    pub(super) async fn lanes(&self, client: &Client, places: &[Place]) -> Result<HashSet<Lane>> {
        let (topics, partitions) = by_column(places);
        let parameters = [
            (&self.group as _, Type::TEXT),
            (&topics as _, Type::TEXT_ARRAY),
            (&partitions as _, Type::INT4_ARRAY),
        ];
        let rows = client
            .query_typed(&self.sql.lanes, &parameters)
            .await
            .map_err(|error| sort("look for messages that wait", error))?;
        let lanes = rows.iter().map(|row| Lane {
            source: row.get(0),
            partition: row.get(1),
            number: row.get(2),
        });
        Ok(lanes.collect())
    }

    /// How many messages of these partitions wait, or `most`, if there are more.
    pub(super) async fn count_waiting(
        &self,
        client: &Client,
        ours: &[Ours],
        most: usize,
    ) -> Result<usize> {
        let sources: Vec<i32> = ours.iter().map(|ours| ours.source).collect();
        let partitions: Vec<i32> = ours.iter().map(|ours| ours.place.partition).collect();
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let parameters: [Parameter<'_>; 3] = [
            (&sources, Type::INT4_ARRAY),
            (&partitions, Type::INT4_ARRAY),
            (&most, Type::INT8),
        ];
        let rows = client
            .query_typed(&self.sql.count_waiting, &parameters)
            .await
            .map_err(|error| sort("count messages that wait", error))?;
        Ok(usize::try_from(rows[0].get::<_, i64>(0)).unwrap_or_default())
    }

    /// Has the first message of each lane tried that is not to be yet. Says which lanes have one.
    pub(super) async fn promote(&self, client: &Client, lanes: &[Lane]) -> Result<HashSet<Lane>> {
        let sources: Vec<i32> = lanes.iter().map(|lane| lane.source).collect();
        let partitions: Vec<i32> = lanes.iter().map(|lane| lane.partition).collect();
        let numbers: Vec<i64> = lanes.iter().map(|lane| lane.number).collect();
        let parameters: [Parameter<'_>; 3] = [
            (&sources, Type::INT4_ARRAY),
            (&partitions, Type::INT4_ARRAY),
            (&numbers, Type::INT8_ARRAY),
        ];
        let rows = client
            .query_typed(&self.sql.promote, &parameters)
            .await
            .map_err(|error| sort("look for messages that wait", error))?;
        let ordinal = |row: &Row| usize::try_from(row.get::<_, i64>(0) - 1).expect("from one on");
        Ok(rows.iter().map(|row| lanes[ordinal(row)]).collect())
    }

    /// Begins the next attempt of what has been due for longest, in the order of each lane: each is
    /// counted, and the first of a lane is due again only if this comes to nothing.
    ///
    /// What was begun before may be what ended its process, and is given alone: nothing else is
    /// counted with it. What was not is given together, with what is behind it in its lane.
    pub(super) async fn take_run(
        &self,
        client: &Client,
        work: &Work,
        ours: &[Ours],
    ) -> Result<Vec<Due>> {
        let sources: Vec<i32> = ours.iter().map(|ours| ours.source).collect();
        let (topics, partitions) = by_column(ours.iter().map(|ours| &ours.place));
        let epochs: Vec<i64> = ours.iter().map(|ours| ours.epoch).collect();
        let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let parameters: [Parameter<'_>; 9] = [
            (&sources, Type::INT4_ARRAY),
            (&partitions, Type::INT4_ARRAY),
            (&work.attempts.backoff_min.as_secs_f64(), Type::FLOAT8),
            (&work.attempts.backoff_max.as_secs_f64(), Type::FLOAT8),
            (&self.group, Type::TEXT),
            (&topics, Type::TEXT_ARRAY),
            (&epochs, Type::INT8_ARRAY),
            (&count(work.run_max()), Type::INT8),
            (&count(work.batch_bytes_max), Type::INT8),
        ];
        let rows = client
            .query_typed(&self.sql.take_run, &parameters)
            .await
            .map_err(|error| sort("look for messages to be tried again", error))?;
        let mut run: Vec<Due> = rows.iter().map(|row| Due::read(row, ours)).collect();
        run.sort_by_key(|due| due.seq);
        Ok(run)
    }

    /// Whether a partition is still ours: nobody takes it before the transaction ends.
    pub(super) async fn hold_place(
        &self,
        transaction: &Transaction<'_>,
        place: &Place,
        epoch: i64,
    ) -> std::result::Result<bool, tokio_postgres::Error> {
        let place: [Parameter<'_>; 4] = [
            (&self.group, Type::TEXT),
            (&&*place.topic, Type::TEXT),
            (&place.partition, Type::INT4),
            (&epoch, Type::INT8),
        ];
        let rows = transaction.query_typed(&self.sql.hold_place, &place).await;
        Ok(!rows?.is_empty())
    }

    /// Which of these messages are still to be tried: nobody decides about them before the
    /// transaction ends.
    pub(super) async fn hold(
        &self,
        transaction: &Transaction<'_>,
        run: &[Due],
    ) -> std::result::Result<HashSet<(i32, Uuid)>, tokio_postgres::Error> {
        let (sources, ids) = names(run);
        let attempts: Vec<i32> = run.iter().map(Due::counted).collect();
        let parameters: [Parameter<'_>; 3] = [
            (&sources, Type::INT4_ARRAY),
            (&ids, Type::UUID_ARRAY),
            (&attempts, Type::INT4_ARRAY),
        ];
        let rows = transaction.query_typed(&self.sql.hold, &parameters).await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// These messages are done.
    pub(super) async fn forget<'d>(
        &self,
        transaction: &Transaction<'_>,
        done: impl IntoIterator<Item = &'d Due>,
    ) -> std::result::Result<(), tokio_postgres::Error> {
        name_each(transaction, &self.sql.forget, done).await
    }

    /// These messages were not tried, after all.
    pub(super) async fn put_back<'d>(
        &self,
        transaction: &Transaction<'_>,
        untried: impl IntoIterator<Item = &'d Due>,
    ) -> std::result::Result<(), tokio_postgres::Error> {
        name_each(transaction, &self.sql.put_back, untried).await
    }

    /// An attempt came to nothing.
    pub(super) async fn fail(
        &self,
        transaction: &Transaction<'_>,
        due: &Due,
        why: &str,
        pause: Duration,
    ) -> std::result::Result<(), tokio_postgres::Error> {
        let parameters: [Parameter<'_>; 4] = [
            (&due.lane.source, Type::INT4),
            (&due.id, Type::UUID),
            (&why, Type::TEXT),
            (&pause.as_secs_f64(), Type::FLOAT8),
        ];
        let sql = &self.sql.fail;
        transaction.execute_typed(sql, &parameters).await?;
        Ok(())
    }

    /// Nobody was there to try it: that is no attempt.
    pub(super) async fn wait(
        &self,
        transaction: &Transaction<'_>,
        due: &Due,
        why: &str,
        pause: Duration,
    ) -> std::result::Result<(), tokio_postgres::Error> {
        self.put_back(transaction, [due]).await?;
        self.fail(transaction, due, why, pause).await
    }

    /// The last attempt came to nothing.
    pub(super) async fn give_up(
        &self,
        transaction: &Transaction<'_>,
        due: &Due,
        why: &str,
    ) -> std::result::Result<(), tokio_postgres::Error> {
        let parameters: [Parameter<'_>; 3] = [
            (&due.lane.source, Type::INT4),
            (&due.id, Type::UUID),
            (&why, Type::TEXT),
        ];
        let sql = &self.sql.give_up;
        transaction.execute_typed(sql, &parameters).await?;
        Ok(())
    }

    /// The application is to handle it.
    pub(super) async fn hand_over(
        &self,
        transaction: &Transaction<'_>,
        due: &Due,
    ) -> std::result::Result<(), tokio_postgres::Error> {
        let parameters = [
            (&due.lane.source as _, Type::INT4),
            (&due.id as _, Type::UUID),
        ];
        let sql = &self.sql.hand_over;
        transaction.execute_typed(sql, &parameters).await?;
        Ok(())
    }

    /// Goes on elsewhere in a log.
    pub(super) async fn go_to(
        &self,
        client: &Client,
        place: &Place,
        epoch: i64,
        next_offset: i64,
    ) -> Result<()> {
        let parameters: [Parameter<'_>; 5] = [
            (&self.group, Type::TEXT),
            (&&*place.topic, Type::TEXT),
            (&place.partition, Type::INT4),
            (&epoch, Type::INT8),
            (&next_offset, Type::INT8),
        ];
        let gone = client.execute_typed(&self.sql.go_to, &parameters).await;
        gone.map_err(|error| sort(format!("store the offset of {place}"), error))?;
        Ok(())
    }

    /// Gives partitions back, so that whoever takes them next knows that nothing was going on.
    pub(super) async fn release(&self, client: &Client, places: &[(Place, i64)]) -> Result<()> {
        let (topics, partitions) = by_column(places.iter().map(|(place, _)| place));
        let epochs: Vec<i64> = places.iter().map(|(_, epoch)| *epoch).collect();
        let parameters = [
            (&self.group as _, Type::TEXT),
            (&topics as _, Type::TEXT_ARRAY),
            (&partitions as _, Type::INT4_ARRAY),
            (&epochs as _, Type::INT8_ARRAY),
        ];
        let released = client.query_typed(&self.sql.release, &parameters).await;
        released.map_err(|error| sort("give partitions back", error))?;
        Ok(())
    }

    /// Moves the offsets. False if one of the partitions is another's by now.
    pub(super) async fn advance(
        &self,
        transaction: &Transaction<'_>,
        advances: &[Advance<'_>],
    ) -> std::result::Result<bool, tokio_postgres::Error> {
        let (topics, partitions) = by_column(advances.iter().map(|one| one.place));
        let epochs: Vec<i64> = advances.iter().map(|one| one.epoch).collect();
        let next: Vec<i64> = advances.iter().map(|one| one.last.offset + 1).collect();
        let ids: Vec<&str> = advances.iter().map(|one| &*one.last.id.text).collect();
        let times: Vec<Option<i64>> = advances
            .iter()
            .map(|one| one.last.produced_at.map(|at| at.unix_millis()))
            .collect();
        let parameters = [
            (&self.group as _, Type::TEXT),
            (&topics as _, Type::TEXT_ARRAY),
            (&partitions as _, Type::INT4_ARRAY),
            (&epochs as _, Type::INT8_ARRAY),
            (&next as _, Type::INT8_ARRAY),
            (&ids as _, Type::TEXT_ARRAY),
            (&times as _, Type::INT8_ARRAY),
        ];
        let moved = transaction
            .execute_typed(&self.sql.advance, &parameters)
            .await?;
        Ok(usize::try_from(moved) == Ok(advances.len()))
    }

    /// Writes which messages were received, and says which of them were not before.
    pub(super) async fn receive(
        &self,
        transaction: &Transaction<'_>,
        entries: &[Entry<'_>],
    ) -> std::result::Result<HashSet<(i32, Uuid)>, tokio_postgres::Error> {
        // In one order, or two consumers that receive the same ids wait for each other.
        let mut entries: Vec<&Entry<'_>> = entries.iter().collect();
        entries.sort_by_key(|entry| (entry.dedup, entry.id));
        let offsets: Vec<i64> = entries.iter().map(|entry| entry.message.offset).collect();
        let ids: Vec<Uuid> = entries.iter().map(|entry| entry.id).collect();
        let sources: Vec<i32> = entries.iter().map(|entry| entry.dedup).collect();
        let partitions: Vec<i32> = (entries.iter())
            .map(|entry| entry.message.partition)
            .collect();
        let parameters: [Parameter<'_>; 4] = [
            (&offsets, Type::INT8_ARRAY),
            (&ids, Type::UUID_ARRAY),
            (&sources, Type::INT4_ARRAY),
            (&partitions, Type::INT4_ARRAY),
        ];
        let rows = transaction
            .query_typed(&self.sql.receive, &parameters)
            .await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
    }

    /// Writes messages into the table.
    pub(super) async fn keep(
        &self,
        transaction: &Transaction<'_>,
        kept: &[Kept<'_>],
    ) -> std::result::Result<(), tokio_postgres::Error> {
        if kept.is_empty() {
            return Ok(());
        }
        let columns = Columns::of(kept.iter().map(|one| one.message));
        let ids: Vec<Uuid> = kept.iter().map(|one| one.message.id.uuid()).collect();
        let originals: Vec<Option<&[u8]>> = kept
            .iter()
            .map(|one| one.message.id.original.as_deref())
            .collect();
        let sources: Vec<i32> = kept.iter().map(|one| one.lane.source).collect();
        let lanes: Vec<i64> = kept.iter().map(|one| one.lane.number).collect();
        let statuses: Vec<&str> = kept.iter().map(|one| one.status.name()).collect();
        let attempts: Vec<i32> = kept.iter().map(|one| one.attempts).collect();
        let due: Vec<Option<f64>> = kept
            .iter()
            .map(|one| one.due_in.map(|due_in| due_in.as_secs_f64()))
            .collect();
        let errors: Vec<Option<&str>> = kept.iter().map(|one| one.error.as_deref()).collect();
        let mut parameters = columns.parameters();
        parameters.extend::<[Parameter<'_>; 8]>([
            (&ids, Type::UUID_ARRAY),
            (&originals, Type::BYTEA_ARRAY),
            (&sources, Type::INT4_ARRAY),
            (&lanes, Type::INT8_ARRAY),
            (&statuses, Type::TEXT_ARRAY),
            (&attempts, Type::INT4_ARRAY),
            (&due, Type::FLOAT8_ARRAY),
            (&errors, Type::TEXT_ARRAY),
        ]);
        transaction
            .execute_typed(&self.sql.store, &parameters)
            .await?;
        Ok(())
    }
}

/// What messages are called, as arrays, one for each column.
fn names<'d>(run: impl IntoIterator<Item = &'d Due>) -> (Vec<i32>, Vec<Uuid>) {
    let run = run.into_iter();
    run.map(|due| (due.lane.source, due.id)).unzip()
}

/// Runs a statement that takes the names of messages.
async fn name_each<'d>(
    transaction: &Transaction<'_>,
    sql: &str,
    run: impl IntoIterator<Item = &'d Due>,
) -> std::result::Result<(), tokio_postgres::Error> {
    let (sources, ids) = names(run);
    if sources.is_empty() {
        return Ok(());
    }
    let parameters: [Parameter<'_>; 2] = [(&sources, Type::INT4_ARRAY), (&ids, Type::UUID_ARRAY)];
    transaction.execute_typed(sql, &parameters).await?;
    Ok(())
}

/// Places as arrays, one for each column.
fn by_column<'p>(places: impl IntoIterator<Item = &'p Place>) -> (Vec<&'p str>, Vec<i32>) {
    let places = places.into_iter();
    places.map(|place| (&*place.topic, place.partition)).unzip()
}

/// What to do where the log is another.
pub(super) fn reset(assigned: &Assigned, why: &str, on_reset: OnReset) -> Result<Start> {
    let place = &assigned.place;
    let from = match on_reset {
        OnReset::Stop => return Err(is_another(place, why)),
        OnReset::Earliest => From::Earliest,
        OnReset::Latest => From::Latest,
    };
    let start = Start::end(assigned, from);
    warn!(
        "the log of {place} is not the one that was read: {why}; going on at offset {}",
        start.next_offset
    );
    Ok(start)
}

/// The log of a partition is not the one that was read.
pub(super) fn is_another(place: &Place, why: &str) -> Error {
    let message = format!(
        "the log of {place} is not the one that was read: {why}; --on-reset earliest or latest says where to go on"
    );
    Error::new(ErrorKind::Broker, message)
}

impl Sql {
    // Where messages are named by their ids, `status || ''` keeps the planner from the indexes that
    // hold one status only: before it knows the table, it takes them for as good as the primary
    // key, and reads all that waits for each id.
    fn new(contract: &Contract) -> Self {
        let sql = |text: &str| contract.sql(text);
        let asked = "unnest($2::text[], $3::integer[]) WITH ORDINALITY AS p (topic, partition, n)";
        Self {
            name_sources: sql(
                "INSERT INTO :\"schema\".inbox_source (consumer_group, topic, partitions)
                 SELECT $1, t.topic, t.partitions FROM unnest($2::text[], $3::integer[]) AS t (topic, partitions)
                 WHERE NOT EXISTS (
                     SELECT FROM :\"schema\".inbox_source AS s WHERE s.consumer_group = $1 AND s.topic = t.topic
                 )
                 ORDER BY t.topic
                 ON CONFLICT DO NOTHING",
            ),
            describe_sources: sql(
                "UPDATE :\"schema\".inbox_source AS s
                 SET partitions = coalesce(s.partitions, t.partitions), owes_letters = coalesce(s.topic <> $4, false)
                 FROM unnest($2::text[], $3::integer[]) AS t (topic, partitions)
                 WHERE s.consumer_group = $1 AND s.topic = t.topic
                   AND (s.partitions IS NULL OR s.owes_letters <> coalesce(s.topic <> $4, false))",
            ),
            sources: sql(
                "SELECT topic, id, partitions FROM :\"schema\".inbox_source
                 WHERE consumer_group = $1 AND topic = ANY ($2)",
            ),
            look: sql(
                "SELECT o.topic, o.partition, o.next_offset, o.last_id, o.last_timestamp, o.cluster_id,
                     o.owner IS NOT NULL AS was_held
                 FROM :\"schema\".inbox_offset AS o
                 WHERE o.consumer_group = $1
                   AND (o.topic, o.partition) IN (SELECT * FROM unnest($2::text[], $3::integer[]))
                 ORDER BY o.topic, o.partition
                 FOR UPDATE",
            ),
            claim: sql(
                "INSERT INTO :\"schema\".inbox_offset AS o
                     (consumer_group, topic, partition, next_offset, last_id, last_timestamp, cluster_id, epoch,
                      owner)
                 SELECT $1, p.topic, p.partition, p.next_offset, p.last_id, p.last_timestamp, $7, 1, $8
                 FROM unnest($2::text[], $3::integer[], $4::bigint[], $5::text[], $6::bigint[])
                     AS p (topic, partition, next_offset, last_id, last_timestamp)
                 ORDER BY p.topic, p.partition
                 ON CONFLICT (consumer_group, topic, partition) DO UPDATE
                 SET next_offset = excluded.next_offset, last_id = excluded.last_id,
                     last_timestamp = excluded.last_timestamp,
                     cluster_id = coalesce(excluded.cluster_id, o.cluster_id), epoch = o.epoch + 1,
                     owner = excluded.owner, updated_at = now()
                 RETURNING o.topic, o.partition, o.epoch",
            ),
            lanes: sql(&format!(
                "SELECT DISTINCT m.source, m.partition, m.lane
                 FROM {asked}
                 JOIN :\"schema\".inbox_source AS s ON s.consumer_group = $1 AND s.topic = p.topic
                 JOIN :\"schema\".inbox_message AS m ON m.source = s.id AND m.partition = p.partition
                 WHERE m.status = 'waiting'"
            )),
            adopt: sql(&format!(
                "UPDATE :\"schema\".inbox_message AS m
                 SET status = CASE WHEN $4 THEN 'stored' ELSE 'waiting' END, attempts = 0,
                     due_at = CASE WHEN $4 THEN now() ELSE 'infinity' END
                 FROM {asked}
                 JOIN :\"schema\".inbox_source AS s ON s.consumer_group = $1 AND s.topic = p.topic
                 WHERE m.source = s.id AND m.partition = p.partition AND m.status IN ('stored', 'waiting')
                   AND m.status = CASE WHEN $4 THEN 'waiting' ELSE 'stored' END"
            )),
            count_waiting: sql(
                "SELECT count(*) FROM (
                     SELECT FROM unnest($1::integer[], $2::integer[]) AS p (source, partition)
                     JOIN :\"schema\".inbox_message AS m ON m.source = p.source AND m.partition = p.partition
                     WHERE m.status = 'waiting'
                     LIMIT $3
                 ) AS m",
            ),
            promote: sql(
                "WITH heads AS (
                     SELECT l.n, m.source, m.id, m.due_at
                     FROM unnest($1::integer[], $2::integer[], $3::bigint[]) WITH ORDINALITY
                         AS l (source, partition, lane, n)
                     CROSS JOIN LATERAL (
                         SELECT m.source, m.id, m.due_at FROM :\"schema\".inbox_message AS m
                         WHERE m.source = l.source AND m.partition = l.partition AND m.lane = l.lane
                           AND m.status = 'waiting'
                         ORDER BY m.seq
                         LIMIT 1
                     ) AS m
                 ), promoted AS (
                     UPDATE :\"schema\".inbox_message AS m
                     SET due_at = now()
                     FROM heads AS h
                     WHERE m.source = h.source AND m.id = h.id AND h.due_at = 'infinity' AND m.status || '' = 'waiting'
                 )
                 SELECT n FROM heads",
            ),
            take_run: sql(
                "WITH due AS MATERIALIZED (
                     SELECT p.n, d.*
                     FROM unnest($1::integer[], $2::integer[], $6::text[], $7::bigint[]) WITH ORDINALITY
                         AS p (source, partition, topic, epoch, n)
                     -- Who has lost a partition counts no attempts in it.
                     JOIN :\"schema\".inbox_offset AS o
                         ON o.consumer_group = $5 AND o.topic = p.topic AND o.partition = p.partition
                         AND o.epoch = p.epoch
                     CROSS JOIN LATERAL (
                         SELECT m.source, m.partition, m.lane, m.seq, m.attempts, m.due_at
                         FROM :\"schema\".inbox_message AS m
                         WHERE m.source = p.source AND m.partition = p.partition AND m.status = 'waiting'
                           AND m.due_at < 'infinity' AND m.due_at <= clock_timestamp()
                           -- A person may have another of its lane tried. A look at an index for each, whatever
                           -- the planner believes of a table that is never the same for long.
                           AND m.seq = (
                               SELECT b.seq FROM :\"schema\".inbox_message AS b
                               WHERE b.source = m.source AND b.partition = m.partition AND b.lane = m.lane
                                 AND b.status = 'waiting'
                               ORDER BY b.seq
                               LIMIT 1
                           )
                         ORDER BY m.due_at
                         LIMIT $8
                     ) AS d
                     ORDER BY d.due_at
                     LIMIT $8
                 ), first AS (
                     SELECT * FROM due ORDER BY due_at, seq LIMIT 1
                 ), heads AS MATERIALIZED (
                     SELECT * FROM first WHERE attempts > 0
                     UNION ALL
                     SELECT due.* FROM due JOIN first ON first.attempts = 0 WHERE due.attempts = 0
                 ), run AS (
                     SELECT h.n, h.source, m.id, sum(m.size) OVER (ORDER BY h.due_at, h.seq, m.seq) - m.size AS before
                     FROM heads AS h
                     CROSS JOIN LATERAL (
                         SELECT m.*, max(m.attempts) OVER (ORDER BY m.seq) AS attempts_until
                         FROM (
                             SELECT m.id, m.seq, m.attempts,
                                 pg_column_size(m.headers) + coalesce(pg_column_size(m.payload), 0)
                                     + coalesce(pg_column_size(m.body), 0) AS size
                             FROM :\"schema\".inbox_message AS m
                             WHERE m.source = h.source AND m.partition = h.partition AND m.lane = h.lane
                               AND m.status = 'waiting'
                             ORDER BY m.seq
                             LIMIT CASE h.attempts WHEN 0 THEN greatest($8 / (SELECT count(*) FROM heads), 1) ELSE 1 END
                         ) AS m
                     ) AS m
                     WHERE m.seq = h.seq OR m.attempts_until = 0
                 )
                 UPDATE :\"schema\".inbox_message AS m
                 SET attempts = m.attempts + 1,
                     due_at = CASE m.due_at
                         WHEN 'infinity' THEN m.due_at
                         ELSE clock_timestamp() + least($3 * 2 ^ least(m.attempts, 30), $4) * interval '1 second'
                     END
                 FROM run
                 WHERE m.source = run.source AND m.id = run.id AND m.status || '' = 'waiting' AND run.before < $9
                 RETURNING run.n, m.seq, m.source, m.partition, m.lane, m.id, m.attempts, m.kafka_offset, m.message_id,
                     m.original_id, m.key, m.event_type, m.schema_version, m.headers::text, m.payload::text, m.body,
                     (extract(epoch FROM m.created_at) * 1000000)::bigint AS produced",
            ),
            // Against whoever takes the partition, and not against what moves its offset.
            hold_place: sql(
                "SELECT FROM :\"schema\".inbox_offset
                 WHERE consumer_group = $1 AND topic = $2 AND partition = $3 AND epoch = $4
                 FOR KEY SHARE",
            ),
            hold: sql(
                "SELECT m.source, m.id FROM :\"schema\".inbox_message AS m
                 JOIN unnest($1::integer[], $2::uuid[], $3::integer[]) AS r (source, id, attempts)
                     ON m.source = r.source AND m.id = r.id
                 WHERE m.status || '' = 'waiting' AND m.attempts = r.attempts
                 ORDER BY m.source, m.id
                 FOR UPDATE OF m",
            ),
            forget: sql(
                "DELETE FROM :\"schema\".inbox_message AS m USING unnest($1::integer[], $2::uuid[]) AS r (source, id)
                 WHERE m.source = r.source AND m.id = r.id",
            ),
            put_back: sql(
                "UPDATE :\"schema\".inbox_message AS m SET attempts = m.attempts - 1
                 FROM unnest($1::integer[], $2::uuid[]) AS r (source, id)
                 WHERE m.source = r.source AND m.id = r.id",
            ),
            fail: sql(
                "UPDATE :\"schema\".inbox_message
                 SET error = $3, due_at = clock_timestamp() + $4 * interval '1 second'
                 WHERE source = $1 AND id = $2",
            ),
            give_up: sql(
                "UPDATE :\"schema\".inbox_message AS m
                 SET status = 'dead', error = $3, owes_letter = s.owes_letters
                 FROM :\"schema\".inbox_source AS s
                 WHERE m.source = $1 AND m.id = $2 AND s.id = m.source",
            ),
            hand_over: sql(
                "UPDATE :\"schema\".inbox_message SET status = 'stored', attempts = 0, due_at = now()
                 WHERE source = $1 AND id = $2",
            ),
            go_to: sql(
                "UPDATE :\"schema\".inbox_offset
                 SET next_offset = $5, last_id = NULL, last_timestamp = NULL, updated_at = now()
                 WHERE consumer_group = $1 AND topic = $2 AND partition = $3 AND epoch = $4",
            ),
            release: sql(
                "UPDATE :\"schema\".inbox_offset AS o
                 SET owner = NULL, updated_at = now()
                 FROM unnest($2::text[], $3::integer[], $4::bigint[]) AS p (topic, partition, epoch)
                 WHERE o.consumer_group = $1 AND o.topic = p.topic AND o.partition = p.partition
                   AND o.epoch = p.epoch",
            ),
            advance: sql(
                "UPDATE :\"schema\".inbox_offset AS o
                 SET next_offset = p.next_offset, last_id = p.last_id, last_timestamp = p.last_timestamp,
                     updated_at = now()
                 FROM unnest(
                     $2::text[], $3::integer[], $4::bigint[], $5::bigint[], $6::text[], $7::bigint[]
                 ) AS p (topic, partition, epoch, next_offset, last_id, last_timestamp)
                 WHERE o.consumer_group = $1 AND o.topic = p.topic AND o.partition = p.partition
                   AND o.epoch = p.epoch",
            ),
            receive: sql(
                "INSERT INTO :\"schema\".inbox (kafka_offset, id, source, partition)
                 SELECT * FROM unnest($1::bigint[], $2::uuid[], $3::integer[], $4::integer[])
                 ON CONFLICT DO NOTHING
                 RETURNING source, id",
            ),
            store: sql(&format!(
                "INSERT INTO :\"schema\".inbox_message
                     (message_id, partition, kafka_offset, key, event_type, schema_version, headers, payload, body,
                      created_at, id, original_id, source, lane, status, attempts, due_at, error, owes_letter)
                 SELECT {columns}, k.id, k.original_id, k.source, k.lane, k.status, k.attempts,
                     coalesce(now() + k.due_in * interval '1 second', 'infinity'), k.error,
                     k.status = 'dead' AND s.owes_letters
                 FROM {rows}
                 JOIN unnest($12::uuid[], $13::bytea[], $14::integer[], $15::bigint[], $16::text[], $17::integer[],
                     $18::float8[], $19::text[]) WITH ORDINALITY AS k
                     (id, original_id, source, lane, status, attempts, due_in, error, n) USING (n)
                 JOIN :\"schema\".inbox_source AS s ON s.id = k.source
                 ORDER BY n
                 -- One that was given up, and whose id was forgotten since.
                 ON CONFLICT (source, id) DO UPDATE
                 SET seq = DEFAULT, kafka_offset = excluded.kafka_offset, partition = excluded.partition,
                     lane = excluded.lane, status = excluded.status, attempts = excluded.attempts,
                     due_at = excluded.due_at, received_at = now(), created_at = excluded.created_at,
                     key = excluded.key, event_type = excluded.event_type,
                     schema_version = excluded.schema_version, headers = excluded.headers,
                     payload = excluded.payload, body = excluded.body, error = excluded.error,
                     owes_letter = excluded.owes_letter,
                     decided_by = NULL, decided_at = NULL, reason = NULL",
                columns = Columns::STORED,
                rows = Columns::ROWS,
            )),
        }
    }
}
