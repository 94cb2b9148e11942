//! What the relays have stored, and what follows from it.

use std::collections::BTreeSet;
use std::time::Duration;

use postgres_protocol::escape::escape_literal;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Row};

use super::batch::failed;
use crate::catalog::{self, SLICES};
use crate::contract::Contract;
use crate::duration::rounded;
use crate::error::{Error, ErrorKind, Result};

/// A relay that is gone for no longer than that is just being started again, however short the
/// retention is. One that polls renews its lease each second.
const SEEN_MIN: Duration = Duration::from_secs(60);

/// What is provably published: rows that each of these snapshots sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Proof {
    snapshots: BTreeSet<String>,
}

/// A row of the checkpoint.
///
/// One whose publication is of other tables does not read the outbox, and says nothing about
/// it.
const RELAYS: &str = "\
    SELECT c.name, c.snapshot::text, c.system_identifier, c.publication, \
           c.mode = 'wal' AND c.publication_identity IS DISTINCT FROM r.identity, \
           c.mode = 'poll' OR c.publication_identity IS NULL \
               OR concat(c.publication_identity, ' ', r.identity) ~ \
                  format(' table [0-9]+@[0-9]+:%s( |$)|\"puballtables\": true| schema [0-9]+@', to_regclass($1)::oid), \
           s.slices, s.snapshots, \
           CASE WHEN a.active THEN 0 \
                ELSE extract(epoch FROM clock_timestamp() - greatest(c.updated_at, s.updated_at, \
                                        (to_jsonb(a) ->> 'inactive_since')::timestamptz)) END::float8 \
    FROM :\"schema\".checkpoint AS c \
    CROSS JOIN LATERAL ( \
        SELECT count(*), array_agg(DISTINCT snapshot::text), max(updated_at) \
        FROM :\"schema\".slice WHERE name = c.name) AS s (slices, snapshots, updated_at) \
    CROSS JOIN LATERAL ( \
        SELECT CASE WHEN c.mode = 'wal' THEN :\"schema\".publication_identity(c.publication::name) END) AS r (identity) \
    LEFT JOIN pg_replication_slots AS a \
        ON a.slot_name = c.name AND a.database = current_database() AND c.mode = 'wal' \
    ORDER BY c.name";

impl Proof {
    /// Reads what all relays have stored.
    ///
    /// # Errors
    /// Whatever leaves it open what is published, or would do so for good.
    pub(super) async fn read(
        client: &Client,
        contract: &Contract,
        retention: Duration,
    ) -> Result<Self> {
        let outbox = contract.table("outbox");
        let sql = contract.sql(RELAYS);
        let rows = client.query_typed(&sql, &[(&outbox, Type::TEXT)]).await;
        let rows = rows.map_err(|error| {
            let table = contract.table("checkpoint");
            failed(&table, super::outbox::RIGHTS, error)
        })?;
        let system = catalog::system(client).await?;
        let mut snapshots = BTreeSet::new();
        for relay in rows
            .iter()
            .map(Relay::of)
            .filter(|relay| relay.reads_outbox)
        {
            snapshots.extend(relay.proves(&system.identifier, retention)?);
        }
        match snapshots.is_empty() {
            true => Err(no_relay(contract)),
            false => Ok(Self { snapshots }),
        }
    }

    /// Whether all relays have published the row `o`, in SQL.
    pub(super) fn condition(&self) -> String {
        let sees = |snapshot: &String| {
            let snapshot = escape_literal(snapshot);
            format!("pg_visible_in_snapshot(o.xid, {snapshot}::pg_snapshot)")
        };
        let seen: Vec<String> = self.snapshots.iter().map(sees).collect();
        format!("({})", seen.join(" AND "))
    }
}

/// What one relay has stored.
struct Relay<'r> {
    name: &'r str,
    snapshot: Option<String>,
    system: Option<&'r str>,
    publication: Option<&'r str>,
    is_changed: bool,
    reads_outbox: bool,
    slices: i64,
    /// Where the slices are, if there are any.
    slice_snapshots: Vec<String>,
    unseen_seconds: f64,
}

impl<'r> Relay<'r> {
    fn of(row: &'r Row) -> Self {
        Self {
            name: row.get(0),
            snapshot: row.get(1),
            system: row.get(2),
            publication: row.get(3),
            is_changed: row.get(4),
            reads_outbox: row.get(5),
            slices: row.get(6),
            slice_snapshots: row.get::<_, Option<Vec<String>>>(7).unwrap_or_default(),
            unseen_seconds: row.get(8),
        }
    }

    /// The snapshots that a row must be seen by, for this relay to have published it.
    fn proves(self, system: &str, retention: Duration) -> Result<Vec<String>> {
        let name = self.name;
        let forget = format!("if it is gone for good, run `postbox cleanup --forget {name}`");
        let (Some(snapshot), Some(stored)) = (self.snapshot, self.system) else {
            let message = format!(
                "the set-up of relay \"{name}\" has not finished, and what it is to publish is not known: run \
                 `postbox setup` for it again, or, {forget}"
            );
            return Err(Error::new(ErrorKind::Slot, message));
        };
        if stored != system {
            let message = format!(
                "checkpoint \"{name}\" belongs to the cluster with system identifier {stored}, and this one has \
                 {system}: it does not say what is published of this outbox; `postbox setup --adopt` takes the outbox \
                 over, or, {forget}"
            );
            return Err(Error::new(ErrorKind::Database, message));
        }
        if self.is_changed {
            let message = format!(
                "publication \"{}\" is not what it was when relay \"{name}\" was set up: its slot may have skipped rows, \
                 which must stay until they are published; run `postbox recover` for it first",
                self.publication.unwrap_or_default()
            );
            return Err(Error::new(ErrorKind::Publication, message));
        }
        if self.slices != 0 && self.slices != i64::from(SLICES) {
            let message = format!(
                "relay \"{name}\" has {} of {SLICES} slices, and what it has published of the others is not known: its \
                 next start says how to go on",
                self.slices
            );
            return Err(Error::new(ErrorKind::Slot, message));
        }
        if self.unseen_seconds > retention.max(SEEN_MIN).as_secs_f64() {
            let unseen = Duration::try_from_secs_f64(self.unseen_seconds).unwrap_or(Duration::MAX);
            let message = format!(
                "relay \"{name}\" was not seen for {}, longer than rows are kept, and they pile up for it: start it, \
                 or, {forget}",
                rounded(unseen)
            );
            return Err(Error::new(ErrorKind::Slot, message));
        }
        Ok(match self.slices {
            0 => vec![snapshot],
            _ => self.slice_snapshots,
        })
    }
}

/// Nothing would be in the way of deleting everything.
fn no_relay(contract: &Contract) -> Error {
    let message = format!(
        "no relay of {} is set up, and nothing says which of its rows are published: run `postbox setup`",
        contract.table("outbox")
    );
    Error::new(ErrorKind::Slot, message)
}
