//! `postbox parked`.

mod arguments;
mod json;
mod text;

use std::fs::{self, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use postbox::parked::Filter;
use postbox::parked::decisions::{self, Decided, Decision};
use postbox::parked::event::{self, Parked};
use postbox::parked::row::StoredRow;
use postbox::{Error, ErrorKind};

use super::waiting::arguments::{
    DecidingArguments, LimitArguments, Output, OutputArguments, PayloadArguments, PlaceArguments,
};
use super::waiting::json::{Whole, line};
use super::waiting::text::printable;
use super::waiting::{self, Kind, Report, check_reason, finish, print, with};
use arguments::FilterArguments;

/// Of its sessions.
const NAME: &str = "postbox parked";

/// What its tables say of when events came.
const SINCE: &str = "PARKED";

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
    #[command(flatten)]
    limit: LimitArguments,

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
        let (events, more) = with(&self.place, NAME, async |session, contract| {
            event::list(&session.client, contract, &filter, self.limit.limit).await
        })?;
        print(|out| {
            match self.output.output {
                Output::Table => waiting::text::table(out, SINCE, events.iter().map(text::line))?,
                Output::Json => {
                    for event in &events {
                        line(out, &json::Event::of(event))?;
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
        let write = |event: &Parked, row: &StoredRow| match self.output.output {
            Output::Table => waiting::text::everything(
                &mut out,
                &format!("event {}", printable(&event.id)),
                &text::facts(event),
                row.columns(),
                self.payload.payload,
            ),
            Output::Json => line(&mut out, &whole(event, row, &self.payload)),
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
        check_reason(&self.reason)?;
        let reason = &self.reason;
        self.decision.run(Decision::Skip { reason })
    }
}

#[derive(Debug, Args)]
struct DecisionArguments {
    #[command(flatten)]
    deciding: DecidingArguments,

    #[command(flatten)]
    filter: FilterArguments,

    #[command(flatten)]
    place: PlaceArguments,
}

impl DecisionArguments {
    fn run(&self, decision: Decision<'_>) -> anyhow::Result<()> {
        let filter = self.filter.resolve();
        self.deciding.check(filter.is_empty(), "events")?;
        let by = self.deciding.by(&self.place)?;
        let decided = with(&self.place, NAME, async |session, contract| {
            let client = &mut session.client;
            match self.deciding.dry_run {
                true => decisions::rehearse(client, contract, &filter, decision).await,
                false => decisions::decide(client, contract, &filter, decision, &by).await,
            }
        })?;
        let report = Report {
            rows: "events",
            since: SINCE,
            kind: match decision {
                Decision::Retry => Kind::Retry,
                Decision::Skip { .. } => Kind::Skip,
            },
            decided: &decided,
            left: |decided: &Decided| decided.left.map(|left| (left.reason(), left.name())),
        };
        report.print(
            &self.deciding,
            |decided| text::line(&decided.event),
            |decided| json::Event::of(&decided.event),
        )
    }
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
            line(&mut *out, &whole(event, row, &self.payload))
        })
    }
}

fn not_written(path: &Path, kind: ErrorKind, error: io::Error) -> Error {
    let message = format!("--to {}: cannot write a new file there", path.display());
    Error::new(kind, message).caused_by(error)
}

/// Writes each event that fits, for as long as somebody reads it: how many.
fn for_each(
    place: &PlaceArguments,
    filter: &Filter,
    mut write: impl FnMut(&Parked, &StoredRow) -> io::Result<()>,
) -> anyhow::Result<u64> {
    let mut failed = None;
    let done = with(place, NAME, async |session, contract| {
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

fn whole<'a>(
    event: &'a Parked,
    row: &'a StoredRow,
    payload: &PayloadArguments,
) -> Whole<'a, json::Event<'a>> {
    Whole::of(json::Event::of(event), row.columns(), payload.payload)
}
