//! Topics that the brokers refuse, asked about now and then.
//!
//! A topic may be ours to see, and not to write. So that the brokers know it is only the
//! half: what waits for it is tried, and the stream sends to it once one was delivered.

use std::collections::{HashMap, HashSet};
use std::future::pending;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{debug, info};

use super::queue::Queue;
use super::tries::Tried;
use crate::error::{Result, joined};
use crate::parked::OnPoison;
use crate::publisher::Topic;

/// How soon a topic that was refused is asked about, as it may just be being made on demand;
/// each further time after twice as long.
const PROBE_MIN: Duration = Duration::from_millis(200);
const PROBE_MAX: Duration = Duration::from_secs(60);

/// What is known of them.
#[derive(Default)]
pub(super) struct Topics {
    probes: HashMap<String, Probe>,
    probing: JoinSet<Result<(String, Result<Topic>)>>,
    /// The brokers know them by now.
    trials: HashSet<String>,
    /// One was delivered just now.
    freed: Vec<String>,
}

/// When a topic is asked about.
struct Probe {
    at: Instant,
    pause: Duration,
    is_on_its_way: bool,
}

impl Topics {
    /// Topics whose events are to be tried though they are held.
    pub(super) fn trials(&self) -> &HashSet<String> {
        &self.trials
    }

    /// Rows were tried: those of a topic on trial say whether it is free.
    pub(super) fn tried(&mut self, tried: &Tried) {
        for (topic, _) in &tried.outcome.topics {
            self.trials.remove(topic);
        }
        for topic in &tried.delivered {
            if self.trials.remove(topic) {
                info!(topic, "the brokers take events of this topic by now");
                self.probes.remove(topic);
                self.freed.push(topic.clone());
            }
        }
    }

    /// The next answer about a topic. Cancel-safe.
    pub(super) async fn answer(&mut self) -> Result<(String, Result<Topic>)> {
        match self.probing.join_next().await {
            Some(answer) => joined(answer),
            None => pending().await,
        }
    }
}

impl Queue {
    /// Asks about topics that are held, each in its time.
    pub(super) fn probe(&mut self) -> Result<()> {
        let held: HashSet<String> = self
            .sender
            .shared
            .with(|holds| holds.topics().keys().cloned().collect());
        let now = Instant::now();
        let topics = &mut self.topics;
        topics
            .probes
            .retain(|topic, probe| probe.is_on_its_way || held.contains(topic));
        for topic in held {
            // Where nothing waits for it, the stream itself tries it next.
            let pause = match self.sender.settings.on_poison {
                OnPoison::Skip => PROBE_MAX,
                OnPoison::Park | OnPoison::Stop => PROBE_MIN,
            };
            let probe = topics.probes.entry(topic.clone()).or_insert(Probe {
                at: now + pause,
                pause,
                is_on_its_way: false,
            });
            if probe.is_on_its_way || probe.at > now {
                continue;
            }
            probe.is_on_its_way = true;
            let resolved = self.sender.courier.probe(&topic)?;
            topics
                .probing
                .spawn(async move { Ok((topic, resolved.await)) });
        }
        Ok(())
    }

    /// The brokers have answered.
    pub(super) async fn probed(&mut self, (topic, found): (String, Result<Topic>)) -> Result<()> {
        if let Some(probe) = self.topics.probes.get_mut(&topic) {
            probe.is_on_its_way = false;
            // Also if they know it: what is tried then may be refused.
            probe.pause = (probe.pause * 2).min(PROBE_MAX);
            probe.at = Instant::now() + probe.pause;
        }
        if let Err(error) = found {
            debug!("{}", error.chain());
        } else if self.sender.store.free_topic(&topic).await? {
            self.topics.trials.insert(topic);
        } else {
            // What was on trial has gone, or is refused for itself.
            self.topics.trials.remove(&topic);
            self.sender.shared.change(|holds| holds.free_topic(&topic));
        }
        Ok(())
    }

    /// The answers that have come.
    pub(super) async fn take_answers(&mut self) -> Result<()> {
        while let Some(answer) = self.topics.probing.try_join_next() {
            self.probed(joined(answer)?).await?;
        }
        Ok(())
    }

    /// The stream sends to topics again of which one was delivered.
    pub(super) async fn free_topics(&mut self) -> Result<()> {
        for topic in std::mem::take(&mut self.topics.freed) {
            self.sender.shared.change(|holds| holds.free_topic(&topic));
            // What was parked meanwhile.
            self.sender.store.free_topic(&topic).await?;
        }
        Ok(())
    }
}
