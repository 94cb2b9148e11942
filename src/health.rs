//! Whether the relay does its work, in words: what `/readyz` says.
//!
//! A relay that is alive and does nothing is what operators fear most, and
//! whatever hangs reports nothing. So readiness waits for no error. While the relay
//! streams, each server is asked for a sign of life every few seconds, and the
//! oldest event that waits must change: red is what was not heard of, or has not
//! moved, for [`SILENCE_MAX`], whoever hangs, the relay itself included. An error
//! that is reported is red at once, and is the better reason.
//!
//! One thing is red while events flow: a slot that nobody reads any more, as it keeps WAL
//! until the disk is full, and only a person ends that.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use crate::error::{Error, ErrorKind};
use crate::lock::lock;

/// How long a server may be silent, and how long nothing may move while there is
/// something to do. Servers are asked every 5 s at least, and a probe that sees a
/// stall should see it within 15 s.
pub const SILENCE_MAX: Duration = Duration::from_secs(10);

/// What the relay knows about itself, shared with the http endpoints.
#[derive(Debug)]
pub struct Health(Mutex<State>);

/// One of the two servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// The database, in the relay's ordinary session. The replication stream is
    /// silent while there is nothing to read: see [`Health::overdue`].
    Postgres,
    /// Any broker.
    Kafka,
}

#[derive(Debug)]
struct State {
    stream: Link,
    /// For how long the stream has kept back what the server has written.
    overdue: Option<Duration>,
    brokers: Link,
    /// What the database keeps for nobody.
    left_behind: Option<String>,
    /// When Postgres and Kafka last said anything, or were first asked.
    heard: [Instant; 2],
    /// What the oldest event that is not confirmed waits for.
    waiting: Option<String>,
    moved: Instant,
}

/// Up, or down for a reason.
type Link = Result<(), String>;

impl Default for Health {
    fn default() -> Self {
        let now = Instant::now();
        Self(Mutex::new(State {
            stream: Err("postgres: not connected yet".to_owned()),
            overdue: None,
            brokers: Err("not connected yet".to_owned()),
            left_behind: None,
            heard: [now; 2],
            waiting: None,
            moved: now,
        }))
    }
}

impl Health {
    /// The stream from Postgres came up.
    pub fn streaming(&self) {
        self.with(|state| {
            state.stream = Ok(());
            state.overdue = None;
            state.left_behind = None;
            // Nobody asked in between.
            state.heard = [Instant::now(); 2];
            state.waiting = None;
        });
    }

    /// The stream went down, or could not come up.
    pub fn stopped(&self, error: &Error) {
        let side = match error.kind() {
            ErrorKind::Broker | ErrorKind::BrokerAway => "kafka",
            ErrorKind::Event | ErrorKind::NotDrained | ErrorKind::Unexpected => "relay",
            _ => "postgres",
        };
        self.with(|state| state.stream = Err(format!("{side}: {}", error.chain())));
    }

    /// The stream has said nothing for so long, though the server has written WAL; `None`
    /// if it owes us nothing. That is no error yet: a server that decodes a large
    /// transaction is as silent as one whose connection is dead.
    pub fn overdue(&self, silence: Option<Duration>) {
        self.with(|state| state.overdue = silence);
    }

    /// Something fills the database's disk, though events flow; it says what ends that. `None` if
    /// nothing does.
    pub fn left_behind(&self, what: Option<String>) {
        self.with(|state| state.left_behind = what);
    }

    /// A server gave a sign of life.
    pub fn heard(&self, server: Server) {
        self.with(|state| state.heard[server as usize] = Instant::now());
    }

    /// How long a server has been silent.
    pub fn silence(&self, server: Server) -> Duration {
        self.with(|state| state.heard[server as usize].elapsed())
    }

    /// A broker answered, or none does for this reason. Logs the change.
    pub fn brokers(&self, link: Link) {
        let before = self.with(|state| {
            if link.is_ok() {
                state.heard[Server::Kafka as usize] = Instant::now();
            }
            std::mem::replace(&mut state.brokers, link.clone())
        });
        match (before, link) {
            (Ok(()), Err(reason)) => warn!("waiting for kafka: {reason}"),
            (Err(_), Ok(())) => info!("kafka answers"),
            _ => {}
        }
    }

    /// An event was delivered, and marked published where it is to be, or a position can be
    /// confirmed.
    pub fn moved(&self) {
        self.with(|state| state.moved = Instant::now());
    }

    /// What the oldest event that is not confirmed waits for; `None` if there is
    /// nothing to do.
    pub fn waiting(&self, waiting: Option<String>) {
        self.with(|state| {
            // The clock of a stall starts when there is something to do.
            if state.waiting.is_none() {
                state.moved = Instant::now();
            }
            state.waiting = waiting;
        });
    }

    /// How long nothing has moved while there was something to do; zero if there
    /// is nothing.
    pub fn stalled_for(&self) -> Duration {
        self.with(|state| match state.waiting {
            Some(_) => state.moved.elapsed(),
            None => Duration::ZERO,
        })
    }

    /// What is wrong, a line each; nothing if the relay is ready.
    pub fn complaints(&self) -> Vec<String> {
        let stalled = self.stalled_for();
        self.with(|state| {
            let mut complaints = Vec::new();
            if let Err(reason) = &state.stream {
                complaints.push(reason.clone());
            }
            if let (Ok(()), Some(silence)) = (&state.stream, state.overdue) {
                let seconds = silence.as_secs();
                complaints.push(format!(
                    "postgres: the server has written WAL, and its stream has said nothing for {seconds} s"
                ));
            }
            if let (Ok(()), Some(what)) = (&state.stream, &state.left_behind) {
                complaints.push(format!("postgres: {what}"));
            }
            if let Err(reason) = &state.brokers {
                complaints.push(format!("kafka: {reason}"));
            }
            let asked = [
                (Server::Postgres, "postgres", state.stream.is_ok()),
                (
                    Server::Kafka,
                    "kafka",
                    state.stream.is_ok() && state.brokers.is_ok(),
                ),
            ];
            for (server, name, is_up) in asked {
                let silence = state.heard[server as usize].elapsed();
                if is_up && silence > SILENCE_MAX {
                    complaints.push(format!("{name}: no answer for {} s", silence.as_secs()));
                }
            }
            // What waits for a stream that is down is said with it.
            if let Some(waiting) = &state.waiting
                && state.stream.is_ok()
                && stalled > SILENCE_MAX
            {
                let seconds = stalled.as_secs();
                complaints.push(format!("no progress for {seconds} s: {waiting}"));
            }
            complaints.dedup();
            complaints
        })
    }

    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        f(&mut lock(&self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streaming() -> Health {
        let health = Health::default();
        health.streaming();
        health.brokers(Ok(()));
        health
    }

    #[test]
    fn says_what_is_down_and_why() {
        let health = Health::default();
        assert_eq!(
            health.complaints(),
            ["postgres: not connected yet", "kafka: not connected yet"]
        );
        health.streaming();
        health.brokers(Ok(()));
        assert!(health.complaints().is_empty());
        health.brokers(Err("no broker answers".to_owned()));
        assert_eq!(health.complaints(), ["kafka: no broker answers"]);
        // The same reason twice is said once.
        health.stopped(&Error::new(ErrorKind::BrokerAway, "no broker answers"));
        assert_eq!(health.complaints(), ["kafka: no broker answers"]);
        health.stopped(&Error::new(ErrorKind::SlotInUse, "slot \"a\" is in use"));
        assert_eq!(health.complaints()[0], "postgres: slot \"a\" is in use");
    }

    #[test]
    fn a_server_that_says_nothing_is_complained_of_while_it_is_asked() {
        let health = streaming();
        health.with(|state| state.heard[0] -= SILENCE_MAX * 2);
        assert_eq!(health.complaints(), ["postgres: no answer for 20 s"]);
        health.heard(Server::Postgres);
        assert!(health.complaints().is_empty());
        health.with(|state| state.heard[1] -= SILENCE_MAX * 2);
        assert_eq!(health.complaints(), ["kafka: no answer for 20 s"]);
        health.brokers(Err("no broker answers".to_owned()));
        assert_eq!(health.complaints(), ["kafka: no broker answers"]);
        health.brokers(Ok(()));
        health.stopped(&Error::new(ErrorKind::DatabaseAway, "gone"));
        assert_eq!(health.complaints(), ["postgres: gone"]);
        health.streaming();
        assert!(health.complaints().is_empty());
    }

    #[test]
    fn a_stream_that_owes_something_is_complained_of_while_it_is_up() {
        let health = streaming();
        health.overdue(Some(Duration::from_secs(11)));
        let complaints = health.complaints();
        assert_eq!(complaints.len(), 1);
        assert!(complaints[0].ends_with("for 11 s"), "{complaints:?}");
        health.stopped(&Error::new(ErrorKind::DatabaseAway, "gone"));
        assert_eq!(health.complaints(), ["postgres: gone"]);
        health.streaming();
        assert!(health.complaints().is_empty());
    }

    #[test]
    fn what_fills_the_disk_is_complained_of_while_events_flow() {
        let health = streaming();
        health.left_behind(Some("slot \"a\" is left".to_owned()));
        assert_eq!(health.complaints(), ["postgres: slot \"a\" is left"]);
        health.left_behind(None);
        assert!(health.complaints().is_empty());
    }

    #[test]
    fn standing_still_is_only_wrong_with_something_to_do() {
        let health = streaming();
        health.with(|state| state.moved -= SILENCE_MAX * 2);
        assert!(health.complaints().is_empty());
        let waiting = || Some("topic \"a\" is asked for".to_owned());
        health.waiting(waiting());
        assert!(health.complaints().is_empty());
        health.with(|state| state.moved -= SILENCE_MAX * 2);
        health.waiting(waiting());
        assert_eq!(
            health.complaints(),
            ["no progress for 20 s: topic \"a\" is asked for"]
        );
        health.moved();
        assert!(health.complaints().is_empty());
    }
}
