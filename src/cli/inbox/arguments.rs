//! Arguments that several of the commands share.

use clap::{Args, ValueEnum};
use postbox::inbox::stored::{Filter, Status};

use crate::cli::waiting::arguments::AboutArguments;

#[derive(Debug, Args)]
#[command(next_help_heading = "Which messages")]
pub(super) struct FilterArguments {
    /// Messages with these ids, whatever their status.
    #[arg(value_name = "ID")]
    ids: Vec<String>,

    /// Of this consumer group; without it of all.
    #[arg(long, env = "POSTBOX_GROUP", value_name = "NAME")]
    group: Option<String>,

    /// Stored, waiting, dead or skipped; several are parted by commas. Without it, waiting and dead.
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
enum StatusArgument {
    /// For the application, which claims it.
    Stored,
    /// For another try.
    Waiting,
    /// Given up after its attempts.
    Dead,
    /// Given up by a person.
    Skipped,
}

impl FilterArguments {
    pub(super) fn resolve(&self) -> Filter {
        let status = |status: &StatusArgument| match status {
            StatusArgument::Stored => Status::Stored,
            StatusArgument::Waiting => Status::Waiting,
            StatusArgument::Dead => Status::Dead,
            StatusArgument::Skipped => Status::Skipped,
        };
        Filter {
            ids: self.ids.clone(),
            group: self.group.clone(),
            statuses: self.status.iter().map(status).collect(),
            topic: self.about.topic.clone(),
            key: self.about.key.clone(),
            event_type: self.about.event_type.clone(),
            error: self.about.error.clone(),
            older_than: self.about.older_than,
        }
    }
}
