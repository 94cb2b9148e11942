//! What the relay counts, in Prometheus' terms. Names are part of the contract.

mod backlog;
mod inbox;
mod parked;
mod partitions;

use prometheus::core::Collector;
use prometheus::{
    Encoder as _, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use self::backlog::BacklogMetrics;
pub use self::inbox::InboxMetrics;
pub(crate) use self::inbox::Waiting;
pub use self::parked::ParkedMetrics;
use self::partitions::PartitionMetrics;
use crate::backlog::Backlog;
use crate::catalog::SlotState;
use crate::error::ErrorKind;
use crate::health::Health;
use crate::partitions::Made;

/// Upper bounds from 0.5 ms to 60 s: a healthy delivery takes milliseconds, and
/// an outage should still show how long it was.
const SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0,
];

/// All metrics of a relay.
pub struct Metrics {
    registry: Registry,
    events: IntCounterVec,
    bytes: IntCounterVec,
    /// Deliveries that failed, by librdkafka's name of the error.
    pub failures: IntCounterVec,
    /// Seconds from handing an event to the producer to its acknowledgement.
    pub publish_seconds: Histogram,
    /// Seconds from the commit, by the server's clock, to the acknowledgement.
    pub commit_to_delivery_seconds: Histogram,
    /// Events sent and not yet acknowledged.
    pub in_flight_events: IntGauge,
    /// Their bytes.
    pub in_flight_bytes: IntGauge,
    /// The newest position received from Postgres, in bytes of WAL.
    pub received_lsn: IntGauge,
    /// The newest position confirmed to Postgres, in bytes of WAL.
    pub confirmed_lsn: IntGauge,
    slot_lag_bytes: IntGauge,
    retained_wal_bytes: IntGauge,
    /// Events that could not go out and were put off, where they are claimed.
    pub put_off: IntCounter,
    /// Rows that were removed by cleaning up, by table.
    pub cleaned: IntCounterVec,
    /// Slices that are served, of a relay that is divided.
    pub slices: IntGauge,
    wal_status: IntGaugeVec,
    backlog: BacklogMetrics,
    /// Of events that wait.
    pub parked: ParkedMetrics,
    partitions: PartitionMetrics,
    seconds_since_progress: Gauge,
    ready: IntGauge,
    /// Times the stream was started again, by the reason.
    pub reconnects: IntCounterVec,
}

/// The counters of one topic, looked up once.
pub struct TopicMetrics {
    /// Events acknowledged.
    pub events: IntCounter,
    /// Bytes of their keys, values and headers.
    pub bytes: IntCounter,
}

impl Default for Metrics {
    fn default() -> Self {
        let registry = Registry::new();
        let metrics = Self {
            events: counters(
                &registry,
                "events_published_total",
                "events acknowledged by Kafka",
                "topic",
            ),
            bytes: counters(
                &registry,
                "bytes_published_total",
                "bytes of keys, values and headers acknowledged by Kafka",
                "topic",
            ),
            failures: counters(
                &registry,
                "delivery_failures_total",
                "deliveries that failed, by error",
                "error",
            ),
            publish_seconds: histogram(
                &registry,
                "publish_seconds",
                "from handing an event to the producer to its acknowledgement",
            ),
            commit_to_delivery_seconds: histogram(
                &registry,
                "commit_to_delivery_seconds",
                "from the commit (the server's clock, never below zero) to the acknowledgement",
            ),
            in_flight_events: gauge(
                &registry,
                "in_flight_events",
                "events sent and not yet acknowledged",
            ),
            in_flight_bytes: gauge(
                &registry,
                "in_flight_bytes",
                "bytes sent and not yet acknowledged",
            ),
            received_lsn: gauge(
                &registry,
                "received_lsn",
                "newest position received from Postgres, in bytes of WAL",
            ),
            confirmed_lsn: gauge(
                &registry,
                "confirmed_lsn",
                "newest position confirmed to Postgres, in bytes of WAL",
            ),
            slot_lag_bytes: gauge(
                &registry,
                "slot_lag_bytes",
                "bytes of WAL between the slot's confirmed position and the server's",
            ),
            retained_wal_bytes: gauge(
                &registry,
                "retained_wal_bytes",
                "bytes of WAL that the server keeps for the slot",
            ),
            put_off: register(
                &registry,
                IntCounter::with_opts(options(
                    "put_off_events_total",
                    "events that could not go out and were put off, as their table says",
                )),
            ),
            cleaned: counters(
                &registry,
                "cleaned_rows_total",
                "rows that were removed as they are older than the retention, by table",
                "table",
            ),
            slices: gauge(
                &registry,
                "slices",
                "slices that are served; zero if the relay is not divided",
            ),
            wal_status: register(
                &registry,
                IntGaugeVec::new(
                    options(
                        "slot_wal_status",
                        "1 for the slot's wal_status: reserved, extended, unreserved or lost",
                    ),
                    &["status"],
                ),
            ),
            backlog: BacklogMetrics::new(&registry),
            parked: ParkedMetrics::new(&registry),
            partitions: PartitionMetrics::new(&registry),
            seconds_since_progress: register(
                &registry,
                Gauge::with_opts(options(
                    "seconds_since_progress",
                    "how long nothing moved while there was something to do",
                )),
            ),
            ready: gauge(&registry, "ready", "1 if /readyz is green"),
            reconnects: counters(
                &registry,
                "reconnects_total",
                "times the stream was started again, by reason",
                "reason",
            ),
            registry,
        };
        // A counter that begins with its first event hides it from increase().
        for kind in [
            ErrorKind::SlotInUse,
            ErrorKind::DatabaseAway,
            ErrorKind::BrokerAway,
        ] {
            metrics.reconnects.with_label_values(&[kind.label()]);
        }
        for table in ["outbox", "parked", "cancellation", "idempotency"] {
            metrics.cleaned.with_label_values(&[table]);
        }
        describe_process(&metrics.registry);
        metrics
    }
}

impl Metrics {
    /// The counters of a topic.
    pub fn topic(&self, name: &str) -> TopicMetrics {
        self.backlog.know(name);
        TopicMetrics {
            events: self.events.with_label_values(&[name]),
            bytes: self.bytes.with_label_values(&[name]),
        }
    }

    /// What Postgres says of the slot, if there is one.
    pub fn slot(&self, slot: Option<&SlotState>) {
        let bytes = |of: fn(&SlotState) -> i64| slot.map_or(0, of);
        self.slot_lag_bytes.set(bytes(SlotState::lag_bytes));
        self.retained_wal_bytes
            .set(bytes(SlotState::retained_bytes));
        self.wal_status(slot.and_then(|slot| slot.wal_status.as_deref()));
    }

    fn wal_status(&self, status: Option<&str>) {
        self.wal_status.reset();
        if let Some(status) = status {
            self.wal_status.with_label_values(&[status]).set(1);
        }
    }

    /// What is committed and not delivered, as it was measured now; `None` if that is not
    /// known.
    pub fn backlog(&self, backlog: Option<&Backlog>) {
        self.backlog.set(backlog);
    }

    /// What there is of partitions, where the outbox has any.
    pub fn partitions(&self, made: &Made) {
        self.partitions.set(made);
    }

    /// Everything in Prometheus' text format.
    pub fn text(&self, health: &Health) -> String {
        self.seconds_since_progress
            .set(health.stalled_for().as_secs_f64());
        self.ready.set(health.complaints().is_empty().into());
        self.partitions.refresh();
        text(&self.registry)
    }
}

fn text(registry: &Registry) -> String {
    let mut text = Vec::new();
    TextEncoder::new()
        .encode(&registry.gather(), &mut text)
        .expect("metrics are valid text");
    String::from_utf8(text).expect("metrics are UTF-8")
}

/// The version that runs, and what it takes of the machine.
fn describe_process(registry: &Registry) {
    let build = register(
        registry,
        GaugeVec::new(options("build_info", "the version that runs"), &["version"]),
    );
    build
        .with_label_values(&[env!("CARGO_PKG_VERSION")])
        .set(1.0);
    #[cfg(target_os = "linux")]
    registry
        .register(Box::new(
            prometheus::process_collector::ProcessCollector::for_self(),
        ))
        .expect("each metric is registered once");
}

fn options(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("postbox")
}

fn counters(registry: &Registry, name: &str, help: &str, label: &str) -> IntCounterVec {
    register(registry, IntCounterVec::new(options(name, help), &[label]))
}

fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    register(registry, IntGauge::with_opts(options(name, help)))
}

fn histogram(registry: &Registry, name: &str, help: &str) -> Histogram {
    let options = HistogramOpts::from(options(name, help)).buckets(SECONDS.to_vec());
    register(registry, Histogram::with_opts(options))
}

fn register<C: Collector + Clone + 'static>(
    registry: &Registry,
    collector: prometheus::Result<C>,
) -> C {
    let collector = collector.expect("metric names and buckets are valid");
    registry
        .register(Box::new(collector.clone()))
        .expect("each metric is registered once");
    collector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_what_was_counted() {
        let metrics = Metrics::default();
        metrics.topic("order").events.inc_by(3);
        metrics.wal_status(Some("reserved"));
        let text = metrics.text(&Health::default());
        for line in [
            "postbox_events_published_total{topic=\"order\"} 3",
            "postbox_slot_wal_status{status=\"reserved\"} 1",
            "postbox_ready 0",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }

    #[test]
    fn what_is_not_known_of_the_backlog_is_not_told() {
        let metrics = Metrics::default();
        let text = || metrics.text(&Health::default());
        assert!(!text().contains("pending"), "{}", text());
        metrics.topic("quiet");
        let backlog = Backlog {
            events: 5,
            oldest: Some(std::time::Duration::from_millis(1500)),
            topics: [("order".to_owned(), 5)].into(),
        };
        metrics.backlog(Some(&backlog));
        for line in [
            "\npostbox_pending_events 5\n",
            "\npostbox_oldest_pending_seconds 1.5\n",
            "\npostbox_topic_pending_events{topic=\"order\"} 5\n",
            "\npostbox_topic_pending_events{topic=\"quiet\"} 0\n",
        ] {
            assert!(text().contains(line), "{line} in {}", text());
        }
        metrics.backlog(Some(&Backlog::default()));
        for line in [
            "\npostbox_pending_events 0\n",
            "\npostbox_oldest_pending_seconds 0\n",
            "\npostbox_topic_pending_events{topic=\"order\"} 0\n",
        ] {
            assert!(text().contains(line), "{line} in {}", text());
        }
        metrics.backlog(None);
        assert!(!text().contains("pending"), "{}", text());
    }
}
