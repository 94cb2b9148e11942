//! What the publisher alone promises, whatever the relay does with its reports.

use std::time::{Duration, Instant};

use postbox::ErrorKind;
use postbox::envelope::{Header, Record};
use postbox::publisher::{BATCH_BYTES, KafkaSettings, Patience, Publisher, Report, SendError};
use rdkafka::mocking::MockCluster;
use rdkafka::types::{RDKafkaApiKey, RDKafkaRespErr};
use uuid::Uuid;

use crate::support::{Fixture, PATIENCE, Relay};

fn send(publisher: &Publisher, topic: &str, sequence: u64, value: &[u8]) -> Result<(), SendError> {
    let id = Uuid::new_v4().to_string();
    let record = Record {
        topic,
        key: Some("a"),
        value: Some(value),
        headers: vec![Header {
            name: "id".into(),
            value: Some(id.into()),
        }],
        timestamp_millis: Some(1),
    };
    let destination = publisher.destination(&record).unwrap();
    publisher.send(&record, destination.partition, sequence)
}

/// A producer that knows this topic, however slow the machine.
async fn knowing(settings: KafkaSettings, topic: &str) -> Publisher {
    let mut publisher = Publisher::new(settings, BATCH_BYTES).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let topic = loop {
        match publisher.resolve(topic, Patience::MAX).await {
            Ok(topic) => break topic,
            Err(error) if error.kind() != ErrorKind::BrokerAway => panic!("{}", error.chain()),
            Err(error) => assert!(Instant::now() < deadline, "{}", error.chain()),
        }
    };
    publisher.admit(&topic);
    publisher
}

/// What became of the record that was sent with this number.
async fn report_of(publisher: &Publisher, sequence: u64) -> Report {
    let mut reports = Vec::new();
    loop {
        publisher.reported().await;
        publisher.take_reports(&mut reports).unwrap();
        let mut found = reports.iter();
        if let Some(report) = found.find(|report| report.sequence == sequence) {
            return *report;
        }
    }
}

/// Without the gapless guarantee, librdkafka numbers anew what was pipelined behind
/// a refused batch, and sends it: a relay that is busy when the report comes would
/// purge too late.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_record_ends_its_producer_before_anyone_looks() {
    let fixture = Fixture::empty().await;
    let settings = KafkaSettings {
        brokers: fixture.brokers.clone(),
        properties: vec![("compression.codec".to_owned(), "none".to_owned())],
    };
    let topic = &fixture.topic;
    let publisher = knowing(settings, topic).await;
    // A producer's first record in a partition goes alone.
    send(&publisher, topic, 0, b"{}").unwrap();
    assert_eq!(report_of(&publisher, 0).await.error, None);

    let too_large = vec![b'0'; 3_000_000];
    send(&publisher, topic, 1, &too_large).unwrap();
    for sequence in 2..2000 {
        // It may have ended already.
        if send(&publisher, topic, sequence, b"{}").is_err() {
            break;
        }
    }
    let refused = report_of(&publisher, 1).await;
    assert!(refused.error.is_some(), "{refused:?}");
    tokio::time::sleep(Duration::from_secs(1)).await;
    let next = send(&publisher, topic, 2000, b"{}");
    assert!(matches!(next, Err(SendError::Producer(_))), "{next:?}");
    assert_eq!(fixture.records().await.len(), 1);
}

/// A role that may see a topic and not write to any: librdkafka asks in vain for a
/// producer's identity, once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_without_an_identity_is_refused_for_good() {
    let cluster = MockCluster::new(1).unwrap();
    cluster.create_topic("mock", 1, 1).unwrap();
    let denied = RDKafkaRespErr::RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED;
    cluster.request_errors(RDKafkaApiKey::InitProducerId, &[denied; 10]);
    let settings = KafkaSettings {
        brokers: cluster.bootstrap_servers(),
        properties: Vec::new(),
    };
    let publisher = knowing(settings, "mock").await;
    // Before or after librdkafka has its answer.
    let _ = send(&publisher, "mock", 0, b"{}");
    let refusal = loop {
        publisher.reported().await;
        if let Err(refusal) = publisher.take_reports(&mut Vec::new()) {
            break refusal;
        }
    };
    assert_eq!(refusal.kind(), ErrorKind::Rights, "{}", refusal.chain());
    let next = send(&publisher, "mock", 1, b"{}");
    assert!(matches!(next, Err(SendError::Producer(_))), "{next:?}");
}

/// What no broker takes from any producer of ours, of any record.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_brokers_lack_ends_the_relay_with_what_to_do() {
    for (answer, why) in [
        (
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNSUPPORTED_COMPRESSION_TYPE,
            "; set another with -X compression.codec, or none",
        ),
        (
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNSUPPORTED_VERSION,
            "; upgrade them to Kafka 0.11 or later",
        ),
        (
            RDKafkaRespErr::RD_KAFKA_RESP_ERR_INVALID_REQUIRED_ACKS,
            "; upgrade them to Kafka 0.11 or later",
        ),
    ] {
        let cluster = MockCluster::new(1).unwrap();
        let fixture = Fixture::with_brokers(&cluster.bootstrap_servers()).await;
        cluster.create_topic(&fixture.topic, 1, 1).unwrap();
        cluster.request_errors(RDKafkaApiKey::Produce, &[answer; 10]);
        let mut relay = Relay::start(&fixture, &[]);
        fixture.insert("a", "{}").await;
        assert_eq!(relay.exit_code().await, 7, "{answer:?}: {}", relay.log());
        assert!(relay.log().contains(why), "{answer:?}: {}", relay.log());
        cluster.clear_request_errors(RDKafkaApiKey::Produce);
        let relay = Relay::streaming(&fixture, &[]).await;
        fixture.wait_for_confirmation().await;
        assert_eq!(relay.published(&fixture.topic), 1, "{answer:?}");
        relay.drain().await;
    }
}
