//! What many runs have shown together.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use postbox::oracle::Load;

use super::mode::Mode;
use super::repeats::Cause;
use super::schedule::Action;
use super::{Outcome, Schedule};

/// Of each mode that was run.
#[derive(Debug, Default)]
pub(super) struct Summary(BTreeMap<Mode, Tally>);

/// What the runs of one mode have shown.
#[derive(Debug, Default)]
struct Tally {
    runs: usize,
    events: usize,
    lost: usize,
    inversions: usize,
    ghosts: usize,
    duplicates: usize,
    unmarked: i64,
    /// By what a stretch begins with: how many there were, and the most that was repeated in
    /// one, with its bound.
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
    pub(super) fn add(&mut self, seed: u64, mode: Mode, outcome: Option<&Outcome>) {
        let tally = self.0.entry(mode).or_default();
        tally.runs += 1;
        match outcome {
            Some(outcome) => tally.add(seed, outcome),
            None => tally.failed.push(seed),
        }
    }

    pub(super) fn is_clean(&self) -> bool {
        let mut tallies = self.0.values();
        tallies.all(|tally| tally.failed.is_empty() && tally.over_bound.is_empty())
    }
}

impl Tally {
    fn add(&mut self, seed: u64, outcome: &Outcome) {
        let verdict = &outcome.verdict;
        self.events += verdict.committed;
        self.lost += verdict.lost.len();
        self.inversions += verdict.inversions.len();
        self.ghosts += verdict.ghosts.len() + verdict.misplaced.len();
        self.duplicates += verdict.duplicates;
        self.unmarked += outcome.unmarked;
        for step in Schedule::draw(seed, outcome.mode, Load::new("postbox", "events")).steps {
            *self.harms.entry(name(step.action)).or_default() += 1;
        }
        for stretch in &outcome.stretches {
            let (stretches, most) = self.repeated.entry(stretch.cause).or_default();
            *stretches += 1;
            *most = (*most).max((stretch.repeated, stretch.bound));
        }
        if outcome.is_over_bound() {
            self.over_bound.push(seed);
        }
        self.longest_stall = self.longest_stall.max(outcome.longest_stall);
        self.longest_recovery = self.longest_recovery.max(outcome.longest_recovery);
        if !outcome.is_as_promised() {
            self.failed.push(seed);
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (mode, tally) in &self.0 {
            writeln!(f, "mode                        {}", mode.name())?;
            tally.show(*mode, f)?;
        }
        Ok(())
    }
}

impl Tally {
    fn show(&self, mode: Mode, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "runs                        {}", self.runs)?;
        writeln!(f, "events committed            {}", self.events)?;
        writeln!(f, "lost                        {}", self.lost)?;
        writeln!(f, "inversions                  {}", self.inversions)?;
        writeln!(f, "ghosts                      {}", self.ghosts)?;
        writeln!(f, "duplicates                  {}", self.duplicates)?;
        if mode == Mode::Marks {
            writeln!(f, "confirmed and not marked    {}", self.unmarked)?;
        }
        for (cause, (stretches, (most, bound))) in &self.repeated {
            writeln!(
                f,
                "{:<28}{stretches}; most repeated after one {most} (its bound: {bound})",
                match (mode.has_slot(), cause) {
                    (true, Cause::Clean) => "restarts of nothing left",
                    (true, Cause::Relay) => "restarts of the stream",
                    (false, Cause::Clean) => "beginnings",
                    (false, Cause::Relay) => "breaks",
                    (_, Cause::Postgres) => "restarts after a crash",
                    (_, Cause::Slot) => "restarts after a recovery",
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
        writeln!(f, "harms                       {}", harms.join(", "))
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
        mode,
        verdict,
        unmarked,
        stretches,
        longest_stall,
        longest_recovery,
    } = outcome;
    eprintln!(
        "seed {seed}, {}: {verdict}; {} stretches; stalled {:.1} s, {:.1} s of them after all harm",
        mode.name(),
        stretches.len(),
        longest_stall.as_secs_f64(),
        longest_recovery.as_secs_f64()
    );
    if !outcome.is_as_promised() || outcome.is_over_bound() {
        if *unmarked > 0 {
            eprintln!("  {unmarked} rows confirmed and not marked");
        }
        let schedule = Schedule::draw(seed, *mode, Load::new("postbox", "events"));
        eprint!("{schedule}");
        for stretch in stretches {
            eprintln!("  {stretch}");
        }
    }
}
