//! The consumer: a thread that reads what arrives.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::lock::lock;
use crate::oracle::{Reader, Seen};
use crate::publisher::KafkaSettings;

/// How long the topic may take to appear, with the relay's first record.
const TOPIC_MAX: Duration = Duration::from_secs(30);

pub(super) struct Audience {
    shared: Arc<Shared>,
    thread: JoinHandle<Result<()>>,
}

#[derive(Default)]
struct Shared {
    notes: Mutex<Notes>,
    leave: AtomicBool,
}

#[derive(Default)]
struct Notes {
    records: Vec<Seen>,
    distinct: HashSet<Uuid>,
    /// Of the records since the last [`Audience::latencies`].
    latencies: Vec<Duration>,
}

impl Audience {
    pub(super) fn seat(kafka: &KafkaSettings, topic: &str) -> Self {
        let shared = Arc::new(Shared::default());
        let (kafka, topic, notes) = (kafka.clone(), topic.to_owned(), Arc::clone(&shared));
        let thread = std::thread::spawn(move || notes.take(&kafka, &topic));
        Self { shared, thread }
    }

    /// How many different events have arrived.
    pub(super) fn distinct(&self) -> usize {
        self.shared.with(|notes| notes.distinct.len())
    }

    /// How many records have arrived.
    pub(super) fn records(&self) -> usize {
        self.shared.with(|notes| notes.records.len())
    }

    /// How old the records were on arrival, since the last call.
    pub(super) fn latencies(&self) -> Vec<Duration> {
        self.shared
            .with(|notes| std::mem::take(&mut notes.latencies))
    }

    /// Reads to the end, and hands over everything that was read.
    pub(super) fn leave(self) -> Result<Vec<Seen>> {
        self.shared.leave.store(true, Ordering::Relaxed);
        let read = self.thread.join();
        read.map_err(|_| Error::new(ErrorKind::Unexpected, "the consumer panicked"))??;
        Ok(self.shared.with(|notes| std::mem::take(&mut notes.records)))
    }
}

impl Shared {
    fn take(&self, kafka: &KafkaSettings, topic: &str) -> Result<()> {
        let reader = Reader::open(kafka, topic, Instant::now() + TOPIC_MAX)?;
        while !self.leave.load(Ordering::Relaxed) {
            self.note(reader.read_for(Duration::from_millis(5))?);
        }
        self.note(reader.read_to_end()?);
        Ok(())
    }

    fn note(&self, records: Vec<Seen>) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        self.with(|notes| {
            for record in records {
                if notes.distinct.insert(record.id) {
                    let created = Duration::from_millis(record.timestamp_millis.unsigned_abs());
                    notes.latencies.push(now.saturating_sub(created));
                }
                notes.records.push(record);
            }
        });
    }

    fn with<T>(&self, f: impl FnOnce(&mut Notes) -> T) -> T {
        f(&mut lock(&self.notes))
    }
}
