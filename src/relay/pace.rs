//! Whether so much goes out that a batch is worth its wait.

use std::time::{Duration, Instant};

/// Counts what is sent, in windows of [`WINDOW`].
pub(super) struct Pace {
    since: Instant,
    sent: usize,
    sent_before: usize,
    has_new: bool,
}

/// As long as librdkafka lets a record linger by default.
const WINDOW: Duration = Duration::from_millis(5);

/// With as many in a window, batches are what counts. At 10,000 events/s, which is
/// less, pushing to one broker costs the relay 33 µs an event instead of 15, and COMMIT
/// to consumer takes 1.8 ms in the median instead of 4.0.
const MANY: usize = 64;

impl Pace {
    pub(super) fn start(now: Instant) -> Self {
        Self {
            since: now,
            sent: 0,
            sent_before: 0,
            has_new: false,
        }
    }

    /// One was sent.
    pub(super) fn sent(&mut self, now: Instant) {
        self.turn_over(now);
        self.sent += 1;
        self.has_new = true;
    }

    /// Nothing more can be sent for now: whether what was sent should leave at once.
    /// Asked again with nothing sent in between, it says no.
    pub(super) fn should_push(&mut self) -> bool {
        std::mem::take(&mut self.has_new) && !self.is_many()
    }

    /// Whether it is so by now.
    pub(super) fn is_many(&self) -> bool {
        self.sent.max(self.sent_before) >= MANY
    }

    fn turn_over(&mut self, now: Instant) {
        let elapsed = now.duration_since(self.since);
        if elapsed >= WINDOW {
            self.sent_before = if elapsed < 2 * WINDOW { self.sent } else { 0 };
            self.sent = 0;
            self.since = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of 100 turns push, with so many events in each, this far apart.
    fn pushes(events: usize, apart: Duration) -> usize {
        let start = Instant::now();
        let mut pace = Pace::start(start);
        let turns = (1..=100).filter(|turn| {
            (0..events).for_each(|_| pace.sent(start + apart * *turn));
            pace.should_push()
        });
        turns.count()
    }

    #[test]
    fn what_is_alone_is_pushed() {
        assert_eq!(pushes(1, Duration::from_secs(1)), 100);
        assert_eq!(pushes(1, Duration::from_millis(1)), 100);
        assert_eq!(pushes(10, Duration::from_millis(1)), 100);
    }

    #[test]
    fn what_is_many_is_not() {
        // Until the first window has shown how many there are.
        assert!(pushes(30, Duration::from_micros(300)) <= 2);
        assert!(pushes(20, Duration::from_millis(1)) <= 3);
    }

    #[test]
    fn a_burst_that_has_passed_is_forgotten() {
        let start = Instant::now();
        let mut pace = Pace::start(start);
        let mut pushes = |events, after| {
            (0..events).for_each(|_| pace.sent(start + after));
            pace.should_push()
        };
        let millisecond = Duration::from_millis(1);
        assert!(pushes(1, millisecond));
        assert!(!pushes(1_000, 2 * millisecond));
        assert!(!pushes(1, 3 * millisecond));
        // More may follow in the next window.
        assert!(!pushes(1, WINDOW));
        assert!(pushes(1, 3 * WINDOW));
        assert!(!pushes(1_000, 3 * WINDOW + millisecond));
        assert!(pushes(1, Duration::from_secs(10)));
    }

    #[test]
    fn nothing_sent_is_nothing_to_push() {
        let start = Instant::now();
        let mut pace = Pace::start(start);
        assert!(!pace.should_push());
        pace.sent(start);
        assert!(pace.should_push());
        assert!(!pace.should_push());
    }
}
