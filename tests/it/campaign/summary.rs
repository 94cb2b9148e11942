//! What many runs have shown together.

use std::fmt;
use std::time::Duration;

use postbox::oracle::Load;

use super::{Outcome, Schedule};

#[derive(Debug, Default)]
pub(super) struct Summary {
    runs: usize,
    events: usize,
    restarts: usize,
    lost: usize,
    inversions: usize,
    ghosts: usize,
    duplicates: usize,
    /// The most after one restart, and what that run's bound was.
    repeated_max: (usize, usize),
    over_bound: Vec<u64>,
    longest_stall: Duration,
    /// Seeds with a relay that ended, or was not done in time.
    failed: Vec<u64>,
}

impl Summary {
    pub(super) fn add(&mut self, seed: u64, outcome: Option<&Outcome>) {
        self.runs += 1;
        let Some(outcome) = outcome else {
            self.failed.push(seed);
            return;
        };
        let verdict = &outcome.verdict;
        self.events += verdict.committed;
        self.restarts += outcome.restarts;
        self.lost += verdict.lost.len();
        self.inversions += verdict.inversions.len();
        self.ghosts += verdict.ghosts.len() + verdict.misplaced.len();
        self.duplicates += verdict.duplicates;
        let repeated = (outcome.repeated_max, outcome.bound);
        self.repeated_max = self.repeated_max.max(repeated);
        if outcome.repeated_max > outcome.bound {
            self.over_bound.push(seed);
        }
        self.longest_stall = self.longest_stall.max(outcome.longest_stall);
        if !verdict.is_clean(usize::MAX) {
            self.failed.push(seed);
        }
    }

    pub(super) fn is_clean(&self) -> bool {
        self.failed.is_empty() && self.over_bound.is_empty()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (repeated, bound) = self.repeated_max;
        writeln!(f, "runs                        {}", self.runs)?;
        writeln!(f, "events committed            {}", self.events)?;
        writeln!(f, "restarts of the stream      {}", self.restarts)?;
        writeln!(f, "lost                        {}", self.lost)?;
        writeln!(f, "inversions                  {}", self.inversions)?;
        writeln!(f, "ghosts                      {}", self.ghosts)?;
        writeln!(f, "duplicates                  {}", self.duplicates)?;
        writeln!(
            f,
            "most after one restart      {repeated} (that run's bound: {bound})"
        )?;
        writeln!(f, "runs over their bound       {:?}", self.over_bound)?;
        writeln!(
            f,
            "longest stall, with harm    {:.1} s",
            self.longest_stall.as_secs_f64()
        )?;
        write!(f, "failed seeds                {:?}", self.failed)
    }
}

/// A line for a run, and what was done in it if it is not clean.
pub(super) fn report(seed: u64, outcome: &Outcome) {
    let Outcome {
        verdict,
        restarts,
        repeated_max,
        bound,
        longest_stall,
    } = outcome;
    eprintln!(
        "seed {seed}: {verdict}; {restarts} restarts, {repeated_max} of {bound} repeated after one; stalled {:.1} s",
        longest_stall.as_secs_f64()
    );
    if !verdict.is_clean(usize::MAX) || repeated_max > bound {
        eprintln!("{}", Schedule::draw(seed, Load::new("postbox", "events")));
    }
}
