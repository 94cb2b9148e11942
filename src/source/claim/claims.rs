//! The rows that this relay has claimed, and what is written about them.
//!
//! Rows are claimed by one session and completed by another, while they are sent. They
//! stand here in the order in which they go out, and each write names the claim it was
//! made under: a row that somebody else has claimed since is not touched.
//!
//! # Rows that somebody has locked
//!
//! An application, or a person, may lock a row that is ours for as long as they like. No
//! write waits for that, since all others would wait with it: it passes over such a row, and
//! comes back to it at the next beat. It is still ours: nobody can claim a row that is
//! locked. Its claim may be over by the time when it is free; then it is completed by us, or
//! claimed by somebody else who looks sooner, and repeated.
//!
//! - *Locked* is what still has our token and could not be written. What has another is
//!   *lost*.
//! - What is delivered and locked holds up nothing. Until what is refused or goes back could
//!   be written, no more of its key is claimed, as that lies behind it.
//! - A row that is locked before its turn and could not be renewed in time is not sent, but
//!   goes back, with those of its key.
//! - From [`LOCKED_MAX`] such rows on nothing more is claimed.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};
use tracing::{debug, warn};

use super::BEGIN;
use super::statements::{LEASE, ROWS, Statements, failed};
use crate::database::{despite_deadlocks, query_after};
use crate::error::{Error, ErrorKind, Result};
use crate::lock::lock;
use crate::table::Table;

/// How often claims are renewed.
pub const RENEW_INTERVAL: Duration = Duration::from_secs(3);

/// A claim that is older is renewed at the next beat.
const RENEW_AGE: Duration = Duration::from_secs(1);

/// How long a renewal may take.
pub const RENEWAL_MAX: Duration = Duration::from_secs(5);

/// How old a claim may be whose row is sent: less than it lasts.
const CLAIM_MAX: Duration = LEASE.saturating_sub(Duration::from_secs(1));

// One that was just too young to be renewed is renewed by then.
const _: () = assert!(
    RENEW_AGE
        .saturating_add(RENEW_INTERVAL)
        .saturating_add(RENEWAL_MAX)
        .as_millis()
        <= CLAIM_MAX.as_millis()
);

/// How often claims of others that have run out are given back.
const STALE_INTERVAL: Duration = Duration::from_secs(10);

/// From how many rows on that are done with, and locked by somebody else, no more are
/// claimed.
const LOCKED_MAX: usize = ROWS as usize;

/// How often a stop looks whether they are free.
const LOCKED_INTERVAL: Duration = Duration::from_millis(100);

/// Rows claimed, and not yet done with.
#[derive(Debug)]
pub struct Claims {
    pub(super) statements: Statements,
    table: Table,
    state: Mutex<State>,
    /// One write at a time: each begins where the one before has ended.
    writing: tokio::sync::Mutex<()>,
    /// Something was refused or is to be given back.
    pub(crate) news: Notify,
    /// That was written, or claims were renewed.
    written: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// In the order in which they go out.
    held: VecDeque<Claim>,
    /// How many of `held` the relay was given.
    given: usize,
    /// How many rows have left `held` at its front.
    done: u64,
    refused: Vec<(Claim, String)>,
    returned: Vec<Claim>,
    /// What is done with and could not be written, as somebody has locked it.
    locked: Vec<(Claim, Fate)>,
    /// When stale claims were last looked for.
    cleaned_at: Option<Instant>,
}

/// A row that is ours.
#[derive(Debug, Clone)]
pub(super) struct Claim {
    pub(super) id: String,
    pub(super) created_at: String,
    pub(super) token: String,
    pub(super) since: Instant,
    /// Its key behind its topic, as a claim takes those it is to pass over.
    pub(super) key: Option<String>,
    /// It was refused, and is written about apart.
    pub(super) is_refused: bool,
    /// Somebody had locked it when it was to be renewed.
    pub(super) is_locked: bool,
}

/// What becomes of a row that is done with.
#[derive(Debug, Clone)]
enum Fate {
    Completed,
    /// For this reason.
    Refused(String),
    Returned,
}

/// What a write has done, by the number of each claim in it. The others were lost.
struct Written {
    /// The tokens that they have now.
    tokens: HashMap<usize, String>,
    locked: HashSet<usize>,
}

/// Claims as the statements take them.
#[derive(Default)]
struct Arrays {
    ids: Vec<String>,
    created_at: Vec<String>,
    tokens: Vec<String>,
}

impl<'c> FromIterator<&'c Claim> for Arrays {
    fn from_iter<I: IntoIterator<Item = &'c Claim>>(claims: I) -> Self {
        let mut arrays = Self::default();
        for claim in claims {
            arrays.ids.push(claim.id.clone());
            arrays.created_at.push(claim.created_at.clone());
            arrays.tokens.push(claim.token.clone());
        }
        arrays
    }
}

impl Claims {
    pub(super) fn new(statements: Statements, table: Table) -> Self {
        Self {
            statements,
            table,
            state: Mutex::default(),
            writing: tokio::sync::Mutex::default(),
            news: Notify::new(),
            written: Notify::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Waits until nothing is being written about claims; nothing is as long as the guard
    /// lives.
    pub(crate) async fn pause(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.writing.lock().await
    }

    /// These rows were claimed, in this order. They are given once the source has seen them,
    /// too.
    pub(super) fn add(&self, claims: impl IntoIterator<Item = Claim>) {
        self.state().held.extend(claims);
    }

    /// The tokens of claims that are ours.
    pub(super) fn tokens(&self) -> Vec<String> {
        let state = self.state();
        let locked = state.locked.iter().map(|(claim, _)| claim);
        let tokens: HashSet<&str> = state
            .held
            .iter()
            .chain(locked)
            .map(|claim| claim.token.as_str())
            .collect();
        tokens.into_iter().map(str::to_owned).collect()
    }

    /// Keys, each behind its topic, of which something is to be put off or given back as
    /// soon as it is free.
    pub(super) fn locked_keys(&self) -> Vec<String> {
        let state = self.state();
        let locked = state.locked.iter();
        let waiting = locked.filter(|(_, fate)| !matches!(fate, Fate::Completed));
        let keys: HashSet<&String> = waiting
            .filter_map(|(claim, _)| claim.key.as_ref())
            .collect();
        keys.into_iter().cloned().collect()
    }

    /// How many rows are done with that somebody else has locked.
    pub(crate) fn locked(&self) -> usize {
        self.state().locked.len()
    }

    /// Whether so many that no more are to be claimed.
    pub(super) fn are_too_many_locked(&self) -> bool {
        self.locked() >= LOCKED_MAX
    }

    /// Waits until it is not so many. Cancel-safe.
    pub(super) async fn few_locked(&self) {
        while self.are_too_many_locked() {
            self.written.notified().await;
        }
    }

    /// Whether the first row that was not given is ours for certain: its claim may be over
    /// if it took long, or if this process did not run. Waits until it is renewed; if it is
    /// somebody else's by then, the renewal says so. False if it is not, as it is locked.
    /// Cancel-safe.
    pub(super) async fn fresh(&self) -> bool {
        loop {
            {
                let state = self.state();
                let next = state.held.get(state.given);
                match next.filter(|claim| claim.since.elapsed() > CLAIM_MAX) {
                    None => return true,
                    Some(claim) if claim.is_locked => return false,
                    Some(_) => {}
                }
            }
            self.written.notified().await;
        }
    }

    /// The first row that was not given is given now. Returns how many were.
    pub(super) fn give(&self) -> u64 {
        let mut state = self.state();
        state.given += 1;
        state.done + state.given as u64
    }

    /// Of the rows that were not given, these go back.
    pub(super) fn give_back(&self, goes_back: impl Fn(usize) -> bool) {
        let mut state = self.state();
        let given = state.given;
        let waiting = state.held.split_off(given);
        for (number, claim) in waiting.into_iter().enumerate() {
            match goes_back(number) {
                true => state.returned.push(claim),
                false => state.held.push_back(claim),
            }
        }
        drop(state);
        self.news.notify_one();
    }

    /// The row that was given last cannot go out.
    pub(super) fn refuse_last(&self, why: String) {
        let mut state = self.state();
        if let Some(last) = state.given.checked_sub(1)
            && !std::mem::replace(&mut state.held[last].is_refused, true)
        {
            let claim = state.held[last].clone();
            state.refused.push((claim, why));
        }
        drop(state);
        self.news.notify_one();
    }

    /// Whether what was refused is written, and what goes back is back: until then rows of a
    /// key would be claimed that lie behind these.
    pub(super) fn is_settled(&self) -> bool {
        let state = self.state();
        state.refused.is_empty() && state.returned.is_empty()
    }

    /// Waits until it is. Cancel-safe.
    pub(super) async fn settled(&self) {
        while !self.is_settled() {
            self.written.notified().await;
        }
    }

    /// Marks rows published: those given up to this number.
    pub(crate) async fn complete(&self, client: &Client, number: u64) -> Result<()> {
        let _one = self.writing.lock().await;
        let (fates, rows) = {
            let state = self.state();
            let rows = usize::try_from(number.saturating_sub(state.done)).unwrap_or(usize::MAX);
            let rows = rows.min(state.given);
            let front = state.held.iter().take(rows);
            let front = front.filter(|claim| !claim.is_refused);
            let fates: Vec<_> = front
                .map(|claim| (claim.clone(), Fate::Completed))
                .collect();
            (fates, rows)
        };
        failpoint!("completing");
        let locked = self.write_fates(client, fates).await?;
        failpoint!("completed");
        let mut state = self.state();
        state.held.drain(..rows);
        state.given -= rows;
        state.done += rows as u64;
        state.locked.extend(locked);
        Ok(())
    }

    /// Writes what was refused, and gives back what goes back.
    pub(crate) async fn settle(&self, client: &Client) -> Result<()> {
        let _one = self.writing.lock().await;
        let (refused, returned) = {
            let state = self.state();
            (state.refused.clone(), state.returned.clone())
        };
        let (refusals, returns) = (refused.len(), returned.len());
        if refusals > 0 {
            failpoint!("refusing");
        }
        let refused = refused
            .into_iter()
            .map(|(claim, why)| (claim, Fate::Refused(why)));
        let returned = returned.into_iter().map(|claim| (claim, Fate::Returned));
        let fates = refused.chain(returned).collect();
        let locked = self.write_fates(client, fates).await?;
        let mut state = self.state();
        state.refused.drain(..refusals);
        state.returned.drain(..returns);
        state.locked.extend(locked);
        drop(state);
        self.written.notify_one();
        Ok(())
    }

    /// Writes what could not be written before, as far as it is free by now.
    async fn settle_locked(&self, client: &Client) -> Result<()> {
        let _one = self.writing.lock().await;
        let fates = self.state().locked.clone();
        let locked = self.write_fates(client, fates).await?;
        self.state().locked = locked;
        self.written.notify_one();
        Ok(())
    }

    /// Waits until nothing that is done with is locked by others, and is written.
    pub(crate) async fn settle_all(&self, client: &Client) -> Result<()> {
        while self.locked() > 0 {
            self.settle_locked(client).await?;
            if self.locked() > 0 {
                tokio::time::sleep(LOCKED_INTERVAL).await;
            }
        }
        Ok(())
    }

    /// Makes claims last that are no longer young, and gives back those of others
    /// that have run out.
    ///
    /// # Errors
    /// `SlotInUse` if one is no longer ours.
    pub(crate) async fn renew(&self, client: &Client) -> Result<()> {
        self.settle_locked(client).await?;
        let _one = self.writing.lock().await;
        let (claims, is_time) = {
            let mut state = self.state();
            let is_time = (state.cleaned_at).is_none_or(|at| at.elapsed() >= STALE_INTERVAL);
            if is_time {
                state.cleaned_at = Some(Instant::now());
            }
            let old = |claim: &&Claim| !claim.is_refused && claim.since.elapsed() >= RENEW_AGE;
            let claims: Vec<Claim> = state.held.iter().filter(old).cloned().collect();
            (claims, is_time)
        };
        if !claims.is_empty() {
            self.renew_these(client, &claims).await?;
            self.written.notify_one();
        }
        if is_time {
            self.release_stale(client).await?;
        }
        Ok(())
    }

    /// Gives back what others claimed and did not renew.
    async fn release_stale(&self, client: &Client) -> Result<()> {
        let Some(sql) = &self.statements.release_stale else {
            return Ok(());
        };
        loop {
            let rows = query_after(&BEGIN, client, sql, &[]).await;
            let rows = rows.map_err(|error| self.failed(error))?;
            let released: i64 = rows.first().map_or(0, |row| row.get(0));
            debug!(rows = released, "claims of others that had run out");
            if released < ROWS {
                return Ok(());
            }
        }
    }

    async fn renew_these(&self, client: &Client, claims: &[Claim]) -> Result<()> {
        let since = Instant::now();
        let written = self.write(client, &self.statements.renew, claims, None);
        let written = written.await?;
        let row = |claim: &Claim| (claim.id.clone(), claim.created_at.clone());
        let mut asked: HashMap<(String, String), usize> = claims.iter().map(row).zip(0..).collect();
        let mut lost = 0;
        let mut guard = self.state();
        let state = &mut *guard;
        let refused = state.refused.iter_mut().map(|(claim, _)| claim);
        let others = refused.chain(&mut state.returned);
        let held = state.held.iter_mut().filter(|claim| !claim.is_refused);
        for claim in held.chain(others) {
            // A claim that has been added since is of another row, or a younger one.
            if claim.since >= since {
                continue;
            }
            let Some(number) = asked.remove(&row(claim)) else {
                continue;
            };
            claim.is_locked = written.locked.contains(&number);
            if let Some(token) = written.tokens.get(&number) {
                token.clone_into(&mut claim.token);
                claim.since = since;
            } else if !claim.is_locked && !claim.is_refused {
                lost += 1;
            }
        }
        match lost {
            0 => Ok(()),
            rows => {
                let message = format!(
                    "claims on {rows} rows of {} were taken away from this relay",
                    self.table.quoted()
                );
                Err(Error::new(ErrorKind::SlotInUse, message))
            }
        }
    }

    /// Gives everything back that is left, and writes what was refused.
    ///
    /// # Errors
    /// Also where somebody else has locked some of it.
    pub(crate) async fn release(&self, client: &Client) -> Result<()> {
        {
            let _one = self.writing.lock().await;
            let mut state = self.state();
            let held = std::mem::take(&mut state.held);
            state.given = 0;
            let held = held.into_iter().filter(|claim| !claim.is_refused);
            state.returned.extend(held);
        }
        self.settle_locked(client).await?;
        self.settle(client).await?;
        match self.locked() {
            0 => Ok(()),
            rows => Err(Error::new(
                ErrorKind::DatabaseAway,
                format!("{rows} rows are locked by somebody else"),
            )),
        }
    }

    /// Writes what becomes of rows; gives back what somebody else has locked. A row that is
    /// lost is told of if it was delivered.
    async fn write_fates(
        &self,
        client: &Client,
        fates: Vec<(Claim, Fate)>,
    ) -> Result<Vec<(Claim, Fate)>> {
        let (mut completed, mut refused, mut errors) = (Vec::new(), Vec::new(), Vec::new());
        let mut returned = Vec::new();
        for (claim, fate) in fates {
            match fate {
                Fate::Completed => completed.push(claim),
                Fate::Returned => returned.push(claim),
                Fate::Refused(why) => {
                    refused.push(claim);
                    errors.push(why);
                }
            }
        }
        let Statements {
            complete,
            refuse,
            release,
            ..
        } = &self.statements;
        let mut locked = Vec::new();
        let written = self.write(client, complete, &completed, None).await?;
        let lost = completed.len() - written.tokens.len() - written.locked.len();
        if lost > 0 {
            let table = self.table.quoted();
            warn!(
                rows = lost,
                table, "rows were no longer claimed by this relay when they were delivered"
            );
        }
        let completed = completed
            .into_iter()
            .zip(std::iter::repeat(Fate::Completed));
        locked.extend(written.left_of(completed));
        let written = self.write(client, refuse, &refused, Some(&errors)).await?;
        let refused = refused
            .into_iter()
            .zip(errors.into_iter().map(Fate::Refused));
        locked.extend(written.left_of(refused));
        let written = self.write(client, release, &returned, None).await?;
        let returned = returned.into_iter().zip(std::iter::repeat(Fate::Returned));
        locked.extend(written.left_of(returned));
        Ok(locked)
    }

    /// Runs a statement on claims, but for those whose rows somebody else has locked.
    async fn write(
        &self,
        client: &Client,
        sql: &str,
        claims: &[Claim],
        errors: Option<&Vec<String>>,
    ) -> Result<Written> {
        let mut written = Written {
            tokens: HashMap::new(),
            locked: HashSet::new(),
        };
        if claims.is_empty() {
            return Ok(written);
        }
        for (number, token) in self.query(client, sql, claims.iter(), errors).await? {
            written.tokens.insert(number, token);
        }
        let left: Vec<usize> = (0..claims.len())
            .filter(|number| !written.tokens.contains_key(number))
            .collect();
        if !left.is_empty() {
            // One may be free by now: then it is written next time.
            let claims = left.iter().map(|number| &claims[*number]);
            let ours = &self.statements.ours;
            let ours = self.query(client, ours, claims, None).await?;
            written.locked = ours.into_iter().map(|(number, _)| left[number]).collect();
        }
        Ok(written)
    }

    /// What a statement on claims says of each: the number, from 0, and the token.
    async fn query<'c>(
        &self,
        client: &Client,
        sql: &str,
        claims: impl Iterator<Item = &'c Claim>,
        errors: Option<&Vec<String>>,
    ) -> Result<Vec<(usize, String)>> {
        let arrays: Arrays = claims.collect();
        let mut parameters = parameters(&arrays);
        if let Some(errors) = errors {
            parameters.push((errors, Type::TEXT_ARRAY));
        }
        // Triggers of the table may wait for others.
        let rows = despite_deadlocks(|| query_after(&BEGIN, client, sql, &parameters)).await;
        let rows = rows.map_err(|error| self.failed(error))?;
        let said = rows.iter().map(|row| {
            let number = usize::try_from(row.get::<_, i64>(0) - 1);
            (number.expect("they count from 1"), row.get(1))
        });
        Ok(said.collect())
    }

    /// Sorts an error of `doing` something to rows of the table.
    pub(super) fn failed_to(&self, doing: &str, error: tokio_postgres::Error) -> Error {
        failed(&self.table, doing, error)
    }

    fn failed(&self, error: tokio_postgres::Error) -> Error {
        self.failed_to("write claims of", error)
    }
}

impl Written {
    /// Those that somebody else has locked.
    fn left_of<T>(&self, claims: impl Iterator<Item = T>) -> impl Iterator<Item = T> {
        let numbered = claims.enumerate();
        let locked = numbered.filter(|(number, _)| self.locked.contains(number));
        locked.map(|(_, claim)| claim)
    }
}

fn parameters(arrays: &Arrays) -> Vec<(&(dyn ToSql + Sync), Type)> {
    vec![
        (&arrays.ids, Type::TEXT_ARRAY),
        (&arrays.created_at, Type::TEXT_ARRAY),
        (&arrays.tokens, Type::TEXT_ARRAY),
    ]
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::super::statements::{ClaimSettings, Shape};
    use super::*;
    use crate::table::{Preset, Tracking};

    fn claims_of_age(age: Duration) -> Claims {
        let table = Table::new(Preset::OmniBox, "postbox", None, &[]).expect("a table");
        let settings = ClaimSettings {
            table: table.clone(),
            timeout: Duration::from_secs(300),
            attempts_max: 5,
        };
        let shape = Shape {
            columns: Vec::new(),
            id_type: "uuid".to_owned(),
            error_type: "text".to_owned(),
        };
        let statements = Statements::new(&settings, "me", Tracking::Status, &shape);
        let claims = Claims::new(statements, table);
        claims.add([Claim {
            id: "1".to_owned(),
            created_at: String::new(),
            token: "me".to_owned(),
            since: Instant::now().checked_sub(age).expect("a time before"),
            key: None,
            is_refused: false,
            is_locked: false,
        }]);
        claims
    }

    #[tokio::test]
    async fn a_row_whose_claim_may_be_over_waits_until_it_is_renewed() {
        assert!(claims_of_age(CLAIM_MAX / 2).fresh().await);
        let old = claims_of_age(CLAIM_MAX);
        let moment = Duration::from_millis(50);
        assert!(timeout(moment, old.fresh()).await.is_err());
        old.state().held[0].since = Instant::now();
        old.written.notify_one();
        assert!(old.fresh().await);
    }

    #[tokio::test]
    async fn a_row_whose_claim_may_be_over_and_that_is_locked_does_not_wait() {
        let old = claims_of_age(CLAIM_MAX);
        old.state().held[0].is_locked = true;
        assert!(!old.fresh().await);
    }
}
