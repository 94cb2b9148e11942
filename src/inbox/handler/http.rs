//! A service as a handler: each message is one POST to it, a [CloudEvent] in the binary mode of
//! its [HTTP binding].
//!
//! | header | what it has |
//! | --- | --- |
//! | `ce-id` | the message's id: the same at each attempt, so what the service has done before it can tell by it |
//! | `ce-source` | `/` and the topic, unless the record has a `ce_source` |
//! | `ce-type`, `ce-schemaversion` | as the message says |
//! | `ce-time` | when the record was produced, unless it has a `ce_time` |
//! | `ce-partitionkey` | the record's key |
//! | `ce-kafkapartition`, `ce-kafkaoffset` | where the record stands |
//! | `ce-…` | the record's other headers `ce_…`, as producers of CloudEvents write them |
//! | `traceparent`, `tracestate` | the record's |
//! | `kafka-header-…` | the record's other headers that are text, if HTTP can name them |
//! | `content-type` | `application/json`; `application/octet-stream` for what is no JSON; none for a tombstone |
//!
//! Values are percent-encoded as the binding has it. The body is the payload, without the envelope.
//!
//! | answer | what becomes of the message |
//! | --- | --- |
//! | 2xx | it is handled |
//! | 3xx, 401, 403, 404, 405, 407, 408, 409, 421, 425, 429, 5xx, none in time | it is tried again; when `Retry-After` says, if it does |
//! | any other 4xx | it will never do: a dead letter at once |
//! | no connection | it waits, and nothing is called until there is one: no attempt, as nobody has seen it |
//!
//! # What is misleading
//!
//! A connection that breaks before the answer is there says nothing about what was done. So
//! what a service does happens at least once, whatever we do, or at most once if a message that
//! was sent is never sent again (`--ack at-most-once`); exactly once is beyond both of us.
//!
//! [CloudEvent]: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md
//! [HTTP binding]: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/http-protocol-binding.md

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER, USER_AGENT};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_rustls::builderstates::{WantsSchemes, WantsTlsConfig};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::time::Instant;
use tracing::{info, warn};

use super::{Again, Failure};
use crate::backoff::doubled;
use crate::error::{Error, ErrorKind, Result, chain};
use crate::inbox::message::Message;
use crate::lock::lock;

/// How long a connection may take to be made.
const CONNECT_MAX: Duration = Duration::from_secs(5);

/// How soon it is tried again to make one, and at last how seldom.
const AWAY_MIN: Duration = Duration::from_secs(1);
const AWAY_MAX: Duration = Duration::from_secs(30);

/// For how long a connection is kept that nothing is asked on. Less than what most servers and
/// balancers keep theirs for, so that we end it and not they, at a request.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// How much of an answer's body is read, and how long it is waited for: what was made of the
/// message is known without it.
const WHY_BYTES_MAX: usize = 4096;
const BODY_MAX: Duration = Duration::from_secs(1);

/// What a value of a header may not have as it is.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');

/// What we say, whatever the record's headers do.
const OURS: [&str; 7] = [
    "ce-specversion",
    "ce-id",
    "ce-type",
    "ce-schemaversion",
    "ce-partitionkey",
    "ce-kafkapartition",
    "ce-kafkaoffset",
];

/// Where a service is, and how it is asked.
#[derive(Clone, PartialEq, Eq)]
pub struct Endpoint {
    uri: Uri,
    headers: HeaderMap,
    parallel: usize,
}

// Headers may have secrets, and so may a query.
impl std::fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = self.uri.scheme_str().unwrap_or_default();
        let authority = self
            .uri
            .authority()
            .map_or("", |authority| authority.as_str());
        write!(f, "{scheme}://{authority}{}", self.uri.path())
    }
}

impl Endpoint {
    /// One that may be asked for so many messages at once. A header is `name: value`.
    ///
    /// # Errors
    /// If it is no such address, or a header is none.
    pub fn new(address: &str, headers: &[String], parallel: usize) -> Result<Self> {
        let refuse = |message: String| Error::new(ErrorKind::Settings, message);
        let uri: Uri = address.parse().map_err(|error| {
            refuse(format!("the handler's address {address} is none")).caused_by(error)
        })?;
        let is_known = matches!(uri.scheme_str(), Some("http" | "https"));
        let Some(authority) = uri.authority().filter(|_| is_known) else {
            let message = format!(
                "the handler's address {address} is none: it begins with http://HOST or https://HOST"
            );
            return Err(refuse(message));
        };
        if authority.as_str().contains('@') {
            return Err(refuse(
                "the handler's address has a password in it, which would be shown in logs: use \
                 --handler-header 'authorization: Basic …'"
                    .to_owned(),
            ));
        }
        let mut map = HeaderMap::new();
        for header in headers {
            let read = header.split_once(':').and_then(|(name, value)| {
                let mut value = HeaderValue::try_from(value.trim()).ok()?;
                value.set_sensitive(true);
                Some((HeaderName::try_from(name.trim()).ok()?, value))
            });
            // Not what it was: it may be a secret.
            let (name, value) = read.ok_or_else(|| {
                refuse("a header of the handler is none: write it as 'NAME: VALUE'".to_owned())
            })?;
            map.append(name, value);
        }
        Ok(Self {
            uri,
            headers: map,
            parallel: parallel.max(1),
        })
    }

    /// Gets ready. Nothing is asked yet.
    pub(super) fn open(&self) -> Result<Service> {
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_connect_timeout(Some(CONNECT_MAX));
        connector.set_nodelay(true);
        let connector = self
            .checked(HttpsConnectorBuilder::new())
            .map_err(|error| {
                let message = "the certificates that this system trusts cannot be read";
                Error::new(ErrorKind::Settings, message).caused_by(error)
            })?
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_MAX)
            .pool_max_idle_per_host(self.parallel)
            .build(connector);
        Ok(Service {
            client,
            endpoint: self.clone(),
            reach: Mutex::default(),
        })
    }
}

impl Endpoint {
    /// With the system's certificates; a system need have none where they check nothing.
    fn checked(
        &self,
        builder: HttpsConnectorBuilder<WantsTlsConfig>,
    ) -> std::io::Result<HttpsConnectorBuilder<WantsSchemes>> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        if self.uri.scheme_str() == Some("https") {
            return builder.with_provider_and_native_roots(provider);
        }
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(std::io::Error::other)?
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        Ok(builder.with_tls_config(config))
    }
}

/// A service that can be asked.
pub(crate) struct Service {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
    endpoint: Endpoint,
    reach: Mutex<Reach>,
}

/// Whether it could be reached, last.
#[derive(Debug, Default)]
struct Reach {
    failures: u32,
    /// Before this it is not asked again, for this reason.
    away: Option<(Instant, String)>,
}

/// What a service makes of a message.
#[derive(Debug)]
pub(crate) enum Answer {
    Handled,
    Failed(Failure),
    /// It was not reached, for this reason, and is not to be asked again for so long.
    Away(String, Duration),
}

impl Service {
    /// How many messages it may have at once.
    pub(crate) fn parallel(&self) -> usize {
        self.endpoint.parallel
    }

    /// Why it is not to be asked now, and for how long.
    pub(crate) fn away(&self) -> Option<(String, Duration)> {
        let reach = lock(&self.reach);
        let (until, why) = reach.away.as_ref()?;
        let pause = until.checked_duration_since(Instant::now())?;
        Some((why.clone(), pause))
    }

    /// Asks it to handle a message, unless it was away just now.
    pub(crate) async fn ask(&self, message: &Message, limit: Duration) -> Answer {
        if let Some((why, pause)) = self.away() {
            return Answer::Away(why, pause);
        }
        let request = request(&self.endpoint, message);
        let asked = tokio::time::timeout(limit, self.client.request(request)).await;
        let response = match asked {
            Ok(Err(error)) if error.is_connect() => return self.unreached(&error),
            Err(_) => Err(Failure::too_long(None, limit)),
            Ok(Err(error)) => Err(Failure::new(None, chain(&error), Again::InTurn)),
            Ok(Ok(response)) => Ok(response),
        };
        self.reached();
        let response = match response {
            Ok(response) => response,
            Err(failure) => return Answer::Failed(failure),
        };
        let (parts, body) = response.into_parts();
        // All of it, if it is short, so that the connection can be used again.
        let body = Limited::new(body, WHY_BYTES_MAX).collect();
        let body = tokio::time::timeout(BODY_MAX, body).await;
        if parts.status.is_success() {
            return Answer::Handled;
        }
        let said = body.ok().and_then(Result::ok);
        let said = said.map(|body| body.to_bytes()).unwrap_or_default();
        Answer::Failed(refused(parts.status, &parts.headers, &said))
    }

    fn reached(&self) {
        let mut reach = lock(&self.reach);
        if reach.failures > 0 {
            info!("the handler is reached again");
            *reach = Reach::default();
        }
    }

    /// There was no connection.
    fn unreached(&self, error: &(dyn StdError + 'static)) -> Answer {
        let why = format!(
            "the handler at {:?} cannot be reached: {}",
            self.endpoint,
            chain(error)
        );
        let mut reach = lock(&self.reach);
        let now = Instant::now();
        // Several may have tried at once.
        if !matches!(&reach.away, Some((until, _)) if *until > now) {
            if reach.failures == 0 {
                warn!("{why}");
            }
            reach.failures += 1;
            let pause = doubled(AWAY_MIN, AWAY_MAX, reach.failures);
            reach.away = Some((now + pause, why.clone()));
        }
        let until = reach.away.as_ref().map_or(now, |(until, _)| *until);
        Answer::Away(why, until - now)
    }
}

fn request(endpoint: &Endpoint, message: &Message) -> Request<Full<Bytes>> {
    let body = match (&message.payload, &message.body) {
        (Some(payload), _) => Bytes::from(payload.clone()),
        (None, Some(body)) => Bytes::from(body.clone()),
        (None, None) => Bytes::new(),
    };
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = endpoint.uri.clone();
    let headers = request.headers_mut();
    let agent = HeaderValue::from_static(concat!("postbox/", env!("CARGO_PKG_VERSION")));
    headers.insert(USER_AGENT, agent);
    if let Some(content) = content_type(message) {
        headers.insert(CONTENT_TYPE, content);
    }
    for (name, value) in attributes(message).iter().chain(&passed_on(message)) {
        // What HTTP cannot name is not for it.
        if let Ok(name) = HeaderName::try_from(name) {
            headers.insert(name, encoded(value));
        }
    }
    // They are the user's, and what a record says does not change them.
    for (name, value) in &endpoint.headers {
        headers.insert(name, value.clone());
    }
    request
}

fn content_type(message: &Message) -> Option<HeaderValue> {
    match (&message.payload, &message.body) {
        (Some(_), _) => Some(HeaderValue::from_static("application/json")),
        (None, Some(_)) => Some(HeaderValue::from_static("application/octet-stream")),
        (None, None) => None,
    }
}

/// What the message is, in the terms of CloudEvents.
fn attributes(message: &Message) -> Vec<(String, String)> {
    let all = [
        ("ce-specversion", Some("1.0".to_owned())),
        ("ce-id", Some(message.id.text.clone())),
        ("ce-source", Some(format!("/{}", message.topic))),
        ("ce-type", Some(message.event_type.clone())),
        ("ce-schemaversion", message.schema_version.clone()),
        ("ce-time", message.produced_at.map(|at| at.to_string())),
        ("ce-partitionkey", message.key.clone()),
        ("ce-kafkapartition", Some(message.partition.to_string())),
        ("ce-kafkaoffset", Some(message.offset.to_string())),
    ];
    let all = all.into_iter();
    all.filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect()
}

/// The record's headers, as they are called in a request.
fn passed_on(message: &Message) -> Vec<(String, String)> {
    let headers: BTreeMap<String, Value> =
        serde_json::from_str(&message.headers).unwrap_or_default();
    let named = headers.into_iter().filter_map(|(name, value)| {
        let name = name.to_ascii_lowercase();
        let name = match name.as_str() {
            "traceparent" | "tracestate" => name,
            _ => match name.strip_prefix("ce_") {
                Some(attribute) => format!("ce-{attribute}"),
                None => format!("kafka-header-{name}"),
            },
        };
        let Value::String(value) = value else {
            return None;
        };
        (!OURS.contains(&&*name)).then_some((name, value))
    });
    named.collect()
}

/// As the binding writes it: the text's bytes beyond printable ASCII in percent.
fn encoded(value: &str) -> HeaderValue {
    let encoded = utf8_percent_encode(value, ENCODED).to_string();
    HeaderValue::try_from(encoded).expect("printable ASCII is left")
}

/// Why it was refused, and what that means.
fn refused(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Failure {
    let mut why = format!("the handler answered {status}");
    let said = String::from_utf8_lossy(body);
    if !said.trim().is_empty() {
        why = format!("{why}: {}", said.trim());
    }
    let again = match status.as_u16() {
        401 | 403 | 404 | 405 | 407 | 408 | 409 | 421 | 425 | 429 => true,
        _ => !status.is_client_error(),
    };
    let again = match again {
        false => Again::Never,
        true => retry_after(headers).map_or(Again::InTurn, Again::After),
    };
    Failure::new(None, why, again)
}

/// How long it asks us to wait: seconds, or until a date ([RFC 9110], 10.2.3).
///
/// [RFC 9110]: https://www.rfc-editor.org/rfc/rfc9110#section-10.2.3
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let said = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = said.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(said).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}
