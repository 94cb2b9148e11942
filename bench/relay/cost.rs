//! CPU time and memory of processes, as the kernel counts them: proc(5).

use std::collections::HashMap;

use crate::rig::Rig;
use crate::runs::Run;

/// Counts what was used since it was made.
pub(crate) struct Meter {
    relay: Used,
    walsender: Option<Used>,
    /// The postmaster; its children are the server.
    postgres: Used,
    broker: Used,
    others: HashMap<u32, f64>,
}

struct Used {
    pid: u32,
    before: f64,
    now: f64,
}

impl Meter {
    pub(crate) fn start(rig: &Rig, relay: u32, walsender: Option<u32>) -> Self {
        let pid = |server: &postbox::servers::Server| server.fact("pid").parse().unwrap();
        let (postmaster, broker) = (pid(&rig.postgres), pid(&rig.kafka));
        let processes = Process::all();
        let server = server_seconds(&processes, postmaster);
        let others = processes
            .into_iter()
            .map(|process| (process.pid, process.used));
        Self {
            relay: Used::since_now(relay),
            walsender: walsender.map(Used::since_now),
            postgres: Used {
                pid: postmaster,
                before: server,
                now: server,
            },
            broker: Used::since_now(broker),
            others: others.collect(),
        }
    }

    /// Looks at what may end before the measurement does: it keeps what it had.
    pub(crate) fn look(&mut self) {
        self.relay.look();
        if let Some(walsender) = &mut self.walsender {
            walsender.look();
        }
    }

    /// CPU of each part by event, and the cores that were busy with anything else than
    /// what is measured, and measures.
    pub(crate) fn finish(mut self, run: &mut Run, events: f64, seconds: f64) {
        self.look();
        self.broker.look();
        let processes = Process::all();
        self.postgres.now = server_seconds(&processes, self.postgres.pid);
        let mut set = |name: &str, used: &Used| run.set(name, used.seconds() * 1e6 / events);
        set("relay_us_per_event", &self.relay);
        if let Some(walsender) = &self.walsender {
            set("walsender_us_per_event", walsender);
        }
        set("postgres_us_per_event", &self.postgres);
        set("broker_us_per_event", &self.broker);
        let ours = [
            self.relay.pid,
            self.postgres.pid,
            self.broker.pid,
            std::process::id(),
        ];
        let others = processes
            .iter()
            .filter(|process| !ours.contains(&process.pid) && process.parent != self.postgres.pid);
        let others: f64 = others
            .map(|process| process.used - self.others.get(&process.pid).unwrap_or(&0.0))
            .sum();
        run.set("other_cores", others / seconds);
    }

    /// CPU seconds of the relay.
    pub(crate) fn relay_seconds(&mut self) -> f64 {
        self.look();
        self.relay.seconds()
    }
}

impl Used {
    fn since_now(pid: u32) -> Self {
        let before = cpu_seconds(pid);
        Self {
            pid,
            before,
            now: before,
        }
    }

    fn look(&mut self) {
        self.now = self.now.max(cpu_seconds(self.pid));
    }

    fn seconds(&self) -> f64 {
        self.now - self.before
    }
}

struct Process {
    pid: u32,
    parent: u32,
    used: f64,
    /// By its children that have ended.
    used_by_children: f64,
}

/// The kernel's unit of time in /proc, on every platform that Rust runs on.
const TICKS_PER_SECOND: f64 = 100.0;

impl Process {
    fn all() -> Vec<Self> {
        let entries = std::fs::read_dir("/proc").unwrap();
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        pids.filter_map(Self::read).collect()
    }

    /// `None` if it has ended.
    fn read(pid: u32) -> Option<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The second field, in parentheses, may have blanks.
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let seconds = |at: usize| Some(fields.get(at)?.parse::<f64>().ok()? / TICKS_PER_SECOND);
        Some(Self {
            pid,
            parent: fields.get(1)?.parse().ok()?,
            used: seconds(11)? + seconds(12)?,
            used_by_children: seconds(13)? + seconds(14)?,
        })
    }
}

/// What a process has used, in user and kernel mode; 0 if it has ended.
pub(crate) fn cpu_seconds(pid: u32) -> f64 {
    Process::read(pid).map_or(0.0, |process| process.used)
}

/// What a postmaster and its children have used, those that have ended too.
fn server_seconds(processes: &[Process], postmaster: u32) -> f64 {
    let used = processes.iter().map(|process| match process {
        process if process.pid == postmaster => process.used + process.used_by_children,
        process if process.parent == postmaster => process.used,
        _ => 0.0,
    });
    used.sum()
}

/// A line of /proc/PID/status, such as `VmRSS` or `VmHWM`, in megabytes.
pub(crate) fn memory_mb(pid: u32, line: &str) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let found = status
        .lines()
        .find_map(|text| text.strip_prefix(line)?.strip_prefix(':'));
    let kibibytes: f64 = found?.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kibibytes * 1024.0 / 1e6)
}
