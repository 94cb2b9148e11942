//! What librdkafka has to say: delivery reports and errors, in its queue of events.
//!
//! The wrapper's way is a thread that waits for them. Ours are taken by the relay's
//! thread, which handed the records over, and it is woken when the queue is no longer
//! empty. Where memory is freed by the thread that asked for it, neither waits for the
//! other; and two cores have one thread less to share.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::bindings;
use rdkafka::producer::Producer as _;
use tokio::sync::Notify;

use super::producer::Client;

/// The events of one client.
pub(super) struct Events {
    client: Arc<Client>,
    queue: *mut bindings::rd_kafka_queue_t,
    /// Told by librdkafka through a pointer that [`Drop`] takes back.
    arrived: Arc<Notify>,
}

// SAFETY: librdkafka's functions may be called from any thread.
#[allow(unsafe_code)]
unsafe impl Send for Events {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Events {}

impl Events {
    #[allow(unsafe_code)]
    pub(super) fn of(client: Arc<Client>) -> Self {
        let arrived = Arc::new(Notify::new());
        let opaque = Arc::as_ptr(&arrived).cast_mut().cast();
        // SAFETY: the client outlives this, and so the queue. The pointer given to the
        // callback is valid until `drop`, after which it is not called.
        let queue = unsafe {
            let queue = bindings::rd_kafka_queue_get_main(client.client().native_ptr());
            bindings::rd_kafka_queue_cb_event_enable(queue, Some(notify), opaque);
            queue
        };
        // What came before.
        arrived.notify_one();
        Self {
            client,
            queue,
            arrived,
        }
    }

    pub(super) fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// Waits until [`handle`](Self::handle) has something to do. Cancel-safe.
    pub(super) async fn arrived(&self) {
        self.arrived.notified().await;
    }

    /// Calls back for each event that has arrived.
    pub(super) fn handle(&self) {
        // Until none is left: only the first in an empty queue is told of.
        while self.waiting() > 0 {
            self.client.poll(Duration::ZERO);
        }
    }

    #[allow(unsafe_code)]
    fn waiting(&self) -> usize {
        // SAFETY: the queue is ours until `drop`.
        unsafe { bindings::rd_kafka_queue_length(self.queue) }
    }
}

impl Drop for Events {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the queue is ours until here. The callback runs under the queue's lock,
        // which is taken to disable it: it neither runs nor will run after the first call.
        unsafe {
            bindings::rd_kafka_queue_cb_event_enable(self.queue, None, std::ptr::null_mut());
            bindings::rd_kafka_queue_destroy(self.queue);
        }
    }
}

/// Called by librdkafka's threads.
#[allow(unsafe_code)]
extern "C" fn notify(_client: *mut bindings::rd_kafka_t, arrived: *mut c_void) {
    // SAFETY: given by `of`, and valid until `drop`.
    let arrived = unsafe { &*arrived.cast::<Notify>() };
    arrived.notify_one();
}

#[cfg(test)]
mod tests {
    use rdkafka::ClientConfig;
    use rdkafka::mocking::MockCluster;
    use rdkafka::producer::BaseRecord;

    use super::super::reports::Context;
    use super::*;

    #[tokio::test]
    async fn all_that_has_arrived_is_handled_at_once() {
        let cluster = MockCluster::new(1).expect("a cluster");
        let client: Client = ClientConfig::new()
            .set("bootstrap.servers", cluster.bootstrap_servers())
            .create_with_context(Context::default())
            .expect("a client");
        let events = Events::of(Arc::new(client));
        for partition in 0..3 {
            let record = BaseRecord::with_opaque_to("topic", 0)
                .partition(partition)
                .key("")
                .payload("");
            let sent = events.client().send(record);
            sent.map_err(|(error, _)| error).expect("room");
        }
        // A report for each partition, of which only the first is told.
        let delivery = async {
            while events.waiting() < 3 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let patience = Duration::from_secs(30);
        tokio::time::timeout(patience, delivery)
            .await
            .expect("deliveries");
        events.arrived().await;
        events.handle();
        let mut reports = Vec::new();
        let taken = events.client().context().take(&mut reports);
        taken.expect("no refusal");
        assert_eq!(reports.len(), 3);
        assert_eq!(events.waiting(), 0);
    }
}
