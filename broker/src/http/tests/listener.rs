//! What the listener makes of clients that are slow, greedy or odd (testing.md S12, S16), and
//! how it stops.

use std::future::pending;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::{get as route_get, post as route_post};
use edgehub_auth::tls;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Answer, answers, connect, exchange, get, read_answers};
use crate::amqp::connection::ConnectionContext;
use crate::http::limits::{
    CONNECTION_MAX, FINISH_MAX, HANDSHAKE_MAX, HEADER_BYTES_MAX, HEADER_READ_MAX,
};
use crate::http::websocket::WebSockets;
use crate::http::{ListenerContext, Transport, listen};
use crate::telemetry::metrics::AckCounters;
use crate::test_support::TestHub;

fn echo() -> Router {
    Router::new()
        .route("/", route_get(async || "hello"))
        .route("/echo", route_post(async |body: String| body))
        .fallback(async || StatusCode::NOT_FOUND)
}

#[tokio::test]
async fn every_answer_is_marked_and_pipelined_requests_are_answered_in_order() {
    let stream = [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        b"GET /nowhere HTTP/1.1\r\n\r\n".to_vec(),
        get("/"),
    ];
    let answers = exchange(echo(), &stream.concat()).await;
    let statuses: Vec<_> = answers.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses, [200, 404, 200]);
    assert!(
        answers
            .iter()
            .all(|answer| answer.has("x-content-type-options: nosniff"))
    );
}

#[tokio::test]
async fn a_head_over_the_limit_is_refused() {
    let with_header = |bytes: usize| {
        let mut request = b"GET / HTTP/1.1\r\nConnection: close\r\nx: ".to_vec();
        request.extend(vec![b'a'; bytes]);
        request.extend(b"\r\n\r\n");
        request
    };
    let fits = exchange(echo(), &with_header(HEADER_BYTES_MAX / 2)).await;
    assert_eq!(fits[0].status, 200);
    let greedy = exchange(echo(), &with_header(HEADER_BYTES_MAX)).await;
    assert_eq!(greedy[0].status, 431);
}

#[tokio::test(start_paused = true)]
async fn a_head_that_dribbles_ends_the_connection() {
    for beginning in ["", "GET / HTT", "GET / HTTP/1.1\r\nx: y\r\n"] {
        let mut client = connect(echo(), CancellationToken::new());
        client.write_all(beginning.as_bytes()).await.unwrap();
        let before = Instant::now();
        read_answers(&mut client).await;
        assert_eq!(
            before.elapsed().as_secs(),
            HEADER_READ_MAX.as_secs(),
            "{beginning:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_is_idle_for_a_while_and_not_for_ever() {
    let mut client = connect(echo(), CancellationToken::new());
    for _ in 0..2 {
        client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\nhello") {
            answer.push(client.read_u8().await.unwrap());
        }
        // Time itself is what is tested; it is paused.
        tokio::time::sleep(HEADER_READ_MAX / 2).await;
    }
    let before = Instant::now();
    read_rest(&mut client).await;
    assert!(before.elapsed() <= HEADER_READ_MAX);
}

async fn read_rest(client: &mut (impl AsyncReadExt + Unpin)) {
    let mut rest = Vec::new();
    let _ = client.read_to_end(&mut rest).await;
}

#[tokio::test(start_paused = true)]
async fn a_connection_has_an_age() {
    let stuck = Router::new().route("/", route_get(async || pending::<()>().await));
    let mut client = connect(stuck, CancellationToken::new());
    client.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let before = Instant::now();
    assert!(read_answers(&mut client).await.is_empty());
    assert_eq!(
        before.elapsed().as_secs(),
        (CONNECTION_MAX + FINISH_MAX).as_secs()
    );
}

#[tokio::test]
async fn ambiguous_lengths_do_not_smuggle_a_request() {
    let smuggled = "GET / HTTP/1.1\r\n\r\n";
    let chunked = "0\r\n\r\n";
    for headers in [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Transfer-Encoding: gzip\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Content-Length: +5\r\n",
        "Content-Length: 5, 5\r\n",
    ] {
        let request = format!("POST /echo HTTP/1.1\r\n{headers}\r\n{chunked}{smuggled}");
        let answers = exchange(echo(), request.as_bytes()).await;
        assert!(answers.len() <= 1, "{headers}: {answers:?}");
        assert!(
            answers.iter().all(|answer| answer.body != "hello"),
            "{headers}"
        );
    }
}

#[tokio::test]
async fn what_is_not_http_1_is_refused() {
    for bytes in [
        &b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..],
        b"GET / HTTP/3.0\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET / HTTP/1.1\r\nx : y\r\n\r\n",
        b"GET  /x y HTTP/1.1\r\n\r\n",
    ] {
        let answers = exchange(echo(), bytes).await;
        assert!(
            answers.iter().all(|answer| answer.status >= 400),
            "{bytes:?} {answers:?}"
        );
    }
}

#[tokio::test]
async fn a_client_may_wait_for_100_continue() {
    let mut client = connect(echo(), CancellationToken::new());
    let head = "POST /echo HTTP/1.1\r\nConnection: close\r\nContent-Length: 2\r\n\
                Expect: 100-continue\r\n\r\n";
    client.write_all(head.as_bytes()).await.unwrap();
    let mut interim = [0; 25];
    client.read_exact(&mut interim).await.unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    client.write_all(b"hi").await.unwrap();
    assert_eq!(read_answers(&mut client).await[0].body, "hi");
}

#[tokio::test(start_paused = true)]
async fn stopping_lets_a_request_finish() {
    let (entered, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
    let (entered_there, go_there) = (Arc::clone(&entered), Arc::clone(&go));
    let slow = Router::new().route(
        "/",
        route_get(async move || {
            entered_there.notify_one();
            go_there.notified().await;
            "done"
        }),
    );
    let stop = CancellationToken::new();
    let mut busy = connect(slow.clone(), stop.clone());
    let mut idle = connect(slow.clone(), stop.clone());
    busy.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    entered.notified().await;
    stop.cancel();
    assert!(read_answers(&mut idle).await.is_empty());
    go.notify_one();
    assert_eq!(read_answers(&mut busy).await[0].body, "done");

    let stop = CancellationToken::new();
    let mut stuck = connect(slow, stop.clone());
    stuck.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    entered.notified().await;
    stop.cancel();
    let before = Instant::now();
    assert!(read_answers(&mut stuck).await.is_empty());
    assert_eq!(before.elapsed().as_secs(), FINISH_MAX.as_secs());
}

/// A listener on a free port of the loopback.
struct Listening {
    address: std::net::SocketAddr,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Listening {
    async fn new(transport: Transport, connections_max: usize) -> Self {
        Self::of(echo(), transport, connections_max).await
    }

    async fn of(router: Router, transport: Transport, connections_max: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let context = ListenerContext {
            transport,
            connections_max,
            stop: stop.clone(),
            tasks: tasks.clone(),
        };
        tasks.spawn(listen(listener, router, context));
        Self {
            address,
            stop,
            tasks,
        }
    }

    async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        timeout(HANDSHAKE_MAX / 2, self.tasks.wait())
            .await
            .expect("all tasks end");
    }
}

async fn answer(stream: &mut (impl AsyncReadExt + Unpin)) -> Answer {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    answers(&String::from_utf8(bytes).unwrap()).remove(0)
}

#[tokio::test]
async fn connections_beyond_the_limit_wait_their_turn() {
    let listening = Listening::new(Transport::Plain, 1).await;
    let mut first = TcpStream::connect(listening.address).await.unwrap();
    first.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    let mut second = TcpStream::connect(listening.address).await.unwrap();
    second.write_all(&get("/")).await.unwrap();
    let mut byte = [0; 1];
    let waited = timeout(Duration::from_millis(200), second.read(&mut byte)).await;
    assert!(
        waited.is_err(),
        "the second connection is not served beside the first"
    );
    first.write_all(b"Connection: close\r\n\r\n").await.unwrap();
    assert_eq!(answer(&mut first).await.status, 200);
    drop(first);
    assert_eq!(answer(&mut second).await.status, 200);
    listening.stop().await;
}

#[tokio::test]
async fn a_websocket_that_has_not_said_who_it_is_keeps_its_place() {
    let (stop, test) = (CancellationToken::new(), TestHub::new());
    let sockets = WebSockets {
        mqtt: None,
        amqp: Some(ConnectionContext {
            hub: Arc::clone(&test.hub),
            acks: AckCounters::new(),
            stop: stop.clone(),
        }),
        tasks: TaskTracker::new(),
    };
    // One place for each address.
    let listening = Listening::of(sockets.before(echo()), Transport::Plain, 2).await;
    let mut socket = TcpStream::connect(listening.address).await.unwrap();
    let request = b"GET /x HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                    Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                    Sec-WebSocket-Protocol: AMQPWSB10\r\n\r\n";
    socket.write_all(request).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.unwrap());
    }
    assert!(head.starts_with(b"HTTP/1.1 101 "), "{head:?}");

    let mut second = TcpStream::connect(listening.address).await.unwrap();
    second.write_all(&get("/")).await.unwrap();
    // Somebody who comes later, from elsewhere, is served first.
    let elsewhere = TcpSocket::new_v4().unwrap();
    elsewhere.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut third = elsewhere.connect(listening.address).await.unwrap();
    third.write_all(&get("/")).await.unwrap();
    assert_eq!(answer(&mut third).await.status, 200);
    let nothing = second.try_read(&mut [0; 1]).unwrap_err();
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);

    drop(socket);
    assert_eq!(answer(&mut second).await.status, 200);
    stop.cancel();
    listening.stop().await;
}

#[tokio::test]
async fn tls_is_served_with_and_without_a_server_name() {
    let key = rcgen::KeyPair::generate().unwrap();
    let names = vec!["edgehub".to_owned(), "127.0.0.1".to_owned()];
    let certificate = rcgen::CertificateParams::new(names)
        .unwrap()
        .self_signed(&key)
        .unwrap();
    let pem = certificate.pem();
    let versions = tls::TlsVersions::All;
    let key = key.serialize_pem();
    let server = tls::server_config(pem.as_bytes(), key.as_bytes(), true, versions).unwrap();
    let client = tls::client_config(pem.as_bytes()).unwrap();
    let listening = Listening::new(Transport::Tls(TlsAcceptor::from(server)), 8).await;

    // A client that never says hello does not keep the others waiting.
    let silent = TcpStream::connect(listening.address).await.unwrap();
    let by_address = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST).into());
    for name in [ServerName::try_from("edgehub").unwrap(), by_address] {
        let socket = TcpStream::connect(listening.address).await.unwrap();
        let mut stream = TlsConnector::from(Arc::clone(&client))
            .connect(name, socket)
            .await
            .unwrap();
        stream.write_all(&get("/")).await.unwrap();
        assert_eq!(answer(&mut stream).await.body, "hello");
    }
    let mut plain = TcpStream::connect(listening.address).await.unwrap();
    plain.write_all(&get("/")).await.unwrap();
    read_rest(&mut plain).await;
    listening.stop().await;
    drop(silent);
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_is_not_finished_ends() {
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["edgehub".to_owned()]).unwrap();
    let pem = params.self_signed(&key).unwrap().pem();
    let versions = tls::TlsVersions::All;
    let key = key.serialize_pem();
    let server = tls::server_config(pem.as_bytes(), key.as_bytes(), true, versions).unwrap();
    let listening = Listening::new(Transport::Tls(TlsAcceptor::from(server)), 8).await;
    let mut silent = TcpStream::connect(listening.address).await.unwrap();
    silent.write_all(&[0x16, 3, 1]).await.unwrap();
    let before = Instant::now();
    read_rest(&mut silent).await;
    assert!(before.elapsed() >= HANDSHAKE_MAX, "{:?}", before.elapsed());
    listening.stop().await;
}
