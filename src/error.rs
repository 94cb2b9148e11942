//! What can go wrong, sorted by what must be done about it.
//!
//! An error is either *transient*, and the relay tries again for as long as it
//! takes, or *definite*, and the process ends with an exit code that says where
//! to look. Unknown means transient: a relay that stops over a hiccup loses
//! more than one that tries once too often. `docs/errors.md` lists them all.

use std::error::Error as StdError;
use std::fmt;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What a relay does about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// It stands by, and takes over as soon as it can.
    Wait,
    /// It begins again where the slot was confirmed, after a pause that grows with
    /// each attempt in vain.
    Retry,
    /// It ends with an exit code.
    Stop,
}

/// Where an error belongs, which decides whether to retry and how to exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A flag, a variable or a combination of them that cannot work.
    Settings,
    /// The database refuses for a reason that waiting will not mend.
    Database,
    /// The replication slot is missing, lost, or not ours to use.
    Slot,
    /// The publication is missing, wrong, or not the one that was set up.
    Publication,
    /// A right or a password is missing, in Postgres or in Kafka.
    Rights,
    /// The broker refuses for a reason that waiting will not mend.
    Broker,
    /// An event that can never go out as it is.
    Event,
    /// The shutdown timeout ended before everything was delivered.
    NotDrained,
    /// A defect of ours, or of the machine.
    Unexpected,
    /// Another process uses the replication slot; we stand by. Transient.
    SlotInUse,
    /// Postgres is away or ended the session. Transient.
    DatabaseAway,
    /// Kafka is away or failed a delivery. Transient.
    BrokerAway,
}

impl ErrorKind {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::SlotInUse,
        Self::DatabaseAway,
        Self::BrokerAway,
        Self::Unexpected,
        Self::Settings,
        Self::Database,
        Self::Slot,
        Self::Publication,
        Self::Rights,
        Self::Broker,
        Self::Event,
        Self::NotDrained,
    ];

    /// What a relay does about it.
    pub fn class(self) -> Class {
        match self {
            Self::SlotInUse => Class::Wait,
            Self::DatabaseAway | Self::BrokerAway => Class::Retry,
            _ => Class::Stop,
        }
    }

    /// Whether trying again can help.
    pub fn is_transient(self) -> bool {
        self.class() != Class::Stop
    }

    /// The exit code of a process that ends with this error. A one-shot command
    /// ends on transient errors too.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Unexpected => 1,
            Self::Settings => 2,
            Self::Database | Self::DatabaseAway => 3,
            Self::Slot | Self::SlotInUse => 4,
            Self::Publication => 5,
            Self::Rights => 6,
            Self::Broker | Self::BrokerAway => 7,
            Self::Event => 8,
            Self::NotDrained => 9,
        }
    }

    /// A short name, used as a metric label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Settings => "settings",
            Self::Database => "database",
            Self::Slot => "slot",
            Self::Publication => "publication",
            Self::Rights => "rights",
            Self::Broker => "broker",
            Self::Event => "event",
            Self::NotDrained => "not_drained",
            Self::Unexpected => "unexpected",
            Self::SlotInUse => "slot_in_use",
            Self::DatabaseAway => "database_away",
            Self::BrokerAway => "broker_away",
        }
    }
}

/// What failed, why, and what to do about it.
///
/// `Display` prints this error alone; the cause is its `source`. Print the whole
/// chain once, where it is handled, with [`Error::chain`] or anyhow's `{:#}`.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error without a cause. `message` is lower case, without a full stop,
    /// and ends with the next step where there is one.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            source: None,
        }
    }

    /// Adds the cause.
    #[must_use]
    pub fn caused_by(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Where the error belongs.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The error and its causes in one line.
    pub fn chain(&self) -> String {
        chain(self)
    }
}

/// Any error and its causes in one line.
pub(crate) fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Some libraries repeat the cause in their own text.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}

/// The result of a task, also of one that was ended or has panicked.
#[cfg(feature = "relay")]
pub(crate) fn joined<T>(task: Result<Result<T>, tokio::task::JoinError>) -> Result<T> {
    task.map_err(|error| Error::new(ErrorKind::Unexpected, "a task ended").caused_by(error))?
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_prints_each_cause_once() {
        let io = std::io::Error::other("connection refused");
        let error = Error::new(ErrorKind::DatabaseAway, "connect to \"db\"").caused_by(io);
        assert_eq!(error.chain(), "connect to \"db\": connection refused");
        assert_eq!(error.to_string(), "connect to \"db\"");
    }
}
