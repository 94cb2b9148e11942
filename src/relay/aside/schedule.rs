//! Sends events when their time has come.
//!
//! What was sent stays in the index as long as a transaction is open that began before, be it
//! a backup of hours: a look that passes a million of them takes 0.4 s. So each begins where the
//! last one ended, or where something was scheduled since; and now and then at the very beginning.
//!
//! Nothing is tried here that may take long. An event whose topic is held, or is not known at
//! once, and each that was on its way when one was refused, joins the queue of its key as one
//! that was never refused; and so does one whose key has a queue.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::tries::Tried;
use super::{AWAY_PAUSE, Sender, UNSETTLED_PAUSE};
use crate::error::Result;
use crate::timestamp::Timestamp;

/// How soon to look again from the beginning: the relay parks what is scheduled, and is told of
/// it, but a person may change what it finds. Up to a minute if that takes long.
const WHOLE_MIN: Duration = Duration::from_secs(10);
const WHOLE_MAX: Duration = Duration::from_secs(60);

/// Of the time, one part in so many may be spent on that.
const WHOLE_SHARE: u32 = 100;

/// What is scheduled.
pub(super) struct Schedule {
    sender: Sender,
    /// Nothing is scheduled for an earlier time, as far as is known.
    from: Timestamp,
    /// When to look from the beginning again.
    begins_at: Instant,
}

impl Schedule {
    pub(super) fn new(sender: Sender) -> Self {
        Self {
            sender,
            from: Timestamp::MIN,
            begins_at: Instant::now(),
        }
    }

    /// Sends what is due, and waits until something may be.
    pub(super) async fn step(&mut self) -> Result<()> {
        self.sender.rest().await;
        let shared = Arc::clone(&self.sender.shared);
        let pause = match self.look().await? {
            Some(Duration::ZERO) => match self.send().await? {
                Some(tried) if tried.is_away => {
                    self.sender.wait(AWAY_PAUSE, None).await;
                    return Ok(());
                }
                // There may be more.
                Some(_) => return Ok(()),
                None => UNSETTLED_PAUSE,
            },
            due => {
                let whole = self.begins_at.saturating_duration_since(Instant::now());
                due.map_or(whole, |due| due.min(whole))
            }
        };
        self.sender.wait(pause, Some(&shared.wake_schedule)).await;
        Ok(())
    }

    /// How long it is until an event is due; zero if one is.
    async fn look(&mut self) -> Result<Option<Duration>> {
        let began = Instant::now();
        if let Some(from) = self.sender.shared.take_scheduled_from() {
            self.from = self.from.min(from);
        }
        if self.begins_at <= began {
            self.from = Timestamp::MIN;
        }
        let (now, due) = self.sender.store.next_scheduled(self.from).await?;
        if self.from == Timestamp::MIN {
            let pause = (began.elapsed() * WHOLE_SHARE).clamp(WHOLE_MIN, WHOLE_MAX);
            self.begins_at = began + pause;
        }
        self.from = due.unwrap_or(now);
        Ok(due.map(|due| {
            let micros = due.unix_micros().saturating_sub(now.unix_micros());
            Duration::from_micros(micros.max(0).unsigned_abs())
        }))
    }

    /// Sends what is due, if anything is.
    async fn send(&mut self) -> Result<Option<Tried>> {
        let sender = &mut self.sender;
        let (rows, next) = sender.store.take_scheduled(self.from).await?;
        if rows.is_empty() {
            return Ok(None);
        }
        let taken = rows.len();
        let tried = sender.send_on_time(rows).await?;
        sender.store(&tried).await?;
        let outcome = &tried.outcome;
        if outcome.gone.len() + outcome.joining.len() == taken {
            self.from = next;
        }
        if !tried.outcome.joining.is_empty() {
            sender.shared.wake_queue.notify_one();
        }
        Ok(Some(tried))
    }
}
