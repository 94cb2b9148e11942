//! A Kafka that we do not trust, or that does not trust us.

use super::servers::{RELAY, issuers, kafka, kafka_flags};
use super::{assert_no_secret, borrowed, complaint};
use crate::support::{Fixture, Relay};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn brokers_that_cannot_be_trusted_or_do_not_trust_us_are_refused() {
    let mut fixture = Fixture::new().await;
    fixture.brokers = kafka().fact("brokers").to_owned();
    let stranger = issuers().stranger.certificate();
    let other = issuers().stranger.client(RELAY);
    let not_trusted = "the broker's certificate is not trusted";
    let password = "check sasl.username and sasl.password";
    let certificate = "do not accept our certificate, or miss it: check ssl.certificate.location";
    for (listener, changes, expected) in [
        // A librdkafka that checks a certificate does not say what it misses.
        (
            "IN",
            &[("ssl.ca.pem", &stranger[..])][..],
            &[not_trusted, "ssl.ca.location"][..],
        ),
        ("AWAY", &[], &[not_trusted, "must name the host"]),
        ("OLD", &[], &[not_trusted, "expired"]),
        ("IN", &[("sasl.password", "hunter2x")], &[password]),
        ("IN", &[("sasl.username", "nobody")], &[password]),
        (
            "IN",
            &[("sasl.mechanism", "SCRAM-SHA-256")],
            &["do not take our sasl.mechanism", "SCRAM-SHA-512"],
        ),
        (
            "IN",
            &[("ssl.certificate.pem", ""), ("ssl.key.pem", "")],
            &[certificate],
        ),
        (
            "IN",
            &[
                ("ssl.certificate.pem", &other.certificate),
                ("ssl.key.pem", &other.key),
            ],
            &[certificate],
        ),
    ] {
        let mut flags = kafka_flags(listener, changes);
        flags.extend(["-X".to_owned(), "debug=all".to_owned()]);
        let mut command = Relay::command(&fixture, &borrowed(&flags));
        let mut relay = Relay::spawn(command.env("RUST_LOG", "trace"));
        assert_eq!(relay.exit_code().await, 6, "{}", relay.log());
        let log = relay.log();
        let complaint = complaint(&log);
        for text in expected {
            assert!(complaint.contains(text), "no \"{text}\" in: {complaint}");
        }
        assert_no_secret(&log, &[&issuers().kafka_client.key, &other.key]);
    }
}

/// OpenSSL must not be torn down under librdkafka's threads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_ends_while_librdkafka_is_busy_does_not_crash() {
    let mut fixture = Fixture::new().await;
    fixture.brokers = kafka().fact("brokers").to_owned();
    let mut flags = kafka_flags("IN", &[("sasl.password", "wrong")]);
    for property in ["reconnect.backoff.ms=0", "reconnect.backoff.max.ms=0"] {
        flags.extend(["-X".to_owned(), property.to_owned()]);
    }
    let here = kafka().fact("brokers.IN");
    flags[1] = format!("{here},{}", here.replace("127.0.0.1", "localhost"));
    let relays: Vec<Relay> = (0..12)
        .map(|_| Relay::start(&fixture, &borrowed(&flags)))
        .collect();
    for mut relay in relays {
        assert_eq!(relay.exit_code().await, 6, "{}", relay.log());
    }
}
