//! Which of the events that wait are meant.

use std::fmt;
use std::time::Duration;

use tokio_postgres::types::{ToSql, Type};

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

    /// The condition on a row under this alias; its parameters are the first eight.
    pub(super) fn condition(alias: &str) -> String {
        format!(
            "($1::text[] IS NULL OR {alias}.id = ANY ($1)) \
             AND ($2::text IS NULL OR {alias}.relay = $2) \
             AND {alias}.status = ANY ($3::text[]) \
             AND ($4::text IS NULL OR {alias}.topic = $4) \
             AND ($5::text IS NULL OR {alias}.key = $5) \
             AND ($6::text IS NULL OR {alias}.event_type = $6) \
             AND ($7::text IS NULL OR strpos({alias}.error, $7) > 0) \
             AND ($8::float8 IS NULL OR {alias}.parked_at <= clock_timestamp() - make_interval(secs => $8))"
        )
    }

    pub(super) fn parameters(&self) -> Parameters<'_> {
        let statuses = match (self.statuses.is_empty(), self.ids.is_empty()) {
            (false, _) => self.statuses.as_slice(),
            (true, true) => &[Status::Waiting, Status::Dead],
            (true, false) => &Status::ALL,
        };
        Parameters {
            ids: (!self.ids.is_empty()).then_some(&self.ids),
            statuses: statuses.iter().map(|status| status.name()).collect(),
            seconds: self.older_than.map(|time| time.as_secs_f64()),
            filter: self,
        }
    }
}

/// A filter as the parameters of a statement.
pub(super) struct Parameters<'a> {
    ids: Option<&'a Vec<String>>,
    statuses: Vec<&'static str>,
    seconds: Option<f64>,
    filter: &'a Filter,
}

impl Parameters<'_> {
    pub(super) fn typed(&self) -> [(&(dyn ToSql + Sync), Type); 8] {
        [
            (&self.ids, Type::TEXT_ARRAY),
            (&self.filter.relay, Type::TEXT),
            (&self.statuses, Type::TEXT_ARRAY),
            (&self.filter.topic, Type::TEXT),
            (&self.filter.key, Type::TEXT),
            (&self.filter.event_type, Type::TEXT),
            (&self.filter.error, Type::TEXT),
            (&self.seconds, Type::FLOAT8),
        ]
    }
}
