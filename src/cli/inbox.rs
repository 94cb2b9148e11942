//! `postbox inbox`.

mod arguments;
mod consume;
mod json;
mod text;

use std::io::Write;

use clap::{ArgMatches, Args, Command, FromArgMatches, Subcommand};
use postbox::inbox::stored::decisions::{self, Decided, Decision};
use postbox::inbox::stored::{self, Contents, Filter, Stored};

use super::waiting::arguments::{
    DecidingArguments, LimitArguments, Output, OutputArguments, PayloadArguments, PlaceArguments,
};
use super::waiting::json::{Whole, line};
use super::waiting::text::printable;
use super::waiting::{self, Kind, Report, check_reason, print, with};
use arguments::FilterArguments;
use consume::ConsumeCommand;

/// Of the sessions of whoever decides.
const NAME: &str = "postbox inbox messages";

/// What its tables say of when messages came.
const SINCE: &str = "RECEIVED";

/// Without a subcommand it consumes; the subcommands are about what was received.
#[derive(Debug)]
pub(super) enum InboxCommand {
    Consume(Box<ConsumeCommand>),
    Messages(Box<Action>),
}

#[derive(Debug, Subcommand)]
pub(super) enum Action {
    List(ListCommand),
    Show(ShowCommand),
    Retry(RetryCommand),
    Skip(SkipCommand),
}

// By hand: where a struct has both, what the consumer requires is required of the subcommands, too, once
// one of its variables is set.
impl Args for InboxCommand {
    fn augment_args(command: Command) -> Command {
        Action::augment_subcommands(ConsumeCommand::augment_args(command))
            .subcommand_required(false)
            .arg_required_else_help(false)
            .subcommand_negates_reqs(true)
            .args_conflicts_with_subcommands(true)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for InboxCommand {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(match matches.subcommand_name() {
            None => Self::Consume(Box::new(ConsumeCommand::from_arg_matches(matches)?)),
            Some(_) => Self::Messages(Box::new(Action::from_arg_matches(matches)?)),
        })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl InboxCommand {
    pub(super) fn run(&self) -> anyhow::Result<()> {
        match self {
            Self::Consume(command) => command.run(),
            Self::Messages(action) => action.run(),
        }
    }
}

impl Action {
    fn run(&self) -> anyhow::Result<()> {
        match self {
            Self::List(command) => command.run(),
            Self::Show(command) => command.run(),
            Self::Retry(command) => command.run(),
            Self::Skip(command) => command.run(),
        }
    }
}

/// Lists messages of the inbox, in the order in which they were received.
#[derive(Debug, Args)]
pub(super) struct ListCommand {
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
        let (messages, more) = with(&self.place, NAME, async |session, contract| {
            stored::list(&session.client, contract, &filter, self.limit.limit).await
        })?;
        print(|out| {
            match self.output.output {
                Output::Table => {
                    waiting::text::table(out, SINCE, messages.iter().map(text::line))?;
                }
                Output::Json => {
                    for message in &messages {
                        line(out, &json::Message::of(message))?;
                    }
                }
            }
            out.flush()
        })?;
        if more > 0 {
            // Not part of the results: whoever reads those takes every line for a message.
            eprintln!("{more} more: --limit lists them too");
        }
        Ok(())
    }
}

/// Shows everything that is known of messages of the inbox, with what is in them.
///
/// Headers, payloads and bodies are shown only with --payload.
#[derive(Debug, Args)]
pub(super) struct ShowCommand {
    /// The messages' ids.
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,

    /// Of this consumer group; without it of all.
    #[arg(long, env = "POSTBOX_GROUP", value_name = "NAME")]
    group: Option<String>,

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
            group: self.group.clone(),
            ..Filter::default()
        };
        let messages = with(&self.place, NAME, async |session, contract| {
            stored::show(&session.client, contract, &filter).await
        })?;
        print(|out| {
            for (message, contents) in &messages {
                self.write(out, message, contents)?;
            }
            out.flush()
        })
    }

    fn write(
        &self,
        out: &mut dyn Write,
        message: &Stored,
        contents: &Contents,
    ) -> std::io::Result<()> {
        let (columns, with_payload) = (Ok(contents.columns()), self.payload.payload);
        match self.output.output {
            Output::Table => {
                let title = format!("message {}", printable(&message.id));
                let facts = text::facts(message);
                waiting::text::everything(out, &title, &facts, columns, with_payload)
            }
            Output::Json => {
                let message = json::Message::of(message);
                line(out, &Whole::of(message, columns, with_payload))
            }
        }
    }
}

/// Has messages of the inbox tried again, from the first attempt on.
///
/// One that waits is due at once, or as soon as the earlier ones of its key are done. One that was given
/// up, after its attempts or with --status skipped by a person, is handled after those of its key that were
/// handled since, and before those that still wait. Later ones that arrive while it is tried do not wait
/// for it, unless others of its key wait, too, or the consumer is started anew. The consumer tries it within
/// a second; where the application claims messages, it gives it back to the application. What is being
/// handled or is claimed at this moment is left as it is. What was left is said, with exit code 3. It needs a
/// filter, ids or --all.
#[derive(Debug, Args)]
pub(super) struct RetryCommand {
    #[command(flatten)]
    decision: DecisionArguments,
}

impl RetryCommand {
    fn run(&self) -> anyhow::Result<()> {
        self.decision.run(Decision::Retry)
    }
}

/// Gives messages of the inbox up: they are never handled, and those that wait behind them go on.
///
/// Who did so, when and why is kept with the message, and `retry` takes it back. What is being handled or is
/// claimed at this moment is left as it is. What was left is said, with exit code 3. It needs a filter, ids or
/// --all.
#[derive(Debug, Args)]
pub(super) struct SkipCommand {
    /// Why: kept with the message.
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
        self.deciding.check(filter.is_empty(), "messages")?;
        let by = self.deciding.by(&self.place)?;
        let decided = with(&self.place, NAME, async |session, contract| {
            let client = &mut session.client;
            match self.deciding.dry_run {
                true => decisions::rehearse(client, contract, &filter, decision).await,
                false => decisions::decide(client, contract, &filter, decision, &by).await,
            }
        })?;
        let report = Report {
            rows: "messages",
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
            |decided| text::line(&decided.message),
            |decided| json::Message::of(&decided.message),
        )
    }
}
