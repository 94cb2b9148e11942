//! `postbox recover`.

use clap::Args;
use clap::builder::BoolishValueParser;
use postbox::setup::{self, Missed};

use super::arguments::{ContractArguments, DatabaseArguments};

/// Makes a replication slot that was lost anew, without losing events.
///
/// For a slot that was dropped, invalidated, left behind by a fail-over, or hidden from by a change of
/// the publication. Events committed since the last checkpoint are still in the outbox: the relay that
/// starts next sends them first, and then reads the new slot. Those delivered since that checkpoint,
/// within one heartbeat interval if the relay kept up, are sent again. It changes nothing where nothing
/// is lost, and may run any number of times.
#[derive(Debug, Args)]
pub(super) struct RecoverCommand {
    #[command(flatten)]
    database: DatabaseArguments,

    #[command(flatten)]
    contract: ContractArguments,

    /// Leave the events committed since the last checkpoint unpublished, and say how many they are. The
    /// variable is true or false.
    #[arg(long, env = "POSTBOX_SKIP_MISSED", value_parser = BoolishValueParser::new())]
    skip_missed: bool,

    /// Of another library's table, which does not say what is missing: send all rows first that are not
    /// marked published. The variable is true or false.
    #[arg(long, env = "POSTBOX_RESEND", value_parser = BoolishValueParser::new(), conflicts_with = "skip_missed")]
    resend: bool,
}

impl RecoverCommand {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        let contract = self.contract.resolve()?;
        let database = self.database.resolve()?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let missed = match (self.skip_missed, self.resend) {
            (true, _) => Missed::Skip,
            (_, true) => Missed::Resend,
            _ => Missed::Send,
        };
        let report = runtime.block_on(setup::recover(&database, &contract, missed))?;
        print!("{report}");
        Ok(())
    }
}
