//! `postbox parked`.

mod arguments;
mod json;
mod text;

use std::fs::{self, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::builder::BoolishValueParser;
use clap::{Args, Subcommand, value_parser};
use postbox::contract::Contract;
use postbox::database::{Database, Session};
use postbox::parked::decisions::{self, Decided, Decision, Left};
use postbox::parked::{Filter, event};
use postbox::{Error, ErrorKind};

use arguments::{FilterArguments, Output, OutputArguments, PayloadArguments, PlaceArguments};

/// Shows the events that wait for a person, another try or their time, and decides about them.
///
/// It reads and changes rows of postbox.parked and nothing else: the relay that parked an event sends
/// it, within a second of a decision, and in the order of its key. Payloads and the application's
/// headers are shown only with --payload.
#[derive(Debug, Args)]
pub(super) struct ParkedCommand {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    List(ListCommand),
    Show(ShowCommand),
    Retry(RetryCommand),
    Skip(SkipCommand),
    Export(ExportCommand),
}

impl ParkedCommand {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        match &self.action {
            Action::List(command) => command.run(),
            Action::Show(command) => command.run(),
            Action::Retry(command) => command.run(),
            Action::Skip(command) => command.run(),
            Action::Export(command) => command.run(),
        }
    }
}

/// Lists events, in the order in which the relay read them.
#[derive(Debug, Args)]
struct ListCommand {
    /// How many are listed at most; 1 to 1000000. How many more there are is said.
    #[arg(
        long,
        env = "POSTBOX_LIMIT",
        default_value_t = 100,
        value_parser = value_parser!(u32).range(1..=1_000_000),
        value_name = "EVENTS"
    )]
    limit: u32,

    #[command(flatten)]
    output: OutputArguments,

    #[command(flatten)]
    filter: FilterArguments,

    #[command(flatten)]
    place: PlaceArguments,
}

impl ListCommand {
    fn run(&self) -> anyhow::Result<()> {
        let filter = self.filter.resolve();
        let (events, more) = with(&self.place, async |session, contract| {
            event::list(&session.client, contract, &filter, self.limit).await
        })?;
        print(|out| {
            match self.output.output {
                Output::Table => text::table(out, events.iter().map(|event| (event, None)))?,
                Output::Json => {
                    for event in &events {
                        json::line(out, &json::Event::of(event))?;
                    }
                }
            }
            out.flush()
        })?;
        if more > 0 {
            // Not part of the results: whoever reads those takes every line for an event.
            eprintln!("{more} more: --limit lists them too, export has no limit");
        }
        Ok(())
    }
}

/// Shows everything that is known of events, with the columns of their rows.
#[derive(Debug, Args)]
struct ShowCommand {
    /// The events' ids.
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,

    /// Of this relay, by the name of its slot; without it of all.
    #[arg(long, env = "POSTBOX_RELAY", value_name = "NAME")]
    relay: Option<String>,

    #[command(flatten)]
    payload: PayloadArguments,

    #[command(flatten)]
    output: OutputArguments,

    #[command(flatten)]
    place: PlaceArguments,
}

impl ShowCommand {
    fn run(&self) -> anyhow::Result<()> {
        let filter = Filter {
            ids: self.ids.clone(),
            relay: self.relay.clone(),
            ..Filter::default()
        };
        let mut out = BufWriter::new(io::stdout().lock());
        let write = |event: &_, row: &_| match self.output.output {
            Output::Table => text::everything(&mut out, event, row, self.payload.payload),
            Output::Json => {
                json::line(&mut out, &json::Whole::of(event, row, self.payload.payload))
            }
        };
        for_each(&self.place, &filter, write)?;
        finish(out.flush())
    }
}

/// Has events tried again: from the first attempt on, and each in the order of its key.
///
/// One that waits for its next try is due at once, or as soon as the earlier ones of its key are sent.
/// One that was given up, by the relay or with --status skipped by a person, is taken back into its place
/// before those of its key that still wait. What waits for a topic which the brokers refuse is left as it
/// is, as the relay asks them again by itself; so is what is being sent at this moment. What was left
/// is said, with exit code 3. It needs a filter, ids or --all.
#[derive(Debug, Args)]
struct RetryCommand {
    #[command(flatten)]
    decision: DecisionArguments,
}

impl RetryCommand {
    fn run(&self) -> anyhow::Result<()> {
        self.decision.run(Decision::Retry)
    }
}

/// Gives events up: they are never sent, and those that wait behind them go on.
///
/// Who did so, when and why is kept with the event, and `retry` takes it back. What is being sent at this
/// moment is left as it is, and so are scheduled events, which `postbox cancel` takes back. What was left
/// is said, with exit code 3. It needs a filter, ids or --all.
#[derive(Debug, Args)]
struct SkipCommand {
    /// Why: kept with the event.
    #[arg(long, env = "POSTBOX_REASON", value_name = "TEXT")]
    reason: String,

    #[command(flatten)]
    decision: DecisionArguments,
}

impl SkipCommand {
    fn run(&self) -> anyhow::Result<()> {
        if self.reason.trim().is_empty() {
            let message = "--reason: say why; it is what others will find with the event";
            return Err(Error::new(ErrorKind::Settings, message).into());
        }
        let reason = &self.reason;
        self.decision.run(Decision::Skip { reason })
    }
}

#[derive(Debug, Args)]
struct DecisionArguments {
    /// Decide about all that wait or are dead, where no flag says which. The variable is true or false.
    #[arg(long, env = "POSTBOX_ALL", value_parser = BoolishValueParser::new())]
    all: bool,

    /// Change nothing, and say what would be changed. The variable is true or false.
    #[arg(long, env = "POSTBOX_DRY_RUN", value_parser = BoolishValueParser::new())]
    dry_run: bool,

    /// Who decides: kept with the event. Without it, the operating system's user and host, and the
    /// database's role.
    #[arg(long, env = "POSTBOX_BY", value_name = "TEXT")]
    by: Option<String>,

    #[command(flatten)]
    output: OutputArguments,

    #[command(flatten)]
    filter: FilterArguments,

    #[command(flatten)]
    place: PlaceArguments,
}

impl DecisionArguments {
    fn run(&self, decision: Decision<'_>) -> anyhow::Result<()> {
        let filter = self.filter.resolve();
        if filter.is_empty() && !self.all {
            let message = "say which events: ids, a flag such as --topic or --status, or --all";
            return Err(Error::new(ErrorKind::Settings, message).into());
        }
        if self.by.as_ref().is_some_and(|by| by.trim().is_empty()) {
            let message = "--by: say who decides, or leave it out; it is what others will find with the event";
            return Err(Error::new(ErrorKind::Settings, message).into());
        }
        let (database, _) = self.place.resolve()?;
        let by = self.by.clone().unwrap_or_else(|| decider(&database));
        let decided = with(&self.place, async |session, contract| match self.dry_run {
            true => decisions::rehearse(&session.client, contract, &filter, decision).await,
            false => decisions::decide(&mut session.client, contract, &filter, decision, &by).await,
        })?;
        print(|out| {
            match self.output.output {
                Output::Table => {
                    let rows = decided.iter().map(|decided| (&decided.event, decided.left));
                    // The summary says that there are none.
                    if !decided.is_empty() {
                        text::table(out, rows)?;
                    }
                    writeln!(out, "{}", self.summary(decision, &decided))?;
                }
                Output::Json => {
                    for decided in &decided {
                        json::line(out, &json::Outcome::of(decided, decision, self.dry_run))?;
                    }
                }
            }
            out.flush()
        })?;
        all_done(&decided)
    }

    fn summary(&self, decision: Decision<'_>, decided: &[Decided]) -> String {
        let done = decided.iter().filter(|decided| decided.left.is_none());
        let (done, all) = (done.count(), decided.len());
        match (decision, self.dry_run) {
            (Decision::Retry, false) => format!("{done} of {all} events will be tried again"),
            (Decision::Skip { .. }, false) => format!("{done} of {all} events are skipped"),
            (Decision::Retry, true) => {
                format!("{done} of {all} events would be tried again; nothing was changed")
            }
            (Decision::Skip { .. }, true) => {
                format!("{done} of {all} events would be skipped; nothing was changed")
            }
        }
    }
}

/// An error where something was left as it is, with the reasons.
fn all_done(decided: &[Decided]) -> anyhow::Result<()> {
    let reasons: Vec<_> = Left::ALL
        .into_iter()
        .map(|left| {
            (
                left,
                decided.iter().filter(|d| d.left == Some(left)).count(),
            )
        })
        .filter(|(_, count)| *count > 0)
        .map(|(left, count)| format!("{count} {}", left.reason()))
        .collect();
    if reasons.is_empty() {
        return Ok(());
    }
    let left = decided.iter().filter(|decided| decided.left.is_some());
    let message = format!(
        "{} of {} events were left as they are: {}",
        left.count(),
        decided.len(),
        reasons.join("; ")
    );
    Err(Error::new(ErrorKind::Database, message).into())
}

/// Writes events as JSON, one a line, with the columns of their rows, so that they can be written again.
///
/// Values of columns are the text that Postgres prints, and {"hex": "…"} where that is not UTF-8. Without
/// --payload the names of those that are left out are in "hidden".
#[derive(Debug, Args)]
struct ExportCommand {
    #[command(flatten)]
    payload: PayloadArguments,

    /// Into this file, which must not exist, for its owner alone; without it to the standard output.
    #[arg(long, env = "POSTBOX_TO", value_name = "FILE")]
    to: Option<PathBuf>,

    #[command(flatten)]
    filter: FilterArguments,

    #[command(flatten)]
    place: PlaceArguments,
}

impl ExportCommand {
    fn run(&self) -> anyhow::Result<()> {
        let Some(path) = &self.to else {
            let mut out = BufWriter::new(io::stdout().lock());
            self.write(&mut out)?;
            return finish(out.flush());
        };
        let open = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        let file = open.map_err(|error| not_written(path, ErrorKind::Settings, error))?;
        let mut out = BufWriter::new(file);
        let written = self.write(&mut out).and_then(|count| {
            let file = out.into_inner().map_err(io::IntoInnerError::into_error);
            let kept = file.and_then(|file| file.sync_all());
            kept.map_err(|error| not_written(path, ErrorKind::Unexpected, error))?;
            Ok(count)
        });
        match written {
            Ok(count) => print(|out| writeln!(out, "{count} events: {}", path.display())),
            Err(error) => {
                // Half of them would look like all.
                let _ = fs::remove_file(path);
                Err(error)
            }
        }
    }

    fn write(&self, out: &mut dyn Write) -> anyhow::Result<u64> {
        let filter = self.filter.resolve();
        for_each(&self.place, &filter, |event, row| {
            json::line(
                &mut *out,
                &json::Whole::of(event, row, self.payload.payload),
            )
        })
    }
}

fn not_written(path: &Path, kind: ErrorKind, error: io::Error) -> Error {
    let message = format!("--to {}: cannot write a new file there", path.display());
    Error::new(kind, message).caused_by(error)
}

/// The user and the machine, as the system knows them, and the role.
fn decider(database: &Database) -> String {
    let ask = |program: &str, flag: &str| {
        let output = Command::new(program).arg(flag).output().ok()?;
        let answer = String::from_utf8(output.stdout).ok()?;
        Some(answer.trim().to_owned()).filter(|answer| !answer.is_empty())
    };
    let user = ask("id", "-un").unwrap_or_else(|| "somebody".to_owned());
    let host = ask("uname", "-n").unwrap_or_else(|| "somewhere".to_owned());
    format!("{user}@{host}, role {}", database.user())
}

/// Runs something in a session. In transaction mode a pooler may stand in between.
fn with<T>(
    place: &PlaceArguments,
    run: impl AsyncFnOnce(&mut Session, &Contract) -> postbox::Result<T>,
) -> anyhow::Result<T> {
    let (database, contract) = place.resolve()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let done = runtime.block_on(async {
        let mut session = database.connect_pooled("postbox parked").await?;
        run(&mut session, &contract).await
    });
    Ok(done?)
}

/// Writes each event that fits, for as long as somebody reads it: how many.
fn for_each(
    place: &PlaceArguments,
    filter: &Filter,
    mut write: impl FnMut(&event::Parked, &postbox::parked::row::StoredRow) -> io::Result<()>,
) -> anyhow::Result<u64> {
    let mut failed = None;
    let done = with(place, async |session, contract| {
        event::for_each(&session.client, contract, filter, |event, row| {
            write(event, row).map_err(|error| {
                failed = Some(error);
                Error::new(ErrorKind::Unexpected, "write the events")
            })
        })
        .await
    });
    match failed {
        Some(error) => finish(Err(error)).map(|()| 0),
        None => done,
    }
}

/// Writes results.
fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> anyhow::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    finish(write(&mut out).and_then(|()| out.flush()))
}

/// Whoever reads may stop, as `head` does.
fn finish(written: io::Result<()>) -> anyhow::Result<()> {
    match written {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            let message = "write the results";
            Err(Error::new(ErrorKind::Unexpected, message)
                .caused_by(error)
                .into())
        }
        _ => Ok(()),
    }
}
