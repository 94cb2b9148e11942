//! A producer of librdkafka, and the thread that takes its reports.
//!
//! The wrapper has a producer with such a thread, which waits for a tenth of a second
//! at a time and spends the last millisecond of it in a loop: 0.9 % of a core for doing
//! nothing. Ours waits for longer.

use std::sync::{Arc, Weak};
use std::time::Duration;

use rdkafka::producer::{BaseProducer, Producer as _, PurgeConfig};

use super::push::Pusher;
use super::reports::{Context, Reports};
use super::settings::{self, KafkaSettings};
use crate::error::{Error, ErrorKind, Result};

pub(super) type Client = BaseProducer<Context>;

/// Ends when it is dropped, with what is in flight: what was sent may still be
/// delivered. Its threads end by themselves: within two seconds, or when a call for
/// metadata or a name look-up has ended.
pub(super) struct Producer {
    client: Arc<Client>,
    /// None if the user says for how long records linger.
    pusher: Option<Pusher>,
}

/// A report ends the wait; only the end of the client does not.
const POLL: Duration = Duration::from_secs(1);

impl Producer {
    pub(super) fn start(
        settings: &KafkaSettings,
        batch_bytes: usize,
        reports: &Arc<Reports>,
    ) -> Result<Self> {
        let context = Context::new(Arc::clone(reports));
        let client: Client = settings
            .producer(batch_bytes)?
            .create_with_context(context)
            .map_err(settings::invalid)?;
        let client = Arc::new(client);
        let polled = Arc::downgrade(&client);
        start_thread("poll", move || poll(&polled))?;
        let pusher = match settings.sets_linger() {
            true => None,
            false => Some(Pusher::start(Arc::clone(&client))?),
        };
        Ok(Self { client, pusher })
    }

    pub(super) fn client(&self) -> &Arc<Client> {
        &self.client
    }

    pub(super) fn push(&self) {
        if let Some(pusher) = &self.pusher {
            pusher.push();
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

fn poll(client: &Weak<Client>) {
    while let Some(client) = client.upgrade() {
        client.poll(POLL);
    }
}

/// A system that lacks threads may have some later: no reason to end the relay.
pub(super) fn start_thread(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let started = std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(work);
    started
        .map_err(|error| Error::new(ErrorKind::BrokerAway, "start a thread").caused_by(error))?;
    Ok(())
}
