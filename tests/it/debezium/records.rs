//! Our records beside those that its Outbox Event Router makes of the same rows.

use postbox::contract::Contract;
use rdkafka::Message;
use rdkafka::message::{Headers, OwnedMessage};

use super::{debezium, fixture, relay, set_up};
use crate::records::consume;
use crate::support::Fixture;

/// What of a record must be the same: topic, partition, key, value, headers.
type Content = (
    String,
    Option<i32>,
    Option<String>,
    Option<Vec<u8>>,
    Vec<(String, Option<String>)>,
);

/// Without the first words of its topic, and without the headers that tell which Debezium
/// sent it. Records without a key may be in any partition.
fn content(record: &OwnedMessage, prefix: &str) -> Content {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let headers = record.headers().into_iter().flat_map(Headers::iter);
    let headers = headers.filter(|header| !header.key.starts_with("__debezium.context."));
    (
        record.topic().strip_prefix(prefix).unwrap().to_owned(),
        record.key().map(|_| record.partition()),
        record.key().map(text),
        record.payload().map(<[u8]>::to_vec),
        headers
            .map(|header| (header.key.to_owned(), header.value.map(text)))
            .collect(),
    )
}

/// In the order of partitions, and within each in that of their offsets, but for those
/// without a key.
fn sorted(mut records: Vec<OwnedMessage>, prefix: &str) -> Vec<Content> {
    records.sort_by_key(|record| (record.partition(), record.offset()));
    let mut contents: Vec<_> = records
        .iter()
        .map(|record| content(record, prefix))
        .collect();
    contents.sort_by_key(|(_, partition, ..)| *partition);
    contents
}

/// A table, how Debezium's connector and our relay are told about it, and its rows.
struct Case {
    name: &'static str,
    publication: &'static str,
    connector: &'static [&'static str],
    placement: Option<&'static str>,
    table: &'static [&'static str],
    /// With the events' topics as `$1`, so many of them in each.
    rows: &'static str,
    topics: &'static [(&'static str, usize)],
    has_times: bool,
}

/// All columns of which Connect makes the same text as Postgres.
const PLACEMENT: &str = "type:header:eventType,tenant:header,is_test:header,note:header:remark,big:header,small:header,\
                         price:header,ref:header,extra:header,doc:header,code:header,mood:header";

const TABLES: &str = "
    CREATE TYPE mood AS ENUM ('sad', 'happy');
    CREATE TABLE outbox (
        id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL, aggregateid varchar(255), type varchar(255),
        payload jsonb, tenant int, is_test boolean, note text, big bigint, small smallint, price numeric(10, 2), ref uuid,
        extra jsonb, doc json, code char(5), mood mood
    );
    CREATE TABLE texts (id text, aggregatetype text, aggregateid int, payload text, at timestamp);
    CREATE TABLE bytes (id uuid, aggregatetype text, aggregateid uuid, payload bytea);
    -- Older than a topic keeps, it would be gone at once; a time to come is refused.
    CREATE FUNCTION yesterday() RETURNS timestamp LANGUAGE sql AS 'SELECT current_date - interval ''1 day''';
    CREATE TABLE business (id int PRIMARY KEY, note text);";

const CASES: [Case; 3] = [
    Case {
        name: "json",
        // Of all tables, and of all changes: as Debezium makes it.
        publication: "dbz_publication",
        connector: &[
            "slot.name=of_debezium_json",
            "table.include.list=public.outbox",
        ],
        placement: Some(PLACEMENT),
        table: &[],
        rows: r#"
            INSERT INTO business VALUES (1, 'passed over');
            INSERT INTO outbox VALUES
                ('00000000-0000-0000-0000-000000000001', $1 || 'Order', '7', 'Created',
                 '{"b": 1, "a": [1.50, 2e3, {"c": null}], "ü": "\u20ac😀", "b": 2}', 5, true, 'ünï "q" \ ', 9007199254740993,
                 -1, 1.50, '11111111-0000-0000-0000-000000000001', '{"x":  1}', '{"x":  1, "x": 2}', 'ab', 'happy'),
                ('00000000-0000-0000-0000-000000000003', $1 || 'Order', '8', '', 'null', 0, false, '', -1, 0, 0, NULL,
                 'null', '[1]', '', 'sad');
            INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload) VALUES
                ('00000000-0000-0000-0000-000000000002', $1 || 'Order', '7', NULL, NULL),
                ('00000000-0000-0000-0000-000000000004', $1 || 'Order', '7', 'x', '"text"'),
                ('00000000-0000-0000-0000-000000000005', $1 || 'Order', NULL, 'x', '{}'),
                ('00000000-0000-0000-0000-000000000006', $1 || 'Order', '', 'x', '[]'),
                ('00000000-0000-0000-0000-000000000007', $1 || 'Order', 'ü😀', 'x', 'true'),
                ('00000000-0000-0000-0000-000000000008', $1 || '.items_2-x', '7', 'x', '17');
            UPDATE business SET note = 'changed';
            UPDATE outbox SET note = 'changed' WHERE aggregateid = '7';
            DELETE FROM outbox WHERE aggregateid = '8';
            DELETE FROM business;
            INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload) VALUES
                ('00000000-0000-0000-0000-000000000009', $1 || 'Order', '7', 'Last', '{}')"#,
        topics: &[("Order", 8), (".items_2-x", 1)],
        has_times: false,
    },
    Case {
        name: "texts",
        publication: "of_debezium_texts",
        connector: &[
            "slot.name=of_debezium_texts",
            "topic.prefix=texts",
            "publication.name=of_debezium_texts",
            "publication.autocreate.mode=filtered",
            "table.include.list=public.texts",
            "transforms.outbox.table.field.event.timestamp=at",
        ],
        placement: None,
        table: &["--table", "texts", "--column", "created_at=at"],
        rows: r#"
            INSERT INTO texts VALUES
                ('a', $1 || 'texts', 1, 'plain', yesterday() + '12:00:00.250999'), ('b', $1 || 'texts', 1, '', yesterday()),
                ('c', $1 || 'texts', 1, '  ', yesterday() - '0.5 s'::interval), ('d', $1 || 'texts', 1, NULL, yesterday() + '1 s'),
                ('e ü', $1 || 'texts', 2, '{"not": json 😀', yesterday() + '0.0006 s')"#,
        topics: &[("texts", 5)],
        has_times: true,
    },
    Case {
        name: "bytes",
        publication: "of_debezium_bytes",
        connector: &[
            "slot.name=of_debezium_bytes",
            "topic.prefix=bytes",
            "publication.name=of_debezium_bytes",
            "publication.autocreate.mode=filtered",
            "table.include.list=public.bytes",
            "value.converter=io.debezium.converters.BinaryDataConverter",
        ],
        placement: None,
        table: &["--table", "bytes"],
        rows: r"
            INSERT INTO bytes VALUES
                ('00000000-0000-0000-0000-000000000021', $1 || 'bytes', '00000000-0000-0000-0000-00000000000A', '\x00ff0a'),
                ('00000000-0000-0000-0000-000000000022', $1 || 'bytes', '00000000-0000-0000-0000-00000000000A', ''),
                ('00000000-0000-0000-0000-000000000023', $1 || 'bytes', '00000000-0000-0000-0000-00000000000A', NULL)",
        topics: &[("bytes", 3)],
        has_times: false,
    },
];

/// All kinds of rows, between changes that are no events.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn are_those_of_its_router() {
    let Some(mut fixture) = fixture().await else {
        return;
    };
    fixture.client.batch_execute(TABLES).await.unwrap();
    let placements = CASES.map(|case| case.placement);
    let placements = placements.map(|placement| {
        let option = "transforms.outbox.table.fields.additional.placement";
        placement.map(|placement| format!("{option}={placement}"))
    });
    let settings: Vec<Vec<&str>> = CASES
        .iter()
        .zip(&placements)
        .map(|(case, placement)| {
            let own = case.connector.iter().copied();
            own.chain(placement.as_deref()).collect()
        })
        .collect();
    let connectors: Vec<(&str, &[&str])> = CASES
        .iter()
        .zip(&settings)
        .map(|(case, settings)| (case.name, &settings[..]))
        .collect();
    let _debezium = debezium(&fixture, &connectors);
    for case in &CASES {
        let slot = format!("of_postbox_{}", case.name);
        fixture.contract = Contract::new("postbox", &slot, case.publication).unwrap();
        set_up(&fixture, case.table);
        let rows = case.rows.replace("$1", &format!("'{}'", fixture.topic));
        fixture.client.batch_execute(&rows).await.unwrap();
        let mut flags = [case.table, &["--route", "postbox.event.{aggregate_type}"]].concat();
        if let Some(placement) = case.placement {
            flags.extend(["--placement", placement]);
        }
        let relay = relay(&fixture, &flags).await;
        fixture.wait_for_confirmation().await;
        relay.drain().await;
        for (topic, count) in case.topics {
            compare(&fixture, case, topic, *count);
        }
    }
}

fn compare(fixture: &Fixture, case: &Case, topic: &str, count: usize) {
    let records = |prefix: &str| {
        let topic = format!("{prefix}{}{topic}", fixture.topic);
        consume(fixture, &topic, count)
    };
    let (theirs, ours) = ("outbox.event.", "postbox.event.");
    let (expected, found) = (records(theirs), records(ours));
    if case.has_times {
        let times = |records: &[OwnedMessage]| {
            let mut times: Vec<_> = records
                .iter()
                .map(|record| (record.key().map(<[u8]>::to_vec), record.timestamp()))
                .collect();
            times.sort_by_key(|(key, _)| key.clone());
            times
        };
        assert_eq!(times(&found), times(&expected));
    }
    assert_eq!(sorted(found, ours), sorted(expected, theirs), "{topic}");
}
