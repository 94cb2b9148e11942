//! How fast a backlog goes out, and what an event costs then.
//!
//! The clock runs from the first record in the topic to the last, by the broker's high
//! watermarks; what was there when the first was seen does not count. For a reader that
//! writes nothing, it runs from when its slot is active until it ends.

use std::time::{Duration, Instant};

use crate::carrier::Carrier;
use crate::cost::{self, Meter, Part};
use crate::rig::{Backlog, PATIENCE, Rig};
use crate::runs::Run;

/// How often the topic's end is asked for.
const LOOK: Duration = Duration::from_millis(20);

pub(crate) async fn run(rig: &mut Rig, carrier: Carrier, backlog: &Backlog, trial: u32) -> Run {
    rig.begin_at(carrier, backlog).await;
    let folder = tempfile::tempdir_in(&rig.scratch).unwrap();
    let load = match backlog.rows_per_transaction {
        1 => "1 row a transaction".to_owned(),
        rows => format!("{rows} rows a transaction"),
    };
    let mut run = Run::new("drain", &load, carrier.name(), trial);
    let before = rig.records(&backlog.topic);
    let mut running = carrier.start(rig, &backlog.topic, folder.path(), Some(&backlog.end));
    let parts = [(Part::Relay, running.pid())];
    if let Carrier::PgRecvlogical(_) = carrier {
        let walsender = loop {
            if let Some(pid) = rig.walsender("reader").await {
                break pid;
            }
            running.check();
            tokio::time::sleep(Duration::from_millis(1)).await;
        };
        let began = Instant::now();
        let mut meter = Meter::start(parts.into_iter().chain([(Part::Walsender, walsender)]));
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
        run.set("events_per_second", rows / seconds);
        run.set("peak_mb", peak.unwrap());
        run.set_costs(&meter, rows, seconds);
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
    let walsender = match carrier.slot() {
        Some(slot) => rig.walsender(slot).await.map(|pid| (Part::Walsender, pid)),
        None => None,
    };
    let broker = (Part::Broker, rig.kafka.fact("pid").parse().unwrap());
    let mut meter = Meter::start(parts.into_iter().chain(walsender).chain([broker]));
    let mut half = None;
    let mut seen = first;
    while seen < backlog.rows {
        running.check();
        assert!(launched.elapsed() < PATIENCE, "{seen} of {}", backlog.rows);
        tokio::time::sleep(LOOK).await;
        seen = records();
        if seen >= backlog.rows / 2 && half.is_none() {
            half = Some((seen, Instant::now()));
        }
    }
    meter.look();
    let (events, seconds) = ((seen - first) as f64, began.elapsed().as_secs_f64());
    run.set("first_record_ms", (began - launched).as_secs_f64() * 1e3);
    run.set("events_per_second", events / seconds);
    if let Some((at_half, since)) = half {
        let rate = (seen - at_half) as f64 / since.elapsed().as_secs_f64();
        run.set("second_half_per_second", rate);
    }
    run.set("peak_mb", cost::memory_mb(running.pid(), "VmHWM").unwrap());
    run.set_costs(&meter, events, seconds);
    running.stop().await;
    assert_eq!(records(), backlog.rows, "records of {}", carrier.name());
    rig.empty(&backlog.topic).await;
    run
}
