//! Where events come from.
//!
//! A source says only two things: *a row*, or *a position that is safe once
//! everything before it is delivered*. What a position is made of, and how it is
//! told to Postgres, stays inside; the relay only brings it back.

mod catch_up;
pub mod claim;
mod columns;
mod gap;
mod messages;
mod pages;
mod pause;
pub mod poll;
pub mod wal;

pub use columns::Unreadable;
pub use messages::{HEARTBEAT_PREFIX, Messages, Outbox};

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio_postgres::types::PgLsn;

use crate::catalog::{Gap, Standing};
use crate::error::Result;
use crate::event::{Event, Outline};
use crate::pgoutput::Column;
use crate::timestamp::Timestamp;
use claim::Claimer;
use poll::Poller;
use wal::Stream;

/// Where rows come from.
pub enum Source {
    /// A replication slot.
    Wal(Box<Stream>),
    /// The table.
    Poll(Box<Poller>),
    /// A table of others, whose rows say whether they are published.
    Claim(Box<Claimer>),
}

/// What the copy of rows that lie before a slot has beside the columns of their table: their
/// number, from 1. Quoted for SQL; nobody's column has this name.
pub(crate) const BACKFILL_SEQ: &str = "\"postbox seq\"";

/// How values are written, whatever a role or a database has set: rows are read as
/// text.
const FORMATS: [(&str, &str); 5] = [
    ("datestyle", "ISO"),
    ("intervalstyle", "postgres"),
    ("timezone", "UTC"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
];

/// What a source says.
#[derive(Debug)]
pub enum Item {
    /// A row of the outbox, committed.
    Row(Row),
    /// A place in the WAL that may be confirmed once all before it is delivered.
    Position(Position),
}

/// A row as it came, with its place in the stream.
#[derive(Debug, Clone)]
pub struct Row {
    /// An Insert message of pgoutput.
    pub(crate) bytes: Bytes,
    /// Where it stands in the stream.
    pub place: Place,
    /// When its transaction was committed, by the server's clock.
    pub committed_at: Timestamp,
    /// Its transaction, without epoch; 0 where the row was read from a table.
    pub xid: u32,
}

/// A row's place in the stream, the same after every restart: WAL positions of
/// rows are not, as the rows of one COPY share theirs. A row that was read from
/// the table stands at LSN 0, and its ordinal is its `seq`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Where the transaction's commit begins.
    pub commit_lsn: PgLsn,
    /// Which row of its transaction, from zero.
    pub ordinal: u64,
}

/// A place that may be confirmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Position {
    /// The end of a commit, or of what the server has read while it was idle.
    pub lsn: PgLsn,
    /// What the checkpoint says once all before is delivered, beside the LSN.
    pub mark: Option<Mark>,
}

/// How far a source has come, other than by LSN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mark {
    /// The `pg_snapshot` of a heartbeat that ends here, or of the slot that begins
    /// here: everything visible in it lies before.
    Fence(String),
    /// Rows read from the table, up to the `seq` of this gap.
    Seq(Gap),
    /// The same, or a fence, of some slices each.
    Standings(Vec<Standing>),
    /// So many rows were claimed and given.
    Claims(u64),
}

impl Source {
    /// The next row or position. Cancel-safe, but for the reason why a stream
    /// ended, which may be lost.
    ///
    /// # Errors
    /// If the source ends or says what it should not.
    pub async fn next(&mut self) -> Result<Item> {
        match self {
            Self::Wal(stream) => stream.next().await,
            Self::Poll(poller) => poller.next().await,
            Self::Claim(claimer) => claimer.next().await,
        }
    }

    /// The next row or position if it has already arrived.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn try_next(&mut self) -> Result<Option<Item>> {
        match self {
            Self::Wal(stream) => stream.try_next(),
            Self::Poll(poller) => poller.try_next(),
            Self::Claim(claimer) => claimer.try_next(),
        }
    }

    /// The event of a row that this source gave.
    ///
    /// # Errors
    /// If the row is not an event.
    pub fn event<'a>(&self, row: &'a Row) -> Result<Event<'a>, Unreadable> {
        match self {
            Self::Wal(stream) => stream.event(row),
            Self::Poll(poller) => poller.event(row),
            Self::Claim(claimer) => claimer.event(row),
        }
    }

    /// What can be read of a row that may be no event, and its columns; nothing if not even
    /// those are known.
    pub(crate) fn outline(&self, row: &Row) -> Option<(Outline, Arc<[Column]>)> {
        match self {
            Self::Wal(stream) => stream.outline(row),
            Self::Poll(poller) => poller.outline(row),
            Self::Claim(_) => None,
        }
    }

    /// What a person needs to find the row: its id and number as far as they can
    /// be read, and its place.
    pub fn name_of(&self, row: &Row) -> String {
        match self {
            Self::Wal(stream) => stream.name_of(row),
            Self::Poll(poller) => poller.name_of(row),
            Self::Claim(claimer) => claimer.name_of(row),
        }
    }

    /// Whether the rows given so far end where it is not good to stop: within a
    /// transaction, or in the last page of a gap.
    pub fn is_amid(&self) -> bool {
        match self {
            Self::Wal(stream) => stream.in_transaction(),
            Self::Poll(poller) => poller.is_ending(),
            Self::Claim(_) => false,
        }
    }

    /// What may be stored once all rows that were given are delivered, where that is not
    /// the last position: between two snapshots.
    pub fn mark(&self) -> Option<Mark> {
        match self {
            Self::Wal(stream) => stream.mark(),
            Self::Poll(poller) => poller.mark(),
            Self::Claim(claimer) => claimer.mark(),
        }
    }

    /// The same, but for the last of these rows.
    pub fn mark_before_last(&self) -> Option<Mark> {
        match self {
            Self::Wal(stream) => stream.mark_before_last(),
            Self::Poll(poller) => poller.mark_before_last(),
            Self::Claim(claimer) => claimer.mark_before_last(),
        }
    }

    /// Whether the row at this place, which a source before this one gave, has been given
    /// again, or will not be. `last` is where the last row stood that was given.
    pub fn has_passed(&self, place: Place, last: Option<Place>) -> bool {
        match self {
            Self::Wal(stream) => last >= Some(place) || stream.received() > place.commit_lsn,
            // One gap may have a larger `seq` than the next.
            Self::Poll(poller) => poller.has_caught_up(),
            Self::Claim(claimer) => claimer.has_caught_up(),
        }
    }

    /// Everything before `lsn` is done with.
    pub fn confirm(&mut self, lsn: PgLsn) {
        match self {
            Self::Wal(stream) => stream.confirm(lsn),
            Self::Poll(_) | Self::Claim(_) => {}
        }
    }

    /// The newest position that was given; zero where there are none.
    pub fn received(&self) -> PgLsn {
        match self {
            Self::Wal(stream) => stream.received(),
            Self::Poll(_) | Self::Claim(_) => PgLsn::from(0),
        }
    }

    /// The newest position that was confirmed; zero where there are none.
    pub fn confirmed(&self) -> PgLsn {
        match self {
            Self::Wal(stream) => stream.confirmed(),
            Self::Poll(_) | Self::Claim(_) => PgLsn::from(0),
        }
    }

    /// What has come since this was last called, came now.
    pub fn look_at_clock(&mut self, now: Instant) {
        if let Self::Wal(stream) = self {
            stream.look_at_clock(now);
        }
    }

    /// Fails if the server has been silent for too long. `reading` says whether
    /// we have been listening.
    ///
    /// # Errors
    /// `DatabaseAway` if nothing came, not even a ping.
    pub fn check_alive(&mut self, reading: bool) -> Result<()> {
        match self {
            Self::Wal(stream) => stream.check_alive(reading),
            // Its session has the system's keepalives, and a second one is asked all the
            // time.
            Self::Poll(_) | Self::Claim(_) => Ok(()),
        }
    }

    /// How long nothing has come while we were listening.
    pub fn silence(&self) -> Duration {
        match self {
            Self::Wal(stream) => stream.silence(),
            Self::Poll(_) | Self::Claim(_) => Duration::ZERO,
        }
    }

    /// Whether an answer of the server has been outstanding for so long that it is worth
    /// telling.
    pub fn is_asking(&self) -> bool {
        match self {
            Self::Wal(_) => false,
            Self::Poll(poller) => poller.is_asking(),
            Self::Claim(claimer) => claimer.is_asking(),
        }
    }

    /// How many rows cannot be completed as somebody else has locked them.
    pub fn locked(&self) -> usize {
        match self {
            Self::Wal(_) | Self::Poll(_) => 0,
            Self::Claim(claimer) => claimer.claims().locked(),
        }
    }

    /// Waits until the last confirmation was written to the server, if that is
    /// still possible. Cancel-safe.
    pub async fn confirmation_sent(&self) {
        if let Self::Wal(stream) = self {
            stream.confirmation_sent().await;
        }
    }

    /// The row that was given last cannot go out: says whether the source sees to it, by
    /// putting it off. Else it is the relay's end.
    pub fn refuse_last(&mut self, why: impl FnOnce() -> String) -> bool {
        match self {
            Self::Wal(_) | Self::Poll(_) => false,
            Self::Claim(claimer) => {
                claimer.refuse_last(why());
                true
            }
        }
    }

    /// Takes no more rows that would have to be given back, and says whether it knows of all
    /// that it has taken.
    pub async fn stop(&mut self) -> bool {
        match self {
            Self::Wal(_) | Self::Poll(_) => true,
            Self::Claim(claimer) => claimer.stop().await,
        }
    }

    /// Ends the source.
    pub async fn close(self) {
        if let Self::Wal(stream) = self {
            stream.close().await;
        }
    }
}
