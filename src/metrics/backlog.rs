//! The backlog, as it was last measured. What is not known is absent.

use std::collections::BTreeSet;
use std::sync::Mutex;

use prometheus::{GaugeVec, IntGaugeVec, Registry};

use super::{options, register};
use crate::backlog::Backlog;
use crate::lock::lock;

pub(super) struct BacklogMetrics {
    /// Without labels: these can be absent.
    events: IntGaugeVec,
    oldest: GaugeVec,
    topics: IntGaugeVec,
    /// Those of which nothing is pending are told, too.
    known: Mutex<BTreeSet<String>>,
}

impl BacklogMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        let events = options(
            "pending_events",
            "events in the outbox that were committed and, by the checkpoint, not delivered, as measured every \
             5 to 11 s; from 100000 on, at least so many. With a slot, what was delivered since the last heartbeat \
             may be among them. Absent while it is not known, and from a relay that stands by",
        );
        let oldest = options(
            "oldest_pending_seconds",
            "how long the oldest of postbox_pending_events had been there, since its created_at, when they were \
             measured; 0 if there are none",
        );
        let topics = options(
            "topic_pending_events",
            "how many of postbox_pending_events go to this topic; if these are 100000 or more, at least so many",
        );
        Self {
            events: register(registry, IntGaugeVec::new(events, &[])),
            oldest: register(registry, GaugeVec::new(oldest, &[])),
            topics: register(registry, IntGaugeVec::new(topics, &["topic"])),
            known: Mutex::default(),
        }
    }

    /// There is such a topic.
    pub(super) fn know(&self, topic: &str) {
        self.with_known(|known| known.insert(topic.to_owned()));
    }

    pub(super) fn set(&self, backlog: Option<&Backlog>) {
        let Some(backlog) = backlog else {
            self.events.reset();
            self.oldest.reset();
            self.topics.reset();
            return;
        };
        let number = |events: u64| i64::try_from(events).unwrap_or(i64::MAX);
        self.with_known(|known| {
            known.extend(backlog.topics.keys().cloned());
            for topic in &*known {
                let events = backlog.topics.get(topic).copied().unwrap_or_default();
                self.topics.with_label_values(&[topic]).set(number(events));
            }
        });
        let none: [&str; 0] = [];
        let oldest = backlog.oldest.map(|age| age.as_secs_f64());
        match oldest.or((backlog.events == 0).then_some(0.0)) {
            Some(seconds) => self.oldest.with_label_values(&none).set(seconds),
            None => self.oldest.reset(),
        }
        self.events
            .with_label_values(&none)
            .set(number(backlog.events));
    }

    fn with_known<T>(&self, f: impl FnOnce(&mut BTreeSet<String>) -> T) -> T {
        f(&mut lock(&self.known))
    }
}
