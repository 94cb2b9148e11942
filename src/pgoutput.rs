//! The `pgoutput` messages of protocol version 1, from bytes to borrowed values.
//!
//! Pure and without copies: an [`Insert`] points into the bytes it was decoded
//! from. Every message is checked to its last byte before it is returned, so
//! what follows may trust it; truncation, leftovers and unknown codes are
//! refused with the odd byte quoted.
//!
//! Source: PostgreSQL documentation, "Logical Replication Message Formats"
//! (<https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>).
//! Begin, Commit and Message never get here: the replication client parses those
//! itself, as they carry the stream's positions.

/// A decoded message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// The columns of a table, sent before its first row and after a change.
    Relation(Relation),
    /// A new row.
    Insert(Insert<'a>),
    /// A row was updated; the relation's id.
    Update(u32),
    /// A row was deleted; the relation's id.
    Delete(u32),
    /// Tables were emptied; the relations' ids.
    Truncate(Vec<u32>),
    /// A type that is not built in, or the origin of a transaction: nothing that
    /// an outbox needs.
    Ignored,
}

/// A table as it was when the row was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relation {
    /// The table's oid.
    pub id: u32,
    /// The table's schema, empty for `pg_catalog`.
    pub schema: String,
    /// The table's name.
    pub name: String,
    /// The published columns, in the order of a row's values.
    pub columns: Vec<Column>,
}

/// A column of a [`Relation`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// The column's name.
    pub name: String,
    /// The oid of the column's type.
    pub type_oid: u32,
}

/// A new row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Insert<'a> {
    /// The [`Relation`] it belongs to.
    pub relation_id: u32,
    /// Its values.
    pub row: Tuple<'a>,
}

/// The values of a row, already checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tuple<'a> {
    len: u16,
    bytes: &'a [u8],
}

/// One value of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value<'a> {
    /// SQL NULL.
    Null,
    /// A large value that an UPDATE did not touch. Never part of an INSERT of a
    /// server that works.
    Unchanged,
    /// The value as text, in the session's encoding.
    Text(&'a [u8]),
    /// The value in its binary form, sent only if it was asked for.
    Binary(&'a [u8]),
}

/// Why a message was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The message ended early.
    #[error("pgoutput message ends early: {needed} more bytes expected at byte {at}")]
    Truncated {
        /// Where the missing bytes should begin.
        at: usize,
        /// How many are missing at least.
        needed: usize,
    },
    /// There is more than the message's own fields.
    #[error("pgoutput message has {extra} bytes too many at byte {at}")]
    Leftover {
        /// Where the message should have ended.
        at: usize,
        /// How many bytes follow.
        extra: usize,
    },
    /// A code that version 1 of the protocol does not have in this place.
    #[error("unknown pgoutput {what} 0x{byte:02x} at byte {at}")]
    Unknown {
        /// What the code stands for.
        what: &'static str,
        /// The code.
        byte: u8,
        /// Where it stands.
        at: usize,
    },
    /// A negative count or length.
    #[error("pgoutput {what} is negative: {value}, at byte {at}")]
    Negative {
        /// What is counted.
        what: &'static str,
        /// The number.
        value: i32,
        /// Where it stands.
        at: usize,
    },
    /// A name that is not UTF-8.
    #[error("pgoutput name at byte {at} is not UTF-8")]
    Name {
        /// Where it begins.
        at: usize,
    },
}

/// The message Insert of these values, as a server writes it.
///
/// # Panics
/// If there are more than 65,535 values, or one has 4 GiB: no row has.
pub(crate) fn encode_insert<'a>(
    relation_id: u32,
    values: impl ExactSizeIterator<Item = Value<'a>>,
) -> Vec<u8> {
    let count = u16::try_from(values.len()).expect("counted by 16 bits");
    let mut bytes = [
        b"I",
        &relation_id.to_be_bytes()[..],
        b"N",
        &count.to_be_bytes(),
    ]
    .concat();
    for value in values {
        let (kind, sized) = match value {
            Value::Null => (b'n', None),
            Value::Unchanged => (b'u', None),
            Value::Text(value) => (b't', Some(value)),
            Value::Binary(value) => (b'b', Some(value)),
        };
        bytes.push(kind);
        if let Some(value) = sized {
            let len = u32::try_from(value.len()).expect("counted by 32 bits");
            bytes.extend(len.to_be_bytes());
            bytes.extend(value);
        }
    }
    bytes
}

/// Decodes one message.
///
/// # Errors
/// If `bytes` is not exactly one message of protocol version 1.
pub fn decode(bytes: &[u8]) -> Result<Message<'_>, DecodeError> {
    let mut reader = Reader { bytes, at: 0 };
    let message = match reader.u8()? {
        b'R' => Message::Relation(relation(&mut reader)?),
        b'I' => Message::Insert(insert(&mut reader)?),
        b'U' => Message::Update(update(&mut reader)?),
        b'D' => Message::Delete(delete(&mut reader)?),
        b'T' => Message::Truncate(truncate(&mut reader)?),
        b'Y' => {
            reader.u32()?;
            reader.name()?;
            reader.name()?;
            Message::Ignored
        }
        b'O' => {
            reader.take(8)?;
            reader.name()?;
            Message::Ignored
        }
        byte => {
            return Err(DecodeError::Unknown {
                what: "message",
                byte,
                at: 0,
            });
        }
    };
    reader.finish()?;
    Ok(message)
}

impl<'a> Tuple<'a> {
    /// The number of values.
    pub fn len(&self) -> usize {
        usize::from(self.len)
    }

    /// Whether the row has no values.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The values, in the order of the relation's columns.
    pub fn values(&self) -> impl ExactSizeIterator<Item = Value<'a>> + use<'a> {
        let mut reader = Reader {
            bytes: self.bytes,
            at: 0,
        };
        (0..self.len).map(move |_| {
            reader
                .value()
                .expect("a tuple is checked when it is decoded")
        })
    }
}

fn relation(reader: &mut Reader<'_>) -> Result<Relation, DecodeError> {
    let id = reader.u32()?;
    let schema = reader.name()?.to_owned();
    let name = reader.name()?.to_owned();
    reader.u8()?; // The replica identity, which matters to updates only.
    let columns = (0..reader.count()?)
        .map(|_| {
            reader.u8()?; // Whether the column is part of the key.
            let name = reader.name()?.to_owned();
            let type_oid = reader.u32()?;
            reader.u32()?; // The type's modifier.
            Ok(Column { name, type_oid })
        })
        .collect::<Result<_, _>>()?;
    Ok(Relation {
        id,
        schema,
        name,
        columns,
    })
}

fn insert<'a>(reader: &mut Reader<'a>) -> Result<Insert<'a>, DecodeError> {
    let relation_id = reader.u32()?;
    reader.expect(b'N', "tuple kind")?;
    let row = reader.tuple()?;
    Ok(Insert { relation_id, row })
}

fn update(reader: &mut Reader<'_>) -> Result<u32, DecodeError> {
    let relation_id = reader.u32()?;
    if matches!(reader.peek(), Some(b'K' | b'O')) {
        reader.u8()?;
        reader.tuple()?;
    }
    reader.expect(b'N', "tuple kind")?;
    reader.tuple()?;
    Ok(relation_id)
}

fn delete(reader: &mut Reader<'_>) -> Result<u32, DecodeError> {
    let relation_id = reader.u32()?;
    if reader.peek() == Some(b'O') {
        reader.u8()?;
    } else {
        reader.expect(b'K', "tuple kind")?;
    }
    reader.tuple()?;
    Ok(relation_id)
}

fn truncate(reader: &mut Reader<'_>) -> Result<Vec<u32>, DecodeError> {
    let at = reader.at;
    let count = reader.i32()?;
    if count < 0 {
        return Err(DecodeError::Negative {
            what: "number of tables",
            value: count,
            at,
        });
    }
    reader.u8()?; // CASCADE, RESTART IDENTITY.
    (0..count).map(|_| reader.u32()).collect()
}

/// Reads big-endian fields and knows where it is.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let rest = &self.bytes[self.at..];
        let Some(taken) = rest.get(..len) else {
            return Err(DecodeError::Truncated {
                at: self.bytes.len(),
                needed: len - rest.len(),
            });
        };
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let taken = self.take(N)?;
        Ok(taken.try_into().expect("take returns as many as asked"))
    }

    fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    fn i32(&mut self) -> Result<i32, DecodeError> {
        self.array().map(i32::from_be_bytes)
    }

    /// A number of columns: never negative.
    fn count(&mut self) -> Result<u16, DecodeError> {
        let at = self.at;
        let count = self.array().map(i16::from_be_bytes)?;
        u16::try_from(count).map_err(|_| DecodeError::Negative {
            what: "number of columns",
            value: count.into(),
            at,
        })
    }

    /// A name that ends with a zero byte.
    fn name(&mut self) -> Result<&'a str, DecodeError> {
        let at = self.at;
        let rest = &self.bytes[at..];
        let Some(len) = rest.iter().position(|&byte| byte == 0) else {
            return Err(DecodeError::Truncated {
                at: self.bytes.len(),
                needed: 1,
            });
        };
        let name = self.take(len)?;
        self.u8()?;
        std::str::from_utf8(name).map_err(|_| DecodeError::Name { at })
    }

    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn expect(&mut self, expected: u8, what: &'static str) -> Result<(), DecodeError> {
        let at = self.at;
        let byte = self.u8()?;
        if byte == expected {
            Ok(())
        } else {
            Err(DecodeError::Unknown { what, byte, at })
        }
    }

    fn tuple(&mut self) -> Result<Tuple<'a>, DecodeError> {
        let len = self.count()?;
        let start = self.at;
        for _ in 0..len {
            self.value()?;
        }
        Ok(Tuple {
            len,
            bytes: &self.bytes[start..self.at],
        })
    }

    fn value(&mut self) -> Result<Value<'a>, DecodeError> {
        let at = self.at;
        match self.u8()? {
            b'n' => Ok(Value::Null),
            b'u' => Ok(Value::Unchanged),
            b't' => self.sized().map(Value::Text),
            b'b' => self.sized().map(Value::Binary),
            byte => Err(DecodeError::Unknown {
                what: "value kind",
                byte,
                at,
            }),
        }
    }

    fn sized(&mut self) -> Result<&'a [u8], DecodeError> {
        let at = self.at;
        let len = self.i32()?;
        let len = usize::try_from(len).map_err(|_| DecodeError::Negative {
            what: "length",
            value: len,
            at,
        })?;
        self.take(len)
    }

    fn finish(&self) -> Result<(), DecodeError> {
        let extra = self.bytes.len() - self.at;
        if extra == 0 {
            Ok(())
        } else {
            Err(DecodeError::Leftover { at: self.at, extra })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Encodes a message as the server does.
    #[derive(Default, Clone)]
    struct Bytes(Vec<u8>);

    impl Bytes {
        fn tag(tag: u8) -> Self {
            Self(vec![tag])
        }
        fn u8(mut self, value: u8) -> Self {
            self.0.push(value);
            self
        }
        fn i16(mut self, value: i16) -> Self {
            self.0.extend(value.to_be_bytes());
            self
        }
        fn u32(mut self, value: u32) -> Self {
            self.0.extend(value.to_be_bytes());
            self
        }
        fn name(mut self, name: &str) -> Self {
            self.0.extend(name.as_bytes());
            self.u8(0)
        }
        fn tuple(mut self, values: &[Option<Vec<u8>>]) -> Self {
            self = self.i16(values.len() as i16);
            for value in values {
                self = match value {
                    None => self.u8(b'n'),
                    Some(text) => {
                        self = self.u8(b't').u32(text.len() as u32);
                        self.0.extend(text);
                        self
                    }
                };
            }
            self
        }
    }

    fn insert_message(values: &[Option<Vec<u8>>]) -> Vec<u8> {
        Bytes::tag(b'I').u32(7).u8(b'N').tuple(values).0
    }

    fn relation_message(columns: &[&str]) -> Vec<u8> {
        let head = Bytes::tag(b'R')
            .u32(7)
            .name("postbox")
            .name("outbox")
            .u8(b'd')
            .i16(columns.len() as i16);
        let encode = |bytes: Bytes, name: &&str| bytes.u8(0).name(name).u32(25).u32(u32::MAX);
        columns.iter().fold(head, encode).0
    }

    #[test]
    fn a_relation_names_its_columns() {
        let bytes = relation_message(&["id", "payload"]);
        let Message::Relation(relation) = decode(&bytes).unwrap() else {
            panic!("not a relation");
        };
        assert_eq!(
            (relation.schema.as_str(), relation.name.as_str()),
            ("postbox", "outbox")
        );
        assert_eq!(relation.columns[1].name, "payload");
        assert_eq!(relation.columns[1].type_oid, 25);
    }

    #[test]
    fn updates_deletes_and_truncates_name_their_tables() {
        let row = [Some(b"1".to_vec())];
        let update = Bytes::tag(b'U').u32(7).u8(b'O').tuple(&row).u8(b'N');
        assert_eq!(decode(&update.tuple(&row).0), Ok(Message::Update(7)));
        let delete = Bytes::tag(b'D').u32(7).u8(b'K').tuple(&row);
        assert_eq!(decode(&delete.0), Ok(Message::Delete(7)));
        let truncate = Bytes::tag(b'T').u32(2).u8(1).u32(7).u32(8);
        assert_eq!(decode(&truncate.0), Ok(Message::Truncate(vec![7, 8])));
    }

    #[test]
    fn types_and_origins_are_read_to_their_end() {
        let ty = Bytes::tag(b'Y').u32(1).name("public").name("mood");
        assert_eq!(decode(&ty.0), Ok(Message::Ignored));
        let origin = Bytes::tag(b'O').u32(0).u32(1).name("east");
        assert_eq!(decode(&origin.0), Ok(Message::Ignored));
    }

    #[test]
    fn a_row_that_is_encoded_is_the_message_that_a_server_sends() {
        let row = [Value::Text(b"a"), Value::Null, Value::Text(b"")];
        let bytes = encode_insert(0, row.into_iter());
        let Ok(Message::Insert(insert)) = decode(&bytes) else {
            panic!("not an insert");
        };
        assert_eq!(insert.relation_id, 0);
        let values: Vec<_> = insert.row.values().collect();
        assert_eq!(values, row);
    }

    #[test]
    fn streamed_transactions_are_refused() {
        let error = decode(b"S\0\0\0\x01\x01").unwrap_err();
        assert_eq!(error.to_string(), "unknown pgoutput message 0x53 at byte 0");
    }

    #[test]
    fn a_negative_length_is_refused() {
        let bytes = Bytes::tag(b'I').u32(7).u8(b'N').i16(1).u8(b't');
        let error = decode(&bytes.u32(u32::MAX).0).unwrap_err();
        assert_eq!(
            error.to_string(),
            "pgoutput length is negative: -1, at byte 9"
        );
    }

    fn row() -> impl Strategy<Value = Vec<Option<Vec<u8>>>> {
        prop::collection::vec(
            prop::option::of(prop::collection::vec(any::<u8>(), 0..20)),
            0..24,
        )
    }

    proptest! {
        #[test]
        fn a_row_comes_back_as_it_was(row in row()) {
            let bytes = insert_message(&row);
            let Message::Insert(insert) = decode(&bytes).unwrap() else { panic!("not an insert") };
            let values: Vec<_> = insert.row.values().map(|value| match value {
                Value::Null => None,
                Value::Text(text) => Some(text.to_vec()),
                other => panic!("{other:?}"),
            }).collect();
            prop_assert_eq!(values, row);
        }

        #[test]
        fn every_truncation_is_refused(row in row()) {
            for bytes in [insert_message(&row), relation_message(&["id", "payload"])] {
                for len in 0..bytes.len() {
                    prop_assert!(matches!(decode(&bytes[..len]), Err(DecodeError::Truncated { .. })), "{} of {}", len, bytes.len());
                }
            }
        }

        #[test]
        fn every_leftover_is_refused(row in row(), extra in prop::collection::vec(any::<u8>(), 1..9)) {
            let mut bytes = insert_message(&row);
            let at = bytes.len();
            bytes.extend(&extra);
            prop_assert_eq!(decode(&bytes), Err(DecodeError::Leftover { at, extra: extra.len() }));
        }

        #[test]
        fn no_input_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(Message::Insert(insert)) = decode(&bytes) {
                insert.row.values().for_each(drop);
            }
        }
    }
}
