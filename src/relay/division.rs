//! The slices of a divided relay: how an attempt gets its own, and when it is to end so that
//! the next has others.
//!
//! One attempt serves a fixed set of slices, claimed at its start. Meanwhile it looks at all
//! slices once a second. When it should serve others, as one is free, was handed to it, or
//! is wanted by another relay, it drains, stores where its slices stand, hands over what is
//! wanted, and ends; the next begins with what is its share then. So nothing is repeated,
//! and a slice is served by one relay after another.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;
use tracing::debug;

use super::share::Share;
use crate::catalog::{self, Checkpoint, Held, LEASE, Look, SLICES, Standing};
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

/// For how long an attempt may drain so that its slices can be divided anew. If it takes
/// longer, as a broker does not answer, it goes on, and tries again after as long.
pub(super) const DRAIN_MAX: Duration = Duration::from_secs(5);

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
    /// free, it asks for some and waits.
    pub(super) async fn take_part(
        &self,
        client: &Client,
        checked: &Checkpoint,
    ) -> Result<(Held, Vec<Standing>)> {
        let since = Instant::now();
        loop {
            let taken = self.take(client, checked);
            if let Some(taken) = within(LEASE, "claim slices", taken).await? {
                return Ok(taken);
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
            catalog::leave(&session.client, &self.contract, &self.owner).await
        };
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

    /// Returns once this relay should serve others than these.
    async fn watch(self, session: Arc<Session>, held: Held, pause: Duration) {
        let mut pause = pause;
        loop {
            sleep(pause).await;
            let looked = timeout(LEASE, self.look_at(&session.client, &held)).await;
            pause = match looked {
                Ok(Ok(Some(pause))) => pause,
                Ok(Ok(None)) => return,
                // Whoever renews the leases in this session says what is wrong with it.
                _ => LOOK_INTERVAL,
            };
        }
    }

    /// When to look again; `None` if it should serve others.
    async fn look_at(&self, client: &Client, held: &Held) -> Result<Option<Duration>> {
        let look = catalog::look(client, &self.contract).await?;
        let share = self.share(&look);
        if share.serve != held.slices {
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
        watch.again_after(LOOK_INTERVAL);
        watch
    }

    /// Resolves once the attempt should end, as this relay should serve other slices.
    /// Cancel-safe.
    pub(super) async fn changed(watch: &mut Option<Self>) {
        if let Some(watch) = watch
            && watch.task.join_next().await.is_some()
        {
            return;
        }
        std::future::pending::<()>().await;
    }

    /// The attempt goes on nevertheless.
    pub(super) fn again_after(&mut self, pause: Duration) {
        let (division, session) = (self.division.clone(), Arc::clone(&self.session));
        self.task
            .spawn(division.watch(session, self.held.clone(), pause));
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
