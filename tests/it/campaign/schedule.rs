//! What is done to a relay and its servers, and when: all drawn from a seed.

use std::fmt;
use std::time::Duration;

use postbox::oracle::{Choices, Load};

use super::mode::Mode;
use crate::support::Weather;

/// One run: the same seed and mode, the same schedule.
#[derive(Debug, Clone)]
pub(super) struct Schedule {
    pub(super) seed: u64,
    pub(super) mode: Mode,
    /// How many relays there are at the beginning.
    pub(super) relays: u64,
    /// How many may be at work at once.
    pub(super) at_work_max: u64,
    pub(super) load: Load,
    pub(super) in_flight_max: usize,
    /// Whether some events cannot go out, some only now and then, and some later.
    pub(super) is_poisoned: bool,
    /// Whether it has only what must have nothing repeated.
    pub(super) is_gentle: bool,
    pub(super) steps: Vec<Step>,
}

/// Something that is done so long after the start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Step {
    pub(super) at: Duration,
    pub(super) action: Action,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// SIGKILL of a relay, and a new one.
    KillRelay,
    /// SIGKILL of a relay where another stands by; else as `KillRelay`.
    KillOneOfTwo,
    /// SIGTERM of a relay, and a new one.
    EndRelay,
    /// SIGTERM of a relay where there is another; else as `EndRelay`.
    EndOneOfTwo,
    FreezeRelay,
    WakeRelay,
    /// One more relay on the same slot or table: one more than may be at work, at most.
    SecondRelay,
    TerminateWalsender,
    /// Those of all relays.
    TerminateSessions,
    StopPostgres(&'static str),
    StartPostgres,
    StopKafka(&'static str),
    StartKafka,
    PauseKafka,
    ResumeKafka,
    /// What happens to the bytes between relay and server.
    Network(Side, Weather),
    Cut(Side),
    /// The slot is dropped, and recovered.
    LoseSlot,
    /// So many events in one transaction.
    Burst(i32),
    /// The topic's `max.message.bytes`.
    Limit(&'static str),
}

/// Limits of a topic: some events are too large for one of them.
pub(super) const SMALL: &str = "2000";
pub(super) const LARGE: &str = "1000000";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Postgres,
    Kafka,
}

/// How long writers write.
const LENGTH: Duration = Duration::from_secs(6);

/// How many events a burst has, at most.
const BURST_EVENTS_MAX: i32 = 20_000;

impl Schedule {
    pub(super) fn draw(seed: u64, mode: Mode, mut load: Load) -> Self {
        let mut choices = Choices::new(seed);
        load.seed = seed;
        load.writers = choices.between(2, 6) as usize;
        load.keys = choices.between(1, 60);
        load.events_max = choices.of(&[1, 5, 40]);
        load.rollback_percent = choices.between(0, 30);
        load.savepoint_percent = choices.between(0, 30);
        load.pause_percent = choices.of(&[0, 2, 10]);
        load.large_per_mille = choices.of(&[0, 10, 50]);
        load.large_rounds = choices.between(20, 60) as i32;
        load.events_per_second = choices.of(&[500.0, 2_000.0, 10_000.0]);
        let in_flight_max = choices.of(&[20, 500, 10_000]);
        // Of its own, so that all else is drawn as without it.
        let is_poisoned = mode.can_park() && Choices::new(seed + 1_000_000).below(3) == 0;
        if is_poisoned {
            load.poison_per_mille = 2;
            load.bulky_per_mille = 3;
            load.bulk = 5_000;
            load.scheduled_per_mille = 20;
        }
        let mut steps = Vec::new();
        let harms = harms(mode, &mut choices);
        for _ in 0..choices.between(3, 8) {
            draw_harm(harms, &mut choices, &mut steps);
        }
        if is_poisoned {
            for (number, at) in (500..).step_by(700).take(8).enumerate() {
                let action = Action::Limit(if number % 2 == 0 { LARGE } else { SMALL });
                let at = Duration::from_millis(at);
                steps.push(Step { at, action });
            }
        }
        steps.sort_by_key(|step| step.at);
        let (relays, at_work_max) = match mode {
            Mode::Wal | Mode::Poll | Mode::Marks => (1, 1),
            Mode::Divided => {
                let at_work_max = choices.between(2, 4);
                (choices.between(2, at_work_max), at_work_max)
            }
            Mode::Claims => (choices.between(1, 3), 3),
        };
        Self {
            seed,
            mode,
            relays,
            at_work_max,
            load,
            in_flight_max,
            is_poisoned,
            is_gentle: harms == GENTLE,
            steps,
        }
    }
}

impl Schedule {
    /// The most events that one transaction may have.
    pub(super) fn transaction_max(&self) -> usize {
        let load = &self.load;
        let large = match load.large_per_mille {
            0 => 0,
            _ => load.large_rounds.unsigned_abs() as usize * load.keys as usize,
        };
        let bursts = self.steps.iter().map(|step| match step.action {
            Action::Burst(events) => events.unsigned_abs() as usize,
            _ => 0,
        });
        bursts
            .chain([large, load.events_max as usize])
            .max()
            .unwrap_or_default()
    }
}

/// What is drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Harm {
    Kill,
    End,
    Freeze,
    /// A relay comes, and one is killed.
    ComeAndKill,
    /// A relay comes, and one ends.
    ComeAndEnd,
    ComeAndFreeze,
    TerminateWalsender,
    TerminateSessions,
    Postgres,
    Kafka,
    PauseKafka,
    Cut,
    /// In the middle of a message.
    StallAndCut,
    Stall,
    Slow,
    BurstAndKill,
    LoseSlot,
    Burst,
}

const WITH_SLOT: [Harm; 17] = [
    Harm::Kill,
    Harm::Kill,
    Harm::End,
    Harm::Freeze,
    Harm::ComeAndKill,
    Harm::ComeAndFreeze,
    Harm::TerminateWalsender,
    Harm::Postgres,
    Harm::Kafka,
    Harm::PauseKafka,
    Harm::Cut,
    Harm::StallAndCut,
    Harm::Stall,
    Harm::Slow,
    Harm::BurstAndKill,
    Harm::LoseSlot,
    Harm::Burst,
];

const WITHOUT_SLOT: [Harm; 17] = [
    Harm::Kill,
    Harm::Kill,
    Harm::End,
    Harm::Freeze,
    Harm::ComeAndKill,
    Harm::ComeAndEnd,
    Harm::ComeAndFreeze,
    Harm::TerminateSessions,
    Harm::Postgres,
    Harm::Kafka,
    Harm::PauseKafka,
    Harm::Cut,
    Harm::StallAndCut,
    Harm::Stall,
    Harm::Slow,
    Harm::BurstAndKill,
    Harm::Burst,
];

/// What must have nothing repeated at all.
const GENTLE: [Harm; 6] = [
    Harm::End,
    Harm::ComeAndEnd,
    Harm::ComeAndEnd,
    Harm::Kafka,
    Harm::PauseKafka,
    Harm::Burst,
];

/// What is drawn from in this mode. Without a slot, what is repeated is held against all
/// that went before it: so a third of the runs have nothing that allows for any.
fn harms(mode: Mode, choices: &mut Choices) -> &'static [Harm] {
    match mode.has_slot() {
        true => &WITH_SLOT,
        false if choices.below(3) == 0 => &GENTLE,
        false => &WITHOUT_SLOT,
    }
}

/// A harm and, where it does not pass by itself, its end.
fn draw_harm(harms: &[Harm], choices: &mut Choices, steps: &mut Vec<Step>) {
    let at = Duration::from_millis(choices.below(LENGTH.as_millis() as u64));
    let mut step = |after: u64, action| {
        let at = at + Duration::from_millis(after);
        steps.push(Step { at, action });
    };
    // Beyond what either side waits for a sign of life, or below it.
    let lasting = choices.of(&[200, 1_000, 2_500, 6_000]);
    let side = choices.of(&[Side::Postgres, Side::Kafka]);
    let burst = choices.of(&[1_000, 5_000, BURST_EVENTS_MAX]);
    match choices.of(harms) {
        Harm::Kill => step(0, Action::KillRelay),
        Harm::End => step(0, Action::EndRelay),
        Harm::Freeze => {
            step(0, Action::FreezeRelay);
            step(lasting, Action::WakeRelay);
        }
        Harm::ComeAndKill => {
            step(0, Action::SecondRelay);
            step(lasting, Action::KillOneOfTwo);
        }
        Harm::ComeAndEnd => {
            step(0, Action::SecondRelay);
            step(lasting, Action::EndOneOfTwo);
        }
        Harm::ComeAndFreeze => {
            step(0, Action::SecondRelay);
            step(500, Action::FreezeRelay);
            step(6_000, Action::WakeRelay);
        }
        Harm::TerminateWalsender => step(0, Action::TerminateWalsender),
        Harm::TerminateSessions => step(0, Action::TerminateSessions),
        Harm::Postgres => {
            step(
                0,
                Action::StopPostgres(choices.of(&["fast", "immediate", "kill"])),
            );
            step(lasting.min(1_000), Action::StartPostgres);
        }
        Harm::Kafka => {
            step(0, Action::StopKafka(choices.of(&["kill", "fast"])));
            step(lasting.min(1_000), Action::StartKafka);
        }
        Harm::PauseKafka => {
            step(0, Action::PauseKafka);
            step(lasting, Action::ResumeKafka);
        }
        Harm::Cut => step(0, Action::Cut(side)),
        Harm::StallAndCut => {
            step(0, Action::Network(side, Weather::Stalled));
            step(20, Action::Cut(side));
            step(20, Action::Network(side, Weather::Fair));
        }
        Harm::Stall => {
            step(0, Action::Network(side, Weather::Stalled));
            step(lasting, Action::Network(side, Weather::Fair));
        }
        Harm::Slow => {
            let delay = Duration::from_millis(choices.between(5, 200));
            step(0, Action::Network(side, Weather::Slow(delay)));
            step(lasting, Action::Network(side, Weather::Fair));
        }
        Harm::BurstAndKill => {
            step(0, Action::Burst(burst));
            step(choices.between(10, 300), Action::KillRelay);
        }
        Harm::LoseSlot => step(0, Action::LoseSlot),
        Harm::Burst => step(0, Action::Burst(burst)),
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seed, mode, load) = (self.seed, self.mode.name(), &self.load);
        let (relays, at_work_max) = (self.relays, self.at_work_max);
        writeln!(
            f,
            "seed {seed}, {mode}: {relays} relays, {at_work_max} at work at most, {} writers, {} keys, up to {} events a transaction, {} events/s, in flight {}",
            load.writers, load.keys, load.events_max, load.events_per_second, self.in_flight_max
        )?;
        for step in &self.steps {
            writeln!(f, "  {:>6} ms  {:?}", step.at.as_millis(), step.action)?;
        }
        Ok(())
    }
}

#[test]
fn the_same_seed_draws_the_same_schedule() {
    for mode in Mode::ALL {
        let draw = |seed| Schedule::draw(seed, mode, Load::new("postbox", "topic")).to_string();
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }
}
