//! The load: connections that keep a window of messages in flight, each new one as soon as an older
//! one is acknowledged (a closed loop). What is spoken is a [`Publisher`]'s business.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use crate::gauge::{Rate, Reading};
use crate::{amqp, mqtt};

/// Until a client is let in, and for the last acknowledgements.
const ANSWER_MAX: Duration = Duration::from_secs(30);

/// Bytes of answers that are read at once, and the longest of them.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// How to reach one server.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    /// Where AMQP is spoken; a peer that does not has no clients for it.
    pub(crate) amqp_address: SocketAddr,
    /// Plain TCP when there is none.
    pub(crate) tls: Option<(TlsConnector, ServerName<'static>)>,
    /// For its CPU time.
    pub(crate) pid: u32,
}

/// One connection's identity.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    pub(crate) id: String,
    pub(crate) speech: Speech,
}

/// What it speaks.
#[derive(Clone, Debug)]
pub(crate) enum Speech {
    /// MQTT 3.1.1, to this topic.
    Mqtt {
        login: Option<mqtt::Login>,
        topic: String,
    },
    /// AMQP 1.0.
    Amqp(amqp::Account),
}

/// How much load for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) window: u16,
    pub(crate) body_bytes: usize,
    pub(crate) warm_up: Duration,
    pub(crate) measured: Duration,
}

/// What came out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Outcome {
    pub(crate) rate: Rate,
    /// Of the whole run, warm-up and end included.
    pub(crate) acknowledged: u64,
    /// From handing a publish to the socket until its acknowledgement was read.
    pub(crate) latency_p50: Duration,
    pub(crate) latency_p99: Duration,
}

/// What all connections of one run share.
#[derive(Debug, Default)]
struct Shared {
    acknowledged: AtomicU64,
    measuring: AtomicBool,
    stop: AtomicBool,
}

/// The sending side of a protocol, once it was let in.
pub(crate) trait Publisher: Send {
    /// Adds all messages that may be sent at `now`.
    fn fill(&mut self, now: Instant, out: &mut Vec<u8>) -> Result<()>;

    /// Takes the complete answers at the front of `bytes`, and returns how many bytes those are.
    /// `acknowledged` gets when each message was sent that an answer is about.
    fn take(&mut self, bytes: &[u8], acknowledged: &mut dyn FnMut(Instant)) -> Result<usize>;

    /// Messages that were sent and are not acknowledged.
    fn in_flight(&self) -> usize;

    /// What asks the server to close.
    fn farewell(&self) -> Vec<u8>;
}

/// A connection's bytes.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Puts the load on a server and measures it after the warm-up.
///
/// # Errors
/// When a connection is refused or closed, or an answer is not the expected one: a measurement with
/// errors in it is none.
pub(crate) async fn run(server: &Server, clients: Vec<Client>, load: Load) -> Result<Outcome> {
    let shared = Arc::new(Shared::default());
    let mut tasks = JoinSet::new();
    // All connections stand before the first message.
    let mut connections = Vec::new();
    for client in clients {
        let opened = tokio::time::timeout(ANSWER_MAX, connect(server, &client, load));
        let opened = opened.await.context("no answer");
        let (stream, publisher) = opened.flatten().with_context(|| client.id.clone())?;
        connections.push(Connection::new(stream, publisher, Arc::clone(&shared)));
    }
    for connection in connections {
        tasks.spawn(connection.run());
    }
    let rate = tokio::select! {
        rate = measure(server.pid, &shared, load) => rate?,
        // No task ends before it is told to: this is an error.
        ended = tasks.join_next() => {
            ended.context("no connection")???;
            bail!("a connection ended by itself");
        }
    };
    shared.stop.store(true, Ordering::Relaxed);
    let mut latencies = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        latencies.extend(ended??);
    }
    latencies.sort_unstable();
    let percentile = |percent: usize| {
        let at = (latencies.len() * percent / 100).min(latencies.len().saturating_sub(1));
        let micros = latencies.get(at).copied().unwrap_or_default();
        Duration::from_micros(u64::from(micros))
    };
    let acknowledged = shared.acknowledged.load(Ordering::Relaxed);
    let (latency_p50, latency_p99) = (percentile(50), percentile(99));
    Ok(Outcome {
        rate,
        acknowledged,
        latency_p50,
        latency_p99,
    })
}

async fn measure(pid: u32, shared: &Shared, load: Load) -> Result<Rate> {
    // A wait for time itself: it is what is measured against.
    tokio::time::sleep(load.warm_up).await;
    shared.measuring.store(true, Ordering::Relaxed);
    let first = Reading::take(pid, shared.acknowledged.load(Ordering::Relaxed))?;
    tokio::time::sleep(load.measured).await;
    let last = Reading::take(pid, shared.acknowledged.load(Ordering::Relaxed))?;
    shared.measuring.store(false, Ordering::Relaxed);
    Ok(last.rate_since(first))
}

async fn connect(
    server: &Server,
    client: &Client,
    load: Load,
) -> Result<(Box<dyn Stream>, Box<dyn Publisher>)> {
    let address = match client.speech {
        Speech::Mqtt { .. } => server.address,
        Speech::Amqp(_) => server.amqp_address,
    };
    let tcp = TcpStream::connect(address).await?;
    tcp.set_nodelay(true)?;
    let mut stream: Box<dyn Stream> = match &server.tls {
        None => Box::new(tcp),
        Some((connector, name)) => {
            Box::new(connector.connect(name.clone(), tcp).await.context("TLS")?)
        }
    };
    let (body_bytes, window) = (load.body_bytes, load.window);
    let publisher: Box<dyn Publisher> = match &client.speech {
        Speech::Mqtt { login, topic } => {
            mqtt::open(&mut *stream, &client.id, login.as_ref()).await?;
            Box::new(mqtt::Sender::new(topic, body_bytes, window))
        }
        Speech::Amqp(account) => {
            let opened = amqp::Sender::open(&mut *stream, account, body_bytes, window);
            Box::new(opened.await?)
        }
    };
    Ok((stream, publisher))
}

/// One connection under load.
struct Connection {
    stream: Box<dyn Stream>,
    publisher: Box<dyn Publisher>,
    shared: Arc<Shared>,
    out: Vec<u8>,
    latencies_us: Vec<u32>,
}

impl Connection {
    fn new(stream: Box<dyn Stream>, publisher: Box<dyn Publisher>, shared: Arc<Shared>) -> Self {
        Self {
            stream,
            publisher,
            shared,
            out: Vec::new(),
            latencies_us: Vec::new(),
        }
    }

    /// Publishes until it is told to stop, waits for what is in flight and returns the latencies of
    /// the measured time in microseconds.
    async fn run(mut self) -> Result<Vec<u32>> {
        // The longest answer fits, so the space behind `filled` never runs out.
        let mut buffer = vec![0; ANSWER_BYTES_MAX];
        let mut filled = 0;
        loop {
            if self.shared.stop.load(Ordering::Relaxed) {
                if self.publisher.in_flight() == 0 {
                    self.stream.write_all(&self.publisher.farewell()).await?;
                    self.stream.flush().await?;
                    return Ok(self.latencies_us);
                }
            } else {
                self.fill_window().await?;
            }
            let space = buffer.get_mut(filled..).unwrap_or_default();
            let read = tokio::time::timeout(ANSWER_MAX, self.stream.read(space));
            let read = read
                .await
                .context("no acknowledgement: the server stalls")??;
            ensure!(read > 0, "the server closed the connection");
            filled += read;
            let used = self.take_answers(buffer.get(..filled).unwrap_or_default())?;
            buffer.copy_within(used..filled, 0);
            filled -= used;
        }
    }

    /// Everything that the window allows, in one write. The acknowledgements of a window fit into
    /// the socket's buffers, so the server can always write and this cannot wait for itself.
    async fn fill_window(&mut self) -> Result<()> {
        self.out.clear();
        self.publisher.fill(Instant::now(), &mut self.out)?;
        if self.out.is_empty() {
            return Ok(());
        }
        self.stream.write_all(&self.out).await?;
        Ok(self.stream.flush().await?)
    }

    fn take_answers(&mut self, bytes: &[u8]) -> Result<usize> {
        let mut acknowledged = 0;
        let measuring = self.shared.measuring.load(Ordering::Relaxed);
        let (now, latencies) = (Instant::now(), &mut self.latencies_us);
        let used = self.publisher.take(bytes, &mut |sent| {
            acknowledged += 1;
            if measuring {
                let micros = now.duration_since(sent).as_micros();
                latencies.push(u32::try_from(micros).unwrap_or(u32::MAX));
            }
        })?;
        self.shared
            .acknowledged
            .fetch_add(acknowledged, Ordering::Relaxed);
        Ok(used)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::DuplexStream;

    use super::*;

    fn connection(window: u16) -> (Connection, DuplexStream, Arc<Shared>) {
        let (ours, theirs) = tokio::io::duplex(1 << 16);
        let shared = Arc::new(Shared::default());
        let publisher = Box::new(mqtt::Sender::new("t", 4, window));
        let connection = Connection::new(Box::new(ours), publisher, Arc::clone(&shared));
        (connection, theirs, shared)
    }

    /// Reads `count` publishes of four bytes and returns their packet ids.
    async fn publishes(server: &mut DuplexStream, count: usize) -> Vec<[u8; 2]> {
        let mut ids = Vec::new();
        for _ in 0..count {
            let mut packet = [0; 11];
            server.read_exact(&mut packet).await.unwrap();
            assert_eq!(packet[..5], *b"\x32\x09\x00\x01t");
            ids.push([packet[5], packet[6]]);
        }
        ids
    }

    #[tokio::test]
    async fn an_acknowledgement_lets_one_more_publish_out() {
        let (connection, mut server, shared) = connection(3);
        shared.measuring.store(true, Ordering::Relaxed);
        let task = tokio::spawn(connection.run());
        let ids = publishes(&mut server, 3).await;
        assert_eq!(ids, [[0, 1], [0, 2], [0, 3]]);
        // In any order, and split in the middle.
        server.write_all(b"\x40\x02\x00\x03\x40\x02").await.unwrap();
        assert_eq!(publishes(&mut server, 1).await, [[0, 3]]);
        shared.stop.store(true, Ordering::Relaxed);
        server
            .write_all(b"\x00\x01\x40\x02\x00\x02\x40\x02\x00\x03")
            .await
            .unwrap();
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, mqtt::DISCONNECT);
        assert_eq!(task.await.unwrap().unwrap().len(), 4);
        assert_eq!(shared.acknowledged.load(Ordering::Relaxed), 4);
    }

    #[tokio::test]
    async fn a_wrong_acknowledgement_or_a_close_is_an_error() {
        for answer in [
            &b"\x40\x02\x00\x09"[..],
            b"\x40\x02\x00\x01\x40\x02\x00\x01",
            b"",
        ] {
            let (connection, mut server, shared) = connection(2);
            let task = tokio::spawn(connection.run());
            publishes(&mut server, 2).await;
            shared.stop.store(true, Ordering::Relaxed);
            server.write_all(answer).await.unwrap();
            drop(server);
            assert!(task.await.unwrap().is_err(), "{answer:?}");
        }
    }
}
