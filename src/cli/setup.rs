//! `postbox setup`.

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};
use postbox::setup::{self, SetupOptions};

use super::arguments::{ContractArguments, DatabaseArguments};

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

    /// What to do with events that were committed before the slot exists: none leaves them
    /// unpublished. Without it, setup stops if there are any.
    #[arg(long, env = "POSTBOX_BACKFILL", value_name = "WHICH")]
    backfill: Option<Backfill>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Backfill {
    /// Leave them unpublished.
    None,
}

impl SetupCommand {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let contract = self.contract.resolve()?;
        let options = SetupOptions {
            relay_role: self.grant_to.clone(),
            writer_role: self.grant_writer_to.clone(),
            backfill_none: self.backfill == Some(Backfill::None),
        };
        if self.print {
            print!("{}", setup::print_sql(&contract, &options));
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
