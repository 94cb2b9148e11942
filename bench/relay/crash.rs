//! What a SIGKILL in the middle of a backlog repeats, and how long it holds events up.

use std::time::{Duration, Instant};

use crate::carrier::Carrier;
use crate::latency::Listener;
use crate::rig::{Backlog, PATIENCE, Rig};
use crate::runs::Run;

/// When it is killed, as a part of the backlog.
const AT: f64 = 0.4;

pub(crate) async fn run(rig: &mut Rig, carrier: Carrier, backlog: &Backlog, trial: u32) -> Run {
    rig.begin_at(carrier, backlog).await;
    let folder = tempfile::tempdir_in(&rig.scratch).unwrap();
    let before = rig.records(&backlog.topic);
    let records = || rig.records(&backlog.topic) - before;
    let rows = usize::try_from(backlog.rows).unwrap();
    let listener = Listener::start(rig.consumer(&backlog.topic), rows);
    let mut running = carrier.start(rig, folder.path(), None);
    while (records() as f64) < rows as f64 * AT {
        running.check();
        assert!(running.began.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    running.kill();
    let killed = Instant::now();
    let mut running = carrier.start(rig, folder.path(), None);
    // For the longest, nothing came that had not come before.
    let (mut longest, mut last_new, mut heard) = (Duration::ZERO, killed, listener.heard());
    while heard < rows {
        running.check();
        assert!(killed.elapsed() < PATIENCE, "{heard} of {rows} came");
        tokio::time::sleep(Duration::from_millis(5)).await;
        if listener.heard() > heard {
            heard = listener.heard();
            longest = longest.max(last_new.elapsed());
            last_new = Instant::now();
        }
    }
    running.stop().await;
    let mut run = Run::new("crash", &backlog.name(), carrier.name(), trial);
    run.set("repeated", (records() - backlog.rows) as f64);
    run.set("no_new_event_s", longest.as_secs_f64());
    listener.stop();
    rig.empty(&backlog.topic).await;
    run
}
