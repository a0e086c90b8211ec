//! One relayed connection: admission, the second leg, and two pumps.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Fault, FaultTable, Link, Mode, Party, Plane};

/// Bytes taken from a socket at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// Chunks on their way in one direction. With a delay this bounds the throughput, as a bandwidth
/// delay product does: 256 chunks of at most 64 KiB.
const CHUNKS_IN_FLIGHT: usize = 256;

/// Where connections accepted by one listener go.
#[derive(Clone, Debug)]
pub(super) struct Way {
    pub(super) target: Party,
    pub(super) to: SocketAddr,
    pub(super) plane: Plane,
}

/// The faults as one connection experiences them.
#[derive(Clone, Debug)]
pub(super) struct LinkFaults {
    /// `None` on the management plane.
    table: Option<watch::Receiver<FaultTable>>,
    link: Link,
}

impl LinkFaults {
    pub(super) fn new(table: &watch::Sender<FaultTable>, link: Link, plane: Plane) -> Self {
        Self {
            table: (plane == Plane::Data).then(|| table.subscribe()),
            link,
        }
    }

    fn now(&mut self) -> Fault {
        match &mut self.table {
            Some(table) => table.borrow_and_update().effective(&self.link),
            None => Fault::default(),
        }
    }

    /// Waits for the next change of any fault.
    async fn changed(&mut self) {
        let ended = match &mut self.table {
            Some(table) => table.changed().await.is_err(),
            None => true,
        };
        if ended {
            std::future::pending::<()>().await;
        }
    }

    /// Waits while the link is a black hole.
    async fn passable(&mut self) -> Fault {
        loop {
            let fault = self.now();
            if fault.mode != Mode::BlackHole {
                return fault;
            }
            self.changed().await;
        }
    }
}

/// Carries one accepted connection to its end, which is a clean one only when both sides ended it
/// cleanly; everything else is a reset for both.
pub(super) async fn run(
    mut client: TcpStream,
    source: IpAddr,
    way: &Way,
    faults: LinkFaults,
    reset: CancellationToken,
) {
    let mut server = None;
    let carried = tokio::select! {
        carried = carry(&mut client, &mut server, source, way, faults) => carried.is_ok(),
        () = reset.cancelled() => false,
    };
    if !carried {
        // Closing a socket with linger zero sends RST instead of FIN.
        let _ = client.set_zero_linger();
        if let Some(server) = &server {
            let _ = server.set_zero_linger();
        }
    }
}

async fn carry(
    client: &mut TcpStream,
    server: &mut Option<TcpStream>,
    source: IpAddr,
    way: &Way,
    mut faults: LinkFaults,
) -> io::Result<()> {
    if faults.passable().await.mode != Mode::Open {
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    let server = server.insert(connect(source, way.to).await?);
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (client_read, client_write) = client.split();
    let (server_read, server_write) = server.split();
    tokio::try_join!(
        pump(client_read, server_write, faults.clone()),
        pump(server_read, client_write, faults.clone()),
    )?;
    Ok(())
}

/// Connects from the address of the original client, so that the target sees who it is.
async fn connect(source: IpAddr, to: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::new(source, 0))?;
    socket.connect(to).await
}

/// Bytes and the moment from which they may be written.
type Chunk = (Instant, Bytes);

/// Moves one direction until its end, which it passes on.
async fn pump(read: ReadHalf<'_>, write: WriteHalf<'_>, faults: LinkFaults) -> io::Result<()> {
    let (sender, receiver) = mpsc::channel(CHUNKS_IN_FLIGHT);
    tokio::try_join!(
        take_in(read, sender, faults.clone()),
        give_out(write, receiver, faults)
    )?;
    Ok(())
}

async fn take_in(
    mut read: ReadHalf<'_>,
    sender: mpsc::Sender<Chunk>,
    mut faults: LinkFaults,
) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK_BYTES);
        let count = read.read_buf(&mut buffer).await;
        // What arrives in a black hole, be it the end or an error, is not seen until it is healed.
        let fault = faults.passable().await;
        if count? == 0 {
            return Ok(());
        }
        let due = Instant::now() + fault.delay;
        if sender.send((due, buffer.split().freeze())).await.is_err() {
            return Ok(());
        }
    }
}

async fn give_out(
    mut write: WriteHalf<'_>,
    mut receiver: mpsc::Receiver<Chunk>,
    mut faults: LinkFaults,
) -> io::Result<()> {
    while let Some((due, bytes)) = receiver.recv().await {
        if due.saturating_duration_since(Instant::now()) > Duration::ZERO {
            tokio::time::sleep_until(due).await;
        }
        faults.passable().await;
        write.write_all(&bytes).await?;
    }
    write.shutdown().await
}
