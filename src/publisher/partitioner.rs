//! Which partition a key belongs to: where Java's producers put it.

/// The partition of a key in a topic that has `partitions` of them.
///
/// Source: `org.apache.kafka.clients.producer.internals.BuiltInPartitioner`,
/// `partitionForKey`.
pub(super) fn partition(key: &[u8], partitions: u32) -> i32 {
    let positive = murmur2(key) & 0x7fff_ffff;
    i32::try_from(positive % partitions).expect("fewer partitions than 2^31")
}

/// How many records without a key go to one partition before the next has its turn.
const UNKEYED_RUN: u32 = 256;

/// The partition of a record without a key, the `number`th: in turn, but so many at a time
/// that batches fill.
pub(super) fn partition_of_unkeyed(number: u32, partitions: u32) -> i32 {
    i32::try_from(number / UNKEYED_RUN % partitions).expect("fewer partitions than 2^31")
}

/// Source: `org.apache.kafka.common.utils.Utils`, `murmur2`: A. Appleby's
/// MurmurHash2 with a seed of Kafka's own.
fn murmur2(bytes: &[u8]) -> u32 {
    const SEED: u32 = 0x9747_b28c;
    const MULTIPLIER: u32 = 0x5bd1_e995;
    let length = u32::try_from(bytes.len()).expect("a key is shorter than 4 GiB");
    let mut hash = SEED ^ length;
    let mut words = bytes.chunks_exact(4);
    for word in words.by_ref() {
        let word = u32::from_le_bytes(word.try_into().expect("chunks of four"));
        let mut mixed = word.wrapping_mul(MULTIPLIER);
        mixed ^= mixed >> 24;
        hash = hash.wrapping_mul(MULTIPLIER) ^ mixed.wrapping_mul(MULTIPLIER);
    }
    let rest = words.remainder();
    if !rest.is_empty() {
        for (index, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * index);
        }
        hash = hash.wrapping_mul(MULTIPLIER);
    }
    hash ^= hash >> 13;
    hash = hash.wrapping_mul(MULTIPLIER);
    hash ^ (hash >> 15)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of Kafka's own `UtilsTest.testMurmur2`.
    #[test]
    fn hashes_as_java_does() {
        for (text, hash) in [
            ("21", -973_932_308),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            (
                "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8",
                -58_897_971,
            ),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(text.as_bytes()), hash as u32, "{text}");
        }
    }
}
