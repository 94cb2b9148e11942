//! A Postgres outbox for Kafka.

#[cfg(feature = "relay")]
pub mod ack;
#[cfg(feature = "relay")]
pub mod catalog;
#[cfg(feature = "relay")]
pub mod contract;
#[cfg(feature = "relay")]
pub mod database;
#[cfg(feature = "demo")]
pub mod demo;
#[cfg(feature = "relay")]
pub mod envelope;
pub mod error;
#[cfg(feature = "relay")]
pub mod event;
#[cfg(feature = "relay")]
pub mod health;
#[cfg(feature = "relay")]
pub mod http;
#[cfg(feature = "relay")]
pub mod metrics;
#[cfg(feature = "demo")]
pub mod oracle;
pub mod outbox;
#[cfg(feature = "relay")]
pub mod pgoutput;
#[cfg(feature = "relay")]
pub mod publisher;
#[cfg(feature = "relay")]
pub mod relay;
#[cfg(feature = "demo")]
pub mod servers;
#[cfg(feature = "relay")]
pub mod setup;
#[cfg(feature = "relay")]
pub mod source;
#[cfg(feature = "relay")]
pub mod timestamp;

pub use error::{Error, ErrorKind, Result};
