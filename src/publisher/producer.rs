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
    client: Arc<Client>,
    events: Events,
    pusher: Pusher,
    /// The user says for how long records linger.
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
            client,
        })
    }

    pub(super) fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Waits until [`take_reports`](Self::take_reports) has something to give.
    pub(super) async fn reported(&self) {
        self.events.arrived().await;
    }

    pub(super) fn take_reports(&self, into: &mut Vec<Report>) -> Result<()> {
        self.events.handle();
        self.client.context().take(into)
    }

    pub(super) fn push(&self) {
        if self.may_push {
            self.pusher.push();
        }
    }

    pub(super) fn purge(&self) {
        let all = PurgeConfig::default().queue().inflight().non_blocking();
        self.client.purge(all);
    }
}

impl Drop for Producer {
    fn drop(&mut self) {
        self.purge();
    }
}
