//! What operators and scrapers ask on 9600: `/metrics`, `/healthz`, `/readyz`.
//!
//! Plain HTTP, no authentication, no look at `Host`: edgeAgent calls by address
//! (spec/operations.md A2.1). Everything else is 404; none of this is on 443 (design.md D14).

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use edgehub_storage::Queue;
use tokio::sync::watch;

use crate::hub::Hub;
use crate::readiness::Readiness;
use crate::telemetry::metrics::{self, Metrics};

/// What the metrics port shows. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Admin {
    hub: Arc<Hub>,
    metrics: Metrics,
    readiness: watch::Receiver<Readiness>,
}

impl Admin {
    /// Shows the state of `hub`, the samples of `metrics` and the word of `readiness`.
    #[must_use]
    pub fn new(hub: Arc<Hub>, metrics: Metrics, readiness: watch::Receiver<Readiness>) -> Self {
        Self {
            hub,
            metrics,
            readiness,
        }
    }

    /// The routes of the metrics port.
    pub fn router(self) -> Router {
        Router::new()
            .route("/metrics", get(samples))
            .route("/healthz", get(health))
            .route("/readyz", get(ready))
            .fallback(async || StatusCode::NOT_FOUND)
            .method_not_allowed_fallback(async || StatusCode::NOT_FOUND)
            .with_state(self)
    }

    /// Brings the samples up to date that nobody counts as things happen.
    async fn refresh(&self) {
        let store = self.hub.store();
        for queue in store.queues() {
            let id = queue.id();
            #[expect(clippy::cast_precision_loss, reason = "a gauge; exact up to 2^53")]
            metrics::queue_length(&id.endpoint, id.priority).set(queue.length() as f64);
            if let Some(age_secs) = self.oldest_age_secs(&queue).await {
                metrics::oldest_message_age(&id.endpoint, id.priority).set(age_secs);
            }
        }
        let stats = store.stats();
        metrics::set_store_counters(stats.commits, stats.wal_syncs);
    }

    /// How long the oldest message has waited; 0 in an empty queue, none when it is not known.
    async fn oldest_age_secs(&self, queue: &Queue) -> Option<f64> {
        match queue.oldest_enqueued_ms().await {
            Ok(None) => Some(0.0),
            Ok(Some(oldest_ms)) => {
                let age_ms = self.hub.clock().unix_ms().saturating_sub(oldest_ms);
                Some(std::time::Duration::from_millis(age_ms).as_secs_f64())
            }
            Err(error) => {
                tracing::warn!(
                    "The age of queue {} cannot be read: {error}",
                    queue.id().endpoint
                );
                None
            }
        }
    }
}

async fn samples(State(admin): State<Admin>) -> Response {
    admin.refresh().await;
    (
        [(CONTENT_TYPE, metrics::CONTENT_TYPE)],
        admin.metrics.render(),
    )
        .into_response()
}

/// A writer that has died comes back with the process only: whoever watches should restart it.
async fn health(State(admin): State<Admin>) -> Response {
    if admin.hub.store().is_writing() {
        "ok".into_response()
    } else {
        let text = "the store's writer has ended: nothing is stored until the process is restarted";
        (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
    }
}

async fn ready(State(admin): State<Admin>) -> Response {
    let readiness = admin.readiness.borrow().clone();
    let status = if readiness.is_ready() {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (status, readiness.to_string()).into_response()
}
