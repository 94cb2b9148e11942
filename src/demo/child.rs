//! The relay and the inbox as processes of their own, as their users run them.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{IN_FLIGHT_MAX, Stage};
use crate::error::{Error, ErrorKind, Result};
use crate::lock::lock;

/// One of them.
pub(super) struct Process {
    name: &'static str,
    child: Child,
    log: Arc<Mutex<VecDeque<String>>>,
}

/// How many lines of its log are shown when it ends unasked.
const LOG_LINES: usize = 20;

impl Process {
    pub(super) fn relay(stage: &Stage) -> Result<Self> {
        let contract = &stage.contract;
        let in_flight_max = IN_FLIGHT_MAX.to_string();
        let flags = [
            ["--in-flight-max", &in_flight_max],
            ["--slot", &contract.slot],
            ["--publication", &contract.publication],
        ];
        Self::start("relay", stage, flags.as_flattened())
    }

    pub(super) fn inbox(stage: &Stage) -> Result<Self> {
        // A name of its own: one that was killed gets its partitions back at once.
        let flags = [
            ["--topics", &stage.topic],
            ["--group", &stage.topic],
            ["--handler", &stage.handler],
            ["--instance", "demo"],
        ];
        Self::start("inbox", stage, flags.as_flattened())
    }

    fn start(name: &'static str, stage: &Stage, flags: &[&str]) -> Result<Self> {
        let failed = || format!("start the {name}");
        let program = std::env::current_exe().map_err(|error| unexpected(failed(), error))?;
        let mut child = Command::new(program)
            .args([name, "--http", "none", "--schema", &stage.contract.schema])
            .args(flags)
            .env("POSTBOX_DATABASE_URL", &stage.database_url)
            .env("POSTBOX_BROKERS", &stage.kafka.brokers)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| unexpected(failed(), error))?;
        let stderr = child.stderr.take().expect("stderr is piped");
        let log = Arc::new(Mutex::new(VecDeque::new()));
        let lines = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr)
                .lines()
                .map_while(std::io::Result::ok)
            {
                let mut lines = lock(&lines);
                lines.push_back(line);
                if lines.len() > LOG_LINES {
                    lines.pop_front();
                }
            }
        });
        Ok(Self { name, child, log })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails if it has ended, with the end of its log.
    pub(super) fn check(&mut self) -> Result<()> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(self.ended(&status.to_string())),
            Err(error) => Err(unexpected(format!("watch the {}", self.name), error)),
        }
    }

    /// SIGKILL.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.check()?;
        let killed = self.child.kill().and_then(|()| self.child.wait());
        killed.map_err(|error| unexpected(format!("kill the {}", self.name), error))?;
        Ok(())
    }

    /// SIGTERM, and waits until it has drained.
    pub(super) fn stop(&mut self) -> Result<()> {
        self.check()?;
        // The standard library only knows SIGKILL.
        let pid = self.pid().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status();
        sent.map_err(|error| unexpected(format!("stop the {}", self.name), error))?;
        let deadline = Instant::now() + Duration::from_secs(35);
        while Instant::now() < deadline {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(20)),
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(self.ended(&status.to_string())),
                Err(error) => return Err(unexpected(format!("wait for the {}", self.name), error)),
            }
        }
        Err(self.ended("it did not stop within 35 s"))
    }

    fn ended(&self, how: &str) -> Error {
        let lines = lock(&self.log);
        let log = lines
            .iter()
            .map(|line| format!("\n  {line}"))
            .collect::<String>();
        Error::new(
            ErrorKind::Unexpected,
            format!("the {} ended ({how}):{log}", self.name),
        )
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn unexpected(message: String, error: std::io::Error) -> Error {
    Error::new(ErrorKind::Unexpected, message).caused_by(error)
}
