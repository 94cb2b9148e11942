//! One run: writers write, harm is done, and the oracle judges.

use std::time::{Duration, Instant};

use postbox::oracle::{self, Choices, Load, Verdict};
use rdkafka::admin::{AdminOptions, AlterConfig, ResourceSpecifier};

use super::mode::Mode;
use super::repeats::{End, History, Stretch, now};
use super::schedule::{Action, LARGE, SMALL, Schedule, Side};
use super::world::World;
use crate::poison::{admin, create_topic};
use crate::support::{Fixture, PATIENCE, Relay, Weather, wait_until};

/// What a run has shown.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) mode: Mode,
    pub(super) verdict: Verdict,
    /// Rows that were confirmed and not marked published.
    pub(super) unmarked: i64,
    /// From each start of a relay, or each break, to the next.
    pub(super) stretches: Vec<Stretch>,
    /// The longest time in which nothing reached Kafka, harm included.
    pub(super) longest_stall: Duration,
    /// The longest time in which nothing moved once all harm was over.
    pub(super) longest_recovery: Duration,
}

/// How long nothing may move once all harm is over. How long it then takes to confirm
/// everything depends on the machine: a window of 20 events has few in each batch.
const STALL_MAX: Duration = Duration::from_secs(60);

/// How long a relay that is told to stop is waited for before the next one starts.
const END_MAX: Duration = Duration::from_secs(1);

/// So often tried that what is too large for a while is mostly not given up.
const PATIENT: [&str; 6] = [
    "--retry-backoff-min",
    "50ms",
    "--retry-backoff-max",
    "400ms",
    "--max-attempts",
    "20",
];

impl Outcome {
    /// But for what was repeated.
    pub(super) fn is_as_promised(&self) -> bool {
        self.verdict.is_clean(usize::MAX) && self.unmarked == 0
    }

    pub(super) fn is_over_bound(&self) -> bool {
        let mut stretches = self.stretches.iter();
        stretches.any(|stretch| stretch.repeated > stretch.bound)
    }
}

struct Run<'w> {
    world: &'w mut World,
    fixture: Fixture,
    schedule: Schedule,
    /// Which relay is harmed, where several are at work.
    victims: Choices,
    relays: Vec<Relay>,
    /// Those that were told to stop, and wait for what is away.
    ending: Vec<Relay>,
    /// Which process, and since when in milliseconds since 1970.
    frozen: Option<(u32, i64)>,
    history: History,
}

/// Runs the schedule of this seed.
pub(super) async fn run(world: &mut World, seed: u64, mode: Mode) -> Outcome {
    world.heal();
    let fixture = world.fixture().await;
    mode.set_up(&fixture).await;
    let schedule = Schedule::draw(seed, mode, fixture.load());
    let mut run = Run {
        world,
        fixture,
        victims: Choices::new(seed),
        schedule,
        relays: Vec::new(),
        ending: Vec::new(),
        frozen: None,
        history: History::default(),
    };
    if run.schedule.is_poisoned {
        create_topic(&run.fixture, SMALL).await;
    }
    for _ in 0..run.schedule.relays {
        run.start_relay();
    }
    for relay in &mut run.relays {
        relay.wait_for_log(mode.at_work()).await;
    }
    let load = run.schedule.load.clone();
    let writers = run.fixture.writers(load);
    let start = Instant::now();
    for step in run.schedule.steps.clone() {
        tokio::time::sleep(step.at.saturating_sub(start.elapsed())).await;
        run.apply(step.action).await;
    }
    run.heal().await;
    writers.stop().await.unwrap();
    run.judge().await
}

impl Run<'_> {
    fn start_relay(&mut self) {
        let url = self.world.relay_url(&self.fixture);
        let in_flight_max = self.schedule.in_flight_max.to_string();
        let mode = self.schedule.mode.flags(self.schedule.at_work_max);
        let mut flags = vec![
            "--database-url",
            &url,
            "--in-flight-max",
            &in_flight_max,
            "--wal-sender-timeout",
            "2s",
            "--heartbeat-interval",
            "1s",
        ];
        flags.extend(mode.iter().map(String::as_str));
        if self.schedule.is_poisoned {
            flags.extend(PATIENT);
        }
        self.relays.push(Relay::start(&self.fixture, &flags));
    }

    async fn apply(&mut self, action: Action) {
        match action {
            Action::KillRelay => {
                self.kill_relay().await;
                self.start_relay();
            }
            Action::KillOneOfTwo => {
                self.kill_relay().await;
                self.start_relay_if_none();
            }
            Action::EndRelay => {
                self.end_relay().await;
                self.start_relay();
            }
            Action::EndOneOfTwo => {
                self.end_relay().await;
                self.start_relay_if_none();
            }
            Action::FreezeRelay => self.freeze(),
            Action::WakeRelay => self.wake(),
            Action::SecondRelay => {
                if self.relays.len() <= self.schedule.at_work_max as usize {
                    self.start_relay();
                }
            }
            Action::TerminateWalsender => self.terminate_walsender().await,
            Action::TerminateSessions => self.terminate_sessions().await,
            Action::StopPostgres(how) => {
                if how != "fast" {
                    self.history.server_crashed();
                }
                self.history.postgres_hears(false);
                self.world.stop_postgres(how);
            }
            Action::LoseSlot => self.lose_slot().await,
            Action::StartPostgres => self.world.start_postgres(),
            Action::StopKafka(how) => self.world.stop_kafka(how),
            Action::StartKafka => self.world.start_kafka(),
            Action::PauseKafka => self.world.pause_kafka(),
            Action::ResumeKafka => self.world.resume_kafka(),
            Action::Network(side, weather) => self.world.proxy(side).weather(weather),
            Action::Cut(side) => self.world.proxy(side).cut(),
            Action::Burst(events) => self.burst(events).await,
            Action::Limit(bytes) => self.limit(bytes).await,
        }
        let is_fair = self.world.proxy(Side::Postgres).is(Weather::Fair);
        let hears = is_fair && self.world.postgres_runs();
        self.history.postgres_hears(hears);
        for relay in &mut self.relays {
            assert!(relay.is_running(), "ended by itself:\n{}", relay.log());
        }
    }

    fn start_relay_if_none(&mut self) {
        if self.relays.is_empty() {
            self.start_relay();
        }
    }

    /// Any of those at work; with one at work, the oldest, which it mostly is.
    fn victim(&mut self) -> usize {
        match self.schedule.mode.is_shared() {
            true => self.victims.below(self.relays.len() as u64) as usize,
            false => 0,
        }
    }

    async fn kill_relay(&mut self) {
        let victim = self.victim();
        let relay = self.relays.remove(victim);
        self.kill(relay).await;
    }

    async fn kill(&mut self, mut relay: Relay) {
        assert!(relay.is_running(), "ended by itself:\n{}", relay.log());
        relay.signal("KILL");
        relay.exit_code().await;
        if let Some((_, since)) = self.frozen.take_if(|(pid, _)| *pid == relay.pid()) {
            self.history.slept(since);
        }
        self.ended(&relay, End::Killed);
    }

    fn ended(&mut self, relay: &Relay, end: End) {
        self.history.ended(self.schedule.mode, &relay.log(), end);
    }

    /// SIGTERM. It may take as long as what it waits for is away: the next relay then
    /// stands by.
    async fn end_relay(&mut self) {
        let victim = self.victim();
        let mut relay = self.relays.remove(victim);
        if let Some((_, since)) = self.frozen.take_if(|(pid, _)| *pid == relay.pid()) {
            relay.signal("CONT");
            self.history.slept(since);
        }
        listens(&mut relay).await;
        relay.signal("TERM");
        match tokio::time::timeout(END_MAX, relay.exit_code()).await {
            Ok(code) => {
                assert!([0, 9].contains(&code), "{code}:\n{}", relay.log());
                self.ended(&relay, End::Told(code));
            }
            Err(_) => self.ending.push(relay),
        }
    }

    /// Of a relay that was told to stop.
    async fn expect_end(&mut self, mut relay: Relay) {
        let code = relay.exit_code().await;
        assert!([0, 9].contains(&code), "{code}:\n{}", relay.log());
        self.ended(&relay, End::ToldLate(code));
    }

    fn freeze(&mut self) {
        if self.frozen.is_none() {
            let victim = self.victim();
            let relay = &self.relays[victim];
            relay.signal("STOP");
            self.frozen = Some((relay.pid(), now()));
        }
    }

    fn wake(&mut self) {
        let Some((frozen, since)) = self.frozen.take() else {
            return;
        };
        for relay in &self.relays {
            if relay.pid() == frozen {
                relay.signal("CONT");
            }
        }
        self.history.slept(since);
    }

    async fn lose_slot(&mut self) {
        if !self.world.postgres_runs() {
            return;
        }
        while !self.relays.is_empty() {
            self.kill_relay().await;
        }
        for mut relay in std::mem::take(&mut self.ending) {
            if relay.is_running() {
                self.kill(relay).await;
            } else {
                self.expect_end(relay).await;
            }
        }
        // Else a walsender may wait for what a stalled network does not pass.
        self.world.proxy(Side::Postgres).cut();
        self.fixture.reconnect().await;
        self.fixture.drop_slot().await;
        self.history.slot_dropped();
        let report = self.schedule.mode.recover(&self.fixture);
        self.history.recovered(&report);
        self.start_relay();
    }

    async fn terminate_walsender(&mut self) {
        if !self.world.postgres_runs() {
            return;
        }
        self.fixture.reconnect().await;
        self.fixture.terminate_walsender().await;
    }

    /// Of relays, as an administrator may do.
    async fn terminate_sessions(&mut self) {
        if !self.world.postgres_runs() {
            return;
        }
        self.fixture.reconnect().await;
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() \
                   AND application_name NOT IN ('postbox test', 'postbox oracle')";
        self.fixture.client.batch_execute(sql).await.unwrap();
    }

    async fn burst(&self, events: i32) {
        if !self.world.postgres_runs() {
            return;
        }
        let load = Load {
            seed: self.schedule.seed + 1_000_000,
            writers: 1,
            large_per_mille: 1000,
            large_rounds: events / self.schedule.load.keys as i32,
            events_per_second: 1.0,
            ..self.schedule.load.clone()
        };
        let writers = self.fixture.writers(load);
        tokio::time::sleep(Duration::from_millis(500)).await;
        // It ends with its first transaction.
        writers.stop().await.unwrap();
    }

    /// If Kafka takes it now.
    async fn limit(&self, bytes: &str) {
        let resource = ResourceSpecifier::Topic(&self.fixture.topic);
        let limit = AlterConfig::new(resource).set("max.message.bytes", bytes);
        let options = AdminOptions::new().request_timeout(Some(Duration::from_millis(500)));
        let _ = admin(&self.fixture).alter_configs(&[limit], &options).await;
    }

    async fn heal(&mut self) {
        self.world.heal();
        if self.schedule.is_poisoned {
            self.limit(LARGE).await;
        }
        self.history.postgres_hears(true);
        self.wake();
        self.fixture.reconnect().await;
    }

    async fn judge(mut self) -> Outcome {
        let mode = self.schedule.mode;
        let end = mode.end(&self.fixture).await;
        for relay in &mut self.relays {
            listens(relay).await;
        }
        for relay in std::mem::take(&mut self.ending) {
            self.expect_end(relay).await;
        }
        let (mut progress, mut moved) = (None, Instant::now());
        let mut longest_recovery = Duration::ZERO;
        loop {
            let (is_there, reached) = mode.progress(&self.fixture, &end).await;
            if is_there {
                break;
            }
            let mut published = 0;
            for relay in &mut self.relays {
                assert!(relay.is_running(), "ended by itself:\n{}", relay.log());
                published += relay.published(&self.fixture.topic);
            }
            // While a gap is read, the slot is not.
            let now = Some((reached, published));
            if progress != now {
                progress = now;
                moved = Instant::now();
            }
            longest_recovery = longest_recovery.max(moved.elapsed());
            assert!(
                moved.elapsed() < STALL_MAX,
                "nothing moved for {STALL_MAX:?}:\n{}",
                self.relays.iter().map(Relay::log).collect::<String>()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // Brokers that have much to do may take longer to create a topic than the stream waits.
        if mode.can_park() {
            let waiting = "SELECT string_agg((to_jsonb(p) - 'message')::text, ', ') FROM ( \
                               SELECT * FROM postbox.parked WHERE status IN ('scheduled', 'waiting') LIMIT 10 \
                           ) AS p";
            let deadline = Instant::now() + PATIENCE;
            loop {
                if self.schedule.is_poisoned {
                    self.limit(LARGE).await;
                }
                let row = self.fixture.client.query_one(waiting, &[]).await.unwrap();
                let Some(left) = row.get::<_, Option<String>>(0) else {
                    break;
                };
                let relays = self.relays.iter().map(Relay::log).collect::<String>();
                assert!(Instant::now() < deadline, "still parked: {left}\n{relays}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        // Before an orderly end, which might mark what is left.
        let unmarked = mode.unmarked(&self.fixture).await;
        self.stop_all().await;
        let ledger = self.fixture.ledger().await;
        let records = self.fixture.records().await;
        let mut times: Vec<i64> = records.iter().map(|seen| seen.timestamp_millis).collect();
        times.sort_unstable();
        let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
        let stall = gaps.max().unwrap_or(0).unsigned_abs();
        Outcome {
            mode,
            verdict: oracle::judge(&ledger, &records),
            unmarked,
            // What is refused ends attempts, as often as it comes, and each may repeat.
            stretches: match self.schedule.is_poisoned {
                true => Vec::new(),
                false => self.history.stretches(&self.schedule, &records),
            },
            longest_stall: Duration::from_millis(stall),
            longest_recovery,
        }
    }

    /// Everything is delivered: as many are ready as may be at work, and end well.
    async fn stop_all(&mut self) {
        let at_work = self.relays.len().min(self.schedule.at_work_max as usize);
        wait_until("relays are ready", async || {
            let relays = self.relays.iter();
            let ready = relays.filter(|relay| relay.get("/readyz").0 == 200);
            ready.count() >= at_work
        })
        .await;
        for mut relay in std::mem::take(&mut self.relays) {
            let is_ready = relay.get("/readyz").0 == 200;
            relay.signal("TERM");
            let code = relay.exit_code().await;
            // One that stands by cannot know that the other confirmed what it left.
            let is_true = code == 0 || (code == 9 && !is_ready);
            assert!(is_true, "exit code {code}:\n{}", relay.log());
            self.ended(&relay, End::ToldLate(code));
        }
        let claimed = self.schedule.mode.claimed(&self.fixture).await;
        assert_eq!(claimed, 0, "claims are left");
    }
}

/// One that was only just started does not yet answer, nor listen to signals.
async fn listens(relay: &mut Relay) {
    relay.wait_for_log("serving http").await;
}
