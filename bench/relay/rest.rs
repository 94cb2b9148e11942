//! At rest: from start to the first delivery, and what it costs to have nothing to do.

use std::time::Duration;

use crate::carrier::Carrier;
use crate::cost::{self, Meter};
use crate::rig::{PATIENCE, Rig};
use crate::runs::Run;

/// From the start of the process until the record of an event that waits is in Kafka.
pub(crate) async fn first_delivery(rig: &mut Rig, carrier: Carrier, trial: u32) -> Run {
    let topic = rig.prepare(carrier).await;
    rig.begin(carrier).await;
    let insert = format!("SELECT {}($1, 1, 1)", carrier.table().insert());
    rig.client.execute(&insert, &[&topic]).await.unwrap();
    let folder = tempfile::tempdir_in(&rig.scratch).unwrap();
    let mut running = carrier.start(rig, folder.path(), None);
    while rig.records(&topic) == 0 {
        running.check();
        assert!(running.began.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let mut run = Run::new("start", "1 event waits", carrier.name(), trial);
    let took = running.began.elapsed().as_secs_f64();
    run.set("first_record_ms", took * 1e3);
    run.set("cpu_before_first_s", cost::cpu_seconds(running.pid()));
    running.stop().await;
    rig.end(carrier, &topic).await;
    run
}

/// After a start, before it is looked at.
const SETTLE: Duration = Duration::from_secs(5);
const LOOKED_AT: Duration = Duration::from_secs(20);

pub(crate) async fn idle(rig: &mut Rig, carrier: Carrier, trial: u32) -> Run {
    let topic = rig.prepare(carrier).await;
    let running = rig.launch(carrier, &topic).await;
    tokio::time::sleep(SETTLE).await;
    let mut meter = Meter::start(rig, running.program.pid(), None);
    tokio::time::sleep(LOOKED_AT).await;
    let mut run = Run::new("idle", "nothing is written", carrier.name(), trial);
    let used = meter.relay_seconds() * 100.0 / LOOKED_AT.as_secs_f64();
    run.set("cpu_percent_of_a_core", used);
    let memory = cost::memory_mb(running.program.pid(), "VmRSS").unwrap();
    run.set("memory_mb", memory);
    running.program.stop().await;
    rig.end(carrier, &topic).await;
    run
}
