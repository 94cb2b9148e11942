//! A Postgres outbox for Kafka.

#[cfg(feature = "relay")]
pub mod catalog;
#[cfg(feature = "relay")]
pub mod contract;
#[cfg(feature = "relay")]
pub mod database;
pub mod error;
pub mod outbox;
#[cfg(feature = "relay")]
pub mod setup;

pub use error::{Error, ErrorKind, Result};
