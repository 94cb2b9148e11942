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
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseRecord, DefaultProducerContext, ThreadedProducer};
use tokio::task::JoinSet;

use crate::carrier::Carrier;
use crate::cost::Meter;
use crate::rig::{self, PATIENCE, Rig};
use crate::runs::Run;

/// At the rate that is measured, before it is measured.
const WARM_UP: Duration = Duration::from_secs(4);
const MEASURED: Duration = Duration::from_secs(15);

/// Sessions that write, so that a COMMIT does not wait for the one before.
const WRITERS: usize = 8;

/// Above this rate, events are written by tens: with 1,000 commits a second, the disk
/// is not what is measured.
const COMMITS_MAX: usize = 1_000;

/// What is written before anything is measured: a JVM compiles what it runs often.
#[derive(Clone, Copy)]
pub(crate) struct WarmUp {
    pub(crate) events: usize,
    pub(crate) rate: usize,
}

pub(crate) async fn run(
    rig: &mut Rig,
    carrier: Carrier,
    rate: usize,
    warm_up: Option<WarmUp>,
    trial: u32,
) -> Run {
    let topic = rig.prepare(carrier).await;
    let mut running = rig.launch(carrier, &topic).await;
    if let Some(WarmUp { events, rate }) = warm_up {
        let listener = Listener::start(rig.consumer(&topic), events);
        write(rig, carrier, &topic, rate, events).await;
        listener.wait_for(events).await;
        listener.stop();
    }
    let events = rate * (WARM_UP + MEASURED).as_secs() as usize;
    let listener = Listener::start(rig.consumer(&topic), events);
    let walsender = rig.walsender(carrier).await;
    let meter = Meter::start(rig, running.program.pid(), walsender);
    let began = Instant::now();
    let sent = write(rig, carrier, &topic, rate, events).await;
    let writing = began.elapsed().as_secs_f64();
    listener.wait_for(events).await;
    let mut run = Run::new("latency", &load(rate), carrier.name(), trial);
    meter.finish(&mut run, events as f64, began.elapsed().as_secs_f64());
    run.set("written_per_second", events as f64 / writing);
    set_latencies(&mut run, rate, &sent, &listener.stop());
    running.program.check();
    running.program.stop().await;
    rig.end(carrier, &topic).await;
    run
}

/// The floor: the same consumer, and a producer that is called here, with as many
/// events of the same size.
pub(crate) async fn floor(rig: &mut Rig, rate: usize, trial: u32) -> Run {
    let topic = rig.create_topic().await;
    let events = rate * (WARM_UP + MEASURED).as_secs() as usize;
    let listener = Listener::start(rig.consumer(&topic), events);
    let producer: ThreadedProducer<DefaultProducerContext> = ClientConfig::new()
        .set("bootstrap.servers", rig.brokers())
        .set("acks", "all")
        .set("enable.idempotence", "true")
        .set("compression.codec", "lz4")
        .set("linger.ms", "0")
        .create()
        .unwrap();
    let payloads = "SELECT bench_payload(n) FROM generate_series(0, 999) AS n";
    let payloads = rig.client.query(payloads, &[]).await.unwrap();
    let payloads: Vec<String> = payloads.iter().map(|row| row.get(0)).collect();
    let target = topic.clone();
    let sending = std::thread::spawn(move || send(&producer, &target, &payloads, rate, events));
    listener.wait_for(events).await;
    let sent = sending.join().unwrap();
    let mut run = Run::new("latency", &load(rate), FLOOR, trial);
    set_latencies(&mut run, rate, &sent, &listener.stop());
    rig.delete_topic(&topic).await;
    run
}

/// Its name among the carriers.
pub(crate) const FLOOR: &str = "producer to consumer, no Postgres";

fn load(rate: usize) -> String {
    format!("{rate} events/s")
}

/// `sent` is from when on it counts.
pub(crate) fn set_latencies(
    run: &mut Run,
    rate: usize,
    sent: &[Instant],
    arrived: &[Option<Instant>],
) {
    let warm_up = rate * WARM_UP.as_secs() as usize;
    let mut latencies: Vec<f64> = sent
        .iter()
        .zip(arrived)
        .skip(warm_up)
        .map(|(sent, arrived)| {
            let latency = arrived.unwrap().saturating_duration_since(*sent);
            latency.as_secs_f64() * 1e3
        })
        .collect();
    latencies.sort_by(f64::total_cmp);
    let quantile = |part: f64| latencies[((latencies.len() - 1) as f64 * part) as usize];
    for (figure, part) in [
        ("p50_ms", 0.5),
        ("p90_ms", 0.9),
        ("p99_ms", 0.99),
        ("max_ms", 1.0),
    ] {
        run.set(figure, quantile(part));
    }
    let sooner = latencies.iter().filter(|latency| **latency == 0.0).count();
    run.set(
        "before_commit_returned_percent",
        sooner as f64 * 100.0 / latencies.len() as f64,
    );
}

/// Writes events at a steady rate; when the COMMIT of each returned. On a thread that
/// does nothing else, so that it is told when it returns.
async fn write(
    rig: &Rig,
    carrier: Carrier,
    topic: &str,
    rate: usize,
    events: usize,
) -> Vec<Instant> {
    let insert = format!("SELECT {}($1, $2, $3)", carrier.table().insert());
    let (url, topic) = (rig.postgres.socket_url(), topic.to_owned());
    let (tell, told) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let sessions = write_in_sessions(&url, &insert, &topic, rate, events);
        let _ = tell.send(runtime.block_on(sessions));
    });
    told.await.unwrap()
}

async fn write_in_sessions(
    url: &str,
    insert: &str,
    topic: &str,
    rate: usize,
    events: usize,
) -> Vec<Instant> {
    let size = (rate / COMMITS_MAX).max(1);
    let mut sessions = Vec::new();
    for _ in 0..WRITERS {
        let client = rig::connect(url).await;
        let insert = client.prepare(insert).await.unwrap();
        sessions.push((client, insert));
    }
    let began = tokio::time::Instant::now();
    let mut writers = JoinSet::new();
    for (writer, (client, insert)) in sessions.into_iter().enumerate() {
        let topic = topic.to_owned();
        writers.spawn(async move {
            let mut committed = Vec::new();
            for first in (writer * size..events).step_by(WRITERS * size) {
                let due = Duration::from_secs_f64(first as f64 / rate as f64);
                tokio::time::sleep_until(began + due).await;
                let last = (first + size).min(events) - 1;
                let (from, to) = (first as i64, last as i64);
                let done = client.execute(&insert, &[&topic, &from, &to]).await;
                let now = Instant::now();
                done.unwrap();
                committed.extend((first..=last).map(|n| (n, now)));
            }
            committed
        });
    }
    let mut sent = vec![began.into_std(); events];
    while let Some(committed) = writers.join_next().await {
        for (n, at) in committed.unwrap() {
            sent[n] = at;
        }
    }
    sent
}

fn send(
    producer: &ThreadedProducer<DefaultProducerContext>,
    topic: &str,
    payloads: &[String],
    rate: usize,
    events: usize,
) -> Vec<Instant> {
    let began = Instant::now();
    let mut sent = Vec::with_capacity(events);
    for n in 0..events {
        let key = format!("k{}", n % payloads.len());
        // The first number is the one that is looked for.
        let value = format!("{{\"n\": {n}, {}", &payloads[n % payloads.len()][1..]);
        let headers = OwnedHeaders::new()
            .insert(Header {
                key: "id",
                value: Some("785630ce-603f-47d2-b892-ace407219583"),
            })
            .insert(Header {
                key: "event_type",
                value: Some("changed"),
            });
        let due = Duration::from_secs_f64(n as f64 / rate as f64);
        std::thread::sleep(due.saturating_sub(began.elapsed()));
        sent.push(Instant::now());
        let record = BaseRecord::to(topic)
            .key(&key)
            .payload(&value)
            .headers(headers);
        producer.send(record).map_err(|(error, _)| error).unwrap();
    }
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
                Instant::now() < deadline && !self.thread.is_finished(),
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
