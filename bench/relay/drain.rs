//! How fast a backlog goes out, and what an event costs then.
//!
//! The clock runs from the first record in the topic to the last, by the ends of its
//! partitions; what was there when the first was seen does not count.

use std::time::{Duration, Instant};

use crate::carrier::{Carrier, Running};
use crate::cost::{self, Meter};
use crate::latency::Listener;
use crate::rig::{Backlog, PATIENCE, Rig};
use crate::runs::Run;

/// How often the topic's end is asked for.
const LOOK: Duration = Duration::from_millis(20);

/// A broker takes four times the CPU for the first events after its start, and twice as
/// much for those of a new topic until the first segments of its log have been deleted:
/// measured with backlogs of 500,000 rows, 4.0, 2.0 and then 1.0 µs for an event.
const WARM_UPS: u32 = 8;

pub(crate) async fn warm_up(rig: &mut Rig, carrier: Carrier, backlog: &Backlog) {
    for _ in 0..WARM_UPS {
        run(rig, carrier, backlog, 0).await;
    }
}

pub(crate) async fn run(rig: &mut Rig, carrier: Carrier, backlog: &Backlog, trial: u32) -> Run {
    rig.begin_at(carrier, backlog).await;
    let folder = tempfile::tempdir_in(&rig.scratch).unwrap();
    let mut run = Run::new("drain", &backlog.name(), carrier.name(), trial);
    let before = rig.records(&backlog.topic);
    let consumer = rig.consumer(&backlog.topic);
    let mut running = carrier.start(rig, folder.path(), Some(&backlog.end));
    if let Carrier::PgRecvlogical(_) = carrier {
        read_to_the_end(rig, carrier, running, backlog, &mut run).await;
        return run;
    }
    let records = || rig.records(&backlog.topic) - before;
    let launched = running.began;
    let first = loop {
        let first = records();
        if first > 0 {
            break first;
        }
        running.check();
        assert!(launched.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let began = Instant::now();
    let walsender = rig.walsender(carrier).await;
    let mut meter = Meter::start(rig, running.pid(), walsender);
    run.set("cpu_before_first_s", cost::cpu_seconds(running.pid()));
    let mut half = None;
    let mut seen = first;
    while seen < backlog.rows {
        running.check();
        assert!(launched.elapsed() < PATIENCE, "{seen} of {}", backlog.rows);
        tokio::time::sleep(LOOK).await;
        meter.look();
        seen = records();
        if seen >= backlog.rows / 2 && half.is_none() {
            half = Some((seen, Instant::now()));
        }
    }
    let (events, seconds) = ((seen - first) as f64, began.elapsed().as_secs_f64());
    meter.finish(&mut run, events, seconds);
    run.set("first_record_ms", (began - launched).as_secs_f64() * 1e3);
    run.set("events_per_second", events / seconds);
    if let Some((at_half, since)) = half {
        let rate = (seen - at_half) as f64 / since.elapsed().as_secs_f64();
        run.set("second_half_per_second", rate);
    }
    let peak = cost::memory_mb(running.pid(), "VmHWM").unwrap();
    run.set("peak_mb", peak);
    running.stop().await;
    assert_eq!(records(), backlog.rows, "records of {}", carrier.name());
    // As many as there are rows, and each of them: so each came once.
    let rows = usize::try_from(backlog.rows).unwrap();
    let listener = Listener::start(consumer, rows);
    listener.wait_for(rows).await;
    listener.stop();
    rig.empty(&backlog.topic).await;
    run
}

/// A reader that writes nothing: the clock runs from when its slot is active until it
/// ends.
async fn read_to_the_end(
    rig: &Rig,
    carrier: Carrier,
    mut running: Running,
    backlog: &Backlog,
    run: &mut Run,
) {
    let walsender = loop {
        if let Some(pid) = rig.walsender(carrier).await {
            break pid;
        }
        running.check();
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    let began = Instant::now();
    let mut meter = Meter::start(rig, running.pid(), Some(walsender));
    let mut peak = None;
    let status = loop {
        meter.look();
        peak = cost::memory_mb(running.pid(), "VmHWM").or(peak);
        if let Some(status) = running.ended() {
            break status;
        }
        assert!(began.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    if !status.success() {
        running.fail(&format!("ended with {status}"));
    }
    let (rows, seconds) = (backlog.rows as f64, began.elapsed().as_secs_f64());
    meter.finish(run, rows, seconds);
    run.set("events_per_second", rows / seconds);
    run.set("peak_mb", peak.unwrap());
}
