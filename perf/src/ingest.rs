//! The scenario `mqtt-ingest`.

use anyhow::{Context as _, Result, ensure};
use edgehub_lab::StorageSync;
use edgehub_lab::process::Reaper;

use crate::hub::Hub;
use crate::load::{self, Client, Load, Server};
use crate::mosquitto::Mosquitto;
use crate::report::{Report, Row};
use crate::{IngestOptions, gauge};

/// Measures everybody, one after the other, and prints the table.
///
/// # Errors
/// When anything cannot be started or a connection is closed under load.
pub(crate) async fn run(options: &IngestOptions) -> Result<()> {
    let mut report = Report::new(gauge::machine(), options);
    for (name, sync) in [("os", StorageSync::Os), ("disk", StorageSync::Disk)] {
        let target = format!("edgehub, TLS, StorageSync={name}");
        let (hub, at_rest) = Hub::start(sync, options).await?;
        report.add_at_rest(&target, at_rest);
        let server = hub.server()?;
        for &size in &options.sizes {
            let clients = hub.clients(options.connections)?;
            let before = hub.received().await?;
            let (mut row, acknowledged) = measure(&target, &server, clients, size, options).await?;
            // Both sides have counted: a rate that only one of them saw is none.
            let received = hub.received().await? - before;
            ensure!(
                received == acknowledged,
                "{received} received, {acknowledged} acknowledged"
            );
            row.resident_bytes = hub.resident_bytes()?;
            report.add(row);
        }
        if !options.no_peer && sync == StorageSync::Disk {
            peer(options, &hub, &server, &mut report).await?;
        }
        hub.shutdown().await?;
    }
    report.finish(options.json.as_deref())
}

/// mosquitto with the certificates of a hub that is still there, but idle.
async fn peer(
    options: &IngestOptions,
    hub: &Hub,
    like: &Server,
    report: &mut Report,
) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let reaper = Reaper::start()?;
    let forms: &[bool] = if options.plain {
        &[true, false]
    } else {
        &[true]
    };
    for &with_tls in forms {
        let host = if with_tls { Some(hub.host()?) } else { None };
        let peer = Mosquitto::start(folder.path(), host, &reaper).await?;
        let transport = if with_tls { "TLS" } else { "plain" };
        let target = format!("{}, {transport}, no persistence", peer.version);
        let server = Server {
            address: peer.address,
            tls: like.tls.clone().filter(|_| with_tls),
            pid: peer.pid(),
        };
        for &size in &options.sizes {
            let clients = (1..=options.connections).map(|number| Client {
                client_id: format!("leaf{number}"),
                login: None,
                topic: format!("devices/leaf{number}/messages/events/"),
            });
            let (mut row, _) = measure(&target, &server, clients.collect(), size, options).await?;
            row.resident_bytes = edgehub_lab::process::resident_bytes(peer.pid())?;
            report.add(row);
        }
    }
    Ok(())
}

async fn measure(
    target: &str,
    server: &Server,
    clients: Vec<Client>,
    size: usize,
    options: &IngestOptions,
) -> Result<(Row, u64)> {
    let load = Load {
        window: options.window,
        body_bytes: size,
        warm_up: options.warm_up(),
        measured: options.measured(),
    };
    let outcome = load::run(server, clients, load).await;
    let outcome = outcome.with_context(|| format!("{target}, {size} bytes"))?;
    Ok((Row::new(target, size, &outcome), outcome.acknowledged))
}
