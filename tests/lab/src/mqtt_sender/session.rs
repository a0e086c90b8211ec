//! One connection of a sender: CONNECT, then publishes out and acknowledgements in, both at once.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use bytes::{Buf as _, BytesMut};
use mqttbytes::v4::{Connect, ConnectReturnCode, Disconnect, Packet, PingReq, read};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, WriteHalf};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;

use super::{Outbox, Shown};

pub(super) type Stream = TlsStream<TcpStream>;

/// Nothing that a hub answers a sender with is longer.
const PACKET_BYTES_MAX: usize = 64 * 1024;

/// PINGREQ this often, and a hub that says nothing for three times as long is given up.
const PING_EVERY: Duration = Duration::from_secs(5);
const SILENCE_MAX: Duration = Duration::from_secs(15);

/// MQTT connection up to an accepting CONNACK.
pub(super) async fn open(
    mut stream: Stream,
    client_id: &str,
    user: &str,
    password: &str,
) -> Result<Stream> {
    let mut connect = Connect::new(client_id);
    connect.keep_alive = u16::try_from(3 * PING_EVERY.as_secs())?;
    connect.clean_session = false;
    connect.set_login(user, password);
    let mut bytes = BytesMut::new();
    connect.write(&mut bytes).map_err(codec)?;
    stream.write_all(&bytes).await?;
    stream.flush().await?;
    bytes.clear();
    loop {
        ensure!(
            stream.read_buf(&mut bytes).await? > 0,
            "closed instead of CONNACK"
        );
        match take(&mut bytes)? {
            None => {}
            Some(Packet::ConnAck(ack)) if ack.code == ConnectReturnCode::Success => {
                // A hub that says more at once would find a bug here; it has nothing to say.
                ensure!(bytes.is_empty(), "bytes after CONNACK");
                return Ok(stream);
            }
            Some(Packet::ConnAck(ack)) => bail!("CONNACK {:?}", ack.code),
            Some(other) => bail!("{other:?} instead of CONNACK"),
        }
    }
}

/// Sends and takes acknowledgements until everything is done (`Ok`) or the connection is lost.
pub(super) async fn run(
    stream: Stream,
    outbox: &mut Outbox,
    shown: &Shown,
    no_more: &CancellationToken,
) -> Result<()> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (mut incoming, mut outgoing) = (BytesMut::new(), BytesMut::new());
    let mut unflushed = false;
    let (mut heard, mut ping) = (Instant::now(), Instant::now() + PING_EVERY);
    outbox.connected();
    loop {
        let now = Instant::now();
        if now >= ping {
            ensure!(now < heard + SILENCE_MAX, "the hub is silent");
            PingReq.write(&mut outgoing).map_err(codec)?;
            ping = now + PING_EVERY;
        }
        outbox.fill(&mut outgoing, now, no_more.is_cancelled())?;
        show(outbox, shown);
        if outbox.is_done(no_more.is_cancelled()) {
            Disconnect.write(&mut outgoing).map_err(codec)?;
            writer.write_all(&outgoing).await?;
            return Ok(writer.shutdown().await?);
        }
        let wake = outbox
            .due(no_more.is_cancelled())
            .map_or(ping, |due| due.min(ping));
        // Reading and writing at once: a hub that waits for its acknowledgements to be read
        // before it reads on must not wait for us.
        tokio::select! {
            count = reader.read_buf(&mut incoming) => {
                ensure!(count? > 0, "the hub closed the connection");
                heard = Instant::now();
                while let Some(packet) = take(&mut incoming)? {
                    match packet {
                        Packet::PubAck(ack) => outbox.acknowledge(ack.pkid)?,
                        Packet::PingResp => {}
                        other => bail!("unexpected {other:?}"),
                    }
                }
                outbox.log();
                show(outbox, shown);
            }
            count = write_some(&mut writer, &outgoing), if !outgoing.is_empty() || unflushed => {
                let count = count?;
                outgoing.advance(count);
                unflushed = count > 0;
            }
            () = tokio::time::sleep_until(wake) => {}
            () = no_more.cancelled(), if !no_more.is_cancelled() => {}
        }
    }
}

/// Writes some bytes, or flushes when there are none (then the result is 0). Cancel safe: both are.
async fn write_some(writer: &mut WriteHalf<Stream>, bytes: &[u8]) -> Result<usize> {
    if bytes.is_empty() {
        writer.flush().await?;
        return Ok(0);
    }
    Ok(writer.write(bytes).await?)
}

fn show(outbox: &Outbox, shown: &Shown) {
    shown
        .acknowledged
        .store(outbox.acknowledged() as u64, Ordering::Relaxed);
    shown
        .in_flight
        .store(outbox.in_flight() as u64, Ordering::Relaxed);
}

/// The next complete packet.
fn take(bytes: &mut BytesMut) -> Result<Option<Packet>> {
    if bytes.is_empty() {
        return Ok(None);
    }
    match read(bytes, PACKET_BYTES_MAX) {
        Ok(packet) => Ok(Some(packet)),
        Err(mqttbytes::Error::InsufficientBytes(_)) => Ok(None),
        Err(error) => Err(codec(error)).context("the hub sent no MQTT"),
    }
}

fn codec(error: mqttbytes::Error) -> anyhow::Error {
    anyhow::anyhow!("{error:?}")
}
