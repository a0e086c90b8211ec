//! Twin requests of a session against the server of `session_support`. The clock is the runtime's,
//! paused.

use std::time::Duration;

use bytes::Bytes;
use edgehub_proto::hub::UpstreamError;
use ntex_mqtt::v3::codec::{ConnectAckReason, Decoded, Packet, QoS};
use tokio::time::Instant;

use super::MachineConfig;
use super::session_support::{Client, Server, needs, start_for};
use crate::lanes::{CloseCause, RequestId};
use crate::limits;
use crate::transport::{Command, TwinAnswer, TwinAsk, TwinRequest};

const TWIN_RESPONSES: &str = "$iothub/twin/res/#";
const TWIN: &str = r#"{"desired":{"$version":3},"reported":{"$version":8}}"#;

fn request(id: u64, ask: TwinAsk) -> TwinRequest {
    TwinRequest {
        request: RequestId(id),
        ask,
        deadline: (Instant::now() + Duration::from_secs(20)).into_std(),
    }
}

async fn ask(client: &Client, requests: Vec<TwinRequest>) {
    client
        .commands
        .send(Command::Request(requests))
        .await
        .unwrap();
}

async fn open() -> (Client, Server) {
    let (mut client, mut server) = start_for("leaf1", MachineConfig::default());
    server.accept(ConnectAckReason::ConnectionAccepted).await;
    client.opened().await;
    (client, server)
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_for_the_subscription_to_its_answer() {
    let (mut client, mut server) = open().await;
    let patch = Bytes::from_static(br#"{"fw":"1.2"}"#);
    let requests = vec![
        request(3, TwinAsk::Get),
        request(4, TwinAsk::Report(patch.clone())),
    ];
    ask(&client, requests).await;
    let (packet_id, filters) = server.subscribe().await;
    assert_eq!(filters, [(TWIN_RESPONSES.to_owned(), 0)]);
    server.grant(packet_id, &[Some(QoS::AtMostOnce)]).await;
    let get = server.published().await;
    assert_eq!(get, ("$iothub/twin/GET/?$rid=3".to_owned(), String::new()));
    let (topic, body) = server.published().await;
    assert_eq!(topic, "$iothub/twin/PATCH/properties/reported/?$rid=4");
    assert_eq!(body.as_bytes(), patch);

    // In any order; the second of a kind and the wrong ones are nobody's.
    server
        .publish(None, "$iothub/twin/res/200/?$rid=5", b"{}")
        .await;
    server
        .publish(None, "$iothub/twin/res/204/?$rid=4&$version=9", b"")
        .await;
    server
        .publish(None, "$iothub/twin/res/204/?$rid=4&$version=10", b"")
        .await;
    server
        .publish(None, "$iothub/twin/res/200/?$rid=3", TWIN.as_bytes())
        .await;
    let answer = |body: &'static str, version| {
        Ok(TwinAnswer {
            body: body.into(),
            version,
        })
    };
    assert_eq!(client.answered().await, (RequestId(4), answer("", Some(9))));
    assert_eq!(client.answered().await, (RequestId(3), answer(TWIN, None)));
    // The subscription stays: the next request goes out at once.
    ask(&client, vec![request(6, TwinAsk::Get)]).await;
    assert_eq!(server.published().await.0, "$iothub/twin/GET/?$rid=6");
    assert!(
        client.downstream.take().is_empty(),
        "a session without needs is not announced"
    );
}

#[tokio::test(start_paused = true)]
async fn errors_of_the_upstream_are_told_by_their_kind() {
    let (mut client, mut server) = open().await;
    ask(
        &client,
        (0..4).map(|id| request(id, TwinAsk::Get)).collect(),
    )
    .await;
    server.grant_all().await;
    for _ in 0..4 {
        server.published().await;
    }
    server
        .publish(None, "$iothub/twin/res/429/?$rid=0", b"")
        .await;
    server
        .publish(None, "$iothub/twin/res/404/?$rid=1", b"")
        .await;
    server
        .publish(None, "$iothub/twin/res/500/?$rid=2", b"")
        .await;
    server
        .publish(
            None,
            "$iothub/twin/res/200/?$rid=3",
            br#"{"errorCode":503001}"#,
        )
        .await;
    let unavailable = UpstreamError::Unavailable("status 500".to_owned());
    for (id, error) in [
        (0, UpstreamError::Busy { status: 429 }),
        (1, UpstreamError::Refused { status: 404 }),
        (2, unavailable),
        (3, UpstreamError::Busy { status: 503 }),
    ] {
        assert_eq!(client.answered().await, (RequestId(id), Err(error)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_refused_subscription_to_answers_fails_the_requests() {
    let (mut client, mut server) = open().await;
    ask(&client, vec![request(0, TwinAsk::Get)]).await;
    let (packet_id, _) = server.subscribe().await;
    server.grant(packet_id, &[None]).await;
    let (request_id, answer) = client.answered().await;
    assert_eq!(request_id, RequestId(0));
    assert!(
        matches!(answer, Err(UpstreamError::Unavailable(_))),
        "{answer:?}"
    );
    ask(&client, vec![request(1, TwinAsk::Get)]).await;
    let (request_id, answer) = client.answered().await;
    assert_eq!(request_id, RequestId(1));
    assert!(
        matches!(answer, Err(UpstreamError::Unavailable(_))),
        "{answer:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_patch_that_fits_no_packet_is_refused() {
    let (mut client, mut server) = open().await;
    let patch = vec![b'x'; limits::MQTT_PACKET_BYTES_MAX].into();
    let requests = vec![request(0, TwinAsk::Report(patch)), request(1, TwinAsk::Get)];
    ask(&client, requests).await;
    server.grant_all().await;
    let refused = Err(UpstreamError::Refused { status: 413 });
    assert_eq!(client.answered().await, (RequestId(0), refused));
    assert_eq!(server.published().await.0, "$iothub/twin/GET/?$rid=1");
}

/// A request at QoS 0 has no acknowledgement: while its answer is awaited a dead link is found as
/// soon as with telemetry in flight.
#[tokio::test(start_paused = true)]
async fn a_dead_link_is_found_while_an_answer_is_awaited() {
    let (client, mut server) = Client::listening("leaf1", needs(true, false, false)).await;
    let begin = Instant::now();
    ask(&client, vec![request(0, TwinAsk::Get)]).await;
    server.published().await;
    let ping = server.receive().await;
    assert!(
        matches!(ping, Some(Decoded::Packet(Packet::PingRequest, _))),
        "{ping:?}"
    );
    assert_eq!(begin.elapsed(), Duration::from_secs(10));
    let cause = client.end().await;
    assert!(matches!(cause, CloseCause::Lost(_)), "{cause}");
    assert_eq!(begin.elapsed(), Duration::from_secs(20));
}

/// An upstream that answers pings and no requests: the session goes on, and nothing piles up.
#[tokio::test(start_paused = true)]
async fn a_request_without_an_answer_does_not_end_the_session() {
    let (client, mut server) = Client::listening("leaf1", needs(true, true, false)).await;
    ask(&client, vec![request(0, TwinAsk::Get)]).await;
    server.published().await;
    for _ in 0..3 {
        let ping = server.receive().await;
        assert!(
            matches!(ping, Some(Decoded::Packet(Packet::PingRequest, _))),
            "{ping:?}"
        );
        server.send([Packet::PingResponse]).await;
    }
    server
        .publish(None, "$iothub/twin/res/200/?$rid=0", b"{}")
        .await;
    server.nothing_but_a_response_to_a_method(&client).await;
}
