//! Where events come from.
//!
//! A source says only two things: *a row*, or *a position that is safe once
//! everything before it is delivered*. What a position is made of, and how it is
//! told to Postgres, stays inside; the relay only brings it back.

mod columns;
mod gap;
mod messages;
pub mod wal;

pub use columns::Unreadable;
pub use messages::{HEARTBEAT_PREFIX, Messages, Source};

use bytes::Bytes;
use tokio_postgres::types::PgLsn;

use crate::timestamp::Timestamp;

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
    bytes: Bytes,
    /// Where it stands in the stream.
    pub place: Place,
    /// When its transaction was committed, by the server's clock.
    pub committed_at: Timestamp,
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
    /// The last row read from the table, by its `seq`.
    Seq(i64),
}
