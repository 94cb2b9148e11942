//! A service as the handler: what it is sent, and what becomes of what it answers.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

use super::{Event, Stage};
use crate::security::certificates::{Authority, LOCAL};
use crate::support::{Relay, wait_until};

/// What it was sent.
#[derive(Debug, Clone)]
struct Asked {
    id: String,
    headers: HeaderMap,
    body: Vec<u8>,
    at: Instant,
}

/// What it does with a message, each time that it comes; 204 after that.
#[derive(Debug, Clone, Copy)]
enum Answer {
    Status(u16),
    /// 429, and how many seconds it asks for.
    Later(&'static str),
    Hang,
    /// It breaks off.
    Panic,
}

#[derive(Default)]
struct Journal {
    asked: Mutex<Vec<Asked>>,
    handled: Mutex<Vec<Asked>>,
    answers: Mutex<HashMap<String, Vec<Answer>>>,
}

struct Service {
    address: SocketAddr,
    journal: Arc<Journal>,
    serving: JoinHandle<()>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

impl Service {
    async fn new() -> Self {
        Self::at("127.0.0.1:0".parse().unwrap()).await
    }

    async fn at(address: SocketAddr) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let journal = Arc::new(Journal::default());
        let router = axum::Router::new()
            .route("/events", axum::routing::post(answer))
            .with_state(Arc::clone(&journal));
        let serving = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self {
            address,
            journal,
            serving,
        }
    }

    fn flags(&self) -> Vec<String> {
        let address = format!("http://{}/events?source=test", self.address);
        let flags = ["--handler", &address, "--retry-backoff-min", "100ms"];
        flags.map(str::to_owned).to_vec()
    }

    fn start(&self, stage: &Stage, flags: &[&str]) -> Relay {
        let own = self.flags();
        let own: Vec<&str> = own.iter().map(String::as_str).collect();
        stage.start(&[&own[..], flags].concat())
    }

    /// What it answers for this message, first.
    fn answers(&self, id: &str, answers: &[Answer]) {
        let answers = answers.iter().rev().copied().collect();
        let mut all = self.journal.answers.lock().unwrap();
        all.insert(id.to_owned(), answers);
    }

    fn asked(&self) -> Vec<Asked> {
        self.journal.asked.lock().unwrap().clone()
    }

    fn handled(&self) -> Vec<Asked> {
        self.journal.handled.lock().unwrap().clone()
    }

    async fn wait_for(&self, handled: usize) {
        wait_until(&format!("{handled} are handled"), async || {
            self.handled().len() >= handled
        })
        .await;
    }

    /// Each of these at least once, and those of a key in their order.
    fn assert_in_order(&self, events: &[Event]) {
        let handled = self.handled();
        let mut last: HashMap<&str, usize> = HashMap::new();
        for asked in &handled {
            let (key, version) = asked.id.split_once('-').unwrap();
            let version = version.parse().unwrap();
            let before = last.insert(key, version);
            assert!(before.is_none_or(|before| before <= version), "{asked:?}");
        }
        for event in events {
            let id = event.id.as_deref().unwrap();
            assert!(handled.iter().any(|asked| asked.id == id), "{id} is lost");
        }
    }
}

async fn answer(State(journal): State<Arc<Journal>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let asked = Asked {
        id: parts.headers["ce-id"].to_str().unwrap().to_owned(),
        headers: parts.headers,
        body: to_bytes(body, usize::MAX).await.unwrap().to_vec(),
        at: Instant::now(),
    };
    let said = {
        let mut answers = journal.answers.lock().unwrap();
        answers.get_mut(&asked.id).and_then(Vec::pop)
    };
    journal.asked.lock().unwrap().push(asked.clone());
    match said {
        None => {
            // So that several are under way at once.
            tokio::time::sleep(Duration::from_millis(2)).await;
            journal.handled.lock().unwrap().push(asked);
            StatusCode::NO_CONTENT.into_response()
        }
        Some(Answer::Status(status)) => {
            (StatusCode::from_u16(status).unwrap(), "what is wrong").into_response()
        }
        Some(Answer::Later(after)) => {
            (StatusCode::TOO_MANY_REQUESTS, [("retry-after", after)]).into_response()
        }
        Some(Answer::Hang) => std::future::pending().await,
        Some(Answer::Panic) => Response::new(Body::from_stream(futures_util::stream::once(
            std::future::ready(Err::<Vec<u8>, _>(std::io::Error::other("broken off"))),
        ))),
    }
}

const AT_LEAST_ONCE: [&str; 2] = ["--ack", "at-least-once"];
const STRATEGIES: [&[&str]; 3] = [
    &["--ack", "at-most-once"],
    &["--ack", "at-least-once", "--commit", "on-persist"],
    &["--ack", "at-least-once", "--commit", "on-success"],
];

/// Ten messages for each of ten keys, in turns.
fn events() -> Vec<Event> {
    (0..100)
        .map(|n| Event::of(&format!("k{}", n % 10), n / 10))
        .collect()
}

async fn wait_until_none_waits(stage: &Stage) {
    wait_until("none waits", async || {
        let waiting = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'waiting'";
        stage.count(waiting).await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_message_is_a_cloudevent() {
    let stage = Stage::new(1).await;
    let service = Service::new().await;
    stage.produce(&[
        Event {
            value: Some(br#"{"id":"k-0","event_type":"order created","schema_version":"2","payload":{"a":1}}"#.to_vec()),
            key: Some("Zoë 100%".to_owned()),
            headers: &[
                ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
                ("ce_source", b"/shop"),
                ("ce_id", b"not this"),
                ("Correlation-Id", b"c-1"),
                ("odd name", b"x"),
                ("bytes", &[0xff]),
                ("authorization", b"Bearer of the record"),
            ],
            ..Event::of("k", 0)
        },
        Event { value: None, ..Event::of("k", 1) },
        Event { value: Some(b"\xffno json".to_vec()), ..Event::of("k", 2) },
    ]);
    let secret = ["--handler-header", "Authorization: Bearer of the user"];
    let inbox = service.start(&stage, &[AT_LEAST_ONCE, secret].concat());
    service.wait_for(3).await;
    inbox.drain().await;
    let mut handled = service.handled();
    handled.sort_by(|one, other| one.id.cmp(&other.id));
    let said = |n: usize, name: &str| {
        let value = handled[n].headers.get(name);
        value.map(|value| value.to_str().unwrap().to_owned())
    };
    for (name, expected) in [
        ("ce-specversion", Some("1.0")),
        ("ce-id", Some("k-0")),
        ("ce-source", Some("/shop")),
        ("ce-type", Some("order%20created")),
        ("ce-schemaversion", Some("2")),
        ("ce-partitionkey", Some("Zo%C3%AB%20100%25")),
        ("ce-kafkapartition", Some("0")),
        ("ce-kafkaoffset", Some("0")),
        ("content-type", Some("application/json")),
        (
            "traceparent",
            Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
        ),
        ("kafka-header-correlation-id", Some("c-1")),
        (
            "kafka-header-authorization",
            Some("Bearer%20of%20the%20record"),
        ),
        ("kafka-header-bytes", None),
        ("authorization", Some("Bearer of the user")),
    ] {
        assert_eq!(said(0, name).as_deref(), expected, "{name}");
    }
    assert_eq!(handled[0].body, br#"{"a":1}"#);
    let time = said(0, "ce-time").unwrap();
    assert!(
        time.starts_with("20") && time.ends_with("%2B00:00") || time.ends_with("+00:00"),
        "{time}"
    );
    assert_eq!(handled[1].body, b"");
    assert_eq!(said(1, "content-type"), None);
    assert_eq!(said(1, "ce-source"), Some(format!("/{}", stage.topic)));
    assert_eq!(handled[2].body, b"\xffno json");
    assert_eq!(
        said(2, "content-type").as_deref(),
        Some("application/octet-stream")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_service_does_not_handle_costs_itself_and_its_key() {
    for strategy in &STRATEGIES[1..] {
        let stage = Stage::new(2).await;
        let service = Service::new().await;
        service.answers("k0-2", &[Answer::Status(422)]);
        service.answers(
            "k1-2",
            &[Answer::Status(500), Answer::Status(404), Answer::Panic],
        );
        service.answers("k2-2", &[Answer::Later("1")]);
        service.answers("k3-2", &[Answer::Hang]);
        service.answers("k4-2", &[Answer::Status(503); 3]);
        stage.produce(&events());
        let flags = ["--max-attempts", "3", "--handler-timeout", "1s"];
        let inbox = service.start(&stage, &[strategy, &flags[..]].concat());
        // 422 once, and thrice 503.
        service.wait_for(97).await;
        wait_until_none_waits(&stage).await;
        inbox.drain().await;
        let mut handled = events();
        handled.retain(|event| !matches!(event.id.as_deref(), Some("k0-2" | "k1-2" | "k4-2")));
        service.assert_in_order(&handled);
        assert_eq!(service.handled().len(), 97, "{strategy:?}");
        let dead =
            "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead' AND attempts = ";
        assert_eq!(stage.count(&format!("{dead} 1 AND error = 'the handler answered 422 Unprocessable Entity: what is wrong'")).await, 1);
        assert_eq!(stage.count(&format!("{dead} 3")).await, 2);
        let later: Vec<Instant> = (service.asked().iter())
            .filter(|asked| asked.id == "k2-2")
            .map(|asked| asked.at)
            .collect();
        assert_eq!(later.len(), 2);
        assert!(later[1] - later[0] >= Duration::from_secs(1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_is_away_costs_no_attempt() {
    for strategy in STRATEGIES {
        let stage = Stage::new(2).await;
        let address = Service::new().await.address;
        stage.produce(&events());
        let handler = format!("http://{address}/events");
        let flags = ["--handler", &handler, "--max-attempts", "1"];
        let mut inbox = stage.start(&[&flags, strategy].concat());
        inbox.wait_for_log("serving http").await;
        wait_until("it is told what is waited for", async || {
            let (_, status) = inbox.get("/readyz");
            status.contains("cannot be reached")
        })
        .await;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let dead = "SELECT count(*) FROM postbox.inbox_message WHERE status = 'dead'";
        assert_eq!(stage.count(dead).await, 0, "{strategy:?}");
        let service = Service::at(address).await;
        service.wait_for(100).await;
        wait_until_none_waits(&stage).await;
        inbox.drain().await;
        assert_eq!(stage.count(dead).await, 0, "{strategy:?}");
        assert_eq!(service.handled().len(), 100);
        service.assert_in_order(&events());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kill_repeats_no_more_than_what_is_asked_for_at_once() {
    for strategy in STRATEGIES {
        let stage = Stage::new(1).await;
        let service = Service::new().await;
        stage.produce(&events());
        // All that is asked for at once ends with it.
        for key in 0..4 {
            service.answers(&format!("k{key}-3"), &[Answer::Hang]);
        }
        let flags = ["--instance", "one", "--handler-parallel", "4"];
        let flags = [strategy, &flags[..]].concat();
        let inbox = service.start(&stage, &flags);
        wait_until("one hangs", async || {
            service.asked().iter().any(|asked| asked.id.ends_with("-3"))
        })
        .await;
        inbox.kill();
        let mut inbox = service.start(&stage, &flags);
        inbox.wait_for_log("reading on").await;
        wait_until("all is read", async || {
            let read = "SELECT coalesce(sum(next_offset), 0)::bigint FROM postbox.inbox_offset";
            stage.count(read).await == 100
        })
        .await;
        wait_until_none_waits(&stage).await;
        inbox.drain().await;
        let handled = service.handled();
        let ids: std::collections::HashSet<&str> = handled.iter().map(|asked| &*asked.id).collect();
        let repeated = handled.len() - ids.len();
        if strategy == STRATEGIES[0] {
            assert_eq!(repeated, 0);
            assert!(ids.len() < 100, "nothing was at work");
        } else {
            assert!(repeated <= 4, "{strategy:?}: {repeated} were repeated");
            service.assert_in_order(&events());
        }
    }
}

/// TLS in front of a service. Its port.
async fn encrypted(service: &Service, authority: &Authority) -> u16 {
    let identity = authority.server(LOCAL);
    let certificate = CertificateDer::from_pem_slice(identity.certificate.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(server));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let address = service.address;
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let mut client = acceptor.accept(client).await?;
                let mut server = TcpStream::connect(address).await?;
                copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    port
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_with_https_must_have_a_certificate_that_is_trusted() {
    let stage = Stage::new(1).await;
    let service = Service::new().await;
    let [ours, other] = ["ours", "other"].map(Authority::new);
    let port = encrypted(&service, &ours).await;
    stage.produce(&events());
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ca.pem");
    let start = |authority: &Authority| {
        std::fs::write(&file, authority.certificate()).unwrap();
        let address = format!("https://localhost:{port}/events");
        let flags = ["--handler", &address, "--max-attempts", "1"];
        let mut command = stage.command(&[&flags[..], &AT_LEAST_ONCE].concat());
        Relay::spawn(
            command
                .env("SSL_CERT_FILE", &file)
                .env_remove("SSL_CERT_DIR"),
        )
    };
    let mut inbox = start(&other);
    inbox.wait_for_log("cannot be reached").await;
    let why = inbox.log();
    assert!(
        why.contains("invalid peer certificate: UnknownIssuer"),
        "{why}"
    );
    inbox.drain().await;
    assert_eq!(service.asked().len(), 0);
    let inbox = start(&ours);
    service.wait_for(100).await;
    inbox.drain().await;
    service.assert_in_order(&events());
}

#[test]
fn a_service_that_cannot_be_is_refused() {
    let refused = |flags: &[&str]| {
        let needed = ["inbox", "--topics", "t", "--group", "g", "--brokers", "b:1"];
        let flags = [&needed, flags].concat();
        let output = crate::support::run(&mut crate::support::postbox(&flags));
        assert_eq!(output.code, 2, "{output:?}");
        output.stderr
    };
    let url = ["--handler", "http://localhost/"];
    for (flags, expected) in [
        (&[][..], "use --ack at-least-once, or at-most-once"),
        (
            &["--ack", "at-least-once", "--handler-header", "secret"],
            "write it as 'NAME: VALUE'",
        ),
    ] {
        let why = refused(&[&url, flags].concat());
        assert!(why.contains(expected) && !why.contains("secret"), "{why}");
    }
    let at_least_once = ["--ack", "at-least-once"];
    let address = refused(&[&["--handler", "http:/localhost"], &at_least_once[..]].concat());
    assert!(
        address.contains("handler's address http:/localhost is none"),
        "{address}"
    );
    let password = refused(
        &[
            &["--handler", "http://a:secret@localhost"],
            &at_least_once[..],
        ]
        .concat(),
    );
    assert!(
        password.contains("--handler-header") && !password.contains("secret"),
        "{password}"
    );
    let header = refused(&["--handler", "sql:f", "--handler-header", "a: b"]);
    assert!(
        header.contains("name one with --handler http://"),
        "{header}"
    );
}
