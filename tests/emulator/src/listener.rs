//! A listening port that follows its switch.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;

use crate::connections::{Connection, Transport};
use crate::counters::Counter;
use crate::hub::Hub;
use crate::limits::CONNECTIONS_MAX;
use crate::port::{Gated, PortGate, PortState};

/// Pause after a failed accept or bind, so that a lack of descriptors does not spin.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// One port of the hub.
pub(crate) struct Port {
    pub(crate) hub: Arc<Hub>,
    pub(crate) transport: Transport,
    pub(crate) address: SocketAddr,
    pub(crate) gate: PortGate,
    pub(crate) tasks: TaskTracker,
    pub(crate) shutdown: CancellationToken,
}

impl Port {
    /// Accepts until shutdown; each socket gets a task that runs `serve`. While the port is
    /// refused there is no listener, so the system answers with a reset.
    pub(crate) async fn run<F>(
        self,
        listener: TcpListener,
        serve: impl Fn(Gated<TcpStream>, Connection) -> F,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        let mut state = self.gate.watch();
        let mut listener = Some(listener);
        loop {
            let wanted = *state.borrow_and_update();
            if let Err(error) = self.follow(wanted, &mut listener).await {
                warn!(address = %self.address, %error, "can not listen, trying again");
                tokio::time::sleep(RETRY_PAUSE).await;
                continue;
            }
            self.gate.report(wanted);
            let accepted = tokio::select! {
                accepted = accept(listener.as_ref(), &room) => accepted,
                _ = state.changed() => continue,
                () = self.shutdown.cancelled() => return,
            };
            match accepted {
                Ok((socket, peer, permit)) => {
                    let _ = socket.set_nodelay(true);
                    let now_ms = self.hub.clock.now_ms();
                    let connection = self.hub.connections.open(self.transport, peer, now_ms);
                    self.hub.counters.add_other(match self.transport {
                        Transport::Amqp => Counter::AmqpConnections,
                        // No port is of WebSockets alone.
                        Transport::AmqpWs | Transport::Https | Transport::MqttWs => {
                            Counter::HttpsConnections
                        }
                        Transport::Mqtt => Counter::MqttConnections,
                    });
                    let served = serve(self.gate.guard(socket), connection);
                    let shutdown = self.shutdown.clone();
                    self.tasks.spawn(async move {
                        shutdown.run_until_cancelled_owned(served).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    warn!(address = %self.address, %error, "accept failed");
                    tokio::time::sleep(RETRY_PAUSE).await;
                }
            }
        }
    }

    async fn follow(
        &self,
        wanted: PortState,
        listener: &mut Option<TcpListener>,
    ) -> io::Result<()> {
        match (wanted, &listener) {
            (PortState::Refused, _) => *listener = None,
            (_, None) => *listener = Some(TcpListener::bind(self.address).await?),
            (_, Some(_)) => {}
        }
        Ok(())
    }
}

/// The next socket; never when there is no listener. Waits while the port has its most sockets.
async fn accept(
    listener: Option<&TcpListener>,
    room: &Arc<Semaphore>,
) -> io::Result<(TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit)> {
    let Some(listener) = listener else {
        return std::future::pending().await;
    };
    let permit = room
        .clone()
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let (socket, peer) = listener.accept().await?;
    Ok((socket, peer, permit))
}
