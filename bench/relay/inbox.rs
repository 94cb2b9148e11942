//! The other side: what an inbox makes of records that wait in Kafka, by who handles them, and how
//! long a message takes from the producer to its effect.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rdkafka::ClientConfig;
use rdkafka::message::{Header, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use uuid::Uuid;

use crate::carrier::{Running, Table, inbox, inbox_of_omni_box};
use crate::cost::{Meter, memory_mb};
use crate::rig::{self, PATIENCE, Rig};
use crate::runs::{Run, Runs};

/// omni-box needs minutes for more.
const ROWS_OF_OMNI_BOX: i64 = 3_000;

/// One by one, each is a commit to the disk.
const ROWS_ONE_BY_ONE: i64 = 20_000;

const RATE: u32 = 1_000;
const MEASURED: u32 = 15;
const WARM_UP: u32 = 4;

/// How often it is looked how far it has come.
const LOOK: Duration = Duration::from_millis(20);

/// Who handles, how.
#[derive(Clone, Copy)]
struct Way {
    name: &'static str,
    flags: &'static [&'static str],
    /// What says how many are done.
    done: &'static str,
    rows: Option<i64>,
}

const OFFSETS: &str =
    "SELECT coalesce(sum(next_offset), 0)::bigint FROM postbox.inbox_offset WHERE topic = $1";

const WAYS: [Way; 5] = [
    Way {
        name: "stored for the application",
        flags: &["--handler", "none"],
        done: OFFSETS,
        rows: None,
    },
    Way {
        name: "a function for a batch",
        flags: &["--handler", "sql:bench_handle_all"],
        done: OFFSETS,
        rows: None,
    },
    Way {
        name: "a function for a message",
        flags: &["--handler", "sql:bench_handle"],
        done: OFFSETS,
        rows: None,
    },
    Way {
        name: "a function, from the table",
        flags: &[
            "--handler",
            "sql:bench_handle",
            "--ack",
            "at-least-once",
            "--commit",
            "on-persist",
        ],
        done: "SELECT count(*) FROM bench_effects WHERE topic = $1",
        rows: None,
    },
    Way {
        name: "a function, one by one",
        flags: &[
            "--handler",
            "sql:bench_handle",
            "--ack",
            "at-least-once",
            "--commit",
            "on-success",
        ],
        done: OFFSETS,
        rows: Some(ROWS_ONE_BY_ONE),
    },
];

const OMNI_BOX: Way = Way {
    name: "omni-box",
    flags: &[],
    done: "SELECT count(*) FROM inbox_events WHERE source = $1 AND status = 'completed'",
    rows: Some(ROWS_OF_OMNI_BOX),
};

const HANDLERS: &str = "CREATE TABLE bench_effects (topic text, id text, key text, at timestamptz DEFAULT clock_timestamp());
     CREATE FUNCTION bench_handle(m postbox.message) RETURNS void LANGUAGE sql
     AS 'INSERT INTO bench_effects (topic, id, key) VALUES (m.topic, m.message_id, m.key)';
     CREATE FUNCTION bench_handle_all(m postbox.message[]) RETURNS void LANGUAGE sql
     AS 'INSERT INTO bench_effects (topic, id, key) SELECT topic, message_id, key FROM unnest(m)';
     CREATE FUNCTION bench_effect(id text, key text) RETURNS void LANGUAGE sql
     AS 'INSERT INTO bench_effects (id, key) VALUES (id, key)'";

pub(crate) async fn run(file: &Path, trials: u32, rows: i64) {
    let mut rig = Rig::start(&crate::STEADY, &[]).await;
    let mut runs = Runs::create(file, &rig).await;
    Table::Postbox.create(&rig).await;
    rig.client.batch_execute(HANDLERS).await.unwrap();
    let mut ways = WAYS.to_vec();
    if rig::has_omni_box() {
        Table::OmniBox.create(&rig).await;
        ways.push(OMNI_BOX);
    } else {
        eprintln!("without omni-box: `dev/fetch omni-box` says why");
    }
    drain(&mut rig, WAYS[1], rows, 0).await;
    for trial in 1..=trials {
        for way in &ways {
            runs.add(&drain(&mut rig, *way, rows, trial).await);
        }
        runs.add(&latency(&mut rig, WAYS[2], trial).await);
    }
    runs.finish();
}

fn start(rig: &Rig, way: Way, topic: &str) -> Running {
    match way.flags {
        [] => inbox_of_omni_box(rig, topic),
        flags => inbox(rig, topic, flags),
    }
}

/// Records that wait are taken in.
async fn drain(rig: &mut Rig, way: Way, rows: i64, trial: u32) -> Run {
    let rows = way.rows.map_or(rows, |most| rows.min(most));
    let topic = rig.create_topic().await;
    produce(rig, &topic, rows).await;
    for table in ["postbox.inbox", "postbox.inbox_message", "bench_effects"] {
        let empty = format!("TRUNCATE {table}");
        rig.client.batch_execute(&empty).await.unwrap();
    }
    rig.client.batch_execute("CHECKPOINT").await.unwrap();
    let mut running = start(rig, way, &topic);
    let count = async || -> i64 {
        let row = rig.client.query_one(way.done, &[&topic]).await;
        row.unwrap().get(0)
    };
    // To join the group takes seconds, which is not what is measured.
    let before = loop {
        let done = count().await;
        if done > 0 {
            break done;
        }
        running.check();
        assert!(
            running.began.elapsed() < PATIENCE,
            "{} does nothing",
            way.name
        );
        tokio::time::sleep(LOOK).await;
    };
    let meter = Meter::start(rig, running.pid(), None);
    let began = Instant::now();
    let mut peak: f64 = 0.0;
    while count().await < rows {
        running.check();
        assert!(began.elapsed() < PATIENCE, "{} does not end", way.name);
        peak = peak.max(memory_mb(running.pid(), "VmRSS").unwrap_or_default());
        tokio::time::sleep(LOOK).await;
    }
    let seconds = began.elapsed().as_secs_f64();
    let handled = (rows - before) as f64;
    let mut run = Run::new("inbox", &format!("{rows} records"), way.name, trial);
    run.set("events_per_second", handled / seconds);
    run.set("peak_mb", peak);
    meter.finish(&mut run, handled, seconds);
    running.stop().await;
    rig.delete_topic(&topic).await;
    run
}

/// From the producer to the effect, by the clock of this machine, which both servers have.
async fn latency(rig: &mut Rig, way: Way, trial: u32) -> Run {
    let topic = rig.create_topic().await;
    produce(rig, &topic, 1).await;
    let running = start(rig, way, &topic);
    let count = async |rig: &Rig| -> i64 {
        let sql = "SELECT count(*) FROM bench_effects WHERE topic = $1";
        rig.client.query_one(sql, &[&topic]).await.unwrap().get(0)
    };
    while count(rig).await < 1 {
        assert!(running.began.elapsed() < PATIENCE);
        tokio::time::sleep(LOOK).await;
    }
    let events = RATE * (WARM_UP + MEASURED);
    let meter = Meter::start(rig, running.pid(), None);
    let brokers = rig.brokers().to_owned();
    let name = topic.clone();
    let began = Instant::now();
    let sending = std::thread::spawn(move || send_steadily(&brokers, &name, events));
    while count(rig).await <= i64::from(events) {
        assert!(began.elapsed() < PATIENCE);
        tokio::time::sleep(LOOK * 10).await;
    }
    sending.join().unwrap();
    let mut run = Run::new("effect", &format!("{RATE} messages/s"), way.name, trial);
    meter.finish(&mut run, f64::from(events), began.elapsed().as_secs_f64());
    // The key is when it was sent, in microseconds since 1970.
    let sql = "SELECT percentile_disc(ARRAY[0.5, 0.9, 0.99, 1]) WITHIN GROUP (ORDER BY late)
               FROM (
                   SELECT extract(epoch FROM at)::float8 * 1000 - key::float8 / 1000 AS late FROM bench_effects
                   WHERE topic = $1 AND key ~ '^[0-9]{16}$'
                   ORDER BY key
                   OFFSET $2
               ) AS e";
    let warm_up = i64::from(RATE * WARM_UP);
    let row = rig.client.query_one(sql, &[&topic, &warm_up]).await;
    let quantiles: Vec<f64> = row.unwrap().get(0);
    for (figure, value) in ["p50_ms", "p90_ms", "p99_ms", "max_ms"]
        .iter()
        .zip(quantiles)
    {
        run.set(figure, value);
    }
    run.set(
        "memory_mb",
        memory_mb(running.pid(), "VmRSS").unwrap_or_default(),
    );
    running.stop().await;
    rig.delete_topic(&topic).await;
    run
}

fn producer(brokers: &str, linger: &str) -> BaseProducer {
    ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("compression.codec", "lz4")
        .set("linger.ms", linger)
        .set("queue.buffering.max.messages", "0")
        .create()
        .unwrap()
}

fn send(producer: &BaseProducer, topic: &str, key: &str, payload: &str) {
    let id = Uuid::new_v4().to_string();
    let header = |key, value| Header {
        key,
        value: Some(value),
    };
    let headers = OwnedHeaders::new()
        .insert(header("message_id", &*id))
        .insert(header("event_type", "changed"));
    let record = BaseRecord::to(topic)
        .key(key)
        .payload(payload)
        .headers(headers);
    producer.send(record).map_err(|(error, _)| error).unwrap();
    producer.poll(Duration::ZERO);
}

/// As the relay would have: with ids that are UUIDs, of a thousand keys.
async fn produce(rig: &Rig, topic: &str, rows: i64) {
    let payloads = "SELECT bench_payload(n) FROM generate_series(0, 999) AS n";
    let payloads = rig.client.query(payloads, &[]).await.unwrap();
    let payloads: Vec<String> = payloads.iter().map(|row| row.get(0)).collect();
    let producer = producer(rig.brokers(), "5");
    for n in 0..rows as usize {
        send(
            &producer,
            topic,
            &format!("k{}", n % 1000),
            &payloads[n % 1000],
        );
    }
    producer.flush(PATIENCE).unwrap();
}

fn send_steadily(brokers: &str, topic: &str, events: u32) {
    let producer = producer(brokers, "0");
    let began = Instant::now();
    for n in 0..events {
        let at = began + Duration::from_secs(1) * n / RATE;
        std::thread::sleep(at.saturating_duration_since(Instant::now()));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        send(&producer, topic, &now.as_micros().to_string(), r#"{"a":1}"#);
    }
    producer.flush(PATIENCE).unwrap();
}
