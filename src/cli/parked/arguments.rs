//! Arguments that several of the commands share.

use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};
use postbox::contract::Contract;
use postbox::database::Database;
use postbox::parked::{Filter, Status};

use crate::cli::arguments::{DatabaseArguments, SchemaArguments};
use crate::cli::quantity;

#[derive(Debug, Args)]
#[command(next_help_heading = "Which events")]
pub(super) struct FilterArguments {
    /// Events with these ids, whatever their status.
    #[arg(value_name = "ID")]
    ids: Vec<String>,

    /// Of this relay, by the name of its slot; without it of all.
    #[arg(long, env = "POSTBOX_RELAY", value_name = "NAME")]
    relay: Option<String>,

    /// Scheduled, waiting, dead or skipped; several are parted by commas. Without it, waiting and dead.
    #[arg(
        long,
        env = "POSTBOX_STATUS",
        value_delimiter = ',',
        value_name = "STATUS"
    )]
    status: Vec<StatusArgument>,

    /// For this topic.
    #[arg(long, env = "POSTBOX_TOPIC", value_name = "NAME")]
    topic: Option<String>,

    /// Of this record key.
    #[arg(long, env = "POSTBOX_KEY", value_name = "TEXT")]
    key: Option<String>,

    /// Of this event type.
    #[arg(long = "type", env = "POSTBOX_TYPE", value_name = "NAME")]
    event_type: Option<String>,

    /// Whose last error has this text in it, upper and lower case as they are.
    #[arg(long, env = "POSTBOX_ERROR", value_name = "TEXT")]
    error: Option<String>,

    /// That were parked at least so long ago; 1s to 3650d.
    #[arg(
        long,
        env = "POSTBOX_OLDER_THAN",
        value_parser = quantity::time(Duration::from_secs(1)..=Duration::from_secs(3650 * 86_400)),
        value_name = "TIME"
    )]
    older_than: Option<Duration>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum StatusArgument {
    /// For their time.
    Scheduled,
    /// For another try.
    Waiting,
    /// Given up after their attempts.
    Dead,
    /// Given up by a person.
    Skipped,
}

impl FilterArguments {
    pub(super) fn resolve(&self) -> Filter {
        let status = |status: &StatusArgument| match status {
            StatusArgument::Scheduled => Status::Scheduled,
            StatusArgument::Waiting => Status::Waiting,
            StatusArgument::Dead => Status::Dead,
            StatusArgument::Skipped => Status::Skipped,
        };
        Filter {
            ids: self.ids.clone(),
            relay: self.relay.clone(),
            statuses: self.status.iter().map(status).collect(),
            topic: self.topic.clone(),
            key: self.key.clone(),
            event_type: self.event_type.clone(),
            error: self.error.clone(),
            older_than: self.older_than,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct PlaceArguments {
    #[command(flatten)]
    database: DatabaseArguments,

    #[command(flatten)]
    schema: SchemaArguments,
}

impl PlaceArguments {
    pub(super) fn resolve(&self) -> postbox::Result<(Database, Contract)> {
        let contract = self.schema.resolve()?;
        Ok((self.database.resolve()?, contract))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    /// For people.
    Table,
    /// A JSON object a line; times in RFC 3339, UTC.
    Json,
}

#[derive(Debug, Args)]
pub(super) struct OutputArguments {
    /// How the events are written.
    #[arg(
        long,
        env = "POSTBOX_OUTPUT",
        default_value = "table",
        value_name = "FORMAT"
    )]
    pub(super) output: Output,
}

#[derive(Debug, Args)]
pub(super) struct PayloadArguments {
    /// Show payloads too, the application's headers, and every column that may be one of them. The
    /// variable is true or false.
    #[arg(long, env = "POSTBOX_PAYLOAD", value_parser = BoolishValueParser::new())]
    pub(super) payload: bool,
}
