//! Debezium's table as set-up finds it, with publications and slots as others leave them.
//! Debezium itself is not needed.

use rdkafka::Message;

use super::{PRESET, relay};
use crate::records::consume;
use crate::support::{Fixture, Relay, statement};

const TABLES: &str = "
    CREATE TABLE outbox (
        id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL, aggregateid varchar(255) NOT NULL,
        type varchar(255) NOT NULL, payload jsonb, at timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE business (id int PRIMARY KEY);";

const ANOTHER: &str = "make another publication, and name it with --publication";

/// An empty database with these tables.
async fn fixture() -> Fixture {
    with_tables(Fixture::empty().await).await
}

async fn with_tables(fixture: Fixture) -> Fixture {
    fixture.client.batch_execute(TABLES).await.unwrap();
    fixture
}

/// Row filters came with Postgres 15.
async fn has_filters(fixture: &Fixture) -> bool {
    let sql = "SELECT current_setting('server_version_num')::integer >= 150000";
    fixture.client.query_one(sql, &[]).await.unwrap().get(0)
}

/// Those of one transaction have one time, and their ids are in no order.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_before_the_slot_are_sent_as_they_were_inserted() {
    let fixture = fixture().await;
    let rows = format!(
        "INSERT INTO outbox SELECT ('00000000-0000-0000-0000-0000000000' || 80 - n)::uuid, '{}', 'a', 'x', to_jsonb(n) \
         FROM generate_series(1, 50) AS n",
        fixture.topic
    );
    fixture.client.batch_execute(&rows).await.unwrap();
    let flags = ["--column", "created_at=at"];
    let pending = [&PRESET[..], &flags, &["--backfill", "pending"]].concat();
    fixture.setup(&pending).results();
    let relay = relay(&fixture, &flags).await;
    let topic = format!("outbox.event.{}", fixture.topic);
    let records = consume(&fixture, &topic, 50);
    relay.drain().await;
    let payload = |text: &[u8]| String::from_utf8(text.to_vec()).unwrap();
    let found: Vec<_> = records
        .iter()
        .map(|record| payload(record.payload().unwrap()))
        .collect();
    let expected: Vec<_> = (1..=50).map(|n| n.to_string()).collect();
    assert_eq!(found, expected);
}

/// In a schema that not everybody may look into.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_of_least_rights_reads_a_table_in_a_schema_of_its_own() {
    let mut fixture = fixture().await;
    let (role, server) = fixture.role("relay").await;
    let moved = "CREATE SCHEMA shop; ALTER TABLE outbox SET SCHEMA shop";
    fixture.client.batch_execute(moved).await.unwrap();
    let table = [PRESET[0], PRESET[1], "--table", "shop.outbox"];
    let set_up = fixture.setup(&[&table[..], &["--grant-to", &role]].concat());
    set_up.results();
    let may = "SELECT has_table_privilege($1::text::name, 'shop.outbox', 'SELECT, INSERT, UPDATE')";
    let row = fixture.client.query_one(may, &[&role]).await.unwrap();
    assert!(!row.get::<_, bool>(0), "a slot gives it all");
    fixture.database_url = server;
    let relay = Relay::streaming(&fixture, &table).await;
    let row = format!(
        "INSERT INTO shop.outbox VALUES (gen_random_uuid(), '{}', 'a', 'x', '{{}}')",
        fixture.topic
    );
    fixture.client.batch_execute(&row).await.unwrap();
    let topic = format!("outbox.event.{}", fixture.topic);
    assert_eq!(consume(&fixture, &topic, 1).len(), 1);
    relay.drain().await;
}

/// Others read it too: nothing is to be taken out of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_that_is_shared_stays_as_it_is() {
    let fixture = fixture().await;
    let has_filters = has_filters(&fixture).await;
    for (publication, why, mend, since_15) in [
        (
            "FOR ALL TABLES WITH (publish = 'update')",
            "must publish inserts",
            ANOTHER,
            false,
        ),
        (
            "FOR TABLE outbox WITH (publish = 'delete')",
            "must publish inserts",
            ANOTHER,
            false,
        ),
        (
            "FOR TABLE outbox WHERE (id IS NULL), business WITH (publish = 'insert')",
            "has a row filter",
            ANOTHER,
            true,
        ),
        (
            "FOR TABLE business",
            "does not publish \"public\".\"outbox\"",
            "ADD TABLE",
            false,
        ),
    ] {
        if since_15 && !has_filters {
            continue;
        }
        let make =
            format!("DROP PUBLICATION IF EXISTS postbox; CREATE PUBLICATION postbox {publication}");
        fixture.client.batch_execute(&make).await.unwrap();
        let setup = fixture.setup(&PRESET);
        let complaint = setup.complaint(5);
        assert!(
            complaint.contains(why)
                && complaint.contains(mend)
                && !complaint.contains(" SET ")
                && !complaint.contains("DROP "),
            "{publication}: {complaint}"
        );
    }
    let setup = fixture.setup(&PRESET);
    let mend = statement(setup.complaint(5), "ALTER PUBLICATION");
    fixture.client.batch_execute(mend).await.unwrap();
    fixture.setup(&PRESET).results();
    // Nor for our own table.
    let setup = fixture.setup(&["--slot", "another"]);
    let complaint = setup.complaint(5);
    assert!(
        complaint.contains("was set up for another table"),
        "{complaint}"
    );
    // Nor later.
    let slot = fixture.contract.slot.as_str();
    for (publication, slot) in [("postbox", slot), ("of_all", "of_all")] {
        let make = "DROP PUBLICATION IF EXISTS of_all; CREATE PUBLICATION of_all FOR ALL TABLES";
        fixture.client.batch_execute(make).await.unwrap();
        let flags = [&PRESET[..], &["--publication", publication, "--slot", slot]].concat();
        fixture.setup(&flags).results();
        let altered = format!("ALTER PUBLICATION {publication} SET (publish = 'delete')");
        fixture.client.batch_execute(&altered).await.unwrap();
        let setup = fixture.setup(&flags);
        let complaint = setup.complaint(5);
        assert!(
            complaint.contains("set up another --slot with another --publication")
                && !complaint.contains(" SET "),
            "{complaint}"
        );
    }
}

/// What is left out of other tables is of no matter.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_table_of_the_publication_may_be_filtered() {
    let fixture = fixture().await;
    if !has_filters(&fixture).await {
        return;
    }
    let make = "CREATE PUBLICATION postbox FOR TABLE outbox, business WHERE (id > 5)";
    fixture.client.batch_execute(make).await.unwrap();
    fixture.setup(&PRESET).results();
}

/// The slot may hold rows that a cleaner has deleted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_becomes_of_the_order_is_told_where_all_rows_may_be_sent_first() {
    // Slots of others would keep this one from being surely younger than the publication.
    let fixture = with_tables(Fixture::with_postgres(&[]).await).await;
    let slot = &fixture.contract.slot;
    for make in [
        "CREATE PUBLICATION postbox FOR TABLE outbox",
        "INSERT INTO outbox VALUES (gen_random_uuid(), 'a', 'a', 'x', '{}')",
        &format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')"),
    ] {
        fixture.client.batch_execute(make).await.unwrap();
    }
    let setup = fixture.setup(&PRESET);
    let complaint = setup.complaint(4);
    assert!(
        complaint.contains("and a later row of a key before an earlier one"),
        "{complaint}"
    );
}
