//! A producer for what waits, and what makes records of rows that were laid by.

use std::collections::{HashMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::error::RDKafkaErrorCode;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::Tools;
use crate::envelope::{Encoder, Record};
use crate::error::{ErrorKind, Result, joined};
use crate::metrics::Metrics;
use crate::parked::{ParkedSettings, Status, Taken};
use crate::publisher::codes::explain;
use crate::publisher::{
    BATCH_BYTES, Fit, KafkaSettings, Patience, Publisher, Report, SendError, Topic, Verdict,
    verdict,
};
use crate::source::Messages;
use crate::timestamp::Timestamp;

/// How long a delivery may take before the brokers count as away.
pub(super) const REPORT_MAX: Duration = Duration::from_secs(30);

/// The same where it is told to rest: less than a relay that is to serve other slices waits for.
const REST_MAX: Duration = Duration::from_millis(1500);

/// How long a broker has to answer before none counts as heard.
const PROBE_MAX: Duration = Duration::from_secs(2);

/// After how long without anything to send the producer is closed.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// Sends rows.
pub(super) struct Courier {
    publisher: Lazy,
    maker: Maker,
    metrics: Arc<Metrics>,
    rest: watch::Receiver<bool>,
}

/// A producer that is made when it is needed.
struct Lazy {
    publisher: Option<Publisher>,
    kafka: KafkaSettings,
    used_at: Instant,
}

/// Makes records of rows.
struct Maker {
    encoder: Encoder,
    messages: Messages,
    settings: ParkedSettings,
}

/// What became of one record.
pub(super) enum Sent {
    Delivered,
    /// It can never go out as it is, and why.
    Refused(String),
    /// Nothing of its topic is taken, and why.
    TopicRefused(String, String),
    /// No broker could be asked.
    Away(String),
    /// Its time has not come.
    Early(Timestamp),
}

/// What the brokers say about topics.
#[derive(Default)]
pub(super) struct Resolved {
    /// Those that they refuse, and why.
    pub(super) refused: HashMap<String, String>,
    /// Those that cannot be asked about, or have no leader, and why.
    pub(super) away: HashMap<String, String>,
}

impl Courier {
    pub(super) fn new(tools: Tools, rest: watch::Receiver<bool>) -> Self {
        Self {
            publisher: Lazy {
                publisher: None,
                kafka: tools.kafka,
                used_at: Instant::now(),
            },
            maker: Maker {
                encoder: tools.encoder,
                messages: Messages::new(tools.outbox),
                settings: tools.settings,
            },
            metrics: tools.metrics,
            rest,
        }
    }

    /// Where a row goes, and what it is kept in order by.
    pub(super) fn address(&mut self, taken: &Taken) -> Result<(String, Option<String>), Sent> {
        let record = self.maker.record(taken)?;
        Ok((record.topic.to_owned(), record.key.map(str::to_owned)))
    }

    /// The id of a row's event, and when it was created, in microseconds since 1970.
    pub(super) fn identity(&self, taken: &Taken) -> Option<(String, i64)> {
        let event = self.maker.messages.event(&taken.row).ok()?;
        Some((event.id.to_owned(), event.created_at.unix_micros()))
    }

    /// The record of a row, unless it has none, or not yet.
    pub(super) fn record<'a>(&'a mut self, taken: &'a Taken) -> Result<Record<'a>, Sent> {
        self.maker.record(taken)
    }

    /// Whether any broker answers.
    pub(super) async fn hears_brokers(&mut self) -> Result<bool> {
        let answer = self.publisher.get()?.probe(PROBE_MAX);
        Ok(answer.await.is_ok())
    }

    /// Asks about a topic, apart from what is sent.
    pub(super) fn probe(
        &mut self,
        topic: &str,
    ) -> Result<impl Future<Output = Result<Topic>> + Send + use<>> {
        Ok(self.publisher.get()?.resolve(topic, Patience::NONE))
    }

    /// Asks once about a topic, and says why it is not known, if so.
    pub(super) async fn why_unknown(&mut self, topic: &str) -> Result<Option<String>> {
        let publisher = self.publisher.get()?;
        if publisher.knows(topic) {
            return Ok(None);
        }
        match publisher.resolve(topic, Patience::NONE).await {
            Ok(found) => {
                publisher.admit(&found);
                Ok(None)
            }
            Err(error) if error.kind() == ErrorKind::Event || error.kind().is_transient() => {
                Ok(Some(error.chain()))
            }
            Err(error) => Err(error),
        }
    }

    /// Asks once about topics that were not asked about of late. Nothing may be on its way.
    pub(super) async fn resolve(&mut self, topics: HashSet<String>) -> Result<Resolved> {
        let publisher = self.publisher.get()?;
        let mut resolving = JoinSet::new();
        for topic in topics {
            if !publisher.knows(&topic) {
                let resolved = publisher.resolve(&topic, Patience::NONE);
                resolving.spawn(async move { Ok((topic, resolved.await)) });
            }
        }
        let mut resolved = Resolved::default();
        while let Some(topic) = resolving.join_next().await {
            match joined(topic)? {
                (_, Ok(topic)) => {
                    if !publisher.fits(&topic) {
                        publisher.shrink(&topic)?;
                    }
                    publisher.admit(&topic);
                }
                (name, Err(error)) if error.kind() == ErrorKind::Event => {
                    resolved.refused.insert(name, error.chain());
                }
                (name, Err(error)) if error.kind().is_transient() => {
                    resolved.away.insert(name, error.chain());
                }
                (_, Err(error)) => return Err(error),
            }
        }
        Ok(resolved)
    }

    /// Hands a row over. Its delivery is reported under `sequence`.
    pub(super) fn hand_over(&mut self, taken: &Taken, sequence: u64) -> Result<(), Sent> {
        let publisher = self.publisher.get();
        let publisher = publisher.map_err(|error| Sent::Away(error.chain()))?;
        let record = self.maker.record(taken)?;
        hand_over(publisher, &record, sequence)
    }

    /// The reports that arrive next; `None` if none does until then.
    pub(super) async fn reports(&mut self, until: Instant) -> Result<Option<Vec<Report>>> {
        let mut reports = Vec::new();
        let publisher = self.publisher.get()?;
        publisher.push();
        let rest = &mut self.rest;
        let told_to_rest = async {
            // Whoever could tell it is gone, and this with them.
            let _ = rest.wait_for(|rests| *rests).await;
            sleep(REST_MAX).await;
        };
        let mut given_up = pin!(async {
            tokio::select! {
                () = sleep_until(until) => {}
                () = told_to_rest => {}
            }
        });
        while reports.is_empty() {
            tokio::select! {
                () = &mut given_up => return Ok(None),
                () = publisher.reported() => publisher.take_reports(&mut reports)?,
            }
        }
        Ok(Some(reports))
    }

    /// Sends a row with nothing else on its way.
    pub(super) async fn send_alone(&mut self, taken: &Taken) -> Result<Sent> {
        let handed = self.hand_over(taken, 0);
        let code = match self.outcome(handed).await? {
            Ok(code) => code,
            Err(sent) => return Ok(sent),
        };
        let failures = &self.metrics.failures;
        failures.with_label_values(&[&format!("{code:?}")]).inc();
        let publisher = self.publisher.get()?;
        let sent = match self.maker.record(taken) {
            Ok(record) => refusal(publisher, &record, code),
            Err(sent) => sent,
        };
        self.renew()?;
        Ok(sent)
    }

    /// Sends a record with nothing else on its way, to a topic that was resolved.
    pub(super) async fn send_record(&mut self, record: &Record<'_>) -> Result<Sent> {
        let handed = hand_over(self.publisher.get()?, record, 0);
        let code = match self.outcome(handed).await? {
            Ok(code) => code,
            Err(sent) => return Ok(sent),
        };
        let sent = refusal(self.publisher.get()?, record, code);
        self.renew()?;
        Ok(sent)
    }

    /// By which code the brokers refused the only one that was handed over, or what became of
    /// it else.
    async fn outcome(
        &mut self,
        handed: Result<(), Sent>,
    ) -> Result<Result<RDKafkaErrorCode, Sent>> {
        let sent = match handed {
            Ok(()) => match self.reports(Instant::now() + REPORT_MAX).await? {
                Some(reports) => match reports.last().and_then(|report| report.error) {
                    Some(code) => return Ok(Ok(code)),
                    None => Sent::Delivered,
                },
                None => Sent::Away("a delivery is not acknowledged".to_owned()),
            },
            Err(sent) => sent,
        };
        if let Sent::Away(_) = sent {
            self.forget();
        }
        Ok(Err(sent))
    }

    /// What is on its way is reported as failed.
    pub(super) fn purge(&self) {
        if let Some(publisher) = &self.publisher.publisher {
            publisher.purge();
        }
    }

    /// A producer that was refused a record sends no more.
    pub(super) fn renew(&mut self) -> Result<()> {
        match &mut self.publisher.publisher {
            Some(publisher) => publisher.renew(),
            None => Ok(()),
        }
    }

    /// Whatever is on its way is nobody's any more.
    pub(super) fn forget(&mut self) {
        self.publisher.publisher = None;
    }

    /// Closes the producer if nothing was sent for a while.
    pub(super) fn close_if_idle(&mut self) {
        if self.publisher.used_at.elapsed() > IDLE_MAX {
            self.publisher.publisher = None;
        }
    }
}

impl Lazy {
    fn get(&mut self) -> Result<&mut Publisher> {
        self.used_at = Instant::now();
        let made = match self.publisher.take() {
            Some(publisher) => publisher,
            None => Publisher::new(self.kafka.clone(), BATCH_BYTES)?,
        };
        Ok(self.publisher.insert(made))
    }
}

impl Maker {
    /// The record of a row, unless it has none, or not yet.
    fn record<'a>(&'a mut self, taken: &'a Taken) -> Result<Record<'a>, Sent> {
        let messages = &mut self.messages;
        let taken_up = messages.take_up(&taken.row, &taken.columns);
        taken_up.map_err(|why| Sent::Refused(why.to_string()))?;
        let event = messages.event(&taken.row);
        let event = event.map_err(|why| Sent::Refused(why.to_string()))?;
        if taken.status == Status::Waiting
            && let Some(time) = event.scheduled_at
        {
            let checked = self.settings.check_schedule(time, taken.row.committed_at);
            checked.map_err(Sent::Refused)?;
            if time > taken.at {
                return Err(Sent::Early(time));
            }
        }
        let record = self.encoder.encode(&event);
        record.map_err(|why| Sent::Refused(why.to_string()))
    }
}

fn hand_over(publisher: &Publisher, record: &Record<'_>, sequence: u64) -> Result<(), Sent> {
    let Some(destination) = publisher.destination(record) else {
        return Err(Sent::Away("its topic is not known".to_owned()));
    };
    if let Fit::Never(why) = publisher.check(record, destination) {
        return Err(Sent::Refused(why));
    }
    match publisher.send(record, destination.partition, sequence) {
        Ok(()) => Ok(()),
        Err(SendError::Row(code)) => {
            let why = publisher.refusal(destination.topic, record.size(), code, false);
            Err(Sent::Refused(why))
        }
        Err(SendError::Producer(error)) => Err(Sent::Away(error.chain())),
    }
}

/// What it means that the brokers refused this record, which was sent alone.
fn refusal(publisher: &Publisher, record: &Record<'_>, code: RDKafkaErrorCode) -> Sent {
    let Some(destination) = publisher.destination(record) else {
        return Sent::Away(explain(code));
    };
    let why = publisher.refusal(destination.topic, record.size(), code, true);
    match verdict(code) {
        Verdict::Row => Sent::Refused(why),
        Verdict::Topic => Sent::TopicRefused(record.topic.to_owned(), why),
        _ => Sent::Away(why),
    }
}
