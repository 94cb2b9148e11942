//! Where the database is, and how to log in.
//!
//! The relay holds two kinds of session, each with a client of its own: ordinary
//! ones ([`tokio_postgres`]) and the replication session
//! ([`pgwire_replication`]). Neither reads libpq's environment or `.pgpass`, and
//! they differ in the TLS modes they know. [`Database`] is the one setting both
//! are made from, so that they cannot disagree about the server they mean or
//! about how far they trust it.
//!
//! # Parameters
//!
//! A `postgresql://` URL or a `key=value` string, then libpq's variables, then
//! defaults, each parameter by itself, as libpq does it:
//!
//! | parameter | variable | default |
//! | --- | --- | --- |
//! | `host` | `PGHOST` | the folder of the Unix socket, else `localhost` |
//! | `hostaddr` | `PGHOSTADDR` | the address of `host` |
//! | `port` | `PGPORT` | 5432 |
//! | `user` | `PGUSER` | the operating system's user (`USER`, `LOGNAME`) |
//! | `dbname` | `PGDATABASE` | the user's name |
//! | `password` | `PGPASSWORD` | from the password file |
//! | `passfile` | `PGPASSFILE` | `~/.pgpass` |
//! | `options` | `PGOPTIONS` | none; `-c name=value` settings only |
//! | `connect_timeout` | `PGCONNECT_TIMEOUT` | 10 s for the whole of connecting and logging in; 0 is the default too |
//! | `sslmode` | `PGSSLMODE` | `prefer` |
//! | `sslrootcert` | `PGSSLROOTCERT` | with `verify-*` the operating system's bundle (`SSL_CERT_FILE`) |
//! | `sslcert`, `sslkey` | `PGSSLCERT`, `PGSSLKEY` | none |
//! | `channel_binding` | `PGCHANNELBINDING` | `prefer`; `require` is refused, the replication client has none |
//! | `target_session_attrs` | `PGTARGETSESSIONATTRS` | `any`, or `read-write` |
//! | `keepalives`, `keepalives_idle`, `keepalives_interval`, `keepalives_count` | | on, 30 s, 10 s, 3; ordinary sessions only |
//! | `tcp_user_timeout` | | 60,000 ms; ordinary sessions only |
//!
//! `application_name` is accepted and replaced by ours. One host only: the
//! replication client takes no list. Anything else is refused by name.
//!
//! # TLS
//!
//! | `sslmode` | encrypted | certificate's chain | its name |
//! | --- | --- | --- | --- |
//! | `disable` | no | | |
//! | `prefer` | where the server offers it | not checked | not checked |
//! | `require` | yes | not checked | not checked |
//! | `verify-ca` | yes | checked | not checked |
//! | `verify-full` | yes | checked | checked |
//!
//! - `sslrootcert` turns an unset `sslmode` and `require` into `verify-ca`: whoever
//!   names a certificate wants it checked. libpq does so for `require`.
//! - `sslrootcert=system` means the operating system's bundle and `verify-full`;
//!   with a weaker `sslmode` it is refused, as in libpq.
//! - Files in `~/.postgresql` are not looked at: name them.
//! - A certificate's name is its subjectAltName; the common name is not read. One
//!   without any name passes `verify-ca` in ordinary sessions, but not in the
//!   replication session.
//! - To be checked, a certificate must be X.509 v3 and issued by a CA: one that is
//!   its own `sslrootcert`, which OpenSSL takes, is refused.
//! - On a Unix socket there is no TLS, whatever is set.

mod errors;
mod parameters;
mod pgpass;
pub mod refusals;
mod session;
mod settings;
mod tls;
mod verifier;

use std::fmt;
use std::net::IpAddr;
use std::time::Duration;

use pgwire_replication::ReplicationConfig;
use tokio_postgres::error::SqlState;

use crate::error::{Error, ErrorKind, Result};

pub use errors::{Refusal, sort, sort_replication, sort_with};
pub use session::{Session, despite_deadlocks, query_after};

use parameters::percent_encode;
use tls::Tls;

/// Where the database is and how to log in: one setting for both the ordinary
/// and the replication session. `Debug` and [`Database::display`] never show
/// the password.
#[derive(Clone)]
pub struct Database {
    host: String,
    hostaddr: Option<IpAddr>,
    port: u16,
    user: String,
    password: Option<String>,
    name: String,
    options: Option<String>,
    connect_timeout: Duration,
    tls: Tls,
    /// Everything above in the ordinary client's terms, and its TCP settings.
    config: tokio_postgres::Config,
}

impl Database {
    /// Opens an ordinary session. Where the server's `synchronous_commit` is
    /// weaker than `on` for our commits (`off`, `local`), the session sets `on`:
    /// what it parks or stores must not be lost after its position was confirmed.
    ///
    /// # Errors
    ///
    /// As [`sort`] sorts them; `DatabaseAway` when the time is up.
    pub async fn connect(&self, application_name: &str) -> Result<Session> {
        self.open(application_name, &[], true).await
    }

    /// Opens an ordinary session that is ours alone until it ends, and begins it with these
    /// settings, as it may hold locks and settings that no other client must be lent. They are
    /// handed over at its start, as `options`, which a pooler refuses; whether they hold is
    /// looked at, for one that passes them over.
    ///
    /// # Errors
    /// As [`connect`](Self::connect); `Database` where a pooler is in between.
    pub async fn connect_alone(
        &self,
        application_name: &str,
        settings: &[(&str, &str)],
    ) -> Result<Session> {
        self.open(application_name, settings, true).await
    }

    /// Opens an ordinary session and sets nothing in it, as a pooler may lend the
    /// server's session to others between two transactions.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn connect_pooled(&self, application_name: &str) -> Result<Session> {
        self.open(application_name, &[], false).await
    }

    async fn open(
        &self,
        application_name: &str,
        settings: &[(&str, &str)],
        is_ours: bool,
    ) -> Result<Session> {
        let doing = format!("connect to {}", self.display());
        let tls = self.tls.connector()?;
        let mut config = self.config.clone();
        config.application_name(application_name);
        if !settings.is_empty() {
            config.options(with_settings(self.options(), settings));
        }
        let refused = |error: tokio_postgres::Error| {
            // Postgres itself has nothing against how we begin.
            let is_pooler = error.code() == Some(&SqlState::PROTOCOL_VIOLATION);
            match is_pooler && !settings.is_empty() {
                true => pooler_in_between(&doing),
                false => sort(&doing, error),
            }
        };
        let opened = async {
            let session = Session::open(&config, tls).await.map_err(refused)?;
            if !session.holds(settings).await.map_err(refused)? {
                return Err(pooler_in_between(&doing));
            }
            if is_ours {
                session.strengthen().await.map_err(refused)?;
            }
            Ok(session)
        };
        within(self.connect_timeout, &doing, opened).await
    }

    /// The replication session's settings. `slot` goes into the command as it
    /// stands, so it must be a valid slot name; `publication` is quoted here.
    /// A session's `options` are filled in from ours: append to them.
    ///
    /// Bound its start by [`Database::connect_timeout`], the client has no
    /// limit of its own. Do not print the value, its `Debug` shows the password.
    ///
    /// With `verify-ca` and a host that is not one of the certificate's names,
    /// call [`Database::connect`] first, on this value or a clone of it: the
    /// replication client compares names even then, so it is told one that the
    /// ordinary session saw in the certificate.
    pub fn replication(&self, slot: &str, publication: &str) -> ReplicationConfig {
        let address = match self.hostaddr {
            Some(address) => address.to_string(),
            None => self.host.clone(),
        };
        let password = self.password.clone().unwrap_or_default();
        // The server folds an unquoted publication name to lower case.
        let publication = format!("\"{}\"", publication.replace('"', "\"\""));
        let config =
            ReplicationConfig::new(address, &self.user, password, &self.name, slot, publication)
                .with_port(self.port)
                .with_tls(self.tls.replication(&self.host));
        match &self.options {
            Some(options) => config.with_options(options),
            None => config,
        }
    }

    /// `postgresql://user@host:port/db`, for logs and messages: never a password.
    pub fn display(&self) -> String {
        let (user, name) = (percent_encode(&self.user), percent_encode(&self.name));
        let port = self.port;
        match &self.host {
            folder if folder.starts_with('/') => {
                format!("postgresql://{user}@/{name}?host={folder}&port={port}")
            }
            address if address.contains(':') => {
                format!("postgresql://{user}@[{address}]:{port}/{name}")
            }
            host => format!("postgresql://{user}@{host}:{port}/{name}"),
        }
    }

    /// The database's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The host's name or address, or the folder of its Unix socket.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, on a Unix socket the number in the socket's name.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The role that logs in.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// Settings for the session's start, `-c name=value …`, from `options` or
    /// `PGOPTIONS`.
    pub fn options(&self) -> Option<&str> {
        self.options.as_deref()
    }

    /// How long connecting and logging in may take.
    pub fn connect_timeout(&self) -> Duration {
        self.connect_timeout
    }
}

/// The `options` of a session that begins with these settings, whatever else they say.
fn with_settings(options: Option<&str>, settings: &[(&str, &str)]) -> String {
    let ours = settings.iter().map(|(name, value)| {
        // There, a space ends a setting.
        let value = value.replace('\\', r"\\").replace(' ', r"\ ");
        format!("-c {name}={value}")
    });
    let said = options.map(str::to_owned);
    said.into_iter().chain(ours).collect::<Vec<_>>().join(" ")
}

fn pooler_in_between(doing: &str) -> Error {
    let message = format!(
        "{doing}: a connection pooler is between us and the server: connect to Postgres itself"
    );
    Error::new(ErrorKind::Database, message)
}

/// An answer of the server, for which its client waits without end: a connection that
/// died without a word is silent until the system gives it up. `doing` says what is
/// being tried.
///
/// # Errors
/// The answer's own; `DatabaseAway` when the time, in whole seconds, is up.
pub async fn within<T>(
    limit: Duration,
    doing: &str,
    answer: impl Future<Output = Result<T>>,
) -> Result<T> {
    // Boxed: a caller's future is large, and would be part of every future that waits for it.
    let answer = tokio::time::timeout(limit, Box::pin(answer)).await;
    answer.unwrap_or_else(|_| {
        let message = format!("{doing}: no answer within {} s", limit.as_secs());
        Err(Error::new(ErrorKind::DatabaseAway, message))
    })
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Database").field(&self.display()).finish()
    }
}
