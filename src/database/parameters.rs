//! Connection strings and libpq's variables, as one set of parameters.
//!
//! What is refused is never quoted here, but for the names of parameters: a
//! password with a character that should have been encoded ends up in any part
//! of a URL.

use std::collections::BTreeMap;

use crate::error::{Error, ErrorKind, Result};

/// The parameters we know, and the variable that stands in for each. Those
/// that have no effect here are known because tools put them into URLs.
const KNOWN: [(&str, &str); 25] = [
    ("host", "PGHOST"),
    ("hostaddr", "PGHOSTADDR"),
    ("port", "PGPORT"),
    ("dbname", "PGDATABASE"),
    ("user", "PGUSER"),
    ("password", "PGPASSWORD"),
    ("passfile", "PGPASSFILE"),
    ("options", "PGOPTIONS"),
    ("connect_timeout", "PGCONNECT_TIMEOUT"),
    ("sslmode", "PGSSLMODE"),
    ("sslrootcert", "PGSSLROOTCERT"),
    ("sslcert", "PGSSLCERT"),
    ("sslkey", "PGSSLKEY"),
    ("sslnegotiation", "PGSSLNEGOTIATION"),
    ("channel_binding", "PGCHANNELBINDING"),
    ("target_session_attrs", "PGTARGETSESSIONATTRS"),
    ("keepalives", ""),
    ("keepalives_idle", ""),
    ("keepalives_interval", ""),
    ("keepalives_count", ""),
    ("tcp_user_timeout", ""),
    ("application_name", ""),
    ("fallback_application_name", ""),
    ("client_encoding", ""),
    ("gssencmode", ""),
];

/// A value, and the variable it comes from; none: the connection string.
type Value = (String, Option<&'static str>);

/// Every parameter that is set, and where.
pub(super) struct Parameters(BTreeMap<String, Value>);

impl Parameters {
    /// The parameters of `url`, completed from the environment.
    pub(super) fn read(url: Option<&str>, env: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let mut parameters = Self(BTreeMap::new());
        match url.map(str::trim) {
            Some(url) => parameters.read_string(url)?,
            None if env("PGSERVICE").is_some_and(|service| !service.is_empty()) => {
                return Err(settings("PGSERVICE is not supported; give a database URL"));
            }
            None => {}
        }
        for (key, variable) in KNOWN {
            if !variable.is_empty()
                && !parameters.0.contains_key(key)
                && let Some(value) = env(variable)
            {
                let value = (value, Some(variable));
                parameters.0.insert(key.to_owned(), value);
            }
        }
        parameters.check_fixed("sslnegotiation", &["postgres"])?;
        parameters.check_fixed("gssencmode", &["disable", "prefer"])?;
        parameters.check_fixed("client_encoding", &["utf8", "UTF8", "auto"])?;
        Ok(parameters)
    }

    /// The value of `key`; an empty one is unset, as in libpq.
    pub(super) fn get(&self, key: &str) -> Option<&str> {
        let (value, _) = self.0.get(key)?;
        Some(value.as_str()).filter(|value| !value.is_empty())
    }

    /// What to call `key` in a message: the variable, if that is where it comes
    /// from.
    pub(super) fn name(&self, key: &str) -> String {
        match self.0.get(key) {
            Some((_, Some(variable))) => (*variable).to_owned(),
            _ => format!("database parameter \"{key}\""),
        }
    }

    /// An error about `key`.
    pub(super) fn refuse(&self, key: &str, complaint: &str) -> Error {
        settings(format!("{} {complaint}", self.name(key)))
    }

    fn check_fixed(&self, key: &str, values: &[&str]) -> Result<()> {
        match self.get(key) {
            Some(value) if !values.contains(&value) => {
                let complaint = format!("must be {}", values.join(" or "));
                Err(self.refuse(key, &complaint))
            }
            _ => Ok(()),
        }
    }

    fn read_string(&mut self, text: &str) -> Result<()> {
        let rest = text
            .strip_prefix("postgresql://")
            .or_else(|| text.strip_prefix("postgres://"));
        match rest {
            Some(rest) => self.read_url(rest),
            None if text
                .split('=')
                .next()
                .is_some_and(|key| key.contains("://")) =>
            {
                Err(settings(
                    "the database URL starts with neither postgresql:// nor postgres://",
                ))
            }
            None => self.read_pairs(text),
        }
    }

    /// Cuts a URL where libpq cuts it: user and password end at the first `@`
    /// before any `/`.
    fn read_url(&mut self, rest: &str) -> Result<()> {
        let (credentials, rest) = match rest.split_once('@') {
            Some((head, tail)) if !head.contains('/') => (head, tail),
            _ => ("", rest),
        };
        if rest.contains('@') {
            return Err(settings(
                "the database URL has an \"@\" or \"/\" too many; in a user, password or parameter write %40 and %2F",
            ));
        }
        let (user, password) = credentials.split_once(':').unwrap_or((credentials, ""));
        let (authority, rest) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (host, port) = split_authority(authority)?;
        for (key, value) in [
            ("user", user),
            ("password", password),
            ("host", host),
            ("port", port),
            ("dbname", path.strip_prefix('/').unwrap_or(path)),
        ] {
            if !value.is_empty() {
                self.0
                    .insert(key.to_owned(), (percent_decode(value)?, None));
            }
        }
        let mut before = "";
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair
                .split_once('=')
                .ok_or_else(|| settings("a parameter of the database URL has no value"))?;
            self.set(&percent_decode(key)?, percent_decode(value)?, before)?;
            before = key;
        }
        Ok(())
    }

    /// `key = value` pairs, values quoted with `'` and escaped with `\`.
    fn read_pairs(&mut self, text: &str) -> Result<()> {
        let mut rest = text.trim_start();
        let mut before = "";
        while !rest.is_empty() {
            let (key, after) = rest
                .split_once('=')
                .map(|(key, after)| (key.trim_end(), after.trim_start()))
                .filter(|(key, _)| !key.contains(char::is_whitespace))
                .ok_or_else(|| {
                    settings("the database URL is neither postgresql://… nor key=value pairs")
                })?;
            let (value, after) = take_value(after)?;
            self.set(key, value, before)?;
            before = key;
            rest = after.trim_start();
        }
        Ok(())
    }

    fn set(&mut self, key: &str, value: String, before: &str) -> Result<()> {
        // Java's way of asking for TLS; libpq takes it too.
        let (key, value) = match (key, value.as_str()) {
            ("ssl", "true") => ("sslmode", "require".to_owned()),
            _ => (key, value),
        };
        if !KNOWN.iter().any(|(known, _)| *known == key) {
            // After a password this may be the rest of one that lacks its quotes.
            return Err(settings(match before {
                "password" => "the parameter after the password in the database URL is not \
                               supported; if it belongs to the password, encode or quote that"
                    .to_owned(),
                _ => format!("database parameter \"{key}\" is not supported"),
            }));
        }
        self.0.insert(key.to_owned(), (value, None));
        Ok(())
    }
}

/// Host and port. A port that is none is not quoted: it may be a password.
fn split_authority(authority: &str) -> Result<(&str, &str)> {
    if authority.contains(',') {
        return Err(settings(
            "the database URL names several hosts; postbox takes one host for now",
        ));
    }
    match authority
        .strip_prefix('[')
        .and_then(|rest| rest.split_once(']'))
    {
        Some((host, "")) => Ok((host, "")),
        Some((host, port)) => match port.strip_prefix(':') {
            Some(port) => Ok((host, port)),
            None => Err(settings(
                "the database URL has no \":\" between \"]\" and the port",
            )),
        },
        None => Ok(authority.split_once(':').unwrap_or((authority, ""))),
    }
}

/// One value and what follows it.
fn take_value(text: &str) -> Result<(String, &str)> {
    let quoted = text.starts_with('\'');
    let mut value = String::new();
    let mut characters = text.char_indices().skip(usize::from(quoted));
    while let Some((at, character)) = characters.next() {
        match character {
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            '\'' if quoted => return Ok((value, &text[at + 1..])),
            _ if !quoted && character.is_whitespace() => return Ok((value, &text[at..])),
            _ => value.push(character),
        }
    }
    if quoted {
        return Err(settings("the database URL has a quote that does not end"));
    }
    Ok((value, ""))
}

fn percent_decode(text: &str) -> Result<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let decoded = match byte {
            b'%' => {
                let mut digit = || (rest.next()? as char).to_digit(16);
                digit().and_then(|high| u8::try_from(high * 16 + digit()?).ok())
            }
            byte => Some(byte),
        };
        bytes.push(decoded.filter(|byte| *byte != 0).ok_or_else(|| {
            settings(
                "the database URL has a \"%\" that no two hexadecimal digits follow; write %25",
            )
        })?);
    }
    String::from_utf8(bytes).map_err(|_| settings("the database URL is not UTF-8 once decoded"))
}

/// Encodes all but the characters that mean themselves everywhere in a URL.
pub(super) fn percent_encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(byte.into());
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

fn settings(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Settings, message)
}
