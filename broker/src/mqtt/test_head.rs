//! A head with a real hub and a real store, and clients that speak to it over a byte stream in
//! memory.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use edgehub_proto::identity::Identity;
use edgehub_proto::message::Message;
use edgehub_proto::stored;
use edgehub_storage::{DEFAULT_PRIORITY, QueueId, ReadLimit, UPSTREAM_ENDPOINT};
use mqttbytes::v4::{self, ConnectReturnCode, Packet, SubscribeReasonCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::connection::{ConnectionContext, ConnectionEnd, serve};
use super::test_packets::{DISCONNECT, PINGREQ, TIMING, connect_with, field, subscribe};
use crate::telemetry::metrics::AckCounters;
use crate::test_support::{TestHub, token};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) const TWIN: &str = "$iothub/twin/res/#";

/// One hub and its head.
pub(super) struct Head {
    pub(super) hub: TestHub,
    pub(super) stop: CancellationToken,
}

impl Head {
    pub(super) fn new() -> Self {
        Self {
            hub: TestHub::new(),
            stop: CancellationToken::new(),
        }
    }

    pub(super) fn open(&self) -> Client {
        let (near, far) = duplex(1 << 20);
        let context = ConnectionContext {
            hub: Arc::clone(&self.hub.hub),
            timing: TIMING,
            acks: AckCounters::new(),
            stop: self.stop.clone(),
        };
        Client {
            stream: near,
            input: BytesMut::new(),
            task: tokio::spawn(serve(far, context, None)),
        }
    }

    /// A client that was accepted, and whether it had a session.
    pub(super) async fn connect(&self, identity: &str, clean: bool) -> (Client, bool) {
        let mut client = self.open();
        client.send(&connect(identity, clean, None)).await;
        let session_present = client.accepted().await;
        (client, session_present)
    }

    pub(super) async fn with_will(&self, identity: &str, topic: &str) -> Client {
        let mut client = self.open();
        client.send(&connect(identity, false, Some(topic))).await;
        client.accepted().await;
        client
    }

    /// What lies in the queue upstream, with its senders.
    pub(super) async fn stored(&self) -> Vec<(Identity, Message)> {
        let queue = self.hub.hub.store().queue(&QueueId {
            endpoint: UPSTREAM_ENDPOINT.to_owned(),
            priority: DEFAULT_PRIORITY,
        });
        self.hub.hub.store().flush().await.unwrap();
        let limit = ReadLimit {
            entries: 1_000,
            bytes: 1 << 24,
            scan: 1_000,
        };
        let batch = queue.unwrap().read(0, limit, None).await.unwrap();
        let decoded = |entry: edgehub_storage::Entry| {
            (entry.sender, stored::decode_message(entry.message).unwrap())
        };
        batch.entries.into_iter().map(decoded).collect()
    }

    /// Senders and bodies of the wills in the queue upstream.
    pub(super) async fn wills(&self) -> Vec<(String, String)> {
        let mut wills = Vec::new();
        for (sender, message) in self.stored().await {
            let marks = ["MessageType", "iothub-MessageType"];
            let marked = marks.iter().all(|mark| {
                let mut properties = message.properties.iter();
                properties.any(|p| p.key == *mark && p.value.as_deref() == Some("Will"))
            });
            if marked {
                let body = String::from_utf8(message.body.to_vec()).unwrap();
                wills.push((sender.to_string(), body));
            }
        }
        wills
    }
}

/// A CONNECT with a good token; the payload of the will is `gone`.
pub(super) fn connect(identity: &str, clean: bool, will_topic: Option<&str>) -> Vec<u8> {
    let mut fields = vec![field(identity)];
    let mut flags = 0xc0 | u8::from(clean) << 1;
    if let Some(topic) = will_topic {
        flags |= 0x04;
        fields.extend([field(topic), field("gone")]);
    }
    fields.push(field(format!("h/{identity}/?api-version=2021-04-12")));
    fields.push(field(token(identity)));
    connect_with(flags, 60, &fields)
}

pub(super) fn telemetry(identity: &str) -> String {
    match identity.split_once('/') {
        Some((device, module)) => format!("devices/{device}/modules/{module}/messages/events/"),
        None => format!("devices/{identity}/messages/events/"),
    }
}

pub(super) struct Client {
    pub(super) stream: DuplexStream,
    pub(super) input: BytesMut,
    pub(super) task: JoinHandle<ConnectionEnd>,
}

impl Client {
    pub(super) async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next packet; none when the connection is closed.
    pub(super) async fn next(&mut self) -> Option<Packet> {
        timeout(PATIENCE, async {
            loop {
                match v4::read(&mut self.input, 1 << 20) {
                    Ok(packet) => return Some(packet),
                    Err(mqttbytes::Error::InsufficientBytes(_)) => {}
                    Err(error) => panic!("{error:?}"),
                }
                match self.stream.read_buf(&mut self.input).await {
                    Ok(0) | Err(_) => return None,
                    Ok(_) => {}
                }
            }
        })
        .await
        .expect("an answer in time")
    }

    pub(super) async fn accepted(&mut self) -> bool {
        match self.next().await {
            Some(Packet::ConnAck(ack)) => {
                assert_eq!(ack.code, ConnectReturnCode::Success);
                ack.session_present
            }
            other => panic!("{other:?}"),
        }
    }

    /// Subscribes to one filter; whether that was granted.
    pub(super) async fn subscribe(&mut self, filter: &str) -> bool {
        self.send(&subscribe(1, &[(filter, 1)])).await;
        match self.next().await {
            Some(Packet::SubAck(ack)) => ack.return_codes != [SubscribeReasonCode::Failure],
            other => panic!("{other:?}"),
        }
    }

    /// A ping and its answer: everything before was worked off.
    pub(super) async fn ping(&mut self) {
        self.send(&PINGREQ).await;
        assert_eq!(self.next().await, Some(Packet::PingResp));
    }

    pub(super) async fn ends(self) -> ConnectionEnd {
        timeout(PATIENCE, self.task).await.unwrap().unwrap()
    }

    /// The client vanishes.
    pub(super) async fn vanish(self) -> ConnectionEnd {
        drop(self.stream);
        timeout(PATIENCE, self.task).await.unwrap().unwrap()
    }

    pub(super) async fn disconnect(mut self) -> ConnectionEnd {
        self.send(&DISCONNECT).await;
        self.ends().await
    }
}
