//! One run: writers write, harm is done, and the oracle judges.

use std::time::{Duration, Instant};

use postbox::oracle::{self, Load, Seen, Verdict};
use postbox::timestamp::Timestamp;

use super::schedule::{Action, Schedule, Side};
use super::world::World;
use crate::support::{Fixture, LATE, Relay, STATUS_INTERVAL, STORE_INTERVAL, wait_until};

/// What a run has shown.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) verdict: Verdict,
    /// Every time a relay began to stream.
    pub(super) restarts: Vec<Restart>,
    /// The longest time in which nothing reached Kafka, harm included.
    pub(super) longest_stall: Duration,
    /// The longest time in which nothing moved once all harm was over.
    pub(super) longest_recovery: Duration,
}

/// A relay began to stream, and repeated what was delivered and not known to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Restart {
    pub(super) cause: Cause,
    pub(super) repeated: usize,
    /// How many records it may have repeated.
    pub(super) bound: usize,
}

/// What a restart goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cause {
    /// The first start, or one after orderly ends only: nothing is left to repeat, even
    /// if the server has crashed.
    Clean,
    /// From the slot's position, which the server remembers. It may repeat what
    /// was in flight, the transaction that was being read, and what was delivered
    /// since the last status message.
    Relay,
    /// From the checkpoint's position, after a crash of the server, which is up to
    /// a second older.
    Postgres,
    /// From the checkpoint's snapshot: all since a fence, as many rows as the recovery
    /// has counted.
    Slot,
}

/// Rows of a gap after which the relay stores how far it is.
const MARK_ROWS: usize = 1024;

/// How long nothing may move once all harm is over. How long it then takes to confirm
/// everything depends on the machine: a window of 20 events has few in each batch.
const STALL_MAX: Duration = Duration::from_secs(60);

/// How long a relay that is told to stop is waited for before the next one starts.
const END_MAX: Duration = Duration::from_secs(1);

impl Outcome {
    pub(super) fn is_over_bound(&self) -> bool {
        let mut restarts = self.restarts.iter();
        restarts.any(|restart| restart.repeated > restart.bound)
    }
}

/// A relay began to stream.
#[derive(Debug, Clone, Copy)]
struct Start {
    /// In milliseconds since 1970.
    at: i64,
    /// Whether it had to read first, from the table, what a slot had lost.
    has_gap: bool,
    /// When the relay said, by its exit code, that all it had ever sent was confirmed.
    ended_well_at: Option<i64>,
}

struct Run<'w> {
    world: &'w mut World,
    fixture: Fixture,
    schedule: Schedule,
    relays: Vec<Relay>,
    /// Those that were told to stop, and wait for what is away.
    ending: Vec<Relay>,
    /// When relays that ended had begun to stream.
    starts: Vec<Start>,
    frozen: Option<u32>,
    /// What takes the slot's position away, and when, in milliseconds since 1970.
    losses: Vec<(i64, Cause)>,
    /// When recoveries ended, and how many rows they left to be sent.
    recoveries: Vec<(i64, usize)>,
}

/// Runs the schedule of this seed.
pub(super) async fn run(world: &mut World, seed: u64) -> Outcome {
    world.heal();
    let fixture = world.fixture().await;
    let schedule = Schedule::draw(seed, fixture.load());
    let mut run = Run {
        world,
        fixture,
        schedule,
        relays: Vec::new(),
        ending: Vec::new(),
        starts: Vec::new(),
        frozen: None,
        losses: Vec::new(),
        recoveries: Vec::new(),
    };
    run.start_relay();
    run.relays[0].wait_for_log("streaming").await;
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
        let flags = [
            "--database-url",
            &url,
            "--in-flight-max",
            &in_flight_max,
            "--wal-sender-timeout",
            "2s",
            "--heartbeat-interval",
            "1s",
        ];
        self.relays.push(Relay::start(&self.fixture, &flags));
    }

    async fn apply(&mut self, action: Action) {
        match action {
            Action::KillRelay => {
                self.kill_relay();
                self.start_relay();
            }
            Action::KillOneOfTwo => {
                self.kill_relay();
                if self.relays.is_empty() {
                    self.start_relay();
                }
            }
            Action::EndRelay => {
                self.end_relay().await;
                self.start_relay();
            }
            Action::FreezeRelay => self.freeze(),
            Action::WakeRelay => self.wake(),
            Action::SecondRelay => {
                if self.relays.len() < 2 {
                    self.start_relay();
                }
            }
            Action::TerminateWalsender => self.terminate_walsender().await,
            Action::StopPostgres(how) => {
                if how != "fast" {
                    self.losses.push((now(), Cause::Postgres));
                }
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
        }
        for relay in &mut self.relays {
            assert!(relay.is_running(), "ended by itself:\n{}", relay.log());
        }
    }

    fn kill_relay(&mut self) {
        let relay = self.relays.remove(0);
        self.frozen.take_if(|pid| *pid == relay.pid());
        self.ended(&relay, None);
        relay.kill();
    }

    fn ended(&mut self, relay: &Relay, code: Option<i32>) {
        let mut starts = starts(&relay.log());
        for start in &mut starts {
            start.ended_well_at = (code == Some(0)).then(now);
        }
        self.starts.extend(starts);
    }

    /// SIGTERM. It may take as long as what it waits for is away: the next relay then
    /// stands by.
    async fn end_relay(&mut self) {
        self.wake();
        let mut relay = self.relays.remove(0);
        listens(&mut relay).await;
        relay.signal("TERM");
        match tokio::time::timeout(END_MAX, relay.exit_code()).await {
            Ok(code) => {
                assert!([0, 9].contains(&code), "{code}:\n{}", relay.log());
                self.ended(&relay, Some(code));
            }
            Err(_) => self.ending.push(relay),
        }
    }

    /// Of a relay that was told to stop.
    async fn expect_end(&mut self, mut relay: Relay) {
        let code = relay.exit_code().await;
        assert!([0, 9].contains(&code), "{code}:\n{}", relay.log());
        // The next may have started while it was still at work.
        self.ended(&relay, None);
    }

    fn freeze(&mut self) {
        if self.frozen.is_none() {
            self.relays[0].signal("STOP");
            self.frozen = Some(self.relays[0].pid());
        }
    }

    fn wake(&mut self) {
        let frozen = self.frozen.take();
        for relay in &self.relays {
            if Some(relay.pid()) == frozen {
                relay.signal("CONT");
            }
        }
    }

    async fn lose_slot(&mut self) {
        if !self.world.postgres_runs() {
            return;
        }
        while !self.relays.is_empty() {
            self.kill_relay();
        }
        for mut relay in std::mem::take(&mut self.ending) {
            if relay.is_running() {
                self.ended(&relay, None);
                relay.kill();
            } else {
                self.expect_end(relay).await;
            }
        }
        // Else a walsender may wait for what a stalled network does not pass.
        self.world.proxy(Side::Postgres).cut();
        self.fixture.reconnect().await;
        self.fixture.drop_slot().await;
        self.losses.push((now(), Cause::Slot));
        let recovery = self.fixture.recover(&[]);
        self.recoveries
            .push((now(), rows_missed(recovery.results())));
        self.start_relay();
    }

    async fn terminate_walsender(&mut self) {
        if !self.world.postgres_runs() {
            return;
        }
        self.fixture.reconnect().await;
        self.fixture.terminate_walsender().await;
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

    async fn heal(&mut self) {
        self.world.heal();
        self.wake();
        self.fixture.reconnect().await;
    }

    async fn judge(mut self) -> Outcome {
        let end = self.fixture.wal_end().await;
        for relay in &mut self.relays {
            listens(relay).await;
        }
        for relay in std::mem::take(&mut self.ending) {
            self.expect_end(relay).await;
        }
        let (mut progress, mut moved) = (None, Instant::now());
        let mut longest_recovery = Duration::ZERO;
        loop {
            let confirmed = self.fixture.confirmed().await;
            if confirmed >= end {
                break;
            }
            let mut published = 0;
            for relay in &mut self.relays {
                assert!(relay.is_running(), "ended by itself:\n{}", relay.log());
                published += relay.published(&self.fixture.topic);
            }
            // While a gap is read, the slot is not.
            if progress.replace((confirmed, published)) != Some((confirmed, published)) {
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
        wait_until("a relay is ready", async || {
            self.relays
                .iter()
                .any(|relay| relay.get("/readyz").0 == 200)
        })
        .await;
        for mut relay in std::mem::take(&mut self.relays) {
            self.ended(&relay, None);
            let is_ready = relay.get("/readyz").0 == 200;
            relay.signal("TERM");
            let code = relay.exit_code().await;
            // One that stands by cannot know that the other confirmed what it left.
            let is_true = code == 0 || (code == 9 && !is_ready);
            assert!(is_true, "exit code {code}:\n{}", relay.log());
        }
        let ledger = self.fixture.ledger().await;
        let records = self.fixture.records().await;
        self.starts.sort_unstable_by_key(|start| start.at);
        let restarts = self.restarts(&records);
        let mut times: Vec<i64> = records.iter().map(|seen| seen.timestamp_millis).collect();
        times.sort_unstable();
        let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
        let stall = gaps.max().unwrap_or(0).unsigned_abs();
        Outcome {
            verdict: oracle::judge(&ledger, &records),
            restarts,
            longest_stall: Duration::from_millis(stall),
            longest_recovery,
        }
    }

    /// What was repeated after each start, and how much might have been.
    fn restarts(&self, records: &[Seen]) -> Vec<Restart> {
        let mut in_order: Vec<&Seen> = records.iter().collect();
        in_order.sort_by_key(|record| record.timestamp_millis);
        // How many records there were before this time.
        let before = |millis: i64| in_order.partition_point(|seen| seen.timestamp_millis < millis);
        let mut seen = std::collections::HashSet::new();
        let mut is_repeated: Vec<bool> = Vec::with_capacity(in_order.len());
        for record in &in_order {
            is_repeated.push(!seen.insert(record.id));
        }
        let transaction = self.schedule.transaction_max();
        let mut restarts = Vec::with_capacity(self.starts.len());
        for (index, start) in self.starts.iter().enumerate() {
            let earlier = &self.starts[..index];
            let end = self.starts.get(index + 1);
            let first = before(start.at);
            let last = end.map_or(records.len(), |end| before(end.at));
            let repeated = is_repeated[first..last].iter().filter(|is| **is).count();
            let newest = first.checked_sub(1);
            let newest = newest.map_or(0, |at| in_order[at].timestamp_millis);
            let cause = self.cause(earlier, start.at);
            let marked = match earlier.last() {
                Some(previous) if previous.has_gap => MARK_ROWS,
                _ => 0,
            };
            let since = |time: Duration| {
                let delivered = first - before(newest - millis(time));
                delivered + self.schedule.in_flight_max + transaction + marked
            };
            let bound = match cause {
                Cause::Clean => 0,
                Cause::Relay => since(STATUS_INTERVAL + LATE),
                Cause::Postgres => since(STORE_INTERVAL + 2 * LATE),
                Cause::Slot => {
                    let mut recoveries = self.recoveries.iter().rev();
                    let last = recoveries.find(|(at, _)| *at <= start.at);
                    last.expect("a recovery").1
                }
            };
            restarts.push(Restart {
                cause,
                repeated,
                bound,
            });
        }
        restarts
    }

    /// What a start at this time goes on from, after these.
    fn cause(&self, earlier: &[Start], at: i64) -> Cause {
        let lost_since = |since: i64| {
            let losses = self.losses.iter();
            let between = losses.filter(move |(lost_at, _)| (since..at).contains(lost_at));
            between.map(|(_, cause)| *cause).max()
        };
        let previous = earlier.last().map_or(0, |start| start.at);
        let lost = lost_since(previous);
        let mut ends = earlier.iter().map(|start| start.ended_well_at);
        if ends.all(|end| end.is_some_and(|end| end <= at)) && lost != Some(Cause::Slot) {
            return Cause::Clean;
        }
        lost.unwrap_or(Cause::Relay)
    }
}

/// How many rows a recovery has found that were committed since the last fence.
fn rows_missed(report: &str) -> usize {
    let (_, rows) = report
        .split_once("rows committed since the last checkpoint: ")
        .unwrap_or_else(|| panic!("{report}"));
    let end = rows.find(|c: char| !c.is_ascii_digit());
    rows[..end.unwrap_or(rows.len())].parse().unwrap()
}

/// One that was only just started does not yet answer, nor listen to signals.
async fn listens(relay: &mut Relay) {
    relay.wait_for_log("serving").await;
}

fn millis(duration: Duration) -> i64 {
    duration.as_millis() as i64
}

fn now() -> i64 {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    millis(since_epoch.unwrap())
}

/// When the relay of this log began to stream. How it ended is not in it.
fn starts(log: &str) -> Vec<Start> {
    let mut has_gap = false;
    let mut starts = Vec::new();
    for line in log.lines() {
        has_gap |= line.contains(" what the slot had lost is sent first");
        if line.contains(" INFO streaming ") {
            let time = line.split_whitespace().next().unwrap_or_default();
            let time = time.replace('T', " ").replace('Z', "+00");
            starts.push(Start {
                at: Timestamp::parse(&time).unwrap().unix_millis(),
                has_gap: std::mem::take(&mut has_gap),
                ended_well_at: None,
            });
        }
    }
    starts
}
