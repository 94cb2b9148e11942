//! `postbox relay` as a process, as its users run it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Fixture, PATIENCE, postbox};
use crate::errors::assert_documented;

pub(crate) struct Relay {
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
    /// Ends with what the child has to say.
    reader: Option<JoinHandle<()>>,
}

impl Relay {
    /// Starts a relay with these flags, and waits until it streams.
    pub(crate) async fn streaming(fixture: &Fixture, flags: &[&str]) -> Self {
        let mut relay = Self::start(fixture, flags);
        relay.wait_for_log("streaming").await;
        relay
    }

    /// Starts a relay with these flags.
    pub(crate) fn start(fixture: &Fixture, flags: &[&str]) -> Self {
        Self::spawn(&mut Self::command(fixture, flags))
    }

    /// The same, behind a shell's `ulimit`.
    pub(crate) fn limited(fixture: &Fixture, ulimit: &str, flags: &[&str]) -> Self {
        let relay = Self::command(fixture, flags);
        let mut shell = Command::new("sh");
        shell.args(["-c", &format!("{ulimit} && exec \"$0\" \"$@\"")]);
        shell.arg(relay.get_program()).args(relay.get_args());
        for (name, value) in relay.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        Self::spawn(&mut shell)
    }

    /// The command that starts a relay with these flags.
    pub(crate) fn command(fixture: &Fixture, flags: &[&str]) -> Command {
        let mut command = postbox(&["relay"]);
        command
            .args(flags)
            .env("POSTBOX_SCHEMA", &fixture.contract.schema)
            .env("POSTBOX_SLOT", &fixture.contract.slot)
            .env("POSTBOX_PUBLICATION", &fixture.contract.publication)
            .env("POSTBOX_DATABASE_URL", &fixture.database_url)
            .env("POSTBOX_BROKERS", &fixture.brokers)
            .env("POSTBOX_HTTP", "127.0.0.1:0");
        command
    }

    /// Starts a command that does not end by itself.
    pub(crate) fn spawn(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = child.stderr.take().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let lines = Arc::clone(&log);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                lines.lock().unwrap().push(line);
            }
        });
        Self {
            child,
            log,
            reader: Some(reader),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Everything it has logged.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// Waits for a line that contains `text`.
    pub(crate) async fn wait_for_log(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            assert!(
                Instant::now() < deadline && self.is_running(),
                "no \"{text}\" in the log:\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends a signal by name, such as `TERM` or `STOP`.
    pub(crate) fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        assert!(self.is_running(), "ended by itself:\n{}", self.log());
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM; the exit code.
    pub(crate) async fn stop(mut self) -> i32 {
        assert!(self.is_running(), "ended by itself:\n{}", self.log());
        self.signal("TERM");
        self.exit_code().await
    }

    /// SIGTERM, which must drain and confirm.
    pub(crate) async fn drain(self) {
        let log = Arc::clone(&self.log);
        assert_eq!(self.stop().await, 0, "{}", log.lock().unwrap().join("\n"));
    }

    /// Waits until it ends. What it ends with must be in the docs.
    pub(crate) async fn exit_code(&mut self) -> i32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                if let Some(reader) = self.reader.take() {
                    reader.join().unwrap();
                }
                let code = status.code().unwrap_or(-1);
                assert_documented(&self.log(), code);
                return code;
            }
            assert!(Instant::now() < deadline, "does not end:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Where it serves http.
    pub(crate) fn address(&self) -> String {
        let log = self.log();
        let address = log.split("address=").nth(1).expect("http is served");
        address.split_whitespace().next().unwrap().to_owned()
    }

    /// The status and the body that a path answers.
    pub(crate) fn get(&self, path: &str) -> (u16, String) {
        let (status, _, body) = self.ask(&format!("GET {path} HTTP/1.0\r\n\r\n"));
        (status, body)
    }

    /// The status, the head and the body that a request is answered with.
    pub(crate) fn ask(&self, request: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(self.address()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split_whitespace().nth(1).unwrap().parse().unwrap();
        (status, head.to_owned(), body.to_owned())
    }

    /// How many records of a topic were acknowledged.
    pub(crate) fn published(&self, topic: &str) -> usize {
        let metric = format!("postbox_events_published_total{{topic=\"{topic}\"}}");
        match self.get("/metrics").1.contains(&metric) {
            true => self.metric(&metric) as usize,
            false => 0,
        }
    }

    /// The value of a metric, by its name with labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let (_, text) = self.get("/metrics");
        let line = text
            .lines()
            .find(|line| line.starts_with(&format!("{name} ")));
        let line = line.unwrap_or_else(|| panic!("no {name} in:\n{text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// The memory it has now, in bytes.
    pub(crate) fn memory(&self) -> u64 {
        let pid = self.pid().to_string();
        let output = Command::new("ps").args(["-o", "rss=", "-p", &pid]).output();
        let kibibytes = String::from_utf8(output.unwrap().stdout).unwrap();
        kibibytes.trim().parse::<u64>().unwrap() * 1024
    }
}

/// Sends a signal by name, such as `TERM` or `STOP`, to a process of this machine.
pub(crate) fn signal(pid: u32, name: &str) {
    let pid = pid.to_string();
    let sent = Command::new("kill")
        .args([&format!("-{name}"), &pid])
        .status();
    assert!(sent.unwrap().success(), "kill -{name} {pid}");
}

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the relay's log ---\n{}", self.log());
        }
    }
}
