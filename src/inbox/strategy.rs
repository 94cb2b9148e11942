//! When a message counts as received: before it is handled, with that, or after it.
//!
//! | what happens | at-most-once | at-least-once, on-persist | at-least-once, on-success | exactly-once |
//! |---|---|---|---|---|
//! | it is read | id and offset are committed for its batch, then it is handled | id, offset and the whole message are committed for its batch, then it is handled from the table | id, offset and effects are committed with it alone | id, offset and effects are committed with its batch |
//! | the handler fails | it is a dead letter | it and its lane wait in the table | the same | the same |
//! | it fails `--max-attempts` times | – | it is a dead letter, its lane goes on | the same | the same |
//! | the process ends before it is handled | it is lost, and up to a batch with it | it is handled from the table | it is read again | it is read again, with its batch |
//! | the process ends with a handler at work | the same | an attempt is counted, and it is tried alone | it is read again and tried from the table, alone | the same, with its batch |
//! | it is produced again | it is not handled | the same | the same | the same |
//!
//! # What is misleading
//!
//! What a handler writes to our database is rolled back with its attempt, whatever the strategy:
//! effects there are never repeated. What it does elsewhere is repeated by each further attempt,
//! and by each message of a batch that fails beside it. So a handler that sends letters or calls
//! others is called for one message at a time by `at-most-once` and `on-success`, and by
//! `on-success` for the next one only once this one is committed.
//!
//! A service that is asked over HTTP is asked for several messages at once, of different lanes: so
//! `on-success` commits as many together. It can have no `exactly-once`, as nothing that it does is
//! rolled back.
//!
//! `at-most-once` calls a handler again for one thing: a transaction that the database itself
//! has broken off, for a deadlock or a serialization failure.

use super::batch::Attempts;

/// When a message counts as received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ack {
    /// Before it is handled.
    AtMostOnce,
    /// When this has happened.
    AtLeastOnce(CommitOn),
    /// With its effects, in the transaction of its batch.
    ExactlyOnce,
}

/// What must have happened before a message counts as received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommitOn {
    /// It is in the table.
    Persist,
    /// It is handled, or given up.
    Success,
}

impl Ack {
    /// Whether each message is handled from the table.
    pub(super) fn stores_first(self) -> bool {
        self == Self::AtLeastOnce(CommitOn::Persist)
    }

    /// Whether what may have been at work when a consumer ended is read again.
    pub(super) fn reads_again(self) -> bool {
        self != Self::AtMostOnce
    }

    /// How often a message is tried.
    pub(super) fn attempts(self, mut attempts: Attempts) -> Attempts {
        if self == Self::AtMostOnce {
            attempts.max = 1;
        }
        attempts
    }
}
