//! `docs/errors.md` says what the code does.

use std::fmt::Write as _;
use std::path::PathBuf;

use postbox::ErrorKind;
use postbox::database::refusals;
use postbox::error::Class;
use postbox::publisher::codes;

fn path() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/errors.md")
}

fn table(head: &str, rows: impl Iterator<Item = String>) -> String {
    let columns = "|---".repeat(head.matches('|').count() - 1);
    let mut text = format!("{head}\n{columns}|\n");
    for row in rows {
        let _ = writeln!(text, "{row}");
    }
    text
}

/// Class, exit code and metric.
fn fate(kind: ErrorKind) -> String {
    match kind.class() {
        Class::Wait => format!("wait | | {}", counter(kind)),
        Class::Retry => format!("retry | | {}", counter(kind)),
        Class::Stop => format!("stop | {} | `up`", kind.exit_code()),
    }
}

fn counter(kind: ErrorKind) -> String {
    format!("`postbox_reconnects_total{{reason=\"{}\"}}`", kind.label())
}

fn next_step(text: &str) -> &str {
    if text.is_empty() { "none" } else { text }
}

fn kinds() -> String {
    let row = |kind: &ErrorKind| format!("| {} | {} |", kind.label(), fate(*kind));
    table(
        "| kind | class | exit code | metric |",
        ErrorKind::ALL.iter().map(row),
    )
}

fn postgres() -> String {
    let row = |rule: &refusals::Rule| {
        let state = match (rule.sqlstate, rule.words) {
            ("", _) => "any other".to_owned(),
            (state, "") if state.len() == 2 => format!("`{state}…`"),
            (state, "") => format!("`{state}`"),
            (state, words) => format!("`{state}` with \"{words}\""),
        };
        let (fate, next_step) = (fate(rule.kind), next_step(rule.next_step));
        format!("| {state} | {} | {fate} | {next_step} |", rule.meaning)
    };
    table(
        "| SQLSTATE | meaning | class | exit code | metric | next step |",
        refusals::RULES.iter().map(row),
    )
}

fn kafka() -> String {
    let row = |rule: &codes::Rule| {
        let codes: Vec<String> = rule
            .codes
            .iter()
            .map(|code| format!("`{code:?}`"))
            .collect();
        let codes = match codes.is_empty() {
            true => "any other".to_owned(),
            false => codes.join(", "),
        };
        let (fate, next_step) = (fate(rule.verdict.kind()), next_step(rule.next_step));
        format!("| {codes} | {} | {fate} | {next_step} |", rule.meaning)
    };
    table(
        "| code | meaning | class | exit code | metric | next step |",
        codes::RULES.iter().map(row),
    )
}

/// Puts `table` between the marks.
fn fill(text: &str, name: &str, table: &str) -> String {
    let begin = format!("<!-- begin {name} -->\n");
    let (before, rest) = text.split_once(&begin).unwrap();
    let (_, after) = rest.split_once("<!-- end -->").unwrap();
    format!("{before}{begin}{table}<!-- end -->{after}")
}

/// With `WRITE_DOCS` set it makes them so.
#[test]
fn the_tables_in_the_docs_are_those_of_the_code() {
    let written = std::fs::read_to_string(path()).unwrap();
    let mut expected = written;
    for (name, table) in [
        ("kinds", kinds()),
        ("postgres", postgres()),
        ("kafka", kafka()),
    ] {
        expected = fill(&expected, name, &table);
    }
    if std::env::var_os("WRITE_DOCS").is_some() {
        std::fs::write(path(), &expected).unwrap();
    }
    let written = std::fs::read_to_string(path()).unwrap();
    let differs = written
        .lines()
        .zip(expected.lines())
        .find(|(is, must)| is != must);
    assert!(
        written == expected,
        "docs/errors.md differs, run this with WRITE_DOCS=1: {differs:?}"
    );
}

/// Fails unless the docs have this exit code for the error that a relay ended with.
/// Settings that are refused have their manual; whoever is killed says nothing.
pub(crate) fn assert_documented(log: &str, exit_code: i32) {
    if exit_code <= 0 || exit_code == 2 {
        return;
    }
    let is_error =
        |line: &&str| line.starts_with("error: ") || line.contains("\"level\":\"ERROR\"");
    let Some(error) = log.lines().rev().find(is_error) else {
        panic!("exit code {exit_code} without an error:\n{log}");
    };
    // In JSON, quotes are escaped.
    let error = &error.replace("\\\"", "\"");
    let docs = std::fs::read_to_string(path()).unwrap();
    let stop = format!(" | stop | {exit_code} | ");
    let known = docs.lines().any(|row| {
        let what = row.strip_prefix("| ").filter(|row| row.contains(&stop));
        let what = what.and_then(|row| row.split(" | ").next());
        what.is_some_and(|what| what.split(", ").any(|what| is_in(what, error)))
    });
    assert!(
        known,
        "not in docs/errors.md with exit code {exit_code}: {error}"
    );
}

/// Whether an error is what the first cell of a row tells.
fn is_in(what: &str, error: &str) -> bool {
    let (code, words) = what.split_once(" with ").unwrap_or((what, ""));
    let code = code.trim_matches('`');
    let is_state = code.len() == 5 && code.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if is_state || code.len() == "28…".len() {
        let state = format!("(SQLSTATE {}", code.trim_end_matches('…'));
        return error.contains(&state) && error.contains(words.trim_matches('"'));
    }
    let mut rest = error;
    code.split('…').all(|part| match rest.split_once(part) {
        Some((_, after)) => {
            rest = after;
            true
        }
        None => false,
    })
}
