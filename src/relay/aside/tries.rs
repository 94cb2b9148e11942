//! Tries rows that are due, and says what became of each.

use std::collections::{HashMap, HashSet, VecDeque};

use tracing::{debug, error, info, warn};

use super::Sender;
use super::courier::{Resolved, Sent};
use crate::error::Result;
use crate::parked::store::{Outcome, Refused};
use crate::parked::{Status, Taken};

/// The rows of one key that are sent one after another.
struct Lane {
    topic: String,
    rows: VecDeque<Taken>,
    /// It was on its way when something was refused, or was refused before.
    is_suspect: bool,
}

/// A topic and a key.
type Name = (String, String);

fn name_of(taken: &Taken) -> Option<Name> {
    taken.topic.clone().zip(taken.key.clone())
}

impl Sender {
    /// Sends rows, and says what became of each, and whether no broker could be asked.
    pub(super) async fn send(&mut self, rows: Vec<Taken>) -> Result<(Outcome, bool)> {
        let mut outcome = Outcome::default();
        let mut lanes = self.lanes(rows, &mut outcome);
        let mut away = self.resolve(&mut lanes, &mut outcome).await?;
        if away.is_none() {
            away = self.send_many(&mut lanes, &mut outcome).await?;
        }
        if away.is_none() {
            away = self.send_alone(&mut lanes, &mut outcome).await?;
        }
        for taken in lanes.into_iter().flat_map(|lane| lane.rows) {
            if taken.status == Status::Waiting {
                outcome.untried.push(taken.id);
            }
        }
        if let Some(why) = &away {
            debug!(why, "parked events wait for the brokers");
        }
        Ok((outcome, away.is_some()))
    }

    /// The rows by their keys, each in its order, without those that cannot be sent now.
    fn lanes(&mut self, rows: Vec<Taken>, outcome: &mut Outcome) -> Vec<Lane> {
        let mut lanes: Vec<Lane> = Vec::new();
        let mut numbers: HashMap<Name, usize> = HashMap::new();
        let mut stopped: HashSet<Name> = HashSet::new();
        for mut taken in rows {
            if taken.is_cancelled {
                self.metrics.parked.cancelled.inc();
                info!(id = taken.id, "cancelled: it is not sent");
                outcome.gone.push(taken.id);
                continue;
            }
            let address = self.courier.address(&taken);
            if taken.status == Status::Scheduled
                && let Ok((topic, key)) = &address
            {
                // Whose queue it would join.
                (taken.topic, taken.key) = (Some(topic.clone()), key.clone());
            }
            let name = name_of(&taken);
            // Behind one of its key that is not sent now.
            if name.as_ref().is_some_and(|name| stopped.contains(name)) {
                outcome.untried.push(taken.id);
                continue;
            }
            let topic = match address {
                Ok((topic, _)) => topic,
                Err(sent) => {
                    stopped.extend(name);
                    self.settle(taken, sent, outcome);
                    continue;
                }
            };
            let why = self.why_topic_waits(&topic);
            let is_held = |(topic, key): &Name| self.shared.with(|holds| holds.has_key(topic, key));
            match (taken.status, why) {
                (_, Some(why)) => {
                    let sent = Sent::TopicRefused(topic, why);
                    self.settle(taken, sent, outcome);
                    continue;
                }
                (Status::Scheduled, None) if name.as_ref().is_some_and(is_held) => {
                    outcome.joining.push((taken.id, taken.topic, taken.key));
                    continue;
                }
                _ => {}
            }
            let number = name.map(|name| *numbers.entry(name).or_insert(lanes.len()));
            match number.filter(|number| *number < lanes.len()) {
                Some(number) => lanes[number].rows.push_back(taken),
                None => lanes.push(Lane {
                    topic,
                    is_suspect: taken.attempts > 0,
                    rows: VecDeque::from([taken]),
                }),
            }
        }
        lanes
    }

    fn why_topic_waits(&self, topic: &str) -> Option<String> {
        let why = self.shared.with(|holds| holds.topics().get(topic).cloned());
        why.filter(|_| !self.topics.is_on_trial(topic))
    }

    /// Takes out what goes to topics that the brokers refuse. Says why they could not be
    /// asked, if so.
    async fn resolve(
        &mut self,
        lanes: &mut Vec<Lane>,
        outcome: &mut Outcome,
    ) -> Result<Option<String>> {
        let topics = lanes.iter().map(|lane| lane.topic.clone()).collect();
        let Resolved { refused, away } = self.courier.resolve(topics).await?;
        for lane in lanes.extract_if(.., |lane| refused.contains_key(&lane.topic)) {
            let why = &refused[&lane.topic];
            for taken in lane.rows {
                let sent = Sent::TopicRefused(lane.topic.clone(), why.clone());
                self.settle(taken, sent, outcome);
            }
        }
        for mut lane in lanes.extract_if(.., |lane| away.contains_key(&lane.topic)) {
            self.close(&mut lane, outcome);
        }
        // What goes to others is sent.
        Ok(away.into_values().next().filter(|_| lanes.is_empty()))
    }

    /// Sends what was never refused, of each key one after another. What was on its way when
    /// one was refused is suspect.
    async fn send_many(
        &mut self,
        lanes: &mut [Lane],
        outcome: &mut Outcome,
    ) -> Result<Option<String>> {
        let mut on_their_way: HashMap<u64, usize> = HashMap::new();
        let mut sequence = 0;
        let mut has_failed = false;
        let mut ready: Vec<usize> = (0..lanes.len())
            .filter(|number| !lanes[*number].is_suspect)
            .collect();
        loop {
            for number in std::mem::take(&mut ready) {
                let Some(taken) = lanes[number].rows.front() else {
                    continue;
                };
                if has_failed || taken.attempts > 0 {
                    lanes[number].is_suspect |= taken.attempts > 0;
                    continue;
                }
                match self.courier.hand_over(taken, sequence) {
                    Ok(()) => {
                        on_their_way.insert(sequence, number);
                        sequence += 1;
                    }
                    Err(Sent::Away(why)) => {
                        // It may have been refused one of those that are on their way.
                        self.courier.forget();
                        return Ok(Some(why));
                    }
                    Err(sent) => {
                        let taken = lanes[number].rows.pop_front();
                        self.close(&mut lanes[number], outcome);
                        if let Some(taken) = taken {
                            self.settle(taken, sent, outcome);
                        }
                    }
                }
            }
            if on_their_way.is_empty() {
                break;
            }
            let Some(reports) = self.courier.reports().await? else {
                let lost = on_their_way.len();
                self.courier.forget();
                return Ok(Some(format!("{lost} deliveries are not acknowledged")));
            };
            for report in reports {
                let Some(number) = on_their_way.remove(&report.sequence) else {
                    continue;
                };
                let lane = &mut lanes[number];
                if report.error.is_some() {
                    lane.is_suspect = true;
                    if !std::mem::replace(&mut has_failed, true) {
                        self.courier.purge();
                    }
                } else if let Some(taken) = lane.rows.pop_front() {
                    self.settle(taken, Sent::Delivered, outcome);
                    ready.push(number);
                }
            }
        }
        if has_failed {
            self.courier.renew()?;
        }
        Ok(None)
    }

    /// Sends the first of each suspect key, with nothing else on its way.
    async fn send_alone(
        &mut self,
        lanes: &mut [Lane],
        outcome: &mut Outcome,
    ) -> Result<Option<String>> {
        for lane in lanes.iter_mut().filter(|lane| lane.is_suspect) {
            let Some(taken) = lane.rows.front() else {
                continue;
            };
            let sent = self.courier.send_alone(taken).await?;
            if let Sent::Away(why) = sent {
                return Ok(Some(why));
            }
            if let Some(taken) = lane.rows.pop_front() {
                self.settle(taken, sent, outcome);
            }
            // Those behind it have their turn with the next look, if it is theirs.
            self.close(lane, outcome);
        }
        Ok(None)
    }

    /// What is left of a lane is not tried.
    fn close(&self, lane: &mut Lane, outcome: &mut Outcome) {
        let waiting = lane.rows.drain(..);
        let waiting = waiting.filter(|taken| taken.status == Status::Waiting);
        outcome.untried.extend(waiting.map(|taken| taken.id));
    }

    /// Says what is to be stored of a row.
    fn settle(&mut self, taken: Taken, sent: Sent, outcome: &mut Outcome) {
        let name = name_of(&taken);
        match sent {
            Sent::Delivered => {
                if let Some(name) = &taken.topic {
                    if self.shared.with(|holds| holds.has_too_large(name))
                        && let Ok(record) = self.courier.record(&taken)
                    {
                        let size = record.size();
                        self.shared.change(|holds| holds.passed(name, size));
                    }
                    self.topics.delivered(name);
                    self.metrics.topic(name).events.inc();
                }
                self.metrics.parked.sent.inc();
                self.remember(&taken);
                if taken.attempts > 0 {
                    info!(
                        "event {} was sent after {} attempts in vain",
                        taken.id, taken.attempts
                    );
                }
                if taken.status == Status::Waiting {
                    outcome.keys.extend(name);
                }
                outcome.gone.push(taken.id);
            }
            Sent::Refused(why) => {
                let attempts = taken.attempts + 1;
                let is_dead = attempts >= self.settings.tries_max();
                let owes_letter = is_dead && self.settings.dead_letter_topic.is_some();
                let backoff = self.settings.backoff(attempts);
                let id = &taken.id;
                if is_dead {
                    error!(
                        "event {id} is a dead letter after {attempts} attempts, and its key goes on; \
                         `postbox parked show {id}` shows it: {why}"
                    );
                    self.metrics.parked.dead_letters.inc();
                    self.owes_letters |= owes_letter;
                    outcome.keys.extend(name);
                } else {
                    let seconds = backoff.as_secs_f32();
                    warn!("event {id} was refused again, and is tried in {seconds:.0} s: {why}");
                }
                if taken.status == Status::Scheduled {
                    let (topic, key) = (taken.topic.clone(), taken.key.clone());
                    outcome.joining.push((taken.id.clone(), topic, key));
                }
                outcome.refused.push(Refused {
                    id: taken.id,
                    topic: taken.topic,
                    key: taken.key,
                    why,
                    backoff,
                    is_dead,
                    owes_letter,
                });
            }
            Sent::TopicRefused(topic, why) => {
                self.topics.refused(&topic);
                if !outcome.topics.iter().any(|(held, _)| *held == topic) {
                    debug!(topic, "its events wait until the brokers take them: {why}");
                    outcome.topics.push((topic.clone(), why.clone()));
                    self.shared.hold_topic(topic.clone(), why);
                }
                match taken.status {
                    Status::Scheduled => outcome.joining.push((taken.id, taken.topic, taken.key)),
                    _ => {
                        // Its route may be another by now: the next of its queue has its turn.
                        outcome.keys.extend(name);
                        outcome.awaiting.push((taken.id, topic));
                    }
                }
            }
            Sent::Early(time) => {
                outcome.early.push((taken.id, time));
                outcome.keys.extend(name);
            }
            Sent::Away(_) if taken.status == Status::Waiting => outcome.untried.push(taken.id),
            Sent::Away(_) => {}
        }
    }
}
