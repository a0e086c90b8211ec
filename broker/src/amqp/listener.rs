//! The listener on 5671: TLS first, then AMQP (spec/amqp.md 1.1).

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::TaskTracker;

use super::connection::{ConnectionContext, serve};
use super::limits::{
    CREDENTIAL_MAX, HANDSHAKE_MAX, STRANGERS_MAX, STRANGERS_PER_ADDRESS_MAX, STRANGERS_WAITING_MAX,
    STRANGERS_WAITING_PER_ADDRESS_MAX,
};
use crate::admission::{Admission, Bounds, Stranger};

const BOUNDS: Bounds = Bounds {
    served_max: STRANGERS_MAX,
    served_per_address_max: STRANGERS_PER_ADDRESS_MAX,
    waiting_max: STRANGERS_WAITING_MAX,
    waiting_per_address_max: STRANGERS_WAITING_PER_ADDRESS_MAX,
};

/// Accepts connections until the context's token fires.
///
/// A failure to accept (too many open files) is waited out: it must not end the listener.
pub async fn listen(
    listener: TcpListener,
    tls: TlsAcceptor,
    context: ConnectionContext,
    tasks: TaskTracker,
) {
    let admission = Admission::new(BOUNDS);
    loop {
        let (socket, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!("AMQP cannot accept a connection now: {error}");
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
        let tls = tls.clone();
        let context = context.clone();
        tasks.spawn(async move {
            let stranger = tokio::select! {
                stranger = timeout(CREDENTIAL_MAX, arrival.admitted()) => stranger,
                () = context.stop.cancelled() => return,
            };
            if let Ok(stranger) = stranger {
                // Boxed, so that one that waits costs little.
                Box::pin(welcome(socket, peer, stranger, &tls, context)).await;
            }
        });
    }
}

/// TLS, then AMQP.
async fn welcome(
    socket: TcpStream,
    peer: SocketAddr,
    stranger: Stranger,
    tls: &TlsAcceptor,
    context: ConnectionContext,
) {
    // Dispositions are small and must not wait for one another.
    let _ = socket.set_nodelay(true);
    let patience = stranger.patience(HANDSHAKE_MAX);
    let accepted = tokio::select! {
        accepted = timeout(patience, tls.accept(socket)) => accepted,
        () = context.stop.cancelled() => return,
    };
    let error = match accepted {
        Ok(Ok(stream)) => {
            let (_, session) = stream.get_ref();
            let certificates = session.peer_certificates();
            let certificate = certificates.and_then(|chain| chain.first());
            let certificate = certificate.map(|der| der.to_vec());
            serve(stream, context, certificate, Some(stranger)).await;
            return;
        }
        Ok(Err(error)) => error,
        Err(_) => io::ErrorKind::TimedOut.into(),
    };
    tracing::debug!("TLS handshake with {peer} failed: {error}");
}
