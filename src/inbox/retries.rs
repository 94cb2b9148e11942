//! What waits in the table is tried again, beside the stream of new messages.
//!
//! Of a lane only the first message has a time; those behind it wait at infinity until whoever
//! reads the stream has them go on (`Store::promote`): it alone adds to a lane, so it alone can
//! tell when none is left. An attempt is counted, and the next one put off, before the handler
//! begins, in a transaction of its own: a message that ends the process has been counted.
//!
//! The handler's transaction locks the partition's row against whoever takes the partition, but
//! not against the batches of our own stream.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tracing::{error, warn};

use super::InboxSettings;
use super::batch::{self, Entry, Lane, Verdict, Work};
use super::consumer::Place;
use super::store::Due;
use crate::database::{Session, sort};
use crate::error::Result;

/// A partition that is ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ours {
    pub(super) place: Place,
    pub(super) source: i32,
    pub(super) epoch: i64,
}

/// How long to wait before the table is looked at again, if nothing is due.
const LOOK_MIN: Duration = Duration::from_millis(50);
const LOOK_MAX: Duration = Duration::from_secs(1);

/// Begins, with a session of its own.
pub(super) async fn spawn(
    settings: &InboxSettings,
    work: Arc<Work>,
    ours: watch::Receiver<Vec<Ours>>,
    settled: mpsc::UnboundedSender<Lane>,
) -> Result<JoinHandle<Result<()>>> {
    let session = settings.database.connect("postbox inbox retries").await?;
    Ok(tokio::spawn(run(session, work, ours, settled)))
}

async fn run(
    mut session: Session,
    work: Arc<Work>,
    mut ours: watch::Receiver<Vec<Ours>>,
    settled: mpsc::UnboundedSender<Lane>,
) -> Result<()> {
    let mut pause = LOOK_MIN;
    loop {
        let places = ours.borrow_and_update().clone();
        // One at a time: those that were taken with one that ends the process would be
        // counted, too.
        let taken = match places.is_empty() {
            true => None,
            false => {
                let taken = work
                    .store
                    .take_due(&session.client, &work.attempts, &places);
                taken.await?
            }
        };
        if let Some(taken) = taken {
            pause = LOOK_MIN;
            work.metrics.retries.inc();
            let ours = &places[taken.place];
            let is_settled = try_again(&mut session.client, &work, ours, &taken).await?;
            if is_settled && settled.send(taken.lane).is_err() {
                return Ok(());
            }
            continue;
        }
        pause = (pause * 2).min(LOOK_MAX);
        tokio::select! {
            changed = ours.changed() => if changed.is_err() {
                return Ok(());
            } else {
                pause = LOOK_MIN;
            },
            () = work.promoted.notified() => pause = LOOK_MIN,
            () = tokio::time::sleep(pause) => {}
            error = session.ended() => return Err(error),
        }
    }
}

/// Whether its lane can go on.
async fn try_again(client: &mut Client, work: &Work, ours: &Ours, taken: &Due) -> Result<bool> {
    loop {
        match once(client, work, ours, taken).await {
            Ok(is_settled) => return Ok(is_settled),
            Err(error) if batch::is_to_be_run_again(&error) => {
                tokio::time::sleep(LOOK_MIN).await;
            }
            Err(error) => return Err(sort("try a message again", error)),
        }
    }
}

async fn once(
    client: &mut Client,
    work: &Work,
    ours: &Ours,
    taken: &Due,
) -> Result<bool, tokio_postgres::Error> {
    let Work { store, .. } = work;
    let mut transaction = client.transaction().await?;
    if !store.hold(&transaction, ours, taken).await? {
        return Ok(false);
    }
    let verdict = if taken.attempts > work.attempts.max {
        let why = "its last attempt did not end: the process did, or its session";
        Verdict::Failed(why.to_owned(), None)
    } else {
        let entries = [Entry {
            message: &taken.message,
            id: taken.id,
            // It was received once and for all.
            dedup: taken.lane.source,
            lane: taken.lane,
            attempt: taken.attempts,
            is_suspect: false,
        }];
        let blocked = HashSet::new();
        let tried = batch::try_all(&mut transaction, work, &entries, &blocked);
        tried.await?.pop().expect("one for each")
    };
    let id = &taken.message.id.text;
    let is_settled = match verdict {
        Verdict::Failed(why, None) => {
            store.give_up(&transaction, taken, &why).await?;
            error!(
                message_id = id.as_str(),
                topic = &*taken.message.topic,
                attempts = taken.attempts,
                "dead letter: {why}"
            );
            true
        }
        Verdict::Failed(why, Some(pause)) => {
            store.fail(&transaction, taken, &why, pause).await?;
            warn!(
                message_id = id.as_str(),
                topic = &*taken.message.topic,
                attempts = taken.attempts,
                "failed again: {why}"
            );
            false
        }
        Verdict::Completed | Verdict::Skipped => {
            store.forget(&transaction, taken).await?;
            true
        }
        // What a person has tried again: who is to handle it is not known to them.
        Verdict::Stored => {
            store.hand_over(&transaction, taken).await?;
            true
        }
        Verdict::Suspect | Verdict::Behind => false,
    };
    transaction.commit().await?;
    Ok(is_settled)
}
