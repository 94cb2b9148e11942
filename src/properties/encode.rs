//! Messages as the server writes them.

use crate::pgoutput::{Message, Relation, encode_insert};

/// The bytes of a message; `None` for one of which nothing was kept. What a message
/// does not keep is zero or empty.
pub(super) fn encode(message: &Message<'_>) -> Option<Vec<u8>> {
    Some(match message {
        Message::Relation(relation) => encode_relation(relation),
        Message::Insert(insert) => encode_insert(insert.relation_id, insert.row.values()),
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

fn name(bytes: &mut Vec<u8>, name: &str) {
    bytes.extend(name.as_bytes());
    bytes.push(0);
}

fn count(bytes: &mut Vec<u8>, count: usize) {
    let count = u16::try_from(count).expect("counted by 16 bits");
    bytes.extend(count.to_be_bytes());
}
