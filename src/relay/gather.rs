//! How long rows are left to gather before they are read.
//!
//! The server sends each row by itself, and each wakes whoever waits for it, at the cost
//! of both. So while many come, the relay sleeps until some more are there. But a Unix
//! socket holds 200 messages or so, a fraction of a millisecond's: the server waits if
//! more are left in it. No one length serves all: draining 500,000 rows over a Unix
//! socket, 100 in a transaction, 176,000 events/s with 300 µs and 196,000 with 50; over
//! TCP, 300,000 with one in each, 72,000 and 62,000. So it is as long as [`AIM`] rows
//! take.

use std::time::Duration;

pub(super) struct Gather {
    pause: Duration,
}

/// Of 16, 32 and 64, the fastest over either kind of socket.
const AIM: usize = 32;

const SHORTEST: Duration = Duration::from_micros(50);
const LONGEST: Duration = Duration::from_micros(400);

impl Gather {
    pub(super) fn start() -> Self {
        Self { pause: SHORTEST }
    }

    /// How long to sleep after `rows` came since the last time, if they are `many`.
    pub(super) fn pause(&mut self, rows: usize, many: bool) -> Option<Duration> {
        if !many || rows == 0 {
            return None;
        }
        if rows < AIM {
            self.pause = (self.pause * 2).min(LONGEST);
        } else if rows > 2 * AIM {
            self.pause = (self.pause / 2).max(SHORTEST);
        }
        Some(self.pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_as_are_aimed_at_gather() {
        for micros in 1..=6 {
            let mut gather = Gather::start();
            let rows = |pause: Duration| (pause.as_micros() / micros) as usize;
            let pause = (0..20).fold(SHORTEST, |pause, _| {
                gather.pause(rows(pause), true).expect("many")
            });
            let rows = rows(pause);
            assert!((AIM..=2 * AIM).contains(&rows), "{rows} in {pause:?}");
        }
    }

    #[test]
    fn a_pause_has_its_bounds() {
        let mut gather = Gather::start();
        let longest = (0..20).filter_map(|_| gather.pause(1, true)).max();
        assert_eq!(longest, Some(LONGEST));
        let shortest = (0..20).filter_map(|_| gather.pause(1_000, true)).min();
        assert_eq!(shortest, Some(SHORTEST));
    }

    #[test]
    fn a_few_are_not_waited_for() {
        let mut gather = Gather::start();
        assert_eq!(gather.pause(20, false), None);
        assert_eq!(gather.pause(0, true), None);
    }
}
