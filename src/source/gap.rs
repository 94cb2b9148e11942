//! The rows between two snapshots, in order, and what may be stored on the way.
//!
//! Two sources give such rows. A slot that was lost is made anew, and what was
//! committed in between is in neither: the rows that the new slot's snapshot sees and
//! the old checkpoint's does not are exactly those that one slot has not surely given
//! and the other never will. And polling is one gap after another, each from the
//! snapshot of the one before to that of now.
//!
//! A row becomes the message that a slot would have sent, so that all that follows
//! knows one kind of row.

use std::collections::VecDeque;

use tokio::task::JoinSet;
use tokio_postgres::types::PgLsn;

use super::pages::{Page, Pages};
use super::{Item, Mark, Position, Row};
use crate::catalog::Gap;
use crate::error::{Result, joined};

/// Rows between two marks: what a kill repeats beside what is in flight.
const MARK_ROWS: usize = 1024;

/// Reads the rows of a gap.
pub(super) struct GapReader {
    pages: Pages,
    gap: Gap,
    /// Read ahead of the rows that are given.
    reading: JoinSet<Result<Page>>,
    rows: VecDeque<Row>,
    /// The `seq` of the last row that was read.
    read: i64,
    /// The row before the last that was given; what was delivered before, if there is
    /// none.
    before_last: i64,
    unmarked: usize,
    /// Where the slot begins that follows; zero if none does.
    end: PgLsn,
    done: bool,
}

impl GapReader {
    /// Reads on from `gap.seq`. `first` is its first page, if that is read.
    pub(super) fn begin(pages: Pages, gap: Gap, first: Option<Page>, end: PgLsn) -> Self {
        let mut reader = Self {
            pages,
            reading: JoinSet::new(),
            rows: VecDeque::new(),
            read: gap.seq,
            before_last: gap.seq,
            unmarked: 0,
            end,
            done: false,
            gap,
        };
        match first {
            Some(page) => reader.take(page),
            None => reader.read_on(),
        }
        reader
    }

    /// The first row may be one at which relays end again and again: what is behind it
    /// waits until it is delivered.
    pub(super) fn mark_first_row(mut self) -> Self {
        self.unmarked = MARK_ROWS - 1;
        self
    }

    /// The next row, or a position: at last the fence that ends the gap. Then
    /// `None`. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Item>> {
        if self.unmarked >= MARK_ROWS {
            self.unmarked = 0;
            let mark = Mark::Seq(self.gap.clone());
            return Ok(Some(self.position(mark)));
        }
        while self.rows.is_empty() {
            let Some(page) = self.reading.join_next().await else {
                if std::mem::replace(&mut self.done, true) {
                    return Ok(None);
                }
                let fence = Mark::Fence(self.gap.until.clone());
                return Ok(Some(self.position(fence)));
            };
            self.take(joined(page)?);
        }
        Ok(self.rows.pop_front().map(|row| {
            self.unmarked += 1;
            self.before_last = self.gap.seq;
            self.gap.seq = row.place.ordinal.cast_signed();
            Item::Row(row)
        }))
    }

    /// What may be stored once all rows that were given are delivered; `None` after the
    /// fence, which says more.
    pub(super) fn mark(&self) -> Option<Mark> {
        (!self.done).then(|| Mark::Seq(self.gap.clone()))
    }

    /// The same, but for the last of them.
    pub(super) fn mark_before_last(&self) -> Option<Mark> {
        (!self.done).then(|| {
            Mark::Seq(Gap {
                seq: self.before_last,
                ..self.gap.clone()
            })
        })
    }

    /// Whether all its rows have been read, and not yet its end been given.
    pub(super) fn is_ending(&self) -> bool {
        self.reading.is_empty() && !self.done
    }

    /// The snapshot at which it ends.
    pub(super) fn until(&self) -> &str {
        &self.gap.until
    }

    fn position(&self, mark: Mark) -> Item {
        Item::Position(Position {
            lsn: self.end,
            mark: Some(mark),
        })
    }

    fn take(&mut self, page: Page) {
        if let Some(last) = page.rows.last() {
            self.read = last.place.ordinal.cast_signed();
        }
        self.rows = page.rows.into();
        if page.more {
            self.read_on();
        }
    }

    fn read_on(&mut self) {
        let (pages, gap, seq) = (self.pages.clone(), self.gap.clone(), self.read);
        let page = async move { pages.after(&gap.since, &gap.until, seq).await };
        self.reading.spawn(page);
    }
}
