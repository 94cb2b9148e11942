//! How an attempt ends.
//!
//! However it ends, what is delivered is confirmed as far as a moment allows, since what is
//! not is sent again; then nothing more leaves, and only then the lease is given back, as
//! another relay sends from there on.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use tracing::{debug, info};

use super::{Attempt, Ended, locked, sleep_until};
use crate::database::within;
use crate::error::{Error, ErrorKind, Result};
use crate::relay::BACKOFF_MAX;
use crate::relay::aside::Aside;
use crate::relay::connect::Kept;
use crate::relay::{marks, parking};
use crate::source::Source;
use crate::source::claim::LEFTOVERS_MAX;

/// How long the last confirmation may take to leave.
const CONFIRMATION_MAX: Duration = Duration::from_millis(500);

/// How long a server that is going away, or the end of a relay that met an event
/// it cannot send, waits until what is in flight is confirmed.
const PARTING_MAX: Duration = Duration::from_secs(2);

/// How small a refused batch makes the next ones.
const BATCH_BYTES_MIN: usize = 16_384;

impl Attempt<'_> {
    /// Ends it with what carrying events came to.
    pub(super) async fn part(mut self, mut result: Result<Ended>) -> Result<Ended> {
        if let Err(error) = &result {
            // Nothing more leaves here, and what is on its way is sent again.
            self.aside = None;
            // Before leave is taken, which takes a while.
            self.relay.health.stopped(error);
            self.take_leave(error.kind()).await;
            // Another may send it next: no more of it is to leave here.
            self.window.publisher.purge();
        }
        self.update_gauges();
        let knows_all = self.source.stop().await;
        if let Ok(Ended::Divided) = result {
            result = self.control.hand_over().await.map(|()| Ended::Divided);
        }
        // It must not ask for slices behind a release.
        self.watch = None;
        let is_divided = matches!(result, Ok(Ended::Divided));
        let is_released = is_divided || self.control.release().await;
        failpoint!("released");
        if !is_released || !knows_all {
            self.relay.leftovers_until = Some(Instant::now() + LEFTOVERS_MAX);
        }
        self.relay.unstored = match result {
            Err(_) if !self.is_stored() => self.relay.unstored.max(self.window.last_sent),
            Ok(Ended::Divided) if !self.has_caught_up() => self.relay.unstored,
            _ => None,
        };
        self.leave_to_the_next(is_divided).await;
        result
    }

    /// Leaves in the relay what its next attempt is to know, and what it can use.
    async fn leave_to_the_next(self, is_divided: bool) {
        let relay = self.relay;
        relay.was_frozen = self.was_frozen;
        relay.worked =
            self.window.has_delivered || self.has_put_off || self.began.elapsed() > BACKOFF_MAX;
        let refused = self.window.has_refused;
        let (publisher, suspects, too_large) = self.window.close();
        relay.suspects = suspects;
        if let Some(parking) = &self.parking {
            relay.too_large = parking.too_large();
        }
        relay.too_large.extend(too_large);
        if refused && relay.suspects.len() > 1 {
            relay.batch_bytes = (relay.batch_bytes / 2).max(BATCH_BYTES_MIN);
        }
        relay.kept = match (self.source, self.control.checked()) {
            // What is asked for long may be asked for longer: another session need not wait.
            (Source::Poll(poller), (session, Some(checked)))
                if is_divided && !poller.is_asking() && self.stores.is_some() =>
            {
                self.stores.map(|stores| Kept {
                    stores,
                    session,
                    checked,
                    publisher: publisher.anew(),
                    poller: poller.anew(),
                })
            }
            (source, _) => {
                source.close().await;
                None
            }
        };
        relay.metrics.in_flight_events.set(0);
        relay.metrics.in_flight_bytes.set(0);
        relay.metrics.slices.set(0);
    }

    /// Everything is delivered that was read.
    pub(super) async fn end(&mut self, deadline: Option<Instant>) -> Result<Ended> {
        if self.stopping {
            self.finish(deadline).await?;
            return Ok(Ended::Stopped);
        }
        within(
            PARTING_MAX,
            "store where the slices stand",
            self.finish(None),
        )
        .await?;
        Ok(Ended::Divided)
    }

    /// Whether what attempts before this one sent, and could not confirm, has been sent
    /// again, or will not come again.
    pub(super) fn has_caught_up(&self) -> bool {
        self.relay
            .unstored
            .is_none_or(|place| self.source.has_passed(place, self.window.last_sent))
    }

    /// Whether an orderly end need not read more: who hands slices over goes on with the
    /// others, and with what it owes.
    pub(super) fn has_read_on(&self) -> bool {
        !self.stopping || self.has_caught_up()
    }

    /// Whether Postgres has stored that everything was delivered that was sent, now or
    /// before. That it was told is not enough: a connection that breaks takes with it what
    /// was written and not yet read.
    fn is_stored(&self) -> bool {
        let is_delivered = match self.has_put_off {
            // It was the last.
            true => self.window.is_settled(),
            false => !self.window.has_work() && self.source.mark().is_none(),
        };
        is_delivered
            && self.is_marked()
            && !self.source.is_amid()
            && self.control.is_stored()
            && self.has_caught_up()
    }

    /// The attempt is over. What is in flight is still delivered and confirmed if
    /// that takes a moment only, so that it is not repeated: a Postgres that stops
    /// waits for it, and a relay that is started again and again because of one
    /// event must not send those before it each time; and a slot that cannot be
    /// read on may be dropped next. But a server that stops is not held up.
    async fn take_leave(&mut self, kind: ErrorKind) {
        use ErrorKind::{BrokerAway, DatabaseAway, Event, Publication, SlotInUse};
        // What another may be sending by now is not waited for.
        if self.was_frozen && self.control.frozen_max().is_some() {
            return;
        }
        // Of its slices some may still be this relay's.
        let is_left = kind == SlotInUse && self.control.is_divided();
        if matches!(kind, DatabaseAway | Event | Publication) || is_left || self.has_put_off {
            let settled = async {
                while !self.window.is_settled() || !self.is_marked() {
                    tokio::select! {
                        () = self.window.publisher.reported() => {}
                        marked = marks::next(self.marks.as_mut()) => self.confirm(marked?),
                        parked = parking::next(self.parking.as_mut()) => {
                            for sequence in parked? {
                                self.window.parked(sequence);
                            }
                        }
                    }
                    self.look_at_clock();
                    self.settle()?;
                }
                Ok::<_, Error>(())
            };
            // If it takes longer, or fails: then they are repeated.
            let settled = timeout(PARTING_MAX, settled).await;
            if let Ok(Ok(())) = settled {
                if let Some(mark) = self.source.mark_before_last() {
                    // The last row may be the one that cannot go out.
                    self.control.reached((mark, self.source.confirmed()), true);
                }
                let _ = timeout(PARTING_MAX, self.control.store()).await;
            }
        }
        // A walsender that is busy writing may not read the last confirmation before it
        // is let go, and would begin with the transaction before a refused event again.
        if kind == BrokerAway {
            let _ = timeout(PARTING_MAX, self.control.store()).await;
        }
        // What was confirmed last may not have left yet.
        let sent = self.source.confirmation_sent();
        let _ = timeout(CONFIRMATION_MAX, sent).await;
    }

    pub(super) fn is_drained(&self) -> bool {
        self.window.is_settled()
            && self.is_marked()
            && self.aside.as_ref().is_none_or(Aside::is_at_rest)
            && self.held.is_none()
            && !self.source.is_amid()
            && self.has_read_on()
            && !self.awaits_fence()
    }

    /// Everything is delivered: see to it that Postgres knows.
    async fn finish(&mut self, deadline: Option<Instant>) -> Result<()> {
        let confirmed = self.source.confirmed();
        if let Some(mark) = self.source.mark() {
            self.control.reached((mark, confirmed), true);
        } else if u64::from(confirmed) == 0 && self.control.is_stored() {
            return Ok(());
        }
        failpoint!("drained");
        let sent = async {
            self.source.confirmation_sent().await;
            failpoint!("told");
            // A status message that was written is not yet read; closing could
            // still discard it.
            self.control.flush(confirmed).await
        };
        tokio::select! {
            confirmed = sent => confirmed?,
            () = sleep_until(deadline) => {
                let rows = self.source.locked();
                if rows > 0 {
                    let message = format!(
                        "everything was delivered, but {}: they may be sent again",
                        locked(rows)
                    );
                    return Err(Error::new(ErrorKind::NotDrained, message));
                }
                let message = format!(
                    "everything was delivered, but Postgres did not take the confirmation of {confirmed} in time: \
                     the last events will be sent again"
                );
                return Err(Error::new(ErrorKind::NotDrained, message));
            }
        }
        match self.source {
            Source::Wal(_) => info!(lsn = %confirmed, "drained and confirmed"),
            Source::Poll(_) if self.stopping => info!("drained and stored"),
            Source::Poll(_) => debug!("drained and stored"),
            Source::Claim(_) => info!("drained and completed"),
        }
        Ok(())
    }

    pub(super) fn not_drained(&self) -> Error {
        let seconds = self.relay.settings.shutdown_timeout.as_secs_f32();
        let in_transaction = self.source.is_amid() && self.source.mark().is_none();
        let what = match in_transaction {
            true => "a transaction was still being read, and all its events",
            false if !self.is_marked() && self.window.is_settled() => {
                "rows that were delivered could not be marked published, and"
            }
            false => "events were still in flight, and",
        };
        let message = format!("not drained within {seconds} s: {what} will be sent again");
        Error::new(ErrorKind::NotDrained, message)
    }
}
