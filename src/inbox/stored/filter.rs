//! Which of the messages in the table are meant.

use std::fmt;
use std::time::Duration;

use crate::selection::{Columns, Parameters, statuses};

/// What is to become of a message in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// The application takes it.
    Stored,
    /// It is tried again; later messages of its key wait behind it.
    Waiting,
    /// Nobody tries it: it was given up after its attempts, and holds nobody.
    Dead,
    /// Nothing: a person gave it up.
    Skipped,
}

impl Status {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Stored, Self::Waiting, Self::Dead, Self::Skipped];

    /// As it is written in the table, and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stored => "stored",
            Self::Waiting => "waiting",
            Self::Dead => "dead",
            Self::Skipped => "skipped",
        }
    }

    pub(super) fn read(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.name() == name)
    }

    /// Whether it may still be handled.
    pub const fn is_open(self) -> bool {
        matches!(self, Self::Stored | Self::Waiting)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which messages are meant: those that fit everything that is said. Without anything:
/// those that wait for another try, and the dead.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Of these ids; none: of any.
    pub ids: Vec<String>,
    /// Of this consumer group.
    pub group: Option<String>,
    /// Of one of these; none: waiting and dead, and with ids any.
    pub statuses: Vec<Status>,
    /// Of this topic.
    pub topic: Option<String>,
    /// Of this record key.
    pub key: Option<String>,
    /// Of this type.
    pub event_type: Option<String>,
    /// Whose last error has this text in it, upper and lower case as they are.
    pub error: Option<String>,
    /// That were received so long ago, by the server's clock.
    pub older_than: Option<Duration>,
}

impl Filter {
    /// Whether nothing is said, so that all are meant.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// What it is about, in [`ROWS`](super::ROWS).
    pub(super) fn columns() -> Columns {
        Columns {
            id: "m.message_id".to_owned(),
            owner: "s.consumer_group".to_owned(),
            status: "m.status".to_owned(),
            topic: "s.topic".to_owned(),
            key: "m.key".to_owned(),
            event_type: "m.event_type".to_owned(),
            error: "m.error".to_owned(),
            since: "m.received_at".to_owned(),
        }
    }

    pub(super) fn parameters(&self) -> Parameters<'_> {
        let said: Vec<_> = self.statuses.iter().map(|status| status.name()).collect();
        let has_ids = !self.ids.is_empty();
        Parameters {
            ids: has_ids.then_some(&self.ids),
            owner: self.group.as_deref(),
            statuses: statuses(&said, has_ids, &Status::ALL.map(Status::name)),
            topic: self.topic.as_deref(),
            key: self.key.as_deref(),
            event_type: self.event_type.as_deref(),
            error: self.error.as_deref(),
            seconds: self.older_than.map(|time| time.as_secs_f64()),
        }
    }
}
