//! Arguments that they share.

use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum, value_parser};
use postbox::contract::Contract;
use postbox::database::Database;
use postbox::{Error, ErrorKind};

use super::decider;
use crate::cli::arguments::{DatabaseArguments, SchemaArguments};
use crate::cli::quantity;

/// What a row is about.
// Under the heading of those that it stands among.
#[derive(Debug, Args)]
pub(in crate::cli) struct AboutArguments {
    /// Of this topic.
    #[arg(long, env = "POSTBOX_TOPIC", value_name = "NAME")]
    pub(in crate::cli) topic: Option<String>,

    /// Of this record key.
    #[arg(long, env = "POSTBOX_KEY", value_name = "TEXT")]
    pub(in crate::cli) key: Option<String>,

    /// Of this event type.
    #[arg(long = "type", env = "POSTBOX_TYPE", value_name = "NAME")]
    pub(in crate::cli) event_type: Option<String>,

    /// Whose last error has this text in it, upper and lower case as they are.
    #[arg(long, env = "POSTBOX_ERROR", value_name = "TEXT")]
    pub(in crate::cli) error: Option<String>,

    /// That have been there for at least so long; 1s to 3650d.
    #[arg(
        long,
        env = "POSTBOX_OLDER_THAN",
        value_parser = quantity::time(Duration::from_secs(1)..=Duration::from_secs(3650 * 86_400)),
        value_name = "TIME"
    )]
    pub(in crate::cli) older_than: Option<Duration>,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct PlaceArguments {
    #[command(flatten)]
    database: DatabaseArguments,

    #[command(flatten)]
    schema: SchemaArguments,
}

impl PlaceArguments {
    pub(in crate::cli) fn resolve(&self) -> postbox::Result<(Database, Contract)> {
        let contract = self.schema.resolve()?;
        Ok((self.database.resolve()?, contract))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum Output {
    /// For people.
    Table,
    /// A JSON object a line; times in RFC 3339, UTC.
    Json,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct OutputArguments {
    /// How the results are written.
    #[arg(
        long,
        env = "POSTBOX_OUTPUT",
        default_value = "table",
        value_name = "FORMAT"
    )]
    pub(in crate::cli) output: Output,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct PayloadArguments {
    /// Show payloads too, the application's headers, and every column that may be one of them. The
    /// variable is true or false.
    #[arg(long, env = "POSTBOX_PAYLOAD", value_parser = BoolishValueParser::new())]
    pub(in crate::cli) payload: bool,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct LimitArguments {
    /// How many are listed at most; 1 to 1000000. How many more there are is said.
    #[arg(
        long,
        env = "POSTBOX_LIMIT",
        default_value_t = 100,
        value_parser = value_parser!(u32).range(1..=1_000_000),
        value_name = "ROWS"
    )]
    pub(in crate::cli) limit: u32,
}

/// Of a decision.
#[derive(Debug, Args)]
pub(in crate::cli) struct DecidingArguments {
    /// Decide about all that wait or are dead, where no flag says which. The variable is true or false.
    #[arg(long, env = "POSTBOX_ALL", value_parser = BoolishValueParser::new())]
    all: bool,

    /// Change nothing, and say what would be changed. The variable is true or false.
    #[arg(long, env = "POSTBOX_DRY_RUN", value_parser = BoolishValueParser::new())]
    pub(in crate::cli) dry_run: bool,

    /// Who decides: kept with what is decided about. Without it, the operating system's user and host, and
    /// the database's role.
    #[arg(long, env = "POSTBOX_BY", value_name = "TEXT")]
    by: Option<String>,

    #[command(flatten)]
    pub(in crate::cli) output: OutputArguments,
}

impl DecidingArguments {
    /// Refuses what would decide about all `rows` without saying so, or name nobody.
    pub(in crate::cli) fn check(&self, has_no_filter: bool, rows: &str) -> postbox::Result<()> {
        let refuse = |message: String| Err(Error::new(ErrorKind::Settings, message));
        if has_no_filter && !self.all {
            return refuse(format!(
                "say which {rows}: ids, a flag such as --topic or --status, or --all"
            ));
        }
        if self.by.as_ref().is_some_and(|by| by.trim().is_empty()) {
            let message =
                "--by: say who decides, or leave it out; it is what others will find with it";
            return refuse(message.to_owned());
        }
        Ok(())
    }

    /// Who decides.
    pub(in crate::cli) fn by(&self, place: &PlaceArguments) -> postbox::Result<String> {
        let (database, _) = place.resolve()?;
        Ok(self.by.clone().unwrap_or_else(|| decider(&database)))
    }
}
