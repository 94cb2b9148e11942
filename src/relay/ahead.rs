//! Keeps partitions of the outbox made ahead, as long as the relay lives, whatever it is doing: rows
//! of today need one also while Kafka is away. A relay that stands by does so, too: whoever comes
//! first makes them.
//!
//! In a session of its own for each look, so that nothing waits for it, and it can be one that a
//! pooler lends. There is time: they are made for days ahead. The less is left, the more often it is
//! looked, and once a minute at least: what has come to the default partition is told by then. A look that
//! makes none takes no lock that a writer, or who cleans up, would wait for.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tracing::{debug, info, warn};

use super::RelaySettings;
use crate::catalog;
use crate::database::within;
use crate::error::{Error, ErrorKind, Result};
use crate::metrics::Metrics;
use crate::partitions::{self, Made};

/// How often it is looked at most, and at least. A look reads the catalogue and counts, with a limit.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
const INTERVAL_MAX: Duration = Duration::from_secs(60);

/// After an error.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

/// How long a look may take: longer than the server gives it.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// Looks for ever, if the outbox is partitioned.
pub(super) async fn run(settings: RelaySettings, metrics: Arc<Metrics>) {
    if !settings.contract.outbox.is_ours() {
        return;
    }
    let mut told = Told::default();
    loop {
        let interval = match look(&settings).await {
            Ok(None) => return,
            Ok(Some(made)) => {
                metrics.partitions(&made);
                told.tell(&settings, &made);
                interval(&made)
            }
            Err(error) => {
                told.tell_failure(&error);
                RETRY_INTERVAL
            }
        };
        sleep(interval).await;
    }
}

/// How long until the next look.
fn interval(made: &Made) -> Duration {
    match made.skipped {
        0 => (made.ahead / 10).clamp(INTERVAL_MIN, INTERVAL_MAX),
        // That time gets no partition by looking more often.
        _ => INTERVAL_MAX,
    }
}

async fn look(settings: &RelaySettings) -> Result<Option<Made>> {
    let name = format!("postbox {} partitions", settings.contract.slot);
    let session = settings.database.connect_pooled(&name).await?;
    let (client, contract) = (&session.client, &settings.contract);
    let made = async {
        catalog::check_server(client).await?;
        if !partitions::are_ours(client, contract).await? {
            return Ok(None);
        }
        failpoint!("making_partitions");
        let made = partitions::make(client, contract).await?;
        failpoint!("partitions_made");
        Ok(Some(made))
    };
    match within(ANSWER_MAX, "make partitions", made).await {
        // What waits for a lock, or takes too long, is not away.
        Err(error) if error.kind() == ErrorKind::DatabaseAway && !client.is_closed() => {
            Err(Error::new(ErrorKind::Database, error.chain()))
        }
        made => made,
    }
}

/// What is said once, while it is so.
#[derive(Default)]
struct Told {
    failure: bool,
    default_rows: bool,
}

impl Told {
    fn tell(&mut self, settings: &RelaySettings, made: &Made) {
        self.failure = false;
        if made.made > 0 {
            let hours = made.ahead.as_secs() / 3600;
            info!(made = made.made, hours, "partitions are made ahead");
        }
        let is_told = std::mem::replace(&mut self.default_rows, made.default_rows > 0);
        if made.default_rows > 0 && !is_told {
            let table = settings.contract.table("outbox_default");
            warn!(
                rows = made.default_rows,
                not_made = made.skipped,
                "rows are in {table}, for whose created_at there was no partition: they are sent as all others are, \
                 but not dropped with a partition, and what is still to come of their times goes there, too"
            );
        }
    }

    /// That Postgres is away, the relay itself says.
    fn tell_failure(&mut self, error: &Error) {
        let is_told = std::mem::replace(&mut self.failure, true);
        if is_told || error.kind() == ErrorKind::DatabaseAway {
            debug!("partitions are not made ahead: {}", error.chain());
        } else {
            warn!("partitions are not made ahead: {}", error.chain());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_looked_once_a_minute_and_more_often_if_little_is_left() {
        for (skipped, ahead, expected) in [
            (0, 7 * 86_400, 60),
            (0, 3600, 60),
            (0, 300, 30),
            (0, 0, 1),
            (1, 0, 60),
            (1, 7 * 86_400, 60),
        ] {
            let made = Made {
                made: 0,
                skipped,
                ahead: Duration::from_secs(ahead),
                default_rows: 0,
            };
            let expected = Duration::from_secs(expected);
            assert_eq!(interval(&made), expected, "{skipped} {ahead}");
        }
    }
}
