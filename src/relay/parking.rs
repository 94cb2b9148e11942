//! Puts rows that cannot go out, or must not yet, into the table of parked events, and
//! holds back what comes behind them.
//!
//! To park is to deliver to another place: the row stands in the window like any other, and
//! has left it once the table has it. So a position is confirmed when all before it is in
//! Kafka or parked, and a relay that is killed in between reads the row again.
//!
//! What is held back is known here, from the table at the start and from what is parked
//! since. What waits is sent by `aside.rs`, which says when a key is free again.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinSet;
use tracing::{debug, error, warn};

use crate::envelope::{Address, Encoder, Record};
use crate::error::{Error, ErrorKind, Result, joined};
use crate::event::Event;
use crate::lock::lock;
use crate::metrics::ParkedMetrics;
use crate::parked::store::{Count, Held, Store};
use crate::parked::{Due, NewRow, OnPoison, ParkedSettings, Status};
use crate::source::{Row, Source};
use crate::timestamp::Timestamp;

/// The most rows, and bytes, that are written in one transaction.
const ROWS_MAX: usize = 1000;
const BYTES_MAX: usize = 8 << 20;

/// Writes rows to the table of parked events.
pub(super) struct Parking {
    store: Arc<Store>,
    pub(super) settings: ParkedSettings,
    pub(super) shared: Arc<Shared>,
    rows: VecDeque<(u64, NewRow)>,
    writing: JoinSet<Result<Written>>,
}

/// Why a row is not sent now.
#[derive(Debug, Clone)]
pub(super) enum Reason {
    /// Its time has not come.
    Scheduled(Timestamp),
    /// It can never go out as it is.
    Refused(String),
    /// An earlier event of its key waits.
    Behind,
    /// Nothing of its topic is taken.
    Topic(String),
    /// It may be too large, as others of its size were.
    Doubtful,
    /// It was given up, or skipped, before it was read again.
    Decided,
}

struct Written {
    sequences: Vec<u64>,
    /// Topics and keys of rows that wait.
    keys: Vec<(String, String)>,
    /// How much of it is new.
    added: Count,
    /// How much was written.
    all: Count,
    /// When the first is due of what is scheduled.
    due: Option<Timestamp>,
}

/// What the stream and the aside both know.
#[derive(Debug, Default)]
pub(super) struct Shared {
    holds: Mutex<Holds>,
    /// Whether anything is held back at all: for each event to look would be too dear.
    is_holding: AtomicBool,
    /// From when on more is scheduled than was.
    scheduled_from: Mutex<Option<Timestamp>>,
    pub(super) wake_schedule: Notify,
    /// Something may be due of what waits for another try.
    pub(super) wake_queue: Notify,
}

/// What is held back.
#[derive(Debug, Default)]
pub(super) struct Holds {
    /// By topic, and then by key.
    keys: HashMap<String, HashMap<String, Hold>>,
    /// Topics that the brokers refuse altogether, and why.
    topics: HashMap<String, String>,
    /// Ids of events that were given up and may be read again.
    decided: HashSet<String>,
    /// From which size on records of a topic were too large.
    too_large: HashMap<String, usize>,
    count: Count,
    /// What is being written.
    pending: Count,
}

/// A key of which an event waits.
#[derive(Debug, Default)]
struct Hold {
    /// Rises with each row: one that was parked since has not been looked for.
    version: u64,
    /// Rows that are being written.
    pending: usize,
    /// It is to be looked whether anything waits still.
    is_dirty: bool,
}

impl Parking {
    /// Knows what is held back, once this relay is the one that is at work.
    pub(super) async fn begin(
        store: Store,
        settings: ParkedSettings,
        refused_topics: HashMap<String, String>,
        too_large: HashMap<String, usize>,
    ) -> Result<Self> {
        let held = store.held(true).await?;
        // Those that are scheduled are counted beside the stream: they may be very many.
        let count = store.count().await?;
        let shared = Arc::new(Shared::default());
        shared.change(|holds| {
            holds.begin(held, refused_topics);
            holds.too_large = too_large;
            holds.count = count;
        });
        Ok(Self {
            store: Arc::new(store),
            settings,
            shared,
            rows: VecDeque::new(),
            writing: JoinSet::new(),
        })
    }

    /// From which size on records of a topic were too large.
    pub(super) fn too_large(&self) -> HashMap<String, usize> {
        self.shared.with(|holds| holds.too_large.clone())
    }

    /// Why an event is not to be sent though nothing is wrong with it, if so.
    pub(super) fn why_not_now(&self, event: &Event<'_>, record: &Record<'_>) -> Option<Reason> {
        if !self.shared.is_holding.load(Ordering::Relaxed) {
            return None;
        }
        self.shared.with(|holds| {
            if holds.decided.contains(event.id) {
                return Some(Reason::Decided);
            }
            if let Some(why) = holds.topics.get(record.topic) {
                return Some(Reason::Topic(why.clone()));
            }
            if record
                .key
                .is_some_and(|key| holds.has_key(record.topic, key))
            {
                return Some(Reason::Behind);
            }
            let too_large = holds.too_large.get(record.topic);
            let is_doubtful = too_large.is_some_and(|from| record.size() >= *from);
            is_doubtful.then_some(Reason::Doubtful)
        })
    }

    /// What is written of a row; nothing if not even its columns are known.
    pub(super) fn row(
        &self,
        (source, encoder): (&Source, &Encoder),
        row: &Row,
        address: Option<Address>,
        reason: Reason,
    ) -> Option<NewRow> {
        let (outline, columns) = source.outline(row)?;
        let place = || format!("{}/{}", row.place.commit_lsn, row.place.ordinal);
        let (topic, key) = address.unwrap_or_else(|| encoder.address_of(&outline));
        let new = NewRow {
            id: outline.id.unwrap_or_else(place),
            event_type: outline.event_type,
            xid: outline.xid,
            status: Status::Waiting,
            due: Due::Never,
            awaits_topic: false,
            attempts: 0,
            error: None,
            owes_letter: false,
            row: row.clone(),
            columns,
            topic,
            key,
        };
        Some(match reason {
            Reason::Scheduled(time) => NewRow {
                status: Status::Scheduled,
                due: Due::At(time),
                ..new
            },
            Reason::Refused(why) | Reason::Topic(why)
                if self.settings.on_poison == OnPoison::Skip =>
            {
                NewRow {
                    status: Status::Dead,
                    attempts: 1,
                    error: Some(why),
                    owes_letter: self.settings.dead_letter_topic.is_some(),
                    ..new
                }
            }
            Reason::Refused(why) => NewRow {
                // Behind another it has its turn when that is gone.
                due: match self.is_held(&new) {
                    true => Due::Never,
                    false => Due::In(self.settings.backoff(1)),
                },
                attempts: 1,
                error: Some(why),
                ..new
            },
            Reason::Behind => new,
            Reason::Doubtful => NewRow {
                due: Due::In(Duration::ZERO),
                error: Some("its topic refused others of its size".to_owned()),
                ..new
            },
            Reason::Topic(why) => NewRow {
                // A probe stands for it.
                awaits_topic: true,
                error: Some(why),
                ..new
            },
            Reason::Decided => NewRow {
                status: Status::Dead,
                ..new
            },
        })
    }

    fn is_held(&self, row: &NewRow) -> bool {
        let name = row.topic.as_deref().zip(row.key.as_deref());
        name.is_some_and(|(topic, key)| self.shared.with(|holds| holds.has_key(topic, key)))
    }

    /// Says what happens to a row.
    pub(super) fn tell(&self, name: &str, row: &NewRow, metrics: &ParkedMetrics) {
        match (row.status, &row.error) {
            (Status::Scheduled, _) => metrics.scheduled.inc(),
            (Status::Dead, Some(why)) => {
                metrics.dead_letters.inc();
                error!("{name} is a dead letter, as --on-poison skip says: {why}");
            }
            (Status::Dead | Status::Skipped, _) => debug!("{name} was given up before"),
            (Status::Waiting, Some(why)) if row.attempts > 0 => {
                metrics.refused.inc();
                warn!("{name} is parked, and its key with it; it is tried again: {why}");
            }
            (Status::Waiting, why) if why.is_none() || row.awaits_topic => metrics.behind.inc(),
            // What is doubtful is tried at once: then more is known.
            (Status::Waiting, _) => {}
        }
    }

    /// The brokers take nothing of this topic.
    pub(super) fn hold_topic(&self, topic: String, why: String) {
        self.shared.hold_topic(topic, why);
        self.shared.wake_queue.notify_one();
    }

    /// Refuses one more row where there are as many as may be.
    pub(super) fn check_room(&self, name: &str, row: &NewRow) -> Result<()> {
        let bytes = row.row.bytes.len();
        let (count, pending) = self.shared.with(|holds| (holds.count, holds.pending));
        let scheduled = count.scheduled + pending.scheduled;
        let parked = count.waiting + count.dead + pending.waiting + pending.dead;
        let parked_bytes = count.bytes + pending.bytes;
        let is_over = |number: i64, max: u64| number.unsigned_abs() >= max;
        let settings = &self.settings;
        let message = match row.status {
            Status::Scheduled if is_over(scheduled, settings.scheduled_max) => format!(
                "{scheduled} events are scheduled, as many as --scheduled-max allows: raise it, or cancel some by \
                 `postbox cancel`"
            ),
            Status::Scheduled => return Ok(()),
            _ if is_over(parked, settings.rows_max) => format!(
                "{parked} events are parked, as many as --parked-max allows: `postbox parked list` shows why; mend that \
                 and have them tried again, skip them, or raise it"
            ),
            _ if parked_bytes.unsigned_abs() + bytes as u64 > settings.bytes_max => format!(
                "{parked_bytes} bytes are parked, and one more event would be above --parked-bytes-max: `postbox parked \
                 list` shows why; mend that and have them tried again, skip them, or raise it"
            ),
            _ => return Ok(()),
        };
        let why = row
            .error
            .as_deref()
            .unwrap_or("an earlier event of its key waits");
        let next = match row.status {
            Status::Scheduled => format!("{name} would be the next"),
            _ => format!("{name} would be the next, as {why}"),
        };
        Err(Error::new(ErrorKind::Event, message).caused_by(next))
    }

    /// Parks a row, which stands in the window under this number.
    pub(super) fn park(&mut self, sequence: u64, row: NewRow) {
        self.shared.change(|holds| {
            holds.pending.count(&row);
            if let (Status::Waiting, Some(topic), Some(key)) = (row.status, &row.topic, &row.key) {
                holds.parking(topic.clone(), key.clone());
            }
        });
        self.rows.push_back((sequence, row));
        self.write();
    }

    /// Waits until rows are written, and says which. Cancel-safe.
    ///
    /// # Errors
    /// If they could not be: they are in the table or are not.
    pub(super) async fn next(&mut self) -> Result<Vec<u64>> {
        let Some(written) = self.writing.join_next().await else {
            return std::future::pending().await;
        };
        let Written {
            sequences,
            keys,
            added,
            all,
            due,
        } = joined(written)?;
        self.shared.change(|holds| {
            holds.pending.take(&all);
            holds.add(&added);
            for (topic, key) in &keys {
                holds.parked(topic, key);
            }
        });
        if let Some(due) = due {
            self.shared.schedule(due);
        }
        if all.waiting + all.dead > 0 {
            self.shared.wake_queue.notify_one();
        }
        self.write();
        Ok(sequences)
    }

    /// One transaction at a time, so that numbers rise in the order of the rows.
    fn write(&mut self) {
        if !self.writing.is_empty() || self.rows.is_empty() {
            return;
        }
        let mut bytes = 0;
        let mut fits = |(_, row): &(u64, NewRow)| {
            let before = bytes;
            bytes += row.row.bytes.len();
            before < BYTES_MAX
        };
        let count = self.rows.iter().take(ROWS_MAX).take_while(|row| fits(row));
        let count = count.count();
        let (sequences, rows): (Vec<u64>, Vec<NewRow>) = self.rows.drain(..count).unzip();
        let store = Arc::clone(&self.store);
        self.writing.spawn(async move {
            let parked = async {
                tokio::select! {
                    parked = store.park(&rows) => parked,
                    error = store.ended() => Err(error),
                }
            };
            let new = parked.await?;
            let (mut added, mut all) = (Count::default(), Count::default());
            for row in &rows {
                all.count(row);
                if new.contains(&row.id) {
                    added.count(row);
                }
            }
            let scheduled = rows.iter().filter(|row| row.status == Status::Scheduled);
            let times = scheduled.filter_map(|row| match row.due {
                Due::At(time) => Some(time),
                Due::In(_) | Due::Never => None,
            });
            let due = times.min();
            let waiting = rows.into_iter().filter(|row| row.status == Status::Waiting);
            Ok(Written {
                sequences,
                keys: waiting.filter_map(|row| row.topic.zip(row.key)).collect(),
                added,
                all,
                due,
            })
        });
    }
}

/// Waits for rows that are parked, where rows can be.
pub(super) async fn next(parking: Option<&mut Parking>) -> Result<Vec<u64>> {
    match parking {
        Some(parking) => parking.next().await,
        None => std::future::pending().await,
    }
}

impl Shared {
    /// The brokers take nothing of this topic. Says so, once.
    pub(super) fn hold_topic(&self, topic: String, why: String) {
        if self.with(|holds| holds.topics.contains_key(&topic)) {
            return;
        }
        warn!("events of this topic wait until the brokers take them: {why}");
        self.change(|holds| holds.topics.insert(topic, why));
    }

    /// More is scheduled: the first for this time.
    pub(super) fn schedule(&self, due: Timestamp) {
        let mut from = lock(&self.scheduled_from);
        *from = Some(from.map_or(due, |from| from.min(due)));
        self.wake_schedule.notify_one();
    }

    /// From when on more was scheduled since this was asked.
    pub(super) fn take_scheduled_from(&self) -> Option<Timestamp> {
        lock(&self.scheduled_from).take()
    }

    pub(super) fn with<T>(&self, look: impl FnOnce(&Holds) -> T) -> T {
        look(&lock(&self.holds))
    }

    pub(super) fn change<T>(&self, change: impl FnOnce(&mut Holds) -> T) -> T {
        let mut holds = lock(&self.holds);
        let changed = change(&mut holds);
        let is_holding = !holds.keys.is_empty()
            || !holds.topics.is_empty()
            || !holds.decided.is_empty()
            || !holds.too_large.is_empty();
        self.is_holding.store(is_holding, Ordering::Relaxed);
        changed
    }
}

impl Holds {
    fn begin(&mut self, held: Held, refused_topics: HashMap<String, String>) {
        for (topic, key) in held.keys {
            self.keys.entry(topic).or_default().insert(
                key,
                Hold {
                    is_dirty: true,
                    ..Hold::default()
                },
            );
        }
        self.topics.extend(held.topics);
        self.topics.extend(refused_topics);
        self.decided.extend(held.decided);
    }

    fn hold(&mut self, topic: &str, key: &str) -> Option<&mut Hold> {
        self.keys.get_mut(topic)?.get_mut(key)
    }

    /// Whether an event of this topic and key waits.
    pub(super) fn has_key(&self, topic: &str, key: &str) -> bool {
        self.keys
            .get(topic)
            .is_some_and(|keys| keys.contains_key(key))
    }

    /// Topics that are held.
    pub(super) fn topics(&self) -> &HashMap<String, String> {
        &self.topics
    }

    /// The brokers take records for this topic.
    pub(super) fn free_topic(&mut self, topic: &str) {
        self.topics.remove(topic);
        for hold in self
            .keys
            .get_mut(topic)
            .into_iter()
            .flat_map(HashMap::values_mut)
        {
            hold.is_dirty = true;
        }
    }

    /// An event of this topic and key waits, as the table says.
    pub(super) fn hold_key(&mut self, topic: String, key: String) {
        let hold = self.keys.entry(topic).or_default().entry(key).or_default();
        hold.version += 1;
        hold.is_dirty = true;
    }

    /// An event of this topic and key waits, and is on its way to the table.
    fn parking(&mut self, topic: String, key: String) {
        let hold = self.keys.entry(topic).or_default().entry(key).or_default();
        hold.version += 1;
        hold.pending += 1;
    }

    /// It is in the table.
    fn parked(&mut self, topic: &str, key: &str) {
        if let Some(hold) = self.hold(topic, key) {
            hold.pending -= 1;
            // The one before it may have left meanwhile.
            hold.is_dirty = true;
        }
    }

    /// Somebody may have decided about the events of any key.
    pub(super) fn doubt_all(&mut self) {
        for hold in self.keys.values_mut().flat_map(HashMap::values_mut) {
            hold.is_dirty = true;
        }
    }

    /// The first of this key may have left.
    pub(super) fn doubt(&mut self, topic: &str, key: &str) {
        if let Some(hold) = self.hold(topic, key) {
            hold.is_dirty = true;
        }
    }

    /// Keys that are to be looked after, and are all in the table, with their versions.
    pub(super) fn dirty(&self) -> HashMap<(String, String), u64> {
        let mut dirty = HashMap::new();
        for (topic, keys) in &self.keys {
            for (key, hold) in keys {
                if hold.is_dirty && hold.pending == 0 {
                    dirty.insert((topic.clone(), key.clone()), hold.version);
                }
            }
        }
        dirty
    }

    /// Of these keys, `held` have events that wait: the others are free, but for those of
    /// which a row has come since.
    pub(super) fn looked_after(
        &mut self,
        looked: HashMap<(String, String), u64>,
        held: &HashSet<(String, String)>,
    ) {
        for (name, version) in looked {
            let (topic, key) = &name;
            let Some(keys) = self.keys.get_mut(topic) else {
                continue;
            };
            let Some(hold) = keys.get_mut(key) else {
                continue;
            };
            if hold.version != version {
                continue;
            }
            hold.is_dirty = false;
            if !held.contains(&name) {
                keys.remove(key);
                if keys.is_empty() {
                    self.keys.remove(topic);
                }
            }
        }
    }

    /// How much there is, as it was counted but for what is scheduled. Says how much that is.
    pub(super) fn count(&mut self, count: Count) -> Count {
        let scheduled = self.count.scheduled;
        self.count = Count { scheduled, ..count };
        self.count
    }

    /// So many events are scheduled, as they were counted.
    pub(super) fn count_scheduled(&mut self, events: i64) {
        self.count.scheduled = events;
    }

    /// So much more is in the table than was counted.
    pub(super) fn add(&mut self, more: &Count) {
        self.count.add(more);
    }

    /// A record of this size was not too large for its topic: that others were is forgotten.
    pub(super) fn passed(&mut self, topic: &str, size: usize) {
        self.too_large
            .retain(|name, from| name != topic || *from > size);
    }

    /// Whether any record of this topic was too large.
    pub(super) fn has_too_large(&self, topic: &str) -> bool {
        self.too_large.contains_key(topic)
    }

    /// Whether any event was given up that may be read again.
    pub(super) fn has_decided(&self) -> bool {
        !self.decided.is_empty()
    }

    /// Of what was given up only these may be read again by now.
    pub(super) fn keep_decided(&mut self, decided: Vec<String>) {
        let still: HashSet<String> = decided.into_iter().collect();
        self.decided.retain(|id| still.contains(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> (String, String) {
        ("topic".to_owned(), "key".to_owned())
    }

    #[test]
    fn a_key_is_free_only_if_nothing_came_since_it_was_looked_for() {
        let shared = Shared::default();
        let (topic, name) = key();
        shared.change(|holds| holds.hold_key(topic.clone(), name.clone()));
        let looked = shared.with(Holds::dirty);
        assert_eq!(looked.len(), 1);
        shared.change(|holds| holds.hold_key(topic.clone(), name.clone()));
        shared.change(|holds| holds.looked_after(looked, &HashSet::new()));
        assert!(shared.with(|holds| holds.has_key(&topic, &name)));
        let looked = shared.with(Holds::dirty);
        shared.change(|holds| holds.looked_after(looked, &HashSet::new()));
        assert!(!shared.with(|holds| holds.has_key(&topic, &name)));
        assert!(!shared.is_holding.load(Ordering::Relaxed));
    }

    #[test]
    fn a_key_with_a_row_on_its_way_to_the_table_is_not_looked_for_nor_free() {
        let mut holds = Holds::default();
        let (topic, name) = key();
        holds.hold_key(topic.clone(), name.clone());
        let looked = holds.dirty();
        holds.parking(topic.clone(), name.clone());
        assert!(holds.dirty().is_empty());
        // The table did not have it then.
        holds.looked_after(looked, &HashSet::new());
        assert!(holds.has_key(&topic, &name));
        holds.parked(&topic, &name);
        assert_eq!(holds.dirty().len(), 1);
    }
}
