//! `/metrics`, `/healthz` and `/readyz`.
//!
//! Whoever can reach the port can open connections, and say nothing or not listen to
//! the answer. So their number is bounded, and each carries one request, whose head
//! has a limit, and is hung up when that takes too long: the relay keeps its files and its memory for itself,
//! and those who wait get their turn.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tracing::warn;

use crate::health::Health;
use crate::metrics::{InboxMetrics, Metrics};

/// What the endpoints report on.
#[derive(Clone)]
pub struct Endpoints {
    /// What `/metrics` prints.
    pub metrics: Exposed,
    /// What `/readyz` judges.
    pub health: Arc<Health>,
}

/// Whose metrics there are.
#[derive(Clone)]
pub enum Exposed {
    /// A relay's.
    Relay(Arc<Metrics>),
    /// An inbox's.
    Inbox(Arc<InboxMetrics>),
}

impl Exposed {
    fn text(&self, health: &Health) -> String {
        match self {
            Self::Relay(metrics) => metrics.text(health),
            Self::Inbox(metrics) => metrics.text(health),
        }
    }
}

/// The most connections at a time. Further ones wait to be accepted.
const CONNECTIONS_MAX: usize = 256;

/// How long a request and its answer may take.
const CONNECTION_MAX: Duration = Duration::from_secs(10);

/// The longest head of a request; a browser's is a tenth of it. What a connection
/// buffers is bounded by this too.
const HEAD_BYTES_MAX: usize = 16 << 10;

/// Pause after the system could not accept a connection, as it has no file left.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Answers until the process ends.
pub async fn serve(listener: TcpListener, endpoints: Endpoints) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get("alive\n"))
        .route("/readyz", get(ready))
        .with_state(endpoints);
    let service = TowerToHyperService::new(router);
    let mut server = http1::Builder::new();
    server.keep_alive(false).max_buf_size(HEAD_BYTES_MAX);
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
            unreachable!("the semaphore is never closed");
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!("accept an http connection: {error}");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let connection = server.serve_connection(TokioIo::new(stream), service.clone());
        tokio::spawn(async move {
            // What a client did wrong is answered to the client.
            let _ = timeout(CONNECTION_MAX, connection).await;
            drop(permit);
        });
    }
}

async fn metrics(State(endpoints): State<Endpoints>) -> impl IntoResponse {
    let text = endpoints.metrics.text(&endpoints.health);
    ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text)
}

async fn ready(State(endpoints): State<Endpoints>) -> impl IntoResponse {
    let complaints = endpoints.health.complaints();
    if complaints.is_empty() {
        (StatusCode::OK, "ready\n".to_owned())
    } else {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            complaints.join("\n") + "\n",
        )
    }
}
