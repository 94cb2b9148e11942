//! `/metrics`, `/healthz` and `/readyz`.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;

use crate::health::Health;
use crate::metrics::Metrics;

/// What the endpoints report on.
#[derive(Clone)]
pub struct Endpoints {
    /// What `/metrics` prints.
    pub metrics: Arc<Metrics>,
    /// What `/readyz` judges.
    pub health: Arc<Health>,
}

/// Answers until the process ends.
///
/// # Errors
/// If the socket fails.
pub async fn serve(listener: TcpListener, endpoints: Endpoints) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get("alive\n"))
        .route("/readyz", get(ready))
        .with_state(endpoints);
    axum::serve(listener, router).await
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
