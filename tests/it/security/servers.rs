//! Servers that want everything encrypted and everyone to prove who they are.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
use std::path::Path;
use std::sync::OnceLock;

use postbox::servers::Server;
use tempfile::TempDir;

use super::borrowed;
use super::certificates::{Authority, Identity, LOCAL};
use crate::support::Fixture;

/// What roles and users log in with.
pub(super) const PASSWORD: &str = "hunter2";

/// Kafka's user who may do everything.
pub(super) const RELAY: &str = "relay";

/// Those who may do only what a test allows, each one test's.
pub(super) const CLERK: &str = "clerk";
pub(super) const GUARD: &str = "guard";
pub(super) const GUEST: &str = "guest";

/// What issues all certificates, and what clients present.
pub(super) struct Issuers {
    pub(super) authority: Authority,
    /// Nobody trusts it.
    pub(super) stranger: Authority,
    pub(super) kafka_client: Identity,
}

pub(super) fn issuers() -> &'static Issuers {
    static ISSUERS: OnceLock<Issuers> = OnceLock::new();
    ISSUERS.get_or_init(|| {
        let authority = Authority::new("authority");
        Issuers {
            kafka_client: authority.client(RELAY),
            stranger: Authority::new("stranger"),
            authority,
        }
    })
}

/// A Kafka that these tests share. Its plain listener is the administrator's.
/// `IN` has a certificate that is as it should be, `OLD` one that has expired, and
/// `AWAY` another host's; each asks for a client's certificate and a password.
pub(super) fn kafka() -> &'static Server {
    static KAFKA: OnceLock<Server> = OnceLock::new();
    KAFKA.get_or_init(|| {
        let authority = &issuers().authority;
        let authorizer = "org.apache.kafka.metadata.authorizer.StandardAuthorizer";
        let mut settings = vec![
            format!("authorizer.class.name={authorizer}"),
            format!("super.users=User:ANONYMOUS;User:{RELAY}"),
        ];
        let mut arguments = Vec::new();
        for user in [RELAY, CLERK, GUARD, GUEST] {
            arguments.extend(["--user".to_owned(), format!("{user}:{PASSWORD}")]);
        }
        for (name, identity) in [
            ("IN", authority.server(LOCAL)),
            ("OLD", authority.expired_server()),
            ("AWAY", authority.server(&["elsewhere.example"])),
        ] {
            arguments.extend(["--listener".to_owned(), format!("{name}:SASL_SSL")]);
            settings.extend(listener(name, &identity));
        }
        arguments.extend(settings);
        Server::kafka(&borrowed(&arguments)).unwrap()
    })
}

fn listener(name: &str, identity: &Identity) -> Vec<String> {
    let module = "org.apache.kafka.common.security.scram.ScramLoginModule";
    let settings = [
        ("ssl.client.auth", "required".to_owned()),
        ("ssl.keystore.type", "PEM".to_owned()),
        (
            "ssl.keystore.certificate.chain",
            one_line(&identity.certificate),
        ),
        ("ssl.keystore.key", one_line(&identity.key)),
        ("ssl.truststore.type", "PEM".to_owned()),
        (
            "ssl.truststore.certificates",
            one_line(&issuers().authority.certificate()),
        ),
        ("sasl.enabled.mechanisms", "SCRAM-SHA-512".to_owned()),
        (
            "scram-sha-512.sasl.jaas.config",
            format!("{module} required;"),
        ),
    ];
    let name = name.to_lowercase();
    let settings = settings.iter();
    settings
        .map(|(key, value)| format!("listener.name.{name}.{key}={value}"))
        .collect()
}

/// As Java's properties write it.
fn one_line(pem: &str) -> String {
    pem.lines().collect::<Vec<_>>().join("\\n")
}

/// The flags of a client of Kafka, by what should be told from the right ones.
pub(super) fn kafka_flags(listener: &str, changes: &[(&str, &str)]) -> Vec<String> {
    let Issuers {
        authority,
        kafka_client,
        ..
    } = issuers();
    let (ca, certificate, key) = (
        authority.certificate(),
        &kafka_client.certificate,
        &kafka_client.key,
    );
    let mut properties = vec![
        ("security.protocol", "SASL_SSL"),
        ("sasl.mechanism", "SCRAM-SHA-512"),
        ("sasl.username", RELAY),
        ("sasl.password", PASSWORD),
        ("ssl.ca.pem", &ca),
        ("ssl.certificate.pem", certificate),
        ("ssl.key.pem", key),
    ];
    properties.retain(|(name, _)| changes.iter().all(|(changed, _)| changed != name));
    properties.extend(changes.iter().filter(|(_, value)| !value.is_empty()));
    let brokers = kafka().fact(&format!("brokers.{listener}"));
    let mut flags = vec!["--brokers".to_owned(), brokers.to_owned()];
    for (name, value) in properties {
        flags.extend(["-X".to_owned(), format!("{name}={value}")]);
    }
    flags
}

/// A Postgres that takes a role's sessions with TLS, a password and a certificate
/// that names the role, and the files of who may be that role.
pub(super) struct SecurePostgres {
    pub(super) fixture: Fixture,
    /// The role the relay logs in as.
    pub(super) role: String,
    pub(super) files: TempDir,
}

impl SecurePostgres {
    /// Set up, with Kafka's plain listener beside it.
    pub(super) async fn start() -> Self {
        let mut fixture = Fixture::with_postgres(&[]).await;
        fixture.brokers = kafka().fact("brokers").to_owned();
        fixture.set_up().await;
        let (role, _) = fixture.role("relay").await;
        fixture.setup(&["--grant-to", &role]).results();
        let files = TempDir::new().unwrap();
        let Issuers {
            authority,
            stranger,
            ..
        } = issuers();
        let client = authority.client(&role);
        let other = stranger.client(&role);
        for (name, text) in [
            ("ca.pem", &authority.certificate()),
            ("stranger.pem", &stranger.certificate()),
            ("relay.pem", &client.certificate),
            ("relay.key", &client.key),
            ("other.pem", &other.certificate),
            ("other.key", &other.key),
        ] {
            fs::write(files.path().join(name), text).unwrap();
        }
        let mut postgres = Self {
            fixture,
            role,
            files,
        };
        postgres.admit("clientcert=verify-full");
        postgres.write("ca.pem", &authority.certificate());
        postgres.present(&authority.server(LOCAL)).await;
        postgres
    }

    /// Makes the server ask for a password and for this, once it has read its files again.
    pub(super) fn admit(&self, option: &str) {
        let hba = format!("local all all trust\nhostssl all all all scram-sha-256 {option}\n");
        self.write("pg_hba.conf", &hba);
    }

    /// Makes the server present this certificate from now on.
    pub(super) async fn present(&mut self, identity: &Identity) {
        self.write("server.crt", &identity.certificate);
        self.write("server.key", &identity.key);
        for setting in ["ssl_ca_file = 'ca.pem'", "ssl = on"] {
            let set = format!("ALTER SYSTEM SET {setting}");
            self.fixture.client.batch_execute(&set).await.unwrap();
        }
        self.fixture.restart_postgres().await;
    }

    /// Writes a file of the server's, which only it may read.
    fn write(&self, name: &str, text: &str) {
        let server = self.fixture.postgres.as_ref().unwrap();
        let folder = Path::new(server.fact("data_dir"));
        let owner = fs::metadata(folder).unwrap();
        let fresh = folder.join(format!("{name}.fresh"));
        let mut options = fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .mode(0o600)
            .open(&fresh)
            .unwrap();
        file.write_all(text.as_bytes()).unwrap();
        chown(&fresh, Some(owner.uid()), Some(owner.gid())).unwrap();
        fs::rename(fresh, folder.join(name)).unwrap();
    }

    /// The key of the role's certificate.
    pub(super) fn key(&self) -> String {
        fs::read_to_string(self.files.path().join("relay.key")).unwrap()
    }

    /// The role's URL, with these parameters.
    pub(super) fn url(&self, host: &str, password: &str, parameters: &str) -> String {
        let server = self.fixture.postgres.as_ref().unwrap();
        self.url_at(server.fact("port"), host, password, parameters)
    }

    /// The same, at another port.
    pub(super) fn url_at(
        &self,
        port: &str,
        host: &str,
        password: &str,
        parameters: &str,
    ) -> String {
        let role = &self.role;
        let name = self.fixture.database.name();
        format!(
            "postgresql://{role}:{password}@{host}:{port}/{name}?hostaddr=127.0.0.1&{parameters}"
        )
    }

    /// Parameters that name files, `ca.pem` among them.
    pub(super) fn parameters(&self, mode: &str, ca: &str, identity: &str) -> String {
        let file = |name: &str| self.files.path().join(name).display().to_string();
        let (ca, certificate) = (file(ca), file(&format!("{identity}.pem")));
        let key = file(&format!("{identity}.key"));
        format!("sslmode={mode}&sslrootcert={ca}&sslcert={certificate}&sslkey={key}")
    }
}
