//! From nothing to a stream that is ours.
//!
//! Three connections, in an order that takes nothing from another relay before this
//! one can do its work: a session that checks what was set up, the brokers, and then
//! the slot. Only the relay that holds the slot may claim the checkpoint, and only
//! then may it read what the checkpoint says is missing.

use std::pin::pin;
use std::time::Duration;

use super::{Relay, RelaySettings};
use crate::catalog::{self, Checkpoint};
use crate::database::{Session, sort};
use crate::error::{Error, ErrorKind, Result};
use crate::health::SILENCE_MAX;
use crate::publisher::Publisher;
use crate::source::Source;
use crate::source::wal::{Stream, WalSettings};

/// What an attempt is made of.
pub(super) struct Connected {
    pub(super) session: Session,
    /// As this relay claimed it.
    pub(super) checkpoint: Checkpoint,
    pub(super) publisher: Publisher,
    pub(super) stream: Stream,
    /// What this relay's fences are known by.
    pub(super) nonce: String,
}

/// How long a broker may take to give a sign of life.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) async fn connect(relay: &Relay) -> Result<Connected> {
    let settings = &relay.settings;
    let (session, checkpoint) = open_session(settings).await?;
    failpoint!("checked");
    let publisher = reach_brokers(relay).await?;
    let nonce = uuid::Uuid::new_v4().to_string();
    let mut stream = open_stream(settings, &session, checkpoint, &nonce).await?;
    failpoint!("opened");
    // What was checked was read before the slot was ours.
    let checkpoint = answered(catalog::claim(&session.client, &settings.contract)).await?;
    if let Some(gap) = checkpoint.gap.clone() {
        let begun = stream.read_first(&settings.database, gap, checkpoint.lsn);
        begun.await?;
    }
    Ok(Connected {
        session,
        checkpoint,
        publisher,
        stream,
        nonce,
    })
}

/// A session that has found everything in its place.
async fn open_session(settings: &RelaySettings) -> Result<(Session, Checkpoint)> {
    let name = format!("postbox {} control", settings.contract.slot);
    let session = settings.database.connect(&name).await?;
    // What we no longer wait for must not stay behind in the server: a statement that
    // waits for a lock does not notice that its client has gone.
    let limit = format!("SET statement_timeout = {}", SILENCE_MAX.as_millis());
    let limited = async {
        let done = session.client.batch_execute(&limit).await;
        done.map_err(|error| sort("limit statements", error))?;
        catalog::check(&session.client, &settings.contract).await
    };
    let checkpoint = answered(limited).await?;
    Ok((session, checkpoint))
}

/// What Postgres answers before there is a heartbeat. A connection that died without
/// a word would be waited for until the system gives it up.
async fn answered<T>(answer: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(SILENCE_MAX, answer).await {
        Ok(answer) => answer,
        Err(_) => {
            let seconds = SILENCE_MAX.as_secs();
            let message = format!("read what was set up: no answer within {seconds} s");
            Err(Error::new(ErrorKind::DatabaseAway, message))
        }
    }
}

/// A producer whose brokers answer: the slot is only taken by a relay that can
/// deliver.
async fn reach_brokers(relay: &Relay) -> Result<Publisher> {
    let publisher = Publisher::new(relay.settings.kafka.clone(), relay.batch_bytes)?;
    let mut probe = pin!(publisher.probe(PROBE_TIMEOUT));
    let answer = loop {
        tokio::select! {
            answer = &mut probe => break answer,
            // Nothing was sent yet, so that this is a refusal: no need to wait for
            // an answer.
            () = publisher.reported() => publisher.take_reports(&mut Vec::new())?,
        }
    };
    publisher.take_reports(&mut Vec::new())?;
    if let Err(error) = answer {
        relay.health.brokers(Err(error.chain()));
        return Err(error);
    }
    relay.health.brokers(Ok(()));
    Ok(publisher)
}

/// The stream, unless the ordinary session ends first: the server is then going
/// away, or is not the one that was checked.
async fn open_stream(
    settings: &RelaySettings,
    session: &Session,
    checkpoint: Checkpoint,
    nonce: &str,
) -> Result<Stream> {
    let wal = WalSettings {
        slot: settings.contract.slot.clone(),
        source: Source {
            schema: settings.contract.schema.clone(),
            table: "outbox".to_owned(),
            publication: settings.contract.publication.clone(),
            nonce: nonce.to_owned(),
        },
        system: checkpoint.system,
        start: checkpoint.lsn,
        status_interval: settings.status_interval,
        wal_sender_timeout: settings.wal_sender_timeout,
    };
    tokio::select! {
        stream = Stream::open(&settings.database, wal) => stream,
        error = session.ended() => Err(error),
    }
}
