//! What many runs have shown together.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use postbox::oracle::Load;

use super::run::Cause;
use super::schedule::Action;
use super::{Outcome, Schedule};

#[derive(Debug, Default)]
pub(super) struct Summary {
    runs: usize,
    events: usize,
    lost: usize,
    inversions: usize,
    ghosts: usize,
    duplicates: usize,
    /// By what the restart went on from: how often, and the most it repeated with
    /// that restart's bound.
    repeated: BTreeMap<Cause, (usize, (usize, usize))>,
    over_bound: Vec<u64>,
    longest_stall: Duration,
    longest_recovery: Duration,
    /// What was done, and how often.
    harms: BTreeMap<String, usize>,
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
        self.lost += verdict.lost.len();
        self.inversions += verdict.inversions.len();
        self.ghosts += verdict.ghosts.len() + verdict.misplaced.len();
        self.duplicates += verdict.duplicates;
        for step in Schedule::draw(seed, Load::new("postbox", "events")).steps {
            *self.harms.entry(name(step.action)).or_default() += 1;
        }
        for restart in &outcome.restarts {
            let (restarts, most) = self.repeated.entry(restart.cause).or_default();
            *restarts += 1;
            *most = (*most).max((restart.repeated, restart.bound));
        }
        if outcome.is_over_bound() {
            self.over_bound.push(seed);
        }
        self.longest_stall = self.longest_stall.max(outcome.longest_stall);
        self.longest_recovery = self.longest_recovery.max(outcome.longest_recovery);
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
        writeln!(f, "runs                        {}", self.runs)?;
        writeln!(f, "events committed            {}", self.events)?;
        writeln!(f, "lost                        {}", self.lost)?;
        writeln!(f, "inversions                  {}", self.inversions)?;
        writeln!(f, "ghosts                      {}", self.ghosts)?;
        writeln!(f, "duplicates                  {}", self.duplicates)?;
        for (cause, (restarts, (most, bound))) in &self.repeated {
            writeln!(
                f,
                "restarts {:<19}{restarts}; most repeated after one {most} (its bound: {bound})",
                match cause {
                    Cause::Clean => "of nothing left",
                    Cause::Relay => "of the stream",
                    Cause::Postgres => "after a crash",
                    Cause::Slot => "after a recovery",
                }
            )?;
        }
        writeln!(f, "runs over their bound       {:?}", self.over_bound)?;
        writeln!(
            f,
            "longest stall, with harm    {:.1} s",
            self.longest_stall.as_secs_f64()
        )?;
        writeln!(
            f,
            "longest stall, harm over    {:.1} s",
            self.longest_recovery.as_secs_f64()
        )?;
        writeln!(f, "failed seeds                {:?}", self.failed)?;
        let harms = self.harms.iter();
        let harms: Vec<String> = harms
            .map(|(harm, times)| format!("{harm} {times}"))
            .collect();
        write!(f, "harms                       {}", harms.join(", "))
    }
}

/// An action without its particulars.
fn name(action: Action) -> String {
    let text = format!("{action:?}");
    text.split('(').next().unwrap_or_default().to_owned()
}

/// A line for a run, and what was done in it if it is not clean.
pub(super) fn report(seed: u64, outcome: &Outcome) {
    let Outcome {
        verdict,
        restarts,
        longest_stall,
        longest_recovery,
    } = outcome;
    eprintln!(
        "seed {seed}: {verdict}; {} restarts; stalled {:.1} s, {:.1} s of them after all harm",
        restarts.len(),
        longest_stall.as_secs_f64(),
        longest_recovery.as_secs_f64()
    );
    if !verdict.is_clean(usize::MAX) || outcome.is_over_bound() {
        let schedule = Schedule::draw(seed, Load::new("postbox", "events"));
        eprintln!("{schedule}{restarts:?}");
    }
}
