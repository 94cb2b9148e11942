//! How a partitioned outbox is made.

use super::insert_at;
use crate::poll::POLL;
use crate::support::{Fixture, Relay, connect, run_script, wait_until};

async fn text(fixture: &Fixture, sql: &str) -> String {
    let row = fixture.client.query_one(sql, &[]).await.unwrap();
    row.get::<_, Option<String>>(0).unwrap_or_default()
}

/// Where each partition begins, and that one follows the other.
const BEGINNINGS: &str = "SELECT string_agg(to_char(since AT TIME ZONE 'UTC', 'DD HH24:MI'), ', ' ORDER BY since) || \
     CASE WHEN bool_and(until = next OR next IS NULL) THEN '' ELSE ' and a gap' END \
     FROM (SELECT *, lead(since) OVER (ORDER BY since) AS next FROM postbox.partitions()) AS p";

/// The columns, constraints, indexes but for the key, and triggers of the outbox.
const SHAPE: &str = "SELECT concat_ws(E'\\n', \
    (SELECT string_agg(format('%s %s %s %s %s %s', attname, format_type(atttypid, NULL), attnotnull, attidentity, \
                pg_get_expr(adbin, adrelid), col_description(attrelid, attnum)), E'\\n' ORDER BY attnum) \
     FROM pg_attribute LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum WHERE attrelid = o AND attnum > 0), \
    (SELECT string_agg(pg_get_constraintdef(oid), E'\\n' ORDER BY conname) FROM pg_constraint \
     WHERE conrelid = o AND contype = 'c'), \
    (SELECT string_agg(replace(pg_get_indexdef(indexrelid), 'ON ONLY', 'ON'), E'\\n' ORDER BY indexrelid::regclass::text) \
     FROM pg_index WHERE indrelid = o AND NOT indisprimary AND indexrelid::regclass::text !~ 'outbox_seq_idx'), \
    (SELECT string_agg(pg_get_triggerdef(oid), E'\\n' ORDER BY tgname) FROM pg_trigger WHERE tgrelid = o), \
    (SELECT format('cache %s by %s', seqcache, seqincrement) FROM pg_sequence \
     WHERE seqrelid = pg_get_serial_sequence('postbox.outbox', 'seq')::regclass), \
    pg_get_serial_sequence('postbox.outbox', 'seq'), obj_description(o)) \
    FROM (SELECT 'postbox.outbox'::regclass AS o) AS o";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partitioned_outbox_is_made_once_and_its_width_can_be_changed() {
    let plain = Fixture::new().await;
    let fixture = Fixture::empty().await;
    let line = |width: &str, state: &str| {
        format!("\npartitions of \"postbox\".\"outbox\", one for each {width}: {state}\n")
    };
    let made = fixture.setup(&["--partitioned", "day"]);
    assert!(made.results().contains(&line("day", "created")), "{made:?}");
    assert_eq!(text(&fixture, SHAPE).await, text(&plain, SHAPE).await);
    let key = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conname = 'outbox_pkey'";
    assert_eq!(text(&fixture, key).await, "PRIMARY KEY (created_at, seq)");
    let days = text(&fixture, BEGINNINGS).await;
    let expected = "SELECT string_agg(to_char(day, 'DD HH24:MI'), ', ' ORDER BY day) \
                    FROM generate_series(date_trunc('day', now() AT TIME ZONE 'UTC') - interval '1 day', \
                                         now() AT TIME ZONE 'UTC' + interval '7 days', '1 day') AS day";
    assert_eq!(days, text(&fixture, expected).await);
    let twice = "SELECT count(DISTINCT postbox.emit('a', 'b', 'c', '{}', idempotency_key => 'k'))::text \
                 FROM generate_series(1, 2)";
    assert_eq!(text(&fixture, twice).await, "1");
    let rows = "SELECT count(*)::text FROM postbox.outbox";
    assert_eq!(text(&fixture, rows).await, "1");
    for flags in [&["--partitioned", "day"][..], &[]] {
        let again = fixture.setup(flags);
        assert!(
            again.results().contains(&line("day", "already there")),
            "{again:?}"
        );
    }
    assert_eq!(text(&fixture, BEGINNINGS).await, days);

    // Days to come stay, and hours follow them.
    let hours = fixture.setup(&["--partitioned", "hour"]);
    let upgraded = "upgraded (those that were there stay as they are)";
    assert!(
        hours.results().contains(&line("hour", upgraded)),
        "{hours:?}"
    );
    assert_eq!(text(&fixture, BEGINNINGS).await, days);
    let later =
        "UPDATE postbox.partitioning SET ahead = '9 days'; SELECT postbox.make_partitions()";
    fixture.client.batch_execute(later).await.unwrap();
    let mixed = text(&fixture, BEGINNINGS).await;
    assert!(
        mixed.starts_with(&days) && mixed.contains(" 13:00, "),
        "{mixed}"
    );
    assert!(!mixed.contains("gap"), "{mixed}");
    // And the other way round, from amid a day.
    fixture.setup(&["--partitioned", "day"]).results();
    let later =
        "UPDATE postbox.partitioning SET ahead = '12 days'; SELECT postbox.make_partitions()";
    fixture.client.batch_execute(later).await.unwrap();
    let mixed = text(&fixture, BEGINNINGS).await;
    assert!(
        mixed.ends_with(" 00:00") && !mixed.contains("gap"),
        "{mixed}"
    );
}

/// A publication holds the table and not its name: so it cannot become another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_an_outbox_that_nobody_uses_becomes_partitioned() {
    let fixture = Fixture::new().await;
    let flags = ["--partitioned", "day"];
    let refused = fixture.setup(&flags);
    let said = refused.complaint(3);
    assert!(
        said.contains("a relay was set up for it: set a partitioned one up"),
        "{said}"
    );
    let script = fixture.setup(&["--print", "--partitioned", "day"]);
    let refused = run_script(&connect(&fixture.database_url).await, script.results()).await;
    let refused = refused.unwrap_err();
    let refused = refused.as_db_error().unwrap().message();
    assert!(refused.contains("has rows or a relay already"), "{refused}");

    let forget = "DELETE FROM postbox.checkpoint";
    fixture.client.batch_execute(forget).await.unwrap();
    fixture.drop_slot().await;
    fixture.insert("a", "{}").await;
    let refused = fixture.setup(&["--partitioned", "day", "--backfill", "pending"]);
    assert!(refused.complaint(3).contains("has rows"), "{refused:?}");
    fixture
        .client
        .batch_execute("DELETE FROM postbox.outbox")
        .await
        .unwrap();
    let drop = "DROP PUBLICATION postbox";
    fixture.client.batch_execute(drop).await.unwrap();
    let made = fixture.setup(&flags);
    assert!(
        made.results().contains("one for each day: created"),
        "{made:?}"
    );
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.insert("b", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["b"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_printed_script_makes_a_partitioned_outbox() {
    for mode in [&["--mode", "wal"], &POLL] {
        let fixture = Fixture::empty().await;
        let (role, url) = fixture.role("relay").await;
        let flags = [&["--partitioned", "hour", "--grant-to", &role], &mode[..]].concat();
        let script = fixture.setup(&[&["--print"], &flags[..]].concat());
        for _ in 0..2 {
            run_script(&fixture.client, script.results()).await.unwrap();
        }
        let there = fixture.setup(&flags);
        let there = there.results();
        assert!(
            !there.contains("created") && there.contains("one for each hour"),
            "{there}"
        );
        let flags = [&["--database-url", &url], &mode[..]].concat();
        let mut relay = Relay::start(&fixture, &flags);
        fixture
            .client
            .batch_execute(&insert_at(&fixture, "a", "now()"))
            .await
            .unwrap();
        relay.wait_for_log("INFO").await;
        wait_until("it is published", async || {
            relay.published(&fixture.topic) == 1
        })
        .await;
        wait_until("partitions are looked after", async || {
            relay
                .get("/metrics")
                .1
                .contains("postbox_partitions_ahead_seconds")
        })
        .await;
        relay.drain().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_fights_partitions_is_refused() {
    let fixture = Fixture::empty().await;
    let flags = ["--table-preset", "omni-box", "--partitioned", "day"];
    let refused = fixture.setup(&flags);
    assert!(
        refused.complaint(2).contains("fights --partitioned"),
        "{refused:?}"
    );
}
