//! A Postgres that we do not trust, or that does not trust us.

use super::certificates::LOCAL;
use super::servers::{Issuers, PASSWORD, SecurePostgres, issuers};
use super::{assert_no_secret, complaint};
use crate::support::{Proxy, Relay};

/// A relay with this URL ends with this exit code and says this, and no secret
/// whatever is logged.
async fn assert_refused(postgres: &SecurePostgres, url: &str, code: i32, expected: &[&str]) {
    let mut command = Relay::command(&postgres.fixture, &["--database-url", url]);
    let mut relay = Relay::spawn(command.env("RUST_LOG", "trace"));
    assert_eq!(relay.exit_code().await, code, "{url}: {}", relay.log());
    let log = relay.log();
    let complaint = complaint(&log);
    for text in expected {
        assert!(complaint.contains(text), "no \"{text}\" in: {complaint}");
    }
    assert_no_secret(&log, &[&postgres.key()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_that_cannot_be_trusted_is_refused() {
    let mut postgres = SecurePostgres::start().await;
    let not_trusted = "the server's certificate is not trusted";
    let right = postgres.parameters("verify-full", "ca.pem", "relay");

    for mode in ["verify-full", "verify-ca", "require"] {
        let stranger = postgres.parameters(mode, "stranger.pem", "relay");
        let url = postgres.url("localhost", PASSWORD, &stranger);
        assert_refused(
            &postgres,
            &url,
            6,
            &[not_trusted, "sslrootcert must hold its CA"],
        )
        .await;
    }
    let url = postgres.url("db.example", PASSWORD, &right);
    let expected = [
        not_trusted,
        "\"db.example\"",
        "localhost",
        "connect to a name that it has",
    ];
    assert_refused(&postgres, &url, 6, &expected).await;

    postgres
        .present(&issuers().authority.expired_server())
        .await;
    let url = postgres.url("localhost", PASSWORD, &right);
    let expected = [not_trusted, "expired", "renew it"];
    assert_refused(&postgres, &url, 6, &expected).await;
    postgres.present(&issuers().authority.server(LOCAL)).await;
    let mut mended = Relay::start(&postgres.fixture, &["--database-url", &url]);
    mended.wait_for_log("streaming").await;
    mended.drain().await;
}

/// The two clients verify certificates each by itself: here only the second connection,
/// which is to be the stream, meets a server that cannot be trusted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_trusts_no_more_than_a_session() {
    let postgres = SecurePostgres::start().await;
    let mut other = SecurePostgres::start().await;
    let proxy = Proxy::start().await;
    let Issuers {
        authority,
        stranger,
        ..
    } = issuers();
    let (_, port) = proxy.address().split_once(':').unwrap();
    let right = postgres.parameters("verify-full", "ca.pem", "relay");
    let url = postgres.url_at(port, "localhost", PASSWORD, &right);
    for identity in [
        stranger.server(LOCAL),
        authority.server(&["elsewhere.example"]),
        authority.expired_server(),
    ] {
        other.present(&identity).await;
        let (first, second) = (&postgres.fixture, &other.fixture);
        let (trusted, stranger) = (first.postgres_address(), second.postgres_address());
        // The stream is the last: after the control session, one that looks for partitions,
        // and three on the parked events.
        let mut in_turn = vec![&*trusted; 5];
        in_turn.push(&stranger);
        proxy.pass_on_in_turn(&in_turn);
        let expected = [
            "stream from slot",
            "the server's certificate is not trusted",
        ];
        assert_refused(&postgres, &url, 6, &expected).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_postgres_that_does_not_trust_us_says_what_is_missing() {
    let postgres = SecurePostgres::start().await;
    let right = postgres.parameters("verify-full", "ca.pem", "relay");
    let ca = &right[..right.find("&sslcert").unwrap()];
    let other = postgres.parameters("verify-full", "ca.pem", "other");
    for (password, parameters, expected) in [
        (
            "hunter2x",
            &right[..],
            &["password authentication failed", "PGPASSWORD or ~/.pgpass"][..],
        ),
        (
            "",
            &right,
            &["the server asks for a password", "PGPASSWORD or ~/.pgpass"],
        ),
        (
            PASSWORD,
            "sslmode=disable",
            &["no pg_hba.conf entry", "set sslmode=verify-full"],
        ),
        (
            PASSWORD,
            ca,
            &[
                "requires a valid client certificate",
                "set sslcert and sslkey",
            ],
        ),
        (
            PASSWORD,
            &other,
            &["the server does not accept our sslcert"],
        ),
    ] {
        let url = postgres.url("localhost", password, parameters);
        assert_refused(&postgres, &url, 6, expected).await;
    }
}
