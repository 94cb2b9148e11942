//! `postbox cleanup`.

use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{Args, value_parser};
use postbox::cleanup::{self, CleanupOptions};
use postbox::contract::Contract;

use super::arguments::{DatabaseArguments, TableArguments};
use super::quantity::time;

/// Removes published events from the outbox, and what else nobody needs any more.
///
/// An event goes once it is older than the retention and every relay of the outbox has it behind it; one
/// that waits, or is given up and not decided upon, stays. So do all while a relay has not been seen for
/// longer than the retention, and than a minute, or the publication was changed. Of the other tables go: decisions to skip
/// an event, cancellations, and idempotency keys, which are free again then. Of the tables of omni-box and
/// spakky, rows published long ago go, and claims of workers that died are given back.
///
/// It works in short transactions, which no writer waits for, and may run at any time, also as part of a
/// relay: see `postbox help relay`. A TIME is a whole number of ms, s, m, h or d.
#[derive(Debug, Args)]
#[command(override_usage = USAGE)]
pub(super) struct CleanupCommand {
    #[command(flatten)]
    database: DatabaseArguments,

    /// The schema that holds the outbox; 1 to 63 bytes.
    #[arg(
        long,
        env = "POSTBOX_SCHEMA",
        default_value = "postbox",
        value_name = "NAME"
    )]
    schema: String,

    #[command(flatten)]
    table: TableArguments,

    /// The retention: how long events are kept, by their created_at; 1s to 3650d. It should be longer than
    /// anything is tried again with its idempotency key.
    #[arg(
        long,
        env = "POSTBOX_OLDER_THAN",
        required_unless_present = "forget",
        value_parser = time(OLDER_THAN_MIN..=OLDER_THAN_MAX),
        value_name = "TIME"
    )]
    older_than: Option<Duration>,

    /// Forget this relay first, which is gone for good: what it has not published no longer stays for it.
    /// It must not be at work, nor have parked events that were neither sent, skipped nor cancelled; a slot
    /// that it leaves is to be dropped by hand.
    #[arg(long, env = "POSTBOX_FORGET", value_name = "RELAY")]
    forget: Option<String>,

    /// Only say what would be removed. The variable is true or false.
    #[arg(long, env = "POSTBOX_DRY_RUN", value_parser = BoolishValueParser::new())]
    dry_run: bool,

    /// How many rows a transaction looks at; 100 to 100000.
    #[arg(
        long,
        env = "POSTBOX_BATCH",
        default_value_t = cleanup::BATCH,
        value_parser = value_parser!(u32).range(100..=100_000),
        value_name = "ROWS"
    )]
    batch: u32,

    /// After how long to stop, done or not; 1s to 30d. The next run goes on.
    #[arg(
        long,
        env = "POSTBOX_TIMEOUT",
        default_value = "1h",
        value_parser = time(Duration::from_secs(1)..=Duration::from_secs(30 * 86_400)),
        value_name = "TIME"
    )]
    timeout: Duration,

    /// Of the tables of omni-box and spakky: after how long a claim that is not renewed is given back, as
    /// their workers and our relays are set; 15s to 1h.
    #[arg(
        long,
        env = "POSTBOX_STALE_AFTER",
        default_value = "300s",
        value_parser = time(Duration::from_secs(15)..=Duration::from_secs(3600)),
        value_name = "TIME"
    )]
    stale_after: Duration,
}

/// Which of the two flags can stand alone, clap's own would not say.
const USAGE: &str = "postbox cleanup [OPTIONS] --older-than <TIME>
       postbox cleanup [OPTIONS] --forget <RELAY> [--older-than <TIME>]";

/// The limits of a retention.
pub(super) const OLDER_THAN_MIN: Duration = Duration::from_secs(1);
pub(super) const OLDER_THAN_MAX: Duration = Duration::from_secs(3650 * 86_400);

/// How long to wait for another cleanup, or for a set-up.
const PATIENCE: Duration = Duration::from_secs(10);

impl CleanupCommand {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let names = Contract::default();
        let table = self.table.resolve(&self.schema)?;
        let contract =
            Contract::new(&self.schema, names.slot, names.publication)?.reading(table)?;
        let database = self.database.resolve()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        if let Some(relay) = &self.forget {
            if self.dry_run {
                let message = "--forget fights --dry-run: say one of them";
                return Err(postbox::Error::new(postbox::ErrorKind::Settings, message).into());
            }
            print!(
                "{}",
                runtime.block_on(cleanup::forget(&database, &contract, relay))?
            );
        }
        if let Some(older_than) = self.older_than {
            let options = CleanupOptions {
                older_than,
                batch: self.batch,
                timeout: self.timeout,
                patience: PATIENCE,
                stale_after: self.stale_after,
                dry_run: self.dry_run,
            };
            let report = runtime.block_on(cleanup::cleanup(&database, &contract, &options))?;
            print!("{report}");
            report.check()?;
        }
        Ok(())
    }
}
