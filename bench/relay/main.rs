//! What postbox costs and how fast it is, measured on throw-away servers.
//!
//! Each measure runs all that it compares in turn, trial after trial, on the same
//! servers, the same rows and the same clock, so that what else the machine does falls
//! on all of them. Every run is a line of JSON in a file; the tables and the picture
//! are drawn from the file alone. Figures depend on the machine; their ratios, within
//! one file, much less.
//!
//! `make bench`, `make bench-soak` and `make bench-compare` are how people run it.

// A measurement that fails is worth nothing: it ends by panicking.
#![allow(clippy::unwrap_used)]

mod carrier;
mod claim;
mod clean;
mod cost;
mod crash;
mod drain;
mod inbox;
mod latency;
mod picture;
mod poll;
mod report;
mod rest;
mod rig;
mod runs;
mod schedule;
mod soak;

use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};

use carrier::{Carrier, Debezium, Way};
use latency::WarmUp;
use rig::Rig;
use runs::Runs;

#[derive(Parser)]
#[command(about = "Measures postbox, and what it is compared with, on throw-away servers")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// Added by `cargo bench`.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum Command {
    /// postbox beside `pg_recvlogical` and a bare producer.
    Relay {
        #[command(flatten)]
        options: Options,
        /// Rows of one transaction, in the backlogs.
        #[arg(long, value_delimiter = ',', default_value = "1,100,1000")]
        rows_per_transaction: Vec<i64>,
        /// Variables and flags of a relay that is measured in the place of all else,
        /// beside that without; repeatable. Such as `--in-flight-max 5000`.
        #[arg(long = "variant", allow_hyphen_values = true)]
        variants: Vec<String>,
    },
    /// postbox beside Debezium and omni-box.
    Compare(Options),
    /// postbox that polls.
    Poll {
        #[command(flatten)]
        options: Options,
        /// Rows that have been published before.
        #[arg(long, default_value_t = 10_000_000)]
        published: i64,
    },
    /// postbox beside omni-box, on omni-box's table.
    Claim(Options),
    /// postbox while old rows are removed, and while they are not.
    Clean {
        #[command(flatten)]
        options: Options,
        /// Old rows, of which each trial takes some millions.
        #[arg(long, default_value_t = 10_000_000)]
        old: i64,
    },
    /// postbox with scheduled events, few and very many.
    Schedule {
        #[command(flatten)]
        options: Options,
        /// Events that wait for next month.
        #[arg(long, default_value_t = 1_000_000)]
        scheduled: i64,
    },
    /// An inbox, by who handles, beside omni-box's.
    Inbox(Options),
    /// postbox at half of what this machine can write and carry.
    Soak {
        /// The file that the runs are written to.
        #[arg(long)]
        runs: PathBuf,
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
        minutes: u32,
    },
    /// Prints the tables of these files, and draws a picture beside each.
    Report { files: Vec<PathBuf> },
}

#[derive(clap::Args)]
struct Options {
    /// The file that the runs are written to.
    #[arg(long)]
    runs: PathBuf,
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    trials: u32,
    /// Rows of a backlog.
    #[arg(long, default_value_t = 500_000, value_parser = clap::value_parser!(i64).range(1000..))]
    rows: i64,
    /// What to measure, if not all.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Measure>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Measure {
    Drain,
    /// Only in `compare`.
    Crash,
    Start,
    Latency,
    Idle,
}

impl Options {
    fn wants(&self, measure: Measure) -> bool {
        self.only.is_empty() || self.only.contains(&measure)
    }
}

fn main() {
    let Arguments { command, .. } = Arguments::parse();
    // On this thread alone, with which the programs that it starts end.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        match command {
            Command::Relay {
                options,
                rows_per_transaction,
                variants,
            } => relay(&options, &rows_per_transaction, variants).await,
            Command::Compare(options) => compare(&options).await,
            Command::Poll { options, published } => {
                poll::run(&options.runs, options.trials, options.rows, published).await;
            }
            Command::Claim(options) => {
                claim::run(&options.runs, options.trials, options.rows).await;
            }
            Command::Clean { options, old } => {
                clean::run(&options.runs, options.trials, old).await;
            }
            Command::Schedule { options, scheduled } => {
                schedule::run(&options.runs, options.trials, scheduled).await;
            }
            Command::Inbox(options) => {
                inbox::run(&options.runs, options.trials, options.rows).await;
            }
            Command::Soak { runs, minutes } => soak(&runs, minutes).await,
            Command::Report { files } => report::print(&files),
        }
    });
}

/// Of Postgres: what would fall on one trial and not on the next.
const STEADY: [&str; 3] = [
    "max_wal_size=64GB",
    "checkpoint_timeout=1d",
    "autovacuum=off",
];

const RATES: [usize; 3] = [20, 1_000, 10_000];

/// As they come in a trial: another is the first in each.
fn in_turn(carriers: &[Carrier], trial: u32) -> Vec<Carrier> {
    let mut carriers = carriers.to_vec();
    let by = trial as usize % carriers.len();
    carriers.rotate_left(by);
    carriers
}

async fn relay(options: &Options, rows_per_transaction: &[i64], variants: Vec<String>) {
    if options.only.contains(&Measure::Crash) {
        let message = "crash is measured by `make bench-compare`";
        Arguments::command()
            .error(ErrorKind::InvalidValue, message)
            .exit();
    }
    let mut rig = Rig::start(&STEADY, &[]).await;
    let mut runs = Runs::create(&options.runs, &rig).await;
    let mut written = [Way::Socket, Way::Tcp].map(Carrier::Postbox).to_vec();
    let mut drained = written.clone();
    if !variants.is_empty() {
        let variants = variants
            .into_iter()
            .map(|words| Carrier::Variant(words.leak()));
        drained = variants.collect();
        drained.insert(0, written[0]);
        written = drained.clone();
    } else if rig::pg_recvlogical().is_some() {
        drained.extend([Way::Socket, Way::Tcp].map(Carrier::PgRecvlogical));
    } else {
        eprintln!(
            "without pg_recvlogical: install Postgres' client programs, or set PG_RECVLOGICAL"
        );
    }
    if options.wants(Measure::Drain) {
        for rows in rows_per_transaction {
            let backlog = rig.load(drained[0], options.rows, *rows).await;
            drain::warm_up(&mut rig, drained[0], &backlog).await;
            for trial in 1..=options.trials {
                for carrier in in_turn(&drained, trial) {
                    runs.add(&drain::run(&mut rig, carrier, &backlog, trial).await);
                }
            }
            for carrier in &drained {
                rig.forget(*carrier, &backlog).await;
            }
        }
    }
    for trial in 1..=options.trials {
        if options.wants(Measure::Start) {
            for carrier in in_turn(&written, trial) {
                runs.add(&rest::first_delivery(&mut rig, carrier, trial).await);
            }
        }
        if options.wants(Measure::Latency) {
            for rate in RATES {
                runs.add(&latency::floor(&mut rig, rate, trial).await);
                for carrier in in_turn(&written, trial) {
                    runs.add(&latency::run(&mut rig, carrier, rate, None, trial).await);
                }
            }
        }
        if options.wants(Measure::Idle) {
            for carrier in in_turn(&written, trial) {
                runs.add(&rest::idle(&mut rig, carrier, trial).await);
            }
        }
    }
    runs.finish();
}

/// omni-box needs minutes for more.
const ROWS_OF_OMNI_BOX: i64 = 20_000;

/// For a JVM, before its latency is measured.
const WARM_UP: WarmUp = WarmUp {
    events: 20_000,
    rate: 1_000,
};

async fn compare(options: &Options) {
    let mut rig = Rig::start(&STEADY, &[]).await;
    rig.format = Some("raw");
    let mut runs = Runs::create(&options.runs, &rig).await;
    let postbox = [Way::Tcp, Way::Socket].map(Carrier::Postbox);
    let debezium = Debezium::ALL.map(Carrier::Debezium);
    let rows_of_omni_box = ROWS_OF_OMNI_BOX.min(options.rows);
    let with_omni_box = rig::has_omni_box();
    if !with_omni_box {
        eprintln!("without omni-box: `dev/fetch omni-box` says why");
    }
    let mut loads = Vec::new();
    if options.wants(Measure::Drain) || options.wants(Measure::Crash) {
        loads.push((
            postbox.to_vec(),
            rig.load(postbox[0], options.rows, 100).await,
        ));
        loads.push((
            debezium.to_vec(),
            rig.load(debezium[0], options.rows, 100).await,
        ));
        if with_omni_box {
            let backlog = rig.load(Carrier::OmniBox, rows_of_omni_box, 100).await;
            loads.push((vec![Carrier::OmniBox], backlog));
        }
        drain::warm_up(&mut rig, postbox[0], &loads[0].1).await;
    }
    for trial in 1..=options.trials {
        for (carriers, backlog) in &loads {
            for carrier in in_turn(carriers, trial) {
                if options.wants(Measure::Drain) {
                    runs.add(&drain::run(&mut rig, carrier, backlog, trial).await);
                }
                if options.wants(Measure::Crash) {
                    runs.add(&crash::run(&mut rig, carrier, backlog, trial).await);
                }
            }
        }
    }
    for (carriers, backlog) in &loads {
        for carrier in carriers {
            rig.forget(*carrier, backlog).await;
        }
    }
    let mut resting = [&postbox[..], &debezium].concat();
    if with_omni_box {
        resting.push(Carrier::OmniBox);
    }
    for trial in 1..=options.trials {
        if options.wants(Measure::Start) {
            for carrier in in_turn(&resting, trial) {
                runs.add(&rest::first_delivery(&mut rig, carrier, trial).await);
            }
        }
        if options.wants(Measure::Latency) {
            for rate in &RATES[..2] {
                runs.add(&latency::floor(&mut rig, *rate, trial).await);
                for carrier in in_turn(&resting, trial) {
                    let run = latency::run(&mut rig, carrier, *rate, Some(WARM_UP), trial);
                    runs.add(&run.await);
                }
            }
        }
        if options.wants(Measure::Idle) {
            for carrier in in_turn(&resting, trial) {
                runs.add(&rest::idle(&mut rig, carrier, trial).await);
            }
        }
    }
    runs.finish();
}

async fn soak(file: &Path, minutes: u32) {
    // Half an hour of rows and records is more than a disk should have to take.
    let mut rig = Rig::start(&[], &["log.retention.bytes=200000000"]).await;
    let mut runs = Runs::create(file, &rig).await;
    soak::run(&mut rig, &mut runs, minutes).await;
    runs.finish();
}
