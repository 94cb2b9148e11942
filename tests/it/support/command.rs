//! `postbox` commands that end by themselves, and what they say.

use std::process::{Command, Stdio};
use std::sync::mpsc;

use super::PATIENCE;

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Output {
    /// It did what it was told and had nothing to complain of: its results.
    pub(crate) fn results(&self) -> &str {
        assert_eq!((self.code, self.stderr.as_str()), (0, ""), "{self:?}");
        &self.stdout
    }

    /// It ended with this exit code, without results: what it complained of.
    pub(crate) fn complaint(&self, code: i32) -> &str {
        assert_eq!((self.code, self.stdout.as_str()), (code, ""), "{self:?}");
        &self.stderr
    }
}

/// `postbox`, without the variables that the tests themselves were given.
pub(crate) fn postbox(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_postbox"));
    command.args(arguments).env("USER", "tester");
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let ours = ["DATABASE_URL", "KAFKA_BROKERS", "RUST_LOG"].contains(&&*text);
        if ours || text.starts_with("POSTBOX_") || text.starts_with("PG") {
            command.env_remove(&name);
        }
    }
    command
}

/// Runs it to its end.
pub(crate) fn run(command: &mut Command) -> Output {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id().to_string();
    let (sender, ended) = mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    // Writers go on meanwhile, and the command may wait for them.
    let output = tokio::task::block_in_place(|| ended.recv_timeout(PATIENCE));
    let Ok(output) = output else {
        Command::new("kill").args(["-KILL", &pid]).status().unwrap();
        panic!("does not end: {command:?}");
    };
    let output = output.unwrap();
    Output {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// The statement that an error ends with: from its first word to `;` or the end
/// of the line.
pub(crate) fn statement<'a>(complaint: &'a str, first_words: &str) -> &'a str {
    let start = complaint.find(first_words);
    let start = start.unwrap_or_else(|| panic!("no {first_words} in: {complaint}"));
    let statement = complaint[start..].lines().next().unwrap();
    statement.split(';').next().unwrap()
}
