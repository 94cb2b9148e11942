//! What a crash may repeat, beside a load that writes many times that.

use std::time::Duration;

use postbox::oracle::Load;

use super::{Fixture, Relay, wait_until};

/// The flag that makes a relay's window small.
pub(crate) const SMALL_WINDOW: [&str; 2] = ["--in-flight-max", "100"];

const IN_FLIGHT_MAX: usize = 100;

/// Of the steady load.
const EVENTS_PER_SECOND: usize = 500;

/// The most events of one transaction.
const TRANSACTION_MAX: usize = 10;

/// How often a relay tells Postgres what is delivered.
pub(crate) const STATUS_INTERVAL: Duration = Duration::from_millis(50);

/// How often it stores its position, as the server forgets what it was told in a crash.
pub(crate) const STORE_INTERVAL: Duration = Duration::from_secs(1);

/// What a timer may be late on a busy machine.
pub(crate) const LATE: Duration = Duration::from_millis(500);

/// What one crash of a relay, or one cut of its connection, may repeat under the
/// steady load: what was in flight, the transaction that was being read, and what was
/// delivered since the last status message.
pub(crate) const WINDOW: usize =
    IN_FLIGHT_MAX + TRANSACTION_MAX + delivered_in(STATUS_INTERVAL) + delivered_in(LATE);

/// The same for a crash of Postgres.
pub(crate) const SERVER_WINDOW: usize = WINDOW + delivered_in(STORE_INTERVAL) + delivered_in(LATE);

/// The same for a slot that was lost, with a heartbeat each second, after which its
/// fence comes out of the slot and is stored.
pub(crate) const SLOT_WINDOW: usize = SERVER_WINDOW + delivered_in(Duration::from_secs(1));

const fn delivered_in(time: Duration) -> usize {
    EVENTS_PER_SECOND * time.as_millis() as usize / 1000
}

impl Fixture {
    /// Writes for four seconds, of which a part is rolled back.
    pub(crate) async fn write_for_a_while(&self) {
        let writers = self.writers(Load {
            rollback_percent: 20,
            savepoint_percent: 20,
            pause_percent: 10,
            ..self.load()
        });
        tokio::time::sleep(Duration::from_secs(4)).await;
        assert!(writers.rolled_back() > 0);
        writers.stop().await.unwrap();
    }

    /// As many events a second as [`WINDOW`] counts with.
    pub(crate) fn steady_load(&self) -> Load {
        Load {
            events_max: TRANSACTION_MAX as u64,
            events_per_second: EVENTS_PER_SECOND as f64,
            ..self.load()
        }
    }

    /// Waits until the relay has caught up and then delivered twice this many events:
    /// if none of them were confirmed, a crash would repeat too many.
    pub(crate) async fn outgrow(&self, relay: &Relay, window: usize) {
        self.wait_for_confirmation().await;
        let before = relay.published(&self.topic);
        wait_until("more is delivered than may be repeated", || async {
            relay.published(&self.topic) > before + 2 * window
        })
        .await;
    }

    /// Judges what is repeated by this bound, of which far more was committed.
    pub(crate) async fn assert_repeats_at_most(&self, bound: usize, relay: Relay) {
        let verdict = self.judge(relay).await;
        println!("repeated at most {bound}: {verdict}");
        assert!(verdict.committed > 2 * bound, "{bound} of {verdict}");
        assert!(verdict.is_clean(bound), "not within {bound}: {verdict}");
    }
}
