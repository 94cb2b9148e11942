//! The judge: was anything lost, reordered, invented, or repeated too often?
//!
//! [`Writers`] put events into the outbox, and in the same transaction each
//! event's id, key and the key's version into a ledger: what is in the ledger was
//! committed, whatever the writer saw of its COMMIT. Whatever harm was done
//! meanwhile, [`judge`] then holds the records that a [`Reader`] found in Kafka
//! against the ledger:
//!
//! 1. every id of the ledger is in Kafka, or a dead letter in the table of parked events
//!    (else *lost*);
//! 2. first occurrences of a key are in the order of its versions, but for events that
//!    were scheduled or are dead letters (else *inversions*);
//! 3. no id is in Kafka that is not in the ledger: nothing rolled back appears
//!    (else *ghosts*);
//! 4. *duplicates*, records beyond an id's first, stay within the window of each
//!    crash. How many that may be is for the caller to say.
//!
//! What the handler of an inbox has done is judged as if it were records, of which none may be
//! repeated: [`prepare_handler`] makes one that notes each message, and [`effects`] reads what it
//! has noted.

mod choices;
mod effects;
mod reader;
mod writers;

use std::collections::{HashMap, HashSet};
use std::fmt;

use uuid::Uuid;

pub use choices::Choices;
pub use effects::{effects, handled, prepare_handler};
pub use reader::{Reader, Seen};
pub use writers::{Load, PAUSE_MAX, SCHEDULE_MAX, Writers, ledger, prepare};

/// What was committed.
#[derive(Debug, Clone, Default)]
pub struct Ledger {
    /// By the event's id.
    pub events: HashMap<Uuid, Entry>,
    /// Ids of events that were given up, and are in the table of parked events.
    pub dead: HashSet<Uuid>,
}

/// A committed event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its key.
    pub key: String,
    /// The key's version.
    pub version: i64,
    /// Whether it has its place among the events of its key.
    pub is_ordered: bool,
}

/// What the judge found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Events in the ledger.
    pub committed: usize,
    /// Records in Kafka.
    pub records: usize,
    /// Ids that were committed and are not in Kafka.
    pub lost: Vec<Uuid>,
    /// Ids whose first occurrence came after a later version of their key.
    pub inversions: Vec<Uuid>,
    /// Ids that were never committed.
    pub ghosts: Vec<Uuid>,
    /// Records with another key than the event's.
    pub misplaced: Vec<Uuid>,
    /// Records beyond the first of their id.
    pub duplicates: usize,
    /// Events that are not in Kafka, and dead letters.
    pub dead: usize,
}

impl Verdict {
    /// Whether all is well, with at most this many duplicates.
    pub fn is_clean(&self, duplicates_max: usize) -> bool {
        self.lost.is_empty()
            && self.inversions.is_empty()
            && self.ghosts.is_empty()
            && self.misplaced.is_empty()
            && self.duplicates <= duplicates_max
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} committed, {} records: {} lost, {} inversions, {} ghosts, {} misplaced, {} duplicates, {} dead",
            self.committed,
            self.records,
            self.lost.len(),
            self.inversions.len(),
            self.ghosts.len(),
            self.misplaced.len(),
            self.duplicates,
            self.dead
        )
    }
}

/// Judges records, which must be in the order of their offsets within each
/// partition, against the ledger.
pub fn judge(ledger: &Ledger, records: &[Seen]) -> Verdict {
    let mut verdict = Verdict {
        committed: ledger.events.len(),
        records: records.len(),
        ..Verdict::default()
    };
    let mut seen = HashSet::with_capacity(ledger.events.len());
    let mut newest: HashMap<&str, i64> = HashMap::new();
    for record in records {
        let Some(entry) = ledger.events.get(&record.id) else {
            verdict.ghosts.push(record.id);
            continue;
        };
        if record.key != entry.key {
            verdict.misplaced.push(record.id);
        }
        if !seen.insert(record.id) {
            verdict.duplicates += 1;
            continue;
        }
        // One that was given up, and sent all the same, has lost its place.
        if !entry.is_ordered || ledger.dead.contains(&record.id) {
            continue;
        }
        let newest = newest.entry(&entry.key).or_insert(0);
        if entry.version < *newest {
            verdict.inversions.push(record.id);
        }
        *newest = (*newest).max(entry.version);
    }
    let missing = ledger.events.keys().filter(|id| !seen.contains(id));
    let (dead, lost): (Vec<Uuid>, Vec<Uuid>) = missing.partition(|id| ledger.dead.contains(id));
    (verdict.dead, verdict.lost) = (dead.len(), lost);
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    /// Versions 1, 2, 3 of the key "a" have the ids 1, 2, 3.
    fn ledger() -> Ledger {
        let entry = |version: i64| Entry {
            key: "a".to_owned(),
            version,
            is_ordered: true,
        };
        Ledger {
            events: (1..=3)
                .map(|version| (id(version as u128), entry(version)))
                .collect(),
            dead: HashSet::new(),
        }
    }

    fn records(ids: &[u128]) -> Vec<Seen> {
        ids.iter()
            .map(|&number| Seen {
                id: id(number),
                key: "a".to_owned(),
                timestamp_millis: 0,
            })
            .collect()
    }

    #[test]
    fn a_repeated_run_is_in_order() {
        let verdict = judge(&ledger(), &records(&[1, 2, 1, 2, 3]));
        assert!(verdict.is_clean(2), "{verdict}");
        assert!(!verdict.is_clean(1), "{verdict}");
    }

    #[test]
    fn a_dead_letter_is_not_lost_and_has_no_place() {
        let mut ledger = ledger();
        ledger.dead.insert(id(2));
        let verdict = judge(&ledger, &records(&[1, 3]));
        assert!(verdict.is_clean(0), "{verdict}");
        assert_eq!(verdict.dead, 1);
        let verdict = judge(&ledger, &records(&[1, 3, 2]));
        assert!(verdict.is_clean(0), "{verdict}");
    }

    #[test]
    fn a_scheduled_event_has_no_place() {
        let mut ledger = ledger();
        ledger.events.get_mut(&id(1)).unwrap().is_ordered = false;
        let verdict = judge(&ledger, &records(&[2, 3, 1]));
        assert!(verdict.is_clean(0), "{verdict}");
        let verdict = judge(&ledger, &records(&[2, 3]));
        assert_eq!(verdict.lost, [id(1)]);
    }

    #[test]
    fn convicts_each_crime() {
        let verdict = judge(&ledger(), &records(&[1, 3]));
        assert_eq!(verdict.lost, [id(2)]);
        let verdict = judge(&ledger(), &records(&[2, 1, 3]));
        assert_eq!(verdict.inversions, [id(1)]);
        let verdict = judge(&ledger(), &records(&[1, 2, 3, 4]));
        assert_eq!(verdict.ghosts, [id(4)]);
        let mut moved = records(&[1, 2, 3]);
        moved[1].key = "b".to_owned();
        assert_eq!(judge(&ledger(), &moved).misplaced, [id(2)]);
    }
}
