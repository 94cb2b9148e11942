//! Events that wait in `postbox.parked`: for their time, for another try, or for a person.
//!
//! # The promise
//!
//! An event that cannot go out as it is costs itself, and the order of its key, and nothing
//! else. It is written to the table with its error, in a transaction that is committed
//! before its position is confirmed: an event is in Kafka or in this table, and never in
//! neither. While it waits, later events of its topic and key follow it into the table, and
//! all others flow. It is tried again, less and less often; after so many attempts it is a
//! *dead letter*, which stays until somebody decides, and its key goes on.
//!
//! An event that is scheduled waits in the same table, and holds nobody.
//!
//! # One queue
//!
//! What is due is one look at one index, by `due_at`. A key's events are a queue in the
//! order of `number`, of which only the head has a time: those behind it are due at
//! infinity, until they are the head. The same for events of a topic that the brokers do
//! not take at all: they were never tried, and one probe of the topic stands for them.
//!
//! People look at what waits, and decide about it (`decisions.rs`): that changes rows, and the
//! relay that is at work sends them.
//!
//! # What is misleading
//!
//! - A row that is parked is not yet behind the relay: earlier events of its key may still
//!   be in flight, and a restart reads them again. If it were tried before they are
//!   delivered, it would come ahead of them. So nothing is tried before the checkpoint has
//!   passed it (`is_settled` in `sql/0002_parked.sql`).
//! - A restart reads rows again that are in the table. They keep what was decided about
//!   them, and get a new number: a row before them may be parked only this time.
//! - A producer that was refused one record sends no more. So what waits is tried by a
//!   producer of its own, and the stream never ends for it.
//! - A relay that was frozen may park when another is at work, which has parked on. So that
//!   names the epoch of its checkpoint. What it sends and settles costs repetitions alone.

pub mod decisions;
pub mod event;
mod filter;
pub mod row;
mod statements;
pub(crate) mod store;

pub use filter::{Filter, Status};

use std::sync::Arc;
use std::time::Duration;

use crate::backoff::doubled;
use crate::duration::in_words;
use crate::pgoutput::Column;
use crate::source::Row;
use crate::timestamp::Timestamp;

/// What is done with an event that can never go out as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnPoison {
    /// It waits, is tried again, and holds its key, until it is a dead letter.
    #[default]
    Park,
    /// It is a dead letter at once, and holds nobody.
    Skip,
    /// The relay stops.
    Stop,
}

impl std::str::FromStr for OnPoison {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "park" => Ok(Self::Park),
            "skip" => Ok(Self::Skip),
            "stop" => Ok(Self::Stop),
            _ => Err(format!("unknown policy \"{name}\": use park, skip or stop")),
        }
    }
}

/// How long events wait, how often they are tried, and how many may wait.
#[derive(Debug, Clone)]
pub struct ParkedSettings {
    /// What is done with an event that cannot go out.
    pub on_poison: OnPoison,
    /// How often an event is tried before it is a dead letter. That a broker is away never
    /// counts.
    pub attempts_max: u32,
    /// How long to wait after the first refusal; after each further one twice as long.
    pub backoff_min: Duration,
    /// The longest wait.
    pub backoff_max: Duration,
    /// Where dead letters are sent besides.
    pub dead_letter_topic: Option<String>,
    /// How many events may be waiting or dead.
    pub rows_max: u64,
    /// How many bytes they may have.
    pub bytes_max: u64,
    /// How far ahead an event may be scheduled.
    pub schedule_max: Duration,
    /// How many events may be scheduled.
    pub scheduled_max: u64,
}

impl Default for ParkedSettings {
    fn default() -> Self {
        Self {
            on_poison: OnPoison::Park,
            attempts_max: 6,
            backoff_min: Duration::from_secs(10),
            backoff_max: Duration::from_secs(3600),
            dead_letter_topic: None,
            rows_max: 100_000,
            bytes_max: 1 << 30,
            schedule_max: Duration::from_secs(365 * 24 * 3600),
            scheduled_max: 10_000_000,
        }
    }
}

impl ParkedSettings {
    /// Refuses a time that is further ahead of its commit than may be.
    pub(crate) fn check_schedule(
        &self,
        time: Timestamp,
        committed_at: Timestamp,
    ) -> Result<(), String> {
        let ahead = time
            .unix_micros()
            .saturating_sub(committed_at.unix_micros());
        let is_within = Duration::from_micros(ahead.max(0).unsigned_abs()) <= self.schedule_max;
        if is_within {
            return Ok(());
        }
        Err(format!(
            "it is scheduled for {time}, further ahead than --max-schedule {} allows",
            in_words(self.schedule_max)
        ))
    }

    /// Whether what cannot go out is parked, and does not end the relay.
    pub(crate) fn parks(&self) -> bool {
        self.on_poison != OnPoison::Stop
    }

    /// After how many refusals an event is a dead letter.
    pub(crate) fn tries_max(&self) -> u32 {
        match self.on_poison {
            OnPoison::Skip => 1,
            OnPoison::Park | OnPoison::Stop => self.attempts_max,
        }
    }

    /// How long to wait after so many refusals: half of it at least, the rest at random, so
    /// that what was refused together is not tried together for ever.
    pub(crate) fn backoff(&self, attempts: u32) -> Duration {
        let whole = doubled(self.backoff_min, self.backoff_max, attempts);
        // Of a random UUID any bits do.
        let (random, _) = uuid::Uuid::new_v4().as_u64_pair();
        let part = (random >> 32) as f64 / f64::from(u32::MAX);
        whole.mul_f64(0.5 + part / 2.0)
    }
}

/// That two rows are of one topic and key, in SQL, by the index of what waits: which has their
/// hashes, as a key may be longer than an entry of an index can be.
pub(crate) fn same_key(one: &str, other: &str) -> String {
    format!(
        "hashtextextended({one}.key, 0) = hashtextextended({other}.key, 0) \
         AND hashtextextended({one}.topic, 0) = hashtextextended({other}.topic, 0) \
         AND {one}.key = {other}.key AND {one}.topic = {other}.topic"
    )
}

/// When a row is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Due {
    /// By the server's clock.
    At(Timestamp),
    /// From now.
    In(Duration),
    /// When what it waits for has gone.
    Never,
}

/// A row to be parked.
#[derive(Debug, Clone)]
pub(crate) struct NewRow {
    pub(crate) id: String,
    pub(crate) topic: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) event_type: Option<String>,
    pub(crate) xid: Option<String>,
    pub(crate) status: Status,
    pub(crate) due: Due,
    pub(crate) awaits_topic: bool,
    pub(crate) attempts: u32,
    pub(crate) error: Option<String>,
    pub(crate) owes_letter: bool,
    pub(crate) row: Row,
    pub(crate) columns: Arc<[Column]>,
}

/// A row that is due, and taken to be sent.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) id: String,
    pub(crate) status: Status,
    pub(crate) topic: Option<String>,
    pub(crate) key: Option<String>,
    pub(crate) attempts: u32,
    /// Why it was refused last.
    pub(crate) error: Option<String>,
    /// Cancelled before its time.
    pub(crate) is_cancelled: bool,
    /// When it was taken, by the server's clock.
    pub(crate) at: Timestamp,
    pub(crate) row: Row,
    pub(crate) columns: Vec<Column>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_too_far_ahead_is_refused_with_the_limit_as_its_flag_has_it() {
        let at = |seconds: i64| Timestamp::from_unix_micros(seconds * 1_000_000);
        for (limit, text) in [(3600_i64, "1h"), (5400, "90m"), (365 * 86_400, "365d")] {
            let settings = ParkedSettings {
                schedule_max: Duration::from_secs(limit.unsigned_abs()),
                ..ParkedSettings::default()
            };
            assert_eq!(settings.check_schedule(at(limit), at(0)), Ok(()));
            let refused = settings.check_schedule(at(limit + 1), at(0)).unwrap_err();
            let expected = format!("further ahead than --max-schedule {text} allows");
            assert!(refused.ends_with(&expected), "{refused}");
        }
    }

    #[test]
    fn each_wait_is_twice_as_long_up_to_the_longest() {
        let settings = ParkedSettings::default();
        for (attempts, seconds) in [(1, 10.0), (2, 20.0), (5, 160.0), (20, 3600.0), (99, 3600.0)] {
            let wait = settings.backoff(attempts).as_secs_f64();
            assert!(
                (seconds / 2.0..=seconds).contains(&wait),
                "{attempts}: {wait}"
            );
        }
    }
}
