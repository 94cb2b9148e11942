//! Both clients' errors, sorted into ours in one place.
//!
//! What the server refuses is sorted by its SQLSTATE ([`refusals`]).

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::io;

use pgwire_replication::PgWireError;
use rustls::AlertDescription;

use super::refusals;
use crate::error::{Error, ErrorKind};

/// What rustls says of a certificate it does not accept. The replication client
/// passes it on as text.
const INVALID_CERTIFICATE: &str = "invalid peer certificate";

/// The server's refusal: its message and SQLSTATE, and what to do. The detail
/// is left out, since it may quote a row.
#[derive(Debug)]
pub struct Refusal {
    sqlstate: String,
    message: String,
    next_step: Cow<'static, str>,
}

impl Refusal {
    /// The SQLSTATE, such as `42P01`.
    pub fn sqlstate(&self) -> &str {
        &self.sqlstate
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (SQLSTATE {})", self.message, self.sqlstate)?;
        match &*self.next_step {
            "" => Ok(()),
            next_step => write!(f, "; {next_step}"),
        }
    }
}

impl StdError for Refusal {}

/// Sorts an error of an ordinary session. `context` says what was being tried.
/// A refusal by the server has a [`Refusal`] as its source.
pub fn sort(context: impl Into<String>, error: tokio_postgres::Error) -> Error {
    let context = context.into();
    if let Some(refusal) = error.as_db_error() {
        return refused(context, refusal.code().code(), refusal.message(), None);
    }
    if let Some(tls) = find_rustls(&error) {
        return sort_tls(context, tls, &error.to_string());
    }
    // The client's own kinds are private; its words are not translated.
    let cause = error.source().map(ToString::to_string).unwrap_or_default();
    match (error.to_string().as_str(), cause.as_str()) {
        (_, "password missing") => no_password(&context),
        (_, "server does not support TLS") => no_tls(&context),
        ("authentication error", _) => Error::new(ErrorKind::Rights, context).caused_by(error),
        _ => Error::new(ErrorKind::DatabaseAway, context).caused_by(error),
    }
}

/// The same, where something else than usual is to be done about some refusals: `next_step`
/// says what, of a SQLSTATE and a message.
pub fn sort_with(
    context: impl Into<String>,
    error: tokio_postgres::Error,
    next_step: impl FnOnce(&str, &str) -> Option<String>,
) -> Error {
    let Some(refusal) = error.as_db_error() else {
        return sort(context, error);
    };
    let (sqlstate, message) = (refusal.code().code(), refusal.message());
    let next_step = next_step(sqlstate, message);
    refused(context.into(), sqlstate, message, next_step)
}

/// Sorts an error of the replication session, which carries the SQLSTATE only
/// as the end of a text. `context` says what was being tried.
pub fn sort_replication(context: impl Into<String>, error: PgWireError) -> Error {
    let context = context.into();
    let kind = match &error {
        PgWireError::Server(text) => {
            let tail = text.strip_suffix(')');
            if let Some((message, state)) = tail.and_then(|text| text.rsplit_once(" (SQLSTATE ")) {
                return refused(context, state, message, None);
            }
            ErrorKind::DatabaseAway
        }
        PgWireError::Io(cause) => {
            if let Some(tls) = rustls_inside(cause) {
                return sort_tls(context, tls, "replication session");
            }
            ErrorKind::DatabaseAway
        }
        PgWireError::Tls(text) if text.starts_with("server does not support TLS") => {
            return no_tls(&context);
        }
        PgWireError::Tls(text) => {
            if let Some(at) = text.find(INVALID_CERTIFICATE) {
                return not_trusted(&context, &text[at..]);
            }
            if CERTIFICATE_ALERTS
                .iter()
                .any(|alert| text.ends_with(&format!("{alert:?}")))
            {
                return not_accepted(&context, text.clone());
            }
            match text.starts_with("TLS config error") {
                true => ErrorKind::Settings,
                false => ErrorKind::DatabaseAway,
            }
        }
        PgWireError::Auth(_) => ErrorKind::Rights,
        PgWireError::MessageTooLarge { .. } => {
            let cause = format!("{error}; {}", refusals::DELETE_ROW);
            return Error::new(ErrorKind::Event, context).caused_by(cause);
        }
        _ => ErrorKind::DatabaseAway,
    };
    Error::new(kind, context).caused_by(error)
}

fn refused(context: String, sqlstate: &str, message: &str, next_step: Option<String>) -> Error {
    let rule = refusals::find(sqlstate, message);
    Error::new(rule.kind, context).caused_by(Refusal {
        sqlstate: sqlstate.to_owned(),
        message: message.to_owned(),
        next_step: next_step.map_or(Cow::Borrowed(rule.next_step), Cow::Owned),
    })
}

/// The alerts by which a server refuses our certificate, or misses it.
const CERTIFICATE_ALERTS: [AlertDescription; 9] = [
    AlertDescription::BadCertificate,
    AlertDescription::UnsupportedCertificate,
    AlertDescription::CertificateRevoked,
    AlertDescription::CertificateExpired,
    AlertDescription::CertificateUnknown,
    AlertDescription::UnknownCA,
    AlertDescription::AccessDenied,
    AlertDescription::DecryptError,
    AlertDescription::CertificateRequired,
];

fn sort_tls(context: String, error: &rustls::Error, during: &str) -> Error {
    match error {
        rustls::Error::InvalidCertificate(_) => not_trusted(&context, &error.to_string()),
        rustls::Error::AlertReceived(alert) if CERTIFICATE_ALERTS.contains(alert) => {
            not_accepted(&context, error.to_string())
        }
        _ => Error::new(ErrorKind::DatabaseAway, context).caused_by(format!("{during}: {error}")),
    }
}

fn not_trusted(context: &str, reason: &str) -> Error {
    let next_step = match reason {
        text if text.ends_with("UnknownIssuer") => "; sslrootcert must hold its CA",
        text if text.contains("CaUsedAsEndEntity") => {
            "; it is a CA itself: let a CA issue the server's certificate"
        }
        text if text.contains("UnsupportedCertVersion") => "; it must be X.509 v3",
        text if text.contains("not valid for any names") => "; it needs a subjectAltName",
        text if text.contains("not valid for name") => "; connect to a name that it has",
        text if text.contains("certificate expired") => "; renew it",
        _ => "",
    };
    let message = format!("{context}: the server's certificate is not trusted");
    Error::new(ErrorKind::Rights, message).caused_by(format!("{reason}{next_step}"))
}

fn not_accepted(context: &str, reason: String) -> Error {
    let message = format!(
        "{context}: the server does not accept our sslcert; its ssl_ca_file must hold the CA that issued it"
    );
    Error::new(ErrorKind::Rights, message).caused_by(reason)
}

fn no_tls(context: &str) -> Error {
    let message =
        format!("{context}: the server has no TLS, but sslmode or sslrootcert asks for it");
    Error::new(ErrorKind::Settings, message)
}

fn no_password(context: &str) -> Error {
    let message = format!(
        "{context}: the server asks for a password; set it in the database URL, PGPASSWORD or ~/.pgpass"
    );
    Error::new(ErrorKind::Rights, message)
}

/// The TLS library's error, wherever it is wrapped.
fn find_rustls<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    let found = error
        .downcast_ref::<io::Error>()
        .and_then(rustls_inside)
        .or_else(|| error.downcast_ref::<rustls::Error>());
    found.or_else(|| find_rustls(error.source()?))
}

/// `io::Error::source` skips the error it wraps.
fn rustls_inside(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(message: &str, sqlstate: &str) -> Error {
        let text = format!("{message} (SQLSTATE {sqlstate})");
        sort_replication("start replication", PgWireError::Server(text))
    }

    #[test]
    fn states_are_sorted_by_what_to_do() {
        use ErrorKind::*;
        for (sqlstate, message, kind) in [
            ("28P01", "password authentication failed", Rights),
            ("28000", "no pg_hba.conf entry", Rights),
            ("42501", "permission denied", Rights),
            ("3D000", "database \"x\" does not exist", Database),
            ("42P01", "relation \"x\" does not exist", Database),
            ("42704", "replication slot \"x\" does not exist", Slot),
            ("42704", "publication \"x\" does not exist", Publication),
            ("42704", "rôle", Database),
            (
                "55006",
                "replication slot \"x\" is active for PID 7",
                SlotInUse,
            ),
            ("53400", "all replication slots are in use", Slot),
            (
                "55000",
                "can no longer get changes from replication slot \"x\"",
                Slot,
            ),
            (
                "55000",
                "logical decoding requires wal_level >= logical",
                Database,
            ),
            ("53300", "too many clients", DatabaseAway),
            (
                "42704",
                "unrecognized configuration parameter \"x\"",
                Settings,
            ),
            (
                "22023",
                "invalid value for parameter \"work_mem\": \"x\"",
                Settings,
            ),
            ("22023", "valeur invalide", DatabaseAway),
            (
                "55P02",
                "parameter \"x\" cannot be changed without restarting the server",
                Settings,
            ),
            (
                "53400",
                "temporary file size exceeds \"temp_file_limit\" (1kB)",
                Database,
            ),
            ("54000", "out of memory", Event),
            (
                "54000",
                "string buffer exceeds maximum allowed length",
                Event,
            ),
            (
                "54000",
                "database is not accepting commands that assign new transaction IDs to avoid wraparound data loss",
                DatabaseAway,
            ),
            (
                "22023",
                "replication slot \"x\" specified in parameter \"synchronized_standby_slots\" does not exist",
                DatabaseAway,
            ),
            (
                "55000",
                "replication slot \"x\" specified in parameter \"synchronized_standby_slots\" does not have active_pid",
                DatabaseAway,
            ),
            (
                "08P01",
                "unsupported startup parameter: replication",
                Database,
            ),
            ("08P01", "server conn crashed?", DatabaseAway),
            (
                "25006",
                "cannot execute UPDATE in a read-only transaction",
                DatabaseAway,
            ),
            (
                "0A000",
                "logical decoding cannot be used while in recovery",
                DatabaseAway,
            ),
            ("55000", "recovery is in progress", DatabaseAway),
            ("57P01", "terminating connection", DatabaseAway),
            ("57P04", "database was dropped", DatabaseAway),
            ("58030", "could not write block 7", DatabaseAway),
            ("XX001", "invalid page in block 7", DatabaseAway),
            ("XX002", "index \"x\" contains corrupted page", DatabaseAway),
            ("40P01", "deadlock detected", DatabaseAway),
            ("XX000", "anything", DatabaseAway),
        ] {
            assert_eq!(
                server(message, sqlstate).kind(),
                kind,
                "{sqlstate} {message}"
            );
        }
    }

    #[test]
    fn a_refusal_reads_as_one_line_with_the_next_step() {
        let error = server("relation \"postbox.outbox\" does not exist", "42P01");
        let line = "start replication: relation \"postbox.outbox\" does not exist \
                    (SQLSTATE 42P01); run `postbox setup`";
        assert_eq!(error.chain(), line);
        let refusal = error
            .source()
            .and_then(|cause| cause.downcast_ref::<Refusal>());
        assert_eq!(refusal.map(Refusal::sqlstate), Some("42P01"));
    }

    #[test]
    fn tls_errors_of_the_replication_client_are_told_apart() {
        let kind = |text: &str| sort_replication("x", PgWireError::Tls(text.to_owned())).kind();
        let refused = "TLS handshake failed: invalid peer certificate: UnknownIssuer";
        assert_eq!(kind(refused), ErrorKind::Rights);
        let alert = rustls::Error::AlertReceived(AlertDescription::UnknownCA);
        assert_eq!(
            kind(&format!("TLS handshake failed: {alert}")),
            ErrorKind::Rights
        );
        let rejected = "server does not support TLS (SSLRequest rejected)";
        assert_eq!(kind(rejected), ErrorKind::Settings);
        assert_eq!(kind("TLS config error: x"), ErrorKind::Settings);
        assert_eq!(
            kind("TLS handshake failed: unexpected EOF"),
            ErrorKind::DatabaseAway
        );
    }

    #[test]
    fn an_alert_after_the_handshake_is_found_inside_the_io_error() {
        let alert = rustls::Error::AlertReceived(AlertDescription::CertificateRequired);
        let error = io::Error::new(io::ErrorKind::InvalidData, alert);
        assert_eq!(
            sort_replication("x", error.into()).kind(),
            ErrorKind::Rights
        );
        let error = io::Error::from(io::ErrorKind::UnexpectedEof);
        assert_eq!(
            sort_replication("x", error.into()).kind(),
            ErrorKind::DatabaseAway
        );
    }

    #[test]
    fn a_message_beyond_the_clients_limit_says_how_to_pass_it() {
        let error = PgWireError::MessageTooLarge {
            payload_bytes: (1 << 30) + 1,
            limit_bytes: 1 << 30,
        };
        let error = sort_replication("read slot \"x\"", error);
        assert_eq!(error.kind(), ErrorKind::Event);
        let line = "read slot \"x\": backend message too large: 1073741825 bytes (max 1073741824); delete ";
        assert!(error.chain().starts_with(line), "{}", error.chain());
    }
}
