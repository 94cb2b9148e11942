//! Half an hour at half of what this machine can write and carry at once: nothing may
//! grow.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::carrier::{Carrier, Running, Table, Way};
use crate::cost::{self, Meter};
use crate::report;
use crate::rig::{self, PATIENCE, Rig};
use crate::runs::{Run, Runs};

const WRITERS: usize = 2;
const ROWS_PER_TRANSACTION: i64 = 100;

/// How long the writers write as fast as they can.
const FLAT_OUT: Duration = Duration::from_secs(20);

const SAMPLE: Duration = Duration::from_secs(5);

/// Minutes at either end that are held against each other.
const COMPARED: usize = 5;

pub(crate) async fn run(rig: &mut Rig, runs: &mut Runs, minutes: u32) {
    let carrier = Carrier::Postbox(Way::Socket);
    let topic = rig.prepare(carrier).await;
    let most = flat_out(rig, carrier, &topic).await;
    let mut run = Run::new("soak", "as fast as it goes", carrier.name(), 0);
    run.set("events_per_second", most);
    runs.add(&run);

    // Another process: what the first has kept would hide what this one gathers.
    let mut running = rig.launch(carrier, &topic).await;
    let load = format!("{:.0} events/s", most / 2.0);
    let before = rig.records(&topic);
    let writers = Writers::start(rig, &topic, most / 2.0).await;
    let mut peaks = Vec::new();
    for minute in 1..=minutes {
        // What is carried is not needed, and half an hour of it would fill a disk.
        let truncate = "TRUNCATE postbox.outbox";
        rig.client.batch_execute(truncate).await.unwrap();
        let walsender = rig.walsender(carrier).await;
        let meter = Meter::start(rig, running.program.pid(), walsender);
        let (began, already) = (Instant::now(), rig.records(&topic));
        let (mut memory, mut behind, mut kept) = (0.0_f64, 0.0_f64, 0.0_f64);
        while began.elapsed() < Duration::from_secs(60) {
            tokio::time::sleep(SAMPLE).await;
            running.program.check();
            // In this order: what is written in between counts as behind.
            let carried = rig.records(&topic) - before;
            behind = behind.max((writers.written() - carried) as f64);
            memory = memory.max(cost::memory_mb(running.program.pid(), "VmRSS").unwrap());
            let sql = "SELECT (pg_current_wal_lsn() - confirmed_flush_lsn)::float8 \
                       FROM pg_replication_slots WHERE slot_name = 'postbox'";
            kept = kept.max(rig.client.query_one(sql, &[]).await.unwrap().get(0));
        }
        let (events, seconds) = ((rig.records(&topic) - already) as f64, began.elapsed());
        let mut run = Run::new("soak", &load, carrier.name(), minute);
        meter.finish(&mut run, events, seconds.as_secs_f64());
        run.set("events_per_second", events / seconds.as_secs_f64());
        run.set("memory_mb", memory);
        run.set("events_behind", behind);
        run.set("wal_behind_mb", kept / 1e6);
        runs.add(&run);
        peaks.push((memory, behind));
    }
    let written = writers.stop().await;
    wait_for(rig, &mut running.program, &topic, before + written).await;
    running.program.stop().await;
    assert_eq!(rig.records(&topic) - before, written);
    look_for_growth(&peaks);
}

/// Events a second that are carried while two sessions write as fast as they can.
async fn flat_out(rig: &mut Rig, carrier: Carrier, topic: &str) -> f64 {
    let mut running = rig.launch(carrier, topic).await;
    let before = rig.records(topic);
    let began = Instant::now();
    let writers = Writers::start(rig, topic, f64::INFINITY).await;
    tokio::time::sleep(FLAT_OUT).await;
    let carried = rig.records(topic) - before;
    let most = carried as f64 / began.elapsed().as_secs_f64();
    let written = writers.stop().await;
    wait_for(rig, &mut running.program, topic, before + written).await;
    running.program.stop().await;
    most
}

async fn wait_for(rig: &Rig, program: &mut Running, topic: &str, records: i64) {
    let began = Instant::now();
    while rig.records(topic) < records {
        program.check();
        assert!(began.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Fails if the last minutes took more than the first, by more than the machine's noise.
fn look_for_growth(peaks: &[(f64, f64)]) {
    let compared = COMPARED.min(peaks.len() / 2);
    if compared == 0 {
        eprintln!("too short to tell whether it grows");
        return;
    }
    let (first, last) = (&peaks[..compared], &peaks[peaks.len() - compared..]);
    let of = |peaks: &[(f64, f64)], figure: fn(&(f64, f64)) -> f64| {
        report::median(peaks.iter().map(figure).collect()).unwrap_or(0.0)
    };
    let (memory, behind) = (|peak: &(f64, f64)| peak.0, |peak: &(f64, f64)| peak.1);
    let (from, to) = (of(first, memory), of(last, memory));
    assert!(to < from * 1.1 + 1.0, "memory grew from {from} to {to} MB");
    let (from, to) = (of(first, behind), of(last, behind));
    assert!(
        to < from * 2.0 + 1_000.0,
        "events behind grew from {from} to {to}"
    );
}

struct Writers {
    tasks: JoinSet<()>,
    written: Arc<AtomicI64>,
    stop: Arc<AtomicBool>,
}

impl Writers {
    /// Sessions that write at this rate together.
    async fn start(rig: &Rig, topic: &str, rate: f64) -> Self {
        let written = Arc::<AtomicI64>::default();
        let stop = Arc::<AtomicBool>::default();
        let mut tasks = JoinSet::new();
        let insert = format!("SELECT {}($1, $2, $3)", Table::Postbox.insert());
        let mut sessions = Vec::new();
        for _ in 0..WRITERS {
            let client = rig::connect(&rig.postgres.socket_url()).await;
            let insert = client.prepare(&insert).await.unwrap();
            sessions.push((client, insert));
        }
        let began = tokio::time::Instant::now();
        for (client, insert) in sessions {
            let (written, stop) = (Arc::clone(&written), Arc::clone(&stop));
            let topic = topic.to_owned();
            tasks.spawn(async move {
                let mut mine = 0;
                while !stop.load(Ordering::Relaxed) {
                    let due = (mine * WRITERS as i64) as f64 / rate;
                    tokio::time::sleep_until(began + Duration::from_secs_f64(due)).await;
                    let last = mine + ROWS_PER_TRANSACTION - 1;
                    client
                        .execute(&insert, &[&topic, &mine, &last])
                        .await
                        .unwrap();
                    mine += ROWS_PER_TRANSACTION;
                    written.fetch_add(ROWS_PER_TRANSACTION, Ordering::Relaxed);
                }
            });
        }
        Self {
            tasks,
            written,
            stop,
        }
    }

    fn written(&self) -> i64 {
        self.written.load(Ordering::Relaxed)
    }

    /// How many rows were written.
    async fn stop(mut self) -> i64 {
        self.stop.store(true, Ordering::Relaxed);
        while let Some(done) = self.tasks.join_next().await {
            done.unwrap();
        }
        self.written()
    }
}
