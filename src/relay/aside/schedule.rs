//! Sends events when their time has come.
//!
//! Nothing is tried here that may take long. An event whose topic is held, or is not known at
//! once, and each that was on its way when one was refused, joins the queue of its key as one
//! that was never refused; and so does one whose key has a queue.

use std::sync::Arc;
use std::time::Duration;

use super::tries::Tried;
use super::{AWAY_PAUSE, Sender, UNSETTLED_PAUSE};
use crate::error::Result;

/// How long to wait at most before looking again: the relay parks what is scheduled, and is told
/// of it, but a person may change what it finds.
const LOOK_MAX: Duration = Duration::from_secs(10);

/// What is scheduled.
pub(super) struct Schedule {
    sender: Sender,
}

impl Schedule {
    pub(super) fn new(sender: Sender) -> Self {
        Self { sender }
    }

    /// Sends what is due, and waits until something may be.
    pub(super) async fn step(&mut self) -> Result<()> {
        self.sender.rest().await;
        let shared = Arc::clone(&self.sender.shared);
        let pause = match self.sender.store.next_scheduled().await? {
            Some(Duration::ZERO) => match self.send().await? {
                Some(tried) if tried.is_away => {
                    self.sender.wait(AWAY_PAUSE, None).await;
                    return Ok(());
                }
                // There may be more.
                Some(_) => return Ok(()),
                None => UNSETTLED_PAUSE,
            },
            due => due.map_or(LOOK_MAX, |due| due.min(LOOK_MAX)),
        };
        self.sender.wait(pause, Some(&shared.wake_schedule)).await;
        Ok(())
    }

    /// Sends what is due, if anything is.
    async fn send(&mut self) -> Result<Option<Tried>> {
        let sender = &mut self.sender;
        let rows = sender.store.take_scheduled().await?;
        if rows.is_empty() {
            return Ok(None);
        }
        let tried = sender.send_on_time(rows).await?;
        sender.store(&tried).await?;
        if !tried.outcome.joining.is_empty() {
            sender.shared.wake_queue.notify_one();
        }
        Ok(Some(tried))
    }
}
