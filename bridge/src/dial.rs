//! TLS connections to the upstream host: name, address, socket options, handshake.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpSocket, TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::{TlsConnector, client::TlsStream, rustls::ClientConfig};

use crate::proxy::Proxy;

/// Why no connection came about. Every one of these is worth another try.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// The name resolves to no address of the family of our local address.
    #[error("{host} has no address that can be reached from {local:?}")]
    NoAddress {
        /// The upstream host.
        host: String,
        /// Address that outgoing sockets are bound to.
        local: Option<IpAddr>,
    },
    /// The host name cannot be the subject of a certificate.
    #[error("{0} is not a valid TLS server name")]
    InvalidName(String),
    /// The name cannot be resolved.
    #[error("cannot resolve {host}: {source}")]
    Resolve {
        /// The upstream host.
        host: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// All of it took too long.
    #[error("no connection to {host}:{port} within {after:?}")]
    TimedOut {
        /// The upstream host.
        host: String,
        /// The port.
        port: u16,
        /// The limit.
        after: Duration,
    },
    /// The TCP connection was refused or failed.
    #[error("cannot connect to {address}: {source}")]
    Tcp {
        /// The last address that was tried.
        address: SocketAddr,
        /// What the socket said.
        source: io::Error,
    },
    /// The proxy did not open a tunnel.
    #[error("no tunnel to {host} through the proxy: {source}")]
    Proxy {
        /// The upstream host.
        host: String,
        /// What the proxy said.
        source: io::Error,
    },
    /// The WebSocket upgrade failed.
    #[error("no WebSocket to {host}: {source}")]
    WebSocket {
        /// The upstream host.
        host: String,
        /// What the server said.
        source: io::Error,
    },
    /// The TLS handshake failed, for instance because the certificate is not trusted.
    #[error("TLS handshake with {host} failed: {source}")]
    Tls {
        /// The upstream host.
        host: String,
        /// What the handshake said.
        source: io::Error,
    },
}

/// What lies between TLS and the device protocol.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Carrier {
    /// Nothing: the protocol's own port.
    #[default]
    Tls,
    /// A WebSocket on the HTTPS port, with this sub-protocol.
    WebSocket(&'static str),
}

/// Bytes to and from the upstream, whatever carries them.
pub trait ByteIo: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> ByteIo for S {}

/// Makes TLS connections to one host.
#[derive(Clone)]
pub struct Dialer {
    host: Arc<str>,
    proxy: Option<Arc<Proxy>>,
    local_address: Option<IpAddr>,
    tls: TlsConnector,
    timeout: Duration,
}

impl std::fmt::Debug for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dialer")
            .field("host", &self.host)
            .field("proxy", &self.proxy)
            .field("local_address", &self.local_address)
            .field("timeout", &self.timeout)
            .finish_non_exhaustive()
    }
}

impl Dialer {
    /// `host` is a name or an address and what the server's certificate must be for. Sockets are
    /// bound to `local_address` unless it is none or unspecified. `timeout` bounds a whole dial:
    /// resolution, connect and handshake.
    #[must_use]
    pub fn new(
        host: &str,
        local_address: Option<IpAddr>,
        tls: Arc<ClientConfig>,
        timeout: Duration,
    ) -> Self {
        Self {
            host: host.into(),
            proxy: None,
            local_address: local_address.filter(|address| !address.is_unspecified()),
            tls: TlsConnector::from(tls),
            timeout,
        }
    }

    /// The same, through `proxy` where that covers the host.
    #[must_use]
    pub fn through(mut self, proxy: Option<Proxy>) -> Self {
        self.proxy = proxy.filter(|proxy| proxy.covers(&self.host)).map(Arc::new);
        self
    }

    /// The upstream host.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Opens what a device protocol is spoken on.
    ///
    /// # Errors
    ///
    /// See [`DialError`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes whatever was opened.
    pub async fn open(&self, port: u16, carrier: Carrier) -> Result<Box<dyn ByteIo>, DialError> {
        let stream = self.dial(port).await?;
        let Carrier::WebSocket(protocol) = carrier else {
            return Ok(Box::new(stream));
        };
        let authority = if port == 443 {
            self.host.to_string()
        } else {
            format!("{}:{port}", self.host)
        };
        let upgrade = edgehub_ws::connect(stream, &authority, protocol);
        match timeout(self.timeout, upgrade).await {
            Ok(Ok(socket)) => Ok(Box::new(socket)),
            Ok(Err(source)) => Err(DialError::WebSocket {
                host: self.host.to_string(),
                source,
            }),
            Err(_) => Err(self.timed_out(port)),
        }
    }

    /// Opens a TLS connection, trying the host's addresses one after the other.
    ///
    /// # Errors
    ///
    /// See [`DialError`].
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes whatever was opened.
    pub async fn dial(&self, port: u16) -> Result<TlsStream<TcpStream>, DialError> {
        let name = ServerName::try_from(self.host.to_string())
            .map_err(|_| DialError::InvalidName(self.host.to_string()))?;
        let dialed = timeout(self.timeout, async {
            let tcp = match &self.proxy {
                Some(proxy) => {
                    let (host, proxy_port) = proxy.address();
                    let tcp = self.connect(host, proxy_port).await?;
                    let tunnel = proxy.tunnel(tcp, &self.host, port).await;
                    tunnel.map_err(|source| DialError::Proxy {
                        host: self.host.to_string(),
                        source,
                    })?
                }
                None => self.connect(&self.host, port).await?,
            };
            self.tls
                .connect(name, tcp)
                .await
                .map_err(|source| DialError::Tls {
                    host: self.host.to_string(),
                    source,
                })
        });
        dialed.await.unwrap_or_else(|_| Err(self.timed_out(port)))
    }

    fn timed_out(&self, port: u16) -> DialError {
        DialError::TimedOut {
            host: self.host.to_string(),
            port,
            after: self.timeout,
        }
    }

    async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, DialError> {
        let resolved = lookup_host((host, port)).await;
        let addresses = resolved.map_err(|source| DialError::Resolve {
            host: host.to_owned(),
            source,
        })?;
        let mut failure = DialError::NoAddress {
            host: host.to_owned(),
            local: self.local_address,
        };
        for address in addresses {
            if self
                .local_address
                .is_some_and(|local| local.is_ipv4() != address.is_ipv4())
            {
                continue;
            }
            match self.connect_to(address).await {
                Ok(stream) => return Ok(stream),
                Err(source) => failure = DialError::Tcp { address, source },
            }
        }
        Err(failure)
    }

    async fn connect_to(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let socket = if address.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        if let Some(local) = self.local_address {
            socket.bind(SocketAddr::new(local, 0))?;
        }
        let stream = socket.connect(address).await?;
        // Requests are written whole, one write per turn: waiting for more would only add delay.
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}
