//! The rows that this relay has claimed, and what is written about them.
//!
//! Rows are claimed by one session and completed by another, while they are sent. They
//! stand here in the order in which they go out, and each write names the claim it was
//! made under: a row that somebody else has claimed since is not touched.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio_postgres::Client;
use tokio_postgres::types::{ToSql, Type};
use tracing::{debug, warn};

use super::statements::{LEASE, ROWS, Statements};
use crate::database::{query_after, sort};
use crate::error::{Error, ErrorKind, Result};
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

/// What is done to claims survives the server, but needs no standby.
const BEGIN: &str = "BEGIN; SET LOCAL synchronous_commit = local; SET LOCAL enable_seqscan = off; \
                     SET LOCAL jit = off; SET LOCAL datestyle = ISO; SET LOCAL timezone = UTC";

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
    /// It was refused, and is written about apart.
    pub(super) is_refused: bool,
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
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
        let tokens: HashSet<&str> = state
            .held
            .iter()
            .map(|claim| claim.token.as_str())
            .collect();
        tokens.into_iter().map(str::to_owned).collect()
    }

    /// Whether the first row that was not given is ours for certain. Its claim may be over
    /// if it took long, or if this process did not run.
    fn is_fresh(&self) -> bool {
        let state = self.state();
        let next = state.held.get(state.given);
        next.is_none_or(|claim| claim.since.elapsed() <= CLAIM_MAX)
    }

    /// Waits until it is: until its claim is renewed. If that is somebody else's by then,
    /// the renewal says so. Cancel-safe.
    pub(super) async fn fresh(&self) {
        while !self.is_fresh() {
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
        let (arrays, rows) = {
            let state = self.state();
            let rows = usize::try_from(number.saturating_sub(state.done)).unwrap_or(usize::MAX);
            let rows = rows.min(state.given);
            let front = state.held.iter().take(rows);
            let arrays: Arrays = front.filter(|claim| !claim.is_refused).collect();
            (arrays, rows)
        };
        failpoint!("completing");
        let written = self
            .write(client, &self.statements.complete, &arrays, None)
            .await?;
        failpoint!("completed");
        let mut state = self.state();
        state.held.drain(..rows);
        state.given -= rows;
        state.done += rows as u64;
        let lost = arrays.ids.len() as u64 - written;
        if lost > 0 {
            let table = self.table.quoted();
            warn!(
                rows = lost,
                table, "rows were no longer claimed by this relay when they were delivered"
            );
        }
        Ok(())
    }

    /// Writes what was refused, and gives back what goes back.
    pub(crate) async fn settle(&self, client: &Client) -> Result<()> {
        let _one = self.writing.lock().await;
        let (refused, returned) = {
            let state = self.state();
            (state.refused.clone(), state.returned.clone())
        };
        if !refused.is_empty() {
            let arrays = refused.iter().map(|(claim, _)| claim).collect();
            let errors: Vec<&str> = refused.iter().map(|(_, why)| why.as_str()).collect();
            failpoint!("refusing");
            self.write(client, &self.statements.refuse, &arrays, Some(&errors))
                .await?;
        }
        if !returned.is_empty() {
            let arrays = returned.iter().collect();
            self.write(client, &self.statements.release, &arrays, None)
                .await?;
        }
        let mut state = self.state();
        state.refused.drain(..refused.len());
        state.returned.drain(..returned.len());
        drop(state);
        self.written.notify_one();
        Ok(())
    }

    /// Makes claims last that are no longer young, and gives back those of others
    /// that have run out.
    ///
    /// # Errors
    /// `SlotInUse` if one is no longer ours.
    pub(crate) async fn renew(&self, client: &Client) -> Result<()> {
        let _one = self.writing.lock().await;
        let (arrays, is_time) = {
            let mut state = self.state();
            let is_time = (state.cleaned_at).is_none_or(|at| at.elapsed() >= STALE_INTERVAL);
            if is_time {
                state.cleaned_at = Some(Instant::now());
            }
            let old = |claim: &&Claim| !claim.is_refused && claim.since.elapsed() >= RENEW_AGE;
            let arrays: Arrays = state.held.iter().filter(old).collect();
            (arrays, is_time)
        };
        if !arrays.ids.is_empty() {
            self.renew_these(client, &arrays).await?;
            self.written.notify_one();
        }
        if let Some(sql) = &self.statements.release_stale
            && is_time
        {
            let rows = query_after(BEGIN, client, sql, &[]).await;
            let rows = rows.map_err(|error| self.failed(error))?;
            let released: i64 = rows.first().map_or(0, |row| row.get(0));
            debug!(rows = released, "claims of others that had run out");
            if released >= ROWS {
                // There are more.
                self.state().cleaned_at = None;
            }
        }
        Ok(())
    }

    async fn renew_these(&self, client: &Client, arrays: &Arrays) -> Result<()> {
        let since = Instant::now();
        let parameters = parameters(arrays);
        let renewed = query_after(BEGIN, client, &self.statements.renew, &parameters).await;
        let renewed = renewed.map_err(|error| self.failed(error))?;
        let mut tokens: HashMap<(&str, &str), &str> = renewed
            .iter()
            .map(|row| ((row.get(0), row.get(1)), row.get(2)))
            .collect();
        let asked = arrays.ids.iter().zip(&arrays.created_at);
        let asked: HashSet<(&str, &str)> = asked
            .map(|(id, created_at)| (id.as_str(), created_at.as_str()))
            .collect();
        let mut lost = 0;
        let mut guard = self.state();
        let state = &mut *guard;
        let refused = state.refused.iter_mut().map(|(claim, _)| claim);
        let others = refused.chain(&mut state.returned);
        let held = state.held.iter_mut().filter(|claim| !claim.is_refused);
        for claim in held.chain(others) {
            let row = (claim.id.as_str(), claim.created_at.as_str());
            if let Some(token) = tokens.remove(&row) {
                token.clone_into(&mut claim.token);
                claim.since = since;
            } else if asked.contains(&row) && !claim.is_refused && claim.since < since {
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
    pub(crate) async fn release(&self, client: &Client) -> Result<()> {
        {
            let _one = self.writing.lock().await;
            let mut state = self.state();
            let held = std::mem::take(&mut state.held);
            state.given = 0;
            let held = held.into_iter().filter(|claim| !claim.is_refused);
            state.returned.extend(held);
        }
        self.settle(client).await
    }

    /// Runs a statement on claims; says how many were still ours.
    async fn write(
        &self,
        client: &Client,
        sql: &str,
        arrays: &Arrays,
        errors: Option<&Vec<&str>>,
    ) -> Result<u64> {
        if arrays.ids.is_empty() {
            return Ok(0);
        }
        let mut parameters = parameters(arrays);
        if let Some(errors) = errors {
            parameters.push((errors, Type::TEXT_ARRAY));
        }
        let sql = format!("WITH written AS ({sql} RETURNING 1) SELECT count(*) FROM written");
        let rows = query_after(BEGIN, client, &sql, &parameters).await;
        let rows = rows.map_err(|error| self.failed(error))?;
        Ok(rows
            .first()
            .map_or(0, |row| row.get::<_, i64>(0).cast_unsigned()))
    }

    fn failed(&self, error: tokio_postgres::Error) -> Error {
        sort(format!("write claims of {}", self.table.quoted()), error)
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
            is_refused: false,
        }]);
        claims
    }

    #[tokio::test]
    async fn a_row_whose_claim_may_be_over_waits_until_it_is_renewed() {
        claims_of_age(CLAIM_MAX / 2).fresh().await;
        let old = claims_of_age(CLAIM_MAX);
        let moment = Duration::from_millis(50);
        assert!(timeout(moment, old.fresh()).await.is_err());
        old.state().held[0].since = Instant::now();
        old.written.notify_one();
        old.fresh().await;
    }
}
