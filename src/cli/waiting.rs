//! What `postbox parked` and `postbox inbox` have in common: to show what waits in a table, and to
//! decide about it.

pub(super) mod arguments;
pub(super) mod json;
pub(super) mod text;

use std::io::{self, BufWriter, Write};
use std::process::Command;

use postbox::contract::Contract;
use postbox::database::{Database, Session};
use postbox::{Error, ErrorKind};
use serde::Serialize;

use arguments::{DecidingArguments, Output, PlaceArguments};

/// Runs something in a session of this name. In transaction mode a pooler may stand in between.
pub(super) fn with<T>(
    place: &PlaceArguments,
    name: &str,
    run: impl AsyncFnOnce(&mut Session, &Contract) -> postbox::Result<T>,
) -> anyhow::Result<T> {
    let (database, contract) = place.resolve()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let done = runtime.block_on(async {
        let mut session = database.connect_pooled(name).await?;
        run(&mut session, &contract).await
    });
    Ok(done?)
}

/// What is decided, as it is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Retry,
    Skip,
}

/// Refuses a skip without a reason.
pub(super) fn check_reason(reason: &str) -> postbox::Result<()> {
    if !reason.trim().is_empty() {
        return Ok(());
    }
    let message = "--reason: say why; it is what others will find with it";
    Err(Error::new(ErrorKind::Settings, message))
}

/// What was decided, in the words of one of the tables.
pub(super) struct Report<'a, T> {
    /// What its rows are: "events".
    pub(super) rows: &'static str,
    /// What the table says of when they came.
    pub(super) since: &'static str,
    pub(super) kind: Kind,
    pub(super) decided: &'a [T],
    /// A reason and its name, if the row was left as it is.
    pub(super) left: fn(&T) -> Option<(&'static str, &'static str)>,
}

impl<'a, T> Report<'a, T> {
    /// Writes it. An error where something was left as it is.
    pub(super) fn print<J: Serialize>(
        &self,
        deciding: &DecidingArguments,
        line: impl Fn(&'a T) -> text::Line,
        row: impl Fn(&'a T) -> J,
    ) -> anyhow::Result<()> {
        let (decided, left) = (self.decided, self.left);
        print(|out| {
            match deciding.output.output {
                Output::Table => {
                    let lines = decided.iter().map(|decided| text::Line {
                        left: left(decided).map(|(reason, _)| reason),
                        ..line(decided)
                    });
                    // The summary says that there are none.
                    if !decided.is_empty() {
                        text::table(out, self.since, lines)?;
                    }
                    writeln!(out, "{}", self.summary(deciding.dry_run))?;
                }
                Output::Json => {
                    for decided in decided {
                        let outcome = json::Outcome {
                            row: row(decided),
                            outcome: match (left(decided), self.kind) {
                                (Some(_), _) => "left",
                                (None, Kind::Retry) => "retried",
                                (None, Kind::Skip) => "skipped",
                            },
                            left_because: left(decided).map(|(_, name)| name),
                            dry_run: deciding.dry_run,
                        };
                        json::line(out, &outcome)?;
                    }
                }
            }
            out.flush()
        })?;
        self.all_done()
    }

    fn summary(&self, is_dry_run: bool) -> String {
        let done = self.decided.iter().filter(|d| (self.left)(d).is_none());
        let (done, all, rows) = (done.count(), self.decided.len(), self.rows);
        match (self.kind, is_dry_run) {
            (Kind::Retry, false) => format!("{done} of {all} {rows} will be tried again"),
            (Kind::Skip, false) => format!("{done} of {all} {rows} are skipped"),
            (Kind::Retry, true) => {
                format!("{done} of {all} {rows} would be tried again; nothing was changed")
            }
            (Kind::Skip, true) => {
                format!("{done} of {all} {rows} would be skipped; nothing was changed")
            }
        }
    }

    fn all_done(&self) -> anyhow::Result<()> {
        let mut reasons: Vec<(&'static str, usize)> = Vec::new();
        for (reason, _) in self.decided.iter().filter_map(self.left) {
            match reasons.iter_mut().find(|(known, _)| *known == reason) {
                Some((_, count)) => *count += 1,
                None => reasons.push((reason, 1)),
            }
        }
        if reasons.is_empty() {
            return Ok(());
        }
        let left: usize = reasons.iter().map(|(_, count)| count).sum();
        let reasons: Vec<_> = reasons
            .into_iter()
            .map(|(reason, count)| format!("{count} {reason}"))
            .collect();
        let message = format!(
            "{left} of {} {} were left as they are: {}",
            self.decided.len(),
            self.rows,
            reasons.join("; ")
        );
        Err(Error::new(ErrorKind::Database, message).into())
    }
}

/// The user and the machine, as the system knows them, and the role.
pub(super) fn decider(database: &Database) -> String {
    let ask = |program: &str, flag: &str| {
        let output = Command::new(program).arg(flag).output().ok()?;
        let answer = String::from_utf8(output.stdout).ok()?;
        Some(answer.trim().to_owned()).filter(|answer| !answer.is_empty())
    };
    let user = ask("id", "-un").unwrap_or_else(|| "somebody".to_owned());
    let host = ask("uname", "-n").unwrap_or_else(|| "somewhere".to_owned());
    format!("{user}@{host}, role {}", database.user())
}

/// Writes results.
pub(super) fn print(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> anyhow::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    finish(write(&mut out).and_then(|()| out.flush()))
}

/// Whoever reads may stop, as `head` does.
pub(super) fn finish(written: io::Result<()>) -> anyhow::Result<()> {
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
