//! The Kafka side: a consumer of the group, on a thread of its own, that hands over batches.
//!
//! # What is misleading
//!
//! - The offsets that the group has committed are not ours: Postgres has them, and says where to
//!   begin before the first record of a partition is fetched. So an assignment is taken only
//!   once the database has answered, within the callback that tells of it, and is given up
//!   only once what was begun is committed there. Nothing is ever sought afterwards.
//! - A consumer that does not poll is thrown out of its group, so one that has no room polls on,
//!   with its partitions paused; but to pause forgets what was fetched, so a short wait does not.
//! - A partition may go and come back while records of it are still on their way to whom handles
//!   them, and it may begin earlier then. So each assignment has a number, and each record that
//!   of its own.
//! - What is committed to Kafka is for those who look at the lag: it follows, and may be behind.

use std::collections::HashMap;
use std::ffi::CString;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rdkafka::consumer::{
    BaseConsumer, CommitMode, Consumer as _, ConsumerContext, RebalanceProtocol,
};
use rdkafka::error::{KafkaError, RDKafkaErrorCode as Code};
use rdkafka::message::{BorrowedMessage, Message as _};
use rdkafka::types::RDKafkaRespErr;
use rdkafka::{ClientConfig, ClientContext, Offset, TopicPartitionList, bindings};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, warn};

use super::headers::headers;
use super::message::{Message, Reading, Received};
use crate::error::{Error, ErrorKind, Result};
use crate::lock::lock;

/// One partition of a topic.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Place {
    /// Its name.
    pub topic: Arc<str>,
    /// Counted from zero.
    pub partition: i32,
}

impl Place {
    /// Where this message was.
    pub(super) fn of(message: &Message) -> Self {
        Self {
            topic: message.topic.clone(),
            partition: message.partition,
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "partition {} of topic \"{}\"",
            self.partition, self.topic
        )
    }
}

/// A partition that the group has assigned to us, and what the brokers know of it.
#[derive(Debug, Clone)]
pub(super) struct Assigned {
    pub(super) place: Place,
    /// The number of this assignment.
    pub(super) assignment: u64,
    /// How many partitions its topic has.
    pub(super) partitions: i32,
    /// The first offset that is still there.
    pub(super) low: i64,
    /// The one after the last that may be read.
    pub(super) high: i64,
    /// What the group has committed to Kafka.
    pub(super) committed: Option<i64>,
}

/// What is told beside records, in its order.
pub(super) enum Change {
    /// With the id of the cluster; answered with the offset to begin each of them at. An answer that never comes gives all
    /// of them back.
    Assigned(Vec<Assigned>, Option<String>, oneshot::Sender<Vec<i64>>),
    /// Answered once nothing of them is being handled.
    Revoked(Vec<Place>, oneshot::Sender<()>),
    /// The thread has ended.
    Failed(Error),
}

/// A message and the assignment under which it was read.
pub(super) struct Consumed {
    pub(super) message: Message,
    pub(super) assignment: u64,
}

/// How it consumes.
pub(super) struct ConsumerSettings {
    pub(super) config: ClientConfig,
    /// Names; one that begins with `^` is a regular expression.
    pub(super) topics: Vec<String>,
    pub(super) reading: Reading,
    /// A batch has at most so many messages,
    pub(super) batch_max: usize,
    /// and so many bytes of keys, values and headers. One larger message passes alone.
    pub(super) batch_bytes_max: usize,
}

/// Ours: it stays in the group until it is dropped.
pub(super) struct Consumer {
    pub(super) changes: mpsc::UnboundedReceiver<Change>,
    pub(super) batches: mpsc::Receiver<Gathered>,
    shared: Arc<Shared>,
    thread: Option<thread::JoinHandle<()>>,
}

/// What both threads know.
#[derive(Default)]
struct Shared {
    stops: AtomicBool,
    hears_brokers: AtomicBool,
    /// The offset after the last record of each partition, as far as it is known.
    ends: Mutex<HashMap<Place, i64>>,
    /// Where Kafka's own offsets should be.
    handled: Mutex<HashMap<Place, i64>>,
}

/// How long the brokers may take to answer a question about a partition.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// How long a poll may take.
const POLL_MAX: Duration = Duration::from_millis(100);

/// How long a batch that has room waits for more, while the one before it is at work.
const GATHER_MAX: Duration = Duration::from_millis(2);

/// How long a full batch waits before its partitions are paused.
const PAUSE_AFTER: Duration = Duration::from_secs(1);

/// How often Kafka is told what was handled.
const COMMIT_INTERVAL: Duration = Duration::from_secs(1);

/// How often an idle consumer asks the brokers for a sign of life, and how long that may take.
const ASK_INTERVAL: Duration = Duration::from_secs(3);
const SIGN_MAX: Duration = Duration::from_secs(1);

/// How long it may take to leave the group.
const LEAVE_MAX: Duration = Duration::from_secs(10);

impl Consumer {
    /// Joins the group.
    ///
    /// # Errors
    /// If librdkafka refuses its settings.
    pub(super) fn start(settings: ConsumerSettings) -> Result<Self> {
        let (tell, changes) = mpsc::unbounded_channel();
        // One, so that it has the next while the last is at work.
        let (hand_over, batches) = mpsc::channel(1);
        let shared = Arc::new(Shared::default());
        let context = Context {
            tell,
            shared: shared.clone(),
            assigned: Mutex::default(),
            last_assignment: AtomicU64::new(0),
            has_changed: AtomicBool::new(false),
        };
        let ConsumerSettings { config, topics, .. } = &settings;
        let consumer: BaseConsumer<Context> = config
            .create_with_context(context)
            .map_err(crate::publisher::invalid)?;
        let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
        consumer.subscribe(&topics).map_err(|error| {
            let message = format!("subscribe to {}", topics.join(", "));
            Error::new(ErrorKind::Settings, message).caused_by(error)
        })?;
        let polling = Polling {
            consumer,
            hand_over,
            handle: Handle::current(),
            shared: shared.clone(),
            settings,
            is_paused: false,
            committed_at: Instant::now(),
            asked_at: Instant::now(),
        };
        let thread = thread::Builder::new()
            .name("postbox-consumer".to_owned())
            .spawn(move || polling.run())
            .map_err(|error| {
                Error::new(ErrorKind::Unexpected, "start a thread").caused_by(error)
            })?;
        Ok(Self {
            changes,
            batches,
            shared,
            thread: Some(thread),
        })
    }

    /// Tells Kafka, in time, that all before these offsets are handled.
    pub(super) fn handled(&self, offsets: impl IntoIterator<Item = (Place, i64)>) {
        lock(&self.shared.handled).extend(offsets);
    }

    /// Whether a broker has answered since this was asked last.
    pub(super) fn hears_brokers(&self) -> bool {
        self.shared.hears_brokers.swap(false, Ordering::Relaxed)
    }

    /// The offset after the last record of each partition that is ours, as far as it is known.
    pub(super) fn ends(&self) -> HashMap<Place, i64> {
        lock(&self.shared.ends).clone()
    }

    /// Leaves the group. Where its coordinator does not answer, the thread goes on trying.
    pub(super) async fn leave(mut self) {
        self.shared.stops.store(true, Ordering::Relaxed);
        // Whoever waits for an answer is told that none comes.
        let thread = self.thread.take().expect("only taken here");
        drop(self);
        let left = tokio::task::spawn_blocking(move || thread.join());
        if tokio::time::timeout(LEAVE_MAX, left).await.is_err() {
            warn!("the group's coordinator does not answer: leaving without a word");
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.shared.stops.store(true, Ordering::Relaxed);
    }
}

/// What the thread does.
struct Polling {
    consumer: BaseConsumer<Context>,
    hand_over: mpsc::Sender<Gathered>,
    handle: Handle,
    shared: Arc<Shared>,
    settings: ConsumerSettings,
    is_paused: bool,
    committed_at: Instant,
    asked_at: Instant,
}

/// A batch that is being gathered.
#[derive(Default)]
pub(super) struct Gathered {
    pub(super) messages: Vec<Consumed>,
    bytes: usize,
}

impl Polling {
    fn run(mut self) {
        if let Err(error) = self.poll() {
            // If nobody listens any more, it was told to stop.
            let _ = self.consumer.context().tell.send(Change::Failed(error));
        }
        self.commit(CommitMode::Sync);
        // Here, as it may take long.
        drop(self.consumer);
    }

    /// Until it is to stop.
    fn poll(&mut self) -> Result<()> {
        let mut gathered = Gathered::default();
        let mut is_busy = false;
        while !self.shared.stops.load(Ordering::Relaxed) {
            let patience = match (gathered.messages.is_empty(), is_busy) {
                (true, _) => POLL_MAX,
                (false, true) => GATHER_MAX,
                (false, false) => Duration::ZERO,
            };
            let polled = self.consumer.poll(patience);
            let has_more = match polled {
                Some(Ok(record)) => {
                    gathered.push(self.consumer.context(), &self.settings.reading, &record);
                    true
                }
                Some(Err(error)) => {
                    sort(error)?;
                    false
                }
                None => false,
            };
            let context = self.consumer.context();
            if context.has_changed.swap(false, Ordering::Relaxed) {
                gathered.keep(context);
                if gathered.messages.is_empty() {
                    // Nothing is left that would have it go on later.
                    gathered.bytes = 0;
                    self.pause(false)?;
                }
            }
            if has_more {
                self.shared.hears_brokers.store(true, Ordering::Relaxed);
                self.asked_at = Instant::now();
            } else if self.asked_at.elapsed() > ASK_INTERVAL {
                self.ask_brokers();
            }
            if self.committed_at.elapsed() > COMMIT_INTERVAL {
                self.commit(CommitMode::Async);
            }
            let is_full = gathered.messages.len() >= self.settings.batch_max
                || gathered.bytes >= self.settings.batch_bytes_max;
            if gathered.messages.is_empty() || (has_more && !is_full) {
                continue;
            }
            is_busy = !self.hand_over(&mut gathered, is_full)?;
        }
        Ok(())
    }

    /// Whether there was room.
    fn hand_over(&mut self, gathered: &mut Gathered, is_full: bool) -> Result<bool> {
        if is_full && !self.is_paused {
            let room = async {
                let room = self.hand_over.reserve();
                tokio::time::timeout(PAUSE_AFTER, room).await.is_ok()
            };
            // Whether there is any is seen below.
            let _ = self.handle.block_on(room);
        }
        match self.hand_over.try_send(std::mem::take(gathered)) {
            Ok(()) => {
                self.pause(false)?;
                Ok(true)
            }
            Err(mpsc::error::TrySendError::Full(batch)) => {
                *gathered = batch;
                if is_full {
                    self.pause(true)?;
                }
                Ok(false)
            }
            // It stops.
            Err(mpsc::error::TrySendError::Closed(_)) => {
                self.shared.stops.store(true, Ordering::Relaxed);
                Ok(false)
            }
        }
    }

    /// Has the brokers asked for nothing more, or again.
    fn pause(&mut self, is_paused: bool) -> Result<()> {
        let failed = |error| away("pause", error);
        let assignment = self.consumer.assignment().map_err(failed)?;
        match (is_paused, self.is_paused) {
            // What is assigned meanwhile is paused, too.
            (true, _) => self.consumer.pause(&assignment).map_err(failed)?,
            (false, true) => self.consumer.resume(&assignment).map_err(failed)?,
            (false, false) => {}
        }
        self.is_paused = is_paused;
        Ok(())
    }

    /// Where no record has come, any answer is a sign of life.
    fn ask_brokers(&mut self) {
        let topic = self
            .settings
            .topics
            .iter()
            .find(|topic| !topic.starts_with('^'));
        let answer = self
            .consumer
            .fetch_metadata(topic.map(String::as_str), SIGN_MAX);
        if answer.is_ok() {
            self.shared.hears_brokers.store(true, Ordering::Relaxed);
        }
        self.asked_at = Instant::now();
    }

    fn commit(&mut self, mode: CommitMode) {
        self.committed_at = Instant::now();
        *lock(&self.shared.ends) = self.consumer.context().ends(&self.consumer);
        self.consumer
            .context()
            .commit(&self.consumer, mode, |_| true);
    }
}

impl Gathered {
    fn push(&mut self, context: &Context, reading: &Reading, record: &BorrowedMessage<'_>) {
        let Some((topic, assignment)) = context.assignment(record.topic(), record.partition())
        else {
            return;
        };
        let headers = headers(record);
        let size = |bytes: Option<&[u8]>| bytes.map_or(0, <[u8]>::len);
        self.bytes += size(record.key())
            + size(record.payload())
            + headers
                .iter()
                .map(|(name, value)| name.len() + size(*value))
                .sum::<usize>();
        let received = Received {
            topic: &topic,
            partition: record.partition(),
            offset: record.offset(),
            timestamp_millis: record.timestamp().to_millis(),
            key: record.key(),
            value: record.payload(),
            headers,
        };
        self.messages.push(Consumed {
            message: reading.read(&received),
            assignment,
        });
    }

    /// Drops what is no longer ours.
    fn keep(&mut self, context: &Context) {
        self.messages.retain(|consumed| {
            let Message {
                topic, partition, ..
            } = &consumed.message;
            let assignment = context.assignment(topic, *partition);
            assignment.is_some_and(|(_, assignment)| assignment == consumed.assignment)
        });
    }
}

/// What librdkafka calls, on the thread that polls.
struct Context {
    tell: mpsc::UnboundedSender<Change>,
    shared: Arc<Shared>,
    assigned: Mutex<HashMap<Arc<str>, HashMap<i32, u64>>>,
    last_assignment: AtomicU64,
    /// Something was revoked since this was looked at.
    has_changed: AtomicBool,
}

impl Context {
    fn assignment(&self, topic: &str, partition: i32) -> Option<(Arc<str>, u64)> {
        let assigned = lock(&self.assigned);
        let (topic, partitions) = assigned.get_key_value(topic)?;
        Some((topic.clone(), *partitions.get(&partition)?))
    }

    fn assign(&self, consumer: &BaseConsumer<Self>, list: &mut TopicPartitionList) -> Result<()> {
        let committed = consumer
            .committed_offsets(list.clone(), ANSWER_MAX)
            .map_err(|error| away("ask for the group's offsets", error))?;
        let mut assigned: Vec<Assigned> = Vec::new();
        for element in committed.elements() {
            let place = Place {
                topic: element.topic().into(),
                partition: element.partition(),
            };
            let (low, high) = consumer
                .fetch_watermarks(&place.topic, place.partition, ANSWER_MAX)
                .map_err(|error| away(&format!("ask for the offsets of {place}"), error))?;
            let partitions = match assigned.iter().find(|one| one.place.topic == place.topic) {
                Some(one) => one.partitions,
                None => partitions(consumer, &place.topic)?,
            };
            assigned.push(Assigned {
                place,
                partitions,
                assignment: self.last_assignment.fetch_add(1, Ordering::Relaxed) + 1,
                low,
                high,
                committed: match element.offset() {
                    Offset::Offset(offset) => Some(offset),
                    _ => None,
                },
            });
        }
        let (answer, starts) = oneshot::channel();
        let cluster_id = consumer.client().fetch_cluster_id(ANSWER_MAX);
        let change = Change::Assigned(assigned.clone(), cluster_id, answer);
        let told = self.tell.send(change);
        let Some(starts) = told.ok().and_then(|()| starts.blocking_recv().ok()) else {
            return Err(Error::new(ErrorKind::DatabaseAway, "partitions given back"));
        };
        let refused = |error| away("take an assignment", error);
        for (assigned, start) in assigned.iter().zip(starts) {
            let Place { topic, partition } = &assigned.place;
            list.set_partition_offset(topic, *partition, Offset::Offset(start))
                .map_err(refused)?;
            lock(&self.assigned)
                .entry(topic.clone())
                .or_default()
                .insert(*partition, assigned.assignment);
        }
        match is_cooperative(consumer) {
            true => consumer.incremental_assign(list).map_err(refused),
            false => consumer.assign(list).map_err(refused),
        }
    }

    fn revoke(&self, consumer: &BaseConsumer<Self>, list: &TopicPartitionList) -> Result<()> {
        let places: Vec<Place> = (list.elements().iter())
            .map(|element| Place {
                topic: element.topic().into(),
                partition: element.partition(),
            })
            .collect();
        for Place { topic, partition } in &places {
            if let Some(partitions) = lock(&self.assigned).get_mut(topic) {
                partitions.remove(partition);
            }
        }
        self.has_changed.store(true, Ordering::Relaxed);
        let (answer, released) = oneshot::channel();
        if self
            .tell
            .send(Change::Revoked(places.clone(), answer))
            .is_ok()
        {
            // An answer that never comes: whoever handled them has ended.
            let _ = released.blocking_recv();
        }
        self.commit(consumer, CommitMode::Async, |place| places.contains(place));
        let refused = |error| away("give up an assignment", error);
        // A partition that comes back would still be paused.
        consumer.resume(list).map_err(refused)?;
        match is_cooperative(consumer) {
            true => consumer.incremental_unassign(list).map_err(refused),
            false => consumer.unassign().map_err(refused),
        }
    }

    /// What the brokers' last answers said.
    fn ends(&self, consumer: &BaseConsumer<Self>) -> HashMap<Place, i64> {
        let assigned = lock(&self.assigned);
        let places = assigned.iter().flat_map(|(topic, partitions)| {
            partitions.keys().map(|partition| Place {
                topic: topic.clone(),
                partition: *partition,
            })
        });
        places
            .filter_map(|place| Some((place.clone(), last_known_end(consumer, &place)?)))
            .collect()
    }

    /// Tells Kafka what was handled of these.
    fn commit(
        &self,
        consumer: &BaseConsumer<Self>,
        mode: CommitMode,
        which: impl Fn(&Place) -> bool,
    ) {
        let mut list = TopicPartitionList::new();
        lock(&self.shared.handled).retain(|place, offset| {
            let is_one = which(place);
            if is_one {
                let offset = Offset::Offset(*offset);
                let added = list.add_partition_offset(&place.topic, place.partition, offset);
                added.expect("an offset that was read");
            }
            !is_one
        });
        if list.count() > 0
            && let Err(error) = consumer.commit(&list, mode)
        {
            debug!("commit offsets to Kafka: {error}");
        }
    }
}

impl ClientContext for Context {}

impl ConsumerContext for Context {
    fn rebalance(
        &self,
        consumer: &BaseConsumer<Self>,
        event: RDKafkaRespErr,
        list: &mut TopicPartitionList,
    ) {
        let done = match event {
            RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS => self.assign(consumer, list),
            _ => self.revoke(consumer, list),
        };
        if let Err(error) = done {
            // librdkafka waits for an answer, whatever it is.
            let _ = match is_cooperative(consumer) {
                true => consumer.incremental_unassign(list),
                false => consumer.unassign(),
            };
            let _ = self.tell.send(Change::Failed(error));
            self.shared.stops.store(true, Ordering::Relaxed);
        }
    }

    fn commit_callback(
        &self,
        result: rdkafka::error::KafkaResult<()>,
        _offsets: &TopicPartitionList,
    ) {
        if let Err(error) = result {
            debug!("commit offsets to Kafka: {error}");
        }
    }
}

fn is_cooperative(consumer: &BaseConsumer<Context>) -> bool {
    matches!(
        consumer.rebalance_protocol(),
        RebalanceProtocol::Cooperative
    )
}

/// How many partitions a topic has.
fn partitions(consumer: &BaseConsumer<Context>, topic: &str) -> Result<i32> {
    let metadata = consumer.fetch_metadata(Some(topic), ANSWER_MAX);
    let metadata = metadata.map_err(|error| away(&format!("ask about topic {topic}"), error))?;
    let count = metadata
        .topics()
        .first()
        .map(|topic| topic.partitions().len());
    Ok(i32::try_from(count.unwrap_or_default()).unwrap_or(i32::MAX))
}

/// Nothing is asked: each answer with records says it.
#[allow(unsafe_code)]
fn last_known_end(consumer: &BaseConsumer<Context>, place: &Place) -> Option<i64> {
    let topic = CString::new(&*place.topic).ok()?;
    let (mut low, mut high) = (-1, -1);
    // SAFETY: the client outlives the call, and the pointers are to what is here.
    let answer = unsafe {
        bindings::rd_kafka_get_watermark_offsets(
            consumer.client().native_ptr(),
            topic.as_ptr(),
            place.partition,
            &raw mut low,
            &raw mut high,
        )
    };
    let is_known = answer == RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR && high >= 0;
    is_known.then_some(high)
}

/// What a poll may say that is no record. Most of it librdkafka mends itself.
fn sort(error: KafkaError) -> Result<()> {
    let (code, is_fatal) = match &error {
        KafkaError::MessageConsumption(code) => (*code, false),
        KafkaError::MessageConsumptionFatal(code) => (*code, true),
        _ => return Err(away("consume", error)),
    };
    match code {
        Code::TopicAuthorizationFailed => Err(rights(
            "the brokers let us read not all of the topics: allow Read and Describe on them",
            error,
        )),
        Code::GroupAuthorizationFailed => Err(rights(
            "the brokers do not let us into the group: allow Read on it",
            error,
        )),
        // What it is about is looked at when the partition is assigned again.
        Code::AutoOffsetReset | Code::OffsetOutOfRange => {
            Err(away("read on where it was left", error))
        }
        Code::PollExceeded => Err(away("stay in the group", error)),
        _ if is_fatal => Err(away("consume", error)),
        Code::UnknownTopic | Code::UnknownTopicOrPartition => {
            warn!("a topic is not there, or cannot be seen: waiting for it");
            Ok(())
        }
        _ => {
            debug!("consume: {error}");
            Ok(())
        }
    }
}

fn away(doing: &str, error: KafkaError) -> Error {
    Error::new(ErrorKind::BrokerAway, doing).caused_by(error)
}

fn rights(message: &str, error: KafkaError) -> Error {
    Error::new(ErrorKind::Rights, message).caused_by(error)
}
