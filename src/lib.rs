//! A Postgres outbox for Kafka: in order, and none lost.
//!
//! An application writes an event into an outbox table in the transaction of its
//! business data, with [`outbox::append`] or `postbox.emit(…)` in SQL. A
//! [`relay`] carries what was committed to Kafka. Most people run it as the
//! program `postbox`; this crate is what the program is made of.
//!
//! ```text
//!  application ── INSERT ──▶ outbox table
//!                                │ WAL, replication slot; or the table, polled
//!                                ▼
//!        database ──▶ source ──▶ event ──▶ envelope ──▶ publisher ──▶ Kafka
//!                        │    (pgoutput)        │          │ delivery reports
//!                        └── position ──▶ ack ◀─┼──────────┘
//!                                          │    └──▶ parked ──▶ again, in time
//!                                          └──▶ confirm(position)
//! ```
//!
//! # Promises
//!
//! 1. A committed event reaches Kafka at least once. Events of one key arrive in
//!    commit order. A rolled-back event never appears.
//! 2. Nothing is confirmed to Postgres before every in-sync replica of its
//!    partition has it, or it is [`parked`] in Postgres: as what cannot go out as it
//!    is, and what is to go out later.
//! 3. What a crash repeats is bounded by what was in flight, and by what was
//!    delivered since the last confirmation; each record carries its event's id,
//!    so that a consumer can drop repetitions.
//! 4. An idle slot moves on, and a stalled one shows within seconds in metrics
//!    and readiness.
//! 5. An [`inbox`] has the effects of a handler that works in its transaction happen once per
//!    consumer group, topic and message id, whatever crashes or is delivered again.
//!
//! # Invariants of the architecture
//!
//! - [`pgoutput`], [`envelope`] and [`ack`] are pure: no I/O, no logs, no clocks.
//! - [`ack`] knows neither Kafka nor Postgres; [`source`] never sees a record,
//!   [`publisher`] never sees an LSN. Only [`relay`] knows both. [`inbox`] knows none of them.
//! - Progress moves in one line: where [`relay`] confirms what [`ack`] releases.
//! - Everything that breaks ends the relay's attempt, and the next begins where
//!   the slot was confirmed, or the checkpoint where the table is polled. There is
//!   no other recovery.
//! - All data comes from the stream, or, where a slot was lost or is not to be had,
//!   from the set of rows that two snapshots fix. A row is never read again by its
//!   id: it may not be visible yet.
//! - A row is removed from the outbox only once the snapshots of all checkpoints see it:
//!   [`cleanup`].
//! - No payload is ever logged, no password ever printed.
//!
//! # Features
//!
//! `default-features = false` leaves [`outbox`] alone, on tokio-postgres, without
//! librdkafka. `relay` adds the relay, `cli` the program, `demo` the demo
//! and the [`oracle`]. `failpoints` is for this crate's own tests.
#![cfg_attr(not(feature = "demo"), allow(rustdoc::broken_intra_doc_links))]

// First, for its macro.
#[macro_use]
pub mod failpoints;

#[cfg(feature = "relay")]
pub mod ack;
#[cfg(feature = "relay")]
pub mod backlog;
#[cfg(feature = "relay")]
mod backoff;
#[cfg(feature = "relay")]
pub mod catalog;
#[cfg(feature = "relay")]
pub mod cleanup;
#[cfg(feature = "relay")]
pub mod contract;
#[cfg(feature = "relay")]
pub mod database;
#[cfg(feature = "demo")]
pub mod demo;
#[cfg(feature = "relay")]
pub mod duration;
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
pub mod inbox;
#[cfg(feature = "relay")]
mod lock;
#[cfg(feature = "relay")]
pub mod metrics;
#[cfg(feature = "demo")]
pub mod oracle;
pub mod outbox;
#[cfg(feature = "relay")]
pub mod parked;
#[cfg(feature = "relay")]
pub mod partitions;
#[cfg(feature = "relay")]
pub mod pgoutput;
#[cfg(all(feature = "relay", any(test, fuzzing)))]
pub mod properties;
#[cfg(feature = "relay")]
pub mod publisher;
#[cfg(feature = "relay")]
pub mod relay;
#[cfg(feature = "relay")]
mod selection;
#[cfg(feature = "demo")]
pub mod servers;
#[cfg(feature = "relay")]
pub mod setup;
#[cfg(feature = "relay")]
pub mod source;
#[cfg(feature = "relay")]
pub mod table;
#[cfg(feature = "relay")]
pub mod timestamp;

pub use error::{Error, ErrorKind, Result};
