//! What an inbox counts.

use prometheus::{
    Gauge, GaugeVec, Histogram, HistogramOpts, IntCounterVec, IntGauge, IntGaugeVec, Registry,
};

use super::{counters, describe_process, gauge, histogram, options, register, text};
use crate::error::ErrorKind;
use crate::health::Health;

/// Upper bounds of how many messages there are in a batch.
const MESSAGES: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10_000.0,
];

/// All metrics of an inbox.
pub struct InboxMetrics {
    registry: Registry,
    /// Messages that were read, by topic.
    pub consumed: IntCounterVec,
    /// Those of them that were received before, by topic.
    pub duplicates: IntCounterVec,
    /// Messages that were dealt with, by `outcome` and event type.
    pub handled: IntCounterVec,
    /// Attempts that began from the table.
    pub retries: prometheus::IntCounter,
    /// Messages of a transaction.
    pub batch_messages: Histogram,
    /// From the first statement of a batch's transaction to its commit.
    pub transaction_seconds: Histogram,
    /// Within the handler, for a batch or a message that is tried again.
    pub handler_seconds: Histogram,
    /// Records that are not dealt with yet, by partition.
    pub lag: IntGaugeVec,
    /// Attempts that broke off, by reason.
    pub reconnects: IntCounterVec,
    messages: IntGaugeVec,
    /// Without labels: it can be absent.
    oldest: GaugeVec,
    /// Rows that were removed, by table.
    pub cleaned: IntCounterVec,
    seconds_since_progress: Gauge,
    ready: IntGauge,
}

impl Default for InboxMetrics {
    fn default() -> Self {
        let registry = Registry::new();
        let metrics = Self {
            consumed: counters(
                &registry,
                "inbox_consumed_total",
                "messages read from Kafka, repeated ones included",
                "topic",
            ),
            duplicates: counters(
                &registry,
                "inbox_duplicates_total",
                "messages that were received before, and not handled again",
                "topic",
            ),
            handled: register(
                &registry,
                IntCounterVec::new(
                    options(
                        "inbox_handled_total",
                        "messages dealt with: completed, skipped, stored for the application, failed once, or dead",
                    ),
                    &["outcome", "event_type"],
                ),
            ),
            retries: register(
                &registry,
                prometheus::IntCounter::with_opts(options(
                    "inbox_retries_total",
                    "attempts of messages that wait in the table",
                )),
            ),
            batch_messages: register(
                &registry,
                Histogram::with_opts(
                    HistogramOpts::from(options(
                        "inbox_batch_messages",
                        "messages of a transaction",
                    ))
                    .buckets(MESSAGES.to_vec()),
                ),
            ),
            transaction_seconds: histogram(
                &registry,
                "inbox_transaction_seconds",
                "from the first statement of a batch to its commit",
            ),
            handler_seconds: histogram(
                &registry,
                "inbox_handler_seconds",
                "within the handler, for all messages of a batch or one that is tried again",
            ),
            lag: register(
                &registry,
                IntGaugeVec::new(
                    options(
                        "inbox_lag",
                        "offsets between the next record to deal with and the end of the partition",
                    ),
                    &["topic", "partition"],
                ),
            ),
            reconnects: counters(
                &registry,
                "inbox_reconnects_total",
                "attempts that ended and were followed by another, by reason",
                "reason",
            ),
            messages: register(
                &registry,
                IntGaugeVec::new(
                    options(
                        "inbox_messages",
                        "messages of the group in the table, by status, as counted every 10 s; from 100000 on, at \
                         least so many. Absent while it is not known",
                    ),
                    &["status"],
                ),
            ),
            oldest: register(
                &registry,
                GaugeVec::new(
                    options(
                        "inbox_oldest_pending_seconds",
                        "how long ago the oldest of those was received that are waiting or stored; 0 if there are none",
                    ),
                    &[],
                ),
            ),
            cleaned: counters(
                &registry,
                "inbox_cleaned_rows_total",
                "rows that were removed as the window had passed, by table",
                "table",
            ),
            seconds_since_progress: register(
                &registry,
                Gauge::with_opts(options(
                    "inbox_seconds_since_progress",
                    "for how long nothing has moved while there was something to do",
                )),
            ),
            ready: gauge(&registry, "ready", "1 if /readyz is green"),
            registry,
        };
        for kind in ErrorKind::ALL
            .into_iter()
            .filter(|kind| kind.is_transient())
        {
            metrics.reconnects.with_label_values(&[kind.label()]);
        }
        for table in ["inbox", "inbox_message"] {
            metrics.cleaned.with_label_values(&[table]);
        }
        describe_process(&metrics.registry);
        metrics
    }
}

/// What waits in the table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Waiting {
    pub(crate) waiting: i64,
    pub(crate) stored: i64,
    pub(crate) dead: i64,
    /// Of what is not dead; 0 if nothing is there.
    pub(crate) oldest_seconds: f64,
}

impl InboxMetrics {
    /// What was counted; `None`: it is not known.
    pub(crate) fn set_waiting(&self, counted: Option<Waiting>) {
        let Some(counted) = counted else {
            self.messages.reset();
            self.oldest.reset();
            return;
        };
        for (status, messages) in [
            ("waiting", counted.waiting),
            ("stored", counted.stored),
            ("dead", counted.dead),
        ] {
            self.messages.with_label_values(&[status]).set(messages);
        }
        let none: [&str; 0] = [];
        let oldest = self.oldest.with_label_values(&none);
        oldest.set(counted.oldest_seconds);
    }

    /// Everything in Prometheus' text format.
    pub fn text(&self, health: &Health) -> String {
        self.seconds_since_progress
            .set(health.stalled_for().as_secs_f64());
        self.ready.set(health.complaints().is_empty().into());
        text(&self.registry)
    }
}
