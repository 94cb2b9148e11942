//! A picture of the medians: how many events a second, and how late they are.

use std::fmt::Write as _;

use crate::report::{self, Runs};

const WIDTH: f64 = 900.0;
const LEFT: f64 = 370.0;
const RIGHT: f64 = 110.0;
const ROW: f64 = 22.0;
const HEAD: f64 = 46.0;

/// Of the carriers, ours and others.
const OURS: &str = "#2563eb";
const THEIRS: &str = "#9ca3af";

/// An SVG 1.1 document that is readable on white and on black, if there is anything to
/// draw.
pub(crate) fn draw(runs: &Runs) -> Option<String> {
    let panels = [
        (
            "drain",
            "events_per_second",
            "Events a second, from a backlog (longer is better)",
            false,
        ),
        (
            "latency",
            "p50_ms",
            "COMMIT to consumer, median, ms (shorter is better, logarithmic)",
            true,
        ),
        (
            "latency",
            "p99_ms",
            "COMMIT to consumer, 99 %, ms (shorter is better, logarithmic)",
            true,
        ),
    ];
    let (mut body, mut y) = (String::new(), 0.0);
    for (measure, figure, title, logarithmic) in panels {
        let bars: Vec<(String, bool, f64)> = side_by_side(runs.rows(measure))
            .into_iter()
            .filter_map(|(load, carrier)| {
                let value = report::median(runs.figures(measure, load, carrier, figure))?;
                Some((
                    format!("{load}: {carrier}"),
                    carrier.starts_with("postbox"),
                    value,
                ))
            })
            .collect();
        if !bars.is_empty() {
            y = panel(&mut body, y, title, &bars, logarithmic);
        }
    }
    (!body.is_empty()).then(|| format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y}\" width=\"{WIDTH}\" height=\"{y}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#6b7280\">\n{body}</svg>\n"
    ))
}

/// In each load, what is held against each other in neighbouring bars: by the way in which
/// Postgres is reached, then by name.
fn side_by_side<'r>(mut rows: Vec<(&'r str, &'r str)>) -> Vec<(&'r str, &'r str)> {
    let mut loads: Vec<&str> = rows.iter().map(|(load, _)| *load).collect();
    loads.dedup();
    rows.sort_by_key(|(load, carrier)| {
        let way = carrier.split_once(", ").map(|(_, way)| way);
        (loads.iter().position(|of| of == load), way, *carrier)
    });
    rows
}

/// Draws bars below `y`, and tells where they end.
fn panel(
    body: &mut String,
    y: f64,
    title: &str,
    bars: &[(String, bool, f64)],
    logarithmic: bool,
) -> f64 {
    let _ = writeln!(
        body,
        "<text x=\"8\" y=\"{}\" font-size=\"15\" font-weight=\"bold\">{title}</text>",
        y + 28.0
    );
    let most = bars.iter().map(|(.., value)| *value).fold(0.0, f64::max);
    // From a tenth of a millisecond on.
    let size = |value: f64| match logarithmic {
        true => (value.max(0.1) / 0.1).ln() / (most.max(1.0) / 0.1).ln(),
        false => value / most,
    };
    for (number, (label, ours, value)) in bars.iter().enumerate() {
        let top = y + HEAD + number as f64 * ROW;
        let width = (size(*value) * (WIDTH - LEFT - RIGHT)).max(1.0);
        let color = if *ours { OURS } else { THEIRS };
        let shown = match value {
            value if *value >= 1_000.0 => format!("{:.0}k", value / 1e3),
            value => format!("{value:.1}"),
        };
        let _ = writeln!(
            body,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\">{label}</text>\
             <rect x=\"{LEFT:.0}\" y=\"{:.0}\" width=\"{width:.0}\" height=\"{:.0}\" fill=\"{color}\"/>\
             <text x=\"{:.0}\" y=\"{:.0}\">{shown}</text>",
            LEFT - 8.0,
            top + 14.0,
            top + 3.0,
            ROW - 6.0,
            LEFT + width + 6.0,
            top + 14.0,
        );
    }
    y + HEAD + bars.len() as f64 * ROW + 12.0
}
