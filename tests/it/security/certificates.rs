//! Certificates, made for one test.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair,
    date_time_ymd,
};

/// A CA of the tests' own.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

/// A certificate and its key, both PEM.
pub(crate) struct Identity {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut parameters = named(name, &[]);
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        Self(CertifiedIssuer::self_signed(parameters, key).unwrap())
    }

    /// The CA's own certificate.
    pub(crate) fn certificate(&self) -> String {
        self.0.pem()
    }

    /// A server's, for these names and addresses.
    pub(crate) fn server(&self, hosts: &[&str]) -> Identity {
        self.issue(&named("server", hosts))
    }

    /// A server's, for this machine, that is no longer valid.
    pub(crate) fn expired_server(&self) -> Identity {
        let mut parameters = named("server", LOCAL);
        parameters.not_after = date_time_ymd(2020, 1, 1);
        self.issue(&parameters)
    }

    /// A client's, who is called so.
    pub(crate) fn client(&self, name: &str) -> Identity {
        self.issue(&named(name, &[]))
    }

    fn issue(&self, parameters: &CertificateParams) -> Identity {
        let key = KeyPair::generate().unwrap();
        Identity {
            certificate: parameters.signed_by(&key, &self.0).unwrap().pem(),
            key: key.serialize_pem(),
        }
    }
}

/// What this machine is called.
pub(crate) const LOCAL: &[&str] = &["localhost", "127.0.0.1"];

fn named(name: &str, hosts: &[&str]) -> CertificateParams {
    let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
    let mut parameters = CertificateParams::new(hosts).unwrap();
    parameters.distinguished_name = DistinguishedName::new();
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters
}
