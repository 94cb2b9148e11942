//! Which of the events that wait are meant.

use std::fmt;
use std::time::Duration;

use crate::selection::{Columns, Parameters, statuses};

/// What an event waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// Its time.
    Scheduled,
    /// Another try; later events of its key wait behind it.
    Waiting,
    /// A person: it was given up after its attempts, and holds nobody.
    Dead,
    /// Nothing: a person gave it up.
    Skipped,
}

impl Status {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Scheduled, Self::Waiting, Self::Dead, Self::Skipped];

    /// As it is written in the table, and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled",
            Self::Waiting => "waiting",
            Self::Dead => "dead",
            Self::Skipped => "skipped",
        }
    }

    pub(super) fn read(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.name() == name)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which events are meant: those that fit everything that is said. Without anything:
/// those that wait for another try, and the dead.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Of these ids; none: of any.
    pub ids: Vec<String>,
    /// Of this relay.
    pub relay: Option<String>,
    /// Of one of these; none: waiting and dead, and with ids any.
    pub statuses: Vec<Status>,
    /// For this topic.
    pub topic: Option<String>,
    /// Of this record key.
    pub key: Option<String>,
    /// Of this type.
    pub event_type: Option<String>,
    /// Whose last error has this text in it, upper and lower case as they are.
    pub error: Option<String>,
    /// That have waited for so long, by the server's clock.
    pub older_than: Option<Duration>,
}

impl Filter {
    /// Whether nothing is said, so that all are meant.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What it is about, in a row under this alias.
    pub(super) fn columns(alias: &str) -> Columns {
        let column = |name| format!("{alias}.{name}");
        Columns {
            id: column("id"),
            owner: column("relay"),
            status: column("status"),
            topic: column("topic"),
            key: column("key"),
            event_type: column("event_type"),
            error: column("error"),
            since: column("parked_at"),
        }
    }

    /// The condition on a row under this alias; its parameters are the first eight.
    pub(super) fn condition(alias: &str) -> String {
        Self::columns(alias).condition()
    }

    pub(super) fn parameters(&self) -> Parameters<'_> {
        let said: Vec<_> = self.statuses.iter().map(|status| status.name()).collect();
        let has_ids = !self.ids.is_empty();
        Parameters {
            ids: has_ids.then_some(&self.ids),
            owner: self.relay.as_deref(),
            statuses: statuses(&said, has_ids, &Status::ALL.map(Status::name)),
            topic: self.topic.as_deref(),
            key: self.key.as_deref(),
            event_type: self.event_type.as_deref(),
            error: self.error.as_deref(),
            seconds: self.older_than.map(|time| time.as_secs_f64()),
        }
    }
}
