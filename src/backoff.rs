//! How long to wait before what failed is tried again.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};

/// The longest pause between attempts.
pub(crate) const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// Pauses from 0.1 s to [`BACKOFF_MAX`], each up to twice as long at random, so
/// that many processes do not come back at once; for ever.
pub(crate) fn backoff() -> impl Iterator<Item = Duration> {
    ExponentialBuilder::default()
        .with_min_delay(Duration::from_millis(100))
        .with_max_delay(BACKOFF_MAX)
        .with_jitter()
        .without_max_times()
        .build()
}
