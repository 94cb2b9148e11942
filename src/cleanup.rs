//! Removes rows that nobody needs any more, and nothing else.
//!
//! # What proves that a row is published
//!
//! The snapshot in a relay's checkpoint: *every row it sees is delivered or given up*. It is
//! what recovery starts from: a row that it does not see may still have to be read from the table, and
//! one that it sees is not read again, whatever happens to slot, relay or server. So a row
//! may go once the checkpoints of all relays see the transaction that wrote it
//! (`xid`). Where a relay is divided, all of its slices must.
//!
//! That is one condition on a row, for relays with a slot and for those that poll, also amid a
//! gap: there the snapshot is the one *before* the gap. It needs no waiting, and no position in the
//! WAL. Positions would mislead: a commit that waits for its synchronous standby lies before
//! positions that are confirmed and is in no snapshot yet, and an idle slot moves on while
//! its checkpoint does not. A fence is stored only after the publication was compared
//! once more (`relay/control.rs`), so none sees a row that a changed publication hid; cleanup
//! refuses all the same while a publication differs, as `postbox recover` has to come first.
//!
//! The price is that rows wait for a fence. A relay with a slot writes one each
//! `--heartbeat-interval` while there is traffic. The last rows before a pause mostly are covered by
//! the beat that follows them, but not always: a row that came out of the slot while its commit was
//! still waiting for a standby is not seen by that fence, and no other follows before
//! there is traffic again. Such rows, and those behind the last fence of a relay that was killed,
//! stay until then.
//!
//! # What is not removed
//!
//! - A row of an event that waits in `parked`, for its time, for another try or for a person
//!   (`scheduled`, `waiting`, `dead`), of whichever relay; nor one that is scheduled for later.
//! - A row younger than the retention by its `created_at`.
//! - Anything, while a relay has not been seen for longer than the retention: what
//!   it has not published would pile up without a word. It is named; whoever knows that it is gone for
//!   good [`forget`]s it. A relay that idles on its slot stores nothing: the slot says that it is there. On
//!   Postgres before 17 a slot does not say since when nobody reads it, so that one whose relay restarts
//!   after a long pause seems to be gone until it is back.
//!
//! Of the other tables: rows of `parked` that a person skipped go once no relay
//! reads them again (`is_settled`); those of `cancellation` once their event is neither in the outbox
//! nor parked; those of `idempotency` by age alone: **a key is free again after the retention**, so
//! that should be longer than writers try again, and than the longest schedule.
//!
//! # How it keeps out of the way
//!
//! By short transactions, each of which looks at a bounded number of rows, deletes those it
//! may, and takes no lock but those of the rows: a writer never waits for it. Whatever
//! it has to wait for itself, it gives up after a second. It pauses nine
//! times as long as it works. Each batch reads the proof anew, under a lock that set-up does not share: no relay
//! that is just being set up is overlooked.
//!
//! A partition goes as a whole, if all of its rows may (`partitions.rs`); rows of the default
//! one are deleted.
//!
//! Of the outbox it goes through `seq` from the low end and never comes back within a run, so
//! that rows it has deleted are passed over once. Old rows need not stand before young ones, as
//! applications may set `created_at`: where a batch holds none that may go, it looks at a hundred
//! places further on before it stops.

mod batch;
mod claims;
mod forget;
mod outbox;
mod pages;
mod proof;

use std::fmt;
use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;
use tokio_postgres::types::Type;

use crate::catalog;
use crate::contract::Contract;
use crate::database::{Database, sort};
use crate::error::{Error, ErrorKind, Result};
use crate::source::claim::ClaimSettings;

pub(crate) use batch::{BEGIN, PAUSE, is_refused};
pub(crate) use claims::{HAS as CLAIMS_HAS, RIGHTS as CLAIMS_RIGHTS};
pub use forget::forget;
pub(crate) use outbox::RIGHTS;

/// How many rows are looked at in a transaction, unless something else is said. A walsender decodes
/// what a transaction deletes in one go, and the events behind it wait meanwhile.
pub const BATCH: u32 = 500;

/// What is removed, and how.
#[derive(Debug, Clone)]
pub struct CleanupOptions {
    /// The retention: what is younger stays.
    pub older_than: Duration,
    /// How many rows of the outbox are looked at in a transaction.
    pub batch: u32,
    /// After how long a run ends, done or not.
    pub timeout: Duration,
    /// How long to wait for another cleanup, or for a set-up.
    pub patience: Duration,
    /// Of a table whose rows are claimed, after how long a claim that was not renewed is taken
    /// away. Not less than what those who claim go by.
    pub stale_after: Duration,
    /// Only count.
    pub dry_run: bool,
}

/// What a run has done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// In the order of the steps.
    pub lines: Vec<Line>,
    /// Whether its time was up before it was done.
    pub cut_short: bool,
    /// Whether it only counted.
    pub dry_run: bool,
    /// Old partitions that others had locks on all the time, which the next run may drop.
    pub busy: Vec<String>,
}

/// What was done to one table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The table, quoted for SQL.
    pub table: String,
    /// What was done to its rows.
    pub done: Done,
    /// To how many.
    pub rows: u64,
}

/// What was done to rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Done {
    /// They were deleted.
    Removed,
    /// They were dropped, with all of their rows.
    Dropped,
    /// They were claimed by somebody who is gone, and can be claimed again.
    Released,
}

impl Report {
    /// Fails if something was left to be done because it was in use.
    ///
    /// # Errors
    /// `Database`: old partitions are still there.
    pub fn check(&self) -> Result<()> {
        let Some(first) = self.busy.first() else {
            return Ok(());
        };
        let others = match self.busy.len() - 1 {
            0 => String::new(),
            others => format!(" and of {others} others"),
        };
        let message = format!(
            "drop partition {first}{others}: somebody holds a lock on it, or on the outbox, all the time: pg_locks says \
             who; run it again later"
        );
        Err(Error::new(ErrorKind::Database, message))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Line { table, done, rows } in &self.lines {
            let done = match (done, self.dry_run) {
                (Done::Removed, false) => "rows removed",
                (Done::Removed, true) => "rows to remove",
                (Done::Dropped, false) => "partitions dropped",
                (Done::Dropped, true) => "partitions to drop",
                (Done::Released, false) => "stale claims released",
                (Done::Released, true) => "stale claims to release",
            };
            writeln!(f, "{table}: {done}: {rows}")?;
        }
        if self.cut_short {
            writeln!(f, "not done: the time was up, the next run goes on")?;
        }
        Ok(())
    }
}

/// Is told of rows as they are removed: the table's name, and how many.
pub type Counter<'a> = &'a (dyn Fn(&str, u64) + Send + Sync);

/// Removes what is older than the retention and provably not needed, in a session of its own.
///
/// # Errors
/// `Slot`: nothing, or too little, is known of a relay. `Publication`: one was changed since its
/// relay was set up. `Database`: what is stored belongs to another cluster. `SlotInUse`: another
/// cleanup or a set-up is at work. `Rights`: the message has the grant. What was removed
/// before an error stays removed. Partitions that were in use are in the report: see [`Report::check`].
pub async fn cleanup(
    database: &Database,
    contract: &Contract,
    options: &CleanupOptions,
) -> Result<Report> {
    let session = open(database, "postbox cleanup").await?;
    run(&session.client, contract, options, &|_, _| {}).await
}

/// Opens a session for [`run`], which sets nothing in it.
pub(crate) async fn open(database: &Database, name: &str) -> Result<crate::database::Session> {
    let session = database.connect_pooled(name).await?;
    catalog::check_server(&session.client).await?;
    Ok(session)
}

/// The same in this session. Not cancel-safe: it may leave its transaction open.
pub(crate) async fn run(
    client: &Client,
    contract: &Contract,
    options: &CleanupOptions,
    counter: Counter<'_>,
) -> Result<Report> {
    contract.validate()?;
    let preset = contract.outbox.preset;
    if !preset.can_be_polled() {
        let message = format!(
            "--table-preset {} cannot be cleaned up: its rows do not say whether they are published; Debezium's own \
             advice is to delete a row in the transaction that inserts it",
            preset.name()
        );
        return Err(Error::new(ErrorKind::Settings, message));
    }
    let mut run = Run::begin(client, contract, options, counter).await?;
    if contract.outbox.is_ours() {
        check_schema(client, contract, RIGHTS).await?;
        outbox::clean(&mut run).await?;
        pages::clean(&mut run).await?;
    } else {
        let settings = ClaimSettings {
            table: contract.outbox.clone(),
            timeout: options.stale_after,
            attempts_max: contract.outbox.attempts_max,
        };
        claims::clean(&mut run, &settings).await?;
    }
    Ok(run.report)
}

/// A relay would say that its slot is not set up: here none is meant.
async fn check_schema(client: &Client, contract: &Contract, rights: &str) -> Result<()> {
    let found = catalog::find_schema_version(client, contract).await;
    let found = found.map_err(|error| batch::failed(&contract.table("outbox"), rights, error))?;
    let Some(version) = found else {
        let schema = &contract.schema;
        let message = format!(
            "schema \"{schema}\" has no outbox: name the schema that was set up with --schema, or run `postbox setup`"
        );
        return Err(Error::new(ErrorKind::Database, message));
    };
    catalog::check_version(contract, version)
}

/// One run.
struct Run<'a> {
    client: &'a Client,
    contract: &'a Contract,
    options: &'a CleanupOptions,
    counter: Counter<'a>,
    /// What was there before may go: microseconds since 1970, by the server's clock. It stays
    /// for the whole run, which would otherwise follow the writers without end.
    before: i64,
    deadline: Instant,
    report: Report,
}

impl<'a> Run<'a> {
    async fn begin(
        client: &'a Client,
        contract: &'a Contract,
        options: &'a CleanupOptions,
        counter: Counter<'a>,
    ) -> Result<Self> {
        let sql = "SELECT (extract(epoch FROM now()) * 1000000)::bigint - $1";
        let age = i64::try_from(options.older_than.as_micros()).unwrap_or(i64::MAX / 2);
        let now = client.query_typed_one(sql, &[(&age, Type::INT8)]).await;
        let now = now.map_err(|error| sort("read the server's clock", error))?;
        Ok(Self {
            client,
            contract,
            options,
            counter,
            before: now.get(0),
            deadline: Instant::now() + options.timeout,
            report: Report {
                dry_run: options.dry_run,
                ..Report::default()
            },
        })
    }

    /// Whether there is time for another batch. If not, that is reported.
    fn has_time(&mut self) -> bool {
        let has_time = Instant::now() < self.deadline;
        self.report.cut_short |= !has_time;
        has_time
    }

    /// Adds rows of a table, whose name metrics have as it is here.
    fn count(&mut self, table: &str, quoted: &str, done: Done, rows: u64) {
        if rows > 0 && done != Done::Released && !self.options.dry_run {
            (self.counter)(table, rows);
        }
        let lines = &mut self.report.lines;
        let line = lines
            .iter_mut()
            .find(|line| line.table == quoted && line.done == done);
        match line {
            Some(line) => line.rows += rows,
            None => lines.push(Line {
                table: quoted.to_owned(),
                done,
                rows,
            }),
        }
    }

    /// The time before which rows may go, in SQL.
    fn cutoff(&self) -> String {
        format!(
            "(timestamptz 'epoch' + {} * interval '1 microsecond')",
            self.before
        )
    }
}
