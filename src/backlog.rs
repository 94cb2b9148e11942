//! What is committed and not delivered: the backlog.
//!
//! The checkpoint says what is delivered, the outbox has what is committed, and both are
//! read in one short transaction; so it can be measured whatever the relay is doing, and
//! whether there is one. What a checkpoint does not say yet counts as not delivered: with
//! polling what was delivered within the last `--status-interval`, from a slot what was
//! since the last fence.
//!
//! An outbox may hold millions of rows, and a backlog, too. No look is at more than
//! [`EVENTS_MAX`] rows of either, or about as many, and no statement takes longer than
//! two seconds; a count that comes to [`EVENTS_MAX`] or more says that there are at least so
//! many.
//!
//! # Which rows
//!
//! A row is pending if the checkpoint's snapshot does not see it. While a gap is read
//! (`source/gap.rs`), the rows of the gap are delivered up to its `seq`.
//!
//! - **With an index on `xid`**, which polling has: between two snapshots lie few ranges of
//!   transaction ids, those that had not begun by the first and have ended by the second,
//!   and those that were running and have ended. Only their rows are looked at, so that a
//!   transaction that is open costs nothing, however many rows it has written. Where these are
//!   too many and a gap is being read, what is behind its `seq` is counted instead.
//! - **Without one**, mostly with a slot: pending rows are the last by `seq`, but for those
//!   that longer transactions have committed late. So the look goes back from the end, in steps
//!   each as long as all before it, until one finds nothing. It overlooks what was committed
//!   late with more rows behind it that were delivered before: 1,024, or as many as
//!   are pending. Rows of an open transaction at the end are passed over one by one, which
//!   may take too long. Where too many are pending, the oldest is found by halving.
//!
//! Where a relay is divided, each of its slices has a place of its own, and a look is at rows
//! of those that stand together: it passes over the rows of the others. A table whose rows
//! say whether they are published needs no checkpoint: [`measure_claims`].

use std::collections::BTreeMap;
use std::time::Duration;

use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};

use crate::catalog::{self, Gap, KEY_COLUMNS, Slices, Standing, Stored};
use crate::contract::Contract;
use crate::database::{query_after, sort};
use crate::envelope::Route;
use crate::error::{Error, ErrorKind, Result};
use crate::source::claim::{self, ClaimSettings};

/// From how many on no more events are counted.
pub const EVENTS_MAX: u64 = 100_000;

/// The same, as a limit of rows that are looked at.
const ROWS_MAX: i64 = EVENTS_MAX.cast_signed();

/// How many rows the first step back from the end looks at: mostly nothing is pending
/// there, and that is all.
const STEP_ROWS: i64 = 1_024;

const DOING: &str = "measure the backlog";

/// What is committed and not delivered.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Backlog {
    /// How many events; from [`EVENTS_MAX`] on, at least so many.
    pub events: u64,
    /// For how long the oldest of them has been there, since its `created_at`, by the
    /// server's clock. `None` where there are none, or none has a time.
    pub oldest: Option<Duration>,
    /// How many of them go to which topic; likewise.
    pub topics: BTreeMap<String, u64>,
}

/// Measures the backlog of this contract's relay, with a route for rows that name no
/// topic. `None` where no relay was set up. Not cancel-safe: it may leave its transaction
/// open.
///
/// ```no_run
/// # async fn f(client: tokio_postgres::Client) -> postbox::Result<()> {
/// use postbox::{backlog, contract::Contract, envelope::Route};
///
/// let backlog = backlog::measure(&client, &Contract::default(), &Route::default()).await?;
/// if let Some(backlog) = backlog {
///     println!("{} events are pending", backlog.events);
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// If the checkpoint or the outbox cannot be read, or not within two seconds a statement.
pub async fn measure(
    client: &Client,
    contract: &Contract,
    route: &Route,
) -> Result<Option<Backlog>> {
    let measured = measure_in_transaction(client, contract, route).await;
    // What has failed is rolled back by this, too.
    let ended = client.batch_execute("COMMIT").await;
    let measured = measured?;
    ended.map_err(|error| sort(DOING, error))?;
    Ok(measured)
}

async fn measure_in_transaction(
    client: &Client,
    contract: &Contract,
    route: &Route,
) -> Result<Option<Backlog>> {
    let begun = client.batch_execute(BEGIN).await;
    begun.map_err(|error| sort(DOING, error))?;
    let checkpoint = match catalog::stored(client, contract).await? {
        Stored::At(checkpoint) | Stored::Recovering(checkpoint) => checkpoint,
        Stored::Missing | Stored::Unfinished => return Ok(None),
    };
    let mut standings = catalog::where_slices_stand(client, contract).await?;
    if standings.is_empty() {
        standings.push(Standing {
            slices: Slices::ALL,
            snapshot: checkpoint.snapshot,
            gap: checkpoint.gap,
        });
    }
    let has_xid_index = catalog::has_xid_index(client, contract).await?;
    let mut found = Found::default();
    for standing in &standings {
        let key = KEY_COLUMNS.map(|column| format!("o.{column}"));
        let of_slices = standing.slices.condition(&key);
        let look = Look {
            client,
            outbox: contract.table("outbox"),
            delivered: Delivered::by(standing),
            of_slices: of_slices.unwrap_or_else(|| "true".to_owned()),
            route,
        };
        found.add(match has_xid_index {
            true => look.by_transaction(standing.gap.as_ref()).await?,
            false => look.back_from_end().await?,
        });
    }
    Ok(Some(found.backlog()))
}

/// Measures what there is to be claimed of a table whose rows say whether they are
/// published, and what is claimed. Rows that are only scheduled for later do not count.
///
/// # Errors
/// If the table cannot be read, or not within two seconds; or its preset has no claims.
pub async fn measure_claims(client: &Client, settings: &ClaimSettings) -> Result<Backlog> {
    let sql = settings.pending(EVENTS_MAX)?;
    let rows = query_after(BEGIN, client, &sql, &[]).await;
    let failed = |error| claim::failed(&settings.table, "measure the backlog of", error);
    let rows = rows.map_err(failed)?;
    let mut found = Found::default();
    for row in &rows {
        let events = row.get::<_, i64>(1).unsigned_abs();
        found.add(Found {
            events,
            oldest: row.get(2),
            topics: BTreeMap::from([(row.get(0), events)]),
            ..Found::default()
        });
    }
    Ok(found.backlog())
}

/// Statements of this transaction see the same. A policy that hides rows must be an error;
/// nobody waits for us, and we wait for nobody. With these ways off, the planner goes by
/// the indexes, however old its statistics are.
pub(crate) const BEGIN: &str = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL row_security = off; \
    SET LOCAL statement_timeout = 2000; SET LOCAL lock_timeout = 1000; SET LOCAL jit = off; \
    SET LOCAL max_parallel_workers_per_gather = 0; SET LOCAL enable_seqscan = off; \
    SET LOCAL enable_bitmapscan = off";

/// What is delivered: what `since` sees, and what `until` sees up to `seq`.
struct Delivered {
    since: String,
    until: String,
    seq: i64,
}

impl Delivered {
    fn by(standing: &Standing) -> Self {
        let gap = standing.gap.as_ref();
        Self {
            since: standing.snapshot.clone(),
            until: gap.map_or(&standing.snapshot, |gap| &gap.until).clone(),
            seq: gap.map_or(i64::MIN, |gap| gap.seq),
        }
    }
}

struct Look<'a> {
    client: &'a Client,
    outbox: String,
    delivered: Delivered,
    /// Whether the row `o` is in the slices that are looked at: rows of others count as little
    /// as if they were in another table, also where rows are limited.
    of_slices: String,
    route: &'a Route,
}

impl Look<'_> {
    /// What transactions have committed that the checkpoint's snapshot does not see.
    async fn by_transaction(&self, gap: Option<&Gap>) -> Result<Found> {
        let sql = "SELECT pg_current_snapshot()::text";
        let now = self.client.query_typed_one(sql, &[]).await;
        let now = now.map_err(|error| sort(DOING, error))?;
        let (first, last) = Snapshot::read(now.get(0))?.since(&self.since()?);
        let rows = format!(
            "SELECT o.* FROM unnest($4::text::xid8[], $5::text::xid8[]) AS ended (first, last), \
                    LATERAL (SELECT * FROM {} WHERE xid BETWEEN ended.first AND ended.last OFFSET 0) AS o \
             WHERE {} LIMIT $6",
            self.outbox, self.of_slices
        );
        let parameters = [
            (&first as _, Type::TEXT),
            (&last as _, Type::TEXT),
            (&ROWS_MAX as _, Type::INT8),
        ];
        let found = self.count(&rows, &parameters).await?;
        match gap {
            // Those that are delivered of a large gap may be all that was found.
            Some(gap) if found.looked_at >= ROWS_MAX && found.events < EVENTS_MAX => {
                self.behind(gap.seq, ROWS_MAX).await
            }
            _ => Ok(found),
        }
    }

    /// The last rows, as far back as any is pending.
    async fn back_from_end(&self) -> Result<Found> {
        let mut found = Found::default();
        let mut rows = STEP_ROWS;
        loop {
            let step = self.before(found.lowest.unwrap_or(i64::MAX), rows).await?;
            let (is_last, is_whole) = (step.events == 0, step.looked_at == rows);
            found.add(step);
            if is_last || !is_whole {
                return Ok(found);
            }
            if found.looked_at >= ROWS_MAX {
                break;
            }
            rows = found.looked_at;
        }
        if found.events >= EVENTS_MAX {
            found.oldest = self.oldest_before(found.lowest).await?;
        }
        Ok(found)
    }

    /// So many rows behind this `seq`.
    async fn behind(&self, seq: i64, rows: i64) -> Result<Found> {
        self.beside(">", "ASC", seq, rows).await
    }

    /// So many rows before this `seq`.
    async fn before(&self, seq: i64, rows: i64) -> Result<Found> {
        self.beside("<", "DESC", seq, rows).await
    }

    async fn beside(&self, which: &str, order: &str, seq: i64, rows: i64) -> Result<Found> {
        let sql = format!(
            "SELECT * FROM {} AS o WHERE seq {which} $4 AND {} ORDER BY seq {order} LIMIT $5",
            self.outbox, self.of_slices
        );
        let parameters = [(&seq as _, Type::INT8), (&rows as _, Type::INT8)];
        self.count(&sql, &parameters).await
    }

    /// For how long the first pending row has been there, in seconds. Before this `seq`, and from
    /// some row on, all are taken to be.
    async fn oldest_before(&self, seq: Option<i64>) -> Result<Option<f64>> {
        let (outbox, high) = (&self.outbox, seq.unwrap_or_default());
        let of_slices = &self.of_slices;
        let sql = format!(
            "WITH RECURSIVE search (low, high) AS ( \
                 SELECT (SELECT min(seq) - 1 FROM {outbox}), $4::bigint \
                 UNION ALL \
                 SELECT CASE WHEN r.pending THEN s.low ELSE r.seq END, CASE WHEN r.pending THEN s.middle ELSE s.high END \
                 FROM (SELECT low, high, (low + high) / 2 AS middle FROM search WHERE high - low > 1) AS s, \
                      LATERAL (SELECT o.seq, {PENDING} AS pending FROM {outbox} AS o, {DELIVERED} AS d \
                               WHERE o.seq >= s.middle AND {of_slices} ORDER BY o.seq LIMIT 1) AS r) \
             SELECT {AGE} FROM {outbox} AS o WHERE o.seq >= (SELECT min(high) FROM search) AND {of_slices} \
             GROUP BY o.seq ORDER BY o.seq LIMIT 1"
        );
        let rows = self.query(&sql, &[(&high as _, Type::INT8)]).await?;
        Ok(rows.first().and_then(|row| row.get(0)))
    }

    /// Counts what is pending of these rows.
    async fn count(&self, rows: &str, parameters: &[Parameter<'_>]) -> Result<Found> {
        // Groups, as the route makes a topic of what a row says. The name in quotes is not
        // that of anybody's column.
        let sql = format!(
            "SELECT o.\"is pending\", CASE WHEN o.\"is pending\" THEN o.topic::text END, \
                    CASE WHEN o.\"is pending\" AND o.topic IS NULL THEN o.aggregate_type::text END, \
                    CASE WHEN o.\"is pending\" AND o.topic IS NULL THEN o.event_type::text END, \
                    count(*), {AGE}, min(o.seq) \
             FROM (SELECT o.*, {PENDING} AS \"is pending\" FROM ({rows}) AS o, {DELIVERED} AS d) AS o \
             GROUP BY 1, 2, 3, 4"
        );
        let rows = self.query(&sql, parameters).await?;
        let mut found = Found::default();
        for row in &rows {
            found.add(self.read(row));
        }
        Ok(found)
    }

    fn read(&self, row: &Row) -> Found {
        let rows: i64 = row.get(4);
        let mut found = Found {
            looked_at: rows,
            lowest: row.get(6),
            ..Found::default()
        };
        if row.get(0) {
            let events = rows.unsigned_abs();
            let topic = match (row.get(1), row.get(2), row.get(3)) {
                (Some(topic), ..) => topic,
                (None, Some(aggregate_type), Some(event_type)) => {
                    self.route.topic_of(aggregate_type, event_type)
                }
                // Such an event cannot go out.
                _ => String::new(),
            };
            found.events = events;
            found.oldest = row.get(5);
            found.topics.insert(topic, events);
        }
        found
    }

    async fn query(&self, sql: &str, parameters: &[Parameter<'_>]) -> Result<Vec<Row>> {
        let mut all: Vec<Parameter<'_>> = vec![
            (&self.delivered.since, Type::TEXT),
            (&self.delivered.until, Type::TEXT),
            (&self.delivered.seq, Type::INT8),
        ];
        all.extend_from_slice(parameters);
        let rows = self.client.query_typed(sql, &all).await;
        rows.map_err(|error| sort(DOING, error))
    }

    fn since(&self) -> Result<Snapshot> {
        Snapshot::read(&self.delivered.since)
    }
}

type Parameter<'p> = (&'p (dyn ToSql + Sync), Type);

/// The first three parameters, read once and not for each row.
const DELIVERED: &str = "(SELECT $1::text::pg_snapshot AS since, $2::text::pg_snapshot AS until, \
                                 $3::bigint AS seq OFFSET 0)";

/// Whether the row `o` is pending.
const PENDING: &str = "(NOT pg_visible_in_snapshot(o.xid, d.since) \
                        AND (o.seq > d.seq OR NOT pg_visible_in_snapshot(o.xid, d.until)))";

/// For how long the oldest of these rows has been there, in seconds.
const AGE: &str = "(extract(epoch FROM clock_timestamp()) \
                    - extract(epoch FROM min(o.created_at) FILTER (WHERE isfinite(o.created_at))))::float8";

/// What a look has found.
#[derive(Debug, Default)]
struct Found {
    looked_at: i64,
    /// The smallest `seq` that was looked at.
    lowest: Option<i64>,
    events: u64,
    /// In seconds.
    oldest: Option<f64>,
    topics: BTreeMap<String, u64>,
}

impl Found {
    fn add(&mut self, other: Self) {
        self.looked_at += other.looked_at;
        self.lowest = [self.lowest, other.lowest].into_iter().flatten().min();
        self.events += other.events;
        let oldest = [self.oldest, other.oldest].into_iter().flatten();
        self.oldest = oldest.reduce(f64::max);
        for (topic, events) in other.topics {
            *self.topics.entry(topic).or_default() += events;
        }
    }

    fn backlog(self) -> Backlog {
        // A time in the future is none that has passed.
        let age = |seconds: f64| Duration::try_from_secs_f64(seconds.max(0.0)).ok();
        Backlog {
            events: self.events,
            oldest: self.oldest.and_then(age),
            topics: self.topics,
        }
    }
}

/// A `pg_snapshot`.
#[derive(Debug)]
struct Snapshot {
    /// Transactions from this one on had not begun.
    xmax: u64,
    /// And these were running.
    running: Vec<u64>,
}

impl Snapshot {
    fn read(text: &str) -> Result<Self> {
        let mut parts = text.split(':');
        let (_, xmax, running) = (parts.next(), parts.next(), parts.next());
        let running = running.unwrap_or_default().split_terminator(',');
        let running = running.map(str::parse).collect();
        match (xmax.map(str::parse), running) {
            (Some(Ok(xmax)), Ok(running)) => Ok(Self { xmax, running }),
            _ => {
                let message = format!("\"{text}\" is not a snapshot");
                Err(Error::new(ErrorKind::Unexpected, message))
            }
        }
    }

    /// The transactions that have ended since an earlier one: ranges, as two arrays of
    /// their firsts and lasts.
    fn since(&self, earlier: &Self) -> (String, String) {
        let mut ranges = Vec::new();
        let ended = |xid: &&u64| **xid < self.xmax && !self.running.contains(*xid);
        ranges.extend(earlier.running.iter().filter(ended).map(|xid| (*xid, *xid)));
        let mut running = self.running.clone();
        running.sort_unstable();
        let mut first = earlier.xmax;
        for end in running.into_iter().chain([self.xmax]) {
            if first < end {
                ranges.push((first, end - 1));
            }
            first = first.max(end + 1);
        }
        let array = |numbers: Vec<String>| format!("{{{}}}", numbers.join(","));
        (
            array(ranges.iter().map(|range| range.0.to_string()).collect()),
            array(ranges.iter().map(|range| range.1.to_string()).collect()),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn between_two_snapshots_lie_the_transactions_that_have_ended() {
        for (earlier, now, first, last) in [
            ("10:20:", "20:20:", "{}", "{}"),
            ("10:20:", "25:25:", "{20}", "{24}"),
            ("10:20:10,14", "10:25:10", "{14,20}", "{14,24}"),
            ("10:20:10,14", "10:25:10,22,14", "{20,23}", "{21,24}"),
            ("10:20:", "20:25:20,24", "{21}", "{23}"),
            ("3:3:", "7:9:7,8", "{3}", "{6}"),
        ] {
            let ranges = Snapshot::read(now)
                .unwrap()
                .since(&Snapshot::read(earlier).unwrap());
            assert_eq!(
                ranges,
                (first.to_owned(), last.to_owned()),
                "{earlier} {now}"
            );
        }
        for text in ["", "10", "10:x:", "10:20:1,,2"] {
            assert!(Snapshot::read(text).is_err(), "{text}");
        }
    }
}
