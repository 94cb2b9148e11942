//! What is handled in order: messages of a lane wait for each other, and for no others.

use sha2::{Digest, Sha256};

use super::message::Message;

/// What keeps its order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// The messages of a key, in their partition. Those without a key have none.
    #[default]
    Key,
    /// All of a partition.
    Partition,
    /// Nothing.
    None,
}

/// The number of a lane, in its topic and partition: stored with what waits, so it is the same for
/// ever.
pub(super) fn number(order: Order, message: &Message) -> i64 {
    match (order, &message.key) {
        (Order::Partition, _) => 0,
        (Order::Key, Some(key)) => {
            let hash = Sha256::digest(key.as_bytes());
            i64::from_be_bytes(hash[..8].try_into().expect("32 bytes"))
        }
        // Each is its own.
        _ => message.offset,
    }
}
