//! A Postgres outbox for Kafka.

#[cfg(feature = "relay")]
pub mod database;
pub mod error;
pub mod outbox;

pub use error::{Error, ErrorKind, Result};
