//! What the demo prints: a live line in a terminal, plain lines elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use super::Judged;
use super::audience::Audience;
use crate::oracle::Writers;

pub(super) struct Screen {
    is_terminal: bool,
    started: Instant,
    /// When the last line was printed that is not a terminal's live line.
    printed: Instant,
    last: (Instant, usize),
}

/// How often a line is printed where none can be drawn over.
const PLAIN_INTERVAL: Duration = Duration::from_secs(2);

impl Screen {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            is_terminal: std::io::stdout().is_terminal(),
            started: now,
            printed: now,
            last: (now, 0),
        }
    }

    pub(super) fn title(&self, text: &str) {
        println!("{}\n", self.styled("1", text));
    }

    /// Something is ready.
    pub(super) fn step(&self, text: &str) {
        println!("  {}  {text}", self.styled("2", &self.clock()));
    }

    /// Something happened.
    pub(super) fn event(&self, text: &str) {
        let clear = if self.is_terminal { "\r\x1b[K" } else { "" };
        println!(
            "{clear}  {}  {}",
            self.styled("2", &self.clock()),
            self.styled("33", text)
        );
    }

    /// Whether the next line is to be drawn.
    pub(super) fn is_due(&self) -> bool {
        self.is_terminal || self.printed.elapsed() >= PLAIN_INTERVAL
    }

    pub(super) fn draw(&mut self, writers: &Writers, audience: &Audience, handled: usize) {
        self.printed = Instant::now();
        let records = audience.records();
        let (since, before) = std::mem::replace(&mut self.last, (self.printed, records));
        let rate = (records - before) as f64 / (self.printed - since).as_secs_f64().max(0.001);
        let line = format!(
            "  {}  committed {:>7}   published {records:>7}   {rate:>6.0}/s   handled {handled:>7}   {}",
            self.styled("2", &self.clock()),
            writers.committed(),
            latency(audience.latencies()),
        );
        if self.is_terminal {
            print!("\r\x1b[K{line}");
            // A live line that is not drawn is no harm.
            let _ = std::io::stdout().flush();
        } else {
            println!("{line}");
        }
    }

    pub(super) fn verdict(&self, judged: &Judged) {
        let (records, effects) = (&judged.records, &judged.effects);
        let handled = effects.records - effects.ghosts.len() - effects.duplicates;
        let rows = [
            ("committed", records.committed, None),
            ("records in Kafka", records.records, None),
            ("lost", records.lost.len(), Some(0)),
            ("out of order", records.inversions.len(), Some(0)),
            ("never committed", records.ghosts.len(), Some(0)),
            ("under a wrong key", records.misplaced.len(), Some(0)),
            (
                "repeated by the kill",
                records.duplicates,
                Some(judged.duplicates_max),
            ),
            ("handled", handled, None),
            ("not handled", effects.lost.len(), Some(0)),
            ("handled twice", effects.duplicates, Some(0)),
            ("handled out of order", effects.inversions.len(), Some(0)),
        ];
        println!("\n  {}", self.styled("1", "The oracle's verdict"));
        for (name, found, limit) in rows {
            let judged = match limit {
                None => String::new(),
                Some(limit) if found > limit => self.styled("1;31", &format!("✗ at most {limit}")),
                Some(0) => self.styled("32", "✓"),
                Some(limit) => self.styled("32", &format!("✓ at most {limit}")),
            };
            println!("  {}", format!("{name:<22}{found:>9}  {judged}").trim_end());
        }
        let (style, word) = match judged.is_clean() {
            true => ("1;32", "nothing lost, in order, handled once"),
            false => ("1;31", "a defect"),
        };
        println!(
            "\n  {} after {:.0} s",
            self.styled(style, word),
            self.started.elapsed().as_secs_f32()
        );
    }

    fn clock(&self) -> String {
        format!("{:5.1} s", self.started.elapsed().as_secs_f32())
    }

    fn styled(&self, style: &str, text: &str) -> String {
        match self.is_terminal {
            true => format!("\x1b[{style}m{text}\x1b[0m"),
            false => text.to_owned(),
        }
    }
}

/// From the insert to the consumer: half of the events were faster than p50.
fn latency(mut latencies: Vec<Duration>) -> String {
    if latencies.is_empty() {
        return "nothing arrived".to_owned();
    }
    latencies.sort_unstable();
    let at = |percent: usize| latencies[(latencies.len() - 1) * percent / 100].as_millis();
    format!("insert to consumer: p50 {} ms, p99 {} ms", at(50), at(99))
}
