//! The relay as a process of its own, as its users run it.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{IN_FLIGHT_MAX, Stage};
use crate::error::{Error, ErrorKind, Result};
use crate::lock::lock;

pub(super) struct RelayProcess {
    child: Child,
    log: Arc<Mutex<VecDeque<String>>>,
}

/// How many lines of its log are shown when it ends unasked.
const LOG_LINES: usize = 20;

impl RelayProcess {
    pub(super) fn start(stage: &Stage) -> Result<Self> {
        let program = std::env::current_exe().map_err(|error| unexpected("find postbox", error))?;
        let contract = &stage.contract;
        let mut child = Command::new(program)
            .args(["relay", "--http", "none"])
            .args(["--in-flight-max", &IN_FLIGHT_MAX.to_string()])
            .args(["--schema", &contract.schema, "--slot", &contract.slot])
            .args(["--publication", &contract.publication])
            .env("POSTBOX_DATABASE_URL", &stage.database_url)
            .env("POSTBOX_BROKERS", &stage.kafka.brokers)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| unexpected("start the relay", error))?;
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
        Ok(Self { child, log })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails if it has ended, with the end of its log.
    pub(super) fn check(&mut self) -> Result<()> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(self.ended(&status.to_string())),
            Err(error) => Err(unexpected("watch the relay", error)),
        }
    }

    /// SIGKILL.
    pub(super) fn kill(&mut self) -> Result<()> {
        self.check()?;
        let killed = self.child.kill().and_then(|()| self.child.wait());
        killed.map_err(|error| unexpected("kill the relay", error))?;
        Ok(())
    }

    /// SIGTERM, and waits until it has drained.
    pub(super) fn stop(&mut self) -> Result<()> {
        self.check()?;
        // The standard library only knows SIGKILL.
        let pid = self.pid().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status();
        sent.map_err(|error| unexpected("stop the relay", error))?;
        let deadline = Instant::now() + Duration::from_secs(35);
        while Instant::now() < deadline {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(20)),
                Ok(Some(status)) if status.success() => return Ok(()),
                Ok(Some(status)) => return Err(self.ended(&status.to_string())),
                Err(error) => return Err(unexpected("wait for the relay", error)),
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
            format!("the relay ended ({how}):{log}"),
        )
    }
}

impl Drop for RelayProcess {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn unexpected(message: &str, error: std::io::Error) -> Error {
    Error::new(ErrorKind::Unexpected, message).caused_by(error)
}
