//! A Postgres outbox for Kafka.

pub mod ack;
#[cfg(feature = "relay")]
pub mod database;
pub mod envelope;
pub mod error;
pub mod event;
pub mod pgoutput;
pub mod timestamp;

pub use error::{Error, ErrorKind, Result};
