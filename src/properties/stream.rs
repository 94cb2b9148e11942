//! Messages in a row, as they come out of a slot.

use bytes::Bytes;
use pgwire_replication::Lsn;
use pgwire_replication::client::ReplicationEvent;

use super::event::check;
use crate::source::{Item, Messages, Outbox, Place};
use crate::table::{Preset, Table};

/// Follows messages, each behind its length in two bytes, until one is refused:
/// pgoutput's own, and `k` for a keepalive with its position. Rows are numbered
/// within their transaction, a position lies between transactions, and what becomes
/// an event passes [`check`]. So too where the publication may have more in it.
pub fn stream(bytes: &[u8]) {
    let ours = Table::of("postbox");
    let columns = ["aggregate_type", "aggregate_id", "event_type"];
    let columns = columns.map(|name| (name.to_owned(), name.to_owned()));
    let name = format!("{}.{}", ours.schema, ours.name);
    let shared = Table::new(Preset::Debezium, "postbox", Some(&name), &columns);
    follow(bytes, ours);
    follow(bytes, shared.unwrap());
}

fn follow(bytes: &[u8], table: Table) {
    let mut messages = Messages::new(Outbox {
        table,
        publication: "postbox".to_owned(),
        nonce: "nonce".to_owned(),
    });
    let mut last: Option<Place> = None;
    for message in frames(bytes) {
        let begins = message.first() == Some(&b'B');
        let Some(message) = event_of(message) else {
            continue;
        };
        let Ok(item) = messages.accept(message) else {
            return;
        };
        if begins {
            last = None;
        }
        match item {
            Some(Item::Row(row)) => {
                assert!(messages.in_transaction());
                let expected = last.map_or(0, |last| last.ordinal + 1);
                assert_eq!(row.place.ordinal, expected);
                assert!(last.is_none_or(|last| last < row.place));
                last = Some(row.place);
                assert!(messages.name_of(&row).starts_with("event "));
                if let Ok(event) = messages.event(&row) {
                    check(&event);
                }
            }
            Some(Item::Position(_)) => assert!(!messages.in_transaction()),
            None => {}
        }
    }
}

fn frames(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (len, rest) = bytes.split_first_chunk()?;
        let len = usize::from(u16::from_be_bytes(*len)).min(rest.len());
        let (frame, rest) = rest.split_at(len);
        bytes = rest;
        Some(frame)
    })
}

/// What the replication client makes of a message.
fn event_of(message: &[u8]) -> Option<ReplicationEvent> {
    let (tag, rest) = message.split_first()?;
    Some(match tag {
        b'B' => ReplicationEvent::Begin {
            final_lsn: Lsn(number(rest, 0)?),
            commit_time_micros: number(rest, 8)?.cast_signed(),
            xid: 1,
        },
        b'C' => ReplicationEvent::Commit {
            lsn: Lsn(number(rest, 1)?),
            end_lsn: Lsn(number(rest, 9)?),
            commit_time_micros: number(rest, 17)?.cast_signed(),
        },
        b'M' => {
            let lsn = Lsn(number(rest, 1)?);
            let rest = rest.get(9..)?;
            let end = rest.iter().position(|&byte| byte == 0)?;
            ReplicationEvent::Message {
                transactional: message[1] == 1,
                lsn,
                prefix: String::from_utf8(rest[..end].to_vec()).ok()?,
                content: Bytes::copy_from_slice(rest.get(end + 5..)?),
            }
        }
        b'k' => ReplicationEvent::KeepAlive {
            wal_end: Lsn(number(rest, 0)?),
            reply_requested: false,
            server_time_micros: 0,
        },
        _ => ReplicationEvent::XLogData {
            wal_start: Lsn(0),
            wal_end: Lsn(0),
            server_time_micros: 0,
            data: Bytes::copy_from_slice(message),
        },
    })
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    let (number, _) = bytes.get(at..)?.split_first_chunk()?;
    Some(u64::from_be_bytes(*number))
}
