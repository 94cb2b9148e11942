//! Counts what waits in the table, as long as the inbox lives, whatever it is doing.
//!
//! It is that of the group, which each of its consumers tells. Never more rows than
//! [`EVENTS_MAX`] are looked at, in a transaction that is not let run for long: beyond that, the
//! numbers are at least so high, and the oldest is that of those that were seen.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tokio_postgres::types::Type;
use tracing::{debug, warn};

use super::InboxSettings;
use super::columns::Parameter;
use crate::backlog::{BEGIN, EVENTS_MAX};
use crate::database::{Session, query_after, sort, within};
use crate::error::Result;
use crate::metrics::{InboxMetrics, Waiting};

/// How often.
const INTERVAL: Duration = Duration::from_secs(10);

/// How long it may take: the server's own limit, and the way there.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Counts for ever.
pub(super) async fn run(settings: InboxSettings, metrics: Arc<InboxMetrics>) {
    let looked_at = |statuses: &str, limit: u64| {
        format!(
            "SELECT m.status, m.received_at FROM :\"schema\".inbox_source AS s
             CROSS JOIN LATERAL (
                 SELECT m.status, m.received_at FROM :\"schema\".inbox_message AS m
                 WHERE m.source = s.id AND m.status IN ({statuses})
                 LIMIT {limit}
             ) AS m
             WHERE s.consumer_group = $1
             LIMIT {limit}"
        )
    };
    let sql = settings.contract.sql(&format!(
        "SELECT count(*) FILTER (WHERE p.status = 'waiting'), count(*) FILTER (WHERE p.status = 'stored'),
             (SELECT count(*) FROM ({decided}) AS d WHERE d.status = 'dead'),
             coalesce(greatest(extract(epoch FROM clock_timestamp() - min(p.received_at)), 0), 0)::float8
         FROM ({pending}) AS p",
        pending = looked_at("'stored', 'waiting'", EVENTS_MAX),
        decided = looked_at("'dead', 'skipped'", EVENTS_MAX),
    ));
    let mut session = None;
    loop {
        let counted = count(&settings, &sql, &mut session).await;
        match &counted {
            Ok(_) => {}
            // That servers are away, the inbox itself says.
            Err(error) if error.kind().is_transient() => {
                debug!("count what waits: {}", error.chain());
            }
            Err(error) => warn!("counting again later: {}", error.chain()),
        }
        metrics.set_waiting(counted.ok());
        sleep(INTERVAL).await;
    }
}

async fn count(
    settings: &InboxSettings,
    sql: &str,
    session: &mut Option<Session>,
) -> Result<Waiting> {
    let doing = "count what waits";
    // One in which something failed is not used again.
    let ours = match session.take() {
        Some(session) => session,
        None => {
            let name = "postbox inbox gauges";
            settings.database.connect_pooled(name).await?
        }
    };
    let parameters: [Parameter<'_>; 1] = [(&settings.group, Type::TEXT)];
    let answer = async {
        let rows = query_after(BEGIN, &ours.client, sql, &parameters).await;
        rows.map_err(|error| sort(doing, error))
    };
    let rows = within(ANSWER_MAX, doing, answer).await?;
    let row = rows.first().expect("one row of counts");
    let counted = Waiting {
        waiting: row.get(0),
        stored: row.get(1),
        dead: row.get(2),
        oldest_seconds: row.get(3),
    };
    *session = Some(ours);
    Ok(counted)
}
