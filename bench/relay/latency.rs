//! From the return of COMMIT to a polling consumer, on one clock.
//!
//! For the bare producer, from the call that sends: what a broker on this machine costs
//! whoever uses it. An event that the consumer has before COMMIT has returned counts
//! as zero.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::Message as _;
use rdkafka::consumer::BaseConsumer;
use rdkafka::producer::{BaseRecord, DefaultProducerContext, Producer as _, ThreadedProducer};
use tokio::task::JoinSet;

use crate::carrier::{Carrier, Running};
use crate::cost::{Meter, Part};
use crate::rig::{PATIENCE, Rig};
use crate::runs::Run;

/// At the rate that is measured, before it is measured.
const WARM_UP: Duration = Duration::from_secs(4);
const MEASURED: Duration = Duration::from_secs(15);

/// Sessions that write, so that a COMMIT does not wait for the one before.
const WRITERS: usize = 8;

/// Above this rate, events are written by tens: with 1,000 commits a second, the disk
/// is not what is measured.
const COMMITS_MAX: usize = 1_000;

pub(crate) async fn run(rig: &mut Rig, carrier: Carrier, rate: usize, trial: u32) -> Run {
    let topic = rig.prepare(carrier).await;
    rig.begin(carrier).await;
    let folder = tempfile::tempdir_in(&rig.scratch).unwrap();
    let events = rate * (WARM_UP + MEASURED).as_secs() as usize;
    let listener = Listener::start(rig.consumer(&topic), events);
    let mut meter = Meter::start([]);
    let began;
    let sent = if let Carrier::BareProducer = carrier {
        let producer = settings_of_a_producer(rig).create().unwrap();
        let topic = topic.clone();
        began = Instant::now();
        let sending = move || send(&producer, &topic, rate, events);
        tokio::task::spawn_blocking(sending).await.unwrap()
    } else {
        let mut running = carrier.start(rig, &topic, folder.path(), None);
        wait_until_it_carries(rig, carrier, &mut running, &topic).await;
        let broker = rig.kafka.fact("pid").parse().unwrap();
        meter = Meter::start([(Part::Relay, running.pid()), (Part::Broker, broker)]);
        began = Instant::now();
        let sent = write(rig, carrier, &topic, rate, events).await;
        listener.wait_for(events).await;
        meter.look();
        running.stop().await;
        sent
    };
    let seconds = began.elapsed().as_secs_f64();
    listener.wait_for(events).await;
    let arrived = listener.stop();
    let warm_up = rate * WARM_UP.as_secs() as usize;
    let mut latencies: Vec<f64> = (warm_up..events)
        .map(|n| {
            let (sent, arrived) = (sent[n].unwrap(), arrived[n].unwrap());
            arrived.saturating_duration_since(sent).as_secs_f64() * 1e3
        })
        .collect();
    latencies.sort_by(f64::total_cmp);
    let quantile = |part: f64| latencies[((latencies.len() - 1) as f64 * part) as usize];
    let mut run = Run::new(
        "latency",
        &format!("{rate} events/s"),
        carrier.name(),
        trial,
    );
    for (figure, part) in [
        ("p50_ms", 0.5),
        ("p90_ms", 0.9),
        ("p99_ms", 0.99),
        ("max_ms", 1.0),
    ] {
        run.set(figure, quantile(part));
    }
    run.set_costs(&meter, events as f64, seconds);
    run
}

/// Writes one event after the other until one has come through.
pub(crate) async fn wait_until_it_carries(
    rig: &Rig,
    carrier: Carrier,
    running: &mut Running,
    topic: &str,
) {
    let before = rig.records(topic);
    // A number that no event has which is measured.
    let insert = format!("SELECT {}($1, -1, -1)", carrier.table().insert());
    rig.client.execute(&insert, &[&topic]).await.unwrap();
    while rig.records(topic) == before {
        running.check();
        assert!(running.began.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Writes events at a steady rate; when the COMMIT of each returned.
async fn write(
    rig: &Rig,
    carrier: Carrier,
    topic: &str,
    rate: usize,
    events: usize,
) -> Vec<Option<Instant>> {
    let size = (rate / COMMITS_MAX).max(1);
    let insert = format!("SELECT {}($1, $2, $3)", carrier.table().insert());
    let began = tokio::time::Instant::now();
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let client = rig.connect().await;
        let insert = client.prepare(&insert).await.unwrap();
        let topic = topic.to_owned();
        writers.spawn(async move {
            let mut committed = Vec::new();
            for first in (writer * size..events).step_by(WRITERS * size) {
                let due = Duration::from_secs_f64(first as f64 / rate as f64);
                tokio::time::sleep_until(began + due).await;
                let last = (first + size).min(events) - 1;
                let (from, to) = (first as i64, last as i64);
                client
                    .execute(&insert, &[&topic, &from, &to])
                    .await
                    .unwrap();
                let now = Instant::now();
                committed.extend((first..=last).map(|n| (n, now)));
            }
            committed
        });
    }
    let mut sent = vec![None; events];
    while let Some(committed) = writers.join_next().await {
        for (n, at) in committed.unwrap() {
            sent[n] = Some(at);
        }
    }
    let (took, due) = (began.elapsed().as_secs_f64(), events as f64 / rate as f64);
    assert!(
        took < due * 1.05,
        "{rate} events/s took {took:.1} s, not {due:.1} s to write"
    );
    sent
}

/// As postbox sends, but at once.
pub(crate) fn settings_of_a_producer(rig: &Rig) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", rig.brokers())
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("compression.codec", "lz4")
        .set("linger.ms", "0");
    config
}

fn send(
    producer: &ThreadedProducer<DefaultProducerContext>,
    topic: &str,
    rate: usize,
    events: usize,
) -> Vec<Option<Instant>> {
    let filler = "x".repeat(400);
    let began = Instant::now();
    let mut sent = Vec::with_capacity(events);
    for n in 0..events {
        let due = Duration::from_secs_f64(n as f64 / rate as f64);
        std::thread::sleep(due.saturating_sub(began.elapsed()));
        let (key, value) = (
            n.to_string(),
            format!("{{\"n\": {n}, \"note\": \"{filler}\"}}"),
        );
        sent.push(Some(Instant::now()));
        let record = BaseRecord::to(topic).key(&key).payload(&value);
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }
    producer.flush(PATIENCE).unwrap();
    sent
}

/// A thread that polls, and notes when each event came first.
pub(crate) struct Listener {
    stop: Arc<AtomicBool>,
    heard: Arc<AtomicUsize>,
    thread: JoinHandle<Vec<Option<Instant>>>,
}

impl Listener {
    pub(crate) fn start(consumer: BaseConsumer, events: usize) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let heard = Arc::<AtomicUsize>::default();
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&heard));
        let thread = std::thread::spawn(move || {
            let mut arrived = vec![None; events];
            while !stopped.load(Ordering::Relaxed) {
                let Some(message) = consumer.poll(Duration::from_millis(50)) else {
                    continue;
                };
                let now = Instant::now();
                let message = message.unwrap();
                let n = number(message.payload().unwrap());
                let Some(slot) = n.and_then(|n| arrived.get_mut(n)) else {
                    continue;
                };
                if slot.is_none() {
                    *slot = Some(now);
                    count.fetch_add(1, Ordering::Relaxed);
                }
            }
            arrived
        });
        Self {
            stop,
            heard,
            thread,
        }
    }

    /// How many of the events have come.
    pub(crate) fn heard(&self) -> usize {
        self.heard.load(Ordering::Relaxed)
    }

    pub(crate) async fn wait_for(&self, events: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.heard() < events {
            assert!(
                Instant::now() < deadline,
                "{} of {events} came",
                self.heard()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) fn stop(self) -> Vec<Option<Instant>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// What stands behind `"n":` in a record, whatever is around it.
fn number(record: &[u8]) -> Option<usize> {
    let name = b"\"n\":";
    let at = record.windows(name.len()).position(|bytes| bytes == name)?;
    let digits = record[at + name.len()..].trim_ascii_start();
    let end = digits.iter().position(|byte| !byte.is_ascii_digit())?;
    std::str::from_utf8(&digits[..end]).ok()?.parse().ok()
}
