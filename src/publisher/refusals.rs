//! What the brokers say that waiting will not mend.
//!
//! librdkafka tries again for ever and tells what broke as a code and a text. One
//! code covers both a refusal and a broker that went away in the middle, so the
//! text decides, and only words that stand for the other side's own answer, or for
//! our own verdict on its certificate, count. They are not translated; the tests in
//! `tests/it/security` provoke each of them.

use rdkafka::error::RDKafkaErrorCode;

use crate::error::{Error, ErrorKind};

/// The codes under which a refusal may come, the words that show it, and what to
/// tell.
const REFUSALS: &[(&[RDKafkaErrorCode], &str, &str)] = &[
    (
        &[
            RDKafkaErrorCode::Authentication,
            RDKafkaErrorCode::SaslAuthenticationFailed,
        ],
        "SASL authentication error: ",
        "the brokers refuse our identity: check sasl.username and sasl.password",
    ),
    (
        &[RDKafkaErrorCode::Authentication],
        "Broker: Unsupported SASL mechanism",
        "the brokers do not take our sasl.mechanism: use one of theirs",
    ),
    (
        &[RDKafkaErrorCode::Authentication],
        "Broker: Request not valid in current SASL state",
        "the brokers ask nobody to log in here: check security.protocol and the port",
    ),
    (
        &[RDKafkaErrorCode::SSL],
        "broker certificate",
        "the broker's certificate is not trusted: ssl.ca.location must hold its CA, it must name the host \
         that we connect to, and must not have expired",
    ),
    (
        &[RDKafkaErrorCode::ClusterAuthorizationFailed],
        "Failed to acquire idempotence PID",
        "the brokers let us write nowhere: allow Write on the topics",
    ),
];

const NOT_ACCEPTED: &str = "the brokers do not accept our certificate, or miss it: check ssl.certificate.location \
                            and ssl.key.location";

/// OpenSSL's words before the number of an alert that the broker sent, and the
/// alerts that are about our certificate.
/// <https://www.iana.org/assignments/tls-parameters#tls-parameters-6>
const ALERT: &str = "SSL alert number ";
const CERTIFICATE_ALERTS: [&str; 9] = ["42", "43", "44", "45", "46", "48", "49", "51", "116"];

/// The error if this is one that waiting will not mend.
pub(super) fn refusal(code: RDKafkaErrorCode, reason: &str) -> Option<Error> {
    let listed = REFUSALS
        .iter()
        .find(|(codes, words, _)| codes.contains(&code) && reason.contains(words));
    let message = match listed {
        Some((.., message)) => message,
        None if is_about_our_certificate(reason) => NOT_ACCEPTED,
        None => return None,
    };
    Some(Error::new(ErrorKind::Rights, message).caused_by(reason))
}

fn is_about_our_certificate(reason: &str) -> bool {
    let number = reason.split(ALERT).nth(1).unwrap_or_default();
    let number = number.split(|c: char| !c.is_ascii_digit()).next();
    number.is_some_and(|number| CERTIFICATE_ALERTS.contains(&number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_other_side_says_is_a_refusal() {
        use RDKafkaErrorCode::{Authentication, BrokerTransportFailure, SSL};
        for (code, reason, refused) in [
            (
                Authentication,
                "sasl_ssl://b:1/1: SASL authentication error: invalid credentials",
                true,
            ),
            (
                Authentication,
                "b:1: SASL PLAIN mechanism handshake failed: Local: Broker transport failure",
                false,
            ),
            (
                Authentication,
                "b:1: SASL PLAIN mechanism handshake failed: Broker: Unsupported SASL mechanism: \
                 broker's supported mechanisms: SCRAM-SHA-512",
                true,
            ),
            (
                SSL,
                "ssl://b:1/1: SSL handshake failed: x: broker certificate could not be verified",
                true,
            ),
            (
                SSL,
                "ssl://b:1/1: SSL handshake failed: wrong version number",
                false,
            ),
            (
                BrokerTransportFailure,
                "b:1: Receive failed: sslv3 alert bad certificate: SSL alert number 42 (after 1ms)",
                true,
            ),
            (
                BrokerTransportFailure,
                "b:1: Receive failed: tlsv1 alert internal error: SSL alert number 80 (after 42ms)",
                false,
            ),
            (BrokerTransportFailure, "b:1: Connect to b:1 failed", false),
        ] {
            let found = refusal(code, reason).map(|error| error.kind());
            let expected = refused.then_some(ErrorKind::Rights);
            assert_eq!(found, expected, "{reason}");
        }
    }
}
