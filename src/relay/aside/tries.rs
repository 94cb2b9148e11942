//! Sends rows that are due, and says what became of each.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use rdkafka::error::RDKafkaErrorCode;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::Sender;
use super::courier::{REPORT_MAX, Resolved, Sent};
use crate::error::Result;
use crate::parked::store::{Count, Outcome, Refused};
use crate::parked::{Status, Taken};
use crate::publisher::codes::explain;
use crate::publisher::{Verdict, verdict};

/// For how long rows that were taken are tried, so that the last report is here, or is no
/// longer waited for, within the minute after which somebody may decide about them again.
const TRY_MAX: Duration = Duration::from_secs(20);

/// For how long scheduled events are handed over, and how long their reports may take: others
/// become due meanwhile.
const ON_TIME_MAX: Duration = Duration::from_secs(5);
const ON_TIME_REPORT_MAX: Duration = Duration::from_secs(5);

/// What became of rows that were taken.
#[derive(Default)]
pub(super) struct Tried {
    /// What is to be stored.
    pub(super) outcome: Outcome,
    /// Topics of which one was delivered.
    pub(super) delivered: HashSet<String>,
    /// The id of each event that was delivered, and when it was created, in microseconds since
    /// 1970; where rows are marked in their own table.
    pub(super) to_mark: Vec<(String, i64)>,
    /// How much more is in the table than before.
    pub(super) added: Count,
    /// No broker could be asked.
    pub(super) is_away: bool,
}

/// How rows went that were sent together.
enum Together {
    /// None was refused.
    Passed,
    /// One was, or cannot be told from one that was.
    Refused,
    /// The brokers did not say, and why.
    Away(String),
}

/// The rows of one key that are sent in their order. The first goes alone, as a broker takes
/// any for the first of a producer; once it has it, none that is behind a refused one.
struct Lane {
    topic: String,
    rows: VecDeque<Taken>,
    /// How many of them are on their way.
    handed: usize,
    /// One of them was delivered.
    has_begun: bool,
    /// It was on its way when something was refused, or was refused before.
    is_suspect: bool,
}

/// A topic and a key.
type Name = (String, String);

fn name_of(taken: &Taken) -> Option<Name> {
    taken.topic.clone().zip(taken.key.clone())
}

impl Sender {
    /// Sends scheduled events. What is refused, or may be, joins the queue of its key; so does
    /// what is not taken in time though brokers answer, as its partition may be without a leader
    /// for as long as others go on.
    pub(super) async fn send_on_time(&mut self, rows: Vec<Taken>) -> Result<Tried> {
        let began = Instant::now();
        let mut tried = Tried::default();
        let mut lanes = self.lanes(rows, &HashSet::new(), &mut tried);
        let topics = self.resolve(&lanes).await?;
        for lane in lanes.extract_if(.., |lane| topics.refused.contains_key(&lane.topic)) {
            join(lane, &mut tried);
        }
        let is_away = |lane: &mut Lane| topics.away.contains_key(&lane.topic);
        let mut left: Vec<Lane> = lanes.extract_if(.., is_away).collect();
        let went = match topics.away.into_values().next() {
            Some(why) if lanes.is_empty() => Together::Away(why),
            _ => {
                let until = began + ON_TIME_MAX;
                self.send_together(&mut lanes, until, ON_TIME_REPORT_MAX, &mut tried)
                    .await?
            }
        };
        match went {
            Together::Passed => {}
            Together::Refused => left.extend(lanes.into_iter().filter(|lane| lane.is_suspect)),
            Together::Away(why) => {
                if *self.rest.borrow() || !self.courier.hears_brokers().await? {
                    // They stay as they are.
                    tried.is_away_because(&why);
                    return Ok(tried);
                }
                left.append(&mut lanes);
            }
        }
        for lane in left {
            join(lane, &mut tried);
        }
        Ok(tried)
    }

    /// Tries again what waits, and was taken then. Topics on trial are not held.
    pub(super) async fn try_again(
        &mut self,
        rows: Vec<Taken>,
        began: Instant,
        trials: &HashSet<String>,
    ) -> Result<Tried> {
        let mut tried = Tried::default();
        let mut lanes = self.lanes(rows, trials, &mut tried);
        let topics = self.resolve(&lanes).await?;
        for lane in lanes.extract_if(.., |lane| topics.refused.contains_key(&lane.topic)) {
            let why = &topics.refused[&lane.topic];
            for taken in lane.rows {
                let sent = Sent::TopicRefused(lane.topic.clone(), why.clone());
                self.settle(taken, sent, &mut tried);
            }
        }
        for lane in lanes.extract_if(.., |lane| topics.away.contains_key(&lane.topic)) {
            leave(lane, &mut tried);
        }
        // What goes to others is sent.
        let mut away = topics
            .away
            .into_values()
            .next()
            .filter(|_| lanes.is_empty());
        if away.is_none() {
            let went = self.send_together(&mut lanes, began + TRY_MAX, REPORT_MAX, &mut tried);
            away = match went.await? {
                Together::Away(why) => Some(why),
                Together::Passed | Together::Refused => {
                    self.send_alone(&mut lanes, began, &mut tried).await?
                }
            };
        }
        for lane in lanes {
            leave(lane, &mut tried);
        }
        if let Some(why) = away {
            tried.is_away_because(&why);
        }
        Ok(tried)
    }

    /// The rows by their keys, each in its order, without those that cannot be sent now.
    fn lanes(
        &mut self,
        rows: Vec<Taken>,
        trials: &HashSet<String>,
        tried: &mut Tried,
    ) -> Vec<Lane> {
        let mut lanes: Vec<Lane> = Vec::new();
        let mut numbers: HashMap<Name, usize> = HashMap::new();
        let mut stopped: HashSet<Name> = HashSet::new();
        for mut taken in rows {
            if taken.is_cancelled {
                self.metrics.parked.cancelled.inc();
                info!(id = taken.id, "cancelled: it is not sent");
                tried.left(&taken);
                tried.outcome.gone.push(taken.id);
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
                tried.outcome.untried.push(taken.id);
                continue;
            }
            let topic = match address {
                Ok((topic, _)) => topic,
                Err(sent) => {
                    stopped.extend(name);
                    self.settle(taken, sent, tried);
                    continue;
                }
            };
            let held = self
                .shared
                .with(|holds| holds.topics().get(&topic).cloned());
            let held = held.filter(|_| !trials.contains(&topic));
            let has_queue =
                |(topic, key): &Name| self.shared.with(|holds| holds.has_key(topic, key));
            match (taken.status, held) {
                (Status::Scheduled, held) => {
                    if held.is_some() || name.as_ref().is_some_and(has_queue) {
                        tried.join(taken);
                        continue;
                    }
                }
                (_, Some(why)) => {
                    self.settle(taken, Sent::TopicRefused(topic, why), tried);
                    continue;
                }
                (_, None) => {}
            }
            let number = name.map(|name| *numbers.entry(name).or_insert(lanes.len()));
            match number.filter(|number| *number < lanes.len()) {
                Some(number) => lanes[number].rows.push_back(taken),
                None => lanes.push(Lane {
                    topic,
                    is_suspect: false,
                    rows: VecDeque::from([taken]),
                    handed: 0,
                    has_begun: false,
                }),
            }
        }
        lanes
    }

    /// Asks about the topics that are not known.
    async fn resolve(&mut self, lanes: &[Lane]) -> Result<Resolved> {
        let topics = lanes.iter().map(|lane| lane.topic.clone()).collect();
        self.courier.resolve(topics).await
    }

    /// Sends what was never refused, of each key in its order: until then, and so long may the
    /// last report take. What was on its way when one was refused is suspect.
    async fn send_together(
        &mut self,
        lanes: &mut [Lane],
        until: Instant,
        report_max: Duration,
        tried: &mut Tried,
    ) -> Result<Together> {
        let mut on_their_way: HashMap<u64, usize> = HashMap::new();
        let mut sequence = 0;
        // By which code first, and whether the brokers refused one.
        let mut failed: Option<RDKafkaErrorCode> = None;
        let mut is_refused = false;
        let mut ready: Vec<usize> = (0..lanes.len()).collect();
        loop {
            for number in std::mem::take(&mut ready) {
                let may_send = failed.is_none() && !self.must_end(until);
                let lane = &mut lanes[number];
                while may_send && lane.may_send() {
                    match self.courier.hand_over(&lane.rows[lane.handed], sequence) {
                        Ok(()) => {
                            on_their_way.insert(sequence, number);
                            sequence += 1;
                            lane.handed += 1;
                        }
                        Err(Sent::Away(why)) => {
                            // It may have been refused one of those that are on their way.
                            self.courier.forget();
                            return Ok(Together::Away(why));
                        }
                        // Once those before it are delivered.
                        Err(_) if lane.handed > 0 => break,
                        Err(sent) => self.stop(lane, sent, tried),
                    }
                }
            }
            if on_their_way.is_empty() {
                break;
            }
            let Some(reports) = self.courier.reports(until + report_max).await? else {
                let lost = on_their_way.len();
                self.courier.forget();
                return Ok(Together::Away(format!(
                    "{lost} deliveries are not acknowledged"
                )));
            };
            for report in reports {
                let Some(number) = on_their_way.remove(&report.sequence) else {
                    continue;
                };
                let lane = &mut lanes[number];
                lane.handed -= 1;
                if let Some(code) = report.error {
                    lane.is_suspect = true;
                    is_refused |= matches!(verdict(code), Verdict::Row | Verdict::Topic);
                    if failed.is_none() {
                        failed = Some(code);
                        self.courier.purge();
                    }
                } else if let Some(taken) = lane.rows.pop_front() {
                    lane.has_begun = true;
                    self.settle(taken, Sent::Delivered, tried);
                    ready.push(number);
                }
            }
        }
        let Some(code) = failed else {
            return Ok(Together::Passed);
        };
        self.courier.renew()?;
        Ok(match is_refused {
            true => Together::Refused,
            false => Together::Away(explain(code)),
        })
    }

    /// Sends the first of each suspect key, with nothing else on its way.
    async fn send_alone(
        &mut self,
        lanes: &mut [Lane],
        began: Instant,
        tried: &mut Tried,
    ) -> Result<Option<String>> {
        for lane in lanes.iter_mut().filter(|lane| lane.is_suspect) {
            let Some(taken) = lane.rows.front() else {
                continue;
            };
            if self.must_end(began + TRY_MAX) {
                break;
            }
            // What the brokers have just said of another speaks for all of its topic.
            let topic = self.courier.address(taken).ok().map(|(topic, _)| topic);
            let mut refused = tried.outcome.topics.iter();
            let sent = match refused.find(|(refused, _)| Some(refused) == topic.as_ref()) {
                Some((topic, why)) => Sent::TopicRefused(topic.clone(), why.clone()),
                None => self.courier.send_alone(taken).await?,
            };
            match sent {
                Sent::Away(why) => return Ok(Some(why)),
                // Those behind it have their turn with the next look, if it is theirs.
                sent => self.stop(lane, sent, tried),
            }
        }
        Ok(None)
    }

    /// Whether no more of what was taken is to be tried: its time is up, or the relay is told to
    /// rest.
    fn must_end(&self, until: Instant) -> bool {
        Instant::now() > until || *self.rest.borrow()
    }

    /// Of a lane the first was tried, and the others are not.
    fn stop(&mut self, lane: &mut Lane, sent: Sent, tried: &mut Tried) {
        if let Some(taken) = lane.rows.pop_front() {
            self.settle(taken, sent, tried);
        }
        let rest = lane.rows.drain(..).map(|taken| taken.id);
        tried.outcome.untried.extend(rest);
    }

    /// Says what is to be stored of a row.
    fn settle(&mut self, taken: Taken, sent: Sent, tried: &mut Tried) {
        let name = name_of(&taken);
        match sent {
            Sent::Delivered => {
                tried.left(&taken);
                if let Some(topic) = &taken.topic {
                    if self.shared.with(|holds| holds.has_too_large(topic))
                        && let Ok(record) = self.courier.record(&taken)
                    {
                        let size = record.size();
                        self.shared.change(|holds| holds.passed(topic, size));
                    }
                    self.metrics.topic(topic).events.inc();
                    tried.delivered.insert(topic.clone());
                }
                self.metrics.parked.sent.inc();
                if self.marker.is_some() {
                    tried.to_mark.extend(self.courier.identity(&taken));
                }
                if taken.attempts > 0 {
                    info!(
                        "event {} was sent after {} attempts in vain",
                        taken.id, taken.attempts
                    );
                }
                if taken.status == Status::Waiting {
                    tried.outcome.keys.extend(name);
                }
                tried.outcome.gone.push(taken.id);
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
                    tried.outcome.keys.extend(name);
                } else {
                    let again = match taken.attempts {
                        0 => ", and its key with it",
                        _ => " again",
                    };
                    warn!("event {id} was refused{again}; it is tried in {backoff:.0?}: {why}");
                }
                if attempts == 1 {
                    self.metrics.parked.refused.inc();
                }
                if taken.status == Status::Scheduled {
                    tried.joined(&taken);
                    let (topic, key) = (taken.topic.clone(), taken.key.clone());
                    tried.outcome.joining.push((taken.id.clone(), topic, key));
                }
                tried.outcome.refused.push(Refused {
                    id: taken.id,
                    topic: taken.topic,
                    key: taken.key,
                    why,
                    backoff,
                    is_dead,
                    owes_letter,
                });
            }
            Sent::TopicRefused(..) if taken.status == Status::Scheduled => tried.join(taken),
            Sent::TopicRefused(topic, why) => {
                if !tried.outcome.topics.iter().any(|(held, _)| *held == topic) {
                    debug!(topic, "its events wait until the brokers take them: {why}");
                    tried.outcome.topics.push((topic.clone(), why.clone()));
                    self.shared.hold_topic(topic.clone(), why);
                }
                // Its route may be another by now: the next of its queue has its turn.
                tried.outcome.keys.extend(name);
                tried.outcome.awaiting.push((taken.id, topic));
            }
            Sent::Early(time) => {
                tried.postponed(&taken);
                tried.outcome.early.push((taken.id, time));
                tried.outcome.keys.extend(name);
            }
            Sent::Away(_) => tried.outcome.untried.push(taken.id),
        }
    }
}

impl Tried {
    /// A scheduled event joins the queue of its key, as one that was never refused.
    fn join(&mut self, taken: Taken) {
        self.joined(&taken);
        let joining = &mut self.outcome.joining;
        joining.push((taken.id, taken.topic, taken.key));
    }

    /// A row leaves the table.
    fn left(&mut self, taken: &Taken) {
        match taken.status {
            Status::Scheduled => self.added.scheduled -= 1,
            _ => {
                self.added.waiting -= 1;
                self.added.bytes -= bytes_of(taken);
            }
        }
    }

    /// A scheduled row waits from now on.
    fn joined(&mut self, taken: &Taken) {
        self.added.scheduled -= 1;
        self.added.waiting += 1;
        self.added.bytes += bytes_of(taken);
    }

    /// A row that waited is scheduled from now on.
    fn postponed(&mut self, taken: &Taken) {
        self.added.scheduled += 1;
        self.added.waiting -= 1;
        self.added.bytes -= bytes_of(taken);
    }

    fn is_away_because(&mut self, why: &str) {
        debug!(why, "parked events wait for the brokers");
        self.is_away = true;
    }
}

fn bytes_of(taken: &Taken) -> i64 {
    i64::try_from(taken.row.bytes.len()).unwrap_or(i64::MAX)
}

impl Lane {
    /// Whether the next that is not on its way may follow those that are.
    fn may_send(&mut self) -> bool {
        let Some(next) = self.rows.get(self.handed) else {
            return false;
        };
        // A suspect is sent once it is the first.
        self.is_suspect |= self.handed == 0 && next.attempts > 0;
        !self.is_suspect && next.attempts == 0 && (self.has_begun || self.handed == 0)
    }
}

/// What is left of a lane of scheduled events joins the queue of its key.
fn join(lane: Lane, tried: &mut Tried) {
    for taken in lane.rows {
        tried.join(taken);
    }
}

/// What is left of a lane is not tried.
fn leave(lane: Lane, tried: &mut Tried) {
    let rest = lane.rows.into_iter().map(|taken| taken.id);
    tried.outcome.untried.extend(rest);
}
