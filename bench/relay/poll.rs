//! Polling: with few and with many published rows in the table, and beside a transaction
//! that stays open.

use std::path::Path;

use crate::carrier::{Carrier, Table, Wake};
use crate::latency::WarmUp;
use crate::rig::{self, Rig};
use crate::runs::Runs;
use crate::{STEADY, drain, latency, rest};

const INTERVAL: Carrier = Carrier::Polling(Wake::Interval);
const NOTIFICATION: Carrier = Carrier::Polling(Wake::Notification);

const RATES: [usize; 2] = [20, 1_000];

/// At the rate that is measured, before it is.
const A_MINUTE: WarmUp = WarmUp {
    events: 60_000,
    rate: 1_000,
};

pub(crate) async fn run(file: &Path, trials: u32, rows: i64, published: i64) {
    let mut rig = Rig::start(&STEADY, &[]).await;
    rig.mode = "poll";
    let mut runs = Runs::create(file, &rig).await;
    for behind in [0, published] {
        if behind > 0 {
            let topic = rig.prepare(INTERVAL).await;
            rig.write(Table::Postbox, &topic, behind, 1_000).await;
        }
        for rows_per_transaction in [1, 100] {
            let backlog = rig.load(INTERVAL, rows, rows_per_transaction).await;
            drain::warm_up(&mut rig, INTERVAL, &backlog).await;
            for trial in 1..=trials {
                runs.add(&drain::run(&mut rig, INTERVAL, &backlog, trial).await);
            }
        }
        for trial in 1..=trials {
            for rate in RATES {
                runs.add(&latency::floor(&mut rig, rate, trial).await);
                for carrier in [INTERVAL, NOTIFICATION] {
                    let mut run = latency::run(&mut rig, carrier, rate, None, trial).await;
                    if behind > 0 {
                        run.load += &format!(", behind {behind}");
                    }
                    runs.add(&run);
                }
            }
        }
    }
    for trial in 1..=trials {
        let open = rig::connect(&rig.postgres.socket_url()).await;
        let begin = "BEGIN; SELECT pg_current_xact_id()";
        open.batch_execute(begin).await.unwrap();
        let mut run = latency::run(&mut rig, INTERVAL, 1_000, Some(A_MINUTE), trial).await;
        run.load += ", beside a transaction open for a minute";
        runs.add(&run);
        runs.add(&rest::idle(&mut rig, INTERVAL, trial).await);
    }
    runs.finish();
}
