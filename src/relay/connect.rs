//! From nothing to a source that is ours.
//!
//! Connections are opened in an order that takes nothing from another relay before this
//! one can do its work: a session that checks what was set up, the brokers, and then
//! the slot, or a session that reads the table. Only the relay that holds the slot may
//! claim the checkpoint, and only then may it read what the checkpoint says is missing.
//!
//! A divided relay that is to serve other slices goes on with the connections it has.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use postgres_protocol::escape::escape_literal;
use tokio::time::Instant;
use tokio_postgres::Client;
use tracing::{info, warn};

use super::control::Hold;
use super::division::Division;
use super::marks::Marks;
use super::parking::Parking;
use super::{Relay, RelaySettings};
use crate::catalog::{self, Checkpoint, LEASE, Mode, Stored, System};
use crate::contract::Contract;
use crate::database::{Session, sort, within};
use crate::error::{Error, ErrorKind, Result};
use crate::health::SILENCE_MAX;
use crate::parked::store::Store;
use crate::publisher::Publisher;
use crate::source::claim::{ClaimSettings, Claimer};
use crate::source::poll::{PollSettings, Poller};
use crate::source::wal::{Stream, WalSettings};
use crate::source::{Outbox, Place, Source};

/// What an attempt is made of.
pub(super) struct Connected {
    pub(super) session: Arc<Session>,
    pub(super) hold: Hold,
    /// When it was claimed, or not long before.
    pub(super) claimed_at: Instant,
    pub(super) publisher: Publisher,
    pub(super) source: Source,
    pub(super) marks: Option<Marks>,
    /// What parks rows, and by which sessions. None with claims.
    pub(super) parked: Option<(Parking, Stores)>,
}

/// Sessions on the table of parked events: none waits for another.
#[derive(Clone)]
pub(super) struct Stores {
    /// To park rows by.
    pub(super) parking: Store,
    /// To send what is scheduled by.
    pub(super) schedule: Store,
    /// To try by what waits for another try.
    pub(super) queue: Store,
}

/// What an attempt that ends only to serve other slices leaves to the next. Nothing needs to
/// be connected to anew, which may take longer than the leases of its slices last.
pub(super) struct Kept {
    pub(super) stores: Stores,
    pub(super) session: Arc<Session>,
    pub(super) checked: Checkpoint,
    pub(super) publisher: Publisher,
    pub(super) poller: Poller,
}

/// How long a broker may take to give a sign of life.
pub(super) const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) async fn connect(relay: &mut Relay) -> Result<Connected> {
    if let (Some(kept), Some(division)) = (relay.kept.take(), relay.division()) {
        return kept.take_part(relay, &division).await;
    }
    let mode = match relay.settings.mode {
        Some(mode) => mode,
        None => mode_of_checkpoint(relay).await?,
    };
    let is_divided = relay.settings.shards.is_some();
    let claims = relay.settings.claims();
    match (mode, claims) {
        (Mode::Wal, _) if is_divided => Err(cannot_be_divided()),
        (Mode::Wal, _) => connect_to_slot(relay).await,
        (Mode::Poll, None) => connect_to_table(relay).await,
        (Mode::Poll, Some(claims)) => connect_to_claims(relay, &claims).await,
    }
}

/// A slot has one reader.
fn cannot_be_divided() -> Error {
    let message = "--shards fights mode wal, as it was set up: a slot has one reader; leave --shards out, or run \
                   `postbox setup --mode poll`";
    Error::new(ErrorKind::Settings, message)
}

/// How the relay was set up to read. Says so when it is not what was said last.
async fn mode_of_checkpoint(relay: &mut Relay) -> Result<Mode> {
    let settings = &relay.settings;
    let name = format!("postbox {}", settings.contract.slot);
    let session = settings.database.connect_pooled(&name).await?;
    let client = &session.client;
    let stored = catalog::stored(client, &settings.contract);
    let mode = match within(SILENCE_MAX, "read what was set up", stored).await? {
        Stored::At(checkpoint) => checkpoint.mode,
        Stored::Missing if settings.contract.outbox.is_ours() => {
            // A standby may not have what its primary has.
            let checked = catalog::check_server(client);
            within(SILENCE_MAX, "look at the server", checked).await?;
            return Err(catalog::not_set_up(&settings.contract, None));
        }
        // Whoever goes on says what is missing.
        _ => return Ok(Mode::Wal),
    };
    if relay.told.replace(mode) != Some(mode) {
        let prevented = catalog::what_prevents_a_slot(client);
        let prevented = within(SILENCE_MAX, "read what was set up", prevented).await?;
        tell_mode(mode, prevented);
    }
    Ok(mode)
}

fn tell_mode(mode: Mode, prevented: Option<String>) {
    let (what, note) = match (mode, prevented) {
        (Mode::Wal, _) => ("a replication slot", String::new()),
        (Mode::Poll, Some(why)) => {
            let note = format!("; a replication slot is not to be had: {why}");
            ("the table", note)
        }
        (Mode::Poll, None) => {
            let note = "; a replication slot is to be had by now, unless a pooler is in between: \
                        `postbox setup --mode wal` changes to one";
            ("the table", note.to_owned())
        }
    };
    let mode = mode.name();
    info!(mode, "--mode auto: {what} is read, as it was set up{note}");
}

async fn connect_to_slot(relay: &mut Relay) -> Result<Connected> {
    let session = open_session(&relay.settings).await?;
    let begin = begin_at(relay, &session.client);
    let checked = within(SILENCE_MAX, "read what was set up", begin).await?;
    let (relay, settings) = (&*relay, &relay.settings);
    failpoint!("checked");
    let marks = match settings.marks() {
        Some(claims) => {
            let name = format!("postbox {} marks", settings.contract.slot);
            let session = settings.database.connect(&name).await?;
            let opened = Marks::open(session, &claims);
            Some(within(SILENCE_MAX, "look at the table", opened).await?)
        }
        None => None,
    };
    let publisher = reach_brokers(relay).await?;
    let stores = open_stores(settings, &checked.system).await?;
    let mut stream = open_stream(relay, &session, &checked).await?;
    failpoint!("opened");
    let claimed = catalog::claim(&session.client, &settings.contract, &checked);
    let checkpoint = within(SILENCE_MAX, "claim the checkpoint", claimed).await?;
    if let Some(gap) = checkpoint.gap.clone() {
        info!("what the slot does not give is sent first, from the table");
        let contract = &settings.contract;
        let copy = (!contract.outbox.is_ours()).then(|| contract.backfill_table());
        let begun = stream.read_first(&settings.database, gap, copy.as_deref(), checkpoint.lsn);
        within(
            SILENCE_MAX,
            "see all that was committed before the slot",
            begun,
        )
        .await?;
    }
    let hold = Hold::Slot(checkpoint);
    let parked = begin_parking(relay, stores, &hold).await?;
    Ok(Connected {
        session: Arc::new(session),
        hold,
        claimed_at: Instant::now(),
        publisher,
        source: Source::Wal(Box::new(stream)),
        marks,
        parked: Some(parked),
    })
}

/// Nothing is set in the sessions, which a pooler may lend to others.
async fn connect_to_table(relay: &mut Relay) -> Result<Connected> {
    let owner = relay.owner();
    let settings = &relay.settings;
    let name = format!("postbox {} control", settings.contract.slot);
    let session = settings.database.connect_pooled(&name).await?;
    let (client, contract) = (&session.client, &settings.contract);
    let division = relay.division();
    let checked = async {
        let mut checked = catalog::check_polling(client, contract, &owner).await;
        if checked.is_ok()
            && let Err(error) = match &division {
                Some(division) => division.check(client).await,
                None => catalog::check_undivided(client, contract).await,
            }
        {
            checked = Err(error);
        }
        // Another may have been at work.
        let place = relay.unstored;
        let delivered = match place {
            Some(place) => catalog::is_delivered(client, contract, place.ordinal).await?,
            None => false,
        };
        if checked.is_ok()
            && let Some(error) = catalog::rows_to_come(client, contract).await?
        {
            warn!("{}", error.chain());
        }
        Ok((checked, delivered))
    };
    let (checked, delivered) = within(SILENCE_MAX, "read what was set up", checked).await?;
    if delivered {
        relay.unstored = None;
    }
    let checked = checked?;
    let relay = &*relay;
    failpoint!("checked");
    let publisher = reach_brokers(relay).await?;
    let poll = PollSettings {
        name: contract.slot.clone(),
        outbox: outbox(relay),
        system: checked.system.clone(),
        interval_min: settings.poll_interval_min,
        interval_max: settings.poll_interval_max,
        heartbeat_interval: settings.heartbeat_interval,
    };
    let stores = open_stores(settings, &checked.system).await?;
    let mut poller = Poller::open(&settings.database, poll).await?;
    failpoint!("opened");
    if let Some(division) = division {
        let kept = Kept {
            stores,
            session: Arc::new(session),
            checked,
            publisher,
            poller,
        };
        return kept.take_part(relay, &division).await;
    }
    let claimed_at = Instant::now();
    let claimed = catalog::claim_lease(client, contract, &checked, &owner);
    let checkpoint = within(LEASE, "take the lease", claimed).await?;
    poller.begin(&checkpoint);
    let hold = Hold::Lease(checkpoint);
    let parked = within(
        LEASE,
        "read what is parked",
        begin_parking(relay, stores, &hold),
    )
    .await?;
    Ok(Connected {
        session: Arc::new(session),
        hold,
        claimed_at,
        publisher,
        source: Source::Poll(Box::new(poller)),
        marks: None,
        parked: Some(parked),
    })
}

impl Kept {
    /// Claims what slices are this relay's now, or gives up what it has and wants.
    async fn take_part(mut self, relay: &Relay, division: &Division) -> Result<Connected> {
        let client = &self.session.client;
        let begun = async {
            let (held, standings, claimed_at) = division.take_part(client, &self.checked).await?;
            let begun = self.poller.begin_at(standings);
            within(LEASE, "begin where the slices are", begun).await?;
            let hold = Hold::Slices(self.checked, held);
            let parked = begin_parking(relay, self.stores, &hold);
            let parked = within(LEASE, "read what is parked", parked).await?;
            Ok((hold, parked, claimed_at))
        };
        let begun = begun.await;
        if begun.is_err() {
            division.leave_by(client).await;
        }
        let (hold, parked, claimed_at) = begun?;
        Ok(Connected {
            session: self.session,
            hold,
            claimed_at,
            publisher: self.publisher,
            source: Source::Poll(Box::new(self.poller)),
            marks: None,
            parked: Some(parked),
        })
    }
}

/// Nothing of ours is needed in the database: each row says whose it is.
async fn connect_to_claims(relay: &mut Relay, claims: &ClaimSettings) -> Result<Connected> {
    let slot = relay.settings.contract.slot.clone();
    let name = format!("postbox {slot} control");
    let session = relay.settings.database.connect_pooled(&name).await?;
    let checked = catalog::check_server(&session.client);
    within(SILENCE_MAX, "look at the server", checked).await?;
    if !std::mem::replace(&mut relay.has_looked_for_slot, true) {
        let left = catalog::find_slot(&session.client, &slot);
        if let Some(left) = within(SILENCE_MAX, "look for a slot", left).await?
            && left.active_pid.is_none()
        {
            let quoted = escape_literal(&slot);
            warn!(
                "replication slot \"{slot}\" is read by nobody, and keeps WAL until the disk is full: if rows are to \
                 be claimed from now on, SELECT pg_drop_replication_slot({quoted})"
            );
        }
    }
    let (relay, settings) = (&*relay, &relay.settings);
    failpoint!("checked");
    let publisher = reach_brokers(relay).await?;
    // What an attempt before this one has claimed, and could not give back, is another's.
    let worker = format!(
        "postbox/{}/{}",
        settings.contract.slot.replace('_', "-"),
        uuid::Uuid::new_v4()
    );
    let intervals = (settings.poll_interval_min, settings.poll_interval_max);
    let opened = Claimer::open(
        &settings.database,
        outbox(relay),
        claims,
        &worker,
        intervals,
    );
    let mut claimer = within(SILENCE_MAX, "look at the table", opened).await?;
    if let Some(until) = relay.leftovers_until {
        claimer.expect_leftovers(until);
    }
    failpoint!("opened");
    Ok(Connected {
        session: Arc::new(session),
        hold: Hold::Claims(Arc::clone(claimer.claims())),
        claimed_at: Instant::now(),
        publisher,
        source: Source::Claim(Box::new(claimer)),
        marks: None,
        parked: None,
    })
}

async fn open_stores(settings: &RelaySettings, system: &System) -> Result<Stores> {
    let open = || Store::open(&settings.database, &settings.contract, system);
    Ok(Stores {
        parking: open().await?,
        schedule: open().await?,
        queue: open().await?,
    })
}

/// Knows what is parked, now that this relay is the one at work.
async fn begin_parking(relay: &Relay, stores: Stores, hold: &Hold) -> Result<(Parking, Stores)> {
    let settings = &relay.settings;
    let fence = hold.fence().unwrap_or_else(|| "true".to_owned());
    let serving = |store: Store| store.serving(&settings.contract, hold.slices(), &fence);
    let stores = Stores {
        parking: serving(stores.parking),
        schedule: serving(stores.schedule),
        queue: serving(stores.queue),
    };
    let (topics, too_large) = (relay.refused_topics.clone(), relay.too_large.clone());
    let store = stores.parking.clone();
    let parking = Parking::begin(store, settings.parked.clone(), topics, too_large).await?;
    Ok((parking, stores))
}

pub(super) fn outbox(relay: &Relay) -> Outbox {
    let settings = &relay.settings;
    Outbox {
        table: settings.contract.outbox.clone(),
        publication: settings.contract.publication.clone(),
        nonce: relay.nonce.clone(),
    }
}

/// The relay's ordinary session.
async fn open_session(settings: &RelaySettings) -> Result<Session> {
    let name = format!("postbox {} control", settings.contract.slot);
    let session = settings.database.connect(&name).await?;
    // What we no longer wait for must not stay behind in the server: a statement that
    // waits for a lock does not notice that its client has gone. Later than we give it
    // up, as we say better why. And a relay that is frozen with the checkpoint locked
    // must let the next one have it, which waits for it for `SILENCE_MAX`.
    // A synchronous standby that is away must not end the relay: of what it stores here, a
    // standby that lacks the last only repeats more.
    let limits = format!(
        "SET synchronous_commit = local; SET statement_timeout = {}; SET idle_in_transaction_session_timeout = {}",
        (SILENCE_MAX * 3 / 2).as_millis(),
        (SILENCE_MAX / 2).as_millis()
    );
    let limited = async {
        let done = session.client.batch_execute(&limits).await;
        done.map_err(|error| sort("set limits", error))
    };
    within(SILENCE_MAX, "set limits", limited).await?;
    Ok(session)
}

/// Where the relay begins, if everything is in its place. What is stored may be on from
/// what this relay could not store: another has been at work, or an answer was lost.
async fn begin_at(relay: &mut Relay, client: &Client) -> Result<Checkpoint> {
    let contract = &relay.settings.contract;
    let checked = catalog::check(client, contract).await;
    let is_ours = match &checked {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::SlotInUse,
    };
    if let Some(place) = relay.unstored
        && is_ours
    {
        relay.unstored = match is_stored(place, client, contract).await? {
            true => None,
            // A fail-over may have lost it, and not what was sent before it.
            false => Some(place.min(last_place(client, contract).await?)),
        };
    }
    checked
}

/// Whether it is stored that this event is delivered. That the slot has confirmed it is
/// not enough: it may forget that in a crash.
async fn is_stored(place: Place, client: &Client, contract: &Contract) -> Result<bool> {
    Ok(match catalog::stored(client, contract).await? {
        // While there is a gap, it may be one of its events: they lie before the slot.
        Stored::At(checkpoint) => checkpoint.gap.is_none() && place.commit_lsn < checkpoint.lsn,
        _ => false,
    })
}

/// The last place that an event may have in the WAL there is.
async fn last_place(client: &Client, contract: &Contract) -> Result<Place> {
    let state = catalog::slot_state(client, &contract.slot).await?;
    Ok(Place {
        commit_lsn: u64::from(state.wal_end).saturating_sub(1).into(),
        ordinal: u64::MAX,
    })
}

/// A producer whose brokers answer: the slot is only taken by a relay that can
/// deliver.
async fn reach_brokers(relay: &Relay) -> Result<Publisher> {
    let publisher = Publisher::new(relay.settings.kafka.clone(), relay.batch_bytes)?;
    let mut probe = pin!(publisher.probe(PROBE_TIMEOUT));
    let answer = loop {
        tokio::select! {
            biased;
            // Nothing was sent yet: if we are refused, no need to wait for an answer.
            () = publisher.reported() => publisher.take_reports(&mut Vec::new())?,
            answer = &mut probe => break answer,
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
async fn open_stream(relay: &Relay, session: &Session, checkpoint: &Checkpoint) -> Result<Stream> {
    let settings = &relay.settings;
    let wal = WalSettings {
        slot: settings.contract.slot.clone(),
        outbox: outbox(relay),
        system: checkpoint.system.clone(),
        start: checkpoint.lsn,
        status_interval: settings.status_interval,
        wal_sender_timeout: settings.wal_sender_timeout,
    };
    tokio::select! {
        stream = Stream::open(&settings.database, wal) => stream,
        error = session.ended() => Err(error),
    }
}
