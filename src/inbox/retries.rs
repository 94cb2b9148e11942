//! What waits in the table is tried again, beside the stream of new messages.
//!
//! Of a lane only the first message has a time; those behind it wait at infinity until whoever
//! reads the stream has them go on (`Store::promote`): it alone adds to a lane, so it alone can
//! tell when none is left. An attempt is counted, and the next one put off, before the handler
//! begins, in a transaction of its own: a message that ends the process has been counted. Those
//! that were never begun are begun together, as many as a batch has; those that were, each alone,
//! so that what ends the process costs the others one attempt.
//!
//! The handler's transaction locks the partition's row against whoever takes the partition, but
//! not against the batches of our own stream.

use std::collections::{BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Transaction};
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
    let session = settings.session("postbox inbox retries").await?;
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
        let run = match places.is_empty() || work.away().is_some() {
            true => Vec::new(),
            false => work.store.take_run(&session.client, &work, &places).await?,
        };
        if !run.is_empty() {
            pause = LOOK_MIN;
            failpoint!("inbox_taken");
            for lane in try_again(&mut session.client, &work, &places, &run).await? {
                if settled.send(lane).is_err() {
                    return Ok(());
                }
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

/// The lanes that can go on.
async fn try_again(
    client: &mut Client,
    work: &Work,
    places: &[Ours],
    run: &[Due],
) -> Result<HashSet<Lane>> {
    let again = run.iter().filter(|due| due.attempts > 1).count();
    work.metrics.retries.inc_by(again as u64);
    loop {
        match once(client, work, places, run).await {
            Ok(lanes) => return Ok(lanes),
            Err(error) if batch::is_to_be_run_again(&error) => {
                tokio::time::sleep(LOOK_MIN).await;
            }
            Err(error) => return Err(sort("try messages again", error)),
        }
    }
}

async fn once(
    client: &mut Client,
    work: &Work,
    places: &[Ours],
    run: &[Due],
) -> Result<HashSet<Lane>, tokio_postgres::Error> {
    let Work { store, .. } = work;
    let mut transaction = client.transaction().await?;
    let of: BTreeSet<usize> = run.iter().map(|due| due.place).collect();
    for ours in of.into_iter().map(|place| &places[place]) {
        if !store
            .hold_place(&transaction, &ours.place, ours.epoch)
            .await?
        {
            return Ok(HashSet::new());
        }
    }
    let held = store.hold(&transaction, run).await?;
    let held = |due: &&Due| held.contains(&(due.lane.source, due.id));
    let tried: Vec<&Due> = run.iter().filter(held).collect();
    let verdicts = try_each(&mut transaction, work, &tried).await?;
    let mut lanes: HashSet<Lane> = run.iter().map(|due| due.lane).collect();
    let (mut done, mut untried) = (Vec::new(), Vec::new());
    for (due, verdict) in tried.into_iter().zip(verdicts) {
        let outcome = [verdict.name(), &*due.message.event_type];
        match verdict {
            Verdict::Completed | Verdict::Skipped => done.push(due),
            Verdict::Failed(why, None) => {
                store.give_up(&transaction, due, &why).await?;
                error!(
                    message_id = due.message.id.text.as_str(),
                    topic = &*due.message.topic,
                    attempts = due.attempts,
                    "dead letter: {why}"
                );
            }
            Verdict::Failed(why, Some(pause)) => {
                store.fail(&transaction, due, &why, pause).await?;
                lanes.remove(&due.lane);
                warn!(
                    message_id = due.message.id.text.as_str(),
                    topic = &*due.message.topic,
                    attempts = due.attempts,
                    "failed: {why}"
                );
            }
            Verdict::Away(why, pause) => {
                store.wait(&transaction, due, &why, pause).await?;
                lanes.remove(&due.lane);
            }
            // What a person has tried again: who is to handle it is not known to them.
            Verdict::Stored => store.hand_over(&transaction, due).await?,
            Verdict::Behind | Verdict::Suspect => {
                untried.push(due);
                lanes.remove(&due.lane);
                continue;
            }
        }
        work.metrics.handled.with_label_values(&outcome).inc();
    }
    store.forget(&transaction, done).await?;
    store.put_back(&transaction, untried).await?;
    failpoint!("inbox_retried");
    transaction.commit().await?;
    Ok(lanes)
}

async fn try_each(
    transaction: &mut Transaction<'_>,
    work: &Work,
    run: &[&Due],
) -> Result<Vec<Verdict>, tokio_postgres::Error> {
    // It is alone: others of a run were not begun before.
    if run.iter().any(|due| due.attempts > work.attempts.max) {
        let why = "its last attempt did not end: the process did, or its session";
        return Ok(vec![Verdict::Failed(why.to_owned(), None); run.len()]);
    }
    let entries = run.iter().map(|due| Entry {
        message: &due.message,
        id: due.id,
        // It was received once and for all.
        dedup: due.lane.source,
        lane: due.lane,
        attempt: due.attempts,
        is_suspect: false,
    });
    let entries: Vec<Entry<'_>> = entries.collect();
    batch::try_all(transaction, work, &entries, &HashSet::new()).await
}
