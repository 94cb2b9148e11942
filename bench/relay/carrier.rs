//! What is measured: programs that carry rows from a table, or from a slot, to Kafka.

use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::rig::{self, Rig};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carrier {
    Postbox(Way),
    /// postbox over the Unix socket, which polls.
    Polling(Wake),
    /// postbox over the Unix socket, with these variables and flags.
    Variant(&'static str),
    /// Postgres' own reader of slots, which does nothing with what it reads.
    PgRecvlogical(Way),
    Debezium(Debezium),
    OmniBox,
    /// postbox over the Unix socket, which claims rows of omni-box's table.
    Claiming,
    /// postbox over the Unix socket, which reads omni-box's table from a slot.
    Tracked(Marks),
}

/// What becomes of a row that is delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Marks {
    None,
    Published,
}

/// The slot and the publication of omni-box's table.
const TRACKED: &str = "tracked";

/// What makes a relay that polls look again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wake {
    Interval,
    Notification,
}

/// How Postgres is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Socket,
    Tcp,
}

/// The settings that `bench/compare/debezium` knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Debezium {
    Default,
    Tuned,
    TunedPlus,
    LowLatency,
}

impl Debezium {
    pub(crate) const ALL: [Self; 4] = [
        Self::Default,
        Self::Tuned,
        Self::TunedPlus,
        Self::LowLatency,
    ];
}

/// Where a carrier's rows are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Table {
    Postbox,
    Debezium,
    OmniBox,
}

impl Carrier {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Variant(flags) => flags,
            Self::Postbox(Way::Socket) => "postbox, Unix socket",
            Self::Postbox(Way::Tcp) => "postbox, TCP",
            Self::Polling(Wake::Interval) => "postbox, polling",
            Self::Polling(Wake::Notification) => "postbox, polling, notified",
            Self::PgRecvlogical(Way::Socket) => "pg_recvlogical, Unix socket",
            Self::PgRecvlogical(Way::Tcp) => "pg_recvlogical, TCP",
            Self::Debezium(Debezium::Default) => "Debezium, default",
            Self::Debezium(Debezium::Tuned) => "Debezium, tuned",
            Self::Debezium(Debezium::TunedPlus) => "Debezium, tuned plus",
            Self::Debezium(Debezium::LowLatency) => "Debezium, low latency",
            Self::OmniBox => "omni-box",
            Self::Claiming => "postbox, claiming",
            Self::Tracked(Marks::None) => "postbox, from a slot",
            Self::Tracked(Marks::Published) => "postbox, from a slot, marking",
        }
    }

    pub(crate) fn table(self) -> Table {
        match self {
            Self::Postbox(_) | Self::Polling(_) | Self::Variant(_) | Self::PgRecvlogical(_) => {
                Table::Postbox
            }
            Self::Debezium(_) => Table::Debezium,
            Self::OmniBox | Self::Claiming | Self::Tracked(_) => Table::OmniBox,
        }
    }

    /// The slot it reads, if it reads one.
    pub(crate) fn slot(self) -> Option<&'static str> {
        match self {
            Self::Postbox(_) | Self::Variant(_) => Some("postbox"),
            Self::PgRecvlogical(_) => Some("reader"),
            Self::Debezium(_) => Some("debezium"),
            Self::Tracked(_) => Some(TRACKED),
            Self::Polling(_) | Self::OmniBox | Self::Claiming => None,
        }
    }

    fn is_postbox(self) -> bool {
        matches!(
            self,
            Self::Postbox(_)
                | Self::Polling(_)
                | Self::Claiming
                | Self::Tracked(_)
                | Self::Variant(_)
        )
    }

    /// Starts it. In `folder` it keeps what it needs when it is started again; `end` is
    /// the LSN up to which a reader reads.
    pub(crate) fn start(self, rig: &Rig, folder: &Path, end: Option<&str>) -> Running {
        let compare = rig::home().join("bench/compare");
        let mut command = own_command();
        match self {
            Self::Postbox(way) => relay(&mut command, rig, way),
            Self::Polling(_) => relay(&mut command, rig, Way::Socket).args(["--mode", "poll"]),
            Self::Variant(words) => {
                let is_variable = |word: &&str| !word.starts_with('-') && word.contains('=');
                let words: Vec<&str> = words.split_whitespace().collect();
                let variables = words.iter().take_while(|word| is_variable(word)).count();
                let (variables, flags) = words.split_at(variables);
                relay(&mut command, rig, Way::Socket)
                    .envs(variables.iter().filter_map(|word| word.split_once('=')))
                    .args(flags)
            }
            Self::PgRecvlogical(way) => command
                .arg(rig::pg_recvlogical().expect("looked for before"))
                .args(["--dbname", &rig.database_url(way), "--slot", "reader"])
                .args(["--start", "--no-loop", "--file", "/dev/null"])
                .args(["--option", "proto_version=1"])
                .args(["--option", "publication_names=postbox"])
                .args(["--endpos", end.expect("a reader ends")]),
            Self::Debezium(settings) => {
                let settings = match settings {
                    Debezium::Default => "default",
                    Debezium::Tuned => "tuned",
                    Debezium::TunedPlus => "tuned-plus",
                    Debezium::LowLatency => "low-latency",
                };
                command.arg(compare.join("debezium")).arg(settings)
            }
            Self::OmniBox => command.arg(compare.join("omni-box")).arg("relay"),
            Self::Claiming => relay(&mut command, rig, Way::Socket)
                .args(["--mode", "poll", "--table-preset", "omni-box"])
                .args(["--format", "raw"]),
            Self::Tracked(marks) => relay(&mut command, rig, Way::Socket)
                .args(["--table-preset", "omni-box", "--format", "raw"])
                .args(["--slot", TRACKED, "--publication", TRACKED])
                .args((marks == Marks::Published).then_some("--mark")),
        };
        command
            .env("SLOT", self.slot().unwrap_or_default())
            .env("FOLDER", folder);
        spawn(command, rig, folder, self.name(), self.is_postbox())
    }
}

/// postbox that consumes a topic, over the Unix socket.
pub(crate) fn inbox(rig: &Rig, topic: &str, flags: &[&str]) -> Running {
    let mut command = own_command();
    postbox(&mut command, rig, Way::Socket, "inbox")
        .args(["--topics", topic, "--group", topic])
        .args(flags);
    spawn(command, rig, rig.scratch.path(), "postbox inbox", true)
}

pub(crate) fn inbox_of_omni_box(rig: &Rig, topic: &str) -> Running {
    let mut command = own_command();
    let program = rig::home().join("bench/compare/omni-box");
    command.arg(program).arg("inbox").env("TOPIC", topic);
    spawn(command, rig, rig.scratch.path(), "omni-box", false)
}

fn spawn(
    mut command: Command,
    rig: &Rig,
    folder: &Path,
    name: &'static str,
    is_postbox: bool,
) -> Running {
    let log = folder.join("log");
    let file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(&log)
        .unwrap();
    let child = environment(&mut command, rig)
        .stdin(Stdio::null())
        .stdout(file.try_clone().unwrap())
        .stderr(file)
        .spawn()
        .unwrap();
    Running {
        name,
        is_postbox,
        child,
        log,
        began: Instant::now(),
    }
}

/// A command whose process ends when this one does, however it ends.
fn own_command() -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    command
}

fn relay<'c>(command: &'c mut Command, rig: &Rig, way: Way) -> &'c mut Command {
    postbox(command, rig, way, "relay")
}

fn postbox<'c>(command: &'c mut Command, rig: &Rig, way: Way, subcommand: &str) -> &'c mut Command {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("POSTBOX") {
            command.env_remove(name);
        }
    }
    if let Some(format) = rig.format {
        command.env("POSTBOX_FORMAT", format);
    }
    command
        .arg(rig::postbox())
        .args([subcommand, "--http", "127.0.0.1:0"])
        .env("POSTBOX_DATABASE_URL", rig.database_url(way))
        .env("POSTBOX_BROKERS", rig.brokers())
}

fn environment<'c>(command: &'c mut Command, rig: &Rig) -> &'c mut Command {
    command
        .env("PGHOST", "127.0.0.1")
        .env("PGPORT", rig.postgres.fact("port"))
        .env("PGUSER", "postgres")
        .env("PGDATABASE", "postgres")
        .env("BROKERS", rig.brokers())
}

impl Table {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Postbox => "postbox",
            Self::Debezium => "debezium",
            Self::OmniBox => "omni_box",
        }
    }

    /// The function that inserts rows: `(topic, first, last)`.
    pub(crate) fn insert(self) -> String {
        format!("bench_insert_{}", self.name())
    }

    pub(crate) async fn create(self, rig: &Rig) {
        let make = match self {
            Self::Postbox => Some((rig::postbox(), "setup")),
            Self::Debezium => None,
            Self::OmniBox => Some((rig::home().join("bench/compare/omni-box"), "create")),
        };
        if let Some((program, argument)) = make {
            let mut command = Command::new(program);
            command
                .arg(argument)
                .env("POSTBOX_MODE", rig.mode)
                .env("POSTBOX_NOTIFY", (rig.mode == "poll").to_string())
                .env("POSTBOX_DATABASE_URL", rig.database_url(Way::Socket));
            let output = environment(&mut command, rig).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{said}");
        }
        let file = match self {
            Self::Postbox => return,
            Self::Debezium => "bench/compare/debezium.sql",
            Self::OmniBox => "bench/compare/omni-box.sql",
        };
        let sql = std::fs::read_to_string(rig::home().join(file)).unwrap();
        rig.client.batch_execute(&sql).await.unwrap();
        if self == Self::OmniBox {
            let mut command = Command::new(rig::postbox());
            command
                .args(["setup", "--table-preset", "omni-box"])
                .args(["--slot", TRACKED, "--publication", TRACKED])
                .env("POSTBOX_DATABASE_URL", rig.database_url(Way::Socket));
            let output = command.output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{said}");
        }
    }
}

pub(crate) struct Running {
    name: &'static str,
    is_postbox: bool,
    child: Child,
    log: PathBuf,
    pub(crate) began: Instant,
}

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it has ended, if it has.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Panics with the end of its log if it has ended.
    pub(crate) fn check(&mut self) {
        if let Some(status) = self.ended() {
            self.fail(&format!("ended with {status}"));
        }
    }

    pub(crate) fn kill(mut self) {
        self.check();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, and waits.
    pub(crate) async fn stop(mut self) {
        self.check();
        let pid = self.pid().to_string();
        Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let status = loop {
            if let Some(status) = self.ended() {
                break status;
            }
            if Instant::now() > deadline {
                self.fail("did not end within 60 s");
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        // A JVM and others end by the signal, or as if they had.
        let told = status.signal() == Some(15) || status.code() == Some(143);
        if !status.success() && (!told || self.is_postbox) {
            self.fail(&format!("ended with {status}"));
        }
    }

    pub(crate) fn fail(&self, what: &str) -> ! {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let end = lines[lines.len().saturating_sub(20)..].join("\n  ");
        panic!("{} {what}; its log ends with:\n  {end}", self.name);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
