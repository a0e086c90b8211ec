//! The scenarios `mqtt-ingest` and `amqp-ingest`.

use anyhow::{Context as _, Result, ensure};
use edgehub_lab::StorageSync;
use edgehub_lab::process::Reaper;

use crate::hub::Hub;
use crate::load::{self, Client, Load, Server, Speech};
use crate::mosquitto::Mosquitto;
use crate::report::{Report, Row};
use crate::{IngestOptions, LoadOptions, gauge};

/// Measures everybody, one after the other, and prints the table.
///
/// # Errors
/// When anything cannot be started or a connection is closed under load.
pub(crate) async fn mqtt(options: &IngestOptions) -> Result<()> {
    let load = &options.load;
    let mut report = Report::new(gauge::machine(), load);
    for (name, sync) in [("os", StorageSync::Os), ("disk", StorageSync::Disk)] {
        let target = format!("edgehub, TLS, StorageSync={name}");
        let (hub, at_rest) = Hub::start(sync, load).await?;
        report.add_at_rest(&target, at_rest);
        let server = hub.server()?;
        for &size in &load.sizes {
            let clients = hub.clients(load.connections)?;
            report.add(at_hub(&hub, &target, &server, clients, size, load).await?);
        }
        if !options.no_peer && sync == StorageSync::Disk {
            peer(options, &hub, &server, &mut report).await?;
        }
        hub.shutdown().await?;
    }
    report.finish(load.json.as_deref())
}

/// Measures AMQP and beside it MQTT at the same hub, and prints the table.
///
/// # Errors
/// When anything cannot be started or a connection is closed under load.
pub(crate) async fn amqp(options: &LoadOptions) -> Result<()> {
    let mut report = Report::new(gauge::machine(), options);
    for (name, sync) in [("os", StorageSync::Os), ("disk", StorageSync::Disk)] {
        let (hub, at_rest) = Hub::start(sync, options).await?;
        report.add_at_rest(&format!("edgehub, StorageSync={name}"), at_rest);
        let server = hub.server()?;
        for &size in &options.sizes {
            for (protocol, clients) in [
                ("AMQP", hub.amqp_clients(options.connections)?),
                ("MQTT", hub.clients(options.connections)?),
            ] {
                let target = format!("edgehub, {protocol}, TLS, StorageSync={name}");
                report.add(at_hub(&hub, &target, &server, clients, size, options).await?);
            }
        }
        hub.shutdown().await?;
    }
    report.finish(options.json.as_deref())
}

async fn at_hub(
    hub: &Hub,
    target: &str,
    server: &Server,
    clients: Vec<Client>,
    size: usize,
    options: &LoadOptions,
) -> Result<Row> {
    let before = hub.received().await?;
    let (mut row, acknowledged) = measure(target, server, clients, size, options).await?;
    // Both sides have counted: a rate that only one of them saw is none.
    let received = hub.received().await? - before;
    ensure!(
        received == acknowledged,
        "{received} received, {acknowledged} acknowledged"
    );
    row.resident_bytes = hub.resident_bytes()?;
    Ok(row)
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
            amqp_address: peer.address,
            tls: like.tls.clone().filter(|_| with_tls),
            pid: peer.pid(),
        };
        for &size in &options.load.sizes {
            let clients = (1..=options.load.connections).map(|number| Client {
                id: format!("leaf{number}"),
                speech: Speech::Mqtt {
                    login: None,
                    topic: format!("devices/leaf{number}/messages/events/"),
                },
            });
            let clients = clients.collect();
            let (mut row, _) = measure(&target, &server, clients, size, &options.load).await?;
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
    options: &LoadOptions,
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
