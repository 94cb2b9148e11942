//! What cleaning up takes.

use super::{FENCES, WEEK, removed};
use crate::support::{Fixture, Relay, connect};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cleanup_role_can_clean_up_and_nothing_else() {
    let fixture = Fixture::new().await;
    let (role, url) = fixture.role("Cleanup").await;
    let granted = format!("grants to cleanup role \"{role}\": created\n");
    let relay_role = ["--grant-to", role.as_str()];
    fixture.publish_old(&["a"]).await;
    // A relay's rights are not enough.
    fixture.setup(&relay_role).results();
    let refused = fixture.cleanup_as(&url, &WEEK);
    let complaint = refused.complaint(6);
    assert!(
        complaint.contains("clean \"postbox\".\"outbox\"")
            && complaint.contains("`postbox setup --grant-cleanup-to ROLE`"),
        "{complaint}"
    );
    let revoke = format!(
        "REVOKE ALL ON ALL TABLES IN SCHEMA postbox FROM \"{role}\"; REVOKE ALL ON ALL FUNCTIONS IN SCHEMA postbox FROM \"{role}\"; \
         REVOKE ALL ON SCHEMA postbox FROM \"{role}\"; ALTER ROLE \"{role}\" NOREPLICATION"
    );
    fixture.sql(&revoke).await;
    let setup = fixture.setup(&["--grant-cleanup-to", &role]);
    assert!(setup.results().ends_with(&granted), "{setup:?}");
    let again = fixture.setup(&["--grant-cleanup-to", &role]);
    assert!(
        again
            .results()
            .ends_with(&granted.replace("created", "already there"))
    );
    assert_eq!(removed(&fixture.cleanup_as(&url, &WEEK), "outbox"), 1);
    let forget = fixture.cleanup_as(&url, &["--forget", &fixture.contract.slot]);
    let complaint = forget.complaint(6);
    assert!(
        complaint.contains("is for the owner of the schema"),
        "{complaint}"
    );
    let client = connect(&url).await;
    for statement in [
        "INSERT INTO postbox.outbox (aggregate_type, aggregate_id, event_type) VALUES ('a', 'b', 'c')",
        "UPDATE postbox.outbox SET topic = 'x'",
        "TRUNCATE postbox.outbox",
        "UPDATE postbox.parked SET status = 'skipped'",
        "UPDATE postbox.checkpoint SET lsn = NULL",
        "DELETE FROM postbox.checkpoint",
        "DELETE FROM postbox.slice",
        "CREATE TABLE postbox.mine ()",
    ] {
        let refused = client.batch_execute(statement).await.unwrap_err();
        let code = refused.code().map(|code| code.code().to_owned());
        assert_eq!(code.as_deref(), Some("42501"), "{statement}");
    }
}

/// Without the right it says so, and the relay goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_may_not_clean_up_says_so_and_relays() {
    let fixture = Fixture::new().await;
    let (role, url) = fixture.role("Relay").await;
    fixture.setup(&["--grant-to", &role]).results();
    let flags = [
        &FENCES[..],
        &[
            "--database-url",
            &url,
            "--cleanup-interval",
            "1s",
            "--cleanup-older-than",
            "1s",
        ],
    ]
    .concat();
    let mut relay = Relay::streaming(&fixture, &flags).await;
    fixture.insert("a", "{}").await;
    relay
        .wait_for_log("cleaning up again later: clean \"postbox\".\"outbox\"")
        .await;
    assert!(
        relay
            .log()
            .contains("`postbox setup --grant-cleanup-to ROLE`")
    );
    fixture.insert("b", "{}").await;
    fixture.wait_for_fence(&fixture.contract.slot).await;
    fixture.setup(&["--grant-cleanup-to", &role]).results();
    relay.wait_for_log("removed old rows").await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["a", "b"]);
}

/// Whatever is refused first: the schema, a table, or a function.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_not_clean_up_is_told_of_the_grant_that_lets_it() {
    let fixture = Fixture::empty().await;
    let (role, url) = fixture.role("Stranger").await;
    fixture.setup(&["--partitioned", "day"]).results();
    let read = format!("GRANT SELECT ON ALL TABLES IN SCHEMA postbox TO \"{role}\"");
    let list = format!("GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA postbox TO \"{role}\"");
    let usage = format!("GRANT USAGE ON SCHEMA postbox TO \"{role}\"");
    for grant in ["SELECT", &usage, &read] {
        fixture.sql(grant).await;
        let refused = fixture.cleanup_as(&url, &WEEK);
        let complaint = refused.complaint(6);
        assert!(
            complaint.contains("`postbox setup --grant-cleanup-to ROLE`")
                && !complaint.contains("--grant-to"),
            "{grant}: {complaint}"
        );
    }
    fixture.sql(&list).await;
    fixture.insert("a", "{}").await;
    let refused = fixture.cleanup_as(&url, &WEEK);
    let complaint = refused.complaint(6);
    assert!(complaint.contains("--grant-cleanup-to"), "{complaint}");
    let (_, url) = fixture.role("Nobody").await;
    let refused = fixture.cleanup_as(&url, &["--forget", &fixture.contract.slot]);
    let complaint = refused.complaint(6);
    assert!(
        complaint.contains("is for the owner of the schema") && !complaint.contains("--grant-to"),
        "{complaint}"
    );
}
