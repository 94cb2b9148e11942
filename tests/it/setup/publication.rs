//! A publication that is wrong, and the statement that mends it.

use super::{all_there, assert_events_flow, count, forget_slot, slots, statement};
use crate::support::Fixture;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_publication_is_refused_with_the_statement_that_mends_it() {
    let fixture = Fixture::empty().await;
    fixture.setup(&[]).results();
    let other = "CREATE TABLE other (x integer PRIMARY KEY)";
    fixture.client.batch_execute(other).await.unwrap();
    let version = "SELECT current_setting('server_version_num')::bigint";
    let has_filters = count(&fixture, version).await >= 150_000;
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
            "DROP PUBLICATION",
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_changed_after_set_up_is_mended_by_what_it_says() {
    let fixture = Fixture::empty().await;
    fixture.setup(&[]).results();
    let change = "ALTER PUBLICATION postbox SET (publish = 'insert, delete')";
    fixture.client.batch_execute(change).await.unwrap();
    let setup = fixture.setup(&[]);
    let complaint = setup.complaint(5);
    assert!(
        complaint.contains("is not what it was when the slot was set up"),
        "{complaint}"
    );
    // To go on is for a person to decide, who then still hears what is wrong.
    let go_on = statement(complaint, "UPDATE ");
    fixture.client.batch_execute(go_on).await.unwrap();
    let setup = fixture.setup(&[]);
    let mend = statement(setup.complaint(5), "ALTER PUBLICATION");
    fixture.client.batch_execute(mend).await.unwrap();
    assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
    assert_events_flow(&fixture, &[]).await;
}
