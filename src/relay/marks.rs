//! Marks rows of another library's table published, where they came from a slot.
//!
//! A row is marked after the broker has it and before its position is confirmed: whatever
//! becomes of this relay, no row that the slot will not give again is unmarked. So what
//! `window.rs` says can be confirmed waits here, until the rows before it are marked, many
//! in a statement. Rows are marked amid a transaction, too, as one may have millions. It is
//! done in a session of its own, as a heartbeat must not wait for it.
//!
//! # What is misleading
//!
//! A slot gives a transaction as soon as its commit is in the WAL. Other sessions see it a
//! moment later, or much later if it waits for its synchronous standby: by then a row may
//! be delivered, and an UPDATE passes over it as if it were not there (of 1,017 rows on a
//! busy machine, 26). So where fewer rows were marked than there are, it is waited until
//! their transactions are seen, and they are marked again. Those that are missing then are
//! gone, or were marked before.
//!
//! Somebody may have locked a row, or the table, for as long as they like. That is waited for
//! as well: to give up would be to send the same rows again and again. What is sent meanwhile
//! is bounded, and readiness says what is waited for.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_postgres::types::Type;

use super::window::Progress;
use crate::catalog;
use crate::database::{Session, despite_deadlocks, sort};
use crate::error::{Error, Result, joined};
use crate::event::Event;
use crate::source::claim::ClaimSettings;

/// The most rows that one statement marks: few enough to be done long before it is given
/// up.
const ROWS_MAX: usize = 1000;

/// Rows that were sent, and not marked yet.
pub(super) struct Marks {
    session: Arc<Session>,
    statement: Arc<String>,
    rows: VecDeque<Sent>,
    /// Of those, the first are delivered: up to this end of the window.
    delivered: u64,
    /// What can be confirmed once those are marked.
    reached: Progress,
    /// What can be confirmed once those are marked that are being written.
    written: Progress,
    writing: JoinSet<Result<()>>,
    /// How many rows those are.
    writing_rows: usize,
    /// Rows could not be marked: nothing behind them may be confirmed by this attempt.
    has_failed: bool,
}

struct Sent {
    /// Where the window ended when it was sent.
    end: u64,
    id: String,
    created_at: i64,
    xid: u32,
}

impl Marks {
    /// Looks at the table, in a session that was opened for this. It waits for locks as long
    /// as they are held, is idle as long as nothing comes, and does not take rows that a policy
    /// hides for rows that are gone.
    ///
    /// # Errors
    /// If the table is not as its preset says.
    pub(super) async fn open(session: Session, claims: &ClaimSettings) -> Result<Self> {
        let own = "SET statement_timeout = 0; SET lock_timeout = 0; SET idle_session_timeout = 0; \
                   SET row_security = off";
        let set = session.client.batch_execute(own).await;
        set.map_err(|error| sort(DOING, error))?;
        let statement = claims.mark(&session.client).await?;
        Ok(Self {
            session: Arc::new(session),
            statement: Arc::new(statement),
            rows: VecDeque::new(),
            delivered: 0,
            reached: Progress::default(),
            written: Progress::default(),
            writing: JoinSet::new(),
            writing_rows: 0,
            has_failed: false,
        })
    }

    /// What marks rows that were not sent with the stream.
    pub(super) fn marker(&self) -> Marker {
        Marker {
            session: Arc::clone(&self.session),
            statement: Arc::clone(&self.statement),
        }
    }

    /// This event was sent, and with it the window ends here.
    pub(super) fn sent(&mut self, event: &Event<'_>, xid: u32, end: u64) {
        self.rows.push_back(Sent {
            end,
            xid,
            id: event.id.to_owned(),
            created_at: event.created_at.unix_micros(),
        });
    }

    /// Whether so few wait that more may be sent.
    pub(super) fn has_room(&self, rows_max: usize) -> bool {
        self.rows.len() + self.writing_rows < rows_max
    }

    /// All events are delivered up to this end of the window, and with them this can be
    /// confirmed. Says what need not wait.
    pub(super) fn reach(&mut self, progress: Progress, delivered: u64) -> Progress {
        if self.has_failed {
            return Progress::default();
        }
        self.delivered = delivered;
        self.reached.add(progress);
        if self.writing.is_empty() {
            return self.write();
        }
        Progress::default()
    }

    /// Whether nothing waits to be marked of what is delivered.
    pub(super) fn are_done(&self) -> bool {
        self.writing.is_empty() && !self.has_failed
    }

    /// Waits until rows are marked, and says what can be confirmed. Cancel-safe.
    ///
    /// # Errors
    /// If they could not be.
    pub(super) async fn next(&mut self) -> Result<Progress> {
        let Some(written) = self.writing.join_next().await else {
            return std::future::pending().await;
        };
        if let Err(error) = joined(written) {
            self.has_failed = true;
            return Err(error);
        }
        self.writing_rows = 0;
        let mut progress = std::mem::take(&mut self.written);
        progress.add(self.write());
        Ok(progress)
    }

    /// Begins to mark what is delivered by now; says what can be confirmed if that is
    /// nothing.
    fn write(&mut self) -> Progress {
        let progress = std::mem::take(&mut self.reached);
        let delivered = self.rows.partition_point(|row| row.end <= self.delivered);
        if delivered == 0 {
            return progress;
        }
        let rows: Vec<Sent> = self.rows.drain(..delivered).collect();
        self.written = progress;
        self.writing_rows = rows.len();
        let (session, statement) = (Arc::clone(&self.session), Arc::clone(&self.statement));
        self.writing.spawn(async move {
            tokio::select! {
                marked = mark_all(&session, &statement, &rows) => marked,
                error = session.ended() => Err(error),
            }
        });
        Progress::default()
    }
}

/// Marks rows that were parked, once they are sent.
#[derive(Clone)]
pub(super) struct Marker {
    session: Arc<Session>,
    statement: Arc<String>,
}

impl Marker {
    /// Marks these events, each by its id and when it was created, in microseconds since
    /// 1970. They were committed long ago: one that is not found is gone, or was marked.
    ///
    /// # Errors
    /// If they could not be.
    pub(super) async fn mark(&self, events: Vec<(String, i64)>) -> Result<()> {
        let sent = |(id, created_at)| Sent {
            end: 0,
            xid: 0,
            id,
            created_at,
        };
        let rows: Vec<Sent> = events.into_iter().map(sent).collect();
        for rows in rows.chunks(ROWS_MAX) {
            mark(&self.session, &self.statement, rows).await?;
        }
        Ok(())
    }
}

const DOING: &str = "mark rows published";

async fn mark_all(session: &Session, statement: &str, rows: &[Sent]) -> Result<()> {
    for rows in rows.chunks(ROWS_MAX) {
        failpoint!("marking");
        if mark(session, statement, rows).await? < rows.len() {
            wait_until_visible(session, rows).await?;
            mark(session, statement, rows).await?;
        }
        failpoint!("marked");
    }
    Ok(())
}

/// How many rows it has marked.
async fn mark(session: &Session, statement: &str, rows: &[Sent]) -> Result<usize> {
    let ids: Vec<&str> = rows.iter().map(|row| row.id.as_str()).collect();
    let times: Vec<i64> = rows.iter().map(|row| row.created_at).collect();
    let parameters = [
        (&ids as _, Type::TEXT_ARRAY),
        (&times as _, Type::INT8_ARRAY),
    ];
    let marked = despite_deadlocks(|| session.client.query_typed(statement, &parameters)).await;
    let marked = marked.map_err(|error| sort(DOING, error))?;
    let marked: i64 = marked.first().map_or(0, |row| row.get(0));
    Ok(usize::try_from(marked).unwrap_or_default())
}

/// However long a commit waits: until its rows are marked nothing is confirmed.
async fn wait_until_visible(session: &Session, rows: &[Sent]) -> Result<()> {
    let of_slot = rows.iter().map(|row| row.xid).filter(|xid| *xid != 0);
    let mut xids: Vec<u32> = of_slot.collect();
    xids.dedup();
    let visible = catalog::wait_until_visible(&session.client, &xids).await;
    visible.map_err(|error| sort("see what was committed", error))
}

/// Waits for what is marked, where rows are.
pub(super) async fn next(marks: Option<&mut Marks>) -> Result<Progress, Error> {
    match marks {
        Some(marks) => marks.next().await,
        None => std::future::pending().await,
    }
}
