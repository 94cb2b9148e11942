//! CPU time and memory of processes, as the kernel counts them: proc(5).

use std::collections::BTreeMap;

/// One of those whose cost is told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Part {
    Relay,
    Walsender,
    Broker,
}

impl Part {
    pub(crate) const ALL: [Self; 3] = [Self::Relay, Self::Walsender, Self::Broker];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Walsender => "walsender",
            Self::Broker => "broker",
        }
    }
}

/// Counts what each part and the whole machine used since it was made.
pub(crate) struct Meter {
    parts: BTreeMap<Part, Used>,
    machine: f64,
}

struct Used {
    pid: u32,
    before: f64,
    now: f64,
}

impl Meter {
    pub(crate) fn start(parts: impl IntoIterator<Item = (Part, u32)>) -> Self {
        let parts = parts.into_iter().map(|(part, pid)| {
            let before = cpu_seconds(pid).unwrap_or(0.0);
            (
                part,
                Used {
                    pid,
                    before,
                    now: before,
                },
            )
        });
        Self {
            parts: parts.collect(),
            machine: busy_seconds(),
        }
    }

    /// Looks again. What has ended keeps what it had when it was last looked at.
    pub(crate) fn look(&mut self) {
        for used in self.parts.values_mut() {
            used.now = cpu_seconds(used.pid).unwrap_or(used.now);
        }
    }

    /// CPU seconds of a part.
    pub(crate) fn of(&self, part: Part) -> Option<f64> {
        self.parts.get(&part).map(|used| used.now - used.before)
    }

    /// CPU seconds of the whole machine until now.
    pub(crate) fn machine(&self) -> f64 {
        busy_seconds() - self.machine
    }
}

/// The kernel's unit of time in /proc, on every platform that Rust runs on.
const TICKS_PER_SECOND: f64 = 100.0;

/// What a process has used, in user and kernel mode.
pub(crate) fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, in parentheses, may have blanks.
    let fields = stat.rsplit_once(") ")?.1.split(' ');
    let ticks: Vec<f64> = fields
        .skip(11)
        .take(2)
        .map_while(|f| f.parse().ok())
        .collect();
    Some(ticks.iter().sum::<f64>() / TICKS_PER_SECOND)
}

/// What all processes have used, but for being idle and waiting for disks.
fn busy_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/stat").unwrap();
    let cpu = stat.lines().next().unwrap().split_whitespace().skip(1);
    let ticks: Vec<f64> = cpu.map(|field| field.parse().unwrap()).collect();
    // user nice system idle iowait irq softirq steal: proc_stat(5).
    let busy: f64 = ticks.iter().take(8).sum::<f64>() - ticks[3] - ticks[4];
    busy / TICKS_PER_SECOND
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
