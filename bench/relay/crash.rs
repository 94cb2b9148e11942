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
    let rows = usize::try_from(backlog.rows).unwrap();
    let listener = Listener::start(rig.consumer(&backlog.topic), rows);
    let mut running = carrier.start(rig, &backlog.topic, folder.path(), None);
    while (listener.heard() as f64) < rows as f64 * AT {
        running.check();
        assert!(running.began.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    running.kill();
    let killed = Instant::now();
    // What is on its way to the consumer is not news.
    let mut heard = usize::MAX;
    while heard != listener.heard() {
        heard = listener.heard();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    let mut running = carrier.start(rig, &backlog.topic, folder.path(), None);
    while listener.heard() == heard {
        running.check();
        assert!(killed.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut run = Run::new(
        "crash",
        "killed at 40 % of the backlog",
        carrier.name(),
        trial,
    );
    run.set("next_event_s", running.began.elapsed().as_secs_f64());
    // Panics if an event is lost.
    listener.wait_for(rows).await;
    run.set(
        "repeated",
        (rig.records(&backlog.topic) - before - backlog.rows) as f64,
    );
    listener.stop();
    running.stop().await;
    rig.empty(&backlog.topic).await;
    run
}
