//! The command line: the only user of clap and anyhow.

mod arguments;
mod cancel;
mod cleanup;
mod completions;
#[cfg(feature = "demo")]
mod demo;
mod inbox;
mod logging;
mod parked;
mod quantity;
mod recover;
mod relay;
mod service;
mod setup;
mod waiting;

use std::panic::{self, AssertUnwindSafe};

use clap::{Parser, Subcommand};
use postbox::{Error, ErrorKind};

/// Carries events from a Postgres outbox to Kafka: in order, and none lost.
///
/// An application inserts an event into postbox.outbox in the transaction of its
/// business data. `postbox relay` reads it from a logical replication slot, sends
/// it to Kafka, and confirms it to Postgres once every in-sync replica has it.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, after_long_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    logging: logging::LogArguments,
}

#[derive(Debug, Subcommand)]
enum Command {
    Setup(setup::SetupCommand),
    Relay(Box<relay::RelayCommand>),
    Inbox(Box<inbox::InboxCommand>),
    Recover(recover::RecoverCommand),
    Parked(parked::ParkedCommand),
    Cancel(cancel::CancelCommand),
    Cleanup(Box<cleanup::CleanupCommand>),
    #[cfg(feature = "demo")]
    Demo(demo::DemoCommand),
    Completions(completions::CompletionsCommand),
}

const EXIT_CODES: &str = "\
Every flag can be given as a variable too: --in-flight-max as POSTBOX_IN_FLIGHT_MAX.

Exit codes:
  0  done, or drained        4  replication slot           8  an event that cannot go out
  1  unexpected              5  publication                9  not drained in time
  2  usage or settings       6  rights or authentication
  3  database                7  broker";

/// The exit code.
pub(crate) fn main() -> u8 {
    #[cfg(feature = "failpoints")]
    postbox::failpoints::arm();
    let arguments = Arguments::parse();
    if let Err(error) = arguments.logging.start() {
        return fail(&error, false);
    }
    let json = arguments.logging.are_json();
    let run = || match arguments.command {
        Command::Setup(arguments) => arguments.run(),
        Command::Relay(arguments) => arguments.run(),
        Command::Inbox(arguments) => arguments.run(),
        Command::Recover(arguments) => arguments.run(),
        Command::Parked(arguments) => arguments.run(),
        Command::Cancel(arguments) => arguments.run(),
        Command::Cleanup(arguments) => arguments.run(),
        #[cfg(feature = "demo")]
        Command::Demo(arguments) => arguments.run(),
        Command::Completions(arguments) => arguments.run(),
    };
    // Libraries panic too, such as where a file is missing for a pipe: the exit codes
    // are ours all the same.
    let result = panic::catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        let message = "panicked, for the reason told above";
        Err(Error::new(ErrorKind::Unexpected, message).into())
    });
    match result {
        Ok(()) => 0,
        Err(error) => fail(&error, json),
    }
}

/// Prints an error once, with its causes, and finds its exit code. Where logs are
/// JSON it is a line of the log, as what reads them takes nothing else.
fn fail(error: &anyhow::Error, json: bool) -> u8 {
    let ours = error.downcast_ref::<Error>();
    let chain = ours.map_or_else(|| format!("{error:#}"), Error::chain);
    let exit_code = ours.map_or(1, |ours| ours.kind().exit_code());
    if json && tracing::enabled!(tracing::Level::ERROR) {
        tracing::error!(exit_code, "{chain}");
    } else {
        eprintln!("error: {chain}");
    }
    exit_code
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        super::Arguments::command().debug_assert();
    }
}
