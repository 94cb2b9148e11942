//! What there is of partitions, where the outbox has any: else these are absent.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use prometheus::{GaugeVec, IntGaugeVec, Registry};

use super::{options, register};
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
        self.until.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
