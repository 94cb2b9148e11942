//! How the records of any producer are read, for an inbox: what they are called, and what can be
//! stored of them.

mod json;
pub mod message;
