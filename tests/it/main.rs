//! All tests that need real servers, in one program.
//!
//! Each test has its own database, slot and topic on servers that all share, or
//! its own servers if it harms them. The servers are throw-away ones, unless
//! DATABASE_URL and KAFKA_BROKERS name others.

// A test fails by panicking.
#![allow(clippy::unwrap_used)]

mod support;

mod campaign;
mod claim;
mod cleanup;
mod cli;
mod compose;
mod corpus;
mod debezium;
mod emit;
mod errors;
mod examples;
mod faults;
mod http;
mod inbox;
mod limits;
mod parked;
mod parking;
mod partitions;
mod poison;
mod poll;
mod produce_errors;
mod promotion;
mod publisher;
mod records;
mod recover;
mod safety;
mod security;
mod setup;
mod stream;
mod tables;
mod takeover;
