//! The HTTP heads: HTTPS on 443 for child hubs, plain HTTP on 9600 for operators.
//!
//! [`scope_api`] and [`admin`] are routers without sockets; [`listen`] puts one of them on a
//! listener. HTTP/1.1 only. Every wait and every buffer that a client can cause is bounded by
//! [`limits`]. Contract: spec/auth-hierarchy-http.md 7 and 10, spec/operations.md A2.1.

pub mod admin;
pub mod limits;
pub mod methods_api;
mod patience;
pub mod scope_api;
pub mod websocket;

#[cfg(test)]
mod tests;

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderValue;
use axum::http::header::X_CONTENT_TYPE_OPTIONS;
use axum::middleware::map_response;
use axum::response::Response;
use axum::{Extension, Router};
use bytes::Bytes;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use limits::{CONNECTION_MAX, FINISH_MAX, HANDSHAKE_MAX, HEADER_BYTES_MAX, HEADER_READ_MAX};
use patience::Patience;

use crate::admission::{Admission, Bounds, Stranger};

/// What carries a listener's connections.
#[derive(Clone)]
pub enum Transport {
    /// Nothing but TCP.
    Plain,
    /// TLS.
    Tls(TlsAcceptor),
}

impl std::fmt::Debug for Transport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain => "Plain",
            Self::Tls(_) => "Tls",
        })
    }
}

/// The end entity certificate (DER) that the peer of a connection has shown, if any: an extension
/// of every request that came over TLS.
#[derive(Clone, Debug)]
pub(crate) struct PeerCertificate(pub(crate) Option<Bytes>);

/// The connection's place among those of strangers, for whoever serves it on under another
/// protocol: an extension of every request.
#[derive(Clone, Debug)]
pub(crate) struct Place(Arc<Mutex<Option<Stranger>>>);

impl Place {
    fn new(stranger: Stranger) -> Self {
        Self(Arc::new(Mutex::new(Some(stranger))))
    }

    /// Takes it over; the connection's end does not give it back then.
    pub(crate) fn take(&self) -> Option<Stranger> {
        self.0.lock().take()
    }
}

/// What a listener needs beside its socket.
#[derive(Clone, Debug)]
pub struct ListenerContext {
    /// What carries the connections.
    pub transport: Transport,
    /// Connections at once, at most half of them of one address. As many again wait; further ones
    /// are closed.
    pub connections_max: usize,
    /// Fires when the hub stops: requests under way get [`limits::FINISH_MAX`].
    pub stop: CancellationToken,
    /// Owns the tasks of the connections.
    pub tasks: TaskTracker,
}

/// Accepts connections and serves `router` on each, until the context's token fires.
///
/// A failure to accept (too many open files) is waited out: it must not end the listener.
pub async fn listen(listener: TcpListener, router: Router, context: ListenerContext) {
    let router = guarded(router);
    let per_address = context.connections_max.div_ceil(2);
    let admission = Admission::new(Bounds {
        served_max: context.connections_max,
        served_per_address_max: per_address,
        waiting_max: context.connections_max,
        waiting_per_address_max: per_address,
    });
    loop {
        let (socket, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("HTTP cannot accept a connection now: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = context.stop.cancelled() => return,
        };
        let Some(arrival) = admission.arrive(peer.ip()) else {
            tracing::debug!("Closed a connection from {peer}: too many of them wait");
            continue;
        };
        let router = router.clone();
        let stop = context.stop.clone();
        let transport = context.transport.clone();
        context.tasks.spawn(async move {
            let stranger = tokio::select! {
                stranger = timeout(CONNECTION_MAX, arrival.admitted()) => stranger,
                () = stop.cancelled() => return,
            };
            let Ok(stranger) = stranger else { return };
            // Answers are small and must not wait for acknowledgements of earlier ones.
            let _ = socket.set_nodelay(true);
            let patience = stranger.patience(HANDSHAKE_MAX);
            let place = Place::new(stranger);
            let router = router.layer(Extension(place.clone()));
            match transport {
                Transport::Plain => serve(socket, router, stop).await,
                Transport::Tls(acceptor) => {
                    let accepted = timeout(patience, acceptor.accept(socket));
                    let accepted = tokio::select! {
                        accepted = accepted => accepted,
                        () = stop.cancelled() => return,
                    };
                    match accepted {
                        Ok(Ok(stream)) => {
                            let (_, session) = stream.get_ref();
                            let chain = session.peer_certificates().unwrap_or_default();
                            let certificate = chain.first().map(|der| Bytes::copy_from_slice(der));
                            let certificate = PeerCertificate(certificate);
                            serve(stream, router.layer(Extension(certificate)), stop).await;
                        }
                        Ok(Err(error)) => handshake_failed(peer, &error),
                        Err(_) => handshake_failed(peer, &io::ErrorKind::TimedOut.into()),
                    }
                }
            }
        });
    }
}

/// Serves one connection until it ends, `stop` fires or it is too old.
async fn serve<S>(stream: S, router: Router, stop: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let patience = Patience::default();
    let router = router.layer(Extension(patience.clone()));
    let mut connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_READ_MAX)
            .max_buf_size(HEADER_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
            .with_upgrades()
    );
    let ended = tokio::select! {
        ended = connection.as_mut() => Some(ended),
        () = stop.cancelled() => None,
        () = tokio::time::sleep(CONNECTION_MAX) => {
            connection.as_mut().graceful_shutdown();
            tokio::select! {
                biased;
                () = patience.exhausted() => None,
                ended = connection.as_mut() => Some(ended),
                () = stop.cancelled() => None,
            }
        }
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            connection.as_mut().graceful_shutdown();
            timeout(FINISH_MAX, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        tracing::debug!("An HTTP connection failed: {error}");
    }
}

fn handshake_failed(peer: SocketAddr, error: &io::Error) {
    tracing::debug!("TLS handshake with {peer} failed: {error}");
}

/// Every answer says that its content type is meant (spec/auth-hierarchy-http.md 10).
fn guarded(router: Router) -> Router {
    router.layer(map_response(nosniff))
}

async fn nosniff(mut response: Response) -> Response {
    response
        .headers_mut()
        .insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}
