//! Forgets what was received, once it may be.
//!
//! # The promise
//!
//! A row of `inbox` goes once it is older than `--dedup-window` **and** the group has read, of each
//! partition of its topic, all that was there one window after the row: a message that was
//! produced again within the window is known, however long nobody consumed. One that comes later
//! is a new message. Where the topics of a group share their ids, all of their partitions count.
//!
//! Rows of `inbox_message` that a person skipped go one window after that; dead letters never by
//! themselves.
//!
//! # How
//!
//! Now and then each partition has a *mark*: its end, and when the brokers were asked for it. Once the
//! stored offset has passed the end, all until that time is read (`read_until`), and there is another
//! mark. One for each partition is enough, however far behind a consumer is: it only waits longer.
//! What is older than the least `read_until` by a window may go.
//!
//! The time is read before the brokers are asked, so that the end is not one of before; it is always
//! that of the database.
//!
//! # What is misleading
//!
//! - An offset may be behind the end: then the log is another than was read, and its mark stays, until
//!   somebody has said where to go on.
//! - A partition that nobody consumes holds rows back, which is right. One that nobody will ever consume
//!   again must not: one that the brokers have not known for a window, and one of a topic to which this consumer does
//!   not subscribe, and of which nothing was read for a window. So consumers of a group
//!   should subscribe to the same topics.
//! - A partition that is new is not in `inbox_offset` yet: the brokers say that it is there.
//! - A topic of which the group has never read holds nothing back.
//! - What applications record by themselves (`record.rs`) has no partition. It goes with the others of its
//!   topic, by age alone where nobody has read that with `postbox inbox`; what is recorded for a group without any
//!   is removed by `inbox_forget`.
//!
//! # How it keeps out of the way
//!
//! By short transactions of a thousand rows each, nine times as long pauses, and no lock but those of the
//! rows it deletes. Consumers of a group may do it at once: they find each other's rows gone, in one
//! order. What fails is told, and tried again at the next time; messages are handled meanwhile.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Row};
use tracing::{debug, info, warn};

use super::InboxSettings;
use super::columns::Parameter;
use super::consumer::Place;
use super::ends::Asking;
use crate::cleanup::{BEGIN, PAUSE};
use crate::contract::Contract;
use crate::database::{Session, query_after, sort, within};
use crate::error::Result;
use crate::metrics::InboxMetrics;

/// How many rows are looked at in a transaction.
const BATCH: i64 = 1_000;

/// How often, in a window; and between which bounds.
const TIMES_A_WINDOW: u32 = 100;
const INTERVAL_MIN: Duration = Duration::from_secs(1);
const INTERVAL_MAX: Duration = Duration::from_secs(60);

/// How long the server may take for a statement.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// How many partitions are looked at each time that seem to be read to their end.
const LOOKS_MAX: usize = 8;

/// Forgets for ever.
pub(super) async fn run(settings: InboxSettings, metrics: Arc<InboxMetrics>) {
    let interval = settings.dedup_window / TIMES_A_WINDOW;
    let interval = interval.clamp(INTERVAL_MIN, INTERVAL_MAX);
    let sql = Sql::new(&settings.contract);
    loop {
        // At the start others have more to do.
        sleep(interval).await;
        match Box::pin(forget(&settings, &sql, &metrics)).await {
            Ok(0) => {}
            Ok(rows) => info!(rows, "forgot what the window has passed"),
            // That servers are away, the inbox itself says.
            Err(error) if error.kind().is_transient() => {
                debug!("forgetting again later: {}", error.chain());
            }
            Err(error) => warn!("forgetting again later: {}", error.chain()),
        }
    }
}

/// How many rows went.
async fn forget(settings: &InboxSettings, sql: &Sql, metrics: &InboxMetrics) -> Result<u64> {
    let name = "postbox inbox retention";
    let session = settings.database.connect_pooled(name).await?;
    let round = Round {
        settings,
        sql,
        session,
        metrics,
    };
    round.mark().await?;
    debug!("looked at partitions");
    round.sweep().await
}

/// What is known of a partition by now.
#[derive(Debug, Clone)]
struct Known {
    place: Place,
    /// `None`: nothing was ever read of it.
    next_offset: Option<i64>,
    mark: Option<Mark>,
}

/// Times are microseconds since 1970, by the server's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    end: i64,
    at: i64,
    read_until: Option<i64>,
    gone_since: Option<i64>,
}

/// What the brokers say of a partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    /// There is none.
    Gone,
    /// It ends here; and whether there is nothing to be read before that.
    End(i64, bool),
}

impl Mark {
    /// What follows, if this was seen at some time, or later.
    fn after(mark: Option<Self>, next_offset: Option<i64>, seen: Seen, at: i64) -> Self {
        let first = |end| Self {
            end,
            at,
            read_until: None,
            gone_since: None,
        };
        let next_offset = next_offset.unwrap_or(0);
        let (end, is_empty) = match seen {
            Seen::Gone => {
                let mark = mark.unwrap_or(first(0));
                let gone_since = mark.gone_since.or(Some(at));
                return Self { gone_since, ..mark };
            }
            Seen::End(end, is_empty) => (end, is_empty),
        };
        let mark = Self {
            gone_since: None,
            ..mark.unwrap_or(first(end))
        };
        let read_until = |until| Self {
            read_until: mark.read_until.max(until),
            ..first(end)
        };
        if next_offset > end {
            // Another log.
            mark
        } else if next_offset == end || is_empty {
            read_until(Some(at))
        } else if mark.end > end {
            // The mark is one of another log.
            read_until(None)
        } else if next_offset >= mark.end {
            read_until(Some(mark.at))
        } else {
            mark
        }
    }
}

/// One time.
struct Round<'r> {
    settings: &'r InboxSettings,
    sql: &'r Sql,
    session: Session,
    metrics: &'r InboxMetrics,
}

impl Round<'_> {
    /// Learns how far the group has read.
    async fn mark(&self) -> Result<()> {
        let group: Parameter<'_> = (&self.settings.group, Type::TEXT);
        let rows = self.query("read marks", &self.sql.known, &[group]).await?;
        let Some(at) = rows.first().map(|row| row.get("now")) else {
            return Ok(());
        };
        let known: Vec<Known> = rows.iter().map(Known::read).collect();
        let config = self.settings.client()?;
        let marks = Asking::run(config, move |asking| see(asking, known, at)).await?;
        let topics: Vec<&str> = marks.iter().map(|(place, _)| &*place.topic).collect();
        let partitions: Vec<i32> = marks.iter().map(|(place, _)| place.partition).collect();
        let marks = || marks.iter().map(|(_, mark)| mark);
        let ends: Vec<i64> = marks().map(|mark| mark.end).collect();
        let times: Vec<i64> = marks().map(|mark| mark.at).collect();
        let read_until: Vec<Option<i64>> = marks().map(|mark| mark.read_until).collect();
        let gone_since: Vec<Option<i64>> = marks().map(|mark| mark.gone_since).collect();
        let parameters: [Parameter<'_>; 7] = [
            (&self.settings.group, Type::TEXT),
            (&topics, Type::TEXT_ARRAY),
            (&partitions, Type::INT4_ARRAY),
            (&ends, Type::INT8_ARRAY),
            (&times, Type::INT8_ARRAY),
            (&read_until, Type::INT8_ARRAY),
            (&gone_since, Type::INT8_ARRAY),
        ];
        self.query("store marks", &self.sql.mark, &parameters)
            .await?;
        Ok(())
    }

    /// Removes what may go.
    async fn sweep(&self) -> Result<u64> {
        let topics = &self.settings.topics;
        let (patterns, names): (Vec<&str>, Vec<&str>) = (topics.iter())
            .map(String::as_str)
            .partition(|topic| topic.starts_with('^'));
        let window = i64::try_from(self.settings.dedup_window.as_micros()).unwrap_or(i64::MAX);
        let parameters: [Parameter<'_>; 4] = [
            (&self.settings.group, Type::TEXT),
            (&window, Type::INT8),
            (&names, Type::TEXT_ARRAY),
            (&patterns, Type::TEXT_ARRAY),
        ];
        let doing = "look for what may be forgotten";
        let sources = self
            .query(doing, &self.sql.may_go_until, &parameters)
            .await?;
        let mut rows = 0;
        for source in &sources {
            let number: i32 = source.get("id");
            if let Some(until) = source.get("received_until") {
                let swept = self.sweep_of("inbox", &self.sql.forget, number, until);
                rows += swept.await?;
            }
            let until = source.get("decided_until");
            let swept = self.sweep_of("inbox_message", &self.sql.forget_skipped, number, until);
            rows += swept.await?;
        }
        Ok(rows)
    }

    /// All rows of a source from before a time, from the first on.
    async fn sweep_of(&self, table: &str, sql: &str, source: i32, until: i64) -> Result<u64> {
        let doing = format!("clean {table}");
        let (mut rows, mut position) = (0, 0_i64);
        loop {
            let since = Instant::now();
            let parameters: [Parameter<'_>; 4] = [
                (&source, Type::INT4),
                (&position, Type::INT8),
                (&until, Type::INT8),
                (&BATCH, Type::INT8),
            ];
            let done = self.query(&doing, sql, &parameters).await?;
            let done = done.first().expect("one row of counts");
            let (removed, looked_at): (i64, i64) = (done.get("removed"), done.get("looked_at"));
            let removed = removed.unsigned_abs();
            self.metrics
                .cleaned
                .with_label_values(&[table])
                .inc_by(removed);
            rows += removed;
            sleep(since.elapsed() * PAUSE).await;
            match done.get("position") {
                Some(last) if looked_at == BATCH => position = last,
                _ => return Ok(rows),
            }
        }
    }

    async fn query(
        &self,
        doing: &str,
        sql: &str,
        parameters: &[Parameter<'_>],
    ) -> Result<Vec<Row>> {
        let client: &Client = &self.session.client;
        let answer = async {
            let rows = query_after(BEGIN, client, sql, parameters).await;
            rows.map_err(|error| sort(doing, error))
        };
        within(ANSWER_MAX, doing, answer).await
    }
}

impl Known {
    fn read(row: &Row) -> Self {
        let end: Option<i64> = row.get("end_offset");
        Self {
            place: Place {
                topic: row.get::<_, &str>("topic").into(),
                partition: row.get("partition"),
            },
            next_offset: row.get("next_offset"),
            mark: end.map(|end| Mark {
                end,
                at: row.get("marked_at"),
                read_until: row.get("read_until"),
                gone_since: row.get("gone_since"),
            }),
        }
    }
}

/// The next marks. Partitions of which nothing was learned have none.
fn see(asking: &Asking, mut known: Vec<Known>, at: i64) -> Result<Vec<(Place, Mark)>> {
    let topics: BTreeSet<Arc<str>> = known.iter().map(|one| one.place.topic.clone()).collect();
    let ends = asking.ends(topics.iter().map(|topic| &**topic))?;
    let places: BTreeSet<Place> = known.iter().map(|one| one.place.clone()).collect();
    let new = ends.of.keys().filter(|place| !places.contains(place));
    known.extend(new.map(|place| Known {
        place: place.clone(),
        next_offset: None,
        mark: None,
    }));
    let mut looks = 0;
    let mut marks = Vec::new();
    for one in known {
        let Known {
            place,
            next_offset,
            mark,
        } = one;
        let seen = match ends.of.get(&place) {
            Some(end) => {
                let may_be_empty = next_offset.filter(|next| {
                    // Nothing was added since the last time.
                    next < end && mark.is_some_and(|mark| mark.end == *end) && looks < LOOKS_MAX
                });
                let is_empty = match may_be_empty {
                    Some(next) => {
                        looks += 1;
                        asking.is_empty_from(&place, next)?
                    }
                    None => false,
                };
                Seen::End(*end, is_empty)
            }
            None if ends.lack(&place) => Seen::Gone,
            None => continue,
        };
        marks.push((place, Mark::after(mark, next_offset, seen, at)));
    }
    Ok(marks)
}

struct Sql {
    known: String,
    mark: String,
    may_go_until: String,
    forget: String,
    forget_skipped: String,
}

impl Sql {
    fn new(contract: &Contract) -> Self {
        let sql = |text: &str| contract.sql(text);
        let micros = |time: &str| format!("(extract(epoch FROM {time}) * 1000000)::bigint");
        let time =
            |micros: &str| format!("(timestamptz 'epoch' + {micros} * interval '1 microsecond')");
        // What there is of the group: partitions with marks, and those that have none yet.
        let partitions = "(SELECT * FROM :\"schema\".inbox_offset WHERE consumer_group = $1) AS o
                 FULL JOIN (SELECT * FROM :\"schema\".inbox_mark WHERE consumer_group = $1) AS m
                     USING (topic, partition)";
        Self {
            known: sql(&format!(
                "SELECT topic, partition, o.next_offset, m.end_offset, {marked_at} AS marked_at,
                     {read_until} AS read_until, {gone_since} AS gone_since, {now} AS now
                 FROM {partitions}
                 -- Those of which nothing was looked at for longest come first.
                 ORDER BY m.marked_at, topic, partition",
                marked_at = micros("m.marked_at"),
                read_until = micros("m.read_until"),
                gone_since = micros("m.gone_since"),
                now = micros("now()"),
            )),
            mark: sql(&format!(
                "INSERT INTO :\"schema\".inbox_mark AS m
                     (consumer_group, topic, partition, end_offset, marked_at, read_until, gone_since)
                 SELECT $1, p.topic, p.partition, p.end_offset, {marked_at}, {read_until}, {gone_since}
                 FROM unnest($2::text[], $3::integer[], $4::bigint[], $5::bigint[], $6::bigint[], $7::bigint[])
                     AS p (topic, partition, end_offset, marked_at, read_until, gone_since)
                 ORDER BY p.topic, p.partition
                 -- Another consumer may have learned more meanwhile.
                 ON CONFLICT (consumer_group, topic, partition) DO UPDATE
                 SET end_offset = excluded.end_offset, marked_at = excluded.marked_at,
                     read_until = greatest(m.read_until, excluded.read_until), gone_since = excluded.gone_since",
                marked_at = time("p.marked_at"),
                read_until = time("p.read_until"),
                gone_since = time("p.gone_since"),
            )),
            may_go_until: sql(&format!(
                "WITH known AS (SELECT now() - $2 * interval '1 microsecond' AS one_window_ago),
                 holding AS (
                     SELECT topic, coalesce(m.read_until, '-infinity') AS read_until
                     FROM known, {partitions}
                     WHERE (m.gone_since IS NULL OR m.gone_since > one_window_ago)
                       AND (topic = ANY ($3::text[]) OR topic ~ ANY ($4::text[])
                           OR coalesce(o.updated_at, m.marked_at) > one_window_ago)
                 )
                 SELECT s.id, {decided_until} AS decided_until,
                     CASE WHEN h.read_until IS NULL THEN {decided_until}
                         WHEN isfinite(h.read_until) THEN least({decided_until}, {read_until} - $2)
                     END AS received_until
                 FROM known, :\"schema\".inbox_source AS s
                 CROSS JOIN LATERAL (
                     SELECT min(h.read_until) AS read_until FROM holding AS h WHERE s.topic IN ('', h.topic)
                 ) AS h
                 WHERE s.consumer_group = $1",
                decided_until = micros("one_window_ago"),
                read_until = micros("h.read_until"),
            )),
            // Many have the same time: those that are left of it come with the next.
            forget: sql(&format!(
                "WITH old AS MATERIALIZED (
                     SELECT i.ctid, i.received_at FROM :\"schema\".inbox AS i
                     WHERE i.source = $1 AND i.received_at >= {position} AND i.received_at < {until}
                     ORDER BY i.received_at
                     LIMIT $4
                 ), removed AS (
                     DELETE FROM :\"schema\".inbox WHERE ctid = ANY (ARRAY(SELECT ctid FROM old)) RETURNING 1
                 )
                 SELECT (SELECT count(*) FROM removed) AS removed, count(*) AS looked_at,
                     {last} AS position
                 FROM old",
                position = time("$2"),
                until = time("$3"),
                last = micros("max(old.received_at)"),
            )),
            forget_skipped: sql(&format!(
                "WITH decided AS MATERIALIZED (
                     SELECT m.ctid, m.seq, m.status = 'skipped' AND m.decided_at < {until} AND NOT m.owes_letter AS may_go
                     FROM :\"schema\".inbox_message AS m
                     WHERE m.source = $1 AND m.seq > $2 AND m.status IN ('dead', 'skipped')
                     ORDER BY m.seq
                     LIMIT $4
                 ), removed AS (
                     -- Looked at again: a person may have decided otherwise.
                     DELETE FROM :\"schema\".inbox_message
                     WHERE ctid = ANY (ARRAY(SELECT ctid FROM decided WHERE may_go)) AND status = 'skipped'
                     RETURNING 1
                 )
                 SELECT (SELECT count(*) FROM removed) AS removed, count(*) AS looked_at, max(seq) AS position
                 FROM decided",
                until = time("$3"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(end: i64, at: i64, read_until: Option<i64>) -> Mark {
        Mark {
            end,
            at,
            read_until,
            gone_since: None,
        }
    }

    #[test]
    fn a_partition_is_read_until_its_mark_once_the_offset_has_passed_it() {
        let old = mark(10, 1_000, Some(500));
        for (next_offset, end, is_empty, expected) in [
            // At the end.
            (20, 20, false, mark(20, 2_000, Some(2_000))),
            (12, 20, true, mark(20, 2_000, Some(2_000))),
            // Past the mark.
            (10, 20, false, mark(20, 2_000, Some(1_000))),
            (15, 20, false, mark(20, 2_000, Some(1_000))),
            // Not yet.
            (9, 20, false, old),
            (0, 10, false, old),
            // Another log: the offset is behind it, or the mark.
            (21, 20, false, old),
            (3, 5, false, mark(5, 2_000, Some(500))),
        ] {
            let seen = Seen::End(end, is_empty);
            let after = Mark::after(Some(old), Some(next_offset), seen, 2_000);
            assert_eq!(after, expected, "{next_offset} {end}");
        }
    }

    #[test]
    fn a_partition_of_which_nothing_was_read_is_read_only_while_it_is_empty() {
        let empty = Mark::after(None, None, Seen::End(0, false), 1_000);
        assert_eq!(empty, mark(0, 1_000, Some(1_000)));
        let filled = Mark::after(Some(empty), None, Seen::End(5, false), 2_000);
        assert_eq!(filled, mark(5, 2_000, Some(1_000)));
        let more = Mark::after(Some(filled), None, Seen::End(9, false), 3_000);
        assert_eq!(more, filled);
    }

    #[test]
    fn a_partition_is_gone_since_the_brokers_did_not_know_it_until_they_do() {
        let old = mark(10, 1_000, Some(500));
        let gone = Mark::after(Some(old), Some(10), Seen::Gone, 2_000);
        assert_eq!(gone.gone_since, Some(2_000));
        let later = Mark::after(Some(gone), Some(10), Seen::Gone, 3_000);
        assert_eq!(later, gone);
        let back = Mark::after(Some(later), Some(10), Seen::End(0, false), 4_000);
        assert_eq!(back, old);
    }
}
