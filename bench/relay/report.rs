//! Tables of what the runs gave: of each figure the median, the least and the most.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::picture;
use crate::runs::{Machine, Run};

pub(crate) struct Runs {
    pub(crate) machine: Machine,
    pub(crate) runs: Vec<Run>,
}

pub(crate) fn print(files: &[PathBuf], picture: Option<&Path>) {
    for (number, file) in files.iter().enumerate() {
        let runs = Runs::read(file);
        println!("{}", runs.tables());
        if let (0, Some(picture)) = (number, picture) {
            std::fs::write(picture, picture::draw(&runs)).unwrap();
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
    ("peak_mb", "peak memory, MB"),
    ("memory_mb", "memory, MB"),
    ("first_record_ms", "first record, ms"),
    ("cpu_percent_of_a_core", "CPU, % of a core"),
    ("other_cores", "other load, cores"),
    ("p50_ms", "p50, ms"),
    ("p90_ms", "p90, ms"),
    ("p99_ms", "p99, ms"),
    ("max_ms", "max, ms"),
];

/// What is held against what, trial by trial: a measure, a figure, and two carriers.
const RATIOS: &[(&str, &str, &str, &str)] = &[
    (
        "drain",
        "events_per_second",
        "postbox, Unix socket",
        "pg_recvlogical, Unix socket",
    ),
    (
        "drain",
        "events_per_second",
        "postbox, TCP",
        "pg_recvlogical, TCP",
    ),
    (
        "drain",
        "events_per_second",
        "postbox, TCP",
        "Debezium, tuned",
    ),
    (
        "drain",
        "second_half_per_second",
        "postbox, TCP",
        "Debezium, tuned",
    ),
    (
        "drain",
        "events_per_second",
        "postbox, TCP",
        "Debezium, tuned plus",
    ),
    (
        "drain",
        "second_half_per_second",
        "postbox, TCP",
        "Debezium, tuned plus",
    ),
    ("drain", "events_per_second", "postbox, TCP", "omni-box"),
    (
        "latency",
        "p50_ms",
        "postbox, Unix socket",
        "producer to consumer, no Postgres",
    ),
    (
        "latency",
        "p99_ms",
        "postbox, Unix socket",
        "producer to consumer, no Postgres",
    ),
    (
        "latency",
        "p50_ms",
        "postbox, TCP",
        "producer to consumer, no Postgres",
    ),
    (
        "latency",
        "p99_ms",
        "postbox, TCP",
        "producer to consumer, no Postgres",
    ),
];

impl Runs {
    pub(crate) fn read(file: &Path) -> Self {
        let text = std::fs::read_to_string(file);
        let text = text.unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let mut lines = text.lines();
        let machine = serde_json::from_str(lines.next().expect("a line for the machine")).unwrap();
        let runs = lines.map(|line| serde_json::from_str(line).unwrap());
        Self {
            machine,
            runs: runs.collect(),
        }
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

    fn ratios(&self, measure: &str) -> String {
        let mut text = String::new();
        let mut loads: Vec<&str> = self.rows(measure).iter().map(|(load, _)| *load).collect();
        loads.dedup();
        for (_, figure, of, to) in RATIOS.iter().filter(|(of, ..)| *of == measure) {
            for load in &loads {
                let (ours, theirs) = (
                    self.figures(measure, load, of, figure),
                    self.figures(measure, load, to, figure),
                );
                let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a / b).collect();
                if !ratios.is_empty() {
                    let figure = HEADS
                        .iter()
                        .find(|(name, _)| name == figure)
                        .map_or(*figure, |(_, head)| head);
                    text += &format!("- {load}, {figure}: {of} to {to}: {}\n", spread(ratios));
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
