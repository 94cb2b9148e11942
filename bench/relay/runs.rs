//! The file of runs: a line for the machine, then one for each run.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::rig::{self, Rig};

/// Where and with what the runs of a file were made.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_gb: f64,
    pub(crate) kernel: String,
    /// Of programs, by name.
    pub(crate) versions: BTreeMap<String, String>,
    pub(crate) date: String,
    /// How the harness was called.
    pub(crate) command: String,
}

/// What one run of one carrier gave.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Run {
    /// Such as `drain`.
    pub(crate) measure: String,
    /// Such as `100 rows a transaction`.
    pub(crate) load: String,
    pub(crate) carrier: String,
    pub(crate) trial: u32,
    /// By name, with the unit at its end.
    pub(crate) figures: BTreeMap<String, f64>,
}

impl Run {
    pub(crate) fn new(measure: &str, load: &str, carrier: &str, trial: u32) -> Self {
        Self {
            measure: measure.to_owned(),
            load: load.to_owned(),
            carrier: carrier.to_owned(),
            trial,
            figures: BTreeMap::new(),
        }
    }

    pub(crate) fn set(&mut self, figure: &str, value: f64) {
        // To a thousandth: more is noise.
        let value = (value * 1e3).round() / 1e3;
        self.figures.insert(figure.to_owned(), value);
    }
}

/// A file that takes its name once it is whole.
pub(crate) struct Runs {
    file: File,
    partial: PathBuf,
    path: PathBuf,
}

impl Runs {
    pub(crate) async fn create(path: &Path, rig: &Rig) -> Self {
        let partial = path.with_extension("partial");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut runs = Self {
            file: File::create(&partial).unwrap(),
            partial,
            path: path.to_owned(),
        };
        runs.write(&Machine::this(rig).await);
        runs
    }

    pub(crate) fn finish(self) {
        std::fs::rename(&self.partial, &self.path).unwrap();
    }

    pub(crate) fn add(&mut self, run: &Run) {
        eprintln!(
            "{} {}, {}, {}: {:.1?}",
            run.measure, run.trial, run.load, run.carrier, run.figures
        );
        self.write(run);
    }

    fn write<T: Serialize>(&mut self, line: &T) {
        writeln!(self.file, "{}", serde_json::to_string(line).unwrap()).unwrap();
    }
}

impl Machine {
    async fn this(rig: &Rig) -> Self {
        let postgres = "SELECT split_part(version(), ' on ', 1)";
        let postgres = rig.client.query_one(postgres, &[]).await.unwrap().get(0);
        let pom = std::fs::read_to_string(rig::home().join("dev/pom.xml")).unwrap();
        let of_pom = |name: &str| {
            let (_, rest) = pom.split_once(&format!("<{name}.version>"))?;
            Some(rest.split_once('<')?.0.to_owned())
        };
        let mut versions = BTreeMap::from([
            ("Postgres".to_owned(), postgres),
            (
                "librdkafka".to_owned(),
                rdkafka::util::get_rdkafka_version().1,
            ),
            (
                "postbox".to_owned(),
                output(rig::postbox().to_str().unwrap(), &["--version"]),
            ),
            (
                "commit".to_owned(),
                output("git", &["describe", "--always", "--dirty"]),
            ),
            ("java".to_owned(), output("java", &["--version"])),
        ]);
        if let Some(program) = rig::pg_recvlogical() {
            let version = output(program.to_str().unwrap(), &["--version"]);
            versions.insert("pg_recvlogical".to_owned(), version);
        }
        for name in ["kafka", "debezium"] {
            versions.extend(of_pom(name).map(|version| (name.to_owned(), version)));
        }
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let model = cpu
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let memory = std::fs::read_to_string("/proc/meminfo").unwrap();
        let kibibytes = memory.split_whitespace().nth(1).unwrap();
        Self {
            cpu: model.map_or("unknown", |(_, model)| model).to_owned(),
            cores: std::thread::available_parallelism().unwrap().get(),
            memory_gb: (kibibytes.parse::<f64>().unwrap() * 1024.0 / 1e9).round(),
            kernel: output("uname", &["-sr"]),
            versions,
            date: output("date", &["-u", "+%Y-%m-%d %H:%M"]),
            command: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
        }
    }
}

/// The first line of what a program prints.
fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(rig::home())
        .output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    text.unwrap_or_default()
        .lines()
        .next()
        .unwrap_or("unknown")
        .to_owned()
}
