//! Whether the relay does its work, in words: what `/readyz` says.
//!
//! A relay that is alive and does nothing is what operators fear most, so
//! readiness is about progress: red when the stream is down, when the brokers do
//! not answer, or when nothing has moved for [`STALL`] while there is something to
//! do.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

/// How long nothing may move while there is something to do.
pub const STALL: Duration = Duration::from_secs(15);

/// What the relay knows about itself, shared with the http endpoints.
#[derive(Debug)]
pub struct Health(Mutex<State>);

#[derive(Debug)]
struct State {
    stream: Link,
    brokers: Link,
    has_work: bool,
    moved: Instant,
}

/// A connection: up, or down for a reason.
type Link = Result<(), String>;

impl Default for Health {
    fn default() -> Self {
        Self(Mutex::new(State {
            stream: Err("not connected yet".to_owned()),
            brokers: Err("not connected yet".to_owned()),
            has_work: false,
            moved: Instant::now(),
        }))
    }
}

impl Health {
    /// The stream from Postgres came up, or went down for this reason.
    pub fn stream(&self, link: Link) {
        self.with(|state| state.stream = link);
    }

    /// A broker answered, or none does for this reason. Logs the change.
    pub fn brokers(&self, link: Link) {
        let before = self.with(|state| std::mem::replace(&mut state.brokers, link.clone()));
        match (before, link) {
            (Ok(()), Err(reason)) => warn!("waiting for kafka: {reason}"),
            (Err(_), Ok(())) => info!("kafka answers"),
            _ => {}
        }
    }

    /// An event was delivered or a position confirmed.
    pub fn moved(&self) {
        self.with(|state| state.moved = Instant::now());
    }

    /// Whether anything waits to be delivered or confirmed.
    pub fn has_work(&self, has_work: bool) {
        self.with(|state| {
            // The clock of a stall starts when there is something to do.
            if has_work && !state.has_work {
                state.moved = Instant::now();
            }
            state.has_work = has_work;
        });
    }

    /// How long nothing has moved while there was something to do; zero if there
    /// is nothing.
    pub fn stalled_for(&self) -> Duration {
        self.with(|state| match state.has_work {
            true => state.moved.elapsed(),
            false => Duration::ZERO,
        })
    }

    /// What is wrong, a line each; nothing if the relay is ready.
    pub fn complaints(&self) -> Vec<String> {
        let stalled = self.stalled_for();
        self.with(|state| {
            let mut complaints = Vec::new();
            if let Err(reason) = &state.stream {
                complaints.push(format!("postgres: {reason}"));
            }
            if let Err(reason) = &state.brokers {
                complaints.push(format!("kafka: {reason}"));
            }
            if stalled > STALL {
                complaints.push(format!(
                    "no progress for {} s while events wait",
                    stalled.as_secs()
                ));
            }
            complaints
        })
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        // A panic while the lock is held cannot leave it half changed.
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_what_is_down_and_why() {
        let health = Health::default();
        assert_eq!(
            health.complaints(),
            ["postgres: not connected yet", "kafka: not connected yet"]
        );
        health.stream(Ok(()));
        health.brokers(Ok(()));
        assert!(health.complaints().is_empty());
        health.brokers(Err("no broker answers".to_owned()));
        assert_eq!(health.complaints(), ["kafka: no broker answers"]);
    }

    #[test]
    fn standing_still_is_only_wrong_with_something_to_do() {
        let health = Health::default();
        health.stream(Ok(()));
        health.brokers(Ok(()));
        health.with(|state| state.moved -= STALL * 2);
        assert!(health.complaints().is_empty());
        health.has_work(true);
        assert!(health.complaints().is_empty());
        health.with(|state| state.moved -= STALL * 2);
        assert_eq!(
            health.complaints(),
            ["no progress for 30 s while events wait"]
        );
        health.moved();
        assert!(health.complaints().is_empty());
    }
}
