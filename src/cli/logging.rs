//! Logs go to stderr; stdout is for results.

use std::io::IsTerminal;

use clap::{Args, ValueEnum};
use postbox::{Error, ErrorKind};
use tracing_subscriber::EnvFilter;

#[derive(Debug, Args)]
#[command(next_help_heading = "Logs")]
pub(super) struct LogArguments {
    /// How log lines look.
    #[arg(
        long,
        global = true,
        env = "POSTBOX_LOG_FORMAT",
        default_value = "text",
        value_name = "FORMAT"
    )]
    log_format: Format,

    /// What is logged: error, warn, info, debug or trace. RUST_LOG wins. Never a payload.
    #[arg(
        long,
        global = true,
        env = "POSTBOX_LOG_LEVEL",
        default_value = "info",
        value_name = "LEVEL"
    )]
    log_level: tracing::Level,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    /// A line for people.
    Text,
    /// A JSON object a line.
    Json,
}

/// Libraries that log each failure themselves, which we report once and sorted.
const SILENT: &str = "librdkafka=off,rdkafka=off,pgwire_replication=off";

impl LogArguments {
    /// Whether each line is to be a JSON object.
    pub(super) fn are_json(&self) -> bool {
        matches!(self.log_format, Format::Json)
    }

    pub(super) fn start(&self) -> anyhow::Result<()> {
        let filter = match std::env::var("RUST_LOG") {
            Ok(rules) if !rules.is_empty() => rules,
            _ => format!("{},{SILENT}", self.log_level),
        };
        let filter = EnvFilter::try_new(&filter).map_err(|error| {
            Error::new(ErrorKind::Settings, format!("RUST_LOG={filter}")).caused_by(error)
        })?;
        let lines = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr);
        match self.log_format {
            Format::Text => lines
                .with_ansi(std::io::stderr().is_terminal())
                .with_target(false)
                .init(),
            Format::Json => lines.json().flatten_event(true).init(),
        }
        Ok(())
    }
}
