//! What `/metrics` answers, read strictly.

use std::collections::{BTreeMap, BTreeSet};

/// A scrape: types by metric, and values by name with labels.
#[derive(Debug, Default)]
pub(super) struct Scrape {
    pub(super) types: BTreeMap<String, String>,
    helped: BTreeSet<String>,
    samples: BTreeMap<String, f64>,
}

impl Scrape {
    /// Reads Prometheus' text format, strictly.
    pub(super) fn parse(text: &str) -> Self {
        let mut scrape = Self::default();
        assert!(text.ends_with('\n'), "the last line has no end");
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, help) = help.split_once(' ').unwrap();
                assert!(
                    !help.is_empty() && scrape.helped.insert(name.to_owned()),
                    "{line}"
                );
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert!(scrape.helped.contains(name), "no help before {line}");
                let old = scrape.types.insert(name.to_owned(), kind.to_owned());
                assert_eq!(old, None, "{line}");
            } else {
                let (name, value) = line.rsplit_once(' ').unwrap();
                scrape.check_name(name);
                let value = value.parse().unwrap_or_else(|_| panic!("{line}"));
                let old = scrape.samples.insert(name.to_owned(), value);
                assert_eq!(old, None, "twice: {line}");
            }
        }
        scrape
    }

    /// A sample's name with labels: after its type, and well formed.
    fn check_name(&self, sample: &str) {
        let (name, labels) = sample.split_once('{').unwrap_or((sample, "}"));
        let word = |text: &str| {
            !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        assert!(word(name), "{sample}");
        let suffixes = ["_bucket", "_sum", "_count"];
        let family = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix));
        let kind = self
            .types
            .get(name)
            .or_else(|| self.types.get(family.unwrap_or_default()));
        assert!(kind.is_some(), "no type before {sample}");
        let labels = labels
            .strip_suffix('}')
            .unwrap_or_else(|| panic!("{sample}"));
        for label in labels.split_terminator(',') {
            let (label, value) = label.split_once('=').unwrap_or_else(|| panic!("{sample}"));
            assert!(
                word(label) && value.len() >= 2 && value.starts_with('"') && value.ends_with('"'),
                "{sample}"
            );
        }
    }

    pub(super) fn value(&self, sample: &str) -> f64 {
        *self
            .samples
            .get(sample)
            .unwrap_or_else(|| panic!("no {sample} in {self:#?}"))
    }

    /// Checks that buckets rise up to the count, and returns it.
    pub(super) fn check_histogram(&self, name: &str) -> f64 {
        let prefix = format!("{name}_bucket{{le=\"");
        let buckets = self.samples.iter().filter_map(|(sample, count)| {
            let bound = sample.strip_prefix(&prefix)?.strip_suffix("\"}")?;
            Some((bound.parse::<f64>().unwrap(), *count))
        });
        let mut buckets: Vec<_> = buckets.collect();
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(
            buckets.len() > 10 && buckets.is_sorted_by(|a, b| a.1 <= b.1),
            "{buckets:?}"
        );
        let count = self.value(&format!("{name}_count"));
        assert_eq!(buckets.last(), Some(&(f64::INFINITY, count)));
        assert!(count == 0.0 || self.value(&format!("{name}_sum")) > 0.0);
        count
    }
}
