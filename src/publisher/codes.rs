//! librdkafka's error codes, and what is done about them.

use rdkafka::error::RDKafkaErrorCode as Code;

use crate::error::ErrorKind;

/// What a failed delivery is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The record itself, or the batch it was in.
    Row,
    /// The topic: unknown, not ours to write, not a legal name.
    Topic,
    /// Our identity may not do what a producer does.
    Rights,
    /// What the brokers know of the protocol: they take no record of ours.
    Broker,
    /// The brokers, or a record before it; sending it again may work.
    Retry,
}

impl Verdict {
    /// Where the relay's error belongs. A record or a topic is judged only after
    /// the record was sent alone.
    pub fn kind(self) -> ErrorKind {
        match self {
            Self::Row | Self::Topic => ErrorKind::Event,
            Self::Rights => ErrorKind::Rights,
            Self::Broker => ErrorKind::Broker,
            Self::Retry => ErrorKind::BrokerAway,
        }
    }
}

/// How codes are sorted.
#[derive(Debug)]
pub struct Rule {
    /// The codes; none: any other.
    pub codes: &'static [Code],
    /// What they stand for.
    pub meaning: &'static str,
    /// What is done about them.
    pub verdict: Verdict,
    /// What a person does about them; empty where waiting is all.
    pub next_step: &'static str,
}

/// What is not known is worth a retry: the last rule takes any code.
pub static RULES: &[Rule] = &[
    Rule {
        codes: &[
            Code::MessageSizeTooLarge,
            Code::MessageBatchTooLarge,
            Code::InvalidMessageSize,
        ],
        meaning: "the record is too large",
        verdict: Verdict::Row,
        next_step: "make the event smaller, or raise the topic's max.message.bytes",
    },
    Rule {
        codes: &[
            Code::InvalidMessage,
            Code::InvalidTimestamp,
            Code::InvalidRecord,
            Code::PolicyViolation,
            Code::UnsupportedForMessageFormat,
        ],
        meaning: "the broker refuses the record, as the topic's settings tell it to",
        verdict: Verdict::Row,
        next_step: "compare the event with the topic's settings; a compacted topic takes no event without a key",
    },
    Rule {
        codes: &[
            Code::UnknownTopic,
            Code::UnknownTopicOrPartition,
            Code::UnknownPartition,
        ],
        meaning: "there is no such topic",
        verdict: Verdict::Topic,
        next_step: "create the topic: the brokers do not",
    },
    Rule {
        codes: &[Code::InvalidTopic],
        meaning: "the broker does not take this name for a topic",
        verdict: Verdict::Topic,
        next_step: "correct the row's topic or the route",
    },
    Rule {
        codes: &[Code::TopicAuthorizationFailed],
        meaning: "the topic is not ours to write",
        verdict: Verdict::Topic,
        next_step: "allow Write and Describe on the topic",
    },
    Rule {
        codes: &[
            Code::ClusterAuthorizationFailed,
            Code::TransactionalIdAuthorizationFailed,
        ],
        meaning: "no identity for a producer",
        verdict: Verdict::Rights,
        next_step: "allow Write on the topics, and IdempotentWrite on the cluster before Kafka 2.8",
    },
    Rule {
        codes: &[Code::UnsupportedCompressionType],
        meaning: "the brokers do not take our compression",
        verdict: Verdict::Broker,
        next_step: "set another with -X compression.codec, or none",
    },
    Rule {
        codes: &[
            Code::UnsupportedVersion,
            Code::UnsupportedFeature,
            Code::InvalidRequiredAcks,
        ],
        meaning: "the brokers lack what a producer needs",
        verdict: Verdict::Broker,
        next_step: "upgrade them to Kafka 0.11 or later, or take another service",
    },
    Rule {
        codes: &[Code::SaslAuthenticationFailed, Code::Authentication],
        meaning: "a broker ended the handshake; stops with exit code 6 if it said that our identity is wrong",
        verdict: Verdict::Retry,
        next_step: "correct sasl.username and sasl.password",
    },
    Rule {
        codes: &[Code::SSL],
        meaning: "no TLS with the broker",
        verdict: Verdict::Retry,
        next_step: "compare security.protocol and ssl.ca.location with the broker's listener",
    },
    Rule {
        codes: &[
            Code::NotEnoughReplicas,
            Code::NotEnoughReplicasAfterAppend,
            Code::ISRInsufficient,
        ],
        meaning: "fewer replicas are in sync than the topic's min.insync.replicas",
        verdict: Verdict::Retry,
        next_step: "bring the brokers of its replicas back",
    },
    Rule {
        codes: &[Code::KafkaStorageError],
        meaning: "a broker's disk failed or is full",
        verdict: Verdict::Retry,
        next_step: "look at that broker's disk",
    },
    Rule {
        codes: &[
            Code::BrokerTransportFailure,
            Code::AllBrokersDown,
            Code::Resolve,
            Code::OperationTimedOut,
            Code::MessageTimedOut,
            Code::TimedOutQueue,
            Code::RequestTimedOut,
            Code::NetworkException,
            Code::BrokerNotAvailable,
            Code::BrokerDestroy,
            Code::DestroyBroker,
            Code::UnknownBroker,
        ],
        meaning: "no broker answers",
        verdict: Verdict::Retry,
        next_step: "",
    },
    Rule {
        codes: &[
            Code::LeaderNotAvailable,
            Code::NotLeaderForPartition,
            Code::ReplicaNotAvailable,
            Code::FencedLeaderEpoch,
            Code::UnknownLeaderEpoch,
            Code::UnknownTopicId,
        ],
        meaning: "the partition has no leader, or another",
        verdict: Verdict::Retry,
        next_step: "",
    },
    Rule {
        codes: &[
            Code::CoordinatorLoadInProgress,
            Code::CoordinatorNotAvailable,
            Code::NotCoordinator,
            Code::NotController,
            Code::StaleControllerEpoch,
            Code::StaleBrokerEpoch,
            Code::RebootstrapRequired,
        ],
        meaning: "the brokers are settling who does what",
        verdict: Verdict::Retry,
        next_step: "",
    },
    Rule {
        codes: &[Code::InvalidReplicationFactor],
        meaning: "the topic cannot be created on demand: there are fewer brokers than replicas",
        verdict: Verdict::Retry,
        next_step: "bring the brokers back, or lower their default.replication.factor",
    },
    Rule {
        codes: &[Code::ThrottlingQuotaExceeded],
        meaning: "a quota is used up",
        verdict: Verdict::Retry,
        next_step: "raise the quota if it stays so",
    },
    Rule {
        codes: &[Code::Unknown, Code::InvalidRequest, Code::BadMessage],
        meaning: "a broker failed at a request, or its answer cannot be read",
        verdict: Verdict::Retry,
        next_step: "look at that broker's log",
    },
    Rule {
        codes: &[Code::QueueFull, Code::CriticalSystemResource],
        meaning: "librdkafka lacks memory or threads",
        verdict: Verdict::Retry,
        next_step: "lower --in-flight-bytes-max, or raise the process's limits",
    },
    Rule {
        codes: &[Code::InvalidDifferentRecord],
        meaning: "another record of its batch was refused",
        verdict: Verdict::Retry,
        next_step: "",
    },
    Rule {
        codes: &[
            Code::PurgeQueue,
            Code::PurgeInflight,
            Code::Fatal,
            Code::GaplessGuarantee,
            Code::Inconsistent,
            Code::State,
            Code::OutOfOrderSequenceNumber,
            Code::DuplicateSequenceNumber,
            Code::UnknownProducerId,
            Code::InvalidProducerEpoch,
            Code::InvalidProducerIdMapping,
            Code::ProducerFenced,
            Code::Fenced,
        ],
        meaning: "a delivery before it failed, or the brokers forgot the producer: a new one begins where the slot was \
                  confirmed",
        verdict: Verdict::Retry,
        next_step: "",
    },
    Rule {
        codes: &[],
        meaning: "anything else",
        verdict: Verdict::Retry,
        next_step: "",
    },
];

/// The rule for a code.
pub(super) fn find(code: Code) -> &'static Rule {
    let fits = |rule: &&Rule| rule.codes.is_empty() || rule.codes.contains(&code);
    RULES.iter().find(fits).expect("the last rule takes any")
}

/// Sorts a code by what it is about.
pub fn verdict(code: Code) -> Verdict {
    find(code).verdict
}

/// Whether a code is about a size.
pub(crate) fn is_too_large(code: Code) -> bool {
    RULES[0].codes.contains(&code)
}

/// A code with what to do about it.
pub(crate) fn explain(code: Code) -> String {
    match find(code).next_step {
        "" => code.to_string(),
        next_step => format!("{code}; {next_step}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_has_one_rule() {
        for rule in RULES {
            for &code in rule.codes {
                assert!(std::ptr::eq(find(code), rule), "{code:?}");
            }
        }
    }

    #[test]
    fn whoever_stops_says_what_to_do() {
        for rule in RULES {
            let waits = rule.verdict.kind().is_transient();
            assert!(waits || !rule.next_step.is_empty(), "{rule:?}");
        }
    }
}
