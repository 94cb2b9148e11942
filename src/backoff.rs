//! How long to wait before what failed is tried again.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};

/// The longest pause between attempts.
pub(crate) const BACKOFF_MAX: Duration = Duration::from_secs(10);

/// How long to wait after so many attempts: twice as long for each further one, within limits.
pub(crate) fn doubled(min: Duration, max: Duration, attempts: u32) -> Duration {
    let doublings = attempts.saturating_sub(1).min(31);
    min.saturating_mul(1 << doublings).min(max)
}

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
