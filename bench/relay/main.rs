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
mod cost;
mod crash;
mod drain;
mod latency;
mod picture;
mod report;
mod rest;
mod rig;
mod runs;
mod soak;

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use carrier::{Carrier, Debezium, Way};
use rig::Rig;
use runs::Runs;

#[derive(Parser)]
#[command(about = "Measures postbox, and what it is compared with, on throw-away servers")]
struct Arguments {
    #[command(subcommand)]
    measure: Measure,
    /// Added by `cargo bench`.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum Measure {
    /// postbox beside `pg_recvlogical` and a bare producer.
    Relay(Options),
    /// postbox beside Debezium and omni-box.
    Compare(Options),
    /// postbox for half an hour at half of what this machine can write and carry.
    Soak {
        #[command(flatten)]
        options: Options,
        #[arg(long, default_value_t = 30)]
        minutes: u64,
    },
    /// Prints the tables of these files, and draws the picture of the first.
    Report {
        files: Vec<PathBuf>,
        /// Where the picture goes.
        #[arg(long)]
        picture: Option<PathBuf>,
    },
}

#[derive(clap::Args)]
struct Options {
    /// The file that the runs are written to.
    #[arg(long)]
    runs: PathBuf,
    #[arg(long, default_value_t = 5)]
    trials: u32,
    /// Rows of a backlog.
    #[arg(long, default_value_t = 500_000)]
    rows: i64,
    /// Rows of one transaction, in the backlogs.
    #[arg(long, value_delimiter = ',', default_value = "1,100,1000")]
    rows_per_transaction: Vec<i64>,
    /// Measures to take, of all; such as `drain,latency`.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Variables and flags of a relay that is measured in the place of all else, beside
    /// that without; repeatable. Such as `-X linger.ms=5`.
    #[arg(long = "variant", allow_hyphen_values = true)]
    variants: Vec<String>,
}

impl Options {
    fn wants(&self, measure: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == measure)
    }
}

fn main() {
    let arguments = Arguments::parse();
    if let Measure::Report { files, picture } = &arguments.measure {
        return report::print(files, picture.as_deref());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    // On this thread alone, with which the programs that it starts end.
    runtime.block_on(async {
        match &arguments.measure {
            Measure::Relay(options) => relay(options).await,
            Measure::Compare(options) => compare(options).await,
            Measure::Soak { options, minutes } => soak(options, *minutes).await,
            Measure::Report { .. } => unreachable!("needs no servers"),
        }
    });
}

/// Of Postgres: a checkpoint would fall on one trial and not on the next.
const STEADY: [&str; 2] = ["max_wal_size=32GB", "checkpoint_timeout=1h"];

async fn relay(options: &Options) {
    let mut rig = Rig::start(&STEADY, &[]).await;
    let mut runs = Runs::create(&options.runs, &rig).await;
    let postbox = [Way::Socket, Way::Tcp].map(Carrier::Postbox);
    let readers = [Way::Socket, Way::Tcp].map(Carrier::PgRecvlogical);
    let variants = options
        .variants
        .iter()
        .map(|flags| Carrier::Variant(flags.clone().leak()));
    let variants: Vec<_> = [postbox[0]].into_iter().chain(variants).collect();
    let choose = |all: &[Carrier]| match variants.len() {
        1 => all.to_vec(),
        _ => variants.clone(),
    };
    let drained = choose(&[postbox[0], readers[0], postbox[1], readers[1]]);
    let started = choose(&postbox[..1]);
    let mut written = choose(&postbox);
    written.insert(0, Carrier::BareProducer);
    if options.wants("drain") {
        for rows in options.rows_per_transaction.iter().copied() {
            let backlog = rig.load(postbox[0], options.rows, rows).await;
            // A broker that has done nothing yet is slow.
            drain::run(&mut rig, postbox[0], &backlog, 0).await;
            for trial in 1..=options.trials {
                for &carrier in &drained {
                    runs.add(&drain::run(&mut rig, carrier, &backlog, trial).await);
                }
            }
            rig.forget(&backlog).await;
        }
    }
    if options.wants("start") {
        for trial in 1..=options.trials {
            runs.add(&rest::first_delivery_of_a_bare_producer(&mut rig, trial).await);
            for &carrier in &started {
                runs.add(&rest::first_delivery(&mut rig, carrier, trial).await);
            }
        }
    }
    if options.wants("latency") {
        for trial in 1..=options.trials {
            for rate in [20, 1_000, 10_000] {
                for &carrier in &written {
                    runs.add(&latency::run(&mut rig, carrier, rate, trial).await);
                }
            }
        }
    }
    if options.wants("idle") {
        for trial in 1..=options.trials {
            for &carrier in &started {
                runs.add(&rest::idle(&mut rig, carrier, trial).await);
            }
        }
    }
}

async fn compare(options: &Options) {
    let mut rig = Rig::start(&STEADY, &[]).await;
    let mut runs = Runs::create(&options.runs, &rig).await;
    let postbox = [Way::Socket, Way::Tcp].map(Carrier::Postbox);
    let debezium = [Debezium::Default, Debezium::Tuned, Debezium::TunedPlus];
    let debezium = debezium.map(Carrier::Debezium);
    let quickest = Carrier::Debezium(Debezium::LowLatency);
    let small = 20_000.min(options.rows);
    if options.wants("drain") || options.wants("crash") {
        let ours = rig.load(postbox[0], options.rows, 100).await;
        let theirs = rig.load(debezium[0], options.rows, 100).await;
        let omni_box = rig.load(Carrier::OmniBox, small, 100).await;
        for trial in 1..=options.trials {
            for (carriers, backlog) in [
                (&postbox[..], &ours),
                (&debezium[..], &theirs),
                (&[Carrier::OmniBox][..], &omni_box),
            ] {
                for carrier in carriers {
                    if options.wants("drain") {
                        runs.add(&drain::run(&mut rig, *carrier, backlog, trial).await);
                    }
                    if options.wants("crash") {
                        runs.add(&crash::run(&mut rig, *carrier, backlog, trial).await);
                    }
                }
            }
        }
        for backlog in [ours, theirs, omni_box] {
            rig.forget(&backlog).await;
        }
    }
    let resting = [
        postbox[0],
        debezium[0],
        debezium[1],
        quickest,
        Carrier::OmniBox,
    ];
    if options.wants("latency") {
        for trial in 1..=options.trials {
            for rate in [20, 1_000] {
                runs.add(&latency::run(&mut rig, Carrier::BareProducer, rate, trial).await);
                for carrier in resting {
                    // One row a batch and round trips for each: it cannot keep up.
                    if rate <= 20 || carrier != Carrier::OmniBox {
                        runs.add(&latency::run(&mut rig, carrier, rate, trial).await);
                    }
                }
            }
        }
    }
    if options.wants("idle") {
        for trial in 1..=options.trials {
            for carrier in resting {
                runs.add(&rest::idle(&mut rig, carrier, trial).await);
            }
        }
    }
}

async fn soak(options: &Options, minutes: u64) {
    // Half an hour of rows and records is more than a disk should have to take.
    let kafka = [
        "log.retention.bytes=200000000",
        "log.segment.bytes=50000000",
    ];
    let mut rig = Rig::start(&[], &kafka).await;
    let mut runs = Runs::create(&options.runs, &rig).await;
    soak::run(&mut rig, &mut runs, minutes).await;
}
