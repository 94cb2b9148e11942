//! Rows of the table that one snapshot sees and an earlier one does not, in pages.
//!
//! The column `xid` says which transaction wrote a row. A `pg_snapshot` S1 does not see
//! those that had not begun, `xid >= xmax(S1)`, and those that were running,
//! `xid = ANY (xip(S1))`, and sees all others that were committed: so this is what a
//! later snapshot S2 has more, exactly; but for a row that was copied from another cluster,
//! whose number is still to come here: until then S2 does not see it either. Neither an order of ids nor of transactions
//! comes into it, so a transaction that takes long holds up nobody, and is not missed
//! when it ends.
//!
//! Within that set the order is that of `seq`: for writers that wait for each other, as
//! those of one key do, the order of their commits. The two snapshots fix the set, so
//! each page is a short transaction of its own, and none is open while rows are sent.
//!
//! # Two ways to a page
//!
//! Which rows belong to the set only an index on `xid` finds without looking at all
//! others; in the order of `seq` only the primary key gives them. So the first page is
//! read by `xid` and sorted: mostly it is all there is. What is behind a full page is
//! read by `seq`, from the last row on: it mostly is of the set. The planner cannot know
//! either, with statistics that are older than the rows, so it is told.
//!
//! # What is committed and not yet on disk
//!
//! A transaction whose session has set `synchronous_commit = off` is seen before it is on
//! the server's disk, and a crash takes it back: its event must not be out by then. A slot
//! gives only what is flushed; so what a snapshot sees is flushed before a row of it is
//! given, or the snapshot is what a later one is compared with: the server that comes up
//! again gives the same numbers to other transactions. Where nobody else writes, it is
//! flushed already.
//!
//! A page has no settings that outlive it and no prepared statement: the server session
//! may be one that a pooler lends to others in between.

use std::sync::{Arc, LazyLock};

use postgres_protocol::escape::escape_identifier;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{PgLsn, ToSql, Type};

use super::catch_up::UNREAD;
use super::messages::Outbox;
use super::{BACKFILL_SEQ, FORMATS, Place, Row};
use crate::catalog::{self, KEY_COLUMNS, Slices, System, TIMELINE};
use crate::database::{Session, query_after, sort};
use crate::error::{Error, ErrorKind, Result};
use crate::pgoutput::{Column, Relation, Value, encode_insert};
use crate::timestamp::Timestamp;

/// The most rows in a page: enough that a round trip is paid for by many.
const PAGE_ROWS: i64 = 512;

/// After as many bytes, as they are stored, no row is added to a page. pglz compresses to
/// a ninetieth at best, so that a page of such rows takes 46 MB at most.
const PAGE_BYTES: i64 = 512 * 1024;

/// The oid of the table in its messages. No table has it.
const RELATION: u32 = 0;

/// Reads pages in a session.
#[derive(Clone)]
pub(super) struct Pages {
    session: Arc<Session>,
    statements: Arc<Statements>,
    /// What the statements are made of.
    table: Arc<(Outbox, Vec<SourceColumn>)>,
    timeline: i32,
    doing: &'static str,
}

struct Statements {
    by_xid: String,
    /// The same, of what an earlier snapshot than that of now sees.
    by_xid_until: String,
    by_seq: String,
}

/// What is new.
pub(super) struct Answer {
    /// The `pg_snapshot` of now.
    pub(super) now: String,
    /// Whether all that it sees is on the server's disk.
    pub(super) is_flushed: bool,
    pub(super) page: Page,
}

/// Rows in the order of `seq`.
pub(super) struct Page {
    pub(super) rows: Vec<Row>,
    /// Whether there are more behind them.
    pub(super) more: bool,
}

impl Pages {
    /// Reads this table for `doing`, on the server that was checked, and says what its
    /// rows are made of.
    pub(super) async fn open(
        session: Session,
        system: &System,
        outbox: &Outbox,
        doing: &'static str,
    ) -> Result<(Self, Relation)> {
        let table = outbox.table.quoted();
        let statements = |columns: &[SourceColumn]| Statements::new(outbox, columns, Slices::ALL);
        Self::open_with(session, system, outbox, &table, statements, doing).await
    }

    /// The same, of a copy of rows of another library's table, by their numbers: all of them
    /// lie between any two snapshots. See `setup/backfill.rs`.
    pub(super) async fn open_copy(
        session: Session,
        system: &System,
        outbox: &Outbox,
        copy: &str,
        doing: &'static str,
    ) -> Result<(Self, Relation)> {
        let statements = |columns: &[SourceColumn]| Statements::of_copy(outbox, copy, columns);
        Self::open_with(session, system, outbox, copy, statements, doing).await
    }

    async fn open_with(
        session: Session,
        system: &System,
        outbox: &Outbox,
        table: &str,
        statements: impl FnOnce(&[SourceColumn]) -> Statements,
        doing: &'static str,
    ) -> Result<(Self, Relation)> {
        let found = catalog::system(&session.client).await?;
        system.check_same(&found, doing)?;
        let columns = columns(&session.client, table).await;
        let columns = columns.map_err(|error| sort(doing, error))?;
        let described = columns.iter().map(|column| column.described.clone());
        let relation = Relation {
            id: RELATION,
            schema: outbox.table.schema.clone(),
            name: outbox.table.name.clone(),
            columns: described.collect(),
        };
        let pages = Self {
            statements: Arc::new(statements(&columns)),
            table: Arc::new((outbox.clone(), columns)),
            session: Arc::new(session),
            timeline: system.timeline,
            doing,
        };
        Ok((pages, relation))
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// The same, of these slices alone.
    pub(super) fn of(&self, slices: Slices) -> Self {
        let (outbox, columns) = &*self.table;
        Self {
            statements: Arc::new(Statements::new(outbox, columns, slices)),
            ..self.clone()
        }
    }

    /// The snapshot of now. All that it sees is on the server's disk.
    pub(super) async fn now(&self) -> Result<String> {
        let now = self.session.client.query_typed(&NOW, &[]).await;
        let now = now.map_err(|error| self.failed(error))?;
        self.check_timeline(&now, 2)?;
        let now = now.first().map(|row| (row.get(0), row.get(1)));
        let (now, is_flushed): (String, bool) = now.unwrap_or_default();
        if !is_flushed {
            self.flush().await?;
        }
        Ok(now)
    }

    /// The first page of what is committed by now and `since` does not see. It is on the
    /// server's disk then; and so, if `flush`, is what the snapshot sees besides.
    pub(super) async fn first(&self, since: &str, flush: bool) -> Result<Answer> {
        let client = &self.session.client;
        let set = Unseen::by(since)?;
        let parameters = set.parameters(&i64::MIN, &PAGE_ROWS, &PAGE_BYTES);
        let (begun, now, rows, ended) = tokio::join!(
            client.batch_execute(&BEGIN_BY_XID),
            client.query_typed(&NOW, &[]),
            client.query_typed(&self.statements.by_xid, &parameters),
            client.batch_execute("COMMIT"),
        );
        let read = begun.and_then(|()| {
            ended?;
            Ok((now?, rows?))
        });
        let (now, rows) = read.map_err(|error| self.failed(error))?;
        self.check_timeline(&now, 2)?;
        let now = now.first().map(|row| (row.get(0), row.get(1)));
        let (now, mut is_flushed): (String, bool) = now.unwrap_or_default();
        if !is_flushed && (flush || !rows.is_empty()) {
            self.flush().await?;
            is_flushed = true;
        }
        Ok(Answer {
            now,
            is_flushed,
            page: page(&rows),
        })
    }

    /// Refuses an answer of another server than was checked: a pooler goes on with the one
    /// that took over, whose transactions have other numbers.
    fn check_timeline(&self, rows: &[tokio_postgres::Row], column: usize) -> Result<()> {
        let timeline = rows.first().map(|row| row.get::<_, i32>(column));
        if timeline == Some(self.timeline) {
            return Ok(());
        }
        let message = format!("{}: the server is on another timeline by now", self.doing);
        Err(Error::new(ErrorKind::DatabaseAway, message))
    }

    fn failed(&self, error: tokio_postgres::Error) -> Error {
        if error.code() == Some(&SqlState::UNDEFINED_COLUMN) {
            // One was dropped or renamed; the next attempt knows those that there are.
            return Error::new(ErrorKind::DatabaseAway, self.doing).caused_by(error);
        }
        sort(self.doing, error)
    }

    /// Has the server write to its disk what was committed by now.
    async fn flush(&self) -> Result<()> {
        let flushed = self.session.client.batch_execute(FLUSH).await;
        flushed.map_err(|error| self.failed(error))
    }

    /// The page behind this `seq`, of what `until` sees and `since` does not.
    pub(super) async fn after(&self, since: &str, until: &str, seq: i64) -> Result<Page> {
        let client = &self.session.client;
        let set = Unseen::by(since)?;
        let mut parameters = set.parameters(&seq, &PAGE_ROWS, &PAGE_BYTES).to_vec();
        parameters.push((&until, Type::TEXT));
        let (begin, sql) = match seq {
            UNREAD => (&BEGIN_BY_XID, &self.statements.by_xid_until),
            _ => (&BEGIN_BY_SEQ, &self.statements.by_seq),
        };
        let (rows, timeline) = tokio::join!(
            query_after(begin, client, sql, &parameters),
            client.query_typed(&TIMELINE_NOW, &[]),
        );
        let rows = rows.map_err(|error| self.failed(error))?;
        let timeline = timeline.map_err(|error| self.failed(error))?;
        self.check_timeline(&timeline, 0)?;
        Ok(page(&rows))
    }
}

/// The snapshot of now, whether all is flushed that was committed by then, and the timeline.
static NOW: LazyLock<String> = LazyLock::new(|| {
    format!(
        "SELECT pg_current_snapshot()::text, \
                pg_current_wal_flush_lsn() >= pg_current_wal_insert_lsn(), {TIMELINE}"
    )
});

static TIMELINE_NOW: LazyLock<String> = LazyLock::new(|| format!("SELECT {TIMELINE}"));

/// A commit, of something in the WAL, waits until all before it is flushed. For a standby
/// that is synchronous it need not wait.
const FLUSH: &str = "BEGIN; SET LOCAL synchronous_commit = local; \
                     SELECT pg_logical_emit_message(true, 'postbox flush', ''); COMMIT";

/// What a snapshot does not see, in the terms of an index.
#[derive(Debug, PartialEq, Eq)]
struct Unseen<'s> {
    /// Transactions from this one on.
    xmax: &'s str,
    /// And these, as an array.
    running: String,
}

impl<'s> Unseen<'s> {
    fn by(snapshot: &'s str) -> Result<Self> {
        let mut parts = snapshot.split(':');
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(_), Some(xmax), Some(running), None) => Ok(Self {
                xmax,
                running: format!("{{{running}}}"),
            }),
            _ => {
                let message = format!("\"{snapshot}\" is not a snapshot");
                Err(Error::new(ErrorKind::Unexpected, message))
            }
        }
    }

    fn parameters<'p>(
        &'p self,
        seq: &'p i64,
        rows: &'p i64,
        bytes: &'p i64,
    ) -> [(&'p (dyn ToSql + Sync), Type); 5] {
        [
            (&self.xmax, Type::TEXT),
            (&self.running, Type::TEXT),
            (seq, Type::INT8),
            (rows, Type::INT8),
            (bytes, Type::INT8),
        ]
    }
}

struct SourceColumn {
    described: Column,
    /// Whether its values have no fixed length.
    varies: bool,
}

async fn columns(client: &Client, table: &str) -> Result<Vec<SourceColumn>, tokio_postgres::Error> {
    let sql = "SELECT attname::text, atttypid, attlen < 0 FROM pg_attribute \
               WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum";
    let rows = client.query_typed(sql, &[(&table, Type::TEXT)]).await?;
    let columns = rows.iter().map(|row| SourceColumn {
        described: Column {
            name: row.get(0),
            type_oid: row.get(1),
        },
        varies: row.get(2),
    });
    Ok(columns.collect())
}

impl Statements {
    fn new(outbox: &Outbox, columns: &[SourceColumn], slices: Slices) -> Self {
        let table = outbox.table.quoted();
        // Where rows are counted: a page is as many of these slices.
        let of_slices = slices
            .condition(&key_columns(columns))
            .map_or(String::new(), |condition| format!(" AND {condition}"));
        // OFFSET 0 keeps the planner from mixing the two levels. A transaction that still
        // runs may have many rows, of which none is seen.
        let by_xid = |until: &str| {
            format!(
                "SELECT r.* FROM (SELECT * FROM {table} \
                                  WHERE (xid >= $1::text::xid8 AND xid < pg_snapshot_xmax(pg_current_snapshot())) \
                                     OR xid = ANY (ARRAY( \
                                         SELECT x FROM unnest($2::text::xid8[]) AS x \
                                         WHERE pg_visible_in_snapshot(x, pg_current_snapshot()))) OFFSET 0) AS r \
                 WHERE r.seq > $3{until}{of_slices} ORDER BY r.seq"
            )
        };
        let by_seq = format!(
            "SELECT r.* FROM (SELECT * FROM {table} WHERE seq > $3 ORDER BY seq OFFSET 0) AS r \
             WHERE (r.xid >= $1::text::xid8 OR r.xid = ANY ((SELECT $2::text::xid8[])::xid8[])) \
               AND pg_visible_in_snapshot(r.xid, $6::text::pg_snapshot){of_slices} ORDER BY r.seq"
        );
        let until = " AND pg_visible_in_snapshot(r.xid, $6::text::pg_snapshot)";
        Self {
            by_xid: page_of(&by_xid(""), "seq", CREATED_AT, columns),
            by_xid_until: page_of(&by_xid(until), "seq", CREATED_AT, columns),
            by_seq: page_of(&by_seq, "seq", CREATED_AT, columns),
        }
    }

    fn of_copy(outbox: &Outbox, copy: &str, columns: &[SourceColumn]) -> Self {
        let created_at = outbox.table.quoted_column("created_at");
        // When a row was committed of a table without a time nobody knows.
        let created_at = created_at.map_or("now()".to_owned(), |name| format!("r.{name}"));
        let rows = format!(
            "SELECT r.* FROM {copy} AS r WHERE r.{BACKFILL_SEQ} > $3 ORDER BY r.{BACKFILL_SEQ}"
        );
        let page = page_of(&rows, BACKFILL_SEQ, &created_at, columns);
        Self {
            by_xid: page.clone(),
            by_xid_until: page.clone(),
            by_seq: page,
        }
    }
}

/// Those columns that a record's key is made of, of the row `r`.
fn key_columns(columns: &[SourceColumn]) -> Vec<String> {
    let is_there = |name: &&str| columns.iter().any(|column| column.described.name == **name);
    let names = KEY_COLUMNS.into_iter().filter(is_there);
    names.map(|name| format!("r.{name}")).collect()
}

/// The time of a row of ours.
const CREATED_AT: &str = "r.created_at";

/// As many of the rows as make a page, as text, each with how many there were.
fn page_of(rows: &str, seq: &str, created_at: &str, columns: &[SourceColumn]) -> String {
    let quoted = |column: &SourceColumn| escape_identifier(&column.described.name);
    let sizes: Vec<String> = columns
        .iter()
        .filter(|column| column.varies)
        .map(|column| format!("coalesce(pg_column_size(r.{}), 0)", quoted(column)))
        .collect();
    let texts: Vec<String> = columns
        .iter()
        .map(|column| format!("r.{}::text", quoted(column)))
        .collect();
    // The names in quotes are not those of anybody's columns.
    format!(
        "SELECT r.{seq}, CASE WHEN {created_at} < '10000-01-01Z' AND isfinite({created_at}) \
                       THEN (extract(epoch FROM {created_at}) * 1000000)::bigint ELSE 0 END, r.\"rows of page\", {texts} \
         FROM (SELECT r.*, count(*) OVER () AS \"rows of page\", sum({sizes}) OVER (ORDER BY r.{seq} ROWS UNBOUNDED PRECEDING) - ({sizes}) AS \"bytes before\" \
               FROM ({rows} LIMIT $4) AS r) AS r \
         WHERE r.\"bytes before\" < $5 ORDER BY r.{seq}",
        texts = texts.join(", "),
        sizes = match sizes.is_empty() {
            true => "0".to_owned(),
            false => sizes.join(" + "),
        },
    )
}

fn page(rows: &[tokio_postgres::Row]) -> Page {
    let found: i64 = rows.first().map_or(0, |row| row.get(2));
    Page {
        more: found >= PAGE_ROWS || found > rows.len() as i64,
        rows: rows.iter().map(row).collect(),
    }
}

fn row(row: &tokio_postgres::Row) -> Row {
    let seq: i64 = row.get(0);
    let text = |column| row.get::<_, Option<&str>>(column).map(str::as_bytes);
    let values = (3..row.len()).map(|column| text(column).map_or(Value::Null, Value::Text));
    Row {
        bytes: encode_insert(RELATION, values).into(),
        place: Place {
            commit_lsn: PgLsn::from(0),
            ordinal: seq.cast_unsigned(),
        },
        // When it was committed the table does not say.
        committed_at: Timestamp::from_unix_micros(row.get(1)),
        xid: 0,
    }
}

/// Begins the transaction of a first page.
static BEGIN_BY_XID: LazyLock<String> = LazyLock::new(|| begin(&["enable_seqscan"]));

/// Begins the transaction of a page behind another.
static BEGIN_BY_SEQ: LazyLock<String> =
    LazyLock::new(|| begin(&["enable_seqscan", "enable_bitmapscan", "enable_sort"]));

/// Begins a transaction in which these settings of the planner are off. Statements of one
/// see the same.
fn begin(without: &[&str]) -> String {
    // Formats as a stream's session has them. A policy that hides rows must be an
    // error, and a long page may be read; but a lock is not waited for, as nobody would
    // see it. A plan with what is off looks so dear that it would be compiled.
    let own = [
        ("row_security", "off"),
        ("statement_timeout", "0"),
        ("lock_timeout", "5000"),
        ("jit", "off"),
        ("max_parallel_workers_per_gather", "0"),
    ];
    let off = without.iter().map(|name| (*name, "off"));
    let settings = FORMATS.into_iter().chain(own).chain(off);
    let settings: String = settings
        .map(|(name, value)| format!("; SET LOCAL {name} = {value}"))
        .collect();
    format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY{settings}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_snapshot_does_not_see() {
        let unseen = |snapshot| Unseen::by(snapshot).map(|set| (set.xmax.to_owned(), set.running));
        let set = |xmax: &str, running: &str| (xmax.to_owned(), running.to_owned());
        assert_eq!(unseen("10:20:").unwrap(), set("20", "{}"));
        assert_eq!(unseen("10:20:10,14").unwrap(), set("20", "{10,14}"));
        for text in ["", "10", "10:20", "10:20::"] {
            assert!(unseen(text).is_err(), "{text}");
        }
    }
}
