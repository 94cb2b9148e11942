//! At rest: from start to the first delivery, and what it costs to have nothing to do.

use std::time::{Duration, Instant};

use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};

use crate::carrier::Carrier;
use crate::cost::{self, Meter, Part};
use crate::latency;
use crate::rig::{PATIENCE, Rig};
use crate::runs::Run;

/// From the start of the process until the record of an event that waits is in Kafka.
pub(crate) async fn first_delivery(rig: &mut Rig, carrier: Carrier, trial: u32) -> Run {
    let topic = rig.prepare(carrier).await;
    rig.begin(carrier).await;
    let insert = format!("SELECT {}($1, 1, 1)", carrier.table().insert());
    rig.client.execute(&insert, &[&topic]).await.unwrap();
    let folder = tempfile::tempdir_in(&rig.scratch).unwrap();
    let mut running = carrier.start(rig, &topic, folder.path(), None);
    while rig.records(&topic) == 0 {
        running.check();
        assert!(running.began.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let mut run = Run::new("start", "1 event waits", carrier.name(), trial);
    run.set(
        "first_record_ms",
        running.began.elapsed().as_secs_f64() * 1e3,
    );
    running.stop().await;
    run
}

/// The same for a producer, from when it is made: it must be given an id first.
pub(crate) async fn first_delivery_of_a_bare_producer(rig: &mut Rig, trial: u32) -> Run {
    let carrier = Carrier::BareProducer;
    let topic = rig.prepare(carrier).await;
    let began = Instant::now();
    let producer: BaseProducer = latency::settings_of_a_producer(rig).create().unwrap();
    let record = BaseRecord::to(&topic).key("k1").payload("{}");
    producer.send(record).map_err(|(error, _)| error).unwrap();
    // A flush would look for its end ten times a second only.
    while producer.in_flight_count() > 0 {
        producer.poll(Duration::from_millis(1));
        assert!(began.elapsed() < PATIENCE);
    }
    let mut run = Run::new("start", "1 event waits", carrier.name(), trial);
    run.set("first_record_ms", began.elapsed().as_secs_f64() * 1e3);
    run
}

/// After a start, before it is looked at.
const SETTLE: Duration = Duration::from_secs(5);
const LOOKED_AT: Duration = Duration::from_secs(20);

pub(crate) async fn idle(rig: &mut Rig, carrier: Carrier, trial: u32) -> Run {
    let topic = rig.prepare(carrier).await;
    rig.begin(carrier).await;
    let folder = tempfile::tempdir_in(&rig.scratch).unwrap();
    let mut running = carrier.start(rig, &topic, folder.path(), None);
    latency::wait_until_it_carries(rig, carrier, &mut running, &topic).await;
    tokio::time::sleep(SETTLE).await;
    let mut meter = Meter::start([(Part::Relay, running.pid())]);
    tokio::time::sleep(LOOKED_AT).await;
    meter.look();
    let mut run = Run::new("idle", "nothing is written", carrier.name(), trial);
    let used = meter.of(Part::Relay).unwrap();
    run.set(
        "cpu_percent_of_a_core",
        used * 100.0 / LOOKED_AT.as_secs_f64(),
    );
    run.set(
        "memory_mb",
        cost::memory_mb(running.pid(), "VmRSS").unwrap(),
    );
    running.stop().await;
    run
}
