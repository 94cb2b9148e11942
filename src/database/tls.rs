//! How far the server is trusted, in the terms of both clients.
//!
//! The two clients differ. The ordinary one leaves every check to us. The
//! replication client has its own, read in its source (pgwire-replication 0.5.0):
//!
//! - Without a bundle it trusts the roots compiled into it, not the operating
//!   system's. So `system`, and `verify-*` without `sslrootcert`, become a path
//!   here, and both clients read that file.
//! - `verify-full` refuses an IP address as host, unless a name to verify is set
//!   beside it. The address is such a name: rustls then compares it with the
//!   addresses in the certificate.
//! - `verify-ca` means to ignore the certificate's name, but looks for
//!   `NotValidForName` where rustls 0.23.46 returns `NotValidForNameContext`, and so
//!   compares the name after all. We give it one of the names that an ordinary
//!   session saw in the certificate, after its chain was verified.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::error::{Error, ErrorKind, Result};
use crate::lock::lock;

use super::parameters::Parameters;
use super::verifier::{AnyName, Unchecked};

/// Where systems keep their bundle; the list is Go's (`crypto/x509/root_linux.go`,
/// `root_bsd.go`), the last entry serves Alpine, macOS and OpenBSD.
const BUNDLES: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/usr/local/etc/ssl/cert.pem",
    "/etc/ssl/cert.pem",
];

const MODES: &str = "must be disable, prefer, require, verify-ca or verify-full";

/// `sslmode`, as it is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Mode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// `sslmode`, with what it checks certificates against: what verifies cannot do
/// without.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Trust {
    Disable,
    Prefer,
    Require,
    VerifyCa(PathBuf),
    VerifyFull(PathBuf),
}

/// `sslmode` and its files, checked against each other.
#[derive(Clone)]
pub(super) struct Tls {
    trust: Trust,
    on_unix_socket: bool,
    /// Certificate and key.
    client: Option<(PathBuf, PathBuf)>,
    /// A name from the server's certificate, if the host's is not among them.
    certificate_name: Arc<Mutex<Option<String>>>,
}

impl Tls {
    pub(super) fn resolve(
        parameters: &Parameters,
        env: &dyn Fn(&str) -> Option<String>,
        on_unix_socket: bool,
    ) -> Result<Self> {
        // What fights is refused also where there is no TLS.
        let (mode, client) = (mode(parameters)?, client(parameters)?);
        let mode = if on_unix_socket { Mode::Disable } else { mode };
        let roots = || match parameters.get("sslrootcert") {
            None | Some("system") => system_bundle(env),
            Some(file) => Ok(file.into()),
        };
        let trust = match mode {
            Mode::Disable => Trust::Disable,
            Mode::Prefer => Trust::Prefer,
            Mode::Require => Trust::Require,
            Mode::VerifyCa => Trust::VerifyCa(roots()?),
            Mode::VerifyFull => Trust::VerifyFull(roots()?),
        };
        Ok(Self {
            client: client.filter(|_| trust != Trust::Disable),
            trust,
            on_unix_socket,
            certificate_name: Arc::default(),
        })
    }

    pub(super) fn on_unix_socket(&self) -> bool {
        self.on_unix_socket
    }

    /// The ordinary client's part: whether to ask for TLS. What to check is in
    /// the connector.
    pub(super) fn ordinary_mode(&self) -> tokio_postgres::config::SslMode {
        match self.trust {
            Trust::Disable => tokio_postgres::config::SslMode::Disable,
            Trust::Prefer => tokio_postgres::config::SslMode::Prefer,
            _ => tokio_postgres::config::SslMode::Require,
        }
    }

    /// The ordinary client's checks. Reads the certificate files.
    pub(super) fn connector(&self) -> Result<MakeRustlsConnect> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = self.verifier(&provider)?;
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable("TLS cannot be set up").caused_by(error))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let config = match &self.client {
            None => config.with_no_client_auth(),
            Some((certificate, key)) => config
                .with_client_auth_cert(read_certificates(certificate)?, read_key(key)?)
                .map_err(|error| {
                    let (certificate, key) = (certificate.display(), key.display());
                    unusable(format!(
                        "client certificate \"{certificate}\" and key \"{key}\" do not go together"
                    ))
                    .caused_by(error)
                })?,
        };
        Ok(MakeRustlsConnect::new(config))
    }

    /// The replication client's settings for a server called `host`.
    pub(super) fn replication(&self, host: &str) -> pgwire_replication::TlsConfig {
        let mut config = pgwire_replication::TlsConfig::disabled();
        use pgwire_replication::SslMode;
        (config.mode, config.ca_pem_path) = match &self.trust {
            Trust::Disable => return config,
            Trust::Prefer => (SslMode::Prefer, None),
            Trust::Require => (SslMode::Require, None),
            Trust::VerifyCa(roots) => (SslMode::VerifyCa, Some(roots.clone())),
            Trust::VerifyFull(roots) => (SslMode::VerifyFull, Some(roots.clone())),
        };
        let seen = lock(&self.certificate_name).clone();
        config.sni_hostname = Some(seen.unwrap_or_else(|| host.to_owned()));
        if let Some((certificate, key)) = &self.client {
            config = config.with_client_cert(certificate, key);
        }
        config
    }

    fn verifier(&self, provider: &Arc<CryptoProvider>) -> Result<Arc<dyn ServerCertVerifier>> {
        Ok(match &self.trust {
            Trust::Disable | Trust::Prefer | Trust::Require => Arc::new(Unchecked {
                schemes: provider
                    .signature_verification_algorithms
                    .supported_schemes(),
            }),
            Trust::VerifyCa(roots) => Arc::new(AnyName {
                chain: verifier_of(roots, provider)?,
                certificate_name: Arc::clone(&self.certificate_name),
            }),
            Trust::VerifyFull(roots) => verifier_of(roots, provider)?,
        })
    }
}

/// Checks everything, against the certificates of `file`.
fn verifier_of(file: &Path, provider: &Arc<CryptoProvider>) -> Result<Arc<WebPkiServerVerifier>> {
    let mut roots = RootCertStore::empty();
    // A system's bundle may hold a certificate that rustls cannot read.
    roots.add_parsable_certificates(read_certificates(file)?);
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .build()
        .map_err(|error| {
            let file = file.display();
            unusable(format!(
                "sslrootcert \"{file}\" holds no usable certificate"
            ))
            .caused_by(error)
        })
}

/// `sslmode`, as `sslrootcert` strengthens it.
fn mode(parameters: &Parameters) -> Result<Mode> {
    let mode = match parameters.get("sslmode") {
        None => None,
        Some("disable") => Some(Mode::Disable),
        Some("prefer") => Some(Mode::Prefer),
        Some("require") => Some(Mode::Require),
        Some("verify-ca") => Some(Mode::VerifyCa),
        Some("verify-full") => Some(Mode::VerifyFull),
        Some(_) => return Err(parameters.refuse("sslmode", MODES)),
    };
    match (parameters.get("sslrootcert"), mode) {
        (Some("system"), None) => Ok(Mode::VerifyFull),
        (Some("system"), Some(mode)) if mode < Mode::VerifyFull => {
            let sslmode = parameters.get("sslmode").unwrap_or_default();
            let complaint = format!(
                "is {sslmode}, but {} is system, which needs verify-full",
                parameters.name("sslrootcert")
            );
            Err(parameters.refuse("sslmode", &complaint))
        }
        (Some(_), None | Some(Mode::Require)) => Ok(Mode::VerifyCa),
        (_, mode) => Ok(mode.unwrap_or(Mode::Prefer)),
    }
}

fn system_bundle(env: &dyn Fn(&str) -> Option<String>) -> Result<PathBuf> {
    match env("SSL_CERT_FILE").filter(|file| !file.is_empty()) {
        Some(file) => Ok(file.into()),
        None => BUNDLES
            .map(PathBuf::from)
            .into_iter()
            .find(|file| file.exists())
            .ok_or_else(|| {
                unusable(
                    "the operating system has no certificate bundle; set sslrootcert to a file",
                )
            }),
    }
}

fn client(parameters: &Parameters) -> Result<Option<(PathBuf, PathBuf)>> {
    match (parameters.get("sslcert"), parameters.get("sslkey")) {
        (None, None) => Ok(None),
        (Some(certificate), Some(key)) => Ok(Some((certificate.into(), key.into()))),
        (Some(_), None) => Err(parameters.refuse("sslcert", "needs sslkey beside it")),
        (None, Some(_)) => Err(parameters.refuse("sslkey", "needs sslcert beside it")),
    }
}

fn read_certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let certificates: Vec<_> = CertificateDer::pem_file_iter(file)
        .and_then(Iterator::collect)
        .map_err(|error| {
            unusable(format!("read certificate file \"{}\"", file.display())).caused_by(error)
        })?;
    if certificates.is_empty() {
        let file = file.display();
        return Err(unusable(format!(
            "certificate file \"{file}\" holds no PEM certificate"
        )));
    }
    Ok(certificates)
}

fn read_key(file: &Path) -> Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_file(file).map_err(|error| {
        let file = file.display();
        unusable(format!(
            "read key file \"{file}\", which must be PEM and not encrypted"
        ))
        .caused_by(error)
    })
}

fn unusable(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Settings, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tls(pairs: &str) -> Result<Tls> {
        let env = |name: &str| (name == "SSL_CERT_FILE").then(|| "/bundle.pem".to_owned());
        Tls::resolve(&Parameters::read(Some(pairs), &env)?, &env, false)
    }

    #[test]
    fn sslrootcert_strengthens_an_unset_mode_and_require() {
        let trust = |pairs| tls(pairs).unwrap().trust;
        let (file, bundle) = (|| "/ca".into(), || "/bundle.pem".into());
        for (pairs, expected) in [
            ("host=db", Trust::Prefer),
            ("sslmode=require", Trust::Require),
            ("sslrootcert=/ca", Trust::VerifyCa(file())),
            ("sslrootcert=/ca sslmode=require", Trust::VerifyCa(file())),
            ("sslrootcert=/ca sslmode=disable", Trust::Disable),
            (
                "sslrootcert=/ca sslmode=verify-full",
                Trust::VerifyFull(file()),
            ),
            ("sslrootcert=system", Trust::VerifyFull(bundle())),
            ("sslmode=verify-ca", Trust::VerifyCa(bundle())),
        ] {
            assert_eq!(trust(pairs), expected, "{pairs}");
        }
        let Err(error) = tls("sslrootcert=system sslmode=require") else {
            panic!("a weaker mode with system was taken");
        };
        let message = error.to_string();
        assert!(
            message.contains("require") && message.contains("system"),
            "{message}"
        );
    }

    #[test]
    fn the_system_means_the_same_file_to_both_clients() {
        for pairs in [
            "sslrootcert=system",
            "sslmode=verify-full",
            "sslmode=verify-ca",
        ] {
            let tls = tls(pairs).unwrap();
            let (Trust::VerifyCa(roots) | Trust::VerifyFull(roots)) = &tls.trust else {
                panic!("{pairs} checks nothing");
            };
            assert_eq!(roots, Path::new("/bundle.pem"));
            assert_eq!(tls.replication("db").ca_pem_path.as_ref(), Some(roots));
        }
    }

    #[test]
    fn certificate_and_key_come_together() {
        assert!(tls("sslcert=/c sslkey=/k").unwrap().client.is_some());
        for pairs in ["sslcert=/c", "sslkey=/k"] {
            for mode in ["", "sslmode=disable", "sslmode=require"] {
                assert!(tls(&format!("{pairs} {mode}")).is_err(), "{pairs} {mode}");
            }
        }
    }

    #[test]
    fn unreadable_certificates_are_settings_errors() {
        for pairs in ["sslrootcert=/nowhere", "sslcert=/nowhere sslkey=/nowhere"] {
            let Err(error) = tls(pairs).unwrap().connector() else {
                panic!("{pairs} was taken");
            };
            assert_eq!(error.kind(), ErrorKind::Settings);
            assert!(error.to_string().contains("/nowhere"), "{error}");
        }
    }
}
