//! Times that are promised, tried often enough to be believed.

use std::time::Duration;

/// Tries it `TRIALS` times, prints the median and the longest, and fails if one
/// was longer than is promised.
pub(crate) async fn trials(
    what: &str,
    promised: Duration,
    mut trial: impl AsyncFnMut() -> Duration,
) {
    let count = std::env::var("TRIALS").map_or(20, |text| text.parse().unwrap());
    let mut times = Vec::new();
    for _ in 0..count {
        times.push(trial().await);
    }
    times.sort_unstable();
    let (median, longest) = (times[count / 2], times[count - 1]);
    println!(
        "{what}: median {median:.1?}, longest {longest:.1?} of {count} (promised: {promised:?})"
    );
    assert!(longest <= promised, "{what}: {times:?}");
}
