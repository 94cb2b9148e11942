//! Tables of what the runs gave: of each figure the median, the least and the most.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::carrier::{Carrier, Way};
use crate::latency::FLOOR;
use crate::picture;
use crate::runs::{Machine, Run};

pub(crate) struct Runs {
    pub(crate) machine: Machine,
    pub(crate) runs: Vec<Run>,
}

pub(crate) fn print(files: &[PathBuf]) {
    for file in files {
        let runs = Runs::read(file);
        println!("{}", runs.tables());
        if let Some(picture) = picture::draw(&runs) {
            std::fs::write(file.with_extension("svg"), picture).unwrap();
        }
    }
}

/// Heads of columns, for figures that have another than their name.
const HEADS: &[(&str, &str)] = &[
    ("events_per_second", "events/s"),
    ("second_half_per_second", "second half, events/s"),
    ("relay_us_per_event", "relay, CPU µs/event"),
    ("walsender_us_per_event", "walsender, µs"),
    ("broker_us_per_event", "broker, µs"),
    ("postgres_us_per_event", "Postgres, µs"),
    ("peak_mb", "peak memory, MB"),
    ("memory_mb", "memory, MB"),
    ("first_record_ms", "first record, ms"),
    ("cpu_percent_of_a_core", "CPU, % of a core"),
    ("other_cores", "other load, cores"),
    ("p50_ms", "p50, ms"),
    ("p90_ms", "p90, ms"),
    ("p99_ms", "p99, ms"),
    ("max_ms", "max, ms"),
    (
        "before_commit_returned_percent",
        "before COMMIT returned, %",
    ),
    ("written_per_second", "written/s"),
    ("rows_gone_per_second", "old rows gone/s"),
    ("had_work_to_the_end", "cleanup had work to the end"),
    ("repeated", "repeated by a kill"),
    ("no_new_event_s", "no new event, s"),
    ("events_behind", "events behind"),
    ("wal_behind_mb", "WAL kept, MB"),
    ("cpu_before_first_s", "CPU before the first, s"),
];

/// What is held against what, trial by trial: a measure, a figure, and two carriers.
const RATIOS: &[(&str, &str, &str, &str)] = &[
    (
        "drain",
        "events_per_second",
        SOCKET,
        "pg_recvlogical, Unix socket",
    ),
    ("drain", "events_per_second", TCP, "pg_recvlogical, TCP"),
    ("drain", "events_per_second", TCP, "Debezium, tuned"),
    ("drain", "second_half_per_second", TCP, "Debezium, tuned"),
    ("drain", "events_per_second", TCP, "Debezium, tuned plus"),
    (
        "drain",
        "second_half_per_second",
        TCP,
        "Debezium, tuned plus",
    ),
    ("drain", "events_per_second", TCP, "omni-box"),
    ("latency", "p50_ms", SOCKET, FLOOR),
    ("latency", "p99_ms", SOCKET, FLOOR),
    ("latency", "p50_ms", TCP, FLOOR),
    ("latency", "p99_ms", TCP, FLOOR),
];

/// The columns of the one table that has all carriers: a measure, a load if there are
/// several, a figure, and the column's head.
const SUMMARY: &[(&str, &str, &str, &str)] = &[
    ("drain", "", "events_per_second", "drain, events/s"),
    ("drain", "", "second_half_per_second", "its second half"),
    ("drain", "", "relay_us_per_event", "CPU µs/event"),
    ("drain", "", "postgres_us_per_event", "of Postgres"),
    ("drain", "", "broker_us_per_event", "of the broker"),
    ("drain", "", "peak_mb", "peak memory, MB"),
    ("start", "", "first_record_ms", "start to first record, ms"),
    ("latency", "20 events/s", "p50_ms", "20/s: p50, ms"),
    ("latency", "20 events/s", "p99_ms", "p99, ms"),
    ("latency", "1000 events/s", "p50_ms", "1,000/s: p50, ms"),
    ("latency", "1000 events/s", "p99_ms", "p99, ms"),
    ("idle", "", "cpu_percent_of_a_core", "idle, % of a core"),
    ("idle", "", "memory_mb", "idle, MB"),
    ("crash", "", "repeated", "repeated by kill -9"),
    ("crash", "", "no_new_event_s", "no new event after it, s"),
];

const SOCKET: &str = Carrier::Postbox(Way::Socket).name();
const TCP: &str = Carrier::Postbox(Way::Tcp).name();

impl Runs {
    pub(crate) fn read(file: &Path) -> Self {
        Self::try_read(file).unwrap_or_else(|error| {
            eprintln!("error: {} is not a file of runs: {error}", file.display());
            std::process::exit(2);
        })
    }

    fn try_read(file: &Path) -> std::io::Result<Self> {
        let text = std::fs::read_to_string(file)?;
        let mut lines = text.lines();
        let machine = serde_json::from_str(lines.next().unwrap_or_default())?;
        let runs = lines.map(serde_json::from_str);
        Ok(Self {
            machine,
            runs: runs.collect::<Result<_, _>>()?,
        })
    }

    /// The figure in all trials, in their order.
    pub(crate) fn figures(
        &self,
        measure: &str,
        load: &str,
        carrier: &str,
        figure: &str,
    ) -> Vec<f64> {
        let runs = self
            .runs
            .iter()
            .filter(|run| run.measure == measure && run.load == load && run.carrier == carrier);
        runs.filter_map(|run| run.figures.get(figure).copied())
            .collect()
    }

    /// What is told apart in the runs of a measure, in the order of the runs.
    pub(crate) fn rows(&self, measure: &str) -> Vec<(&str, &str)> {
        let mut rows = Vec::new();
        for run in self.runs.iter().filter(|run| run.measure == measure) {
            let row = (run.load.as_str(), run.carrier.as_str());
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
        // All carriers of a load together.
        let loads: Vec<&str> = rows.iter().map(|(load, _)| *load).collect();
        rows.sort_by_key(|(load, _)| loads.iter().position(|other| other == load));
        rows
    }

    fn tables(&self) -> String {
        let machine = &self.machine;
        let versions: Vec<String> = machine
            .versions
            .iter()
            .map(|(name, version)| format!("{name} {version}"))
            .collect();
        let mut text = format!(
            "{}, {} cores, {} GB, {}; {}. {} UTC, `{}`.\n",
            machine.cpu,
            machine.cores,
            machine.memory_gb,
            machine.kernel,
            versions.join(", "),
            machine.date,
            machine.command,
        );
        if self.runs.iter().any(|run| run.measure == "crash") {
            text += &self.summary();
        }
        let mut measures = Vec::new();
        for run in &self.runs {
            if !measures.contains(&run.measure.as_str()) {
                measures.push(&run.measure);
            }
        }
        for measure in measures {
            text += &self.table(measure);
            text += &self.ratios(measure);
        }
        text
    }

    fn table(&self, measure: &str) -> String {
        let runs = self.runs.iter().filter(|run| run.measure == measure);
        let all: BTreeMap<&str, ()> = runs
            .flat_map(|run| run.figures.keys())
            .map(|f| (f.as_str(), ()))
            .collect();
        // In the order of the heads, and what has none behind them.
        let place = |figure: &str| HEADS.iter().position(|(name, _)| *name == figure);
        let mut figures: Vec<&str> = all.into_keys().collect();
        figures.sort_by_key(|figure| place(figure).unwrap_or(HEADS.len()));
        let heads = figures.iter().map(|figure| match place(figure) {
            Some(at) => HEADS[at].1.to_owned(),
            None => figure.replace('_', " "),
        });
        let mut text = format!(
            "\n**{measure}**\n\n| load | | {} |\n",
            heads.collect::<Vec<_>>().join(" | ")
        );
        text += &format!("|---|---|{}\n", "---|".repeat(figures.len()));
        for (load, carrier) in self.rows(measure) {
            let cells = figures
                .iter()
                .map(|figure| spread(self.figures(measure, load, carrier, figure)));
            text += &format!(
                "| {load} | {carrier} | {} |\n",
                cells.collect::<Vec<_>>().join(" | ")
            );
        }
        text
    }

    /// A line for each carrier, of medians.
    fn summary(&self) -> String {
        let heads: Vec<&str> = SUMMARY.iter().map(|(.., head)| *head).collect();
        let mut text = format!(
            "\n| | {} |\n|---|{}\n",
            heads.join(" | "),
            "---|".repeat(heads.len())
        );
        let mut carriers: Vec<&str> = Vec::new();
        for run in &self.runs {
            if !carriers.contains(&run.carrier.as_str()) && run.carrier != FLOOR {
                carriers.push(&run.carrier);
            }
        }
        for carrier in carriers {
            let cells = SUMMARY.iter().map(|(measure, load, figure, _)| {
                let mut rows = self.rows(measure).into_iter();
                let row = rows.find(|(of, who)| *who == carrier && (load.is_empty() || of == load));
                let figures = row.map(|(load, _)| self.figures(measure, load, carrier, figure));
                figures.and_then(median).map_or("-".to_owned(), short)
            });
            let cells: Vec<String> = cells.collect();
            text += &format!("| {carrier} | {} |\n", cells.join(" | "));
        }
        text
    }

    fn ratios(&self, measure: &str) -> String {
        let mut text = String::new();
        let mut loads: Vec<&str> = self.rows(measure).iter().map(|(load, _)| *load).collect();
        loads.dedup();
        for (_, figure, of, to) in RATIOS.iter().filter(|(of, ..)| *of == measure) {
            for load in &loads {
                // omni-box has a backlog of its own.
                let rows = self.rows(measure);
                let at_all = rows.iter().find(|(_, carrier)| carrier == to);
                let same = rows.iter().find(|row| **row == (*load, *to));
                let Some((their_load, _)) = same.or(at_all) else {
                    continue;
                };
                let (ours, theirs) = (
                    self.figures(measure, load, of, figure),
                    self.figures(measure, their_load, to, figure),
                );
                let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a / b).collect();
                if !ratios.is_empty() {
                    let figure = HEADS
                        .iter()
                        .find(|(name, _)| name == figure)
                        .map_or(*figure, |(_, head)| head);
                    let theirs = match their_load == load {
                        true => String::new(),
                        false => format!(" with {their_load}"),
                    };
                    let ratios = spread(ratios);
                    text += &format!("- {load}, {figure}: {of} to {to}{theirs}: {ratios}\n");
                }
            }
        }
        match text.is_empty() {
            true => text,
            false => format!("\n{text}"),
        }
    }
}

pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len().checked_sub(1)? / 2;
    match values.len() % 2 {
        0 => Some((values[middle] + values[middle + 1]) / 2.0),
        _ => Some(values[middle]),
    }
}

/// The median, the least and the most.
fn spread(values: Vec<f64>) -> String {
    let least = values.iter().copied().fold(f64::INFINITY, f64::min);
    let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    match median(values) {
        None => "-".to_owned(),
        Some(median) if least == most => short(median),
        Some(median) => format!("**{}** ({}-{})", short(median), short(least), short(most)),
    }
}

/// Three digits that mean something.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        size if size >= 10_000.0 => format!("{:.0}k", value / 1e3),
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}
