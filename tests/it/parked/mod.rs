//! Events that wait, on real servers.

mod cancel;
mod decisions;
mod look;
mod queue;
mod relay;
