//! What a broker may answer to a request of many, and what then holds: the order
//! of a key, and that nothing is confirmed past an event that was not taken.
//!
//! The brokers are librdkafka's own mock, which answers as it is told. It takes any
//! sequence number, so it is also told to refuse what was pipelined behind a
//! request that failed, as a broker does.

use std::time::Duration;

use rdkafka::mocking::MockCluster;
use rdkafka::producer::DefaultProducerContext;
use rdkafka::types::RDKafkaApiKey::Produce;
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::types::RDKafkaRespErr::{self, *};

use crate::poison::STOP;
use crate::support::{Fixture, Relay, wait_until};

/// A window is this many requests, as many as may be on their way to a broker.
const REQUESTS: usize = 5;

/// The events of a request. Each request is a transaction.
const EVENTS: usize = 5;

/// How long a request of the window takes: all are on their way before the first is
/// answered.
const ROUND_TRIP: Duration = Duration::from_millis(200);

/// More answers than requests can be made until the brokers are mended.
const MANY: usize = 100_000;

/// What is mended by asking again: the relay carries on by itself.
const PASSING: &[RDKafkaRespErr] = &[
    RD_KAFKA_RESP_ERR__TRANSPORT,
    RD_KAFKA_RESP_ERR_UNKNOWN,
    RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART,
    RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
    RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
    RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
    RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS_AFTER_APPEND,
    RD_KAFKA_RESP_ERR_KAFKA_STORAGE_ERROR,
    RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER,
    RD_KAFKA_RESP_ERR_UNKNOWN_PRODUCER_ID,
    RD_KAFKA_RESP_ERR_INVALID_PRODUCER_EPOCH,
];

/// What is about the event or its topic: while it lasts, the relay stops with exit
/// code 8 and names an event.
const DEFINITE: &[RDKafkaRespErr] = &[
    RD_KAFKA_RESP_ERR_MSG_SIZE_TOO_LARGE,
    RD_KAFKA_RESP_ERR_RECORD_LIST_TOO_LARGE,
    RD_KAFKA_RESP_ERR_INVALID_RECORD,
    RD_KAFKA_RESP_ERR_POLICY_VIOLATION,
    RD_KAFKA_RESP_ERR_TOPIC_EXCEPTION,
    RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED,
];

/// Which request fails.
#[derive(Debug, Clone, Copy)]
enum Place {
    /// The first of its producer in its partition, which is sent alone.
    Opening,
    /// This one of those that are pipelined.
    Pipelined(usize),
}

/// For how long.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Lasts {
    /// That one request.
    Once,
    /// All requests from there on, until the brokers are mended.
    UntilMended,
}

const PLACES: [Place; 4] = [
    Place::Opening,
    Place::Pipelined(0),
    Place::Pipelined(REQUESTS / 2),
    Place::Pipelined(REQUESTS - 1),
];

#[test]
fn whatever_a_broker_answers_nothing_is_lost_reordered_or_confirmed_too_early() {
    let passing = PASSING.iter().map(|error| (*error, false));
    let definite = DEFINITE.iter().map(|error| (*error, true));
    // All at once: most of their time is waiting. A mock stays on its thread.
    std::thread::scope(|scope| {
        for (error, definite) in passing.chain(definite) {
            scope.spawn(move || {
                let mut runtime = tokio::runtime::Builder::new_current_thread();
                let runtime = runtime.enable_all().build().unwrap();
                runtime.block_on(provoke(error, definite));
            });
        }
    });
}

async fn provoke(error: RDKafkaRespErr, definite: bool) {
    let brokers = MockCluster::new(1).unwrap();
    let fixture = Fixture::with_brokers(&brokers.bootstrap_servers()).await;
    brokers.create_topic(&fixture.topic, 1, 1).unwrap();
    let mut relay = None;
    let mut rounds = 0;
    for place in PLACES {
        for lasts in [Lasts::Once, Lasts::UntilMended] {
            let round = Round {
                brokers: &brokers,
                fixture: &fixture,
                error,
                definite,
                place,
                lasts,
            };
            relay = Some(round.play(relay).await);
            rounds += 1;
        }
    }
    fixture.enter_in_ledger().await;
    let verdict = fixture.judge(relay.expect("it goes on")).await;
    let window = REQUESTS * EVENTS;
    assert!(verdict.is_clean(rounds * window), "{error:?}: {verdict}");
}

/// One window, one of whose requests fails.
struct Round<'a> {
    brokers: &'a MockCluster<'static, DefaultProducerContext>,
    fixture: &'a Fixture,
    error: RDKafkaRespErr,
    definite: bool,
    place: Place,
    lasts: Lasts,
}

impl Round<'_> {
    /// Plays it with the relay of the round before, until all is confirmed.
    async fn play(&self, relay: Option<Relay>) -> Relay {
        let relay = match (self.place, relay) {
            (Place::Opening, Some(relay)) => {
                relay.drain().await;
                None
            }
            (Place::Opening, None) => None,
            (Place::Pipelined(_), relay) => Some(self.open_partition(relay).await),
        };
        let opened = relay.as_ref();
        let before = opened.map_or(0, |relay| relay.published(&self.fixture.topic));
        let met = opened.map_or(0, |relay| self.met(relay));
        self.brokers.request_errors(Produce, &self.answers());
        if relay.is_some() {
            self.round_trip(ROUND_TRIP);
        }
        self.write_window().await;
        let mut relay = relay.unwrap_or_else(|| self.start());
        if self.lasts == Lasts::UntilMended {
            self.end_in_harm(relay, before, met).await;
            self.brokers.clear_request_errors(Produce);
            relay = self.start();
        }
        self.fixture.wait_for_confirmation().await;
        if self.lasts == Lasts::Once {
            self.assert_met(&relay, met);
        }
        self.brokers.clear_request_errors(Produce);
        self.round_trip(Duration::ZERO);
        relay
    }

    /// The brokers take neither the failing request nor any after it, and the relay
    /// ends, by itself or killed: what it confirmed of them would be lost.
    async fn end_in_harm(&self, mut relay: Relay, before: usize, met: usize) {
        if self.definite {
            let case = (self.error, self.place);
            assert_eq!(relay.exit_code().await, 8, "{case:?}: {}", relay.log());
            assert!(
                relay.log().contains("event with seq "),
                "{case:?}: {}",
                relay.log()
            );
            self.assert_met(&relay, met);
            return;
        }
        relay.wait_for_log("streaming").await;
        let taken = before + self.failing() * EVENTS;
        wait_until("what stands before it is delivered", async || {
            relay.published(&self.fixture.topic) >= taken
        })
        .await;
        wait_until("the error is met", async || self.met(&relay) > met).await;
        tokio::time::sleep(2 * ROUND_TRIP).await;
        relay.kill();
    }

    /// How often the producer of this relay was answered with the error, as librdkafka
    /// says itself.
    fn met(&self, relay: &Relay) -> usize {
        // As in `InvalidTopic (Broker: Invalid topic)`.
        let answer = RDKafkaErrorCode::from(self.error).to_string();
        let (_, words) = answer.split_once(" (").unwrap();
        let words = words.strip_suffix(')').unwrap();
        let answer = format!("encountered error: {words} (actions ");
        relay.log().matches(&answer).count()
    }

    fn assert_met(&self, relay: &Relay, before: usize) {
        let case = (self.error, self.place, self.lasts);
        assert!(
            self.met(relay) > before,
            "{case:?} is not met: {}",
            relay.log()
        );
    }

    fn round_trip(&self, time: Duration) {
        self.brokers.broker_round_trip_time(1, time).unwrap();
    }

    fn start(&self) -> Relay {
        let batch = format!("batch.num.messages={EVENTS}");
        // A request is sent when it is full, and only then.
        let properties = [
            "-X",
            &batch,
            "-X",
            "linger.ms=50",
            "-X",
            "debug=msg",
            STOP[0],
            STOP[1],
        ];
        let mut command = Relay::command(self.fixture, &properties);
        Relay::spawn(command.env("RUST_LOG", "info,librdkafka=debug"))
    }

    /// What pipelined requests need: a partition that knows its producer.
    async fn open_partition(&self, relay: Option<Relay>) -> Relay {
        let relay = relay.unwrap_or_else(|| self.start());
        self.fixture.insert("opening", "{}").await;
        self.fixture.wait_for_confirmation().await;
        relay
    }

    fn failing(&self) -> usize {
        match self.place {
            Place::Opening => 0,
            Place::Pipelined(request) => request,
        }
    }

    /// What the brokers answer from now on.
    fn answers(&self) -> Vec<RDKafkaRespErr> {
        let mut answers = vec![RD_KAFKA_RESP_ERR_NO_ERROR; self.failing()];
        answers.push(self.error);
        match (self.lasts, self.place) {
            (Lasts::UntilMended, _) => answers.resize(MANY, self.error),
            (Lasts::Once, Place::Opening) => {}
            // What was sent on a connection that was cut is not answered.
            (Lasts::Once, _) if self.error == RD_KAFKA_RESP_ERR__TRANSPORT => {}
            (Lasts::Once, Place::Pipelined(_)) => {
                answers.resize(REQUESTS, RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER);
            }
        }
        answers
    }

    async fn write_window(&self) {
        let insert = format!(
            "BEGIN; INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) \
             SELECT '{}', 'k' || n % 3, 'changed', '{{}}' FROM generate_series(1, {EVENTS}) AS n; COMMIT;",
            self.fixture.topic
        );
        // They are flushed, and so sent, together.
        let together = "SET synchronous_commit = off;".to_owned();
        let window = together + &insert.repeat(REQUESTS);
        self.fixture.client.batch_execute(&window).await.unwrap();
    }
}
