//! Every fault, per source, with loopback sockets on networks that labs do not use.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::*;

/// How long something that must happen may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long something that must not happen is waited for.
const SILENCE: Duration = Duration::from_millis(150);

/// A relay with hosts `up` (which echoes) and `down` (which connects), and its address.
struct Net {
    relay: Relay,
    up: SocketAddr,
    down: Ipv4Addr,
}

/// `octet` keeps tests apart from each other: they run in parallel.
async fn net(octet: u8) -> Net {
    net_with(octet, Plane::Data).await
}

async fn net_with(octet: u8, plane: Plane) -> Net {
    let private = Ipv4Addr::new(127, 1, octet, 101);
    let server = TcpListener::bind((private, 0)).await.unwrap();
    let port = server.local_addr().unwrap().port();
    let up = RelayHost {
        name: "up".to_owned(),
        public: Ipv4Addr::new(127, 1, octet, 1),
        private,
    };
    let down = RelayHost {
        name: "down".to_owned(),
        public: Ipv4Addr::new(127, 1, octet, 2),
        private: Ipv4Addr::new(127, 1, octet, 102),
    };
    let address = network::socket(up.public, port);
    let source = down.private;
    let relay = Relay::new(vec![up, down]).unwrap();
    relay.listen("up", port, plane).unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = server.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                let _ = tokio::io::copy(&mut read, &mut write).await;
            });
        }
    });
    Net {
        relay,
        up: address,
        down: source,
    }
}

impl Net {
    async fn client(&self) -> TcpStream {
        self.try_client().await.unwrap()
    }

    async fn try_client(&self) -> io::Result<TcpStream> {
        TcpStream::connect(self.up).await
    }

    /// A connection that the host `down` makes.
    async fn down_connects(&self) -> TcpStream {
        self.try_down_connects().await.unwrap()
    }

    async fn try_down_connects(&self) -> io::Result<TcpStream> {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind((self.down, 0).into()).unwrap();
        socket.connect(self.up).await
    }
}

async fn echo(stream: &mut TcpStream, text: &str) -> io::Result<()> {
    stream.write_all(text.as_bytes()).await?;
    let mut back = vec![0; text.len()];
    timeout(PATIENCE, stream.read_exact(&mut back))
        .await
        .expect("the echo came in time")?;
    assert_eq!(back, text.as_bytes());
    Ok(())
}

/// Waits for the reset, however far the connection has come.
async fn is_reset(stream: &mut TcpStream) {
    let mut byte = [0];
    let read = timeout(PATIENCE, stream.read(&mut byte))
        .await
        .expect("the reset came in time");
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

/// As [`is_reset`] for a new connection, which may be reset before the caller has looked at it.
async fn is_refused(connected: io::Result<TcpStream>) {
    match connected {
        Ok(mut stream) => is_reset(&mut stream).await,
        Err(error) => assert_eq!(error.kind(), ErrorKind::ConnectionReset),
    }
}

#[tokio::test]
async fn bytes_and_the_end_pass_and_the_source_address_is_kept() {
    let private = Ipv4Addr::new(127, 1, 1, 101);
    let server = TcpListener::bind((private, 0)).await.unwrap();
    let port = server.local_addr().unwrap().port();
    let public = Ipv4Addr::new(127, 1, 1, 1);
    let relay = Relay::new(vec![RelayHost {
        name: "up".to_owned(),
        public,
        private,
    }])
    .unwrap();
    relay.listen("up", port, Plane::Data).unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.1.1.77:0".parse().unwrap()).unwrap();
    let mut client = socket.connect(network::socket(public, port)).await.unwrap();
    let (mut stream, peer) = server.accept().await.unwrap();
    assert_eq!(peer.ip(), "127.1.1.77".parse::<IpAddr>().unwrap());
    client.write_all(&vec![7; 1_000_000]).await.unwrap();
    client.shutdown().await.unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).await.unwrap();
    assert_eq!(all, vec![7; 1_000_000]);
    // The other direction still works after the first one ended.
    stream.write_all(b"bye").await.unwrap();
    drop(stream);
    let mut bye = String::new();
    client.read_to_string(&mut bye).await.unwrap();
    assert_eq!(bye, "bye");
}

#[tokio::test]
async fn a_cut_resets_and_refuses_one_source_and_leaves_the_other_alone() {
    let net = net(2).await;
    let (mut client, mut down) = (net.client().await, net.down_connects().await);
    echo(&mut client, "one").await.unwrap();
    echo(&mut down, "one").await.unwrap();
    let links = Link::between("down", "up");
    net.relay.set_mode(&links, Mode::Cut).await;
    assert_eq!(
        net.relay.connections(&links[0]),
        0,
        "the cut is done when the call returns"
    );
    is_reset(&mut down).await;
    is_refused(net.try_down_connects().await).await;
    echo(&mut client, "two").await.unwrap();
    net.relay.heal(&links);
    echo(&mut net.down_connects().await, "three").await.unwrap();
}

#[tokio::test]
async fn a_black_hole_keeps_connections_and_passes_nothing_until_it_is_healed() {
    let net = net(3).await;
    let mut old = net.down_connects().await;
    echo(&mut old, "one").await.unwrap();
    let links = Link::between("down", "up");
    net.relay.set_mode(&links, Mode::BlackHole).await;
    let mut new = net.down_connects().await;
    let mut byte = [0; 3];
    for stream in [&mut old, &mut new] {
        stream.write_all(b"two").await.unwrap();
        assert!(
            timeout(SILENCE, stream.read_exact(&mut byte))
                .await
                .is_err(),
            "nothing passes"
        );
    }
    echo(&mut net.client().await, "clients are not touched")
        .await
        .unwrap();
    net.relay.heal(&links);
    for stream in [&mut old, &mut new] {
        timeout(PATIENCE, stream.read_exact(&mut byte))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(&byte, b"two");
    }
}

#[tokio::test]
async fn refusing_touches_new_connections_only() {
    let net = net(4).await;
    let mut old = net.client().await;
    echo(&mut old, "one").await.unwrap();
    let links = Link::between("client", "up");
    net.relay.set_mode(&links, Mode::Refuse).await;
    is_refused(net.try_client().await).await;
    echo(&mut old, "two").await.unwrap();
    echo(&mut net.down_connects().await, "hosts are no clients")
        .await
        .unwrap();
}

#[tokio::test]
async fn a_reset_ends_existing_connections_once() {
    let net = net(5).await;
    let (mut client, mut down) = (net.client().await, net.down_connects().await);
    echo(&mut client, "one").await.unwrap();
    echo(&mut down, "one").await.unwrap();
    net.relay.reset(&Link::between("client", "up")).await;
    is_reset(&mut client).await;
    echo(&mut down, "two").await.unwrap();
    echo(&mut net.client().await, "three").await.unwrap();
}

#[tokio::test]
async fn a_delay_is_added_in_each_direction_and_keeps_the_order() {
    let net = net(6).await;
    let mut client = net.client().await;
    echo(&mut client, "warm").await.unwrap();
    net.relay
        .set_delay(&Link::between("client", "up"), Duration::from_millis(100));
    let from = Instant::now();
    echo(&mut client, "one").await.unwrap();
    assert!(
        from.elapsed() >= Duration::from_millis(200),
        "took {:?}",
        from.elapsed()
    );
    // Latency, not bandwidth: what is sent meanwhile does not wait its turn.
    let from = Instant::now();
    for _ in 0..20 {
        client.write_all(b"0123456789").await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut back = [0; 200];
    timeout(PATIENCE, client.read_exact(&mut back))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(back.as_slice(), b"0123456789".repeat(20));
    assert!(
        from.elapsed() < Duration::from_secs(2),
        "took {:?}",
        from.elapsed()
    );
}

#[tokio::test]
async fn a_whole_host_can_be_cut_off_and_management_ports_never() {
    let net = net(7).await;
    net.relay
        .set_mode(&Link::between("up", "*"), Mode::Cut)
        .await;
    is_refused(net.try_client().await).await;
    is_refused(net.try_down_connects().await).await;
    net.relay.heal_all();
    echo(&mut net.client().await, "healed").await.unwrap();

    let management = net_with(8, Plane::Management).await;
    management
        .relay
        .set_mode(&Link::between("up", "*"), Mode::Cut)
        .await;
    echo(&mut management.client().await, "watched")
        .await
        .unwrap();
}

#[tokio::test]
async fn a_host_that_does_not_listen_is_a_reset() {
    let public = Ipv4Addr::new(127, 1, 9, 1);
    let private = Ipv4Addr::new(127, 1, 9, 101);
    let relay = Relay::new(vec![RelayHost {
        name: "up".to_owned(),
        public,
        private,
    }])
    .unwrap();
    // A port that was free a moment ago on an address that nobody else uses.
    let port = TcpListener::bind((private, 0))
        .await
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    relay.listen("up", port, Plane::Data).unwrap();
    is_refused(TcpStream::connect((public, port)).await).await;
}

#[tokio::test]
async fn a_dropped_relay_has_given_its_addresses_back() {
    for _ in 0..20 {
        let net = net(10).await;
        let mut client = net.client().await;
        echo(&mut client, "one").await.unwrap();
        let up = net.up;
        drop(net);
        // Whoever takes the address next does not find the old listener.
        std::net::TcpListener::bind(up).unwrap();
        let mut byte = [0];
        let end = timeout(PATIENCE, client.read(&mut byte)).await.unwrap();
        assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    }
}
