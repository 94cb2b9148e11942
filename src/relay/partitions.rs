//! The partitions that a producer has written to.
//!
//! An idempotent producer numbers its records in each partition, and a broker
//! refuses a number that does not follow the last. But of a producer that it does
//! not know it takes any first number: were the first batch of a partition lost
//! on its way, the second would be taken without it, and librdkafka would take the
//! first for delivered too: it would be lost. So the first record of a partition is
//! sent alone, and no record waits for so long that the broker may have forgotten.

use std::time::{Duration, Instant};

use crate::publisher::Destination;

/// What the brokers know of one producer, by topic and partition.
#[derive(Default)]
pub(super) struct Partitions(Vec<Vec<State>>);

#[derive(Debug, Clone, Copy, Default)]
enum State {
    /// It has no record of this producer.
    #[default]
    New,
    /// Its first record is on its way.
    Opening,
    /// It has a record of this producer, sent then.
    Open(Instant),
}

/// A broker forgets a producer that was silent for a day
/// (`producer.id.expiration.ms`): long before, its next record is a first again.
pub(super) const OPEN_MAX: Duration = Duration::from_secs(3600);

impl Partitions {
    /// Whether its first record is on its way, so that the second must wait.
    pub(super) fn is_opening(&self, partition: Destination) -> bool {
        let topic = self.0.get(partition.topic);
        let state = topic.and_then(|topic| topic.get(index(partition)));
        matches!(state, Some(State::Opening))
    }

    /// A record is given to the producer.
    pub(super) fn sent(&mut self, partition: Destination, now: Instant) {
        let state = self.state(partition);
        match state {
            State::Open(last) if now.duration_since(*last) <= OPEN_MAX => {}
            _ => *state = State::Opening,
        }
    }

    /// A record that was sent then is with the broker.
    pub(super) fn delivered(&mut self, partition: Destination, sent_at: Instant) {
        *self.state(partition) = State::Open(sent_at);
    }

    fn state(&mut self, partition: Destination) -> &mut State {
        grown(grown(&mut self.0, partition.topic), index(partition))
    }
}

fn index(partition: Destination) -> usize {
    usize::try_from(partition.partition).expect("a partition is not negative")
}

fn grown<T: Default>(list: &mut Vec<T>, index: usize) -> &mut T {
    if index >= list.len() {
        list.resize_with(index + 1, T::default);
    }
    &mut list[index]
}
