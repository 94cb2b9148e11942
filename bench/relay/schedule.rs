//! What scheduled events cost: how soon one is there after its time, and what ordinary events
//! and a relay with nothing to do pay for those that wait, with none that wait and with very many.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::carrier::{Carrier, Way};
use crate::cost::Meter;
use crate::latency::{self, Listener, set_latencies};
use crate::rest;
use crate::rig::{self, PATIENCE, Rig};
use crate::runs::{Run, Runs};

const CARRIER: Carrier = Carrier::Postbox(Way::Socket);
const RATE: usize = 1_000;

/// Events that are due at that rate.
const EVENTS: usize = 20_000;

/// Events that are due at once.
const BURST: usize = 100_000;

/// How long before the first is due they are written: they must be parked by then.
const AHEAD: Duration = Duration::from_secs(30);

/// How often they are counted, which takes a moment where there are very many.
const COUNT_INTERVAL: Duration = Duration::from_millis(500);

pub(crate) async fn run(file: &Path, trials: u32, rows: i64) {
    let mut rig = Rig::start(&["max_wal_size=64GB", "checkpoint_timeout=1d"], &[]).await;
    let mut runs = Runs::create(file, &rig).await;
    // The first does not count: the broker is not warm.
    latency::run(&mut rig, CARRIER, RATE, None, 0).await;
    for waiting in [0, rows] {
        if waiting > 0 {
            runs.add(&lay_by(&mut rig, waiting).await);
        }
        for trial in 1..=trials {
            for mut run in [
                due(&mut rig, RATE, EVENTS, trial).await,
                due(&mut rig, usize::MAX, BURST, trial).await,
                latency::run(&mut rig, CARRIER, RATE, None, trial).await,
                rest::idle(&mut rig, CARRIER, trial).await,
            ] {
                run.load += &format!(", {waiting} scheduled");
                runs.add(&run);
            }
        }
    }
    for trial in 1..=trials {
        let open = rig::connect(&rig.postgres.socket_url()).await;
        let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1";
        open.batch_execute(begin).await.unwrap();
        // What it can see of these stays in the indexes.
        due(&mut rig, usize::MAX, BURST, trial).await;
        let mut run = due(&mut rig, RATE, EVENTS, trial).await;
        run.load += &format!(", {BURST} sent beside an open transaction");
        runs.add(&run);
    }
    runs.finish();
}

/// Writes events for next month, while a relay runs, until all are parked.
async fn lay_by(rig: &mut Rig, rows: i64) -> Run {
    let topic = rig.prepare(CARRIER).await;
    let running = rig.launch(CARRIER, &topic).await;
    let mut run = Run::new("park", &format!("{rows} rows"), CARRIER.name(), 1);
    let walsender = rig.walsender(CARRIER).await;
    let meter = Meter::start(rig, running.program.pid(), walsender);
    let began = Instant::now();
    for first in (0..rows).step_by(1_000) {
        let last = (first + 1_000).min(rows) - 1;
        write(rig, &topic, (first, last), "30 days", RATE).await;
    }
    while parked(rig).await < rows {
        assert!(began.elapsed() < PATIENCE, "not all were parked");
        tokio::time::sleep(COUNT_INTERVAL).await;
    }
    let seconds = began.elapsed().as_secs_f64();
    meter.finish(&mut run, rows as f64, seconds);
    run.set("events_per_second", rows as f64 / seconds);
    running.program.stop().await;
    rig.end(CARRIER, &topic).await;
    run
}

/// From the time of each event, at a steady rate, to the consumer.
async fn due(rig: &mut Rig, rate: usize, events: usize, trial: u32) -> Run {
    let topic = rig.prepare(CARRIER).await;
    let running = rig.launch(CARRIER, &topic).await;
    let listener = Listener::start(rig.consumer(&topic), events);
    let already = parked(rig).await;
    // By the server's clock, which is this machine's; that it takes a moment to get there makes
    // events look later, not sooner.
    let first = Instant::now() + AHEAD;
    let ahead = format!("{} microseconds", AHEAD.as_micros());
    write(rig, &topic, (0, events as i64 - 1), &ahead, rate).await;
    let step = Duration::from_secs_f64(1.0 / rate as f64);
    let times: Vec<Instant> = (0..events as u32).map(|n| first + step * n).collect();
    while parked(rig).await < already + events as i64 {
        assert!(Instant::now() < first, "not parked before their time");
        tokio::time::sleep(COUNT_INTERVAL).await;
    }
    tokio::time::sleep_until(first.into()).await;
    let walsender = rig.walsender(CARRIER).await;
    let meter = Meter::start(rig, running.program.pid(), walsender);
    listener.wait_for(events).await;
    let load = match rate {
        usize::MAX => format!("{events} events at once"),
        _ => format!("{rate} events/s"),
    };
    let mut run = Run::new("due", &load, CARRIER.name(), trial);
    let seconds = first.elapsed().as_secs_f64();
    meter.finish(&mut run, events as f64, seconds);
    run.set("events_per_second", events as f64 / seconds);
    set_latencies(&mut run, RATE, &times, &listener.stop());
    running.program.stop().await;
    rig.end(CARRIER, &topic).await;
    run
}

/// Inserts these events. The first is due so long from now, the others at this rate.
async fn write(rig: &Rig, topic: &str, (first, last): (i64, i64), ahead: &str, rate: usize) {
    let insert = "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload, scheduled_at) \
                  SELECT $1, 'k' || (i % 1000), 'changed', bench_payload(i)::json, \
                      now() + $4::text::interval + (i - $2) * $5::float8 * interval '1 second' \
                  FROM generate_series($2::bigint, $3::bigint) AS i";
    let step = 1.0 / rate as f64;
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 5] =
        [&topic, &first, &last, &ahead, &step];
    rig.client.execute(insert, &parameters).await.unwrap();
}

async fn parked(rig: &Rig) -> i64 {
    let count = "SELECT count(*) FROM postbox.parked";
    rig.client.query_one(count, &[]).await.unwrap().get(0)
}
