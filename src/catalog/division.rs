//! The slices of an outbox that relays share, and who has which.
//!
//! A record key belongs to one of 64 slices, for ever. Each slice has a place of its own,
//! as a checkpoint has, and a lease of its own. So relays divide the slices, and what one
//! stores says nothing of what another has; a slice goes from one to another as a whole,
//! with its place.
//!
//! ```text
//!            relay A                    relay B
//!       ┌───────┴───────┐          ┌───────┴───────┐
//!       0   1   …      31          32   33  …     63     each: place, owner, lease
//! ```
//!
//! - Who claims slices, or asks for some, raises the checkpoint's epoch in the same
//!   statement, from what it has seen: so of two who decide at once on what they see, one
//!   decides anew. It takes only slices whose lease is over by the server's clock.
//! - Who has slices names its epoch with each write, and all writes renew the lease. One
//!   row less than it has: another has it, and the attempt is over.
//! - Who is asked for slices drains, stores where they stand, and hands them over.
//!
//! As with one lease, what a relay that comes too late may still send is what the next one
//! sends, too, in the same order: leases bound repetitions, the order holds without them.
//! There is no state of a session, so that it holds through a pooler.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use tokio_postgres::Client;
use tokio_postgres::types::Type;

use super::{Checkpoint, Gap, Held, LEASE, Mode, SLICES, Slices, Standing, lease, not_set_up};
use crate::contract::Contract;
use crate::database::{query_after, sort};
use crate::error::{Error, ErrorKind, Result};

/// What there is of a divided relay.
#[derive(Debug, Clone)]
pub struct Look {
    /// Of the checkpoint.
    epoch: i64,
    /// All slices, in the order of their numbers; none if it is not divided.
    pub slices: Vec<Slice>,
}

/// A slice, and who has it.
#[derive(Debug, Clone)]
pub struct Slice {
    /// From zero.
    pub number: u32,
    /// Rises with each owner.
    epoch: i64,
    /// Who had it last, unless it was given back.
    pub owner: Option<String>,
    /// For whom it is to be given up.
    pub wanted_by: Option<String>,
    /// For how many seconds it is leased still; below zero, for how long no more. Nothing
    /// if it never was.
    pub remaining: Option<f64>,
}

impl Slice {
    /// Of a slice that is not in any database.
    #[cfg(test)]
    pub(crate) fn new(
        number: u32,
        owner: Option<&str>,
        wanted_by: Option<&str>,
        remaining: f64,
    ) -> Self {
        Self {
            number,
            epoch: 0,
            owner: owner.map(str::to_owned),
            wanted_by: wanted_by.map(str::to_owned),
            remaining: Some(remaining),
        }
    }

    /// Who has it, if its lease is not over.
    pub fn served_by(&self) -> Option<&str> {
        let is_leased = self.remaining.is_some_and(|seconds| seconds > 0.0);
        self.owner.as_deref().filter(|_| is_leased)
    }
}

/// Looks who has which slices.
///
/// # Errors
/// `Slot` if there is no checkpoint, or if there are some of the slices and not all: what
/// the others said nobody knows.
pub async fn look(client: &Client, contract: &Contract) -> Result<Look> {
    let sql = contract.sql(
        "SELECT c.epoch, s.slice, s.epoch, s.owner, s.wanted_by, \
                extract(epoch FROM s.expires_at - clock_timestamp())::float8 \
         FROM :\"schema\".checkpoint AS c LEFT JOIN :\"schema\".slice AS s ON s.name = c.name \
         WHERE c.name = $1 ORDER BY s.slice",
    );
    let name = [(&contract.slot as _, Type::TEXT)];
    let rows = client.query_typed(&sql, &name).await;
    let rows = rows.map_err(|error| sort(doing("read", contract), error))?;
    let first = rows
        .first()
        .ok_or_else(|| not_set_up(contract, Some(Mode::Poll)))?;
    let slices = rows.iter().filter_map(|row| {
        Some(Slice {
            number: row.get::<_, Option<i32>>(1)?.cast_unsigned(),
            epoch: row.get(2),
            owner: row.get(3),
            wanted_by: row.get(4),
            remaining: row.get(5),
        })
    });
    let slices: Vec<Slice> = slices.collect();
    if !slices.is_empty() && slices.len() != SLICES as usize {
        return Err(some_are_gone(contract, slices.len()));
    }
    Ok(Look {
        epoch: first.get(0),
        slices,
    })
}

fn some_are_gone(contract: &Contract, left: usize) -> Error {
    let message = format!(
        "relay \"{}\" has {left} of {SLICES} slices: to have it publish again what it has since it was divided, \
         DELETE FROM {} WHERE name = {}",
        contract.slot,
        contract.table("slice"),
        postgres_protocol::escape::escape_literal(&contract.slot)
    );
    Error::new(ErrorKind::Slot, message)
}

/// Divides the relay, at the place where it is, unless one that is not divided is at work.
/// From then on none is. Does nothing if it looks otherwise by now.
pub async fn divide(client: &Client, contract: &Contract, look: &Look) -> Result<()> {
    let sql = contract.sql(
        "WITH taken AS ( \
             UPDATE :\"schema\".checkpoint \
             SET epoch = epoch + 1, owner = NULL, expires_at = NULL, updated_at = now() \
             WHERE name = $1 AND epoch = $2 AND mode = 'poll' \
               AND (owner IS NULL OR expires_at <= clock_timestamp()) \
             RETURNING name, snapshot, second_snapshot, seq) \
         INSERT INTO :\"schema\".slice (name, slice, snapshot, second_snapshot, seq) \
         SELECT name, slice, snapshot, second_snapshot, seq FROM taken, generate_series(0, 63) AS slice \
         RETURNING slice",
    );
    let parameters = [
        (&contract.slot as _, Type::TEXT),
        (&look.epoch as _, Type::INT8),
    ];
    failpoint!("dividing");
    let divided = query_after(lease::BEGIN, client, &sql, &parameters).await;
    failpoint!("divided");
    divided.map_err(|error| sort(doing("divide", contract), error))?;
    Ok(())
}

/// Gives up what this owner wants, and what it has but for those that it serves: others may
/// have them at once.
pub async fn leave(
    client: &Client,
    contract: &Contract,
    (owner, served): (&str, Slices),
) -> Result<()> {
    let sql = contract.sql(
        "UPDATE :\"schema\".slice \
         SET owner = nullif(owner, $2), wanted_by = NULL, updated_at = now(), \
             expires_at = CASE WHEN owner = $2 THEN clock_timestamp() ELSE expires_at END \
         WHERE name = $1 AND ((owner = $2 AND $3::bigint >> slice & 1 = 0) OR wanted_by = $2)",
    );
    let mask = served.mask();
    let parameters = [
        (&contract.slot as _, Type::TEXT),
        (&owner as _, Type::TEXT),
        (&mask as _, Type::INT8),
    ];
    let left = query_after(&BEGIN_BESIDE, client, &sql, &parameters).await;
    left.map_err(|error| sort(doing("give up", contract), error))?;
    Ok(())
}

/// Where all slices stand; nowhere, if the relay is not divided.
pub(crate) async fn where_slices_stand(
    client: &Client,
    contract: &Contract,
) -> Result<Vec<Standing>> {
    let sql = contract.sql(
        "SELECT slice, snapshot::text, second_snapshot::text, seq FROM :\"schema\".slice WHERE name = $1",
    );
    let name = [(&contract.slot as _, Type::TEXT)];
    let rows = client.query_typed(&sql, &name).await;
    let rows = rows.map_err(|error| sort(doing("read", contract), error))?;
    Ok(standings(&rows))
}

/// Refuses a relay that is divided.
///
/// # Errors
/// `Slot` if it is.
pub async fn check_undivided(client: &Client, contract: &Contract) -> Result<()> {
    if look(client, contract).await?.slices.is_empty() {
        return Ok(());
    }
    let message = format!(
        "relay \"{}\" is divided into slices: start it with `--shards`, such as `--shards 1` if it is the only one",
        contract.slot
    );
    Err(Error::new(ErrorKind::Slot, message))
}

/// Claims slices: those that are this owner's already, and those that nobody has. Says
/// where they stand. `None` if it looks otherwise by now.
pub async fn claim_slices(
    client: &Client,
    contract: &Contract,
    checked: &Checkpoint,
    look: &Look,
    (owner, slices): (&str, Slices),
) -> Result<Option<(Held, Vec<Standing>)>> {
    // No attempt before it had this epoch, nor any slice of what it claims.
    let epoch = look.slices.iter().map(|slice| slice.epoch).max();
    let epoch = epoch.unwrap_or_default() + 1;
    let sql = contract.sql(&format!(
        "WITH turn AS ( \
             UPDATE :\"schema\".checkpoint SET epoch = epoch + 1, timeline = $6, updated_at = now() \
             WHERE name = $1 AND epoch = $2 AND mode = 'poll' RETURNING name), \
         free AS ( \
             SELECT s.name, s.slice FROM :\"schema\".slice AS s JOIN turn USING (name) \
             WHERE $3::bigint >> s.slice & 1 = 1 \
               AND (s.owner = $4 OR s.expires_at IS NULL OR s.expires_at <= clock_timestamp()) \
             FOR UPDATE OF s SKIP LOCKED) \
         UPDATE :\"schema\".slice AS s \
         SET owner = $4, epoch = $5, wanted_by = CASE WHEN owner = $4 THEN wanted_by END{}, updated_at = now() \
         FROM free WHERE free.name = s.name AND free.slice = s.slice \
         RETURNING s.slice, s.snapshot::text, s.second_snapshot::text, s.seq",
        lease::RENEWED
    ));
    let mask = slices.mask();
    let parameters = [
        (&contract.slot as _, Type::TEXT),
        (&look.epoch as _, Type::INT8),
        (&mask as _, Type::INT8),
        (&owner as _, Type::TEXT),
        (&epoch as _, Type::INT8),
        (&checked.system.timeline as _, Type::INT4),
    ];
    failpoint!("claiming_slices");
    let rows = query_after(lease::BEGIN, client, &sql, &parameters).await;
    failpoint!("slices_claimed");
    let rows = rows.map_err(|error| sort(doing("claim", contract), error))?;
    let standings = standings(&rows);
    let slices = standings
        .iter()
        .fold(Slices::default(), |all, standing| all.with(standing.slices));
    let held = Held {
        slices,
        owner: owner.to_owned(),
        epoch,
    };
    Ok((!slices.is_empty()).then_some((held, standings)))
}

/// Slices that stand at the same place together.
fn standings(rows: &[tokio_postgres::Row]) -> Vec<Standing> {
    let mut places: BTreeMap<(String, Option<String>, Option<i64>), Slices> = BTreeMap::new();
    for row in rows {
        let place = places.entry((row.get(1), row.get(2), row.get(3)));
        place
            .or_default()
            .insert(row.get::<_, i32>(0).cast_unsigned());
    }
    let standings = places
        .into_iter()
        .map(|((since, until, seq), slices)| Standing {
            slices,
            gap: until.map(|until| Gap {
                since: since.clone(),
                until,
                seq: seq.unwrap_or_default(),
            }),
            snapshot: since,
        });
    standings.collect()
}

/// Asks those who have these slices for them.
pub async fn want_slices(
    client: &Client,
    contract: &Contract,
    look: &Look,
    (owner, slices): (&str, Slices),
) -> Result<()> {
    let sql = contract.sql(
        "WITH turn AS ( \
             UPDATE :\"schema\".checkpoint SET epoch = epoch + 1, updated_at = now() \
             WHERE name = $1 AND epoch = $2 RETURNING name), \
         wanted AS ( \
             SELECT s.name, s.slice FROM :\"schema\".slice AS s JOIN turn USING (name) \
             WHERE $3::bigint >> s.slice & 1 = 1 AND s.wanted_by IS NULL AND s.expires_at > clock_timestamp() \
             FOR UPDATE OF s SKIP LOCKED) \
         UPDATE :\"schema\".slice AS s SET wanted_by = $4, updated_at = now() \
         FROM wanted WHERE wanted.name = s.name AND wanted.slice = s.slice RETURNING s.slice",
    );
    let mask = slices.mask();
    let parameters = [
        (&contract.slot as _, Type::TEXT),
        (&look.epoch as _, Type::INT8),
        (&mask as _, Type::INT8),
        (&owner as _, Type::TEXT),
    ];
    failpoint!("wanting");
    let wanted = query_after(&BEGIN_BESIDE, client, &sql, &parameters).await;
    failpoint!("wanted");
    wanted.map_err(|error| sort(doing("ask for", contract), error))?;
    Ok(())
}

/// Begins what is written in the session that renews leases, besides: it must not wait for
/// long, as who has the row locked may have been cut off.
static BEGIN_BESIDE: LazyLock<String> =
    LazyLock::new(|| format!("{}; SET LOCAL lock_timeout = '500ms'", lease::BEGIN));

/// How long nobody has had a slice that others would have taken by now.
pub(crate) const FREE_MAX: f64 = LEASE.as_secs() as f64;

pub(super) fn doing(verb: &str, contract: &Contract) -> String {
    format!("{verb} the slices of relay \"{}\"", contract.slot)
}
