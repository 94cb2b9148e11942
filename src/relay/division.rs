//! The slices of a divided relay: how an attempt gets its own, and when it is to end so that
//! the next has others.
//!
//! One attempt serves a fixed set of slices, claimed at its start. Meanwhile it looks at all
//! slices once a second. When it should serve others, as one is free, was handed to it, or
//! is wanted by another relay, it drains, stores where its slices stand, hands over what is
//! wanted, and ends; the next begins with what is its share then, in the same connections.
//! So nothing is repeated, and a slice is served by one relay after another.
//!
//! A relay that cannot drain, as a broker does not answer, cannot take slices either, and
//! whatever it asked for nobody would serve: it gives up what was handed to it meanwhile, and
//! asks for nothing until it has drained.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;
use tracing::debug;

use super::control::RENEW_INTERVAL;
use super::share::Share;
use crate::catalog::{self, Checkpoint, Held, LEASE, Look, SLICES, Slices, Standing};
use crate::contract::Contract;
use crate::database::{Database, Session, within};
use crate::error::{Error, ErrorKind, Result};
use crate::source::Mark;

/// Among how many relays at most the slices are divided, and who this one is.
#[derive(Debug, Clone)]
pub(super) struct Division {
    contract: Contract,
    owner: String,
    relays_max: usize,
}

/// How often it is looked, at least.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// How often, by a relay that waits for what it has asked for. It is not served meanwhile.
const WAIT_INTERVAL: Duration = Duration::from_millis(50);

/// How much later than the end of a lease.
const LATER: Duration = Duration::from_millis(20);

/// For how long a relay waits for its first slices before it stands by: the other looks
/// once a second, and drains.
const FIRST_MAX: Duration = Duration::from_secs(5);

/// How long it may take to give slices up.
const LEAVE_MAX: Duration = Duration::from_millis(500);

/// For how long an attempt may drain so that its slices can be divided anew. What was handed
/// to it meanwhile is leased to it for longer, and nobody serves it. If it takes longer, as a
/// broker does not answer, it goes on with those it has.
pub(super) const DRAIN_MAX: Duration = LEASE.saturating_sub(RENEW_INTERVAL);

/// How long it goes on before it tries again: it sends nothing new while it tries.
const DRAIN_PAUSE: Duration = Duration::from_secs(5 * DRAIN_MAX.as_secs());

impl Division {
    pub(super) fn new(contract: &Contract, owner: &str, relays_max: u8) -> Self {
        Self {
            contract: contract.clone(),
            owner: owner.to_owned(),
            relays_max: relays_max.into(),
        }
    }

    /// Refuses while as many relays are at work as may be.
    pub(super) async fn check(&self, client: &Client) -> Result<()> {
        let look = catalog::look(client, &self.contract).await?;
        let share = self.share(&look);
        let has_part = look.slices.is_empty() || share != Share::default();
        has_part.then_some(()).ok_or_else(|| self.stands_by())
    }

    /// Claims this relay's share, and divides the relay if it is not; where there is nothing
    /// free, it asks for some and waits. Says where they stand, and since when they are its
    /// own.
    pub(super) async fn take_part(
        &self,
        client: &Client,
        checked: &Checkpoint,
    ) -> Result<(Held, Vec<Standing>, Instant)> {
        let since = Instant::now();
        loop {
            let now = Instant::now();
            let taken = self.take(client, checked);
            if let Some((held, standings)) = within(LEASE, "claim slices", taken).await? {
                return Ok((held, standings, now));
            }
            if since.elapsed() > FIRST_MAX {
                return Err(self.stands_by());
            }
            sleep(WAIT_INTERVAL).await;
        }
    }

    /// Gives up what this relay has and wants, while no attempt is at work.
    pub(super) async fn leave(&self, database: &Database) {
        let left = async {
            let session = database.connect_pooled("postbox leaving").await?;
            self.leave_by(&session.client).await;
            Ok::<_, Error>(())
        };
        let _ = timeout(LEAVE_MAX, left).await;
    }

    /// The same, in this session.
    pub(super) async fn leave_by(&self, client: &Client) {
        let nothing = (&*self.owner, Slices::default());
        let left = catalog::leave(client, &self.contract, nothing);
        // If it cannot be said, the leases end by themselves.
        let _ = timeout(LEAVE_MAX, left).await;
    }

    async fn take(
        &self,
        client: &Client,
        checked: &Checkpoint,
    ) -> Result<Option<(Held, Vec<Standing>)>> {
        let contract = &self.contract;
        let look = catalog::look(client, contract).await?;
        if look.slices.is_empty() {
            catalog::divide(client, contract, &look).await?;
            return Ok(None);
        }
        let share = self.share(&look);
        if share == Share::default() {
            return Err(self.stands_by());
        }
        if !share.serve.is_empty() {
            let claim = (&*self.owner, share.serve);
            return catalog::claim_slices(client, contract, checked, &look, claim).await;
        }
        self.ask(client, &look, &share).await?;
        Ok(None)
    }

    async fn ask(&self, client: &Client, look: &Look, share: &Share) -> Result<()> {
        if share.want.is_empty() {
            return Ok(());
        }
        debug!(slices = share.want.count(), "asking for slices");
        let wanted = (&*self.owner, share.want);
        catalog::want_slices(client, &self.contract, look, wanted).await
    }

    fn share(&self, look: &Look) -> Share {
        Share::of(&self.owner, &look.slices, self.relays_max)
    }

    fn stands_by(&self) -> Error {
        let message = format!(
            "relay \"{}\" is at work: its slices are with others",
            self.contract.slot
        );
        Error::new(ErrorKind::SlotInUse, message)
    }

    /// Returns once this relay should drain: as it should serve others than these, or,
    /// where it could not drain the last time, as it should ask for some.
    async fn watch(self, session: Arc<Session>, held: Held, could_drain: bool) {
        let mut pause = LOOK_INTERVAL;
        if !could_drain {
            // Others serve what it has got, and cannot.
            let left = held.release_others(&session.client, &self.contract);
            let _ = timeout(LEAVE_MAX, left).await;
            pause = DRAIN_PAUSE;
        }
        loop {
            sleep(pause).await;
            let looked = self.look_at(&session.client, &held, could_drain);
            let looked = timeout(LEASE, looked).await;
            pause = match looked {
                Ok(Ok(Some(pause))) => pause,
                Ok(Ok(None)) => return,
                // Whoever renews the leases in this session says what is wrong with it.
                _ => LOOK_INTERVAL,
            };
        }
    }

    /// When to look again; `None` if it should drain.
    async fn look_at(
        &self,
        client: &Client,
        held: &Held,
        may_ask: bool,
    ) -> Result<Option<Duration>> {
        let look = catalog::look(client, &self.contract).await?;
        let share = self.share(&look);
        if share.serve != held.slices || !(may_ask || share.want.is_empty()) {
            return Ok(None);
        }
        self.ask(client, &look, &share).await?;
        if share.waits || !share.want.is_empty() {
            return Ok(Some(WAIT_INTERVAL));
        }
        let leases = look.slices.iter().filter_map(|slice| slice.remaining);
        let running = leases.filter(|seconds| *seconds > 0.0);
        let first_end = running.fold(LOOK_INTERVAL.as_secs_f64(), f64::min);
        Ok(Some(Duration::from_secs_f64(first_end) + LATER))
    }
}

/// Watches for as long as an attempt goes on.
pub(super) struct Watch {
    division: Division,
    session: Arc<Session>,
    held: Held,
    task: JoinSet<()>,
}

impl Watch {
    pub(super) fn start(division: Division, session: Arc<Session>, held: Held) -> Self {
        let mut watch = Self {
            division,
            session,
            held,
            task: JoinSet::new(),
        };
        watch.go_on(true);
        watch
    }

    /// Resolves once the attempt should drain, and end. Cancel-safe.
    pub(super) async fn changed(watch: &mut Option<Self>) {
        if let Some(watch) = watch
            && watch.task.join_next().await.is_some()
        {
            return;
        }
        std::future::pending::<()>().await;
    }

    /// The attempt goes on, from its start or after it tried to drain, in vain.
    pub(super) fn go_on(&mut self, could_drain: bool) {
        let (division, session) = (self.division.clone(), Arc::clone(&self.session));
        let held = self.held.clone();
        self.task.spawn(division.watch(session, held, could_drain));
    }
}

/// What slices are served, in words.
pub(super) fn served(held: &Held) -> String {
    format!("serving {} of {SLICES} slices", held.slices.count())
}

/// Where the slices stand that a mark is of.
pub(super) fn standings(held: &Held, mark: Mark) -> Vec<Standing> {
    let slices = held.slices;
    match mark {
        Mark::Seq(gap) => vec![Standing {
            slices,
            snapshot: gap.since.clone(),
            gap: Some(gap),
        }],
        Mark::Fence(snapshot) => vec![Standing {
            slices,
            snapshot,
            gap: None,
        }],
        Mark::Standings(standings) => standings,
        // Of rows, not of a place.
        Mark::Claims(_) => Vec::new(),
    }
}
