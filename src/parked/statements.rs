//! The SQL of [`Store`](super::store::Store).
//!
//! Every statement is about the rows of one relay, `$1`; of a relay that is divided, what it
//! takes is of its slices. The order of a key's events is that of `number`.
//!
//! The table may be empty one moment and have a hundred thousand rows the next, with statistics
//! of before. A plan that joins it with itself, or with a list of ids by an index of everything
//! that waits, then takes a minute for 10,000 rows. So the first of a key is looked up, by
//! `ORDER BY … LIMIT 1`, which only the index of its key answers; and rows that are named by
//! their ids have their status compared as an expression, which no partial index is good for.

use super::same_key;
use crate::catalog::Slices;
use crate::contract::Contract;

pub(super) struct Statements {
    pub(super) park: String,
    pub(super) keys: String,
    pub(super) topics: String,
    pub(super) decided: String,
    pub(super) count: String,
    pub(super) count_scheduled: String,
    pub(super) release_taken: String,
    pub(super) take_waiting: String,
    pub(super) lock_scheduled: String,
    pub(super) take_scheduled: String,
    pub(super) next_scheduled: String,
    pub(super) next_waiting: String,
    pub(super) forget: String,
    pub(super) refuse: String,
    pub(super) untry: String,
    pub(super) hold_topics: String,
    pub(super) await_topic: String,
    pub(super) free_topic: String,
    pub(super) join: String,
    pub(super) postpone: String,
    pub(super) promote: String,
    pub(super) still_held: String,
    pub(super) letters: String,
    pub(super) sent_letters: String,
}

/// Whether the event of the row `p` was cancelled.
const IS_CANCELLED: &str = "EXISTS (SELECT FROM :\"schema\".cancellation AS c WHERE c.id = p.id)";

/// The columns of a row that is taken, of the table `p`.
const TAKEN: &str = "p.id, p.status, p.topic, p.key, p.attempts::bigint, p.error, p.commit_lsn, \
    (extract(epoch FROM p.committed_at) * 1000000)::bigint, p.message, p.column_names, p.column_types, \
    (extract(epoch FROM now()) * 1000000)::bigint";

impl Statements {
    pub(super) fn new(contract: &Contract, slices: Slices, fence: &str) -> Self {
        let of_slices = |row: &str| match slices.condition(&[format!("{row}.key")]) {
            Some(condition) => format!(" AND {condition}"),
            None => String::new(),
        };
        let ours = of_slices("p");
        // What a row keeps that was read again.
        let kept = [
            "status",
            "due_at",
            "taken_at",
            "topic",
            "key",
            "event_type",
            "awaits_topic",
            "attempts",
            "error",
            "parked_at",
            "tried_at",
            "owes_letter",
            "decided_by",
            "decided_at",
            "reason",
            "commit_lsn",
            "xid",
            "committed_at",
            "message",
            "column_names",
            "column_types",
        ];
        let kept = kept.map(|column| {
            format!(
                "{column} = CASE WHEN :\"schema\".is_settled(p) THEN excluded.{column} ELSE p.{column} END"
            )
        });
        let sql = |text: &str| contract.sql(text);
        let same_as_b = same_key("b", "p");
        let same_as_head = same_key("p", "h");
        let due = format!("p.relay = $1 AND p.due_at <= now(){ours}");
        // Whoever wants it sent at once may have said so by any time.
        let due_micros =
            "(extract(epoch FROM greatest(d.due_at, '0001-01-01 00:00:00+00')) * 1000000)::bigint";
        Self {
            park: sql(&format!(
                "INSERT INTO :\"schema\".parked AS p (id, relay, status, due_at, topic, key, event_type, \
                     awaits_topic, attempts, error, tried_at, owes_letter, commit_lsn, xid, committed_at, \
                     message, column_names, column_types) \
                 SELECT n.id, $1, n.status, coalesce(n.due::timestamptz, now() + n.delay * interval '1 ms'), \
                     n.topic, n.key, n.event_type, n.awaits_topic, n.attempts::integer, n.error, \
                     CASE WHEN n.attempts > 0 THEN now() END, n.owes_letter, n.commit_lsn, n.xid::xid8, \
                     n.committed_at::timestamptz, n.message, $17, $18 \
                 FROM unnest($2::text[], $3::text[], $4::text[], $5::bigint[], $6::text[], $7::text[], $8::text[], \
                         $9::boolean[], $10::bigint[], $11::text[], $12::boolean[], $13::pg_lsn[], $14::text[], \
                         $15::text[], $16::bytea[]) WITH ORDINALITY \
                     AS n (id, status, due, delay, topic, key, event_type, awaits_topic, attempts, error, \
                           owes_letter, commit_lsn, xid, committed_at, message, place) \
                 WHERE {fence} ORDER BY n.place \
                 ON CONFLICT (id, relay) DO UPDATE SET number = excluded.number, {} RETURNING p.id, p.xmax = 0",
                kept.join(", ")
            )),
            keys: sql(&format!(
                "SELECT DISTINCT topic, key FROM :\"schema\".parked AS p \
                 WHERE relay = $1 AND status = 'waiting' AND topic IS NOT NULL AND key IS NOT NULL{ours}"
            )),
            topics: sql(&format!(
                "SELECT topic, coalesce(min(error), '') FROM :\"schema\".parked AS p \
                 WHERE relay = $1 AND status = 'waiting' AND awaits_topic AND topic IS NOT NULL{ours} GROUP BY topic"
            )),
            // Those that may be read again are the newest; to look at each of a hundred thousand takes
            // longer than a lease.
            decided: sql("SELECT id FROM (SELECT * FROM :\"schema\".parked AS p \
                                 WHERE relay = $1 AND status IN ('dead', 'skipped') \
                                 ORDER BY number DESC LIMIT 10000) AS p \
                 WHERE NOT :\"schema\".is_settled(p)"),
            count: sql(&format!(
                "SELECT w.rows, d.rows, w.bytes + d.bytes, w.oldest \
                 FROM (SELECT count(*) AS rows, coalesce(sum(octet_length(message)), 0)::bigint AS bytes, \
                              coalesce(extract(epoch FROM now() - min(parked_at)), 0)::float8 AS oldest \
                       FROM :\"schema\".parked AS p WHERE relay = $1 AND status = 'waiting'{ours}) AS w, \
                      (SELECT count(*) AS rows, coalesce(sum(octet_length(message)), 0)::bigint AS bytes \
                       FROM :\"schema\".parked AS p \
                       WHERE relay = $1 AND status IN ('dead', 'skipped') AND status = 'dead'{ours}) AS d"
            )),
            count_scheduled: sql(&format!(
                "SELECT count(*) FROM :\"schema\".parked AS p \
                 WHERE relay = $1 AND status = 'scheduled'{ours}"
            )),
            release_taken: sql(&format!(
                "UPDATE :\"schema\".parked AS p SET taken_at = NULL \
                 WHERE relay = $1 AND status = 'waiting' AND taken_at IS NOT NULL{ours}"
            )),
            // None that is behind one which cannot go: as a topic is being freed, one may be parked
            // that still awaits it.
            take_waiting: sql(&format!(
                "WITH head AS MATERIALIZED ( \
                     SELECT p.id, p.topic, p.key, p.number, p.attempts, p.due_at FROM :\"schema\".parked AS p \
                     WHERE {due} AND p.status = 'waiting' AND NOT p.awaits_topic AND :\"schema\".is_settled(p) \
                       AND (SELECT b.number FROM :\"schema\".parked AS b \
                            WHERE b.relay = p.relay AND b.status = 'waiting' AND {same_as_b} \
                              AND b.number < p.number ORDER BY b.number LIMIT 1) IS NULL \
                     ORDER BY p.due_at LIMIT $2 \
                 ), run AS ( \
                     SELECT h.due_at, r.* FROM head AS h CROSS JOIN LATERAL ( \
                         SELECT p.id, p.number, octet_length(p.message) AS bytes FROM :\"schema\".parked AS p \
                         WHERE p.relay = $1 AND p.id = h.id \
                         UNION ALL \
                         SELECT e.id, e.number, e.bytes FROM ( \
                             SELECT b.id, b.number, b.bytes, bool_and(b.is_free) OVER (ORDER BY b.number) AS may_go \
                             FROM (SELECT p.id, p.number, octet_length(p.message) AS bytes, \
                                          NOT p.awaits_topic AND :\"schema\".is_settled(p) AS is_free \
                                   FROM :\"schema\".parked AS p \
                                   WHERE h.attempts = 0 AND p.relay = $1 AND p.status = 'waiting' AND {same_as_head} \
                                     AND p.number > h.number ORDER BY p.number LIMIT $3 - 1) AS b \
                         ) AS e WHERE e.may_go \
                     ) AS r \
                 ), fits AS ( \
                     SELECT id, sum(bytes) OVER (ORDER BY due_at, number) - bytes AS before FROM run \
                 ), taken AS ( \
                     UPDATE :\"schema\".parked AS p SET taken_at = now() FROM fits \
                     WHERE p.relay = $1 AND p.id = fits.id AND fits.before < $4 AND p.status || '' = 'waiting' \
                     RETURNING p.* \
                 ) SELECT {TAKEN}, {IS_CANCELLED} FROM taken AS p ORDER BY p.number"
            )),
            // OFFSET 0: no lock is taken of a row that is not among them.
            lock_scheduled: sql(&format!(
                "SELECT d.id, {due_micros}, \
                     pg_try_advisory_xact_lock(hashtextextended(d.id, 0)) FROM ( \
                     SELECT f.id, f.due_at FROM ( \
                         SELECT p.id, p.due_at, sum(octet_length(p.message)) OVER (ORDER BY p.due_at, p.number) \
                                - octet_length(p.message) AS before \
                         FROM (SELECT * FROM :\"schema\".parked AS p \
                               WHERE {due} AND p.status = 'scheduled' AND p.due_at >= $4::timestamptz \
                               ORDER BY p.due_at LIMIT $2) AS p) AS f \
                     WHERE f.before < $3 OFFSET 0) AS d"
            )),
            take_scheduled: sql(&format!(
                "SELECT {TAKEN}, {IS_CANCELLED} \
                 FROM :\"schema\".parked AS p \
                 WHERE p.relay = $1 AND p.id = ANY ($2) AND p.status || '' = 'scheduled' ORDER BY p.due_at, p.number"
            )),
            next_scheduled: sql(&format!(
                "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, \
                     (SELECT {due_micros} FROM :\"schema\".parked AS d \
                      WHERE d.relay = $1 AND d.status = 'scheduled' AND d.due_at >= $2::timestamptz \
                        AND d.due_at < 'infinity'{} ORDER BY d.due_at LIMIT 1)",
                of_slices("d")
            )),
            next_waiting: sql(&format!(
                "SELECT (extract(epoch FROM p.due_at - clock_timestamp()) * 1000)::bigint FROM :\"schema\".parked AS p \
                 WHERE p.relay = $1 AND p.status = 'waiting' \
                   AND p.due_at < 'infinity'{ours} ORDER BY p.due_at LIMIT 1"
            )),
            // What a person skipped meanwhile stays as that.
            forget: sql("DELETE FROM :\"schema\".parked \
                 WHERE relay = $1 AND id = ANY ($2) AND status || '' IN ('scheduled', 'waiting')"),
            refuse: sql("UPDATE :\"schema\".parked AS p \
                 SET attempts = attempts + 1, error = r.why, tried_at = now(), taken_at = NULL, \
                     topic = coalesce(r.topic, p.topic), key = coalesce(r.key, p.key), \
                     status = CASE WHEN r.is_dead THEN 'dead' ELSE 'waiting' END, owes_letter = r.owes_letter, \
                     due_at = now() + r.backoff * interval '1 ms' \
                 FROM unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::boolean[], $8::boolean[]) \
                     AS r (id, topic, key, why, backoff, is_dead, owes_letter) \
                 WHERE p.relay = $1 AND p.id = r.id AND p.status || '' IN ('scheduled', 'waiting')"),
            untry: sql("UPDATE :\"schema\".parked SET taken_at = NULL \
                 WHERE relay = $1 AND id = ANY ($2) AND taken_at IS NOT NULL"),
            hold_topics: sql(&format!(
                "UPDATE :\"schema\".parked AS p \
                 SET awaits_topic = true, due_at = 'infinity', error = t.why, taken_at = NULL \
                 FROM unnest($2::text[], $3::text[]) AS t (topic, why) \
                 WHERE p.relay = $1 AND p.status = 'waiting' AND p.topic = t.topic{ours}"
            )),
            await_topic: sql("UPDATE :\"schema\".parked AS p \
                 SET topic = a.topic, awaits_topic = true, due_at = 'infinity', taken_at = NULL \
                 FROM unnest($2::text[], $3::text[]) AS a (id, topic) \
                 WHERE p.relay = $1 AND p.id = a.id AND p.status || '' = 'waiting'"),
            free_topic: sql(&format!(
                "WITH freed AS ( \
                     UPDATE :\"schema\".parked AS p SET awaits_topic = false, due_at = CASE WHEN ( \
                         SELECT b.number FROM :\"schema\".parked AS b \
                         WHERE b.relay = p.relay AND b.status = 'waiting' AND {same_as_b} \
                           AND b.number < p.number ORDER BY b.number LIMIT 1) IS NULL \
                         THEN now() ELSE 'infinity' END \
                     WHERE p.relay = $1 AND p.status = 'waiting' AND p.awaits_topic AND p.topic = $2{ours} \
                     RETURNING p.id \
                 ) SELECT EXISTS (TABLE freed) OR EXISTS ( \
                     SELECT FROM :\"schema\".parked AS p \
                     WHERE p.relay = $1 AND p.status = 'waiting' AND p.topic = $2 AND NOT p.awaits_topic \
                       AND p.attempts = 0 AND p.due_at < 'infinity'{ours})",
            )),
            join: sql("UPDATE :\"schema\".parked AS p \
                 SET status = 'waiting', due_at = CASE WHEN j.key IS NULL THEN now() ELSE 'infinity' END, \
                     topic = j.topic, key = j.key, number = DEFAULT \
                 FROM unnest($2::text[], $3::text[], $4::text[]) AS j (id, topic, key) \
                 WHERE p.relay = $1 AND p.id = j.id AND p.status || '' = 'scheduled'"),
            postpone: sql(
                "UPDATE :\"schema\".parked AS p SET status = 'scheduled', due_at = e.time::timestamptz, taken_at = NULL \
                 FROM unnest($2::text[], $3::text[]) AS e (id, time) \
                 WHERE p.relay = $1 AND p.id = e.id AND p.status || '' = 'waiting'",
            ),
            promote: sql(&format!(
                "UPDATE :\"schema\".parked AS p SET due_at = now() \
                 FROM unnest($2::text[], $3::text[]) AS k (topic, key) \
                 CROSS JOIN LATERAL ( \
                     SELECT f.id FROM :\"schema\".parked AS f \
                     WHERE f.relay = $1 AND f.status = 'waiting' AND {} \
                     ORDER BY f.number LIMIT 1) AS head \
                 WHERE p.relay = $1 AND p.id = head.id AND p.due_at = 'infinity' AND NOT p.awaits_topic",
                same_key("f", "k")
            )),
            still_held: sql(&format!(
                "SELECT k.topic, k.key FROM unnest($2::text[], $3::text[]) AS k (topic, key) \
                 CROSS JOIN LATERAL ( \
                     SELECT 1 FROM :\"schema\".parked AS p \
                     WHERE p.relay = $1 AND p.status = 'waiting' AND {} \
                     ORDER BY p.number LIMIT 1) AS held",
                same_key("p", "k")
            )),
            letters: sql(&format!(
                "SELECT {TAKEN} FROM ( \
                     SELECT *, sum(octet_length(message)) OVER (ORDER BY number) - octet_length(message) AS before \
                     FROM (SELECT * FROM :\"schema\".parked AS p \
                           WHERE relay = $1 AND status IN ('dead', 'skipped') AND status = 'dead' AND owes_letter{ours} \
                           ORDER BY number LIMIT $2) AS p) AS p \
                 WHERE p.before < $3 ORDER BY p.number"
            )),
            sent_letters: sql(
                "UPDATE :\"schema\".parked SET owes_letter = false WHERE relay = $1 AND id = ANY ($2)",
            ),
        }
    }
}
