//! Setting polling up.

use postbox::catalog::SCHEMA_VERSION;

use super::{POLL, polling};
use crate::support::{Fixture, Relay, run_script, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn says_what_it_makes_and_finds() {
    let fixture = Fixture::with_postgres(&["wal_level=minimal", "max_wal_senders=0"]).await;
    let name = &fixture.contract.slot;
    let expected = format!(
        "schema \"postbox\": created\n\
         tables of schema \"postbox\", version {SCHEMA_VERSION}: created\n\
         index \"postbox\".\"outbox_xid_idx\": created\n\
         relay \"{name}\", which polls: created\n"
    );
    assert_eq!(fixture.setup(&POLL).results(), expected);
    let expected = format!(
        "tables of schema \"postbox\", version {SCHEMA_VERSION}: already there\n\
         index \"postbox\".\"outbox_xid_idx\": already there\n\
         relay \"{name}\", which polls: already there\n"
    );
    assert_eq!(fixture.setup(&POLL).results(), expected);
    let relay = polling(&fixture, &[]).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_checkpoint().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["a"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_from_before_are_published_or_not_as_it_is_told() {
    for (backfill, expected) in [("none", &["new"][..]), ("pending", &["new", "old"])] {
        let fixture = Fixture::empty().await;
        fixture.setup(&POLL).results();
        let forget = "DELETE FROM postbox.checkpoint";
        fixture.client.batch_execute(forget).await.unwrap();
        fixture.insert("old", "{}").await;
        let setup = fixture.setup(&POLL);
        assert!(
            setup.complaint(4).contains("has rows already: 1;"),
            "{setup:?}"
        );
        let flags = [&POLL[..], &["--backfill", backfill]].concat();
        fixture.setup(&flags).results();
        let relay = polling(&fixture, &[]).await;
        fixture.insert("new", "{}").await;
        fixture.wait_for_checkpoint().await;
        relay.drain().await;
        assert_eq!(fixture.keys().await, expected, "{backfill}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_from_before_a_slot_are_published_first_if_it_is_told() {
    let fixture = Fixture::new().await;
    fixture.drop_slot().await;
    let forget = "DELETE FROM postbox.checkpoint";
    fixture.client.batch_execute(forget).await.unwrap();
    fixture.insert("old", "{}").await;
    let setup = fixture.setup(&["--backfill", "pending"]);
    assert!(
        setup
            .results()
            .contains("rows in the outbox before it: 1; they are sent first"),
        "{setup:?}"
    );
    let relay = Relay::streaming(&fixture, &[]).await;
    fixture.insert("new", "{}").await;
    fixture.wait_for_confirmation().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["new", "old"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_needs_no_right_to_replicate() {
    let fixture = Fixture::empty().await;
    let (role, url) = fixture.role("relay").await;
    let flags = [&POLL[..], &["--grant-to", &role]].concat();
    let setup = fixture.setup(&flags);
    assert!(!setup.results().contains("replication"), "{setup:?}");
    let relay = polling(&fixture, &["--database-url", &url]).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_checkpoint().await;
    relay.drain().await;
    assert_eq!(fixture.keys().await, ["a"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_printed_script_does_the_same() {
    let fixture = Fixture::with_postgres(&["wal_level=minimal", "max_wal_senders=0"]).await;
    let flags = [&POLL[..], &["--print", "--notify", "true"]].concat();
    let script = fixture.setup(&flags).results().to_owned();
    for _ in 0..2 {
        run_script(&fixture.client, &script).await.unwrap();
    }
    let flags = [&POLL[..], &["--notify", "true"]].concat();
    let setup = fixture.setup(&flags);
    assert!(!setup.results().contains("created"), "{setup:?}");
    let relay = polling(&fixture, &[]).await;
    fixture.insert("a", "{}").await;
    fixture.wait_for_checkpoint().await;
    relay.drain().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_notification_wakes_the_relay() {
    let fixture = Fixture::polling().await;
    let notify = [&POLL[..], &["--notify", "true"]].concat();
    let setup = fixture.setup(&notify);
    let note = "created (relays listen from their next start)";
    assert!(setup.results().contains(note), "{setup:?}");
    let slow = ["--poll-interval-min", "10ms", "--poll-interval-max", "1m"];
    let relay = polling(&fixture, &slow).await;
    // So that the pauses are long by now, were it not woken.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    for key in ["a", "b", "c"] {
        fixture.insert(key, "{}").await;
        let since = std::time::Instant::now();
        fixture.wait_for_checkpoint().await;
        assert!(since.elapsed() < std::time::Duration::from_secs(2), "{key}");
    }
    relay.drain().await;
    let off = [&POLL[..], &["--notify", "false"]].concat();
    assert!(fixture.setup(&off).results().contains("dropped"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_polling_stands_on_is_checked() {
    let fixture = Fixture::polling().await;
    for (harm, complaint, mend) in [
        (
            "DROP INDEX postbox.outbox_xid_idx",
            "has no valid index on xid: run `postbox setup --mode poll`",
            "",
        ),
        (
            "ALTER TABLE postbox.outbox ALTER COLUMN seq SET CACHE 20",
            "numbers of \"postbox\".\"outbox\" do not rise with its rows",
            "ALTER TABLE postbox.outbox ALTER COLUMN seq SET CACHE 1 SET INCREMENT BY 1",
        ),
    ] {
        fixture.client.batch_execute(harm).await.unwrap();
        let mut relay = Relay::start(&fixture, &POLL);
        assert_eq!(relay.exit_code().await, 3, "{}", relay.log());
        assert!(relay.log().contains(complaint), "{}", relay.log());
        if !mend.is_empty() {
            assert!(fixture.setup(&POLL).complaint(3).contains(complaint));
            fixture.client.batch_execute(mend).await.unwrap();
        }
        fixture.setup(&POLL).results();
    }
    polling(&fixture, &[]).await.drain().await;
}

/// It reads as it was set up, and says once why not otherwise.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_that_may_choose_says_how_it_reads_and_why() {
    const AUTO: [&str; 2] = ["--mode", "auto"];
    let says = async |fixture: &mut Fixture, flags: &[&str], expected: &str| {
        let mut relay = Relay::start(fixture, &[&AUTO, flags].concat());
        relay.wait_for_log(expected).await;
        fixture.insert("a", "{}").await;
        wait_until("it is delivered", async || {
            relay.published(&fixture.topic) > 0
        })
        .await;
        if fixture.postgres.is_some() {
            fixture.restart_postgres().await;
            wait_until("it reads again", async || relay.get("/readyz").0 == 200).await;
        }
        assert_eq!(
            relay.log().matches("--mode auto").count(),
            1,
            "{}",
            relay.log()
        );
        relay.drain().await;
    };
    let polls = "--mode auto: the table is read, as it was set up; a replication slot is ";

    let mut fixture = Fixture::with_postgres(&["wal_level=replica"]).await;
    let why = "not to be had: wal_level is \"replica\" and must be \"logical\"";
    let setup = fixture.setup(&AUTO);
    let chosen = format!("mode poll: chosen (a replication slot is {why}");
    assert!(setup.results().contains(&chosen), "{setup:?}");
    says(&mut fixture, &[], &format!("{polls}{why}")).await;

    let mut fixture = Fixture::empty().await;
    let (role, url) = fixture.role("relay").await;
    fixture
        .setup(&[&POLL[..], &["--grant-to", &role]].concat())
        .results();
    let why = format!("not to be had: role \"{role}\" may not replicate");
    says(
        &mut fixture,
        &["--database-url", &url],
        &format!("{polls}{why}"),
    )
    .await;
    says(&mut fixture, &[], &format!("{polls}to be had by now")).await;
    fixture.setup(&["--mode", "wal"]).results();
    says(
        &mut fixture,
        &[],
        "--mode auto: a replication slot is read, as it was set up",
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_relay_without_a_set_up_names_its_own() {
    let fixture = Fixture::empty().await;
    for mode in ["poll", "auto"] {
        let mut relay = Relay::start(&fixture, &["--mode", mode]);
        assert_eq!(relay.exit_code().await, 4, "{}", relay.log());
        let command = format!("run `postbox setup --mode {mode}`");
        assert!(relay.log().contains(&command), "{}", relay.log());
    }
}
