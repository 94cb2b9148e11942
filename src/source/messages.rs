//! From the replication client's messages to rows and positions. Pure.
//!
//! # What may be confirmed
//!
//! ```text
//!  Begin  row row row  Commit(end_lsn)   keepalive(wal_end)   Begin  row …
//!                          └─ position       └─ position
//! ```
//!
//! The server sends whole transactions in the order of their commits. Confirming
//! a position tells it to forget everything committed before.
//!
//! - Only the **end** of a commit is a position of a transaction. The WAL
//!   positions of rows are not ordered: transactions interleave in the WAL, and
//!   the rows of one COPY share a position.
//! - A keepalive's `wal_end` is how far the server has read. Outside a transaction
//!   everything committed before it has been sent, so it is a position too, and
//!   an idle slot moves on while other tables write. Inside a transaction it lies
//!   behind rows that are still to come, so it is not.
//! - `XLogData`'s own positions say how much WAL was sent, not what is complete.
//!   They are not used.
//!
//! # What is published besides
//!
//! Our publication is of inserts into the outbox alone, and anything else in it is an error:
//! somebody has changed it. One that Debezium made is mostly of all tables, and what comes of
//! others, or is no insert, is passed over, as its router does. The protocol does not say
//! which table is a partition of which. So rows of a partition that are published under
//! its name would be passed over too: whoever checks the publication must see to it that it
//! publishes a partitioned outbox by its root.
//!
//! Tables of others say of each row whether it is published. One that is inserted as published
//! or given up was copied, restored, or moved to another partition: it is passed over.
//!
//! Of a partitioned outbox the server describes the partition, too, and sends its rows
//! under the name of the root. So not what is described is an error, but a row of it.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use pgwire_replication::Lsn;
use pgwire_replication::client::ReplicationEvent;
use postgres_protocol::escape::escape_identifier;
use tokio_postgres::types::PgLsn;

use super::columns::{Columns, Unreadable};
use super::{Item, Mark, Place, Position, Row};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Outline};
use crate::pgoutput::{self, Column, Message, Relation};
use crate::table::Table;
use crate::timestamp::Timestamp;

/// The prefix of the relay's own logical messages.
pub const HEARTBEAT_PREFIX: &str = "postbox";

/// The table that is read, and the publication that names it.
#[derive(Debug, Clone)]
pub struct Outbox {
    /// The table.
    pub table: Table,
    /// The publication.
    pub publication: String,
    /// What the relay's own logical messages begin with. Any role may write
    /// messages with our prefix, and another relay does.
    pub nonce: String,
}

/// Follows the messages of one stream.
pub struct Messages {
    outbox: Outbox,
    tables: HashMap<u32, Columns>,
    /// Other tables that were described, by their names: partitions, and those of a
    /// publication that is not the relay's alone.
    others: HashMap<u32, String>,
    transaction: Option<Transaction>,
}

/// The transaction that is being read.
struct Transaction {
    xid: u32,
    commit_lsn: PgLsn,
    committed_at: Timestamp,
    rows: u64,
    fence: Option<String>,
}

impl Messages {
    /// Nothing has been read yet.
    pub fn new(outbox: Outbox) -> Self {
        Self {
            outbox,
            tables: HashMap::new(),
            others: HashMap::new(),
            transaction: None,
        }
    }

    /// What rows of a table are made of, other than by a message.
    pub(super) fn describe(&mut self, relation: &Relation) {
        let columns = Columns::of(relation, &self.outbox.table);
        self.tables.insert(relation.id, columns);
    }

    /// Whether the rows given so far end within a transaction.
    pub(crate) fn in_transaction(&self) -> bool {
        self.transaction.is_some()
    }

    /// What a message means to the relay, if anything.
    ///
    /// # Errors
    /// If it says that the publication is wrong, or breaks the protocol.
    pub fn accept(&mut self, message: ReplicationEvent) -> Result<Option<Item>> {
        match message {
            ReplicationEvent::Begin {
                final_lsn,
                xid,
                commit_time_micros,
            } => {
                self.transaction = Some(Transaction {
                    xid,
                    commit_lsn: pg_lsn(final_lsn),
                    committed_at: Timestamp::from_postgres_micros(commit_time_micros),
                    rows: 0,
                    fence: None,
                });
                Ok(None)
            }
            ReplicationEvent::XLogData { data, .. } => self.change(data),
            ReplicationEvent::Message {
                prefix, content, ..
            } => {
                if let Some(transaction) = &mut self.transaction
                    && prefix == HEARTBEAT_PREFIX
                    && let Some(fence) = fence(&content, &self.outbox.nonce)
                {
                    transaction.fence = Some(fence.to_owned());
                }
                Ok(None)
            }
            ReplicationEvent::Commit { end_lsn, .. } => {
                let fence = self.transaction.take().and_then(|done| done.fence);
                Ok(Some(position(end_lsn, fence)))
            }
            ReplicationEvent::KeepAlive { wal_end, .. } if self.transaction.is_none() => {
                Ok(Some(position(wal_end, None)))
            }
            ReplicationEvent::KeepAlive { .. } => Ok(None),
            // Only a stream that was asked to stop somewhere says so.
            ReplicationEvent::StoppedAt { .. } => Ok(None),
        }
    }

    /// The event of a row that came of these messages.
    ///
    /// # Errors
    /// If the row is not an event.
    pub fn event<'a>(&self, row: &'a Row) -> Result<Event<'a>, Unreadable> {
        let insert = insert(row)?;
        let columns = self.tables.get(&insert.relation_id);
        let columns = columns.ok_or(Unreadable::Relation(insert.relation_id))?;
        columns.read(&insert.row, row.committed_at)
    }

    /// What can be read of a row that may be no event, and its columns; nothing if not even
    /// those are known.
    pub(crate) fn outline(&self, row: &Row) -> Option<(Outline, Arc<[Column]>)> {
        let insert = insert(row).ok()?;
        let columns = self.tables.get(&insert.relation_id)?;
        Some((
            columns.outline(&insert.row),
            Arc::clone(columns.described()),
        ))
    }

    /// Takes up a row that was laid by with its columns.
    ///
    /// # Errors
    /// If these bytes are no row.
    pub(crate) fn take_up(&mut self, row: &Row, columns: &[Column]) -> Result<(), Unreadable> {
        let id = insert(row)?.relation_id;
        let is_known = self
            .tables
            .get(&id)
            .is_some_and(|known| **known.described() == *columns);
        if !is_known {
            let table = &self.outbox.table;
            self.describe(&Relation {
                id,
                schema: table.schema.clone(),
                name: table.name.clone(),
                columns: columns.to_vec(),
            });
        }
        Ok(())
    }

    /// What a person needs to find the row: its id and number as far as they can
    /// be read, and its place.
    pub(crate) fn name_of(&self, row: &Row) -> String {
        let place = match u64::from(row.place.commit_lsn) {
            0 => "read from the table".to_owned(),
            _ => format!(
                "commit LSN {}, row {}",
                row.place.commit_lsn,
                row.place.ordinal + 1
            ),
        };
        let name = insert(row).ok().and_then(|insert| {
            let columns = self.tables.get(&insert.relation_id)?;
            Some(columns.name_of(&insert.row))
        });
        match name.filter(|name| !name.is_empty()) {
            Some(name) => format!("event with {name} ({place})"),
            None => format!("event at {place}"),
        }
    }

    fn change(&mut self, bytes: Bytes) -> Result<Option<Item>> {
        // An INSERT is decoded when it becomes an event, so that a row that
        // cannot be read can still be named.
        if bytes.first() == Some(&b'I') {
            return match self.other_table_of(&bytes) {
                None if self.is_done_with(&bytes) => Ok(None),
                None => self.row(bytes).map(Some),
                Some(_) if self.outbox.table.preset.shares_publication() => Ok(None),
                Some(other) => Err(self.another_table(other)),
            };
        }
        let is_shared = self.outbox.table.preset.shares_publication();
        match pgoutput::decode(&bytes).map_err(protocol)? {
            Message::Relation(relation) if self.is_outbox(&relation) => {
                self.others.remove(&relation.id);
                self.describe(&relation);
            }
            Message::Relation(relation) => {
                let name = format!("{}.{}", relation.schema, relation.name);
                self.others.insert(relation.id, name);
            }
            Message::Update(_) | Message::Delete(_) | Message::Truncate(_) if is_shared => {}
            Message::Update(_) => return Err(self.published("updates")),
            Message::Delete(_) => return Err(self.published("deletes")),
            Message::Truncate(_) => return Err(self.published("truncates")),
            Message::Insert(_) | Message::Ignored => {}
        }
        Ok(None)
    }

    /// The other table that an INSERT is into, in which the table's id comes first.
    fn other_table_of(&self, insert: &[u8]) -> Option<&str> {
        if self.others.is_empty() {
            return None;
        }
        let id = insert.get(1..)?.first_chunk()?;
        let other = self.others.get(&u32::from_be_bytes(*id));
        other.map(String::as_str)
    }

    /// Whether a row that was inserted is not to be sent, by its own word.
    fn is_done_with(&self, bytes: &[u8]) -> bool {
        if self.outbox.table.preset.tracking().is_none() {
            return false;
        }
        let Ok(Message::Insert(insert)) = pgoutput::decode(bytes) else {
            return false;
        };
        let columns = self.tables.get(&insert.relation_id);
        columns.is_some_and(|columns| columns.is_done_with(&insert.row))
    }

    fn row(&mut self, bytes: Bytes) -> Result<Item> {
        let Some(transaction) = &mut self.transaction else {
            return Err(protocol("a row outside a transaction"));
        };
        let ordinal = transaction.rows;
        transaction.rows += 1;
        Ok(Item::Row(Row {
            bytes,
            place: Place {
                commit_lsn: transaction.commit_lsn,
                ordinal,
            },
            committed_at: transaction.committed_at,
            xid: transaction.xid,
        }))
    }

    fn is_outbox(&self, relation: &Relation) -> bool {
        let table = &self.outbox.table;
        relation.schema == table.schema && relation.name == table.name
    }

    fn another_table(&self, other: &str) -> Error {
        let table = &self.outbox.table;
        let message = format!(
            "publication \"{}\" publishes \"{other}\" too, or partitions under their own names: it must \
             publish \"{}.{}\" alone, with publish_via_partition_root = true; if the outbox had that name for a while, \
             the slot cannot pass it: drop the slot and run `postbox recover`",
            self.outbox.publication, table.schema, table.name
        );
        Error::new(ErrorKind::Publication, message)
    }

    fn published(&self, what: &str) -> Error {
        let publication = &self.outbox.publication;
        let message = format!(
            "publication \"{publication}\" publishes {what}: ALTER PUBLICATION {} SET (publish = 'insert')",
            escape_identifier(publication)
        );
        Error::new(ErrorKind::Publication, message)
    }
}

fn position(lsn: Lsn, fence: Option<String>) -> Item {
    Item::Position(Position {
        lsn: pg_lsn(lsn),
        mark: fence.map(Mark::Fence),
    })
}

fn pg_lsn(lsn: Lsn) -> PgLsn {
    lsn.as_u64().into()
}

fn insert(row: &Row) -> Result<pgoutput::Insert<'_>, Unreadable> {
    match pgoutput::decode(&row.bytes)? {
        Message::Insert(insert) => Ok(insert),
        _ => unreachable!("a row is made of an insert only"),
    }
}

/// The `pg_snapshot` of a heartbeat that this relay wrote: `nonce snapshot`.
fn fence<'a>(content: &'a [u8], nonce: &str) -> Option<&'a str> {
    let text = std::str::from_utf8(content).ok()?;
    text.strip_prefix(nonce)?.strip_prefix(' ')
}

fn protocol(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::new(
        ErrorKind::Unexpected,
        "the server broke the replication protocol",
    )
    .caused_by(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::Preset;

    fn messages() -> Messages {
        messages_of(Table::of("postbox"))
    }

    fn messages_of(table: Table) -> Messages {
        let described = relation(7, &table.schema, &table.name);
        let mut messages = Messages::new(Outbox {
            table,
            publication: "postbox".to_owned(),
            nonce: "secret".to_owned(),
        });
        assert!(messages.accept(data(&described)).unwrap().is_none());
        messages
    }

    /// A table with the one column `id`.
    fn relation(id: u8, schema: &str, table: &str) -> Vec<u8> {
        let name = [schema.as_bytes(), b"\0", table.as_bytes()].concat();
        let columns = b"\0d\0\x01\0id\0\0\0\0\x19\xff\xff\xff\xff";
        [b"R\0\0\0", &[id][..], &name, columns].concat()
    }

    const ROW: &[u8] = b"I\0\0\0\x07N\0\x01t\0\0\0\x01a";
    const ROW_OF_ANOTHER: &[u8] = b"I\0\0\0\x08N\0\x01t\0\0\0\x01a";
    /// An update, a delete and a truncate.
    const CHANGES: [&[u8]; 3] = [
        b"U\0\0\0\x07N\0\x01t\0\0\0\x01a",
        b"D\0\0\0\x07K\0\x01t\0\0\0\x01a",
        b"T\0\0\0\x01\0\0\0\0\x07",
    ];

    fn of_debezium() -> Messages {
        messages_of(Table::new(Preset::Debezium, "postbox", None, &[]).unwrap())
    }

    fn data(bytes: &[u8]) -> ReplicationEvent {
        ReplicationEvent::XLogData {
            wal_start: Lsn(0),
            wal_end: Lsn(0),
            server_time_micros: 0,
            data: Bytes::copy_from_slice(bytes),
        }
    }

    fn begin(lsn: u64) -> ReplicationEvent {
        ReplicationEvent::Begin {
            final_lsn: Lsn(lsn),
            xid: 1,
            commit_time_micros: 0,
        }
    }

    fn commit(lsn: u64, end_lsn: u64) -> ReplicationEvent {
        ReplicationEvent::Commit {
            lsn: Lsn(lsn),
            end_lsn: Lsn(end_lsn),
            commit_time_micros: 0,
        }
    }

    fn keepalive(wal_end: u64) -> ReplicationEvent {
        ReplicationEvent::KeepAlive {
            wal_end: Lsn(wal_end),
            reply_requested: true,
            server_time_micros: 0,
        }
    }

    fn position_of(item: Option<Item>) -> Option<u64> {
        match item {
            Some(Item::Position(position)) => Some(position.lsn.into()),
            _ => None,
        }
    }

    #[test]
    fn only_the_end_of_a_commit_is_a_position() {
        let mut messages = messages();
        messages.accept(begin(100)).unwrap();
        let Some(Item::Row(row)) = messages.accept(data(ROW)).unwrap() else {
            panic!("not a row");
        };
        assert_eq!(u64::from(row.place.commit_lsn), 100);
        assert_eq!(
            position_of(messages.accept(commit(100, 108)).unwrap()),
            Some(108)
        );
    }

    #[test]
    fn keepalive_inside_a_transaction_does_not_move_the_position() {
        let mut messages = messages();
        assert_eq!(
            position_of(messages.accept(keepalive(90)).unwrap()),
            Some(90)
        );
        messages.accept(begin(100)).unwrap();
        messages.accept(data(ROW)).unwrap();
        assert!(messages.accept(keepalive(200)).unwrap().is_none());
        messages.accept(commit(100, 108)).unwrap();
        assert_eq!(
            position_of(messages.accept(keepalive(200)).unwrap()),
            Some(200)
        );
    }

    #[test]
    fn rows_of_one_transaction_differ_in_their_ordinals() {
        let mut messages = messages();
        messages.accept(begin(100)).unwrap();
        let places = [0, 1].map(|_| match messages.accept(data(ROW)).unwrap() {
            Some(Item::Row(row)) => row.place,
            other => panic!("{other:?}"),
        });
        assert!(places[0] < places[1]);
    }

    #[test]
    fn another_table_in_the_publication_stops_the_stream() {
        let described = relation(8, "postbox", "orders");
        let mut messages = messages();
        messages.accept(data(&described)).unwrap();
        messages.accept(begin(100)).unwrap();
        let error = messages.accept(data(ROW_OF_ANOTHER)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Publication);
        assert!(
            error.chain().contains("\"postbox.orders\""),
            "{}",
            error.chain()
        );
    }

    #[test]
    fn what_is_no_insert_stops_the_stream() {
        for change in CHANGES {
            let error = messages().accept(data(change)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Publication);
        }
    }

    #[test]
    fn what_else_is_in_a_shared_publication_is_passed_over() {
        let mut messages = of_debezium();
        messages.accept(begin(100)).unwrap();
        let described = relation(8, "public", "orders");
        for message in [&described[..], ROW_OF_ANOTHER].into_iter().chain(CHANGES) {
            let passed_over = messages.accept(data(message)).unwrap();
            assert!(passed_over.is_none(), "{passed_over:?}");
        }
        let Some(Item::Row(row)) = messages.accept(data(ROW)).unwrap() else {
            panic!("not a row");
        };
        // The rows before it are none of the outbox.
        assert_eq!(row.place.ordinal, 0);
        let end = messages.accept(commit(100, 108)).unwrap();
        assert_eq!(position_of(end), Some(108));
    }

    #[test]
    fn a_table_that_takes_the_name_of_the_outbox_is_the_outbox() {
        let mut messages = of_debezium();
        messages.accept(begin(100)).unwrap();
        for (name, is_row) in [("new_outbox", false), ("outbox", true), ("old", false)] {
            let described = relation(8, "public", name);
            messages.accept(data(&described)).unwrap();
            let item = messages.accept(data(ROW_OF_ANOTHER)).unwrap();
            assert_eq!(item.is_some(), is_row, "{name}");
        }
    }

    #[test]
    fn a_row_without_what_an_event_needs_can_still_be_named() {
        let mut messages = messages();
        messages.accept(begin(0x1_0000_0064)).unwrap();
        let Some(Item::Row(row)) = messages.accept(data(ROW)).unwrap() else {
            panic!("not a row");
        };
        let error = messages.event(&row).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the outbox has no column \"aggregate_type\""
        );
        assert_eq!(
            messages.name_of(&row),
            "event with id a (commit LSN 1/64, row 1)"
        );
    }

    #[test]
    fn a_fence_is_what_this_relay_wrote() {
        assert_eq!(fence(b"secret 10:20:12", "secret"), Some("10:20:12"));
        for forged in [
            "10:20:12",
            " 10:20:12",
            "other 10:20:12",
            "secret10:20:12",
            "",
        ] {
            assert_eq!(fence(forged.as_bytes(), "secret"), None, "{forged}");
        }
    }
}
