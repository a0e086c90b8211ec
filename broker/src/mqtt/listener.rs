//! The MQTT listener: TCP, TLS, then one task for each connection.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;

use super::connection::{ConnectionContext, serve};
use super::limits::{HANDSHAKE_MAX, HANDSHAKES_MAX};

/// Accepts connections until the context's token fires.
///
/// A failure to accept (too many open files) is waited out: it must not end the listener.
pub async fn listen(
    listener: TcpListener,
    tls: TlsAcceptor,
    context: ConnectionContext,
    tasks: TaskTracker,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let permit = tokio::select! {
            permit = Arc::clone(&handshakes).acquire_owned() => permit,
            () = context.stop.cancelled() => return,
        };
        let Ok(permit) = permit else { return };
        let (socket, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("MQTT cannot accept a connection now: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = context.stop.cancelled() => return,
        };
        let tls = tls.clone();
        let context = context.clone();
        tasks.spawn(async move {
            // Acknowledgements are small and must not wait for one another.
            let _ = socket.set_nodelay(true);
            let accepted = tokio::select! {
                accepted = timeout(HANDSHAKE_MAX, tls.accept(socket)) => accepted,
                () = context.stop.cancelled() => return,
            };
            let stream = match accepted {
                Ok(Ok(stream)) => stream,
                Ok(Err(error)) => return handshake_failed(peer, &error),
                Err(_) => return handshake_failed(peer, &io::ErrorKind::TimedOut.into()),
            };
            drop(permit);
            serve(stream, context).await;
        });
    }
}

fn handshake_failed(peer: SocketAddr, error: &io::Error) {
    tracing::debug!("TLS handshake with {peer} failed: {error}");
}
