//! What is checked of a server's certificate below `verify-full`.

use std::sync::{Arc, Mutex};

use crate::lock::lock;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};

/// `prefer` and `require`: encryption without trust. The handshake's signature is
/// not checked either: it would prove that the server owns a certificate that
/// nobody vouches for, and refuse the old ones (X.509 v1) that some servers have.
#[derive(Debug)]
pub(super) struct Unchecked {
    pub(super) schemes: Vec<SignatureScheme>,
}

impl ServerCertVerifier for Unchecked {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.clone()
    }
}

/// `verify-ca`: all but the name. rustls checks the name last, so an error about
/// it says that the chain holds.
#[derive(Debug)]
pub(super) struct AnyName {
    pub(super) chain: Arc<WebPkiServerVerifier>,
    /// Keeps a name from the certificate, if the host's is not among them.
    pub(super) certificate_name: Arc<Mutex<Option<String>>>,
}

impl ServerCertVerifier for AnyName {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let checked = self
            .chain
            .verify_server_cert(certificate, intermediates, name, ocsp, now);
        let seen = match &checked {
            Ok(_) => None,
            Err(rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext {
                presented,
                ..
            })) => presented.iter().find_map(|text| usable_name(text)),
            Err(rustls::Error::InvalidCertificate(CertificateError::NotValidForName)) => None,
            Err(_) => return checked,
        };
        *lock(&self.certificate_name) = seen;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain
            .verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain
            .verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// A name from rustls' list of those in a certificate: `DnsName("db.example")` or
/// `IpAddress(10.0.0.1)`. Any label fits a wildcard.
fn usable_name(presented: &str) -> Option<String> {
    let (kind, name) = presented.strip_suffix(')')?.split_once('(')?;
    let name = match kind {
        "DnsName" => name.strip_prefix('"')?.strip_suffix('"')?,
        "IpAddress" => name,
        _ => return None,
    };
    let name = match name.strip_prefix("*.") {
        Some(domain) => format!("any.{domain}"),
        None => name.to_owned(),
    };
    ServerName::try_from(name.as_str()).is_ok().then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_a_certificate_become_server_names() {
        let name = |text| usable_name(text);
        assert_eq!(
            name("DnsName(\"db.example\")").as_deref(),
            Some("db.example")
        );
        assert_eq!(
            name("DnsName(\"*.example\")").as_deref(),
            Some("any.example")
        );
        assert_eq!(name("IpAddress(10.0.0.1)").as_deref(), Some("10.0.0.1"));
        assert_eq!(name("DirectoryName"), None);
        assert_eq!(name("UniformResourceIdentifier(\"x\")"), None);
    }
}
