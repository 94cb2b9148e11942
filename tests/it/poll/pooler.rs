//! Through PgBouncer in transaction mode, which lends the server's sessions to others
//! between two transactions.

use std::time::Duration;

use postbox::servers::Server;
use tokio_postgres::SimpleQueryMessage;

use super::{POLL, polling};
use crate::support::{Fixture, Relay, wait_until};

/// A Postgres of the test's own, set up for polling, a PgBouncer before it, and the URL
/// through it. Nothing where there is no PgBouncer.
pub(super) async fn behind_pgbouncer() -> Option<(Fixture, Server, String)> {
    let fixture = Fixture::with_postgres(&[]).await;
    let postgres = fixture.postgres.as_ref().expect("a Postgres of its own");
    // Few sessions, so that each is lent to many.
    let settings = ["default_pool_size = 3"];
    let Ok(pgbouncer) = Server::pgbouncer(postgres, &settings) else {
        eprintln!("not tested: there is no PgBouncer");
        return None;
    };
    fixture.set_up_polling().await;
    let (port, database) = (pgbouncer.fact("port"), &fixture.contract.slot);
    let url = format!("postgresql://postgres@127.0.0.1:{port}/{database}?sslmode=disable");
    Some((fixture, pgbouncer, url))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_polls_through_a_pooler() {
    let Some((fixture, _pgbouncer, url)) = behind_pgbouncer().await else {
        return;
    };
    let through = ["--database-url", &*url];
    let writers = fixture.writers(fixture.load());
    for _ in 0..3 {
        let relay = polling(&fixture, &through).await;
        tokio::time::sleep(Duration::from_millis(1500)).await;
        relay.kill();
    }
    let relay = polling(&fixture, &through).await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge_polling(relay).await;
    assert!(
        verdict.committed > 500 && verdict.is_clean(3 * 12_000),
        "{verdict}"
    );
}

/// The trigger does no harm, though nothing is heard of it; and what others set in the
/// sessions that they are lent is not ours.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_are_shared_with_others_and_left_as_they_were() {
    let Some((fixture, _pgbouncer, url)) = behind_pgbouncer().await else {
        return;
    };
    let notify = [&POLL[..], &["--notify", "true"]].concat();
    fixture.setup(&notify).results();
    let relay = polling(&fixture, &["--database-url", &url]).await;
    let other = crate::support::connect(&url).await;
    for round in 0..20 {
        let odd = "SET timezone = 'Asia/Tokyo'; SET datestyle = 'German'; SET row_security = off";
        other.batch_execute(odd).await.unwrap();
        fixture
            .insert("a", &format!("{{\"round\": {round}}}"))
            .await;
        let said = other.simple_query("SHOW enable_seqscan").await.unwrap();
        let mut rows = said.iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        assert_eq!(rows.next(), Some("on"));
    }
    fixture.wait_for_checkpoint().await;
    relay.drain().await;
    let records = fixture.records().await;
    assert_eq!(records.len(), 20);
}

/// One is frozen and wakes up: the lease is no session's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_holds_through_a_pooler() {
    let Some((fixture, _pgbouncer, url)) = behind_pgbouncer().await else {
        return;
    };
    let through = ["--database-url", &*url];
    let mut active = polling(&fixture, &through).await;
    let mut other = Relay::start(&fixture, &[&POLL[..], &through].concat());
    other.wait_for_log("standing by").await;
    let writers = fixture.writers(fixture.load());
    tokio::time::sleep(Duration::from_secs(1)).await;
    active.signal("STOP");
    wait_until("the other delivers", async || {
        other.published(&fixture.topic) > 0
    })
    .await;
    active.signal("CONT");
    active.wait_for_log("standing by").await;
    active.stop().await;
    writers.stop().await.unwrap();
    let verdict = fixture.judge_polling(other).await;
    assert!(verdict.is_clean(12_000), "{verdict}");
}

/// What set-up sets and locks would stay behind in a session that others are lent.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn set_up_and_recovery_are_refused() {
    let Some((fixture, _pgbouncer, url)) = behind_pgbouncer().await else {
        return;
    };
    let with_options = format!("{url}&options=-c%20datestyle%3DISO");
    for url in [&url, &with_options] {
        for refused in [fixture.setup_as(url, &POLL), fixture.recover_as(url, &[])] {
            let complaint = refused.complaint(3);
            let why =
                "a connection pooler is between us and the server: connect to Postgres itself";
            assert!(complaint.contains(why), "{complaint}");
        }
    }
}

/// One that takes them and passes them over is found out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn set_up_is_refused_by_a_pooler_that_says_nothing() {
    let fixture = Fixture::with_postgres(&[]).await;
    let postgres = fixture.postgres.as_ref().expect("a Postgres of its own");
    let deaf = ["ignore_startup_parameters = options"];
    let Ok(pgbouncer) = Server::pgbouncer(postgres, &deaf) else {
        eprintln!("not tested: there is no PgBouncer");
        return;
    };
    let (port, database) = (pgbouncer.fact("port"), &fixture.contract.slot);
    let url = format!("postgresql://postgres@127.0.0.1:{port}/{database}?sslmode=disable");
    let refused = fixture.setup_as(&url, &POLL);
    let complaint = refused.complaint(3);
    assert!(complaint.contains("a connection pooler"), "{complaint}");
    let locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'";
    let row = fixture.client.query_one(locks, &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 0);
}
