//! A record's headers: what consumers of each kind look for, and the row's own.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use serde::Deserializer as _;
use serde::de::{MapAccess, Visitor};
use serde_json::value::RawValue;

use super::Refused;
use crate::event::Event;

/// One header of a record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header<'a> {
    /// Its name; Kafka lets names repeat.
    pub name: Cow<'a, str>,
    /// Its value in UTF-8; `None` is a null header.
    pub value: Option<Cow<'a, str>>,
}

impl Header<'_> {
    pub(super) fn size(&self) -> usize {
        self.name.len() + self.value.as_ref().map_or(0, |value| value.len())
    }
}

/// Which headers a record has, beside those that are made of columns, which follow `id` and
/// the like. The event's own values win over headers of the same name in its row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum HeaderStyle {
    /// `id`, `event_type`, then those that are set of `schema_version`, `trace_id`,
    /// `correlation_id`, `causation_id`, `traceparent`; then the row's own, in their
    /// order.
    #[default]
    Postbox,
    /// As omni-box's publisher: the row's own, then `event_id`, `event_type` and those
    /// that are set of `schema_version`, `trace_id`, `correlation_id`, `causation_id`. A
    /// header of the row that has one of these names keeps its place.
    OmniBox,
    /// As Debezium's outbox router: `id`, and none of the row's.
    Debezium,
    /// The row's own alone.
    None,
}

impl FromStr for HeaderStyle {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "postbox" => Ok(Self::Postbox),
            "omni-box" => Ok(Self::OmniBox),
            "debezium" => Ok(Self::Debezium),
            "none" => Ok(Self::None),
            _ => Err(format!(
                "unknown headers \"{name}\": use postbox, omni-box, debezium or none"
            )),
        }
    }
}

/// The headers of an event's record; those of `placed` columns, by name, follow ours. A row
/// has none of its own where the column is NULL, or a JSON null, which libraries write for it:
/// omni-box does.
pub(super) fn of<'a>(
    event: &Event<'a>,
    style: HeaderStyle,
    placed: &'a [String],
) -> Result<Vec<Header<'a>>, Refused> {
    let id = match style {
        HeaderStyle::OmniBox => "event_id",
        _ => "id",
    };
    let traceparent = match style {
        HeaderStyle::OmniBox => None,
        _ => event.traceparent,
    };
    let all = [
        (id, Some(event.id)),
        ("event_type", event.event_type),
        ("schema_version", event.schema_version),
        ("trace_id", event.trace_id),
        ("correlation_id", event.correlation_id),
        ("causation_id", event.causation_id),
        ("traceparent", traceparent),
    ];
    let ours: &[_] = match style {
        HeaderStyle::Postbox | HeaderStyle::OmniBox => &all,
        HeaderStyle::Debezium => &all[..1],
        HeaderStyle::None => &[],
    };
    let ours = ours.iter().filter_map(|(name, value)| {
        Some(Header {
            name: (*name).into(),
            value: Some((*value)?.into()),
        })
    });
    let placed = placed.iter().zip(&event.placed);
    let ours = ours.chain(placed.map(|(name, value)| Header {
        name: name.into(),
        value: value.map(Cow::from),
    }));
    let own = match event.headers {
        Some(object) if style != HeaderStyle::Debezium && object.trim_ascii() != "null" => {
            own(object).map_err(Refused::Headers)?
        }
        _ => Vec::new(),
    };
    Ok(match style {
        HeaderStyle::OmniBox => set(own, ours),
        _ => {
            let mut headers: Vec<_> = ours.collect();
            let count = headers.len();
            for header in own {
                if headers[..count].iter().all(|our| our.name != header.name) {
                    headers.push(header);
                }
            }
            headers
        }
    })
}

/// Adds headers, each in the place of the one that has its name, if there is one.
fn set<'a>(
    mut headers: Vec<Header<'a>>,
    more: impl Iterator<Item = Header<'a>>,
) -> Vec<Header<'a>> {
    for header in more {
        match headers.iter_mut().find(|known| known.name == header.name) {
            Some(known) => *known = header,
            None => headers.push(header),
        }
    }
    headers
}

/// The members of a JSON object, in their order: a string's text, null as null,
/// anything else as its JSON text.
fn own(object: &str) -> serde_json::Result<Vec<Header<'_>>> {
    let mut json = serde_json::Deserializer::from_str(object);
    let headers = json.deserialize_map(Members)?;
    json.end()?;
    Ok(headers)
}

struct Members;

impl<'de> Visitor<'de> for Members {
    type Value = Vec<Header<'de>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Self::Value, A::Error> {
        let mut headers = Vec::new();
        while let Some((Text(name), value)) = members.next_entry::<Text<'de>, &RawValue>()? {
            let value = match value.get() {
                "null" => None,
                text if text.starts_with('"') => {
                    let Text(text) =
                        serde_json::from_str(text).map_err(serde::de::Error::custom)?;
                    Some(text)
                }
                json => Some(json.into()),
            };
            headers.push(Header { name, value });
        }
        Ok(headers)
    }
}

/// A string, borrowed where it has no escapes.
#[derive(serde::Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(object: &str) -> Vec<(String, Option<String>)> {
        own(object)
            .unwrap()
            .into_iter()
            .map(|header| (header.name.into_owned(), header.value.map(Cow::into_owned)))
            .collect()
    }

    #[test]
    fn keep_their_order_and_their_text() {
        let own = pairs(r#" {"z":"ä\n", "a": null, "n": 1.50, "o": {"x": [1, 2]}, "a": "again"} "#);
        let expected = [
            ("z", Some("ä\n")),
            ("a", None),
            ("n", Some("1.50")),
            ("o", Some(r#"{"x": [1, 2]}"#)),
            ("a", Some("again")),
        ];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.map(str::to_owned)));
        assert_eq!(own, expected);
    }

    #[test]
    fn must_be_an_object() {
        for text in ["[]", "1", "\"a\"", "null", "{} {}", "{\"a\"}"] {
            assert!(own(text).is_err(), "{text}");
        }
    }
}
