//! The SQL by which rows of another library's table are claimed, and what becomes of them.

use std::time::Duration;

use postgres_protocol::escape::escape_literal;
use tokio_postgres::Client;
use tokio_postgres::types::Type;
use tracing::warn;

use crate::database::{sort, sort_with};
use crate::error::{Error, ErrorKind, Result};
use crate::pgoutput::Column;
use crate::table::{Table, Tracking};

/// The most rows in a claim: enough that what it costs besides is paid for by many.
pub(crate) const ROWS: i64 = 1000;

/// The most bytes in a claim, as text, but for one row.
pub(super) const BYTES: usize = 8 << 20;

/// The longest time until a row that was refused is tried again, the time after the first
/// refusal, which doubles with each: those of omni-box. Each is cut by up to half, at
/// random.
const BACKOFF_MAX: u32 = 3600;
const BACKOFF: u32 = 10;

/// The most characters of an error that are kept, if its column has room for them.
const ERROR_MAX: u32 = 500;

/// How a table is claimed from.
#[derive(Debug, Clone)]
pub struct ClaimSettings {
    /// The table.
    pub table: Table,
    /// After how long a claim that is not renewed is over, for all who claim from this
    /// table.
    pub timeout: Duration,
    /// How often a row is tried whose table does not say.
    pub attempts_max: u32,
}

impl ClaimSettings {
    /// What there is to be claimed, and what is claimed: topic, how many rows, and for how
    /// many seconds the oldest has been there. At most so many rows are looked at.
    ///
    /// # Errors
    /// `Settings`: the rows of this table do not say whether they are published.
    pub(crate) fn pending(&self, rows_max: u64) -> Result<String> {
        let Terms {
            table,
            created_at,
            pending,
            due,
            holds,
            ..
        } = Terms::new(self, "", self.tracking()?, "text");
        Ok(format!(
            "SELECT topic, count(*), \
                    (extract(epoch FROM clock_timestamp()) - extract(epoch FROM min(created_at)))::float8 \
             FROM (SELECT {}::text AS topic, {created_at} AS created_at FROM {table} AS e \
                   WHERE {pending} AND (({due}) OR {holds}) LIMIT {rows_max}) AS e GROUP BY topic",
            column(&self.table, "topic")
        ))
    }

    /// What marks rows published, whoever has claimed them, and says how many: it takes two
    /// arrays, ids as text and times of creation in microseconds since 1970.
    ///
    /// # Errors
    /// `Database`: the table is not as its preset says.
    pub(crate) async fn mark(&self, client: &Client) -> Result<String> {
        let Shape {
            id_type,
            error_type,
            ..
        } = shape(client, &self.table).await?;
        let terms = Terms::new(self, "", self.tracking()?, &error_type);
        let Terms {
            table,
            id,
            created_at,
            complete,
            ..
        } = &terms;
        // The time as well, as it is in the key of a partitioned table.
        Ok(format!(
            "WITH marked AS (UPDATE {table} AS e SET {complete} FROM unnest($1::text[], $2::bigint[]) AS c(id, micros) \
             WHERE {id} = c.id::{id_type} \
               AND {created_at} = timestamptz 'epoch' + c.micros * interval '1 microsecond' AND {} \
             RETURNING 1) SELECT count(*) FROM marked",
            unpublished(&self.table).expect("it is tracked")
        ))
    }

    /// What takes claims away that nobody has renewed within the timeout, of some rows, and says
    /// how many they were.
    ///
    /// # Errors
    /// `Settings`: the rows of this table do not say whether they are published.
    pub(crate) fn release_stale(&self) -> Result<String> {
        let terms = Terms::new(self, "", self.tracking()?, "text");
        Ok(terms.release_stale(self, "true"))
    }

    /// What says how many such claims there are.
    ///
    /// # Errors
    /// As [`release_stale`](Self::release_stale).
    pub(crate) fn count_stale(&self) -> Result<String> {
        let terms = Terms::new(self, "", self.tracking()?, "text");
        Ok(format!(
            "SELECT count(*) FROM {} AS e WHERE {}",
            terms.table,
            terms.is_stale(self)
        ))
    }

    /// Rows that were published before this time, which is SQL.
    ///
    /// # Errors
    /// As [`release_stale`](Self::release_stale).
    pub(crate) fn published_before(&self, time: &str) -> Result<Published> {
        let e = |field: &str| column(&self.table, field);
        let (at, is_done) = match self.tracking()? {
            Tracking::Status => (
                e("completed_at"),
                format!("{} = 'completed' AND ", e("status")),
            ),
            Tracking::Times => (e("published_at"), String::new()),
        };
        Ok(Published {
            id: e("id"),
            created_at: e("created_at"),
            condition: format!("{is_done}{at} < {time}"),
            at,
        })
    }

    /// How rows of the table say whether they are published.
    pub(super) fn tracking(&self) -> Result<Tracking> {
        self.table.preset.tracking().ok_or_else(|| {
            let message = format!(
                "rows of {} do not say whether they are published: they cannot be claimed",
                self.table.quoted()
            );
            Error::new(ErrorKind::Settings, message)
        })
    }
}

/// What tells rows that are published, each column with the alias `e`.
pub(crate) struct Published {
    pub(crate) id: String,
    pub(crate) created_at: String,
    /// When a row was published.
    pub(crate) at: String,
    pub(crate) condition: String,
}

/// How long our own claims last: they look so much older than they are that those who go
/// by `timeout` see them end then.
pub(super) const LEASE: Duration = Duration::from_secs(10);

/// Statements on claims take three arrays of text: ids, times of creation, tokens. A
/// token is what the column has that says whose claim it is. They say of those claims that
/// were ours, and whose rows nobody had locked, the number, from 1, and the token that the
/// row has now.
#[derive(Debug)]
pub(super) struct Statements {
    /// Claims rows. It takes the tokens that are ours, and, where rows have a key, keys to
    /// pass over, each behind its topic and a line feed.
    pub(super) claim: String,
    /// Marks rows published that are still claimed by us.
    pub(super) complete: String,
    /// Counts an attempt in vain. Takes the reasons, too.
    pub(super) refuse: String,
    /// Gives rows back.
    pub(super) release: String,
    /// Makes claims last.
    pub(super) renew: String,
    /// Only says which claims are ours, locked or not.
    pub(super) ours: String,
    /// Gives back what others claimed and did not renew, where a claim does not do that.
    pub(super) release_stale: Option<String>,
}

/// What a table calls its things, each column with the table's alias.
struct Terms {
    table: String,
    id: String,
    created_at: String,
    /// Topic and key, where records have a key.
    key: Option<[String; 2]>,
    token: String,
    token_type: &'static str,
    /// Not published, and not given up.
    pending: String,
    /// Of those: can be claimed now.
    due: String,
    /// Of those: cannot, and holds back later ones of its key.
    holds: String,
    /// The order in which an index gives those that are due.
    order: String,
    claim: String,
    complete: String,
    refuse: String,
    release: String,
}

fn column(table: &Table, field: &str) -> String {
    format!("e.{}", bare(table, field))
}

/// As it stands on the left of an assignment.
fn bare(table: &Table, field: &str) -> String {
    table.quoted_column(field).expect("a field of the preset")
}

/// A time that looks like that of a claim which ends after `left`.
fn claimed_at(settings: &ClaimSettings, left: &str) -> String {
    format!(
        "now() - interval '{} ms' + {left}",
        settings.timeout.as_millis()
    )
}

/// How long a row waits that has been refused so often.
fn backoff(attempts: &str) -> String {
    format!(
        "make_interval(secs => least({BACKOFF_MAX}, {BACKOFF} * power(2, least({attempts}, 20))) * (0.5 + random() / 2))"
    )
}

impl Terms {
    /// `error_type` is that of the column of the last error.
    fn new(settings: &ClaimSettings, worker: &str, tracking: Tracking, error_type: &str) -> Self {
        let table = &settings.table;
        let e = |field: &str| column(table, field);
        let set = |field: &str| bare(table, field);
        let lease = claimed_at(settings, &format!("interval '{} ms'", LEASE.as_millis()));
        let key =
            (table.column("partition_key").is_some()).then(|| [e("topic"), e("partition_key")]);
        let common = |token: &str| {
            (
                table.quoted(),
                e("id"),
                e("created_at"),
                key.clone(),
                e(token),
            )
        };
        match tracking {
            Tracking::Status => {
                let (table, id, created_at, key, token) = common("locked_by");
                let (attempts, attempts_max) = (e("attempts_made"), e("max_attempts"));
                let failed = format!("{attempts} + 1 >= {attempts_max}");
                let unlock = format!(
                    "{} = NULL, {} = NULL, {} = now()",
                    set("locked_at"),
                    set("locked_by"),
                    set("updated_at")
                );
                Self {
                    table,
                    id,
                    created_at,
                    key,
                    token,
                    token_type: "text",
                    pending: format!("{} = 'pending'", e("status")),
                    due: format!(
                        "{} IS NULL AND {attempts} < {attempts_max} AND {} <= now()",
                        e("locked_at"),
                        e("scheduled_at")
                    ),
                    // As with omni-box: one that is only scheduled holds nobody.
                    holds: format!(
                        "({} IS NOT NULL OR ({} IS NOT NULL AND {} > now()))",
                        e("locked_at"),
                        e("last_error"),
                        e("scheduled_at")
                    ),
                    order: e("scheduled_at"),
                    claim: format!(
                        "{} = {lease}, {} = {}, {} = now()",
                        set("locked_at"),
                        set("locked_by"),
                        escape_literal(worker),
                        set("updated_at")
                    ),
                    // The application's clock may be ahead; a time before these would make
                    // the row one that omni-box cannot read.
                    complete: format!(
                        "{} = 'completed', {} = greatest(now(), {}, {}), {unlock}",
                        set("status"),
                        set("completed_at"),
                        e("created_at"),
                        e("scheduled_at")
                    ),
                    // omni-box cannot read a row that is scheduled later than a year after it
                    // was made: an older one is tried again at once.
                    refuse: format!(
                        "{made} = {attempts} + 1, {} = left(c.error, {ERROR_MAX})::{error_type}, \
                         {} = CASE WHEN {failed} THEN 'failed' ELSE 'pending' END, \
                         {} = CASE WHEN {failed} THEN {} ELSE least(now() + {}, {} + interval '365 days') END, {unlock}",
                        set("last_error"),
                        set("status"),
                        set("scheduled_at"),
                        e("scheduled_at"),
                        backoff(&attempts),
                        e("created_at"),
                        made = set("attempts_made"),
                    ),
                    release: unlock,
                }
            }
            Tracking::Times => {
                let (quoted, id, created_at, key, token) = common("claimed_at");
                let (claimed, tries) = (e("claimed_at"), e("retry_count"));
                let over = format!("now() - interval '{} ms'", settings.timeout.as_millis());
                Self {
                    table: quoted,
                    id,
                    created_at,
                    key,
                    token,
                    token_type: "timestamptz",
                    pending: format!(
                        "{} IS NULL AND {tries} < {}",
                        e("published_at"),
                        settings.attempts_max
                    ),
                    due: format!("({claimed} IS NULL OR {claimed} < {over})"),
                    holds: format!("{claimed} >= {over}"),
                    order: e("created_at"),
                    claim: format!("{} = {lease}", set("claimed_at")),
                    complete: format!("{} = now()", set("published_at")),
                    // It has no column for when to try again but that of the claim.
                    refuse: format!(
                        "{} = {tries} + 1, {} = {}",
                        set("retry_count"),
                        set("claimed_at"),
                        claimed_at(settings, &backoff(&tries))
                    ),
                    release: format!("{} = NULL", set("claimed_at")),
                }
            }
        }
    }
}

impl Terms {
    /// Whether the row `e` has a claim that nobody has renewed within the timeout.
    fn is_stale(&self, settings: &ClaimSettings) -> String {
        let locked_at = settings.table.quoted_column("locked_at");
        format!(
            "{} AND {} < now() - interval '{} ms'",
            self.pending,
            locked_at.map_or_else(|| self.token.clone(), |column| format!("e.{column}")),
            settings.timeout.as_millis(),
        )
    }

    /// Gives some rows with such a claim back, if they also are so, and says how many.
    fn release_stale(&self, settings: &ClaimSettings, condition: &str) -> String {
        format!(
            "WITH freed AS (UPDATE {} AS o SET {} FROM ( \
                 SELECT {} AS id, {} AS created_at FROM {} AS e \
                 WHERE {} AND {condition} \
                 LIMIT {ROWS} FOR UPDATE SKIP LOCKED) AS s \
             WHERE o.{} = s.id AND o.{} = s.created_at RETURNING 1) SELECT count(*) FROM freed",
            self.table,
            self.release,
            self.id,
            self.created_at,
            self.table,
            self.is_stale(settings),
            bare(&settings.table, "id"),
            bare(&settings.table, "created_at"),
        )
    }
}

impl Statements {
    /// For rows of this table. `worker` is who claims.
    pub(super) fn new(
        settings: &ClaimSettings,
        worker: &str,
        tracking: Tracking,
        shape: &Shape,
    ) -> Self {
        let terms = Terms::new(settings, worker, tracking, &shape.error_type);
        let id_type = &shape.id_type;
        let Terms {
            table,
            id,
            created_at,
            token,
            token_type,
            pending,
            ..
        } = &terms;
        let asked = |error: &str| match error {
            "" => {
                "unnest($1::text[], $2::text[], $3::text[]) \
                   WITH ORDINALITY AS c(id, created_at, token, number)"
            }
            _ => {
                "unnest($1::text[], $2::text[], $3::text[], $4::text[]) \
                  WITH ORDINALITY AS c(id, created_at, token, error, number)"
            }
        };
        let is_ours = format!(
            "{id} = c.id::{id_type} AND {created_at} = c.created_at::timestamptz \
             AND {token} = c.token::{token_type} AND {pending}"
        );
        // Waits for nobody: what is not free it passes over. In one order, as all who lock many
        // rows should.
        let update = |set: &str, error: &str| {
            format!(
                "WITH free AS MATERIALIZED ( \
                     SELECT c.number, {id} AS id, {created_at} AS created_at{error} \
                     FROM {} JOIN {table} AS e ON {is_ours} \
                     ORDER BY {created_at}, {id} FOR UPDATE OF e SKIP LOCKED), \
                 written AS ( \
                     UPDATE {table} AS e SET {set} FROM free AS c \
                     WHERE {id} = c.id AND {created_at} = c.created_at \
                     RETURNING c.number, coalesce({token}::text, '') AS token) \
                 SELECT number, token FROM written",
                asked(error)
            )
        };
        let stale = terms.release_stale(
            settings,
            &format!("{token} IS DISTINCT FROM {}", escape_literal(worker)),
        );
        Self {
            claim: terms.claim_of(&shape.columns),
            complete: update(&terms.complete, ""),
            refuse: update(&terms.refuse, ", c.error"),
            release: update(&terms.release, ""),
            renew: update(&terms.claim, ""),
            ours: format!(
                "SELECT c.number, c.token FROM {} JOIN {table} AS e ON {is_ours}",
                asked("")
            ),
            release_stale: (tracking == Tracking::Status).then_some(stale),
        }
    }
}

impl Terms {
    /// A claim, in one statement:
    ///
    /// - `due`: rows that can be claimed now, in the order of their index;
    /// - `ranked`: of each of their keys the oldest rows, and whether one before holds
    ///   them; a row without a key waits for none;
    /// - `chosen`: as many of those that nothing holds as make a claim;
    /// - `locked`: without those that another is just claiming;
    /// - `claimed`: without those that have such a one before them.
    ///
    /// It says how many were due, and of each key its claimed rows, or whether all its
    /// rows are held.
    fn claim_of(&self, columns: &[Column]) -> String {
        let Self {
            table,
            id,
            created_at,
            token,
            token_type,
            pending,
            due,
            holds,
            order,
            claim,
            ..
        } = self;
        let texts: Vec<String> = columns
            .iter()
            .enumerate()
            .map(|(number, column)| {
                let name = postgres_protocol::escape::escape_identifier(&column.name);
                format!("e.{name}::text AS c{number}")
            })
            .collect();
        let sizes: Vec<String> = columns
            .iter()
            .map(|column| {
                let name = postgres_protocol::escape::escape_identifier(&column.name);
                // What is stored compressed has to be read to be counted: a thousand jsonb of
                // 9 kB take 42 ms, where others take less than one.
                format!(
                    "coalesce(CASE WHEN pg_column_compression(e.{name}) IS NULL THEN pg_column_size(e.{name}) \
                     ELSE octet_length(e.{name}::text) END, 0)"
                )
            })
            .collect();
        let (texts, sizes) = (texts.join(", "), sizes.join(" + "));
        let micros = format!(
            "CASE WHEN {created_at} < '10000-01-01Z' AND isfinite({created_at}) \
             THEN (extract(epoch FROM {created_at}) * 1000000)::bigint ELSE 0 END"
        );
        let row = format!(
            "{id}::text AS id, {created_at}::text AS created_at, {token}::text AS token, {micros} AS micros, \
             {created_at} AS at, {id} AS own_id, {texts}"
        );
        // A claim of ours may be over while somebody has its row locked.
        let is_not_ours =
            format!("({token} IS NULL OR {token} <> ALL ($1::text[]::{token_type}[]))");
        let numbers = (0..columns.len()).map(|number| format!(", c.c{number}"));
        let given = format!(
            "c.id, c.created_at, c.token, c.micros{}",
            numbers.collect::<String>()
        );
        // As many as the bytes allow, of what is in `ranked`.
        let chosen = |key: &str| {
            format!(
                "chosen AS MATERIALIZED ( \
                     SELECT {key} id, created_at FROM ( \
                         SELECT r.*, row_number() OVER (ORDER BY created_at, id) AS number, \
                                sum(size) OVER (ORDER BY created_at, id ROWS UNBOUNDED PRECEDING) - size AS before \
                         FROM ranked AS r WHERE is_due AND NOT is_held) AS r \
                     WHERE number <= {ROWS} AND before < {BYTES}), \
                 locked AS MATERIALIZED ( \
                     SELECT c.* FROM chosen AS c CROSS JOIN LATERAL ( \
                         SELECT FROM {table} AS e \
                         WHERE {id} = c.id AND {created_at} = c.created_at AND {pending} AND {due} \
                         FOR UPDATE SKIP LOCKED) AS e)"
            )
        };
        let Some([topic, key]) = &self.key else {
            let chosen = chosen("");
            return format!(
                "WITH ranked AS MATERIALIZED ( \
                     SELECT {id} AS id, {created_at} AS created_at, {sizes} AS size, true AS is_due, false AS is_held \
                     FROM {table} AS e WHERE {pending} AND {due} AND {is_not_ours} \
                     ORDER BY {order} LIMIT {ROWS}), \
                 {chosen}, \
                 claimed AS ( \
                     UPDATE {table} AS e SET {claim} FROM locked AS l \
                     WHERE {id} = l.id AND {created_at} = l.created_at RETURNING {row}) \
                 SELECT (SELECT count(*) FROM ranked), NULL::text, NULL::text, false, {given} \
                 FROM claimed AS c ORDER BY c.at, c.own_id"
            );
        };
        let chosen = chosen("topic, key,");
        // Written for the planner, whose statistics are older than the rows: in an order that no
        // index has but that of the key, of which by an equality nothing would be left; and
        // what is looked up apart is not joined, as that would go through all that is due. With
        // 60,000 rows of ten keys a claim took 165 ms at the end, and takes 30.
        format!(
            "WITH due AS MATERIALIZED ( \
                 SELECT {topic} AS topic, {key} AS key, ({topic} IS NULL OR {key} IS NULL) AS is_free, \
                        {id} AS id, {created_at} AS created_at FROM {table} AS e \
                 WHERE {pending} AND {due} AND {is_not_ours} \
                   AND coalesce({topic}::text || E'\\n' || {key}::text <> ALL ($2::text[]), true) \
                 ORDER BY {order} LIMIT {ROWS}), \
             keys AS MATERIALIZED (SELECT topic, key FROM due WHERE NOT is_free GROUP BY topic, key), \
             ranked AS MATERIALIZED ( \
                 SELECT k.topic, k.key, r.* FROM keys AS k CROSS JOIN LATERAL ( \
                     SELECT o.*, coalesce(bool_or(NOT o.is_due) OVER ( \
                                ORDER BY o.created_at, o.id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), \
                                false) AS is_held \
                     FROM (SELECT {id} AS id, {created_at} AS created_at, {sizes} AS size, ({due}) AS is_due \
                           FROM {table} AS e \
                           WHERE {topic} = k.topic AND {key} >= k.key AND {key} <= k.key \
                             AND {pending} AND (({due}) OR {holds}) \
                             AND {is_not_ours} \
                           ORDER BY {key}, {created_at}, {id} \
                           LIMIT (SELECT ceil({ROWS}.0 / count(*))::bigint FROM keys)) AS o) AS r \
                 UNION ALL SELECT d.topic, d.key, d.id, d.created_at, {sizes}, true, false \
                 FROM due AS d JOIN {table} AS e ON {id} = d.id AND {created_at} = d.created_at WHERE d.is_free), \
             {chosen}, \
             missed AS MATERIALIZED ( \
                 SELECT c.* FROM chosen AS c \
                 WHERE NOT EXISTS (SELECT FROM locked AS l WHERE l.id = c.id AND l.created_at = c.created_at)), \
             claimed AS ( \
                 UPDATE {table} AS e SET {claim} FROM locked AS l \
                 WHERE {id} = l.id AND {created_at} = l.created_at \
                   AND NOT EXISTS (SELECT FROM missed AS m WHERE m.topic = l.topic AND m.key = l.key \
                                   AND (m.created_at, m.id) < (l.created_at, l.id)) \
                 RETURNING l.topic AS k_topic, l.key AS k_key, {row}), \
             free AS (SELECT topic, key FROM ranked AS r WHERE is_due AND NOT is_held \
                      AND NOT EXISTS (SELECT FROM missed AS m WHERE m.topic = r.topic AND m.key = r.key) \
                      GROUP BY topic, key) \
             SELECT (SELECT count(*) FROM due), k.topic::text, k.key::text, f.key IS NULL, {given} \
             FROM keys AS k LEFT JOIN free AS f ON f.topic = k.topic AND f.key = k.key \
             FULL JOIN claimed AS c ON c.k_topic = k.topic AND c.k_key = k.key \
             ORDER BY c.at, c.own_id"
        )
    }
}

/// Whether the row `e` is neither published nor given up, if rows of this table say that.
pub(crate) fn unpublished(table: &Table) -> Option<String> {
    Some(match table.preset.tracking()? {
        Tracking::Status => format!("{} = 'pending'", column(table, "status")),
        Tracking::Times => format!("{} IS NULL", column(table, "published_at")),
    })
}

/// Sorts an error of a statement on claims. Their table is not one that set-up makes, or
/// grants anything on.
pub(crate) fn failed(table: &Table, doing: &str, error: tokio_postgres::Error) -> Error {
    let table = table.quoted();
    let next_step = |sqlstate: &str, message: &str| match sqlstate {
        // No policy mends that: rows that it lets pass might not be all.
        "42501" if message.contains("row-level security") => {
            let bypass = "ALTER ROLE … BYPASSRLS, of the relay's role, which must see all rows, \
                          or let it own the table";
            Some(bypass.to_owned())
        }
        "42501" => Some(format!(
            "GRANT SELECT, UPDATE ON {table} TO the relay's role, which needs no more"
        )),
        "42P01" | "3F000" => Some("correct --table".to_owned()),
        "42703" => Some("correct --column".to_owned()),
        _ => None,
    };
    sort_with(format!("{doing} {table}"), error, next_step)
}

/// What a table is made of, where it is as its preset says.
pub(crate) struct Shape {
    /// The columns of an event's fields.
    pub(crate) columns: Vec<Column>,
    /// The type of the ids, with its length.
    pub(crate) id_type: String,
    /// The same of the last errors, which are cut to it; text where there are none.
    pub(crate) error_type: String,
}

/// Looks at the table, and refuses one that is not as its preset says.
///
/// # Errors
/// `Database`: it is missing, a column is, or has another type, or it has no primary key.
pub(crate) async fn shape(client: &Client, table: &Table) -> Result<Shape> {
    let doing = format!("look at {}", table.quoted());
    let sql = "SELECT a.attname::text, a.atttypid, format_type(a.atttypid, NULL), t.typcategory::text, \
                      coalesce(a.attnum = ANY (i.indkey), false), i.indexrelid IS NOT NULL, \
                      format_type(a.atttypid, a.atttypmod) \
               FROM pg_class AS c \
               JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped \
               JOIN pg_type AS t ON t.oid = a.atttypid \
               LEFT JOIN pg_index AS i ON i.indrelid = c.oid AND i.indisprimary \
               WHERE c.oid = to_regclass($1) ORDER BY a.attnum";
    let rows = client
        .query_typed(sql, &[(&table.quoted(), Type::TEXT)])
        .await
        .map_err(|error| sort(&doing, error))?;
    let refuse = |why: String| {
        let preset = table.preset.name();
        let message = format!("{} {why} (--table-preset {preset})", table.quoted());
        Err(Error::new(ErrorKind::Database, message))
    };
    let Some(first) = rows.first() else {
        return refuse("does not exist: name the table with --table".to_owned());
    };
    if !first.get::<_, bool>(5) && table.preset.tracking().is_some() {
        return refuse("has no primary key: claims need one, on its id".to_owned());
    }
    let mut columns: Vec<Column> = Vec::new();
    let (mut id_type, mut error_type) = (String::new(), "text".to_owned());
    for field in table.fields() {
        let name = table.column(field).unwrap_or_default();
        let Some(row) = rows.iter().find(|row| row.get::<_, &str>(0) == name) else {
            if table.may_lack(field) {
                continue;
            }
            return refuse(format!(
                "has no column \"{name}\": name the one that has its {field} with --column {field}=NAME"
            ));
        };
        let (found, category): (&str, &str) = (row.get(2), row.get(3));
        // What is not claimed is only read, and any type has a text.
        if table.preset.tracking().is_some()
            && let Some(wanted) = wanted_type(field, found, category)
        {
            return refuse(format!(
                "has a column \"{name}\" of type {found}, and its {field} must be {wanted}"
            ));
        }
        match field {
            "id" => id_type = row.get(6),
            "last_error" => error_type = row.get(6),
            _ => {}
        }
        if columns.iter().all(|column| column.name != name) {
            columns.push(Column {
                name: name.to_owned(),
                type_oid: row.get(1),
            });
        }
    }
    let names = ["id", "created_at"].map(|field| table.column(field).unwrap_or_default());
    let is_of_key = |row: &&tokio_postgres::Row| row.get(4);
    let mut key = rows
        .iter()
        .filter(is_of_key)
        .map(|row| row.get::<_, &str>(0));
    if let Some(other) = key.find(|name| !names.contains(name))
        && table.preset.tracking().is_some()
    {
        return refuse(format!(
            "has \"{other}\" in its primary key: claims need one on its id, or on id and created_at"
        ));
    }
    Ok(Shape {
        columns,
        id_type,
        error_type,
    })
}

/// What a column must be, if this one is not.
fn wanted_type(field: &str, found: &str, category: &str) -> Option<&'static str> {
    match field {
        "created_at" | "scheduled_at" | "completed_at" | "locked_at" | "updated_at"
        | "published_at" | "claimed_at" => {
            (found != "timestamp with time zone").then_some("timestamp with time zone")
        }
        "attempts_made" | "max_attempts" | "retry_count" => (category != "N").then_some("a number"),
        "status" | "last_error" | "locked_by" | "topic" | "partition_key" | "event_type" => {
            (category != "S").then_some("text")
        }
        _ => None,
    }
}

/// Warns if rows of a key are only found by looking at all that are pending.
pub(super) async fn warn_of_missing_index(client: &Client, table: &Table) -> Result<()> {
    let [Some(topic), Some(key)] = ["topic", "partition_key"].map(|field| table.column(field))
    else {
        return Ok(());
    };
    let sql = "SELECT EXISTS (SELECT FROM pg_index AS i WHERE i.indrelid = $1::text::regclass AND i.indisvalid \
                 AND (SELECT array_agg(a.attname::text) FROM pg_attribute AS a \
                      WHERE a.attrelid = i.indrelid AND a.attnum IN (i.indkey[0], i.indkey[1])) @> ARRAY[$2, $3]), \
                 (SELECT relkind = 'p' FROM pg_class WHERE oid = $1::text::regclass)";
    let parameters = [
        (&table.quoted() as _, Type::TEXT),
        (&topic as _, Type::TEXT),
        (&key as _, Type::TEXT),
    ];
    let found = client.query_typed_one(sql, &parameters).await;
    let found = found.map_err(|error| sort(format!("look at {}", table.quoted()), error))?;
    if !found.get::<_, bool>(0) {
        // Postgres makes none so on a partitioned table.
        let concurrently = if found.get(1) { "" } else { " CONCURRENTLY" };
        warn!(
            "{quoted} has no index that begins with its topic and key, so that each claim looks at all that is \
             pending: CREATE INDEX{concurrently} ON {quoted} ({}, {}, {})",
            bare(table, "topic"),
            bare(table, "partition_key"),
            bare(table, "created_at"),
            quoted = table.quoted(),
        );
    }
    Ok(())
}
