//! The list of brokers, checked. librdkafka itself takes almost anything: a port
//! that is none becomes another one, and a host that is missing this machine.

use crate::error::{Error, ErrorKind, Result};

/// `list` without its spaces. Each broker is `host` or `host:port`, an IPv6
/// address in brackets; without a port it is 9092.
///
/// # Errors
/// If a broker is not like that, or the list has a gap.
pub(super) fn check(list: &str) -> Result<String> {
    let brokers: Vec<&str> = list.split(',').map(str::trim).collect();
    for broker in &brokers {
        if let Err(why) = check_one(broker) {
            let message = format!("--brokers: \"{broker}\" {why}: use host:port,host:port");
            return Err(Error::new(ErrorKind::Settings, message));
        }
    }
    Ok(brokers.join(","))
}

fn check_one(broker: &str) -> Result<(), &'static str> {
    if broker.contains('/') {
        return Err("is a URL; encryption is a matter of -X security.protocol");
    }
    let (host, port) = match broker.strip_prefix('[') {
        Some(rest) => rest
            .split_once(']')
            .ok_or("has a bracket that is not closed")?,
        None if broker.matches(':').count() > 1 => {
            return Err("has several colons; an IPv6 address stands in brackets");
        }
        None => broker.split_at(broker.find(':').unwrap_or(broker.len())),
    };
    if host.is_empty() {
        return Err("has no host");
    }
    if host.contains(char::is_whitespace) {
        return Err("has a space in its host");
    }
    // Rust would take a number that begins with a plus.
    let number = port
        .strip_prefix(':')
        .filter(|number| !number.starts_with('+'));
    match number.map(str::parse::<u16>) {
        None if port.is_empty() => Ok(()),
        Some(Ok(1..)) => Ok(()),
        _ => Err("has no port from 1 to 65535"),
    }
}

#[cfg(test)]
mod tests {
    use super::check;

    #[test]
    fn hosts_and_ports_are_taken_without_their_spaces() {
        for list in ["a:1", "a", "10.0.0.1:65535", "[::1]:9092,b:2", "[::1]"] {
            assert_eq!(check(list).unwrap(), list);
        }
        assert_eq!(check(" a:1 , b:2\n").unwrap(), "a:1,b:2");
    }

    #[test]
    fn what_is_no_broker_is_named_with_the_reason() {
        for (list, expected) in [
            ("", "\"\" has no host"),
            ("a:1,", "\"\" has no host"),
            ("a:1,,b:2", "\"\" has no host"),
            (":9092", "\":9092\" has no host"),
            ("[]:9092", "\"[]:9092\" has no host"),
            ("a:1,b:0", "\"b:0\" has no port from 1 to 65535"),
            ("a:65536", "\"a:65536\" has no port"),
            ("a:99999", "\"a:99999\" has no port"),
            ("a:", "\"a:\" has no port"),
            ("a:+1", "\"a:+1\" has no port"),
            ("a:1x", "\"a:1x\" has no port"),
            ("[::1]9092", "\"[::1]9092\" has no port"),
            ("[::1:9092", "a bracket that is not closed"),
            ("::1", "in brackets"),
            ("::1:9092", "in brackets"),
            ("fe80::1", "in brackets"),
            ("a:1 b:2", "\"a:1 b:2\" has several colons"),
            ("a b:1", "a space in its host"),
            ("ssl://a:1", "-X security.protocol"),
        ] {
            let error = check(list).unwrap_err().to_string();
            assert!(
                error.starts_with("--brokers: ") && error.contains(expected),
                "{list}: {error}"
            );
        }
    }
}
