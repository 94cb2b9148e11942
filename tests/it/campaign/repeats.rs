//! What was repeated in a run, and how much might have been.
//!
//! With a slot, one relay is at work at a time, and each start repeats what its position is
//! behind: so each start has a bound of its own. With a table, several are, and others
//! repeat, now or seconds later, what one of them has left when it broke off: so what is
//! counted is what each break leaves, and what was repeated up to any moment is held
//! against all breaks up to then. Before the first, nothing may be.

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

use postbox::oracle::Seen;
use postbox::timestamp::Timestamp;

use super::mode::Mode;
use super::schedule::Schedule;
use crate::support::{LATE, STATUS_INTERVAL, STORE_INTERVAL};

/// Some time, up to the next of these, in which records were repeated.
#[derive(Debug)]
pub(super) struct Stretch {
    pub(super) cause: Cause,
    pub(super) repeated: usize,
    /// How many records may have been.
    pub(super) bound: usize,
    /// Of a break: when it was known, and why it was one.
    pub(super) why: Option<String>,
}

impl fmt::Display for Stretch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (cause, repeated, bound) = (self.cause, self.repeated, self.bound);
        write!(f, "{cause:?}: {repeated} repeated, of {bound}")?;
        match &self.why {
            Some(why) => write!(f, "; {why}"),
            None => Ok(()),
        }
    }
}

/// What it begins with, and goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cause {
    /// With a slot, the first start, or one after orderly ends only: nothing is left to
    /// repeat, even if the server has crashed. With a table, the beginning.
    Clean,
    /// With a slot, a start from its position, which the server remembers. It may repeat what
    /// was in flight, the transaction that was being read, and what was delivered
    /// since the last status message. With a table, a break.
    Relay,
    /// A start from the checkpoint's position, after a crash of the server, which is up to
    /// a second older.
    Postgres,
    /// A start from the checkpoint's snapshot: all since a fence, as many rows as the recovery
    /// has counted; or from a copy of the rows that are not marked.
    Slot,
}

/// How the process of a relay has ended.
#[derive(Debug, Clone, Copy)]
pub(super) enum End {
    Killed,
    /// By its exit code, in time for the next to start after it.
    Told(i32),
    /// The next may have started while it was still at work.
    ToldLate(i32),
}

/// What has happened that may have records repeated. Times are in milliseconds since 1970.
#[derive(Debug, Default)]
pub(super) struct History {
    /// With a slot: when relays began to stream.
    starts: Vec<Start>,
    /// What took its position away, and when.
    losses: Vec<(i64, Cause)>,
    /// When recoveries ended, and how many rows they left to be sent.
    recoveries: Vec<(i64, usize)>,
    /// With a table.
    breaks: Vec<Break>,
    /// When Postgres could not be told what is delivered: from, and to.
    silences: Vec<(i64, i64)>,
}

/// A relay began to stream.
#[derive(Debug, Clone, Copy)]
struct Start {
    at: i64,
    /// Whether it had to read first, from the table, what a slot had lost.
    has_gap: bool,
    /// When the relay said, by its exit code, that all it had ever sent was confirmed.
    ended_well_at: Option<i64>,
}

/// A relay at work was killed, or frozen for long, or lost a connection.
#[derive(Debug)]
struct Break {
    /// When others may have begun to repeat what it left.
    from: i64,
    /// When it was known.
    at: i64,
    /// The relay's own words, if it had any.
    why: String,
}

/// How long an attempt may take leave after it broke, until it says so.
const LEAVE_MAX: Duration = Duration::from_secs(5);

/// A relay that was frozen for less still has its lease: two seconds, but for what a timer
/// is late.
const SLEEP_MAX: Duration = Duration::from_millis(1_500);

impl History {
    pub(super) fn server_crashed(&mut self) {
        self.losses.push((now(), Cause::Postgres));
    }

    pub(super) fn slot_dropped(&mut self) {
        self.losses.push((now(), Cause::Slot));
    }

    /// `postbox recover` has said this.
    pub(super) fn recovered(&mut self, report: &str) {
        self.recoveries.push((now(), rows_missed(report)));
    }

    /// A relay was woken or killed that was frozen since then.
    pub(super) fn slept(&mut self, since: i64) {
        if now() - since > millis(SLEEP_MAX) {
            self.broke(since, since, "frozen");
        }
    }

    /// Postgres can be told, or cannot, from now on.
    pub(super) fn postgres_hears(&mut self, hears: bool) {
        let is_silent = matches!(self.silences.last(), Some((_, i64::MAX)));
        match (hears, self.silences.last_mut()) {
            (true, Some((_, to))) if is_silent => *to = now(),
            (false, _) if !is_silent => self.silences.push((now(), i64::MAX)),
            _ => {}
        }
    }

    /// A relay with this log has ended.
    pub(super) fn ended(&mut self, mode: Mode, log: &str, end: End) {
        if mode.has_slot() {
            let ended_well_at = matches!(end, End::Told(0)).then(now);
            self.starts.extend(starts(mode, log, ended_well_at));
            return;
        }
        let mut is_at_work = false;
        for line in log.lines() {
            let has_ended = line.contains(" trying again in ") || line.contains(" standing by: ");
            if line.contains(mode.at_work()) {
                is_at_work = true;
            } else if has_ended && std::mem::take(&mut is_at_work) {
                self.broke_before(time(line), line);
            }
        }
        match end {
            End::Killed if is_at_work => {
                let at = now();
                self.broke(at, at, "killed");
            }
            End::Told(code) | End::ToldLate(code) if code != 0 => {
                self.broke_before(now(), "not drained");
            }
            _ => {}
        }
    }

    fn broke_before(&mut self, at: i64, why: &str) {
        self.broke(at - millis(LEAVE_MAX), at, why);
    }

    fn broke(&mut self, from: i64, at: i64, why: &str) {
        let why = why.to_owned();
        self.breaks.push(Break { from, at, why });
    }

    pub(super) fn stretches(mut self, schedule: &Schedule, records: &[Seen]) -> Vec<Stretch> {
        let records = Records::new(records);
        self.starts.sort_unstable_by_key(|start| start.at);
        self.breaks.sort_unstable_by_key(|broke| broke.from);
        match schedule.mode.has_slot() {
            true => self.since_starts(schedule, &records),
            false => self.since_breaks(schedule, &records),
        }
    }

    /// What was repeated after each start, and how much might have been.
    fn since_starts(&self, schedule: &Schedule, records: &Records<'_>) -> Vec<Stretch> {
        let transaction = schedule.transaction_max();
        let mut stretches: Vec<Stretch> = Vec::with_capacity(self.starts.len());
        for (index, start) in self.starts.iter().enumerate() {
            let earlier = &self.starts[..index];
            let end = self.starts.get(index + 1).map_or(i64::MAX, |next| next.at);
            let first = records.before(start.at);
            let newest = first.checked_sub(1);
            let newest = newest.map_or(0, |at| records.in_order[at].timestamp_millis);
            let cause = self.cause(earlier, start.at);
            let marked = match earlier.last() {
                Some(previous) if previous.has_gap => schedule.mode.mark_rows(),
                _ => 0,
            };
            let since = |time: Duration| {
                let delivered = first - records.before(newest - millis(time));
                delivered + schedule.in_flight_max + transaction + marked
            };
            let bound = match cause {
                Cause::Clean => 0,
                Cause::Relay => since(STATUS_INTERVAL + LATE),
                Cause::Postgres => since(STORE_INTERVAL + 2 * LATE),
                Cause::Slot => self.resent_max(schedule, start.at),
            };
            // A gap that an earlier start has not read to its end.
            let rest = match (start.has_gap, cause, stretches.last()) {
                (false, ..) | (_, Cause::Slot, _) | (.., None) => 0,
                (.., Some(earlier)) => earlier.bound.saturating_sub(earlier.repeated),
            };
            stretches.push(Stretch {
                cause,
                repeated: records.repeated(start.at, end),
                bound: bound + rest,
                why: None,
            });
        }
        stretches
    }

    /// How many rows the last recovery before this time may have left to be sent again.
    ///
    /// Where rows are marked, those that are delivered and not marked. Relays mark in the order
    /// in which they send, and what one has sent and not marked is as much as may be in flight:
    /// relays that send in the same order leave no more than that together. A recovery begins
    /// another order, by time, in which what is left may lie anywhere.
    fn resent_max(&self, schedule: &Schedule, at: i64) -> usize {
        let mut recoveries = self.recoveries.iter().filter(|(ended, _)| *ended <= at);
        let orders = recoveries.clone().count();
        let (_, rows) = *recoveries.next_back().expect("a recovery");
        match schedule.mode {
            Mode::Marks => rows.min(orders * schedule.in_flight_max),
            _ => rows,
        }
    }

    /// What a start at this time goes on from, after these.
    fn cause(&self, earlier: &[Start], at: i64) -> Cause {
        let lost_since = |since: i64| {
            let losses = self.losses.iter();
            let between = losses.filter(move |(lost_at, _)| (since..at).contains(lost_at));
            between.map(|(_, cause)| *cause).max()
        };
        let previous = earlier.last().map_or(0, |start| start.at);
        let lost = lost_since(previous);
        let mut ends = earlier.iter().map(|start| start.ended_well_at);
        if ends.all(|end| end.is_some_and(|end| end <= at)) && lost != Some(Cause::Slot) {
            return Cause::Clean;
        }
        lost.unwrap_or(Cause::Relay)
    }

    /// What was repeated after each break, and how much might have been, with what those
    /// before it have left.
    fn since_breaks(&self, schedule: &Schedule, records: &Records<'_>) -> Vec<Stretch> {
        let window = schedule.in_flight_max + schedule.mode.mark_rows();
        let mut stretches = Vec::with_capacity(self.breaks.len() + 1);
        let mut since = i64::MIN;
        let mut broke: Option<&Break> = None;
        let mut bound = 0;
        for next in self.breaks.iter().map(Some).chain([None]) {
            let to = next.map_or(i64::MAX, |next| next.from);
            let repeated = records.repeated(since, to);
            stretches.push(Stretch {
                cause: broke.map_or(Cause::Clean, |_| Cause::Relay),
                repeated,
                bound,
                why: broke.map(|broke| format!("{}: {}", broke.at, broke.why)),
            });
            let unsaid = next.map_or(0, |next| self.delivered_unsaid(next, records));
            bound = bound.saturating_sub(repeated) + window + unsaid;
            (since, broke) = (to, next);
        }
        stretches
    }

    /// How many records were delivered, by anyone, since a relay that broke could last store
    /// what it had delivered, at most.
    fn delivered_unsaid(&self, broke: &Break, records: &Records<'_>) -> usize {
        let silences = self.silences.iter();
        let silent = silences.filter(|(from, to)| *from <= broke.at && *to >= broke.from);
        let since = silent.map(|(from, _)| *from).fold(broke.from, i64::min);
        let silent = match since < broke.from {
            true => broke.at - since,
            false => 0,
        };
        let time = millis(STATUS_INTERVAL + LATE) + silent;
        records.busiest(since - time, broke.at, time)
    }
}

/// All records, in the order in which the brokers took them.
struct Records<'r> {
    in_order: Vec<&'r Seen>,
    is_repeated: Vec<bool>,
}

impl<'r> Records<'r> {
    fn new(records: &'r [Seen]) -> Self {
        let mut in_order: Vec<&Seen> = records.iter().collect();
        in_order.sort_by_key(|record| record.timestamp_millis);
        let mut seen = HashSet::new();
        let is_repeated = in_order.iter().map(|record| !seen.insert(record.id));
        Self {
            is_repeated: is_repeated.collect(),
            in_order,
        }
    }

    /// How many there were before this time.
    fn before(&self, millis: i64) -> usize {
        let is_before = |seen: &&Seen| seen.timestamp_millis < millis;
        self.in_order.partition_point(is_before)
    }

    /// How many were repeated from one time on and before another.
    fn repeated(&self, from: i64, to: i64) -> usize {
        let between = &self.is_repeated[self.before(from)..self.before(to)];
        between.iter().filter(|is| **is).count()
    }

    /// The most that there were within so many milliseconds, between these times.
    fn busiest(&self, from: i64, to: i64, millis: i64) -> usize {
        let between = &self.in_order[self.before(from)..self.before(to)];
        let ends = between.iter().enumerate().map(|(number, last)| {
            let first = last.timestamp_millis - millis;
            number + 1 - between.partition_point(|seen| seen.timestamp_millis < first)
        });
        ends.max().unwrap_or(0)
    }
}

/// How many rows a recovery has found that were committed since the last fence, or are not
/// marked.
fn rows_missed(report: &str) -> usize {
    let found = [
        "rows committed since the last checkpoint: ",
        "rows that are not marked published: ",
    ];
    let (_, rows) = found
        .iter()
        .find_map(|found| report.split_once(found))
        .unwrap_or_else(|| panic!("{report}"));
    let end = rows.find(|c: char| !c.is_ascii_digit());
    rows[..end.unwrap_or(rows.len())].parse().unwrap()
}

/// When the relay of this log began to stream.
fn starts(mode: Mode, log: &str, ended_well_at: Option<i64>) -> Vec<Start> {
    let mut has_gap = false;
    let mut starts = Vec::new();
    for line in log.lines() {
        has_gap |= line.contains(" what the slot does not give is sent first");
        if line.contains(mode.at_work()) {
            starts.push(Start {
                at: time(line),
                has_gap: std::mem::take(&mut has_gap),
                ended_well_at,
            });
        }
    }
    starts
}

/// Of a line of a log.
fn time(line: &str) -> i64 {
    let time = line.split_whitespace().next().unwrap_or_default();
    let time = time.replace('T', " ").replace('Z', "+00");
    Timestamp::parse(&time).unwrap().unix_millis()
}

fn millis(duration: Duration) -> i64 {
    duration.as_millis() as i64
}

pub(super) fn now() -> i64 {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    millis(since_epoch.unwrap())
}
