//! Which slices a relay is to serve.
//!
//! Each relay decides for itself, from what it sees of all slices: nobody keeps a list of
//! relays. One is known by the slices it has, or has asked for.
//!
//! - What is free is taken up to a fair share: 64 by the number of relays, rounded up. So
//!   the share of one that ended is divided among all that are left.
//! - What stays free for longer than a lease, as another does not take its share, is taken
//!   by whoever sees it.
//! - Who has two less than another asks it for one, until that is no longer so. Whoever is
//!   asked counts what it is asked for as gone, and everybody else does: so nothing is
//!   asked for twice, and where the shares differ by one at most, nothing moves.
//! - No more relays have slices than there may be. One more stands by.

use std::collections::BTreeMap;

use crate::catalog::{FREE_MAX, SLICES, Slice, Slices};

/// What a relay is to do.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Share {
    /// What it is to serve: what it has and nobody wants, and what it may claim.
    pub(super) serve: Slices,
    /// What it should ask for.
    pub(super) want: Slices,
    /// Whether it waits for what it has asked for.
    pub(super) waits: bool,
}

impl Share {
    /// Of the relay `me`, if so many may be at work.
    pub(super) fn of(me: &str, slices: &[Slice], relays_max: usize) -> Self {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for holder in slices.iter().filter_map(holder) {
            *counts.entry(holder).or_default() += 1;
        }
        let mine = counts.remove(me).unwrap_or(0);
        if mine == 0 && counts.len() >= relays_max {
            return Self::default();
        }
        let share = (SLICES as usize).div_ceil(counts.len() + 1);
        let room = share.saturating_sub(mine);
        let free = slices.iter().filter(|slice| slice.served_by().is_none());
        let (taken, left): (Vec<_>, Vec<_>) = free
            .enumerate()
            .partition(|(at, slice)| *at < room || is_left(slice));
        let kept = slices
            .iter()
            .filter(|slice| slice.served_by() == Some(me) && holder(slice) == Some(me));
        let claimed = taken.iter().map(|(_, slice)| *slice);
        let want = match left.is_empty() {
            true => level(slices, counts, mine + taken.len()),
            false => Slices::default(),
        };
        Self {
            serve: kept.chain(claimed).map(|slice| slice.number).collect(),
            waits: slices
                .iter()
                .any(|slice| slice.served_by() != Some(me) && holder(slice) == Some(me)),
            want,
        }
    }
}

/// Who has it, or will.
fn holder(slice: &Slice) -> Option<&str> {
    let owner = slice.served_by()?;
    Some(slice.wanted_by.as_deref().unwrap_or(owner))
}

/// Whether all have left it for longer than they may.
fn is_left(slice: &Slice) -> bool {
    slice.remaining.is_none_or(|seconds| seconds < -FREE_MAX)
}

/// What to take from those who have more. All would choose the same: the last of whoever
/// has most.
fn level<'s>(slices: &'s [Slice], mut counts: BTreeMap<&'s str, usize>, mut mine: usize) -> Slices {
    let mut want = Slices::default();
    loop {
        let may_take = |slice: &&Slice| slice.wanted_by.is_none() && !want.contains(slice.number);
        let most = slices
            .iter()
            .filter(may_take)
            .filter_map(|slice| {
                let owner = slice.served_by()?;
                Some((*counts.get(owner)?, owner, slice.number))
            })
            .max();
        match most {
            Some((count, owner, number)) if count >= mine + 2 => {
                want.insert(number);
                mine += 1;
                counts.insert(owner, count - 1);
            }
            _ => return want,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slices of relays by their names, a character each: `.` is free, and has been for
    /// half a second.
    fn slices(owners: &str) -> Vec<Slice> {
        let slice = |(number, owner): (usize, char)| {
            let owner = owner.to_string();
            let (owner, remaining) = match &*owner {
                "." => (None, -0.5),
                _ => (Some(&*owner), 2.5),
            };
            Slice::new(number as u32, owner, None, remaining)
        };
        owners.chars().enumerate().map(slice).collect()
    }

    fn owners(counts: &[(&str, usize)]) -> String {
        counts
            .iter()
            .map(|(owner, count)| owner.repeat(*count))
            .collect()
    }

    /// What has settled once all have done what they should, and how often slices moved.
    fn settle(
        owners: &str,
        relays: &[&str],
        relays_max: usize,
    ) -> (BTreeMap<String, usize>, usize) {
        let mut all = slices(owners);
        let mut moved = 0;
        for _ in 0..10 {
            for me in relays {
                let share = Share::of(me, &all, relays_max);
                for slice in &mut all {
                    if share.serve.contains(slice.number) && slice.owner.as_deref() != Some(me) {
                        *slice = Slice::new(slice.number, Some(me), None, 2.5);
                    }
                    if share.want.contains(slice.number) {
                        slice.wanted_by = Some((*me).to_owned());
                    }
                }
            }
            for slice in all.iter_mut().filter(|slice| slice.wanted_by.is_some()) {
                moved += 1;
                slice.owner = slice.wanted_by.take();
            }
        }
        let mut counts = BTreeMap::new();
        for slice in &all {
            let owner = slice.owner.clone().unwrap_or_default();
            *counts.entry(owner).or_default() += 1;
        }
        (counts, moved)
    }

    fn assert_settles(
        owners: &str,
        relays: &[&str],
        relays_max: usize,
        expected: &[usize],
        moves: usize,
    ) {
        let (counts, moved) = settle(owners, relays, relays_max);
        let mut counts: Vec<usize> = counts.into_values().collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        assert_eq!((&*counts, moved), (expected, moves), "{owners}");
    }

    #[test]
    fn relays_that_come_get_a_fair_share_at_once() {
        assert_settles(&owners(&[(".", 64)]), &["a"], 4, &[64], 0);
        assert_settles(&owners(&[("a", 64)]), &["a", "b"], 4, &[32, 32], 32);
        let two = owners(&[("a", 32), ("b", 32)]);
        assert_settles(&two, &["a", "b", "c"], 4, &[22, 21, 21], 21);
        let three = owners(&[("a", 22), ("b", 21), ("c", 21)]);
        assert_settles(&three, &["a", "b", "c", "d"], 4, &[16, 16, 16, 16], 16);
    }

    #[test]
    fn what_has_settled_stays() {
        for counts in [
            [("a", 32), ("b", 32), ("c", 0)],
            [("a", 22), ("b", 21), ("c", 21)],
        ] {
            let relays: Vec<&str> = counts
                .iter()
                .filter(|(_, count)| *count > 0)
                .map(|(me, _)| *me)
                .collect();
            let (_, moved) = settle(&owners(&counts), &relays, 64);
            assert_eq!(moved, 0, "{counts:?}");
        }
    }

    #[test]
    fn the_slices_of_one_that_ended_are_divided_among_the_others() {
        let left = owners(&[(".", 22), ("b", 21), ("c", 21)]);
        assert_settles(&left, &["b", "c"], 4, &[32, 32], 0);
        assert_settles(&left, &["b"], 4, &[32, 21, 11], 0);
    }

    /// The others may be waiting for something else.
    #[test]
    fn what_stays_free_is_taken_beyond_the_share() {
        let mut all = slices(&owners(&[(".", 22), ("b", 21), ("c", 21)]));
        assert_eq!(Share::of("b", &all, 4).serve.count(), 32);
        for slice in &mut all[..22] {
            slice.remaining = Some(-4.0);
        }
        assert_eq!(Share::of("b", &all, 4).serve.count(), 43);
    }

    #[test]
    fn no_more_relays_have_slices_than_there_may_be() {
        let two = slices(&owners(&[("a", 32), ("b", 32)]));
        assert_eq!(Share::of("c", &two, 2), Share::default());
        let with_free = slices(&owners(&[(".", 10), ("a", 27), ("b", 27)]));
        assert_eq!(Share::of("c", &with_free, 2), Share::default());
        let sixty_four: String = (0..64_u8).map(|number| char::from(b'0' + number)).collect();
        assert_eq!(Share::of("z", &slices(&sixty_four), 64), Share::default());
    }

    #[test]
    fn who_has_asked_waits_and_asks_for_nothing_more() {
        let mut all = slices(&owners(&[("a", 64)]));
        let first = Share::of("b", &all, 2);
        assert_eq!(
            (first.serve.count(), first.want.count(), first.waits),
            (0, 32, false)
        );
        for slice in all
            .iter_mut()
            .filter(|slice| first.want.contains(slice.number))
        {
            slice.wanted_by = Some("b".to_owned());
        }
        let then = Share::of("b", &all, 2);
        assert_eq!(
            (then.serve.count(), then.want.count(), then.waits),
            (0, 0, true)
        );
        // And the other keeps what it is not asked for.
        assert_eq!(Share::of("a", &all, 2).serve.count(), 32);
        // A third one stands by.
        assert_eq!(Share::of("c", &all, 2), Share::default());
    }

    #[test]
    fn a_lease_that_is_over_is_nobodys() {
        let mut all = slices(&owners(&[("a", 64)]));
        assert_eq!(Share::of("b", &all, 1), Share::default());
        for slice in &mut all {
            slice.remaining = Some(-0.1);
        }
        assert_eq!(Share::of("b", &all, 1).serve, Slices::ALL);
    }
}
