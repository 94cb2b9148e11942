//! The tables of others.

use super::WEEK;
use crate::support::{Fixture, Output, Relay, wait_until};

const OMNI_BOX: [&str; 2] = ["--table-preset", "omni-box"];

/// What was done to the rows of this table: how many were removed, how many claims released.
fn done(output: &Output, table: &str) -> (u64, u64) {
    let number = |what: &str| {
        let rest = output.results().split_once(&format!("{table}: {what}"));
        let rest = rest.unwrap_or_else(|| panic!("no {what} in {output:?}")).1;
        rest.lines()
            .next()
            .unwrap()
            .split_once(": ")
            .unwrap()
            .1
            .parse()
            .unwrap()
    };
    (number("rows "), number("stale claims "))
}

/// Rows of omni-box's table, by status and age in days; of those that are pending, what is
/// claimed so many seconds ago.
const ROWS: &str = "\
    INSERT INTO outbox_events (id, event_type, payload, status, attempts_made, max_attempts, scheduled_at, created_at, \
        completed_at, locked_at, locked_by, aggregate_type, aggregate_id, topic, partition_key) \
    SELECT gen_random_uuid(), 'changed', '{}', r.status, 0, 6, now(), now() - interval '30 days', \
        CASE r.status WHEN 'completed' THEN now() - r.days * interval '1 day' END, now() - r.claimed * interval '1 s', \
        CASE WHEN r.claimed IS NOT NULL THEN 'worker' END, 'order', gen_random_uuid(), 't', r.status || ' ' || r.days \
    FROM (VALUES ('completed', 8, NULL::integer, 1200), ('completed', 6, NULL, 3), ('failed', 8, NULL, 3), \
        ('pending', 8, NULL, 3), ('pending', 9, 10, 3), ('pending', 10, 400, 3)) AS r (status, days, claimed, number), \
        generate_series(1, r.number)";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn completed_rows_of_omni_box_go_and_stale_claims_are_released() {
    let fixture = Fixture::omni_box().await;
    fixture.sql(ROWS).await;
    // Somebody is at one of them.
    let other = crate::support::connect(&fixture.database_url).await;
    let lock =
        "BEGIN; SELECT FROM outbox_events WHERE partition_key = 'completed 8' LIMIT 1 FOR UPDATE";
    other.batch_execute(lock).await.unwrap();
    let flags = [&WEEK[..], &OMNI_BOX, &["--batch", "100"]].concat();
    let table = "\"public\".\"outbox_events\"";
    let dry = fixture.cleanup(&[&flags[..], &["--dry-run"]].concat());
    assert_eq!(done(&dry, table), (1_200, 3));
    assert_eq!(done(&fixture.cleanup(&flags), table), (1_199, 3));
    other.batch_execute("ROLLBACK").await.unwrap();
    assert_eq!(done(&fixture.cleanup(&flags), table), (1, 0));
    let left = "SELECT string_agg(k, ', ' ORDER BY k) FROM ( \
                    SELECT partition_key || ' ' || count(*) || ' ' || count(locked_at) AS k FROM outbox_events GROUP BY partition_key) AS k";
    let left: String = fixture.client.query_one(left, &[]).await.unwrap().get(0);
    assert_eq!(
        left,
        "completed 6 3 0, failed 8 3 0, pending 10 3 0, pending 8 3 0, pending 9 3 3"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_claims_removes_what_it_has_completed() {
    let fixture = Fixture::omni_box().await;
    fixture.omni_box_backlog(500, 10).await;
    let flags = [
        &["--mode", "poll"][..],
        &OMNI_BOX,
        &["--cleanup-interval", "1s", "--cleanup-older-than", "1s"],
    ]
    .concat();
    let mut relay = Relay::start(&fixture, &flags);
    relay.wait_for_log("polling").await;
    wait_until("all is removed, and counted", async || {
        let (_, text) = relay.get("/metrics");
        text.contains("\npostbox_cleaned_rows_total{table=\"outbox_events\"} 500\n")
    })
    .await;
    assert_eq!(fixture.count("outbox_events").await, 0);
    relay.drain().await;
    assert_eq!(fixture.verdict().await.lost.len(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn published_rows_of_spakky_go_and_stale_claims_are_released() {
    let fixture = Fixture::spakky().await;
    fixture
        .sql(
            "INSERT INTO spakky_event_outbox (id, event_name, payload, headers, created_at, published_at, retry_count, claimed_at) \
             SELECT gen_random_uuid(), r.name, '', '{}', now() - interval '30 days', now() - r.days * interval '1 day', \
                 r.tries, now() - r.claimed * interval '1 s' \
             FROM (VALUES ('old', 8, 0, NULL::integer), ('new', 6, 0, NULL), ('given up', NULL, 5, NULL), ('pending', NULL, 0, NULL), \
                 ('claimed', NULL, 0, 10), ('stale', NULL, 0, 400)) AS r (name, days, tries, claimed)",
        )
        .await;
    let flags = [&WEEK[..], &["--table-preset", "spakky"]].concat();
    let done = done(
        &fixture.cleanup(&flags),
        "\"public\".\"spakky_event_outbox\"",
    );
    assert_eq!(done, (1, 1));
    let left = "SELECT string_agg(event_name, ',' ORDER BY event_name), count(claimed_at) FROM spakky_event_outbox";
    let left = fixture.client.query_one(left, &[]).await.unwrap();
    assert_eq!(
        left.get::<_, String>(0),
        "claimed,given up,new,pending,stale"
    );
    assert_eq!(left.get::<_, i64>(1), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_can_tell_of_a_table_is_refused() {
    let fixture = Fixture::empty().await;
    let debezium = ["--table-preset", "debezium"];
    for (flags, code, expected) in [
        (
            &debezium[..],
            2,
            "--table-preset debezium cannot be cleaned up: its rows do not say",
        ),
        (&OMNI_BOX, 3, "\"public\".\"outbox_events\" does not exist"),
        (&[], 3, "schema \"postbox\" has no outbox"),
    ] {
        let refused = fixture.cleanup(&[&WEEK[..], flags].concat());
        let complaint = refused.complaint(code);
        assert!(complaint.contains(expected), "{complaint}");
    }
    let eager = ["--cleanup-interval", "1s", "--cleanup-older-than", "1s"];
    let mut relay = Relay::start(&fixture, &[&debezium[..], &eager].concat());
    assert_eq!(relay.exit_code().await, 2, "{}", relay.log());
    assert!(
        relay
            .log()
            .contains("--cleanup-interval fights --table-preset debezium")
    );
    let mut relay = Relay::start(&fixture, &eager[..2]);
    assert_eq!(relay.exit_code().await, 2, "{}", relay.log());
    assert!(
        relay.log().contains("--cleanup-older-than"),
        "{}",
        relay.log()
    );
}
