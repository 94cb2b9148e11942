//! Which topic an event goes to when its row does not say.

use std::str::FromStr;

use super::Refused;
use crate::event::Event;

/// A topic name with places for an event's fields, such as
/// `outbox.event.{aggregate_type}`. The default is `{aggregate_type}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    AggregateType,
    EventType,
}

/// Why a route was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// No event could ever have this topic.
    #[error("route \"{0}\" does not make a topic name: Kafka allows a-z A-Z 0-9 . _ -")]
    Name(String),
    /// A field that a route cannot use.
    #[error("route has an unknown field \"{{{0}}}\": use {{aggregate_type}} or {{event_type}}")]
    Field(String),
    /// An opening brace without a closing one.
    #[error("route \"{0}\" has a brace that is not closed")]
    Brace(String),
}

impl Default for Route {
    fn default() -> Self {
        Self(vec![Part::AggregateType])
    }
}

impl FromStr for Route {
    type Err = RouteError;

    fn from_str(template: &str) -> Result<Self, RouteError> {
        let mut parts = Vec::new();
        let mut rest = template;
        while let Some((text, tail)) = rest.split_once('{') {
            let (field, tail) = tail
                .split_once('}')
                .ok_or_else(|| RouteError::Brace(template.to_owned()))?;
            parts.push(Part::Text(text.to_owned()));
            parts.push(match field {
                "aggregate_type" => Part::AggregateType,
                "event_type" => Part::EventType,
                _ => return Err(RouteError::Field(field.to_owned())),
            });
            rest = tail;
        }
        parts.push(Part::Text(rest.to_owned()));
        parts.retain(|part| !matches!(part, Part::Text(text) if text.is_empty()));

        let example: String = parts
            .iter()
            .map(|part| match part {
                Part::Text(text) => text,
                _ => "x",
            })
            .collect();
        if !is_topic_name(&example) {
            return Err(RouteError::Name(template.to_owned()));
        }
        Ok(Self(parts))
    }
}

impl Route {
    /// Appends the event's topic to `topic`.
    pub(super) fn write(&self, event: &Event<'_>, topic: &mut String) -> Result<(), Refused> {
        let event_type = match event.event_type {
            None if self.0.contains(&Part::EventType) => {
                return Err(Refused::Unsaid("event_type", "the route"));
            }
            event_type => event_type.unwrap_or_default(),
        };
        self.write_of(event.aggregate_type, event_type, topic);
        Ok(())
    }

    /// The topic of an event with these fields whose row does not say.
    pub fn topic_of(&self, aggregate_type: &str, event_type: &str) -> String {
        let mut topic = String::new();
        self.write_of(aggregate_type, event_type, &mut topic);
        topic
    }

    /// The same, if those are known that it needs.
    pub(super) fn topic_if(
        &self,
        aggregate_type: Option<&str>,
        event_type: Option<&str>,
    ) -> Option<String> {
        let parts = self.0.iter().map(|part| match part {
            Part::Text(text) => Some(&**text),
            Part::AggregateType => aggregate_type,
            Part::EventType => event_type,
        });
        parts.collect()
    }

    fn write_of(&self, aggregate_type: &str, event_type: &str, topic: &mut String) {
        for part in &self.0 {
            topic.push_str(match part {
                Part::Text(text) => text,
                Part::AggregateType => aggregate_type,
                Part::EventType => event_type,
            });
        }
    }
}

/// The broker's own rule: `org.apache.kafka.common.internals.Topic`.
pub fn is_topic_name(name: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=249).contains(&name.len()) && name != "." && name != ".." && name.bytes().all(legal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_route_that_can_never_work_is_refused() {
        for (template, message) in [
            (
                "{aggregate}",
                "route has an unknown field \"{aggregate}\": use {aggregate_type} or {event_type}",
            ),
            (
                "orders.{aggregate_type",
                "route \"orders.{aggregate_type\" has a brace that is not closed",
            ),
            (
                "a b",
                "route \"a b\" does not make a topic name: Kafka allows a-z A-Z 0-9 . _ -",
            ),
            (
                "",
                "route \"\" does not make a topic name: Kafka allows a-z A-Z 0-9 . _ -",
            ),
        ] {
            assert_eq!(template.parse::<Route>().unwrap_err().to_string(), message);
        }
    }
}
