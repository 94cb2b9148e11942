//! A topic that the brokers do not take.
