//! Topics that the brokers have refused a moment ago: they are not asked again for each row
//! that is put off. And those that they have refused in the last hour: when they are asked
//! again, nobody waits for the topic to be made. Forgotten by then, so that names which rows
//! make up do not pile up.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// How long a topic that was refused is not asked about again.
const REFUSED_TOPIC_MAX: Duration = Duration::from_secs(10);

/// How long it is known that it was.
const KNOWN_MAX: Duration = Duration::from_secs(3600);

/// By name: since when, and why.
#[derive(Debug, Default)]
pub(super) struct RefusedTopics(HashMap<String, (Instant, String)>);

impl RefusedTopics {
    /// The brokers refuse this topic, as of `now`.
    pub(super) fn insert(&mut self, name: String, why: String, now: Instant) {
        self.0
            .retain(|_, (since, _)| now.duration_since(*since) < KNOWN_MAX);
        self.0.insert(name, (now, why));
    }

    /// Whether it was refused before.
    pub(super) fn knows(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Why they do, if they have said so of late.
    pub(super) fn why(&self, name: &str, now: Instant) -> Option<&str> {
        let (since, why) = self.0.get(name)?;
        is_recent(*since, now).then_some(why)
    }
}

fn is_recent(since: Instant, now: Instant) -> bool {
    now.duration_since(since) < REFUSED_TOPIC_MAX
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_is_asked_about_again_after_a_while_and_its_name_is_forgotten() {
        let mut topics = RefusedTopics::default();
        let start = Instant::now();
        topics.insert("a".to_owned(), "why".to_owned(), start);
        assert_eq!(topics.why("b", start), None);
        let late = start + REFUSED_TOPIC_MAX;
        assert_eq!(
            topics.why("a", late.checked_sub(Duration::from_millis(1)).unwrap()),
            Some("why")
        );
        assert_eq!(topics.why("a", late), None);
        assert!(topics.knows("a"));
        let later = start + KNOWN_MAX;
        topics.insert("b".to_owned(), "why".to_owned(), later);
        assert!(!topics.knows("a"));
    }
}
