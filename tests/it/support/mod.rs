//! What tests stand on: servers, a database of their own, and relays.

mod addresses;
mod command;
mod fixture;
mod proxy;
mod psql;
mod relay;
mod trials;
mod window;

use std::time::{Duration, Instant};

pub(crate) use addresses::shared_brokers;
pub(crate) use command::{Output, postbox, run, statement};
pub(crate) use fixture::{Fixture, connect};
pub(crate) use proxy::{Proxy, Weather};
pub(crate) use psql::run_script;
pub(crate) use relay::{Relay, signal};
pub(crate) use trials::trials;
pub(crate) use window::{
    LATE, SERVER_WINDOW, SLOT_WINDOW, SMALL_WINDOW, STATUS_INTERVAL, STORE_INTERVAL, WINDOW,
};

/// How long anything may take that is expected to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` is true, or fails saying `what` was waited for.
pub(crate) async fn wait_until<F: Future<Output = bool>>(
    what: &str,
    mut condition: impl FnMut() -> F,
) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
