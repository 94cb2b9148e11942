//! A record's headers: ours, then the row's own.

use std::borrow::Cow;
use std::fmt;

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

/// The headers of an event's record.
pub(super) fn of<'a>(event: &Event<'a>) -> Result<Vec<Header<'a>>, Refused> {
    let ours = [
        ("id", Some(event.id)),
        ("event_type", Some(event.event_type)),
        ("schema_version", event.schema_version),
        ("trace_id", event.trace_id),
        ("correlation_id", event.correlation_id),
        ("causation_id", event.causation_id),
        ("traceparent", event.traceparent),
    ];
    let mut headers: Vec<_> = ours
        .into_iter()
        .filter_map(|(name, value)| {
            Some(Header {
                name: name.into(),
                value: Some(value?.into()),
            })
        })
        .collect();
    if let Some(object) = event.headers {
        let own = own(object).map_err(Refused::Headers)?;
        let ours = headers.len();
        for header in own {
            if headers[..ours].iter().all(|our| our.name != header.name) {
                headers.push(header);
            }
        }
    }
    Ok(headers)
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
