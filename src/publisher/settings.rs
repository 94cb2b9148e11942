//! What librdkafka is told: what is ours for good, what may be tuned, and what
//! is refused because it fights a promise.

use rdkafka::ClientConfig;
use rdkafka::error::KafkaError;
use rdkafka::producer::BaseProducer;

use super::brokers;
use crate::error::{Error, ErrorKind, Result};

/// Where the brokers are and how to talk to them.
#[derive(Clone, Default)]
pub struct KafkaSettings {
    /// `host:port,…`, any part of the cluster; without a port it is 9092.
    pub brokers: String,
    /// Anything else that librdkafka knows, such as `security.protocol`.
    pub properties: Vec<(String, String)>,
}

/// Properties that carry a promise: librdkafka's names for each, our value, and
/// what it would cost to change it.
const FIXED: &[(&[&str], &str, &str)] = &[
    (
        &["acks", "request.required.acks"],
        "all",
        "an event is confirmed only after every in-sync replica has it",
    ),
    (
        &["enable.idempotence"],
        "true",
        "retries must neither repeat nor reorder",
    ),
    // The relay's purge at the first failure does not stand in for it: until the
    // relay looks, librdkafka would number anew what is behind the gap, and send it.
    (
        &["enable.gapless.guarantee"],
        "true",
        "no event may overtake one that failed",
    ),
    (
        &["message.timeout.ms", "delivery.timeout.ms"],
        "0",
        "an event waits for the broker for as long as it takes",
    ),
    // We choose the partition ourselves, as Java's producers do.
    (
        &["partitioner"],
        "murmur2_random",
        "keys must land where Java producers put them",
    ),
    // In-flight events are bounded by --in-flight-max and --in-flight-bytes-max,
    // which count what librdkafka holds too.
    (
        &["queue.buffering.max.messages"],
        "0",
        "what is in flight is bounded by --in-flight-max",
    ),
    (
        &["queue.buffering.max.kbytes"],
        "2097151",
        "what is in flight is bounded by --in-flight-bytes-max",
    ),
];

/// Properties that would break something no value can mend.
const REFUSED: &[(&str, &str)] = &[
    ("bootstrap.servers", "use --brokers"),
    ("metadata.broker.list", "use --brokers"),
    (
        "transactional.id",
        "the relay does not use Kafka transactions",
    ),
    ("dr_cb", "the relay depends on delivery reports"),
    (
        "delivery.report.only.error",
        "the relay depends on delivery reports",
    ),
];

const COMPRESSION: &[&str] = &["compression.codec", "compression.type"];

const LINGER: &[&str] = &["linger.ms", "queue.buffering.max.ms"];

/// What may be overridden, with its default and the reason for it.
const DEFAULTS: &[(&[&str], &str)] = &[
    // 400,000 rows of 395 bytes over a Unix socket, 100 a transaction: 83,000 events/s
    // at 10.0 µs of the relay's CPU each with 0; 133,000 at 5.2 with 1; 143,000 at 4.5
    // with 2; 157,000 at 3.9 with 5; 160,000 at 3.8 with 10. What is alone is pushed.
    (LINGER, "5"),
    // The same drain, relay and broker, µs of CPU an event: none 3.4 + 3.3, lz4 4.2 + 2.1,
    // snappy 4.3 + 2.8, zstd 4.6 + 1.9; as many events a second with each.
    (COMPRESSION, "lz4"),
    (&["socket.keepalive.enable"], "true"),
    // The default waits up to 10 s between attempts: too long for a broker that
    // came back.
    (&["reconnect.backoff.max.ms"], "2000"),
    (&["client.id"], "postbox"),
    // The broker decides by the topic's limit, after compression. But it hangs up
    // on a request above its socket.request.max.bytes, 100 MiB by default, for
    // ever: so what could only be such a request is refused here.
    (&["message.max.bytes"], "100000000"),
];

/// The largest batch, in bytes before compression; a topic with a smaller
/// `max.message.bytes` lowers it. Draining 500,000 rows, medians of three: 166,000 events/s
/// with this and with a tenth of it.
pub const BATCH_BYTES: usize = 1_000_000;

impl KafkaSettings {
    /// Checks the brokers' form, every property, and how they go together, as librdkafka does when it
    /// makes a client. Nothing is sent.
    ///
    /// # Errors
    /// If a broker is malformed, or a property is unknown, malformed, or fights a
    /// promise.
    pub fn check(&self) -> Result<()> {
        let config = self.producer(BATCH_BYTES)?;
        config.create::<BaseProducer>().map_err(invalid)?;
        Ok(())
    }

    /// The same, whose batches are compressed like this unless it is the user who says how.
    #[must_use]
    pub fn compressed(mut self, codec: &str) -> Self {
        if !self.sets(COMPRESSION) {
            let property = (COMPRESSION[0].to_owned(), codec.to_owned());
            self.properties.push(property);
        }
        self
    }

    /// What a producer is made of.
    pub(crate) fn producer(&self, batch_bytes: usize) -> Result<ClientConfig> {
        let mut config = self.client()?;
        for (names, value, _) in FIXED {
            config.set(names[0], *value);
        }
        for (names, value) in DEFAULTS {
            if !self.sets(names) {
                config.set(names[0], *value);
            }
        }
        let most = i32::try_from(batch_bytes.min(BATCH_BYTES)).expect("one million at most");
        let wished = self.value("batch.size");
        // What is no size is left for librdkafka to refuse.
        if let Ok(wished) = wished.map_or(Ok(most), str::parse::<i32>) {
            config.set("batch.size", wished.min(most).to_string());
        }
        Ok(config)
    }

    /// What any client is made of: the brokers and the user's properties.
    ///
    /// # Errors
    /// If a broker is malformed, or a property fights a promise.
    pub fn client(&self) -> Result<ClientConfig> {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", brokers::check(&self.brokers)?);
        for (name, value) in &self.properties {
            refuse(name, value)?;
            config.set(name, value);
        }
        Ok(config)
    }

    /// The largest record that librdkafka takes, in bytes.
    pub(super) fn message_bytes_max(&self) -> Option<usize> {
        let name = "message.max.bytes";
        let default = DEFAULTS.iter().find(|(names, _)| names.contains(&name));
        let value = self.value(name).or(default.map(|(_, value)| *value));
        value?.parse().ok()
    }

    /// Whether what is sent is compressed.
    pub(super) fn compresses(&self) -> bool {
        let codec = COMPRESSION.iter().find_map(|name| self.value(name));
        codec != Some("none")
    }

    /// Whether it is the user who says for how long records linger.
    pub(super) fn sets_linger(&self) -> bool {
        self.sets(LINGER)
    }

    fn sets(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.value(name).is_some())
    }

    fn value(&self, name: &str) -> Option<&str> {
        let mut set = self.properties.iter().rev();
        set.find(|(set, _)| set == name)
            .map(|(_, value)| value.as_str())
    }
}

impl std::fmt::Debug for KafkaSettings {
    /// The names of the properties; a value may be a password.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names = self.properties.iter().map(|(name, _)| name);
        f.debug_struct("KafkaSettings")
            .field("brokers", &self.brokers)
            .field("properties", &names.collect::<Vec<_>>())
            .finish()
    }
}

fn refuse(name: &str, value: &str) -> Result<()> {
    if let Some((_, why)) = REFUSED.iter().find(|(refused, _)| *refused == name) {
        return Err(settings(format!("-X {name} is not for you to set: {why}")));
    }
    let fixed = FIXED.iter().find(|(names, ..)| names.contains(&name));
    match fixed {
        Some((_, ours, why)) if !same(ours, value) => Err(settings(format!(
            "-X {name}={value} fights {name}={ours}, which stays: {why}"
        ))),
        _ => Ok(()),
    }
}

/// Whether two values mean the same to librdkafka.
fn same(ours: &str, value: &str) -> bool {
    let value = value.trim().to_ascii_lowercase();
    match ours {
        "all" => value == "all" || value == "-1",
        "true" => matches!(value.as_str(), "true" | "t" | "1"),
        _ => value == ours,
    }
}

/// librdkafka's own words, unless they could quote a secret.
pub(crate) fn invalid(error: KafkaError) -> Error {
    let (reason, name) = match error {
        KafkaError::ClientConfig(_, reason, name, _) => (reason, name),
        // Properties that do not go together: the text names them.
        KafkaError::ClientCreation(reason) => return settings(format!("-X: {reason}")),
        error => return settings(format!("kafka settings: {error}")),
    };
    let secret = ["password", "secret", "token", "pem", "jaas"]
        .iter()
        .any(|word| name.contains(word));
    if secret {
        return settings(format!("-X {name}: librdkafka does not accept this value"));
    }
    // The text of an unknown property names it; that of a bad value quotes both.
    let mut reason = reason;
    if let Some(first) = reason.get_mut(..1) {
        first.make_ascii_lowercase();
    }
    settings(format!("-X {name}: {reason}"))
}

fn settings(message: String) -> Error {
    Error::new(ErrorKind::Settings, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(properties: &[(&str, &str)]) -> std::result::Result<(), String> {
        let properties = properties
            .iter()
            .map(|(name, value)| (name.to_string(), value.to_string()))
            .collect();
        let settings = KafkaSettings {
            brokers: "localhost:9092".to_owned(),
            properties,
        };
        settings.check().map_err(|error| error.chain())
    }

    #[test]
    fn batches_are_compressed_as_the_user_says() {
        for (name, value, expected) in [
            ("client.id", "a", "none"),
            ("compression.codec", "zstd", "zstd"),
            ("compression.type", "gzip", "gzip"),
        ] {
            let settings = KafkaSettings {
                brokers: "localhost:9092".to_owned(),
                properties: vec![(name.to_owned(), value.to_owned())],
            };
            let config = settings.compressed("none").producer(BATCH_BYTES).unwrap();
            let set = COMPRESSION.iter().filter_map(|name| config.get(name));
            assert_eq!(set.collect::<Vec<_>>(), [expected]);
        }
    }

    #[test]
    fn what_fights_a_promise_is_refused_naming_both() {
        for (name, value, ours) in [
            ("acks", "1", "all"),
            ("request.required.acks", "0", "all"),
            ("enable.idempotence", "false", "true"),
            ("message.timeout.ms", "5000", "0"),
            ("delivery.timeout.ms", "5000", "0"),
            ("partitioner", "consistent", "murmur2_random"),
        ] {
            let error = check(&[(name, value)]).unwrap_err();
            assert!(
                error.starts_with(&format!("-X {name}={value} fights {name}={ours}, ")),
                "{error}"
            );
        }
        assert!(check(&[("bootstrap.servers", "x:1")]).is_err());
        assert!(check(&[("transactional.id", "x")]).is_err());
    }

    #[test]
    fn the_same_value_in_other_words_is_accepted() {
        assert_eq!(
            check(&[("acks", "-1"), ("enable.idempotence", "1")]),
            Ok(())
        );
        assert_eq!(
            check(&[("linger.ms", "20"), ("batch.size", "50000")]),
            Ok(())
        );
    }

    #[test]
    fn unknown_properties_and_bad_values_are_named() {
        let error = check(&[("linger.msec", "5")]).unwrap_err();
        assert!(
            error.starts_with("-X linger.msec: no such configuration property"),
            "{error}"
        );
        let error = check(&[("linger.ms", "soon")]).unwrap_err();
        assert!(error.starts_with("-X linger.ms: "), "{error}");
    }

    #[test]
    fn sizes_are_taken_up_to_librdkafkas_limits_and_not_beyond() {
        for (name, good, bad) in [
            (
                "message.max.bytes",
                ["1000", "1000000000"],
                ["999", "1000000001"],
            ),
            ("batch.size", ["1", "2147483647"], ["0", "2147483648"]),
            ("batch.num.messages", ["1", "1000000"], ["0", "1000001"]),
            ("linger.ms", ["0", "900000"], ["-1", "900001"]),
            ("max.in.flight", ["1", "5"], ["0", "6"]),
        ] {
            for value in good {
                assert_eq!(check(&[(name, value)]), Ok(()), "{name}={value}");
            }
            for value in bad {
                let error = check(&[(name, value)]).unwrap_err();
                assert!(error.starts_with("-X"), "{name}={value}: {error}");
            }
        }
    }

    #[test]
    fn properties_that_do_not_go_together_are_refused() {
        for (name, value) in [
            ("max.in.flight", "6"),
            ("retries", "0"),
            ("security.protocol", "SASL_SSL"),
        ] {
            let error = check(&[(name, value)]).unwrap_err();
            assert!(error.starts_with("-X: "), "{error}");
        }
    }

    #[test]
    fn a_secret_is_never_quoted() {
        for name in ["sasl.passwrd.password", "sasl.secret", "sasl.password.x"] {
            let error = check(&[(name, "hunter2")]).unwrap_err();
            assert!(!error.contains("hunter2"), "{error}");
        }
        let settings = KafkaSettings {
            brokers: String::new(),
            properties: vec![("sasl.password".into(), "hunter2".into())],
        };
        assert!(!format!("{settings:?}").contains("hunter2"));
    }
}
