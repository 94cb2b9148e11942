//! Rows that no slot gives, read from the table.
//!
//! A slot that was lost is made anew, and what was committed in between is in
//! neither. It is in the outbox, whose column `xid` tells which transaction wrote
//! a row: the rows that the new slot's snapshot sees and the old checkpoint's
//! does not are exactly those that one slot has not surely given and the other
//! never will. They come in the order of `seq`, which is the order of commits for
//! writers that wait for each other, as the writers of one key do.
//!
//! The two snapshots fix the set, so no transaction stays open while rows are
//! sent, and each page is a statement of its own. A row becomes the message that
//! a slot would have sent, so that all that follows knows one kind of row.

use std::collections::VecDeque;
use std::sync::Arc;

use postgres_protocol::escape::escape_identifier;
use tokio::task::JoinSet;
use tokio_postgres::types::{PgLsn, Type};
use tokio_postgres::{Client, Statement};

use super::messages::Source;
use super::wal::WalSettings;
use super::{FORMATS, Item, Mark, Place, Position, Row};
use crate::catalog::{self, Gap};
use crate::database::{Database, Session, sort};
use crate::error::{Error, ErrorKind, Result};
use crate::pgoutput::{Column, Relation, Value, encode_insert};
use crate::timestamp::Timestamp;

/// Rows in one page: as many as a stream buffers, for the same reason.
const PAGE_ROWS: usize = 64;

/// Rows between two marks: what a kill repeats beside what is in flight.
const MARK_ROWS: usize = 1024;

/// The oid of the table in its messages. No table has it.
pub(super) const RELATION: u32 = 0;

/// Reads the rows of a gap.
pub(super) struct GapReader {
    pages: Pages,
    reading: JoinSet<Result<Vec<Row>>>,
    page: VecDeque<Row>,
    /// The last row that was given, and the one before it.
    seq: i64,
    before_last: i64,
    unmarked: usize,
    /// Where the new slot begins.
    end: PgLsn,
    done: bool,
}

#[derive(Clone)]
struct Pages {
    session: Arc<Session>,
    statement: Statement,
    since: String,
    until: String,
}

impl GapReader {
    /// The reader, and what its rows are made of.
    pub(super) async fn open(
        database: &Database,
        settings: &WalSettings,
        gap: Gap,
        end: PgLsn,
    ) -> Result<(Self, Relation)> {
        let session = database.connect("postbox gap").await?;
        let found = catalog::system(&session.client).await?;
        settings.system.check_same(&found, DOING)?;
        let prepared = async {
            let prepared = prepare(&session.client, &settings.source).await?;
            catalog::wait_until_seen(&session.client, &gap.until).await?;
            Ok(prepared)
        };
        let (statement, relation) = prepared.await.map_err(|error| sort(DOING, error))?;
        let reader = Self {
            pages: Pages {
                session: Arc::new(session),
                statement,
                since: gap.since,
                until: gap.until,
            },
            reading: JoinSet::new(),
            page: VecDeque::new(),
            seq: gap.seq,
            before_last: gap.seq,
            // The first row may be one at which relays end again and again: what is
            // behind it waits until it is delivered.
            unmarked: MARK_ROWS - 1,
            end,
            done: false,
        };
        Ok((reader, relation))
    }

    /// The next row, or a position: at last the fence that ends the gap. Then
    /// `None`. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Item>> {
        if self.unmarked >= MARK_ROWS {
            self.unmarked = 0;
            return Ok(Some(self.position(Mark::Seq(self.seq))));
        }
        if self.page.is_empty() && !self.done {
            self.read_page().await?;
            if self.page.is_empty() {
                self.done = true;
                return Ok(Some(self.position(Mark::Fence(self.pages.until.clone()))));
            }
        }
        Ok(self.page.pop_front().map(|row| {
            self.unmarked += 1;
            self.before_last = self.seq;
            self.seq = row.place.ordinal.cast_signed();
            Item::Row(row)
        }))
    }

    /// The last row that was given.
    pub(super) fn seq(&self) -> i64 {
        self.seq
    }

    /// The row before that one; what was delivered before, if there is none.
    pub(super) fn seq_before_last(&self) -> i64 {
        self.before_last
    }

    fn position(&self, mark: Mark) -> Item {
        Item::Position(Position {
            lsn: self.end,
            mark: Some(mark),
        })
    }

    async fn read_page(&mut self) -> Result<()> {
        if self.reading.is_empty() {
            let pages = self.pages.clone();
            let after = self.seq;
            self.reading.spawn(async move { pages.read(after).await });
        }
        if let Some(page) = self.reading.join_next().await {
            let ended = |error| Error::new(ErrorKind::Unexpected, "a task ended").caused_by(error);
            self.page = page.map_err(ended)??.into();
        }
        Ok(())
    }
}

impl Pages {
    async fn read(&self, after: i64) -> Result<Vec<Row>> {
        let limit = PAGE_ROWS as i64;
        let rows = self
            .session
            .client
            .query(&self.statement, &[&self.since, &self.until, &after, &limit])
            .await
            .map_err(|error| sort(DOING, error))?;
        Ok(rows.iter().map(row).collect())
    }
}

const DOING: &str = "read the outbox where the slot was lost";

/// The statement that reads a page, and the table it reads.
async fn prepare(
    client: &Client,
    source: &Source,
) -> Result<(Statement, Relation), tokio_postgres::Error> {
    // Formats as a stream's session has them. A policy that hides rows must be an
    // error, and the whole table may have to be looked through; but a lock is not
    // waited for, as nobody would see it.
    let own = [
        ("row_security", "off"),
        ("statement_timeout", "0"),
        ("lock_timeout", "5000"),
    ];
    let settings = FORMATS.into_iter().chain(own);
    let settings: Vec<String> = settings
        .map(|(name, value)| format!("SET {name} = {value}"))
        .collect();
    client.batch_execute(&settings.join("; ")).await?;
    let (schema, table) = (&source.schema, &source.table);
    let outbox = format!("{}.{}", escape_identifier(schema), escape_identifier(table));
    let sql = "SELECT attname::text, atttypid FROM pg_attribute \
               WHERE attrelid = $1::text::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum";
    let columns = client.query_typed(sql, &[(&outbox, Type::TEXT)]).await?;
    let columns: Vec<Column> = columns
        .iter()
        .map(|row| Column {
            name: row.get(0),
            type_oid: row.get(1),
        })
        .collect();
    let texts: Vec<String> = columns
        .iter()
        .map(|column| format!("o.{}::text", escape_identifier(&column.name)))
        .collect();
    let sql = format!(
        "SELECT o.seq, CASE WHEN created_at < '10000-01-01Z' AND isfinite(created_at) \
                       THEN (extract(epoch FROM created_at) * 1000000)::bigint ELSE 0 END, {} FROM {outbox} AS o \
         WHERE NOT pg_visible_in_snapshot(xid, $1::text::pg_snapshot) \
           AND pg_visible_in_snapshot(xid, $2::text::pg_snapshot) AND o.seq > $3 ORDER BY o.seq LIMIT $4",
        texts.join(", "),
    );
    let types = [Type::TEXT, Type::TEXT, Type::INT8, Type::INT8];
    let statement = client.prepare_typed(&sql, &types).await?;
    let relation = Relation {
        id: RELATION,
        schema: schema.clone(),
        name: table.clone(),
        columns,
    };
    Ok((statement, relation))
}

fn row(row: &tokio_postgres::Row) -> Row {
    let seq: i64 = row.get(0);
    let text = |column| row.get::<_, Option<&str>>(column).map(str::as_bytes);
    let values = (2..row.len()).map(|column| text(column).map_or(Value::Null, Value::Text));
    Row {
        bytes: encode_insert(RELATION, values).into(),
        place: Place {
            commit_lsn: PgLsn::from(0),
            ordinal: seq.cast_unsigned(),
        },
        // When it was committed nobody knows any more.
        committed_at: Timestamp::from_unix_micros(row.get(1)),
    }
}
