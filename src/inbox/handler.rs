//! What is done with a message.
//!
//! A handler in SQL or in Rust works in the transaction that says that the message was received,
//! and how far its partition was read: its effects happen once, whatever crashes. What it does
//! elsewhere happens again with each further try; and all that a service does, which is asked over
//! HTTP, is done elsewhere. So messages that a service has handled stay handled if others fail,
//! and nothing of it is rolled back.

pub(super) mod http;
pub(super) mod sql;

use std::any::Any;
use std::error::Error as StdError;
use std::future::poll_fn;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Transaction};

use super::batch::{Verdict, is_to_be_run_again};
use super::message::Message;
use crate::contract::Contract;
use crate::error::{Result, chain};
pub use http::Endpoint;
pub use sql::Function;

/// What a handler made of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is done.
    Completed,
    /// It is not for us; done, too.
    Skipped,
    /// It is to be tried again, after this time or when its turn comes; counts as an attempt.
    Retry(Option<Duration>),
    /// It will never do: a dead letter at once. Says why.
    Failed(String),
}

/// What a handler could not do. The message is tried again, less and less often, and after so
/// many attempts it is a dead letter.
pub type HandlerError = Box<dyn StdError + Send + Sync>;

/// What [`Handler::handle`] returns.
pub type Handling<'a> = Pin<Box<dyn Future<Output = Result<Outcome, HandlerError>> + Send + 'a>>;

/// Handles messages, in Rust.
///
/// What it writes through the transaction is committed with the message, or not at all. It may be
/// called again for a message of whose batch another failed, after all that it wrote was
/// rolled back.
pub trait Handler: Send + Sync {
    /// Handles one. Messages of a lane come in their order, one after the other.
    fn handle<'a>(&'a self, message: &'a Message, transaction: &'a Transaction<'a>)
    -> Handling<'a>;
}

/// How many characters are kept of why a message failed.
const WHY_MAX: usize = 4096;

/// What may only fail at the commit is checked, and is to be checked there again: the constraints
/// are as they were.
const CHECK_DEFERRED: &str = "SAVEPOINT deferred; SET CONSTRAINTS ALL IMMEDIATE; \
     ROLLBACK TO SAVEPOINT deferred; RELEASE SAVEPOINT deferred";

/// Who handles.
#[derive(Clone)]
pub enum Handlers {
    /// The application, which takes them from the table.
    Application,
    /// A function of the database.
    Sql(Function),
    /// A service.
    Http(Endpoint),
    /// A program.
    Rust(Arc<dyn Handler>),
}

impl std::fmt::Debug for Handlers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Application => f.write_str("none"),
            Self::Sql(function) => write!(f, "sql:{}", function.name()),
            Self::Http(endpoint) => write!(f, "{endpoint:?}"),
            Self::Rust(_) => f.write_str("rust"),
        }
    }
}

impl Handlers {
    /// Makes sure that it is there.
    pub(super) async fn prepare(
        &self,
        client: &Client,
        contract: &Contract,
        group: &str,
    ) -> Result<Working> {
        Ok(match self {
            Self::Application => Working::Application,
            Self::Sql(function) => Working::Sql(function.prepare(client, contract, group).await?),
            Self::Http(endpoint) => Working::Http(Box::new(endpoint.open()?)),
            Self::Rust(handler) => Working::Rust(handler.clone()),
        })
    }
}

/// A handler that is there.
pub(super) enum Working {
    Application,
    Sql(sql::Prepared),
    Http(Box<http::Service>),
    Rust(Arc<dyn Handler>),
}

/// Why messages came to nothing: all that was written since the savepoint is to be rolled back.
#[derive(Debug)]
pub(super) struct Failure {
    /// Which of them failed, if that is known.
    pub(super) at: Option<usize>,
    pub(super) why: String,
    pub(super) again: Again,
    pub(super) took_too_long: bool,
}

/// When a message is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Again {
    InTurn,
    After(Duration),
    Never,
}

impl Failure {
    fn new(at: Option<usize>, why: impl AsRef<str>, again: Again) -> Self {
        // Text in Postgres has no NUL.
        let storable = |c| {
            if c == '\0' {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        };
        Self {
            at,
            why: why.as_ref().chars().take(WHY_MAX).map(storable).collect(),
            again,
            took_too_long: false,
        }
    }

    fn too_long(at: Option<usize>, limit: Duration) -> Self {
        let limit = crate::duration::in_words(limit);
        Self {
            took_too_long: true,
            ..Self::new(at, format!("not done within {limit}"), Again::InTurn)
        }
    }
}

impl Working {
    /// Handles messages in their order, all or none. The outer error is about the transaction,
    /// which is to be run again; the inner one has at least one failure.
    pub(super) async fn handle(
        &self,
        transaction: &Transaction<'_>,
        messages: &[&Message],
        limit: Duration,
    ) -> Result<Result<Vec<Verdict>, Vec<Failure>>, tokio_postgres::Error> {
        let mut verdicts = Vec::with_capacity(messages.len());
        let unnamed = |error: &tokio_postgres::Error| {
            Ok(Err(vec![Failure::new(
                None,
                in_words(error),
                Again::InTurn,
            )]))
        };
        match self {
            Self::Application => verdicts.resize(messages.len(), Verdict::Stored),
            Self::Sql(function) => match function.call(transaction, messages).await {
                Ok(outcomes) => {
                    let mut failures = Vec::new();
                    for (at, outcome) in outcomes.into_iter().enumerate() {
                        match verdict(at, outcome) {
                            Ok(verdict) => verdicts.push(verdict),
                            Err(failure) => failures.push(failure),
                        }
                    }
                    if !failures.is_empty() {
                        return Ok(Err(failures));
                    }
                }
                Err(error) if is_nobodys_fault(&error) => return Err(error),
                Err(error) if error.code() == Some(&SqlState::QUERY_CANCELED) => {
                    return Ok(Err(vec![Failure::too_long(None, limit)]));
                }
                Err(error) => return unnamed(&error),
            },
            Self::Http(_) => unreachable!("nothing of it can be rolled back: `Trial::ask`"),
            Self::Rust(handler) => {
                let calls = async {
                    for (at, message) in messages.iter().enumerate() {
                        match call(&**handler, message, transaction, at, limit).await? {
                            Ok(verdict) => verdicts.push(verdict),
                            Err(failure) => return Ok(Err(failure)),
                        }
                    }
                    Ok(Ok(()))
                };
                if let Err(failure) = kept_open(transaction, calls).await? {
                    return Ok(Err(vec![failure]));
                }
            }
        }
        match transaction.batch_execute(CHECK_DEFERRED).await {
            Ok(()) => Ok(Ok(verdicts)),
            Err(error) if is_nobodys_fault(&error) => Err(error),
            Err(error) => unnamed(&error),
        }
    }
}

/// How often the server hears of a transaction in which nothing is done.
const PULSE: Duration = Duration::from_secs(2);

/// Does something that may take long beside a transaction, which would be ended for that: the
/// server takes a session that says nothing for lost, as it has rows locked.
pub(super) async fn kept_open<T>(
    transaction: &Transaction<'_>,
    work: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, tokio_postgres::Error> {
    let pulse = async {
        loop {
            tokio::time::sleep(PULSE).await;
            transaction.batch_execute("").await?;
        }
    };
    tokio::select! {
        biased;
        done = work => done,
        ended = pulse => ended,
    }
}

/// Calls it for one message.
async fn call(
    handler: &dyn Handler,
    message: &Message,
    transaction: &Transaction<'_>,
    at: usize,
    limit: Duration,
) -> Result<Result<Verdict, Failure>, tokio_postgres::Error> {
    let failed = |why: String| Ok(Err(Failure::new(Some(at), why, Again::InTurn)));
    let Ok(mut handling) = catch_unwind(AssertUnwindSafe(|| handler.handle(message, transaction)))
    else {
        return failed("the handler panicked".to_owned());
    };
    let unwound = poll_fn(|context| {
        let polled = catch_unwind(AssertUnwindSafe(|| handling.as_mut().poll(context)));
        match polled {
            Ok(Poll::Pending) => Poll::Pending,
            Ok(Poll::Ready(handled)) => Poll::Ready(Ok(handled)),
            Err(panic) => Poll::Ready(Err(panic)),
        }
    });
    match tokio::time::timeout(limit, unwound).await {
        // Its statement, if one is running, is ended by the same limit.
        Err(_) => Ok(Err(Failure::too_long(Some(at), limit))),
        Ok(Err(panic)) => failed(format!("the handler panicked: {}", panicked(&*panic))),
        Ok(Ok(Ok(outcome))) => Ok(verdict(at, outcome)),
        Ok(Ok(Err(error))) => match error.downcast::<tokio_postgres::Error>() {
            Ok(error) if is_nobodys_fault(&error) => Err(*error),
            Ok(error) => failed(in_words(&error)),
            Err(error) => failed(chain(&*error)),
        },
    }
}

fn verdict(at: usize, outcome: Outcome) -> Result<Verdict, Failure> {
    match outcome {
        Outcome::Completed => Ok(Verdict::Completed),
        Outcome::Skipped => Ok(Verdict::Skipped),
        Outcome::Retry(after) => {
            let again = after.map_or(Again::InTurn, Again::After);
            Err(Failure::new(
                Some(at),
                "the handler asks for another try",
                again,
            ))
        }
        Outcome::Failed(why) => Err(Failure::new(Some(at), why, Again::Never)),
    }
}

/// Whether it is the transaction that failed, or the session, and no message.
fn is_nobodys_fault(error: &tokio_postgres::Error) -> bool {
    let is_session =
        error.is_closed() || error.source().is_some_and(<dyn StdError>::is::<io::Error>);
    is_session || is_to_be_run_again(error)
}

/// What the database says of a failure.
fn in_words(error: &tokio_postgres::Error) -> String {
    let Some(refusal) = error.as_db_error() else {
        return chain(error);
    };
    let mut words = format!("{} (SQLSTATE {})", refusal.message(), refusal.code().code());
    if let Some(place) = refusal.where_() {
        words += "; ";
        words += place;
    }
    words
}

fn panicked(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or(panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a word")
}
