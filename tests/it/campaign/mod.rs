//! Seeded harm to relay, servers and network, and the oracle's verdict of each
//! run. A seed that fails is run again with `make campaign SEED=n RUNS=1`, and with the
//! `MODE` that was asked for, if one was: else the seed says in which it runs.

mod mode;
mod repeats;
mod run;
mod schedule;
mod summary;
mod world;

use std::sync::atomic::{AtomicU64, Ordering};

use mode::Mode;
use postbox::oracle::Load;
use run::{Outcome, run};
use schedule::{Action, Schedule};
use summary::Summary;
use world::World;

/// Runs these seeds, as many at a time as there are jobs, each with servers of its
/// own, all in this mode or each in its own.
async fn campaign(first: u64, runs: u64, jobs: u64, asked: Option<Mode>) -> Summary {
    let next = std::sync::Arc::new(AtomicU64::new(first));
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..jobs.min(runs) {
        let next = std::sync::Arc::clone(&next);
        tasks.spawn(async move {
            let mut world = World::start().await;
            let mut outcomes = Vec::new();
            loop {
                let seed = next.fetch_add(1, Ordering::Relaxed);
                if seed >= first + runs {
                    return outcomes;
                }
                let mode = asked.unwrap_or_else(|| Mode::of(seed));
                // A run that panics must not end the others.
                let task = async move { (run(&mut world, seed, mode).await, world) };
                match tokio::spawn(task).await {
                    Ok((outcome, healed)) => {
                        world = healed;
                        summary::report(seed, &outcome);
                        outcomes.push((seed, mode, Some(outcome)));
                    }
                    Err(_) => {
                        let load = Load::new("postbox", "events");
                        eprintln!("{}: failed", Schedule::draw(seed, mode, load));
                        outcomes.push((seed, mode, None));
                        world = World::start().await;
                    }
                }
            }
        });
    }
    let mut summary = Summary::default();
    while let Some(outcomes) = tasks.join_next().await {
        for (seed, mode, outcome) in outcomes.unwrap() {
            summary.add(seed, mode, outcome.as_ref());
        }
    }
    summary
}

/// Part of every test run: each mode takes turns, with most kinds of harm. Each mode with a
/// slot has a run with an orderly end before any other harm, and one that loses its slot;
/// each other mode has one run with only what must have nothing repeated, and one with more. And
/// two runs at least have events that wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_short_campaign_is_clean() {
    let (first, runs) = (76_010, 10);
    assert!(is_varied(first, runs));
    let summary = campaign(first, runs, 3, None).await;
    println!("{summary}");
    assert!(summary.is_clean(), "{summary}");
}

/// Whether these seeds have what every test run is to have.
fn is_varied(first: u64, runs: u64) -> bool {
    let schedules = |mode: Mode| {
        let seeds = (first..first + runs).filter(move |seed| Mode::of(*seed) == mode);
        seeds.map(move |seed| Schedule::draw(seed, mode, Load::new("postbox", "events")))
    };
    let count = |mode, is_wanted: &dyn Fn(&Schedule) -> bool| {
        schedules(mode)
            .filter(|schedule| is_wanted(schedule))
            .count()
    };
    let begins_with_an_end = |schedule: &Schedule| {
        let first = schedule.steps.first();
        first.map(|step| step.action) == Some(Action::EndRelay)
    };
    let loses_its_slot = |schedule: &Schedule| {
        let mut steps = schedule.steps.iter();
        steps.any(|step| step.action == Action::LoseSlot)
    };
    let of_mode = |mode: Mode| match mode.has_slot() {
        true => count(mode, &begins_with_an_end) >= 1 && count(mode, &loses_its_slot) >= 1,
        false => {
            count(mode, &|schedule| {
                schedule.is_gentle && !schedule.is_poisoned
            }) == 1
        }
    };
    let poisoned = Mode::ALL.map(|mode| count(mode, &|schedule| schedule.is_poisoned));
    Mode::ALL
        .into_iter()
        .all(|mode| schedules(mode).count() >= 2 && of_mode(mode))
        && poisoned.iter().sum::<usize>() >= 2
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
#[ignore = "takes as long as it is told to: make campaign"]
async fn campaign_of_the_environment() {
    let number = |name: &str, default: u64| match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number")),
        Err(_) => default,
    };
    let mode = match std::env::var("MODE") {
        Ok(name) if !name.is_empty() => Some(name.parse().unwrap()),
        _ => None,
    };
    let (first, runs) = (number("SEED", 1), number("RUNS", 20));
    let summary = campaign(first, runs, number("JOBS", 3), mode).await;
    println!("{summary}");
    assert!(summary.is_clean(), "see the runs named above");
}
