//! Rows from the table, asked for again and again: where a slot is not to be had.
//!
//! # The promise
//!
//! Each answer is one gap: what is committed by now and the last snapshot did not see,
//! in the order of `seq` (`pages.rs`). None is missed, however late its transaction
//! ended, as the snapshot knows what was running; a row that is rolled back never
//! appears; and nobody waits for a transaction that stays open. Events of one key come
//! in the order of their commits where its writers wait for each other before they
//! insert, as writers that lock what they change do.
//!
//! # What is misleading
//!
//! - A cursor over `seq` loses rows: a number is given before its row is committed. Of
//!   25,206 rows by eight writers, 3,551.
//! - To wait for the oldest transaction loses none, and delivers none while one is open
//!   anywhere in the cluster; and the order of transaction ids is not that of commits:
//!   1,652 inversions in the same trial.
//! - An empty answer is progress, too: the snapshot moves on. But to store that would be
//!   a transaction itself, and the next answer progress again. So it is told only now
//!   and then.
//!
//! # How soon
//!
//! After a pause (`pause.rs`), which a notification of the trigger ends that set-up can
//! make.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_postgres::types::{PgLsn, Type};

use super::catch_up::{CatchUp, Step};
use super::columns::Unreadable;
use super::gap::GapReader;
use super::messages::{Messages, Outbox};
use super::pages::{Answer, Pages};
use super::pause::{Found, Pause};
use super::{Item, Mark, Position, Row};
use crate::catalog::{Checkpoint, Gap, Slices, Standing, System};
use crate::database::{Database, Session, sort};
use crate::error::{Result, joined};
use crate::event::{Event, Outline};
use crate::pgoutput::Column;

/// How the table is asked.
#[derive(Debug, Clone)]
pub struct PollSettings {
    /// The relay's name.
    pub name: String,
    /// What is read.
    pub outbox: Outbox,
    /// The server on which this was checked.
    pub system: System,
    /// How long to wait at least before asking again.
    pub interval_min: Duration,
    /// How long to wait at most.
    pub interval_max: Duration,
    /// How often it is told that nothing was there.
    pub heartbeat_interval: Duration,
}

/// Asks the table for what is new.
pub struct Poller {
    pages: Pages,
    messages: Messages,
    settings: PollSettings,
    /// Everything that this snapshot sees was given.
    since: String,
    gap: Option<GapReader>,
    /// What comes before the first question, beside that gap.
    catch_up: CatchUp,
    /// A question, and its answer.
    asking: JoinSet<Result<Answer>>,
    pause: Pause,
    /// When `since` last moved.
    moved_at: Instant,
    fenced_at: Instant,
    /// Whether the first question has been asked, and answered in full.
    has_asked: bool,
    has_caught_up: bool,
}

const DOING: &str = "poll the outbox";

/// How long the last snapshot may stay as it is because the server has not flushed what
/// others write: from then on it is told to. The older it is, the more there is to look at.
const STANDSTILL_MAX: Duration = Duration::from_secs(1);

/// A question that takes longer is asked about.
const LONG: Duration = Duration::from_secs(1);

impl Poller {
    /// Opens a session to ask by.
    ///
    /// # Errors
    /// If the table cannot be read, or the address leads to another server by now.
    pub async fn open(database: &Database, settings: PollSettings) -> Result<Self> {
        let name = format!("postbox {}", settings.name);
        let session = database.connect_pooled(&name).await?;
        listen(&session, &settings.outbox).await?;
        let (system, outbox) = (&settings.system, &settings.outbox);
        let (pages, relation) = Pages::open(session, system, outbox, DOING).await?;
        let mut messages = Messages::new(settings.outbox.clone());
        messages.describe(&relation);
        Ok(Self::of(pages, messages, settings))
    }

    /// The same, as it was before it began.
    pub fn anew(self) -> Self {
        Self::of(self.pages, self.messages, self.settings)
    }

    fn of(pages: Pages, messages: Messages, settings: PollSettings) -> Self {
        let now = Instant::now();
        Self {
            since: String::new(),
            messages,
            gap: None,
            catch_up: CatchUp::default(),
            asking: JoinSet::new(),
            pause: Pause::new(settings.interval_min, settings.interval_max),
            moved_at: now,
            fenced_at: now,
            has_asked: false,
            has_caught_up: false,
            settings,
            pages,
        }
    }

    /// Begins where the checkpoint is.
    pub fn begin(&mut self, checkpoint: &Checkpoint) {
        self.set_out(Standing {
            slices: Slices::ALL,
            snapshot: checkpoint.snapshot.clone(),
            gap: checkpoint.gap.clone(),
        });
    }

    /// Begins where these slices are, and gives no others.
    ///
    /// # Errors
    /// If the table cannot be read.
    pub async fn begin_at(&mut self, mut standings: Vec<Standing>) -> Result<()> {
        let slices = standings.iter().map(|standing| standing.slices);
        self.pages = self.pages.of(slices.fold(Slices::default(), Slices::with));
        match standings.pop() {
            Some(only) if standings.is_empty() => self.set_out(only),
            last => {
                standings.extend(last);
                self.since = self.pages.now().await?;
                self.catch_up = CatchUp::new(standings, &self.since);
                self.gap = self.next_gap();
            }
        }
        Ok(())
    }

    /// Begins at one place.
    fn set_out(&mut self, standing: Standing) {
        self.since = match &standing.gap {
            Some(gap) => gap.until.clone(),
            None => standing.snapshot.clone(),
        };
        self.catch_up = CatchUp::new(vec![standing], &self.since);
        self.gap = self.next_gap();
    }

    /// What is to be read before the next question.
    fn next_gap(&mut self) -> Option<GapReader> {
        let Step { slices, gap } = self.catch_up.next()?;
        let pages = match self.catch_up.is_apart() {
            true => self.pages.of(slices),
            false => self.pages.clone(),
        };
        let reader = GapReader::begin(pages, gap, None, PgLsn::from(0));
        Some(reader.mark_first_row())
    }

    /// The next row or position. Cancel-safe.
    ///
    /// # Errors
    /// If the table cannot be read.
    pub async fn next(&mut self) -> Result<Item> {
        loop {
            if let Some(gap) = &mut self.gap {
                if let Some(item) = gap.next().await? {
                    return Ok(self.of_all_slices(item));
                }
                gap.until().clone_into(&mut self.since);
                self.moved_at = Instant::now();
                self.gap = self.next_gap();
                self.has_caught_up = self.has_asked;
                continue;
            }
            if self.asking.is_empty() {
                self.pause.over(self.pages.session().notified()).await;
                self.pause.look();
                let (pages, since) = (self.pages.clone(), self.since.clone());
                let flush = self.moved_at.elapsed() >= STANDSTILL_MAX;
                let answer = async move { pages.first(&since, flush).await };
                self.asking.spawn(answer);
            }
            let Some(answer) = self.asking.join_next().await else {
                continue;
            };
            if let Some(fence) = self.answered(joined(answer)?) {
                return Ok(fence);
            }
        }
    }

    /// As [`Stream::try_next`](super::wal::Stream::try_next).
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn try_next(&mut self) -> Result<Option<Item>> {
        match pin!(self.next()).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(item) => item.map(Some),
            Poll::Pending => Ok(None),
        }
    }

    fn of_all_slices(&self, item: Item) -> Item {
        match item {
            Item::Position(Position { lsn, mark }) => Item::Position(Position {
                lsn,
                mark: mark.map(|mark| self.catch_up.mark(mark)),
            }),
            row => row,
        }
    }

    /// Begins to give what is there. If nothing is, and it is time to say so: that.
    fn answered(&mut self, answer: Answer) -> Option<Item> {
        let Answer {
            now,
            is_flushed,
            page,
        } = answer;
        let is_first = !std::mem::replace(&mut self.has_asked, true);
        let asked_at = self.pause.looked_at();
        if let Some(first) = page.rows.first() {
            self.pause.found(Found::Rows);
            self.fenced_at = asked_at;
            let gap = Gap {
                since: self.since.clone(),
                until: now,
                seq: first.place.ordinal.cast_signed() - 1,
            };
            let reader = GapReader::begin(self.pages.clone(), gap, Some(page), PgLsn::from(0));
            self.gap = Some(match is_first {
                true => reader.mark_first_row(),
                false => reader,
            });
            return None;
        }
        self.has_caught_up = true;
        self.pause.found(Found::Nothing);
        if !is_flushed {
            return None;
        }
        self.since = now;
        self.moved_at = asked_at;
        if self.fenced_at.elapsed() < self.settings.heartbeat_interval {
            return None;
        }
        self.fenced_at = asked_at;
        Some(Item::Position(Position {
            lsn: PgLsn::from(0),
            mark: Some(Mark::Fence(self.since.clone())),
        }))
    }

    /// The event of a row that this source gave.
    ///
    /// # Errors
    /// If the row is not an event.
    pub fn event<'a>(&self, row: &'a Row) -> Result<Event<'a>, Unreadable> {
        self.messages.event(row)
    }

    /// What can be read of a row that may be no event, and its columns.
    pub(crate) fn outline(&self, row: &Row) -> Option<(Outline, Arc<[Column]>)> {
        self.messages.outline(row)
    }

    /// What a person needs to find the row.
    pub fn name_of(&self, row: &Row) -> String {
        self.messages.name_of(row)
    }

    /// What may be stored once all rows that were given are delivered, if that is not
    /// the last position.
    pub fn mark(&self) -> Option<Mark> {
        let mark = self.gap.as_ref().and_then(GapReader::mark);
        mark.map(|mark| self.catch_up.mark(mark))
    }

    /// The same, but for the last of these rows.
    pub fn mark_before_last(&self) -> Option<Mark> {
        let mark = self.gap.as_ref().and_then(GapReader::mark_before_last);
        mark.map(|mark| self.catch_up.mark(mark))
    }

    /// Whether the rows given so far end shortly before the end of a gap, which is a
    /// better place to stop at.
    pub fn is_ending(&self) -> bool {
        self.gap.as_ref().is_some_and(GapReader::is_ending)
    }

    /// Whether an answer of the server has been outstanding for so long that it is worth
    /// telling.
    pub fn is_asking(&self) -> bool {
        !self.asking.is_empty() && self.pause.looked_at().elapsed() > LONG
    }

    /// Whether everything that was there at the start has been given.
    pub fn has_caught_up(&self) -> bool {
        self.has_caught_up
    }
}

/// Listens for the trigger of the outbox, if there is one. Behind a pooler that lends
/// the server's session to others nothing is heard, and the interval is what counts.
async fn listen(session: &Session, outbox: &Outbox) -> Result<()> {
    let sql = "SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = $1::text::regclass \
                              AND tgname = 'notify_relay' AND tgenabled IN ('O', 'A'))";
    let listening = async {
        let found = session
            .client
            .query_typed(sql, &[(&outbox.table.quoted(), Type::TEXT)])
            .await?;
        if found.first().is_some_and(|row| row.get(0)) {
            session.client.batch_execute("LISTEN postbox").await?;
        }
        Ok(())
    };
    let listening: Result<(), tokio_postgres::Error> = listening.await;
    listening.map_err(|error| sort(DOING, error))
}
