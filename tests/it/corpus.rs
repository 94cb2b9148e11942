//! What the fuzz targets begin with: messages of a real server.

use std::path::PathBuf;

use crate::support::Fixture;

/// Each step is a stream of its own.
const STEPS: &[(&str, &str)] = &[
    (
        "outbox",
        "SELECT postbox.emit('order', '42', 'order_paid', '{\"total\": 17.50,  \"ä\": [\"\\u00e4\\n\", null]}', \
                             'shop.orders', 'customer-7', '{\"z\": \"ä\", \"a\": null, \"n\": 1.5}', '2.1', 't-1', 'c-1', \
                             'k-1');
         SELECT postbox.emit('order', '43', 'order_gone', NULL);
         BEGIN;
         SET LOCAL postbox.traceparent = '00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01';
         INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload)
         SELECT 'order', n::text, 'order_placed', to_json(repeat('x', n * 100)) FROM generate_series(1, 3) AS n;
         SAVEPOINT s; SELECT postbox.emit('order', 'never', 'never', '1'); ROLLBACK TO s;
         SELECT pg_logical_emit_message(true, 'postbox', 'nonce 745:747:746'); COMMIT;
         SELECT pg_logical_emit_message(false, 'other', 'text')",
    ),
    (
        "times",
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload, created_at)
         SELECT 'order', 'a', 'b', '{}', t::timestamptz FROM unnest(ARRAY['infinity', '0044-03-15 BC', '1969-12-31 23:59:59.5+00', \
         '9999-12-31 23:59:59.999999+00', '10000-01-01']) AS t",
    ),
    (
        "bytea",
        "ALTER TABLE postbox.outbox ALTER COLUMN payload TYPE bytea USING convert_to(payload::text, 'UTF8');
         INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ('o', 'a', 'b', '\\x7b7d'), ('o', 'a', 'b', '\\xff00')",
    ),
    (
        "text",
        "ALTER TABLE postbox.outbox ALTER COLUMN payload TYPE text USING 'x';
         INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, payload) VALUES ('o', 'a', 'b', 'no json'), ('o', 'a', 'b', '[1]')",
    ),
    (
        "type",
        "CREATE TYPE mood AS ENUM ('fine'); ALTER TABLE postbox.outbox ADD COLUMN mood mood;
         INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type, mood) VALUES ('o', 'a', 'b', 'fine');
         ALTER TABLE postbox.outbox RENAME COLUMN event_type TO kind;
         INSERT INTO postbox.outbox (aggregate_type, aggregate_id, kind) VALUES ('o', 'a', 'b')",
    ),
    (
        "origin",
        "SELECT pg_replication_origin_create('east'); SELECT pg_replication_origin_session_setup('east');
         INSERT INTO postbox.outbox (aggregate_type, aggregate_id, kind) VALUES ('o', 'a', 'b');
         SELECT pg_replication_origin_session_reset()",
    ),
    (
        "changes",
        "ALTER PUBLICATION postbox SET (publish = 'insert, update, delete, truncate');
         CREATE TABLE other (x integer PRIMARY KEY, y text); ALTER TABLE other ALTER COLUMN y SET STORAGE EXTERNAL;
         ALTER PUBLICATION postbox ADD TABLE other;
         INSERT INTO other VALUES (1, repeat('y', 5000)); UPDATE other SET x = 2; DELETE FROM other;
         ALTER TABLE other REPLICA IDENTITY FULL; INSERT INTO other VALUES (3, 'z'); UPDATE other SET x = 4; DELETE FROM other;
         TRUNCATE other, postbox.outbox",
    ),
];

/// `POSTBOX_POSTGRES_MAJOR=14 cargo test --test it -- --ignored corpus`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "writes to fuzz/corpus"]
async fn corpus_of_this_postgres() {
    let fixture = Fixture::with_postgres(&[]).await;
    fixture.setup(&[]).results();
    let version = "SELECT current_setting('server_version_num')::integer / 10000";
    let major: i32 = fixture.client.query_one(version, &[]).await.unwrap().get(0);
    let slot = &fixture.contract.slot;
    let read = format!(
        "SELECT data FROM pg_logical_slot_get_binary_changes('{slot}', NULL, NULL, 'proto_version', '1', \
         'publication_names', 'postbox', 'messages', 'true')"
    );
    for (step, script) in STEPS {
        for line in script.split(";\n") {
            fixture.client.batch_execute(line).await.unwrap();
        }
        let rows = fixture.client.query(&read, &[]).await.unwrap();
        let mut stream = Vec::new();
        for (number, row) in rows.iter().enumerate() {
            let message: &[u8] = row.get(0);
            let tag = char::from(message[0]);
            if !"BCM".contains(tag) {
                write(
                    "message",
                    &format!("{major}-{step}-{number}-{tag}"),
                    message,
                );
            }
            push(&mut stream, message);
            // A keepalive after the first transaction, and one within the second.
            if number == 2 || number == 4 {
                push(&mut stream, &[&b"k"[..], &u64::MAX.to_be_bytes()].concat());
            }
        }
        write("stream", &format!("{major}-{step}"), &stream);
        if *step == "outbox" {
            write_events(&fixture, major).await;
        }
    }
}

/// The rows as the target `event` takes them.
async fn write_events(fixture: &Fixture, major: i32) {
    let sql = "SELECT 'j', id::text, aggregate_type, aggregate_id, event_type, created_at::text, payload::text, \
                      headers::text, topic, partition_key, schema_version, trace_id, correlation_id, causation_id, \
                      traceparent, 'shop.{aggregate_type}.{event_type}', 'kind', event_type, 'trace', trace_id \
               FROM postbox.outbox ORDER BY seq";
    let zone = "SET timezone = 'UTC'";
    fixture.client.batch_execute(zone).await.unwrap();
    let rows = fixture.client.query(sql, &[]).await.unwrap();
    for (number, row) in rows.iter().enumerate() {
        let field = |column| {
            row.get::<_, Option<&str>>(column)
                .map_or(&b"\xfe"[..], str::as_bytes)
        };
        let fields: Vec<_> = (0..row.len()).map(field).collect();
        write("event", &format!("{major}-{number}"), &fields.join(&0xff));
    }
}

fn push(stream: &mut Vec<u8>, message: &[u8]) {
    stream.extend(u16::try_from(message.len()).unwrap().to_be_bytes());
    stream.extend(message);
}

fn write(target: &str, name: &str, bytes: &[u8]) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(name), bytes).unwrap();
}
