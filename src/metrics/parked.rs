//! Events that wait, and what became of them.

use prometheus::{Gauge, IntCounter, IntGauge, IntGaugeVec, Registry};

use super::{gauge, options, register};
use crate::parked::store::Count;

/// What is told of parked events.
#[derive(Clone)]
pub struct ParkedMetrics {
    /// Events that were parked as they could not go out.
    pub refused: IntCounter,
    /// Events that were parked behind another of their key, or as their topic is held.
    pub behind: IntCounter,
    /// Events that were laid by until their time.
    pub scheduled: IntCounter,
    /// Events that were sent from the table.
    pub sent: IntCounter,
    /// Scheduled events that were cancelled.
    pub cancelled: IntCounter,
    /// Events that were given up.
    pub dead_letters: IntCounter,
    rows: IntGaugeVec,
    bytes: IntGauge,
    oldest: Gauge,
}

impl ParkedMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        let counter =
            |name: &str, help: &str| register(registry, IntCounter::with_opts(options(name, help)));
        Self {
            refused: counter(
                "parked_refused_total",
                "events that were parked as they cannot go out as they are",
            ),
            behind: counter(
                "parked_behind_total",
                "events that were parked untried, behind another of their key or for their topic",
            ),
            scheduled: counter(
                "parked_scheduled_total",
                "events that were parked until their scheduled_at",
            ),
            sent: counter(
                "parked_sent_total",
                "events that were sent from the table of parked events",
            ),
            cancelled: counter(
                "parked_cancelled_total",
                "scheduled events whose time came and that were cancelled before",
            ),
            dead_letters: counter(
                "dead_letters_total",
                "events that were given up after their attempts, or at once with --on-poison skip",
            ),
            rows: register(
                registry,
                IntGaugeVec::new(
                    options(
                        "parked_events",
                        "events in the table of parked events, by status, as counted every 10 s",
                    ),
                    &["status"],
                ),
            ),
            bytes: gauge(
                registry,
                "parked_bytes",
                "bytes of those that are waiting or dead",
            ),
            oldest: register(
                registry,
                Gauge::with_opts(options(
                    "parked_oldest_seconds",
                    "how long the oldest event has been parked that waits for another try; 0 if none does",
                )),
            ),
        }
    }

    /// How much there is.
    pub(crate) fn set(&self, count: &Count) {
        for (status, rows) in [
            ("scheduled", count.scheduled),
            ("waiting", count.waiting),
            ("dead", count.dead),
        ] {
            self.rows.with_label_values(&[status]).set(rows);
        }
        self.bytes.set(count.bytes);
        self.oldest.set(count.oldest_seconds);
    }
}
