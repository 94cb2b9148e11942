//! Someone in between, with a certificate that the client trusts.

use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::certificates::LOCAL;
use super::complaint;
use super::servers::{PASSWORD, SecurePostgres, issuers};
use crate::support::Relay;

/// What a client asks first: <https://www.postgresql.org/docs/current/protocol-message-formats.html>.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// Reads along between clients and the Postgres at this port; its own.
async fn read_along(postgres: &str) -> String {
    let authority = &issuers().authority;
    let ca = CertificateDer::from_pem_slice(authority.certificate().as_bytes()).unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(ca).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let identity = authority.server(LOCAL);
    let certificate = CertificateDer::from_pem_slice(identity.certificate.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
    let server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let (connector, acceptor) = (
        TlsConnector::from(Arc::new(client)),
        TlsAcceptor::from(Arc::new(server)),
    );
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let address = format!("127.0.0.1:{postgres}");
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (connector, acceptor) = (connector.clone(), acceptor.clone());
            tokio::spawn(carry(client, address.clone(), connector, acceptor));
        }
    });
    port.to_string()
}

async fn carry(
    mut client: TcpStream,
    address: String,
    connector: TlsConnector,
    acceptor: TlsAcceptor,
) -> std::io::Result<()> {
    let mut server = TcpStream::connect(address).await?;
    let mut request = [0; 8];
    client.read_exact(&mut request).await?;
    assert_eq!(request, SSL_REQUEST);
    server.write_all(&request).await?;
    assert_eq!(server.read_u8().await?, b'S');
    client.write_all(b"S").await?;
    let name = ServerName::try_from("localhost").unwrap();
    let mut server = connector.connect(name, server).await?;
    let mut client = acceptor.accept(client).await?;
    copy_bidirectional(&mut client, &mut server).await?;
    Ok(())
}

/// SCRAM proves to both sides that the other knows the password, and with channel
/// binding, that there is one encrypted connection between them and not two.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn someone_in_between_is_noticed_though_the_certificate_is_trusted() {
    let postgres = SecurePostgres::start().await;
    postgres.admit("");
    let port = postgres.fixture.postgres.as_ref().unwrap().fact("port");
    let own = read_along(port).await;
    let trusted = postgres.parameters("verify-full", "ca.pem", "relay");
    let (trusted, _) = trusted.split_once("&sslcert").unwrap();
    let reload = "SELECT pg_reload_conf()";
    postgres.fixture.client.batch_execute(reload).await.unwrap();

    // Without channel binding he is not noticed.
    let blind = format!("{trusted}&channel_binding=disable");
    let url = postgres.url_at(&own, "localhost", PASSWORD, &blind);
    let mut relay = Relay::start(&postgres.fixture, &["--database-url", &url]);
    relay.wait_for_log("streaming").await;
    relay.drain().await;

    let url = postgres.url_at(&own, "localhost", PASSWORD, trusted);
    let mut relay = Relay::start(&postgres.fixture, &["--database-url", &url]);
    assert_eq!(relay.exit_code().await, 6, "{}", relay.log());
    let log = relay.log();
    let complaint = complaint(&log);
    assert!(complaint.contains("channel binding"), "{complaint}");
}
