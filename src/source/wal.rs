//! Rows from a logical replication slot.
//!
//! # What is misleading about the server
//!
//! - When everything is confirmed, an idle server sends nothing, and a dead
//!   connection looks the same. The session sets `wal_sender_timeout`, whose half
//!   is the server's ping interval, and silence for longer is an error. The server
//!   drops a relay that hangs after the same time.
//! - A server that shuts down waits until the slot has confirmed everything, for
//!   ever if the broker is away. It ends ordinary sessions first, so the relay
//!   watches one, and lets go of the stream when that ends.
//! - A server that gives a slot up (`max_slot_wal_keep_size`) first ends its walsender,
//!   in a checkpoint, and waits for that. A walsender whose client reads nothing, as
//!   Kafka is away, does not end: it waits to say goodbye. So the relay looks out for
//!   one that was told to end, and lets go of the stream.
//! - A slot's position is on the server's disk only now and then, up to 15 s old: after a
//!   crash the server would repeat all since. So the relay stores its position in the
//!   checkpoint too, and asks to begin there; the server takes the later of the two.
//! - Since Postgres 18 a publication that is gone is no error: its rows are
//!   skipped. The relay compares the publication's identity at every start and
//!   heartbeat.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use pgwire_replication::Lsn;
use pgwire_replication::client::ReplicationClient;
use tokio_postgres::types::PgLsn;

use super::columns::Unreadable;
use super::gap::GapReader;
use super::messages::{Messages, Outbox};
use super::pages::Pages;
use super::{FORMATS, Item, Mark, Row};
use crate::catalog::{self, Gap, System};
use crate::database::{self, Database};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Outline};
use crate::pgoutput::Column;

/// What a stream reads, and how.
#[derive(Debug, Clone)]
pub struct WalSettings {
    /// The replication slot.
    pub slot: String,
    /// What the slot is read for.
    pub outbox: Outbox,
    /// The server on which this was checked.
    pub system: System,
    /// Everything that committed before it is delivered.
    pub start: PgLsn,
    /// How often a new position is told to the server, in a message each: a crash
    /// repeats what was delivered since.
    pub status_interval: Duration,
    /// After how long a silent peer counts as dead, on both sides.
    pub wal_sender_timeout: Duration,
}

/// Rows that wait between the client's task and ours. The client bounds events,
/// not bytes, and a row may be as large as the topic allows, 1 MB by default: so few
/// that large rows cost 64 MB at most then, and enough that a switch of tasks is paid
/// for by many.
const BUFFERED_ROWS: usize = 64;

/// An open stream.
pub struct Stream {
    client: ReplicationClient,
    settings: WalSettings,
    messages: Messages,
    gap: Option<GapReader>,
    last_heard: Instant,
    /// Whether anything has come since the clock was last looked at.
    has_heard: bool,
    received: PgLsn,
    confirmed: PgLsn,
}

impl Stream {
    /// Opens the slot where it was last confirmed, or later if told so.
    ///
    /// # Errors
    /// If the server refuses; `SlotInUse` while another process reads the slot.
    pub async fn open(database: &Database, settings: WalSettings) -> Result<Self> {
        let context = format!("stream from slot \"{}\"", settings.slot);
        let mut config = database.replication(&settings.slot, &settings.outbox.publication);
        // Formats are pinned, as a role or a database may have others. What
        // comes last wins.
        let mut options = format!(
            "{} -c wal_sender_timeout={}",
            config.options.take().unwrap_or_default(),
            settings.wal_sender_timeout.as_millis(),
        );
        for (name, value) in FORMATS {
            options += &format!(" -c {name}={value}");
        }
        let config = config
            .with_options(options)
            .with_application_name(format!("postbox {}", settings.slot))
            .with_start_lsn(Lsn::from_u64(settings.start.into()))
            .with_buffer_size(BUFFERED_ROWS)
            .with_status_interval(settings.status_interval)
            // Longer than the server's ping interval: its pings are what shows
            // that it lives.
            .with_wakeup_interval(settings.wal_sender_timeout * 3);
        let sorted = |error| database::sort_replication(&context, error);
        let mut client = ReplicationClient::connect_gated(config)
            .await
            .map_err(sorted)?;
        let opened = async {
            let found = client.identify_system().await.map_err(sorted)?;
            settings.system.check_same(&found.into(), &context)?;
            client.start().await.map_err(sorted)?;
            client.wait_started().await.map_err(sorted)
        };
        let limit = database.connect_timeout();
        if let Err(error) = database::within(limit, &context, opened).await {
            client.abort();
            return Err(error);
        }
        Ok(Self {
            client,
            messages: Messages::new(settings.outbox.clone()),
            gap: None,
            settings,
            last_heard: Instant::now(),
            has_heard: false,
            received: PgLsn::from(0),
            confirmed: PgLsn::from(0),
        })
    }

    /// Reads these rows from the table, or from the copy of them, before any from the slot,
    /// which begins at `end`. Only now that the slot is ours, as only one relay may send them.
    ///
    /// # Errors
    /// If the table cannot be read.
    pub(crate) async fn read_first(
        &mut self,
        database: &Database,
        gap: Gap,
        copy: Option<&str>,
        end: PgLsn,
    ) -> Result<()> {
        let doing = "read the outbox where the slot was lost";
        let session = database.connect("postbox gap").await?;
        let (system, outbox) = (&self.settings.system, &self.settings.outbox);
        let (pages, relation) = match copy {
            None => Pages::open(session, system, outbox, doing).await?,
            Some(copy) => Pages::open_copy(session, system, outbox, copy, doing).await?,
        };
        let seen = catalog::wait_until_seen(&pages.session().client, &gap.until).await;
        seen.map_err(|error| database::sort(doing, error))?;
        self.messages.describe(&relation);
        self.gap = Some(GapReader::begin(pages, gap, None, end).mark_first_row());
        Ok(())
    }

    /// What may be stored once the rows of the gap that were given are delivered, while
    /// there is a gap.
    pub fn mark(&self) -> Option<Mark> {
        self.gap.as_ref().and_then(GapReader::mark)
    }

    /// The same, but for the last of these rows.
    pub fn mark_before_last(&self) -> Option<Mark> {
        self.gap.as_ref().and_then(GapReader::mark_before_last)
    }

    /// The next row or position. Cancel-safe, but for the reason why a stream
    /// ended, which may be lost.
    ///
    /// # Errors
    /// If the stream ends or says what it should not.
    pub async fn next(&mut self) -> Result<Item> {
        while let Some(gap) = &mut self.gap {
            // Without the slot these rows are another relay's to send.
            if !self.client.is_running() {
                return Err(self.ended());
            }
            match gap.next().await? {
                Some(item) => return Ok(item),
                None => self.gap = None,
            }
        }
        loop {
            let message = match self.client.recv().await {
                Ok(Some(message)) => message,
                Ok(None) => return Err(self.ended()),
                Err(error) => return Err(database::sort_replication(self.context(), error)),
            };
            self.has_heard = true;
            if let Some(item) = self.messages.accept(message)? {
                if let Item::Position(position) = &item {
                    self.received = self.received.max(position.lsn);
                }
                return Ok(item);
            }
        }
    }

    /// The next row or position if it has already arrived.
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn try_next(&mut self) -> Result<Option<Item>> {
        match pin!(self.next()).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(item) => item.map(Some),
            Poll::Pending => Ok(None),
        }
    }

    /// The event of a row that this stream gave.
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

    /// What a person needs to find the row: its id and number as far as they can
    /// be read, and its place.
    pub fn name_of(&self, row: &Row) -> String {
        self.messages.name_of(row)
    }

    /// Whether the rows given so far end within a transaction.
    pub fn in_transaction(&self) -> bool {
        self.messages.in_transaction()
    }

    /// Tells the server that everything before `lsn` is done with, within one
    /// status interval.
    pub fn confirm(&mut self, lsn: PgLsn) {
        self.confirmed = self.confirmed.max(lsn);
        self.client
            .update_applied_lsn(Lsn::from_u64(self.confirmed.into()));
    }

    /// The newest position that was given.
    pub fn received(&self) -> PgLsn {
        self.received
    }

    /// The newest position that was confirmed.
    pub fn confirmed(&self) -> PgLsn {
        self.confirmed
    }

    /// What has come since this was last called, came now.
    pub fn look_at_clock(&mut self, now: Instant) {
        if std::mem::take(&mut self.has_heard) {
            self.last_heard = now;
        }
    }

    /// Fails if the server has been silent for too long. `reading` says whether
    /// we have been listening.
    ///
    /// # Errors
    /// `DatabaseAway` if nothing came, not even a ping.
    pub fn check_alive(&mut self, reading: bool) -> Result<()> {
        self.has_heard |= !reading || self.gap.is_some();
        self.look_at_clock(Instant::now());
        let silence = self.silence();
        if silence > self.settings.wal_sender_timeout * 3 / 2 {
            let message = format!("nothing heard from the server for {} s", silence.as_secs());
            return Err(Error::new(ErrorKind::DatabaseAway, message));
        }
        Ok(())
    }

    /// How long nothing has come while we were listening.
    pub fn silence(&self) -> Duration {
        self.last_heard.elapsed()
    }

    /// Waits until the last confirmation was written to the server, if that is
    /// still possible. Cancel-safe.
    pub async fn confirmation_sent(&self) {
        let confirmed = self.confirmed.into();
        let written = || self.client.metrics().last_applied_lsn().as_u64();
        while self.client.is_running() && written() < confirmed {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// Ends the stream. Only what [`confirmation_sent`](Self::confirmation_sent)
    /// has waited for is sure to have been written.
    pub async fn close(mut self) {
        // The client forgets a confirmation that it has not yet sent, and closes.
        let closed = tokio::time::timeout(Duration::from_secs(1), self.client.shutdown()).await;
        if closed.is_err() {
            self.client.abort();
        }
    }

    fn context(&self) -> String {
        format!("read slot \"{}\"", self.settings.slot)
    }

    fn ended(&self) -> Error {
        let message = format!("{}: the server ended the stream", self.context());
        Error::new(ErrorKind::DatabaseAway, message)
    }
}
