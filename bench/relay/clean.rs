//! What cleaning up costs others: how fast rows are inserted and how soon they arrive, with and
//! without it, before a table of old rows. In turns, so that what else the machine does falls on both.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crate::carrier::{Carrier, Table, Way};
use crate::latency;
use crate::rig::{self, PATIENCE, Rig};
use crate::runs::{Run, Runs};

const CARRIER: Carrier = Carrier::Postbox(Way::Socket);
const RATE: usize = 1_000;

/// Rows that one session inserts as fast as it can, each in a transaction.
const INSERTED: i64 = 200_000;

pub(crate) async fn run(file: &Path, trials: u32, rows: i64) {
    // With autovacuum, which follows what is deleted.
    let mut rig = Rig::start(&["max_wal_size=64GB", "checkpoint_timeout=1d"], &[]).await;
    let mut runs = Runs::create(file, &rig).await;
    let topic = rig.prepare(CARRIER).await;
    rig.write(Table::Postbox, &topic, rows, 1_000).await;
    let published = "UPDATE postbox.checkpoint SET snapshot = pg_current_snapshot(); VACUUM ANALYZE; CHECKPOINT";
    for statement in published.split(';') {
        rig.client.batch_execute(statement).await.unwrap();
    }
    // The first does not count: the broker is not warm.
    latency::run(&mut rig, CARRIER, RATE, None, 0).await;
    for trial in 1..=trials {
        let mut turns = [false, true];
        turns.rotate_left(trial as usize % 2);
        for cleans in turns {
            let cleaning = Cleaning::start(&rig, &topic, cleans).await;
            let mut run = latency::run(&mut rig, CARRIER, RATE, None, trial).await;
            run.load += load(cleans);
            cleaning.finish(&rig, &mut run).await;
            runs.add(&run);
            let cleaning = Cleaning::start(&rig, &topic, cleans).await;
            let mut run = insert(&mut rig, trial).await;
            run.load += load(cleans);
            cleaning.finish(&rig, &mut run).await;
            runs.add(&run);
        }
    }
    runs.finish();
}

fn load(cleans: bool) -> &'static str {
    if cleans { ", while old rows go" } else { "" }
}

/// As fast as one session can, while a relay carries what it writes.
async fn insert(rig: &mut Rig, trial: u32) -> Run {
    let topic = rig.prepare(CARRIER).await;
    let running = rig.launch(CARRIER, &topic).await;
    let began = Instant::now();
    rig.write(Table::Postbox, &topic, INSERTED, 1).await;
    let mut run = Run::new("insert", "1 session", CARRIER.name(), trial);
    run.set(
        "written_per_second",
        INSERTED as f64 / began.elapsed().as_secs_f64(),
    );
    while rig.records(&topic) < INSERTED {
        assert!(began.elapsed() < PATIENCE, "not all arrived");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    running.program.stop().await;
    rig.end(CARRIER, &topic).await;
    run
}

/// `postbox cleanup`, if it is at work.
struct Cleaning<'t> {
    program: Option<Child>,
    began: Instant,
    /// Of the old rows.
    topic: &'t str,
    rows_before: i64,
}

impl<'t> Cleaning<'t> {
    async fn start(rig: &Rig, topic: &'t str, cleans: bool) -> Self {
        let rows_before = rows(rig, topic).await;
        let start = || {
            Command::new(rig::postbox())
                .args(["cleanup", "--older-than", "1s", "--timeout", "1h"])
                .env("POSTBOX_DATABASE_URL", rig.database_url(Way::Socket))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .unwrap()
        };
        Self {
            program: cleans.then(start),
            began: Instant::now(),
            topic,
            rows_before,
        }
    }

    /// Ends it, and tells what it did. It must have had work until now.
    async fn finish(mut self, rig: &Rig, run: &mut Run) {
        let Some(program) = &mut self.program else {
            return;
        };
        let ended = program.try_wait().unwrap();
        let seconds = self.began.elapsed().as_secs_f64();
        if let Some(status) = ended {
            assert!(status.success(), "cleanup: {status}");
            eprintln!("the cleanup had nothing left to do: ROWS is too small for this many trials");
        }
        program.kill().unwrap();
        program.wait().unwrap();
        let gone = self.rows_before - rows(rig, self.topic).await;
        run.set("had_work_to_the_end", f64::from(u8::from(ended.is_none())));
        run.set("rows_gone_per_second", gone as f64 / seconds);
    }
}

impl Drop for Cleaning<'_> {
    fn drop(&mut self) {
        if let Some(program) = &mut self.program {
            let _ = program.kill();
            let _ = program.wait();
        }
    }
}

/// How many of the old rows there are.
async fn rows(rig: &Rig, topic: &str) -> i64 {
    let count = "SELECT count(*) FROM postbox.outbox WHERE aggregate_type = $1";
    let row = rig.client.query_one(count, &[&topic]).await;
    row.unwrap().get(0)
}
