//! How many bytes a record takes alone in a batch that is not compressed.
//!
//! A broker compares a whole batch with its topic's `max.message.bytes`, as it comes: so
//! without compression it is known before a record is sent whether it can ever be taken.
//! <https://kafka.apache.org/documentation/#recordbatch>

use crate::envelope::Record;

/// What a batch has before its records.
const BATCH_OVERHEAD: usize = 61;

/// The bytes of a batch of this record alone.
pub(super) fn batch_bytes(record: &Record<'_>) -> usize {
    let key = record.key.map(str::len);
    let value = record.value.map(<[u8]>::len);
    let headers = record.headers.iter().map(|header| {
        let value = header.value.as_deref().map(|value| value.len());
        field(Some(header.name.len())) + field(value)
    });
    // Attributes, and the differences of time and offset to those of the batch: none.
    let fixed = 3;
    let body =
        fixed + field(key) + field(value) + varint(record.headers.len()) + headers.sum::<usize>();
    BATCH_OVERHEAD + varint(body) + body
}

/// A field and its length; that of one that is null is -1.
fn field(bytes: Option<usize>) -> usize {
    bytes.map_or(1, |bytes| varint(bytes) + bytes)
}

/// The bytes of a number that is not negative: seven bits each, and one bit says the sign.
fn varint(number: usize) -> usize {
    let bits = usize::BITS - (number << 1).leading_zeros();
    (bits.max(1) as usize).div_ceil(7)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_take_seven_bits_a_byte() {
        for (number, bytes) in [(0, 1), (63, 1), (64, 2), (8191, 2), (8192, 3)] {
            assert_eq!(varint(number), bytes, "{number}");
        }
    }
}
