//! When a table is looked at again.
//!
//! Where there is something, after the shortest pause; where there is nothing, after twice
//! the pause before, up to the longest. Whoever has something to look for ends the pause,
//! but for the shortest.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// What a look at the table has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// All that there was.
    Rows,
    /// As many rows as one look finds: there are more.
    Many,
    /// Nothing, though not everything was looked at: this says nothing of what is there.
    NothingYet,
    /// Nothing.
    Nothing,
}

/// The pause between two looks.
#[derive(Debug)]
pub(super) struct Pause {
    min: Duration,
    max: Duration,
    looked_at: Instant,
    pause: Duration,
    /// The pause that doubles.
    idle: Duration,
    is_woken: bool,
}

impl Pause {
    /// There is none before the first look.
    pub(super) fn new(min: Duration, max: Duration) -> Self {
        Self {
            min,
            max,
            looked_at: Instant::now(),
            pause: Duration::ZERO,
            idle: Duration::ZERO,
            is_woken: false,
        }
    }

    /// The table is looked at now.
    pub(super) fn look(&mut self) {
        self.looked_at = Instant::now();
        self.is_woken = false;
    }

    /// When it was looked at last.
    pub(super) fn looked_at(&self) -> Instant {
        self.looked_at
    }

    /// What the look has found.
    pub(super) fn found(&mut self, found: Found) {
        self.pause = match found {
            Found::Many => Duration::ZERO,
            Found::Rows | Found::NothingYet => self.min,
            Found::Nothing => (self.idle * 2).clamp(self.min, self.max),
        };
        if found != Found::NothingYet {
            self.idle = self.pause.max(self.min);
        }
    }

    /// Whether it is time for the next look.
    pub(super) fn is_over(&self) -> bool {
        self.looked_at.elapsed() >= self.pause
    }

    /// Waits until it is, or until it is `woken`. Cancel-safe, if that is.
    pub(super) async fn over(&mut self, woken: impl Future<Output = ()>) {
        if !self.is_woken {
            tokio::select! {
                () = sleep_until(self.looked_at + self.pause) => return,
                () = woken => self.is_woken = true,
            }
        }
        sleep_until(self.looked_at + self.min).await;
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready};

    use super::*;

    const MIN: Duration = Duration::from_millis(10);
    const MAX: Duration = Duration::from_millis(50);

    fn after(found: &[Found]) -> u128 {
        let mut pause = Pause::new(MIN, MAX);
        for found in found {
            pause.found(*found);
        }
        pause.pause.as_millis()
    }

    #[test]
    fn it_doubles_while_there_is_nothing() {
        use Found::{Many, Nothing, Rows};
        assert_eq!(after(&[]), 0);
        assert_eq!(after(&[Nothing]), 10);
        assert_eq!(after(&[Nothing, Nothing]), 20);
        assert_eq!(after(&[Nothing; 9]), 50);
        assert_eq!(after(&[Nothing, Nothing, Rows]), 10);
        assert_eq!(after(&[Nothing, Nothing, Rows, Nothing]), 20);
        assert_eq!(after(&[Nothing, Many]), 0);
        assert_eq!(after(&[Nothing, Many, Nothing]), 20);
    }

    #[test]
    fn a_look_at_a_part_that_finds_nothing_neither_lengthens_nor_shortens_it() {
        use Found::{Nothing, NothingYet};
        assert_eq!(after(&[Nothing, Nothing, NothingYet]), 10);
        assert_eq!(after(&[Nothing, Nothing, NothingYet, Nothing]), 40);
    }

    #[tokio::test]
    async fn whoever_is_woken_waits_for_the_shortest() {
        let mut pause = Pause::new(MIN, Duration::from_secs(600));
        for _ in 0..20 {
            pause.found(Found::Nothing);
        }
        pause.look();
        assert!(!pause.is_over());
        pause.over(ready(())).await;
        assert!(pause.looked_at().elapsed() >= MIN);
        // It stays so until the next look.
        pause.over(pending()).await;
    }
}
