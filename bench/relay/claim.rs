//! omni-box's own table: claimed from, read from a slot, and beside omni-box.

use std::path::Path;

use crate::carrier::{Carrier, Marks};
use crate::rig::Rig;
use crate::runs::Runs;
use crate::{STEADY, drain};

/// With few keys omni-box is the slower the more rows wait, so it gets as many as it can
/// carry in a minute.
const ROWS_OF_OMNI_BOX_WITH_FEW_KEYS: i64 = 1_000;

const CARRIERS: [Carrier; 4] = [
    Carrier::OmniBox,
    Carrier::Claiming,
    Carrier::Tracked(Marks::Published),
    Carrier::Tracked(Marks::None),
];

pub(crate) async fn run(file: &Path, trials: u32, rows: i64) {
    let mut rig = Rig::start(&STEADY, &[]).await;
    let mut runs = Runs::create(file, &rig).await;
    for (keys, name) in [("", "unique keys"), ("10", "10 keys")] {
        rig.client
            .batch_execute(&format!("SET bench.keys = '{keys}'"))
            .await
            .unwrap();
        for trial in 1..=trials {
            for carrier in CARRIERS {
                let rows = match carrier {
                    Carrier::OmniBox if !keys.is_empty() => ROWS_OF_OMNI_BOX_WITH_FEW_KEYS,
                    _ => rows,
                };
                let backlog = rig.load(carrier, rows, 100).await;
                let mut run = drain::run(&mut rig, carrier, &backlog, trial).await;
                run.load += &format!(", {name}");
                runs.add(&run);
            }
        }
    }
    runs.finish();
}
