//! Events that wait: for their time, for another try, or for a person. The relay alone
//! sends them; people look at them and decide about them here.

pub mod decisions;
pub mod event;
mod filter;
pub mod row;

pub use filter::{Filter, Status};
