//! What there is of partitions, where the outbox has any: else these are absent.

use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use prometheus::{GaugeVec, IntGaugeVec, Registry};

use super::{options, register};
use crate::lock::lock;
use crate::partitions::Made;

pub(super) struct PartitionMetrics {
    /// Without labels: these can be absent.
    ahead: GaugeVec,
    default_rows: IntGaugeVec,
    /// Until when there are any: it comes nearer, also while nobody can look.
    until: Mutex<Option<Instant>>,
}

impl PartitionMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        let ahead = options(
            "partitions_ahead_seconds",
            "for how long from now on there is a partition for each row that is written; absent where the outbox is not \
             partitioned",
        );
        let default_rows = options(
            "default_partition_rows",
            "rows for whose created_at there was no partition; at most 100000. Absent where the outbox is not \
             partitioned",
        );
        Self {
            ahead: register(registry, GaugeVec::new(ahead, &[])),
            default_rows: register(registry, IntGaugeVec::new(default_rows, &[])),
            until: Mutex::default(),
        }
    }

    pub(super) fn set(&self, made: &Made) {
        let none: [&str; 0] = [];
        let rows = i64::try_from(made.default_rows).unwrap_or(i64::MAX);
        self.default_rows.with_label_values(&none).set(rows);
        *self.until() = Instant::now().checked_add(made.ahead);
    }

    /// Sets what changes with time.
    pub(super) fn refresh(&self) {
        let none: [&str; 0] = [];
        if let Some(until) = *self.until() {
            let ahead = until.saturating_duration_since(Instant::now());
            self.ahead.with_label_values(&none).set(ahead.as_secs_f64());
        }
    }

    fn until(&self) -> MutexGuard<'_, Option<Instant>> {
        lock(&self.until)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use prometheus::TextEncoder;

    use super::*;

    /// A relay that can make none any more must not go on telling how many there were.
    #[test]
    fn what_is_ahead_comes_nearer_and_is_absent_where_there_is_none() {
        let registry = Registry::new();
        let metrics = PartitionMetrics::new(&registry);
        let text = || {
            metrics.refresh();
            let encoded = TextEncoder::new().encode_to_string(&registry.gather());
            encoded.expect("metrics are valid text")
        };
        assert_eq!(text(), "");
        metrics.set(&Made {
            made: 1,
            skipped: 0,
            ahead: Duration::from_millis(50),
            default_rows: 2,
        });
        assert!(text().contains("postbox_partitions_ahead_seconds 0.0"));
        std::thread::sleep(Duration::from_millis(60));
        assert!(text().contains("postbox_partitions_ahead_seconds 0\n"));
        assert!(text().contains("postbox_default_partition_rows 2\n"));
    }
}
