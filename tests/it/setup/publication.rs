//! A publication that is wrong, and the statement that mends it.

use super::{all_there, assert_events_flow, count, forget_slot, slots};
use crate::support::{Fixture, Relay, statement};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_publication_is_refused_with_the_statement_that_mends_it() {
    let fixture = Fixture::empty().await;
    fixture.setup(&[]).results();
    let other = "CREATE TABLE other (x integer PRIMARY KEY)";
    fixture.client.batch_execute(other).await.unwrap();
    let has_filters = version(&fixture).await >= 150_000;
    let for_outbox =
        "CREATE PUBLICATION postbox FOR TABLE postbox.outbox WITH (publish = 'insert')";
    for (make, why, mend, since_15) in [
        (
            "ALTER PUBLICATION postbox SET (publish = 'insert, update')",
            "must publish inserts and nothing else",
            "ALTER PUBLICATION",
            false,
        ),
        (
            "ALTER PUBLICATION postbox SET (publish = '')",
            "must publish inserts and nothing else",
            "ALTER PUBLICATION",
            false,
        ),
        (
            "ALTER PUBLICATION postbox ADD TABLE other",
            "publishes other too",
            "ALTER PUBLICATION",
            false,
        ),
        (
            "ALTER PUBLICATION postbox SET TABLE other",
            "publishes other too",
            "ALTER PUBLICATION",
            false,
        ),
        (
            "ALTER PUBLICATION postbox DROP TABLE postbox.outbox",
            "does not publish \"postbox\".\"outbox\"",
            "ALTER PUBLICATION",
            false,
        ),
        (
            &format!("DROP PUBLICATION postbox; {for_outbox}"),
            "does not publish partitions under the name of their table",
            "ALTER PUBLICATION",
            false,
        ),
        (
            "DROP PUBLICATION postbox; CREATE PUBLICATION postbox FOR ALL TABLES",
            "is FOR ALL TABLES",
            "DROP PUBLICATION",
            false,
        ),
        (
            "ALTER PUBLICATION postbox SET TABLE postbox.outbox WHERE (seq > 5)",
            "has a row filter or a column list",
            "ALTER PUBLICATION",
            true,
        ),
        (
            "ALTER PUBLICATION postbox SET TABLE postbox.outbox (seq, id)",
            "has a row filter or a column list",
            "ALTER PUBLICATION",
            true,
        ),
        (
            "ALTER PUBLICATION postbox ADD TABLES IN SCHEMA public",
            "publishes all tables of public",
            "ALTER PUBLICATION",
            true,
        ),
    ] {
        if since_15 && !has_filters {
            continue;
        }
        forget_slot(&fixture).await;
        fixture.client.batch_execute(make).await.unwrap();
        let setup = fixture.setup(&[]);
        let complaint = setup.complaint(5);
        assert!(complaint.contains(why), "after {make}: {complaint}");
        assert_eq!(slots(&fixture).await, 0, "after {make}");
        let mend = statement(complaint, mend);
        fixture.client.batch_execute(mend).await.unwrap();
        fixture.setup(&[]).results();
        assert_eq!(
            fixture.setup(&[]).results(),
            all_there(&fixture),
            "after {make}"
        );
    }
    assert_events_flow(&fixture, &[]).await;
}

/// The relay and set-up refuse with the same words, which say how to go on.
async fn complaint(fixture: &Fixture) -> String {
    let mut relay = Relay::start(fixture, &[]);
    assert_eq!(relay.exit_code().await, 5, "{}", relay.log());
    let setup = fixture.setup(&[]);
    let complaint = setup.complaint(5).trim_end();
    let says = complaint.strip_prefix("error: ").unwrap();
    assert!(relay.log().contains(says), "{}\n{says}", relay.log());
    complaint.to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_changed_after_set_up_is_mended_by_what_it_says() {
    let fixture = Fixture::empty().await;
    fixture.setup(&[]).results();
    let made_again = "BEGIN; DROP PUBLICATION postbox; \
                      CREATE PUBLICATION postbox FOR TABLE postbox.outbox; COMMIT";
    for (change, what, mend) in [
        (
            "ALTER PUBLICATION postbox SET (publish = 'insert, delete')",
            "has other options than when the slot was set up, and must publish inserts and nothing else: ",
            "ALTER PUBLICATION",
        ),
        (
            "ALTER PUBLICATION postbox SET (publish = 'delete'); ALTER PUBLICATION postbox SET (publish = 'insert')",
            "was altered after the slot was set up: ",
            "",
        ),
        (
            "ALTER PUBLICATION postbox DROP TABLE postbox.outbox",
            "does not hold the tables that it held when the slot was set up, and does not publish ",
            "ALTER PUBLICATION",
        ),
        (
            "ALTER PUBLICATION postbox DROP TABLE postbox.outbox; ALTER PUBLICATION postbox ADD TABLE postbox.outbox",
            "had its tables taken out and put back after the slot was set up: ",
            "",
        ),
        (
            made_again,
            "was dropped and made again after the slot was set up, and must publish inserts and nothing else: ",
            "ALTER PUBLICATION",
        ),
    ] {
        fixture.client.batch_execute(change).await.unwrap();
        let complaint = complaint(&fixture).await;
        assert!(complaint.contains(what), "after {change}: {complaint}");
        if !mend.is_empty() {
            let mend = statement(&complaint, mend);
            fixture.client.batch_execute(mend).await.unwrap();
        }
        assert!(complaint.ends_with("run `postbox recover`"), "{complaint}");
        fixture.recover(&[]).results();
        assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
    }
    assert_events_flow(&fixture, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_that_is_gone_is_made_again_by_what_it_says() {
    let fixture = Fixture::empty().await;
    fixture.setup(&[]).results();
    let gone = "DROP PUBLICATION postbox";
    fixture.client.batch_execute(gone).await.unwrap();
    let complaint = complaint(&fixture).await;
    let what = "publication \"postbox\" does not exist: the slot may skip rows";
    assert!(complaint.contains(what), "{complaint}");
    let mend = statement(&complaint, "CREATE PUBLICATION");
    fixture.client.batch_execute(mend).await.unwrap();
    fixture.recover(&[]).results();
    assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
    assert_events_flow(&fixture, &[]).await;
}

async fn version(fixture: &Fixture) -> i64 {
    let sql = "SELECT current_setting('server_version_num')::bigint";
    count(fixture, sql).await
}

/// The slot cannot pass what it was called then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outbox_that_had_another_name_for_a_while_is_recovered() {
    let fixture = Fixture::new().await;
    let renamed = [
        "ALTER TABLE postbox.outbox RENAME TO o2",
        "INSERT INTO postbox.o2 (aggregate_type, aggregate_id, event_type) VALUES ($1, 'a', 'x')",
        "ALTER TABLE postbox.o2 RENAME TO outbox",
    ];
    fixture.client.batch_execute(renamed[0]).await.unwrap();
    let inserted = fixture.client.execute(renamed[1], &[&fixture.topic]).await;
    inserted.unwrap();
    fixture.client.batch_execute(renamed[2]).await.unwrap();
    let mut relay = Relay::start(&fixture, &[]);
    assert_eq!(relay.exit_code().await, 5, "{}", relay.log());
    let way_out = "drop the slot and run `postbox recover`";
    assert!(relay.log().contains(way_out), "{}", relay.log());
    fixture.drop_slot().await;
    fixture.recover(&[]).results();
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["a"]);
}
