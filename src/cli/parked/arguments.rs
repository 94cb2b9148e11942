//! Arguments that several of the commands share.

use clap::{Args, ValueEnum};
use postbox::parked::{Filter, Status};

use crate::cli::waiting::arguments::AboutArguments;

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

    #[command(flatten)]
    about: AboutArguments,
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
            topic: self.about.topic.clone(),
            key: self.about.key.clone(),
            event_type: self.about.event_type.clone(),
            error: self.about.error.clone(),
            older_than: self.about.older_than,
        }
    }
}
