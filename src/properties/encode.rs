//! Messages as the server writes them. The relay never does.

use crate::pgoutput::{Insert, Message, Relation, Value};

/// The bytes of a message; `None` for one of which nothing was kept. What a message
/// does not keep is zero or empty.
pub(super) fn encode(message: &Message<'_>) -> Option<Vec<u8>> {
    Some(match message {
        Message::Relation(relation) => encode_relation(relation),
        Message::Insert(insert) => encode_insert(insert),
        Message::Update(id) => [b"U", &id.to_be_bytes()[..], b"N\0\0"].concat(),
        Message::Delete(id) => [b"D", &id.to_be_bytes()[..], b"K\0\0"].concat(),
        Message::Truncate(ids) => {
            let count = u32::try_from(ids.len()).expect("counted by 32 bits");
            let mut bytes = [b"T", &count.to_be_bytes()[..], b"\0"].concat();
            bytes.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
            bytes
        }
        Message::Ignored => return None,
    })
}

fn encode_relation(relation: &Relation) -> Vec<u8> {
    let mut bytes = [b"R", &relation.id.to_be_bytes()[..]].concat();
    name(&mut bytes, &relation.schema);
    name(&mut bytes, &relation.name);
    bytes.push(b'd');
    count(&mut bytes, relation.columns.len());
    for column in &relation.columns {
        bytes.push(0);
        name(&mut bytes, &column.name);
        bytes.extend(column.type_oid.to_be_bytes());
        bytes.extend([0; 4]);
    }
    bytes
}

fn encode_insert(insert: &Insert<'_>) -> Vec<u8> {
    let mut bytes = [b"I", &insert.relation_id.to_be_bytes()[..], b"N"].concat();
    count(&mut bytes, insert.row.len());
    for value in insert.row.values() {
        match value {
            Value::Null => bytes.push(b'n'),
            Value::Unchanged => bytes.push(b'u'),
            Value::Text(value) => sized(&mut bytes, b't', value),
            Value::Binary(value) => sized(&mut bytes, b'b', value),
        }
    }
    bytes
}

fn name(bytes: &mut Vec<u8>, name: &str) {
    bytes.extend(name.as_bytes());
    bytes.push(0);
}

fn count(bytes: &mut Vec<u8>, count: usize) {
    let count = u16::try_from(count).expect("counted by 16 bits");
    bytes.extend(count.to_be_bytes());
}

fn sized(bytes: &mut Vec<u8>, kind: u8, value: &[u8]) {
    let len = u32::try_from(value.len()).expect("counted by 32 bits");
    bytes.push(kind);
    bytes.extend(len.to_be_bytes());
    bytes.extend(value);
}
