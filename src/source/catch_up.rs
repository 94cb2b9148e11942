//! From where each slice stands to where all do.
//!
//! What a relay polls, it polls for all of its slices at once, from one snapshot. But at
//! its start they may stand at several: one was another relay's, which went on without
//! ours; of one a gap was being read. So each group of slices that stand at the same place
//! is read up to a common snapshot, by itself:
//!
//! ```text
//!   slices 0…31   ──┤S1 ────── seq ── S2├──────────────┤
//!                          └─ what is left ─┘└─────────┤  now
//!   slices 32…63  ─────────────────┤S3├────────────────┤
//! ```
//!
//! All that is one queue of gaps, each with the slices that it is read for. The key of a
//! row is in one slice, so the order of groups is of no account; within a group, a gap that
//! was open ends before the next begins.
//!
//! A mark says where *all* slices stand that have been read for so far: whoever stores
//! only the newest mark leaves none behind.

use std::collections::VecDeque;

use super::Mark;
use crate::catalog::{Gap, Slices, Standing};

/// The gaps that are left.
#[derive(Debug, Default)]
pub(super) struct CatchUp {
    /// Where all will stand.
    until: String,
    /// Those that do.
    done: Slices,
    reading: Option<Step>,
    steps: VecDeque<Step>,
    /// Whether slices stand at several places. Until then a mark is that of all.
    is_apart: bool,
}

/// A gap, and the slices that it is read for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) slices: Slices,
    pub(super) gap: Gap,
}

/// Nothing of a gap is read: before any `seq`.
pub(super) const UNREAD: i64 = i64::MIN;

impl CatchUp {
    /// From these places to this snapshot, which sees all that theirs see.
    pub(super) fn new(standings: Vec<Standing>, until: &str) -> Self {
        let is_apart = standings.len() > 1;
        let steps = standings.into_iter().flat_map(|standing| {
            let slices = standing.slices;
            let since = match &standing.gap {
                Some(gap) => gap.until.clone(),
                None => standing.snapshot,
            };
            let rest = (since != until).then(|| Gap {
                since,
                until: until.to_owned(),
                seq: UNREAD,
            });
            let gaps = standing.gap.into_iter().chain(rest);
            gaps.map(move |gap| Step { slices, gap })
        });
        Self {
            steps: steps.collect(),
            until: until.to_owned(),
            is_apart,
            ..Self::default()
        }
    }

    /// What is to be read next, once the one before is.
    pub(super) fn next(&mut self) -> Option<Step> {
        if let Some(step) = self.reading.take()
            && step.gap.until == self.until
        {
            self.done = self.done.with(step.slices);
        }
        self.reading = self.steps.pop_front();
        self.is_apart &= self.reading.is_some();
        self.reading.clone()
    }

    /// Whether slices stand at several places still.
    pub(super) fn is_apart(&self) -> bool {
        self.is_apart
    }

    /// A mark of the gap that is being read, as one of all slices.
    pub(super) fn mark(&self, mark: Mark) -> Mark {
        let Some(step) = self.reading.as_ref().filter(|_| self.is_apart) else {
            return mark;
        };
        let standing = |slices, snapshot: &str, gap| Standing {
            slices,
            snapshot: snapshot.to_owned(),
            gap,
        };
        let reading = match mark {
            Mark::Seq(gap) => standing(step.slices, &gap.since.clone(), Some(gap)),
            Mark::Fence(snapshot) => standing(step.slices, &snapshot, None),
            Mark::Standings(_) | Mark::Claims(_) => return mark,
        };
        let done = (!self.done.is_empty()).then(|| standing(self.done, &self.until, None));
        Mark::Standings(done.into_iter().chain([reading]).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slices(numbers: std::ops::Range<u32>) -> Slices {
        numbers.collect()
    }

    fn gap(since: &str, until: &str, seq: i64) -> Gap {
        Gap {
            since: since.to_owned(),
            until: until.to_owned(),
            seq,
        }
    }

    fn standing(slices: Slices, snapshot: &str, gap: Option<Gap>) -> Standing {
        Standing {
            slices,
            snapshot: snapshot.to_owned(),
            gap,
        }
    }

    fn apart() -> CatchUp {
        let standings = vec![
            standing(slices(0..2), "S1", Some(gap("S1", "S2", 7))),
            standing(slices(2..4), "S3", None),
        ];
        CatchUp::new(standings, "T")
    }

    #[test]
    fn an_open_gap_is_read_to_its_end_and_then_to_that_of_all() {
        let mut catch_up = apart();
        let steps = std::iter::from_fn(|| catch_up.next());
        let steps: Vec<_> = steps.map(|step| (step.slices, step.gap)).collect();
        assert_eq!(
            steps,
            [
                (slices(0..2), gap("S1", "S2", 7)),
                (slices(0..2), gap("S2", "T", UNREAD)),
                (slices(2..4), gap("S3", "T", UNREAD)),
            ]
        );
    }

    #[test]
    fn a_mark_says_where_all_stand_that_were_read_for() {
        let mut catch_up = apart();
        catch_up.next();
        let first = |snapshot, gap| Mark::Standings(vec![standing(slices(0..2), snapshot, gap)]);
        let open = gap("S1", "S2", 9);
        assert_eq!(
            catch_up.mark(Mark::Seq(open.clone())),
            first("S1", Some(open))
        );
        let fence = |snapshot: &str| Mark::Fence(snapshot.to_owned());
        assert_eq!(catch_up.mark(fence("S2")), first("S2", None));
        catch_up.next();
        assert_eq!(catch_up.mark(fence("T")), first("T", None));
        catch_up.next();
        let open = gap("S3", "T", 11);
        let expected = vec![
            standing(slices(0..2), "T", None),
            standing(slices(2..4), "S3", Some(open.clone())),
        ];
        assert_eq!(catch_up.mark(Mark::Seq(open)), Mark::Standings(expected));
        assert_eq!(catch_up.next(), None);
        // From now on it is that of all.
        assert_eq!(catch_up.mark(fence("U")), fence("U"));
    }

    #[test]
    fn those_that_stand_together_have_marks_as_if_there_were_no_slices() {
        let open = gap("S1", "S2", 7);
        let standings = vec![standing(Slices::ALL, "S1", Some(open.clone()))];
        let mut catch_up = CatchUp::new(standings, "S2");
        assert_eq!(catch_up.next().unwrap().gap, open);
        assert_eq!(catch_up.mark(Mark::Seq(open.clone())), Mark::Seq(open));
        assert_eq!(catch_up.next(), None);
        let nothing = CatchUp::new(vec![standing(Slices::ALL, "S1", None)], "S1");
        assert!(nothing.steps.is_empty());
    }
}
