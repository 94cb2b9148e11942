//! How long rows are left to gather before they are read.
//!
//! The server sends each row by itself, and each wakes whoever waits for it, at the cost
//! of both. So when rows come in numbers, the relay sleeps until some more are there. But
//! a Unix socket holds 200 messages or so, a fraction of a millisecond's: the server
//! waits if more are left in it. No one length serves all: draining 500,000 rows over a
//! Unix socket, 100 in a transaction, 176,000 events/s with 300 µs and 196,000 with 50;
//! over TCP, one in each, 72,000 and 62,000. With as long as it takes for [`AIM`] rows it
//! is 207,000 and 73,000.

use std::time::Duration;

pub(super) struct Gather {
    pause: Duration,
}

/// With fewer at once, each is worth a wake-up: alone, an event never waits.
const MANY: usize = 8;

/// Of 16, 32 and 64, the fastest over either kind of socket.
const AIM: usize = 32;

const SHORTEST: Duration = Duration::from_micros(50);
const LONGEST: Duration = Duration::from_micros(400);

impl Gather {
    pub(super) fn start() -> Self {
        Self { pause: SHORTEST }
    }

    /// How long to sleep after `rows` came since the last time, if at all.
    pub(super) fn pause(&mut self, rows: usize) -> Option<Duration> {
        if rows < MANY {
            return None;
        }
        if rows > 2 * AIM {
            self.pause = (self.pause / 2).max(SHORTEST);
        } else if rows < AIM {
            self.pause = (self.pause * 2).min(LONGEST);
        }
        Some(self.pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pause once it has settled, when rows come this far apart.
    fn settled(apart: Duration) -> Option<Duration> {
        let mut gather = Gather::start();
        let mut pause = SHORTEST;
        for _ in 0..20 {
            let rows = (pause.as_nanos() / apart.as_nanos()) as usize;
            pause = gather.pause(rows)?;
        }
        Some(pause)
    }

    #[test]
    fn a_few_are_not_waited_for() {
        assert_eq!(settled(Duration::from_micros(100)), None);
        assert_eq!(Gather::start().pause(MANY - 1), None);
    }

    #[test]
    fn as_many_as_are_aimed_at_gather() {
        for micros in 1..=6 {
            let apart = Duration::from_micros(micros);
            let pause = settled(apart).expect("many");
            let rows = (pause.as_nanos() / apart.as_nanos()) as usize;
            assert!((AIM..=2 * AIM).contains(&rows), "{rows} in {pause:?}");
        }
    }

    #[test]
    fn a_pause_has_its_bounds() {
        let mut gather = Gather::start();
        let longest = (0..20).filter_map(|_| gather.pause(MANY)).max();
        assert_eq!(longest, Some(LONGEST));
        let shortest = (0..20).filter_map(|_| gather.pause(1_000)).min();
        assert_eq!(shortest, Some(SHORTEST));
    }
}
