//! `postbox setup`, as its users run it.

mod publication;
mod roles;
mod script;
pub(crate) mod slot;

use postbox::catalog::SCHEMA_VERSION;
use postbox::contract::Contract;

use crate::support::{Fixture, Relay, run_script, statement};

/// What set-up says of an empty database.
fn all_created(fixture: &Fixture) -> String {
    let slot = &fixture.contract.slot;
    format!(
        "schema \"postbox\": created\n\
         tables of schema \"postbox\", version {SCHEMA_VERSION}: created\n\
         publication \"postbox\": created\n\
         replication slot \"{slot}\": created\n"
    )
}

/// What it says when there is nothing to do.
fn all_there(fixture: &Fixture) -> String {
    let Contract {
        schema,
        slot,
        publication,
        ..
    } = &fixture.contract;
    format!(
        "tables of schema \"{schema}\", version {SCHEMA_VERSION}: already there\n\
         publication \"{publication}\": already there\n\
         replication slot \"{slot}\": already there\n"
    )
}

async fn count(fixture: &Fixture, sql: &str) -> i64 {
    fixture.client.query_one(sql, &[]).await.unwrap().get(0)
}

async fn slots(fixture: &Fixture) -> i64 {
    let slot = &fixture.contract.slot;
    let sql = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{slot}'");
    count(fixture, &sql).await
}

/// Leaves the tables and the publication, as if there had never been a slot.
async fn forget_slot(fixture: &Fixture) {
    let sql = format!(
        "SELECT pg_drop_replication_slot('{}'); DELETE FROM postbox.checkpoint",
        fixture.contract.slot
    );
    fixture.client.batch_execute(&sql).await.unwrap();
}

/// A relay runs on what was set up.
async fn assert_events_flow(fixture: &Fixture, flags: &[&str]) {
    let relay = Relay::streaming(fixture, flags).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.records().await.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_set_up_makes_everything_and_the_second_finds_it_there() {
    let fixture = Fixture::empty().await;
    assert_eq!(fixture.setup(&[]).results(), all_created(&fixture));
    assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
    assert_events_flow(&fixture, &[]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_at_once_one_makes_everything_and_the_other_finds_it_there() {
    let fixture = Fixture::empty().await;
    let (one, other) = std::thread::scope(|scope| {
        let one = scope.spawn(|| fixture.setup(&[]));
        let other = scope.spawn(|| fixture.setup(&[]));
        (one.join().unwrap(), other.join().unwrap())
    });
    let mut results = [one.results(), other.results()];
    results.sort_unstable();
    assert_eq!(results, [all_created(&fixture), all_there(&fixture)]);
    let rows = count(&fixture, "SELECT count(*) FROM postbox.checkpoint").await;
    assert_eq!((slots(&fixture).await, rows), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_names_work_from_set_up_to_kafka() {
    for (schema, publication) in [
        ("My Schema", "My Publication"),
        ("Sch\"e'ma", "Päb\"l'ic; --"),
    ] {
        let mut fixture = Fixture::empty().await;
        let slot = &fixture.contract.slot;
        fixture.contract = Contract::new(schema, slot, publication).unwrap();
        fixture.setup(&[]).results();
        assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
        let emit = format!(
            "SELECT {}($1, 'a', 'b', '{{}}', idempotency_key => 'k')",
            fixture.contract.table("emit")
        );
        let relay = Relay::streaming(&fixture, &["--heartbeat-interval", "1s"]).await;
        for _ in 0..2 {
            fixture
                .client
                .query(&emit, &[&fixture.topic])
                .await
                .unwrap();
        }
        fixture.insert("a", "{}").await;
        fixture.wait_for_confirmation().await;
        relay.drain().await;
        assert_eq!(fixture.records().await.len(), 2, "{schema}");
        // What it tells people to run has the names right.
        let drop = format!(
            "SELECT pg_drop_replication_slot('{}')",
            fixture.contract.slot
        );
        fixture.client.batch_execute(&drop).await.unwrap();
        fixture.setup(&[]).complaint(4);
        fixture.recover(&["--skip-missed"]).results();
        // The script knows them too.
        let script = script::script(&fixture, &["--backfill", "none"]);
        run_script(&fixture.client, &script).await.unwrap();
        assert_eq!(fixture.setup(&[]).results(), all_there(&fixture));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_schema_of_a_later_version_is_left_alone() {
    let fixture = Fixture::empty().await;
    fixture.setup(&[]).results();
    let later = SCHEMA_VERSION + 1;
    let newer = format!("INSERT INTO postbox.migration (version) VALUES ({later})");
    fixture.client.batch_execute(&newer).await.unwrap();
    let expected = format!(
        "error: schema \"postbox\" has version {later}, newer than this program knows ({SCHEMA_VERSION})"
    );
    let setup = fixture.setup(&[]);
    let complaint = setup.complaint(3);
    assert!(complaint.starts_with(&expected), "{complaint}");
    // A relay goes on: set-up comes before the relays when both are upgraded.
    assert_events_flow(&fixture, &[]).await;
    // Also where there is no slot yet.
    forget_slot(&fixture).await;
    let setup = fixture.setup(&[]);
    let complaint = setup.complaint(3);
    assert!(complaint.starts_with(&expected), "{complaint}");
    assert_eq!(slots(&fixture).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_does_not_replicate_is_refused_with_the_setting_that_mends_it() {
    let settings = [
        "wal_level=replica",
        "max_replication_slots=0",
        "max_wal_senders=0",
    ];
    let mut fixture = Fixture::with_postgres(&settings).await;
    // One after another: each statement takes us to the next refusal.
    let occupy = "SELECT pg_create_physical_replication_slot('of_others_' || n) \
                  FROM generate_series(1, current_setting('max_replication_slots')::integer) AS n";
    for (code, why, mend) in [
        (
            3,
            "wal_level is \"replica\" and must be \"logical\"",
            "SET wal_level",
        ),
        (
            4,
            "no replication slot is free, max_replication_slots is 0",
            "SET max_replication_slots",
        ),
        (
            4,
            "no replication slot is free, max_replication_slots is 4",
            "SET max_replication_slots",
        ),
        (
            3,
            "no WAL sender is free, max_wal_senders is 0",
            "SET max_wal_senders",
        ),
    ] {
        let setup = fixture.setup(&[]);
        let complaint = setup.complaint(code);
        assert!(complaint.contains(why), "{complaint}");
        assert!(complaint.contains(mend), "{complaint}");
        assert!(
            complaint.trim_end().ends_with("then restart Postgres"),
            "{complaint}"
        );
        let mend = statement(complaint, "ALTER SYSTEM");
        fixture.client.batch_execute(mend).await.unwrap();
        fixture.restart_postgres().await;
        if mend.ends_with("max_replication_slots = 4") {
            fixture.client.batch_execute(occupy).await.unwrap();
        }
    }
    assert_eq!(fixture.setup(&[]).results(), all_created(&fixture));
}
