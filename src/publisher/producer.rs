//! A producer of librdkafka, and a thread for what may take a while.

use std::sync::Arc;

use rdkafka::producer::{BaseProducer, Producer as _, PurgeConfig};

use super::events::Events;
use super::push::Pusher;
use super::reports::{Context, Report};
use super::settings::{self, KafkaSettings};
use crate::error::Result;

pub(super) type Client = BaseProducer<Context>;

/// Ends in the background when it is dropped, with what is in flight: what was sent may
/// still be delivered.
pub(super) struct Producer {
    events: Events,
    pusher: Pusher,
    /// Not if the user says for how long records linger.
    may_push: bool,
}

impl Producer {
    pub(super) fn start(settings: &KafkaSettings, batch_bytes: usize) -> Result<Self> {
        let client: Client = settings
            .producer(batch_bytes)?
            .create_with_context(Context::default())
            .map_err(settings::invalid)?;
        let client = Arc::new(client);
        Ok(Self {
            events: Events::of(Arc::clone(&client)),
            pusher: Pusher::start(Arc::clone(&client))?,
            may_push: !settings.sets_linger(),
        })
    }

    pub(super) fn client(&self) -> &Arc<Client> {
        self.events.client()
    }

    /// Waits until [`take_reports`](Self::take_reports) may have something to give.
    pub(super) async fn reported(&self) {
        self.events.arrived().await;
    }

    pub(super) fn take_reports(&self, into: &mut Vec<Report>) -> Result<()> {
        self.events.handle();
        self.client().context().take(into)
    }

    pub(super) fn push(&self) {
        if self.may_push {
            self.pusher.push();
        }
    }

    pub(super) fn purge(&self) {
        let all = PurgeConfig::default().queue().inflight().non_blocking();
        self.client().purge(all);
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        self.purge();
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rdkafka::mocking::MockCluster;
    use rdkafka::producer::BaseRecord;

    use super::*;

    #[tokio::test]
    async fn what_would_linger_leaves_when_it_is_pushed() {
        let cluster = MockCluster::new(1).expect("a cluster");
        let settings = KafkaSettings {
            brokers: cluster.bootstrap_servers(),
            properties: vec![("linger.ms".to_owned(), "600000".to_owned())],
        };
        let producer = Producer::start(&settings, 1_000_000).expect("a producer");
        for number in 0..3 {
            let record = BaseRecord::with_opaque_to("topic", number)
                .key("")
                .payload("");
            let sent = producer.client().send(record);
            sent.map_err(|(error, _)| error).expect("room");
            // A push does nothing while no broker leads the topic, as at the start.
            let mut delivered = Vec::new();
            let delivery = async {
                while delivered.is_empty() {
                    producer.pusher.push();
                    let pause = Duration::from_millis(20);
                    let _ = tokio::time::timeout(pause, producer.reported()).await;
                    producer.take_reports(&mut delivered).expect("no refusal");
                }
            };
            let patience = Duration::from_secs(30);
            tokio::time::timeout(patience, delivery)
                .await
                .expect("a delivery");
            assert!(delivered.iter().all(|report| report.error.is_none()));
        }
    }
}
