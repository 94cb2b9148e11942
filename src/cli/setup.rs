//! `postbox setup`.

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};
use postbox::setup::{self, Backfill, Reading, SetupOptions, Width};

use super::arguments::{ContractArguments, DatabaseArguments, ModeArgument};

/// Creates, upgrades or checks what postbox needs in the database.
///
/// That is: the schema with its tables and functions, the publication, the replication slot and the
/// relay's checkpoint. It may run any number of times. A slot that once existed and is gone is never
/// made again: events committed in between would be lost without a word.
#[derive(Debug, Args)]
pub(super) struct SetupCommand {
    #[command(flatten)]
    database: DatabaseArguments,

    #[command(flatten)]
    contract: ContractArguments,

    /// How the relay is to read events. What was set up for one way is changed to the other without
    /// losing any: stop the relay first. Without it, as it was set up; at first from a slot.
    #[arg(long, env = "POSTBOX_MODE", value_name = "MODE")]
    mode: Option<ModeArgument>,

    /// Whether a trigger wakes a relay that polls as soon as events are committed; true or false.
    /// Without it that stays as it is. Commits that notify wait for each other.
    #[arg(long, env = "POSTBOX_NOTIFY", value_parser = BoolishValueParser::new(), value_name = "BOOL")]
    notify: Option<bool>,

    /// Make the outbox partitioned by created_at, in UTC, before anybody writes to it; relays keep
    /// partitions made ahead, a week or a day. Of one that is partitioned, the width of partitions to
    /// come. Without it that stays as it is.
    #[arg(long, env = "POSTBOX_PARTITIONED", value_name = "BY")]
    partitioned: Option<WidthArgument>,

    /// Take over an outbox that came from another cluster, with a dump: what was not published there is
    /// published here. Writers wait meanwhile. The variable is true or false.
    #[arg(long, env = "POSTBOX_ADOPT", value_parser = BoolishValueParser::new())]
    adopt: bool,

    /// Print the SQL for a database administrator instead of running it. The variable is true or
    /// false.
    #[arg(long, env = "POSTBOX_PRINT", value_parser = BoolishValueParser::new())]
    print: bool,

    /// Grant an existing role exactly what `postbox relay` needs; 1 to 63 bytes.
    #[arg(long, env = "POSTBOX_GRANT_TO", value_name = "ROLE")]
    grant_to: Option<String>,

    /// Grant an existing role what an application needs to write events; 1 to 63 bytes.
    #[arg(long, env = "POSTBOX_GRANT_WRITER_TO", value_name = "ROLE")]
    grant_writer_to: Option<String>,

    /// Grant an existing role what `postbox parked`, `postbox cancel` and `postbox inbox list`, `show`,
    /// `retry` and `skip` need, and the right to see payloads of what waits; 1 to 63 bytes.
    #[arg(long, env = "POSTBOX_GRANT_OPERATOR_TO", value_name = "ROLE")]
    grant_operator_to: Option<String>,
    /// Grant an existing role what `postbox cleanup` needs, but for --forget; 1 to 63 bytes. For a relay
    /// that cleans up, its role again.
    #[arg(long, env = "POSTBOX_GRANT_CLEANUP_TO", value_name = "ROLE")]
    grant_cleanup_to: Option<String>,

    /// Grant an existing role what `postbox inbox` needs; 1 to 63 bytes. What its handler writes is for
    /// you to grant.
    #[arg(long, env = "POSTBOX_GRANT_INBOX_TO", value_name = "ROLE")]
    grant_inbox_to: Option<String>,

    /// Grant an existing role what an application needs to handle messages by itself: inbox_claim,
    /// inbox_done and inbox_fail; 1 to 63 bytes.
    #[arg(long, env = "POSTBOX_GRANT_HANDLER_TO", value_name = "ROLE")]
    grant_handler_to: Option<String>,

    /// What to do with events that were committed before. Without it, setup stops if there are any.
    #[arg(long, env = "POSTBOX_BACKFILL", value_name = "WHICH")]
    backfill: Option<BackfillArgument>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum BackfillArgument {
    /// Leave them unpublished.
    None,
    /// Publish them first.
    Pending,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum WidthArgument {
    /// A partition for each day.
    Day,
    /// A partition for each hour.
    Hour,
}

impl SetupCommand {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let contract = self.contract.resolve()?;
        let options = SetupOptions {
            relay_role: self.grant_to.clone(),
            writer_role: self.grant_writer_to.clone(),
            operator_role: self.grant_operator_to.clone(),
            cleanup_role: self.grant_cleanup_to.clone(),
            inbox_role: self.grant_inbox_to.clone(),
            handler_role: self.grant_handler_to.clone(),
            mode: match self.mode {
                None => Reading::AsItWas,
                Some(mode) => Option::from(mode).map_or(Reading::Auto, Reading::By),
            },
            backfill: match self.backfill {
                None => Backfill::Refuse,
                Some(BackfillArgument::None) => Backfill::None,
                Some(BackfillArgument::Pending) => Backfill::Pending,
            },
            adopt: self.adopt,
            notify: self.notify,
            partitioned: self.partitioned.map(|width| match width {
                WidthArgument::Day => Width::Day,
                WidthArgument::Hour => Width::Hour,
            }),
        };
        if self.print {
            print!("{}", setup::print_sql(&contract, &options)?);
            return Ok(());
        }
        let database = self.database.resolve()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let report = runtime.block_on(setup::setup(&database, &contract, &options))?;
        print!("{report}");
        Ok(())
    }
}
