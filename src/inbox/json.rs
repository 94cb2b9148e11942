//! Which JSON `jsonb` takes, and which is an envelope. Pure.
//!
//! Everything that is JSON is `json`, but not `jsonb`: it has neither `\\u0000` nor half of a
//! surrogate pair, its numbers are `numeric`, and it is read by a function that calls itself for
//! each level, until the server's stack is used up (`max_stack_depth`, 2 MB by default).
//! <https://www.postgresql.org/docs/current/datatype-json.html>
//!
//! One row that does not fit fails the statement of a whole batch. So the limits here are
//! on the safe side: what is beyond them is kept as bytes, and is lost to nobody.

use std::borrow::Cow;
use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

/// How deep it may be nested.
const DEPTH_MAX: usize = 1000;

/// How many digits a number may have, and how large its exponent may be: `numeric` has 131,072
/// digits before the point, and 16,383 behind it.
const NUMBER_MAX: usize = 10_000;

/// Whether this is JSON.
pub(super) fn is_json(text: &str) -> bool {
    serde_json::from_str::<IgnoredAny>(text).is_ok()
}

/// Whether JSON is within what `jsonb` takes.
pub(super) fn fits_jsonb(json: &str) -> bool {
    let mut bytes = json.bytes().enumerate();
    let mut depth = 0usize;
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'[' | b'{' => {
                depth += 1;
                if depth > DEPTH_MAX {
                    return false;
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b'"' => match string_end(json, at + 1) {
                Some(end) => {
                    // The closing quote is `end`.
                    bytes.by_ref().take(end - at).for_each(drop);
                }
                None => return false,
            },
            b'-' | b'0'..=b'9' => {
                let end = number_end(json, at);
                if !number_fits(&json[at..end]) {
                    return false;
                }
                bytes.by_ref().take(end - at - 1).for_each(drop);
            }
            _ => {}
        }
    }
    true
}

/// Where the quote stands that ends the string which begins here; `None` if `jsonb` refuses it.
fn string_end(json: &str, from: usize) -> Option<usize> {
    let bytes = json.as_bytes();
    let mut at = from;
    loop {
        match *bytes.get(at)? {
            b'"' => return Some(at),
            b'\\' if bytes.get(at + 1) == Some(&b'u') => {
                let unit = code_unit(json, at)?;
                at += 6;
                match unit {
                    0 | 0xDC00..=0xDFFF => return None,
                    0xD800..=0xDBFF => {
                        let low = code_unit(json, at)?;
                        if !(0xDC00..=0xDFFF).contains(&low) {
                            return None;
                        }
                        at += 6;
                    }
                    _ => {}
                }
            }
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
}

/// The UTF-16 code unit of `\uXXXX`, if that stands here.
fn code_unit(json: &str, at: usize) -> Option<u16> {
    let digits = json.get(at..at + 6)?.strip_prefix("\\u")?;
    u16::from_str_radix(digits, 16).ok()
}

fn number_end(json: &str, from: usize) -> usize {
    let is_part = |byte: u8| matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E');
    let length = json.as_bytes()[from..]
        .iter()
        .take_while(|byte| is_part(**byte));
    from + length.count()
}

fn number_fits(number: &str) -> bool {
    if number.len() > NUMBER_MAX {
        return false;
    }
    match number.split_once(['e', 'E']) {
        Some((_, exponent)) => exponent
            .parse::<i64>()
            .is_ok_and(|exponent| exponent.unsigned_abs() <= NUMBER_MAX as u64),
        None => true,
    }
}

/// An object with a `payload`, that says what this is: by its `event_type`, or by a
/// `schema_version` and nothing else.
pub(super) struct Envelope<'a> {
    /// What is in it.
    pub(super) payload: &'a RawValue,
    /// Its other members, by their names. The last of a name counts.
    members: Vec<(Cow<'a, str>, &'a RawValue)>,
}

impl<'a> Envelope<'a> {
    /// Of JSON; `None` if it is none.
    pub(super) fn of(json: &'a str) -> Option<Self> {
        let Members(members) = serde_json::from_str(json).ok()?;
        let (payloads, members): (Vec<_>, Vec<_>) =
            members.into_iter().partition(|(name, _)| name == "payload");
        let (_, payload) = payloads.last()?;
        let envelope = Self { payload, members };
        let is_versioned = || {
            !envelope.members.is_empty()
                && envelope
                    .members
                    .iter()
                    .all(|(name, _)| name == "schema_version")
        };
        (envelope.text("event_type").is_some() || is_versioned()).then_some(envelope)
    }

    /// A member that is a text with something in it, or a number.
    pub(super) fn text(&self, name: &str) -> Option<String> {
        let (_, value) = self.members.iter().rev().find(|(found, _)| found == name)?;
        let text = match serde_json::from_str::<serde_json::Value>(value.get()).ok()? {
            serde_json::Value::String(text) => text,
            serde_json::Value::Number(_) => value.get().to_owned(),
            _ => return None,
        };
        let is_some = !text.trim().is_empty() && !text.contains('\0');
        is_some.then_some(text)
    }
}

/// The members of an object, in their order.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(Name(name)) = map.next_key()? {
                    members.push((name, map.next_value()?));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// A member's name, borrowed where it has no escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_jsonb_refuses_does_not_fit() {
        for json in [
            r#""a\u0000b""#,
            r#"{"a\u0000":1}"#,
            r#"["\ud800"]"#,
            r#"["\ud800\u0041"]"#,
            r#"["\ud800x"]"#,
            r#"["\udc00"]"#,
            "1e200000",
            "[-1E-200000]",
            "1e99999999999999999999",
        ] {
            assert!(is_json(json), "{json}");
            assert!(!fits_jsonb(json), "{json}");
        }
        let deep = |levels: usize| "[".repeat(levels) + &"]".repeat(levels);
        assert!(fits_jsonb(&deep(DEPTH_MAX)));
        assert!(is_json(&deep(100_000)) && !fits_jsonb(&deep(DEPTH_MAX + 1)));
        assert!(!fits_jsonb(&"9".repeat(NUMBER_MAX + 1)));
    }

    #[test]
    fn what_only_looks_like_it_fits() {
        for json in [
            r#""\\u0000""#,
            r#""\\\"[[1e200000""#,
            r#""\ud83d\ude00 \u0001 \u00e4""#,
            r#"{"1e200000":1e400}"#,
            "[1.5e-3, -0, 1E+3, 12345678901234567890]",
            r#"{"a":[{"b":"}{]["}]}"#,
            "null",
        ] {
            assert!(is_json(json) && fits_jsonb(json), "{json}");
        }
    }

    #[test]
    fn an_envelope_says_what_it_is() {
        for (json, payload) in [
            (
                r#"{"id":"1","event_type":"a","payload":{"b":1}}"#,
                Some(r#"{"b":1}"#),
            ),
            (r#"{"event_type":"a","payload":null}"#, Some("null")),
            (
                r#"{"schema_version":"1.0.0","payload":[1, 2]}"#,
                Some("[1, 2]"),
            ),
            (r#"{"schema_version":null,"payload":1}"#, Some("1")),
            (r#"{"payload":1,"event_type":"a","payload":2}"#, Some("2")),
            (r#"{"pay\u006coad":3,"event_type":"a"}"#, Some("3")),
            // An application's own member of that name.
            (r#"{"payload":{"b":1}}"#, None),
            (r#"{"payload":1,"schema_version":"1","size":3}"#, None),
            (r#"{"payload":1,"event_type":" "}"#, None),
            (r#"{"payload":1,"event_type":7,"event_type":{}}"#, None),
            (r#"{"event_type":"a"}"#, None),
            ("[1]", None),
            (r#""payload""#, None),
        ] {
            let found = Envelope::of(json);
            assert_eq!(
                found.map(|envelope| envelope.payload.get()),
                payload,
                "{json}"
            );
        }
    }
}
