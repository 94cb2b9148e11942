//! What becomes of a row that was read: it is sent, parked in the place of that, or held
//! until it can be sent.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{error, warn};

use super::Attempt;
use crate::envelope::Address;
use crate::error::{Error, ErrorKind, Result};
use crate::parked::OnPoison;
use crate::publisher::{Fit, Patience, Topic};
use crate::relay::parking::Reason;
use crate::relay::window::Stop;
use crate::source::{Row, Source, Unreadable};

/// An event that can never go out as it is.
fn poison(
    source: &Source,
    row: &Row,
    why: impl Into<Box<dyn std::error::Error + Send + Sync>>,
) -> Error {
    let message = format!("{} cannot go out", source.name_of(row));
    Error::new(ErrorKind::Event, message).caused_by(why)
}

/// How long the stream waits for a topic that is not known and may just be being made on demand,
/// where its events can wait in the table; where they cannot, and one was refused of late.
const UNKNOWN_MAX: Duration = Duration::from_secs(1);

/// How long that is: these brokers seem to make none.
const OF_LATE: Duration = Duration::from_secs(60);

impl Attempt<'_> {
    /// Sends a row, parks it, or holds it until it can be sent.
    pub(super) fn offer(&mut self, row: Row) -> Result<()> {
        let event = match self.source.event(&row) {
            Ok(event) => event,
            Err(why @ (Unreadable::Decode(_) | Unreadable::Relation(_))) => {
                return Err(poison(&self.source, &row, why));
            }
            Err(why) => return self.refuse(&row, why.to_string(), None),
        };
        if let (Some(parking), Some(time)) = (&self.parking, event.scheduled_at) {
            let address = Some(self.encoder.address(&event));
            return match parking.settings.check_schedule(time, row.committed_at) {
                Ok(()) => self.park(&row, address, Reason::Scheduled(time)),
                Err(why) => self.refuse(&row, why, address),
            };
        }
        let record = match self.encoder.encode(&event) {
            Ok(record) => record,
            Err(why) => {
                let why = why.to_string();
                let address = self.encoder.address(&event);
                return self.refuse(&row, why, Some(address));
            }
        };
        if let Some(why) = self.relay.condemned.remove(&row.place) {
            let address = self.encoder.address(&event);
            return self.refuse(&row, why, Some(address));
        }
        if let Some(parking) = &self.parking
            && let Some(reason) = parking.why_not_now(&event, &record)
        {
            let address = self.encoder.address(&event);
            return self.park(&row, Some(address), reason);
        }
        let Some(destination) = self.window.publisher.destination(&record) else {
            if let Some(why) = self.refused_topics.why(record.topic, Instant::now()) {
                let why = why.to_owned();
                let address = self.encoder.address(&event);
                return self.refuse(&row, why, Some(address));
            }
            let topic = record.topic.to_owned();
            self.resolve(topic, row);
            return Ok(());
        };
        match self.window.publisher.check(&record, destination) {
            Fit::Unknown => {}
            Fit::Ask => {
                let topic = record.topic.to_owned();
                self.resolve(topic, row);
                return Ok(());
            }
            Fit::Never(why) => {
                let address = self.encoder.address(&event);
                return self.refuse(&row, why, Some(address));
            }
        }
        if self.window.must_wait(&row, destination) {
            self.held = Some(row);
            return Ok(());
        }
        self.control.had_traffic();
        match self.window.send(&row, &record, destination) {
            Ok(()) => {
                if let Some(marks) = &mut self.marks {
                    marks.sent(&event, row.xid, self.window.end());
                }
                Ok(())
            }
            Err(Stop::Row(row, why)) => {
                let address = self.encoder.address(&event);
                self.refuse(&row, why, Some(address))
            }
            Err(Stop::Topic(..)) => unreachable!("only the brokers refuse a topic"),
            Err(Stop::Attempt(error)) => Err(error),
        }
    }

    /// Asks about the topic of a row, which is held meanwhile.
    fn resolve(&mut self, topic: String, row: Row) {
        let was_of_late = self
            .topic_refused_at
            .is_some_and(|at| at.elapsed() < OF_LATE);
        let can_wait = self.parks() && self.relay.settings.parked.on_poison == OnPoison::Park;
        let unknown = match (can_wait, was_of_late) {
            _ if self.refused_topics.knows(&topic) => Duration::ZERO,
            (true, true) => Duration::ZERO,
            (true, false) | (false, true) => UNKNOWN_MAX,
            (false, false) => Patience::MAX.unknown,
        };
        let patience = Patience {
            unknown,
            ..Patience::MAX
        };
        let resolved = self.window.publisher.resolve(&topic, patience);
        self.resolving.spawn(resolved);
        self.resolving_name = Some(topic);
        self.held = Some(row);
    }

    /// A row can never go out as it is: it is parked, or put off where rows are claimed, and
    /// the relay goes on; unless it is to stop. `address` is its topic and key.
    pub(super) fn refuse(
        &mut self,
        row: &Row,
        why: String,
        address: Option<Address>,
    ) -> Result<()> {
        let error = poison(&self.source, row, why.clone());
        if self.parking.is_some() {
            if !self.parks() {
                return Err(error);
            }
            return self.park(row, address, Reason::Refused(why));
        }
        if !self.source.refuse_last(|| error.chain()) {
            return Err(error);
        }
        self.relay.metrics.put_off.inc();
        error!("put off, as its table says: {}", error.chain());
        Ok(())
    }

    /// Parks a row in the place of sending it.
    pub(super) fn park(
        &mut self,
        row: &Row,
        address: Option<Address>,
        reason: Reason,
    ) -> Result<()> {
        let Some(parking) = &mut self.parking else {
            let message = "rows are parked only where a checkpoint says how far the relay is";
            return Err(Error::new(ErrorKind::Unexpected, message));
        };
        let is_decided = matches!(reason, Reason::Decided);
        let Some(new) = parking.row((&self.source, &self.encoder), row, address, reason) else {
            return Err(poison(&self.source, row, "its columns are not known"));
        };
        let name = self.source.name_of(row);
        if !is_decided {
            parking.check_room(&name, &new)?;
        }
        parking.tell(&name, &new, &self.relay.metrics.parked);
        self.control.had_traffic();
        let sequence = self.window.park(row);
        parking.park(sequence, new);
        Ok(())
    }

    /// Whether nothing is to be sent of what is parked.
    pub(super) fn rest_aside(&self, rests: bool) {
        if let Some(aside) = &self.aside {
            aside.rest(rests);
        }
    }

    /// Sends the held row if what it waits for has come.
    pub(super) fn release_held(&mut self) -> Result<()> {
        if self.window.has_failed() || !self.resolving.is_empty() {
            return Ok(());
        }
        if let Some(topic) = &self.resolved_topic {
            if !self.window.publisher.fits(topic) && !self.window.is_settled() {
                return Ok(());
            }
            self.window.admit(topic)?;
            self.resolved_topic = None;
        }
        match self.held.take() {
            Some(row) => self.offer(row),
            None => Ok(()),
        }
    }

    /// The brokers have said what they know of the held row's topic.
    pub(super) fn resolved(&mut self, topic: Result<Topic>) -> Result<()> {
        match (topic, &self.held) {
            (Ok(topic), _) => {
                self.resolved_topic = Some(topic);
                Ok(())
            }
            (Err(error), Some(_)) if error.kind() == ErrorKind::Event => {
                let name = self.resolving_name.take().unwrap_or_default();
                self.topic_refused_at = Some(Instant::now());
                let why = error.chain();
                let row = self.held.take().expect("it was just seen");
                match &self.parking {
                    Some(parking) if self.parks() => parking.hold_topic(name, why),
                    _ => self.refused_topics.insert(name, why, Instant::now()),
                }
                self.offer(row)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Why the attempt ends, and what the next is to know.
    pub(super) fn stopped(&mut self, stop: Stop) -> Error {
        let message = "a producer that has refused an event sends no more";
        let next = Error::new(ErrorKind::BrokerAway, message);
        match stop {
            Stop::Row(row, why) if self.parks() => {
                self.relay.condemned.insert(row.place, why);
                self.has_put_off = true;
                next
            }
            Stop::Row(row, why) => {
                if let Err(error) = self.refuse(&row, why, None) {
                    return error;
                }
                self.has_put_off = true;
                next
            }
            Stop::Topic(topic, why) => {
                warn!("events of this topic wait until the brokers take them: {why}");
                self.relay.refused_topics.insert(topic, why);
                self.has_put_off = true;
                next
            }
            Stop::Attempt(error) => error,
        }
    }

    /// Whether rows that cannot go out are parked.
    fn parks(&self) -> bool {
        self.parking.is_some() && self.relay.settings.parked.parks()
    }
}
