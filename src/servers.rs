//! Throw-away Postgres and Kafka for the demo, the tests and the benches.
//!
//! `dev/postgres`, `dev/kafka` and others each supervise one server and are driven by
//! lines: commands on stdin, an answer on stdout. When we end, however we end,
//! their stdin closes, and they stop the server and remove its folder.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::error::{Error, ErrorKind, Result};

/// A running server.
#[derive(Debug)]
pub struct Server {
    name: &'static str,
    child: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    facts: HashMap<String, String>,
}

impl Server {
    /// Starts a Postgres with these settings, each `name=value`. Its major
    /// version is `POSTBOX_POSTGRES_MAJOR`, else 17.
    ///
    /// # Errors
    /// If it does not start; its log is on stderr.
    pub fn postgres(settings: &[&str]) -> Result<Self> {
        Self::start("postgres", &[&["--"], settings].concat())
    }

    /// Starts a Postgres of this major version with these settings.
    ///
    /// # Errors
    /// If it does not start; its log is on stderr.
    pub fn postgres_of(major: &str, settings: &[&str]) -> Result<Self> {
        Self::start("postgres", &[&[major, "--"], settings].concat())
    }

    /// Starts a PgBouncer in transaction mode before a Postgres, with these settings.
    ///
    /// # Errors
    /// If it does not start, or is not to be had; its log is on stderr.
    pub fn pgbouncer(postgres: &Self, settings: &[&str]) -> Result<Self> {
        Self::start(
            "pgbouncer",
            &[&[postgres.fact("port"), "--"], settings].concat(),
        )
    }

    /// Starts a Kafka broker with these settings, each `name=value`. Before them may
    /// stand `--listener NAME:PROTOCOL`, whose address is the fact `brokers.NAME`, and
    /// `--user NAME:PASSWORD`.
    ///
    /// # Errors
    /// If it does not start; its log is on stderr.
    pub fn kafka(settings: &[&str]) -> Result<Self> {
        Self::start("kafka", settings)
    }

    /// Starts one more broker, the second, with these settings in the cluster of the
    /// first.
    ///
    /// # Errors
    /// If it does not start; its log is on stderr.
    pub fn second_broker(first: &Self, settings: &[&str]) -> Result<Self> {
        let join = ["--join", first.fact("controller")];
        Self::start("kafka", &[&join, settings].concat())
    }

    /// Starts a Kafka Connect before these brokers with Debezium connectors, each
    /// `--connector NAME` and its settings, `name=value`.
    ///
    /// # Errors
    /// If one of them does not stream, or Debezium is not to be had; its log is on stderr.
    pub fn debezium(brokers: &str, connectors: &[&str]) -> Result<Self> {
        Self::start("debezium", &[&[brokers], connectors].concat())
    }

    /// What the server told about itself, such as `port`, `url`, `brokers`.
    ///
    /// # Panics
    /// If it told no such thing.
    pub fn fact(&self, name: &str) -> &str {
        match self.facts.get(name) {
            Some(fact) => fact,
            None => panic!("dev/{} does not tell its {name}", self.name),
        }
    }

    /// Of a Postgres: the URL of its first database, through its Unix socket.
    ///
    /// # Panics
    /// If it is no Postgres.
    pub fn socket_url(&self) -> String {
        let (folder, port) = (self.fact("socket_dir"), self.fact("port"));
        format!("postgresql://postgres@/postgres?host={folder}&port={port}")
    }

    /// Sends a command, such as `stop fast`, `start` or `pause`, and waits until
    /// it is done.
    ///
    /// # Errors
    /// If it was not done.
    pub fn command(&mut self, command: &str) -> Result<()> {
        let answer = self.ask(command).map_err(|error| {
            unexpected(format!("tell dev/{} to {command}", self.name)).caused_by(error)
        })?;
        if answer.starts_with("ok") {
            return Ok(());
        }
        let message = format!("dev/{} was told to {command}: {answer}", self.name);
        Err(unexpected(message))
    }

    fn start(name: &'static str, arguments: &[&str]) -> Result<Self> {
        let script = folder()?.join(name);
        let mut child = Command::new(&script)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C in a terminal is for us; the server goes when we do.
            .process_group(0)
            .spawn()
            .map_err(|error| unexpected(format!("run dev/{name}")).caused_by(error))?;
        let commands = child.stdin.take();
        let answers = child.stdout.take().expect("stdout is piped");
        let mut server = Self {
            name,
            child,
            commands,
            answers: BufReader::new(answers),
            facts: HashMap::new(),
        };
        server.read_facts()?;
        Ok(server)
    }

    fn read_facts(&mut self) -> Result<()> {
        loop {
            let line = self.answer();
            let line = line.map_err(|error| {
                unexpected(format!("dev/{} did not start", self.name)).caused_by(error)
            })?;
            match line.split_once('=') {
                Some((name, value)) => {
                    self.facts.insert(name.to_owned(), value.to_owned());
                }
                None => return Ok(()),
            }
        }
    }

    fn ask(&mut self, command: &str) -> std::io::Result<String> {
        let commands = self.commands.as_mut().expect("open until dropped");
        writeln!(commands, "{command}")?;
        self.answer()
    }

    fn answer(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.commands.take());
        // The supervisor ends by itself; waiting leaves no zombie.
        let _ = self.child.wait();
    }
}

/// `dev/` beside the current folder, else beside the sources we were built from.
fn folder() -> Result<PathBuf> {
    let built_from = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let folders = [PathBuf::from("."), built_from].map(|folder| folder.join("dev"));
    let found = folders
        .into_iter()
        .find(|dev| dev.join("supervise.sh").exists());
    found.ok_or_else(|| {
        let message = "throw-away servers need the folder dev of postbox' sources: run it there, or set \
                       DATABASE_URL and KAFKA_BROKERS to servers of your own";
        Error::new(ErrorKind::Settings, message)
    })
}

fn unexpected(message: String) -> Error {
    Error::new(ErrorKind::Unexpected, message)
}
