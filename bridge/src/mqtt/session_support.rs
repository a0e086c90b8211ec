//! A session over an in-memory pipe, with a tiny server on the codec at the other end.

use std::{num::NonZeroU16, sync::Arc};

use edgehub_proto::hub::{Needs, UpstreamError};
use ntex_bytes::{BytePages, BytesMut as CodecBuffer};
use ntex_codec::{Decoder, Encoder};
use ntex_mqtt::v3::codec::{
    Codec, ConnectAck, ConnectAckReason, Decoded, Encoded, Packet, Publish, QoS,
    SubscribeReturnCode,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::session::{SessionContext, run};
use super::{ConnectParams, MachineConfig};
use crate::lanes::{CloseCause, Disposition, Outgoing, RequestId, SessionId};
use crate::test_support::{FakeDownstream, id};
use crate::transport::{Command, SessionEvent, TwinAnswer};

pub(super) const SESSION: SessionId = SessionId(7);

pub(super) struct Server {
    pub(super) stream: DuplexStream,
    codec: Codec,
    buffer: CodecBuffer,
    pub(super) reads: usize,
}

impl Server {
    pub(super) async fn receive(&mut self) -> Option<Decoded> {
        loop {
            if let Some(packet) = self.codec.decode(&mut self.buffer).unwrap() {
                return Some(packet);
            }
            let mut chunk = vec![0; 65_536];
            let length = self.stream.read(&mut chunk).await.unwrap_or(0);
            if length == 0 {
                return None;
            }
            self.reads += 1;
            self.buffer.extend_from_slice(&chunk[..length]);
        }
    }

    pub(super) async fn send(&mut self, packets: impl IntoIterator<Item = Packet>) {
        let mut pages = BytePages::default();
        for packet in packets {
            self.codec
                .encodev(Encoded::Packet(packet), &mut pages)
                .unwrap();
        }
        self.stream.write_all(&pages.freeze()).await.unwrap();
    }

    pub(super) async fn accept(&mut self, return_code: ConnectAckReason) {
        let connect = self.receive().await;
        assert!(
            matches!(connect, Some(Decoded::Packet(Packet::Connect(_), _))),
            "{connect:?}"
        );
        let ack = ConnectAck {
            return_code,
            session_present: false,
        };
        self.send([Packet::ConnectAck(ack)]).await;
    }
}

pub(super) struct Client {
    pub(super) commands: mpsc::Sender<Command>,
    pub(super) needs: watch::Sender<Needs>,
    pub(super) downstream: Arc<FakeDownstream>,
    pub(super) events: mpsc::Receiver<SessionEvent>,
    pub(super) task: JoinHandle<CloseCause>,
}

impl Client {
    pub(super) async fn opened(&mut self) {
        let event = self.events.recv().await.unwrap();
        let SessionEvent::Opened {
            session,
            expires_at_ms,
        } = event
        else {
            panic!("{event:?}")
        };
        assert_eq!((session, expires_at_ms), (SESSION, Some(5000)));
    }

    pub(super) async fn disposed(&mut self) -> Vec<(u64, Disposition)> {
        let event = self.events.recv().await.unwrap();
        let SessionEvent::Disposed { dispositions, .. } = event else {
            panic!("{event:?}")
        };
        dispositions
    }

    pub(super) async fn send(&self, batch: Vec<Outgoing>) {
        self.commands.send(Command::Send(batch)).await.unwrap();
    }
}

pub(super) fn start(config: MachineConfig) -> (Client, Server) {
    start_for("edge1/modA", config)
}

pub(super) fn start_for(identity: &str, config: MachineConfig) -> (Client, Server) {
    let (ours, theirs) = tokio::io::duplex(1024 * 1024);
    let (commands, mut receiver) = mpsc::channel(100);
    let (events_sender, events) = mpsc::channel(100);
    let (needs, needs_receiver) = watch::channel(Needs::default());
    let downstream = Arc::new(FakeDownstream::default());
    let connect = ConnectParams {
        client_id: identity.into(),
        user_name: "u".into(),
        password: "p".into(),
    };
    let context = SessionContext {
        session: SESSION,
        identity: id(identity),
        expires_at_ms: Some(5000),
        needs: needs_receiver,
        downstream: Arc::clone(&downstream) as _,
        events: events_sender,
    };
    let task =
        tokio::spawn(async move { run(ours, config, connect, context, &mut receiver).await });
    let server = Server {
        stream: theirs,
        codec: Codec::new(),
        buffer: CodecBuffer::new(),
        reads: 0,
    };
    (
        Client {
            commands,
            needs,
            downstream,
            events,
            task,
        },
        server,
    )
}

/// What is listened for, as a test writes it.
pub(super) fn needs(desired: bool, methods: bool, cloud_to_device: bool) -> Needs {
    Needs {
        desired,
        methods,
        cloud_to_device,
    }
}

impl Server {
    /// The next packet, which has to be SUBSCRIBE: its id, and its filters with their QoS.
    pub(super) async fn subscribe(&mut self) -> (NonZeroU16, Vec<(String, u8)>) {
        match self.receive().await {
            Some(Decoded::Packet(
                Packet::Subscribe {
                    packet_id,
                    topic_filters,
                },
                _,
            )) => {
                let filters = topic_filters
                    .into_iter()
                    .map(|(filter, qos)| (filter.to_string(), u8::from(qos)));
                (packet_id, filters.collect())
            }
            other => panic!("{other:?}"),
        }
    }

    /// Answers a SUBSCRIBE.
    pub(super) async fn grant(&mut self, packet_id: NonZeroU16, codes: &[Option<QoS>]) {
        let status = codes
            .iter()
            .map(|code| code.map_or(SubscribeReturnCode::Failure, SubscribeReturnCode::Success));
        let status = status.collect();
        self.send([Packet::SubscribeAck { packet_id, status }])
            .await;
    }

    /// Takes a SUBSCRIBE and grants everything. Gives the filters.
    pub(super) async fn grant_all(&mut self) -> Vec<String> {
        let (packet_id, filters) = self.subscribe().await;
        let codes: Vec<_> = filters
            .iter()
            .map(|(_, qos)| Some(QoS::try_from(*qos).unwrap()))
            .collect();
        self.grant(packet_id, &codes).await;
        filters.into_iter().map(|(filter, _)| filter).collect()
    }

    /// Takes an UNSUBSCRIBE and answers it. Gives the filters.
    pub(super) async fn release(&mut self) -> Vec<String> {
        match self.receive().await {
            Some(Decoded::Packet(
                Packet::Unsubscribe {
                    packet_id,
                    topic_filters,
                },
                _,
            )) => {
                self.send([Packet::UnsubscribeAck { packet_id }]).await;
                topic_filters.iter().map(ToString::to_string).collect()
            }
            other => panic!("{other:?}"),
        }
    }

    /// Sends a PUBLISH, at QoS 1 with a packet id and else at QoS 0.
    pub(super) async fn publish(&mut self, packet_id: Option<u16>, topic: &str, payload: &[u8]) {
        self.publish_again(packet_id, topic, payload, false).await;
    }

    pub(super) async fn publish_again(
        &mut self,
        packet_id: Option<u16>,
        topic: &str,
        payload: &[u8],
        dup: bool,
    ) {
        let published = self.try_publish(packet_id, topic, payload, dup).await;
        published.unwrap();
    }

    /// As [`Server::publish_again`], to a client that may be gone.
    pub(super) async fn try_publish(
        &mut self,
        packet_id: Option<u16>,
        topic: &str,
        payload: &[u8],
        dup: bool,
    ) -> std::io::Result<()> {
        let publish = Publish {
            dup,
            retain: false,
            qos: packet_id.map_or(QoS::AtMostOnce, |_| QoS::AtLeastOnce),
            topic: topic.into(),
            packet_id: packet_id.map(|id| NonZeroU16::new(id).unwrap()),
            payload_size: u32::try_from(payload.len()).unwrap(),
        };
        let mut pages = BytePages::default();
        let payload = ntex_bytes::Bytes::copy_from_slice(payload);
        Codec::new()
            .encodev(Encoded::Publish(publish, Some(payload)), &mut pages)
            .unwrap();
        self.stream.write_all(&pages.freeze()).await
    }

    /// The next packet, which has to be a PUBLISH at QoS 0: topic and payload.
    pub(super) async fn published(&mut self) -> (String, String) {
        match self.receive().await {
            Some(Decoded::Publish(publish, payload, _)) => {
                assert_eq!(publish.qos, QoS::AtMostOnce);
                let payload = String::from_utf8(payload.to_vec()).unwrap();
                (publish.topic.to_string(), payload)
            }
            other => panic!("{other:?}"),
        }
    }

    /// The next packet, which has to be a PUBACK.
    pub(super) async fn acknowledged(&mut self) -> u16 {
        match self.receive().await {
            Some(Decoded::Packet(Packet::PublishAck { packet_id }, _)) => packet_id.get(),
            other => panic!("{other:?}"),
        }
    }

    /// Shows that nothing of what was sent so far is answered: what the client says next is the
    /// answer to something harmless.
    pub(super) async fn nothing_but_a_response_to_a_method(&mut self, client: &Client) {
        self.publish(None, "$iothub/methods/POST/barrier/?$rid=barrier", b"")
            .await;
        let call = client.downstream.method().await;
        let result = edgehub_proto::hub::MethodResult {
            status: 200,
            payload: "barrier".into(),
        };
        call.reply.send(result).unwrap();
        let topic = "$iothub/methods/res/200/?$rid=barrier".to_owned();
        assert_eq!(self.published().await, (topic, "barrier".to_owned()));
    }
}

impl Client {
    /// A session that is open and subscribed to what `needs` says.
    pub(super) async fn listening(identity: &str, needs: Needs) -> (Self, Server) {
        let (mut client, mut server) = start_for(identity, MachineConfig::default());
        client.needs.send_replace(needs);
        server.accept(ConnectAckReason::ConnectionAccepted).await;
        client.opened().await;
        server.grant_all().await;
        client.downstream.established().await;
        (client, server)
    }

    /// The next event, which has to be an answer.
    pub(super) async fn answered(&mut self) -> (RequestId, Result<TwinAnswer, UpstreamError>) {
        match self.events.recv().await.unwrap() {
            SessionEvent::Answered { request, answer } => (request, answer),
            other => panic!("{other:?}"),
        }
    }

    /// The next event, which has to be about being engaged.
    pub(super) async fn engaged(&mut self) -> bool {
        match self.events.recv().await.unwrap() {
            SessionEvent::Engaged { engaged, .. } => engaged,
            other => panic!("{other:?}"),
        }
    }

    /// Why the session ended.
    pub(super) async fn end(self) -> CloseCause {
        self.task.await.unwrap()
    }
}
