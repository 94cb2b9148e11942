//! Rows of a table that says of each whether it is published, claimed from others who
//! read the same table.
//!
//! # The promise
//!
//! A row is claimed before it is sent and completed after the broker has it, in the
//! columns and by the rules of the library that made the table: its own workers and tools
//! go on beside us. Rows of one key come in the order of their creation, by the
//! application's clock, over whole batches: a row is not claimed while an earlier one of
//! its key is claimed by somebody else, or waits to be tried again. No transaction is open
//! while rows are sent. A row that cannot go out is put off, as its table says, and holds
//! up only its key; at the end of its attempts it holds up nobody.
//!
//! # What is misleading
//!
//! - `FOR UPDATE SKIP LOCKED` passes over a row that another is just claiming, and would
//!   go on with the next of its key. So what comes behind such a row is not claimed with it.
//! - Rows in the order of when they are due are not in the order of their keys: one that
//!   was tried again is due late and comes first. So of each key that has a row due, the
//!   oldest rows are looked at.
//! - Behind a row that waits there may be thousands of its key that are due, and fill each
//!   claim: so keys that are held are passed over until all others have had their turn.
//!
//! # How long a claim lasts
//!
//! Others take a claim for dead when it is older than a timeout, by default five minutes.
//! Ours are written so old that they end after ten seconds, and are renewed meanwhile: what
//! a relay that was killed has claimed is free again soon. We reckon from before a claim was
//! asked for; a row whose claim may be over by that is not sent before it is renewed.

mod claims;
mod statements;

pub use claims::{Claims, RENEW_INTERVAL, RENEWAL_MAX};
pub use statements::ClaimSettings;
pub(crate) use statements::{ROWS, failed, shape, unpublished};

use std::collections::{HashMap, HashSet, VecDeque};
use std::future::pending;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_postgres::types::{PgLsn, Type};

use self::claims::Claim;
use self::statements::{BYTES, LEASE, Statements, warn_of_missing_index};
use super::columns::Unreadable;
use super::messages::{Messages, Outbox};
use super::pause::{Found, Pause};
use super::{FORMATS, Item, Mark, Place, Position, Row};
use crate::database::{Database, Session, query_after};
use crate::error::{Result, joined};
use crate::event::Event;
use crate::pgoutput::{Relation, Value, encode_insert};
use crate::timestamp::Timestamp;

/// Rows between two marks: what a kill repeats beside what is in flight.
const MARK_ROWS: usize = 256;

/// How long keys that are held are passed over.
const HELD_MAX: Duration = Duration::from_secs(1);

/// How long it takes at most until claims that were left are claimed by somebody else: they
/// end, and are looked for now and then.
pub const LEFTOVERS_MAX: Duration = LEASE.saturating_add(Duration::from_secs(13));

/// A claim that takes longer is told.
const LONG: Duration = Duration::from_secs(1);

/// How long the end waits for a claim that is on its way. Without that it ends by itself.
const STOP_MAX: Duration = Duration::from_secs(5);

/// The oid of the table in its messages. No table has it.
const RELATION: u32 = 0;

/// Claims rows, and gives them in order.
pub struct Claimer {
    session: Arc<Session>,
    claims: Arc<Claims>,
    messages: Messages,
    is_keyed: bool,
    rows: VecDeque<Claimed>,
    claiming: JoinSet<Result<Answer>>,
    pause: Pause,
    /// Keys whose rows are all held, as of late.
    passed_over: Vec<String>,
    passed_over_since: Instant,
    /// How long the last claim took.
    took: Duration,
    /// Keys of rows that were refused, until that is written and seen.
    refused: HashSet<u64>,
    /// The key of the row that was given last.
    last_key: Option<u64>,
    unmarked: usize,
    given: u64,
    /// Until when an attempt before this one may have left claims.
    leftovers_until: Option<Instant>,
    has_caught_up: bool,
}

/// A row that is ours, and not yet given.
struct Claimed {
    row: Row,
    /// Its topic and key.
    key: Option<u64>,
}

struct Answer {
    /// How long the server took for it.
    took: Duration,
    /// How many rows were due, as far as they were looked at.
    due: i64,
    rows: Vec<Claimed>,
    /// Keys whose rows are all held, each behind its topic.
    held: Vec<String>,
}

impl Claimer {
    /// Opens a session to claim by, as `worker`, which nobody has been before.
    ///
    /// # Errors
    /// If the table is not as its preset says, or cannot be read.
    pub async fn open(
        database: &Database,
        outbox: Outbox,
        settings: &ClaimSettings,
        worker: &str,
        intervals: (Duration, Duration),
    ) -> Result<Self> {
        let table = &settings.table;
        let tracking = settings.tracking()?;
        let session = database.connect_pooled("postbox claims").await?;
        let shape = shape(&session.client, table).await?;
        warn_of_missing_index(&session.client, table).await?;
        let statements = Statements::new(settings, worker, tracking, &shape);
        let mut messages = Messages::new(outbox);
        messages.describe(&Relation {
            id: RELATION,
            schema: table.schema.clone(),
            name: table.name.clone(),
            columns: shape.columns,
        });
        Ok(Self {
            session: Arc::new(session),
            claims: Arc::new(Claims::new(statements, table.clone())),
            messages,
            is_keyed: table.column("partition_key").is_some(),
            rows: VecDeque::new(),
            claiming: JoinSet::new(),
            pause: Pause::new(intervals.0, intervals.1),
            passed_over: Vec::new(),
            passed_over_since: Instant::now(),
            took: Duration::ZERO,
            refused: HashSet::new(),
            last_key: None,
            unmarked: 0,
            given: 0,
            leftovers_until: None,
            has_caught_up: false,
        })
    }

    /// Rows that an attempt before this one had claimed may not have been given back, until
    /// then.
    pub fn expect_leftovers(&mut self, until: Instant) {
        self.leftovers_until = Some(until);
    }

    /// What is claimed, for those who complete it.
    pub fn claims(&self) -> &Arc<Claims> {
        &self.claims
    }

    /// The next row or position. Cancel-safe.
    ///
    /// # Errors
    /// If the table cannot be read.
    pub async fn next(&mut self) -> Result<Item> {
        loop {
            if self.unmarked >= MARK_ROWS || (self.rows.is_empty() && self.unmarked > 0) {
                self.unmarked = 0;
                return Ok(Item::Position(Position {
                    lsn: PgLsn::from(0),
                    mark: Some(Mark::Claims(self.given)),
                }));
            }
            if self.claiming.is_empty() && self.wants_more() {
                if self.rows.is_empty() {
                    self.pause.over(pending()).await;
                    self.claims.few_locked().await;
                    // A row that was refused holds its key only once that is written.
                    self.claims.settled().await;
                    self.ask();
                } else if self.pause.is_over()
                    && self.claims.is_settled()
                    && !self.claims.are_too_many_locked()
                {
                    self.ask();
                }
            }
            if !self.rows.is_empty() && !self.claims.fresh().await {
                self.give_back_first();
                continue;
            }
            if let Some(claimed) = self.rows.pop_front() {
                self.given = self.claims.give();
                self.last_key = claimed.key;
                self.unmarked += 1;
                return Ok(Item::Row(claimed.row));
            }
            let Some(answer) = self.claiming.join_next().await else {
                continue;
            };
            self.answered(joined(answer)?);
        }
    }

    /// As [`Stream::try_next`](super::wal::Stream::try_next).
    ///
    /// # Errors
    /// As [`next`](Self::next).
    pub fn try_next(&mut self) -> Result<Option<Item>> {
        match pin!(self.next()).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(item) => item.map(Some),
            Poll::Pending => Ok(None),
        }
    }

    /// Whether less than half a claim is left, by rows and by bytes.
    fn wants_more(&self) -> bool {
        let bytes = self.rows.iter().map(|claimed| claimed.row.bytes.len());
        self.rows.len() < ROWS as usize / 2 && bytes.sum::<usize>() < BYTES / 2
    }

    fn ask(&mut self) {
        self.refused.clear();
        if self.passed_over_since.elapsed() > HELD_MAX.max(self.took * 20) {
            self.passed_over.clear();
            self.passed_over_since = Instant::now();
        }
        self.pause.look();
        let (session, claims) = (Arc::clone(&self.session), Arc::clone(&self.claims));
        let mut held = self.passed_over.clone();
        held.extend(claims.locked_keys());
        let is_keyed = self.is_keyed;
        let claiming = async move { claim(&session, &claims, is_keyed, held).await };
        self.claiming.spawn(claiming);
    }

    fn answered(&mut self, answer: Answer) {
        let asked_at = self.pause.looked_at();
        self.took = answer.took;
        let is_all = answer.due < ROWS;
        if is_all {
            self.passed_over.clear();
            self.passed_over_since = Instant::now();
        } else {
            self.passed_over.extend(answer.held);
        }
        self.pause.found(match (answer.rows.is_empty(), is_all) {
            (false, false) => Found::Many,
            (false, true) => Found::Rows,
            (true, false) => Found::NothingYet,
            (true, true) => Found::Nothing,
        });
        let is_whole = (self.leftovers_until).is_none_or(|until| asked_at > until);
        self.has_caught_up |= is_all && is_whole;
        self.rows.extend(answer.rows);
        if !self.refused.is_empty() {
            self.give_back_refused();
        }
    }

    /// The row that was given last cannot go out: nor do those of its key that are behind
    /// it.
    pub fn refuse_last(&mut self, why: String) {
        self.claims.refuse_last(why);
        if let Some(key) = self.last_key {
            self.refused.insert(key);
            self.give_back_refused();
        }
    }

    /// The row that would be given next is locked by somebody, and its claim may be over.
    fn give_back_first(&mut self) {
        match self.rows.front().and_then(|claimed| claimed.key) {
            Some(key) => {
                self.refused.insert(key);
                self.give_back_refused();
            }
            None => {
                self.rows.pop_front();
                self.claims.give_back(|number| number == 0);
            }
        }
    }

    fn give_back_refused(&mut self) {
        let refused = &self.refused;
        let goes_back = |claimed: &Claimed| claimed.key.is_some_and(|key| refused.contains(&key));
        // More are ours if an answer has not been looked at: then these have their turn.
        let rows = &self.rows;
        self.claims
            .give_back(|number| rows.get(number).is_some_and(goes_back));
        self.rows.retain(|claimed| !goes_back(claimed));
    }

    /// Claims no more. What was just being claimed is ours by then, to be given back: says
    /// whether that is known.
    pub async fn stop(&mut self) -> bool {
        match timeout(STOP_MAX, self.claiming.join_next()).await {
            Ok(None) => true,
            Ok(Some(Ok(Ok(answer)))) => {
                self.answered(answer);
                true
            }
            _ => false,
        }
    }

    /// The event of a row that this source gave.
    ///
    /// # Errors
    /// If the row is not an event.
    pub fn event<'a>(&self, row: &'a Row) -> Result<Event<'a>, Unreadable> {
        self.messages.event(row)
    }

    /// What a person needs to find the row.
    pub fn name_of(&self, row: &Row) -> String {
        self.messages.name_of(row)
    }

    /// What may be stored once all rows that were given are delivered, if that is not the
    /// last position.
    pub fn mark(&self) -> Option<Mark> {
        (self.unmarked > 0).then_some(Mark::Claims(self.given))
    }

    /// The same, but for the last of these rows.
    pub fn mark_before_last(&self) -> Option<Mark> {
        (self.unmarked > 0).then(|| Mark::Claims(self.given - 1))
    }

    /// Whether an answer of the server has been outstanding for so long that it is worth
    /// telling.
    pub fn is_asking(&self) -> bool {
        !self.claiming.is_empty() && self.pause.looked_at().elapsed() > LONG
    }

    /// Whether everything that was there at the start has been given: also what a relay
    /// before this one had claimed.
    pub fn has_caught_up(&self) -> bool {
        self.has_caught_up && self.rows.is_empty()
    }
}

async fn claim(
    session: &Session,
    claims: &Claims,
    is_keyed: bool,
    passed_over: Vec<String>,
) -> Result<Answer> {
    let tokens = claims.tokens();
    let since = std::time::Instant::now();
    let parameters = [
        (&tokens as _, Type::TEXT_ARRAY),
        (&passed_over as _, Type::TEXT_ARRAY),
    ];
    let parameters = if is_keyed {
        &parameters[..]
    } else {
        &parameters[..1]
    };
    failpoint!("claiming_rows");
    let sql = &claims.statements.claim;
    let rows = query_after(&BEGIN, &session.client, sql, parameters).await;
    let rows = rows.map_err(|error| claims.failed_to("claim rows of", error))?;
    failpoint!("rows_claimed");
    let mut answer = Answer {
        took: since.elapsed(),
        due: rows.first().map_or(0, |row| row.get(0)),
        rows: Vec::with_capacity(rows.len()),
        held: Vec::new(),
    };
    let mut ours = Vec::with_capacity(rows.len());
    let mut keys: HashMap<(&str, &str), u64> = HashMap::new();
    for row in &rows {
        let key: Option<(&str, &str)> = row.get::<_, Option<&str>>(1).zip(row.get(2));
        let Some(id) = row.get::<_, Option<&str>>(4) else {
            if let (Some((topic, key)), true) = (key, row.get(3)) {
                answer.held.push(format!("{topic}\n{key}"));
            }
            continue;
        };
        ours.push(Claim {
            id: id.to_owned(),
            created_at: row.get(5),
            token: row.get(6),
            since,
            key: key.map(|(topic, key)| format!("{topic}\n{key}")),
            is_refused: false,
            is_locked: false,
        });
        let key = key.map(|key| *keys.entry(key).or_insert_with(|| hash(&key)));
        answer.rows.push(Claimed {
            row: read(row, id),
            key,
        });
    }
    // From now on they are renewed, though it may be long until there is room for them.
    claims.add(ours);
    Ok(answer)
}

fn read(row: &tokio_postgres::Row, id: &str) -> Row {
    let text = |column| row.get::<_, Option<&str>>(column).map(str::as_bytes);
    let values = (8..row.len()).map(|column| text(column).map_or(Value::Null, Value::Text));
    Row {
        bytes: encode_insert(RELATION, values).into(),
        place: Place {
            commit_lsn: PgLsn::from(0),
            // The same, whenever it is claimed.
            ordinal: hash(&id),
        },
        // When it was committed the table does not say.
        committed_at: Timestamp::from_unix_micros(row.get(7)),
        xid: 0,
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Begins the transaction of each statement on claims, whatever the role or the database has
/// set: what it sees is on the server's disk once it is committed, so that no row is sent
/// that a crash takes back.
static BEGIN: std::sync::LazyLock<String> = std::sync::LazyLock::new(|| {
    let own = [
        ("row_security", "off"),
        ("statement_timeout", "0"),
        ("lock_timeout", "5000"),
        ("synchronous_commit", "local"),
        ("enable_seqscan", "off"),
        ("jit", "off"),
        ("max_parallel_workers_per_gather", "0"),
    ];
    let settings = FORMATS.into_iter().chain(own);
    let settings: String = settings
        .map(|(name, value)| format!("; SET LOCAL {name} = {value}"))
        .collect();
    format!("BEGIN{settings}")
});
