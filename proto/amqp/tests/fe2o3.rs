//! The engine judged by the crate `fe2o3-amqp`, which shares none of its code: a server of queues
//! (`queues`) on TCP, and that crate's client.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests; clippy.toml covers the tests themselves"
)]

use std::net::SocketAddr;
use std::time::Duration;

use fe2o3_amqp::connection::{ConnectionHandle, OpenError};
use fe2o3_amqp::link::receiver::CreditMode;
use fe2o3_amqp::sasl_profile::SaslProfile;
use fe2o3_amqp::session::SessionHandle;
use fe2o3_amqp::types::definitions::{ReceiverSettleMode, SenderSettleMode};
use fe2o3_amqp::types::messaging::{Data, Message, Modified, Outcome};
use fe2o3_amqp::{Connection, Receiver, Sendable, Sender, Session};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::LocalSet;
use tokio::time::timeout;

mod queues;

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long is waited for what must not come.
const SILENCE: Duration = Duration::from_millis(200);

/// Starts a server with queues of its own; it ends with the process.
fn server() -> SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::from_std(listener).unwrap();
            LocalSet::new().run_until(queues::serve(listener)).await
        })
    });
    address
}

async fn open(
    address: SocketAddr,
    frame_bytes: u32,
    sasl: Option<SaslProfile>,
) -> Result<ConnectionHandle<()>, OpenError> {
    let stream = TcpStream::connect(address).await.unwrap();
    let mut builder = Connection::builder()
        .container_id("client")
        .hostname("localhost")
        .max_frame_size(frame_bytes)
        .channel_max(8_191);
    if let Some(sasl) = sasl {
        builder = builder.sasl_profile(sasl);
    }
    let opening = builder.open_with_stream(stream);
    timeout(PATIENCE, opening).await.expect("no open")
}

/// A connection with a session.
async fn client(address: SocketAddr) -> (ConnectionHandle<()>, SessionHandle<()>) {
    let mut connection = open(address, 65_536, None).await.unwrap();
    let session = Session::begin(&mut connection).await.unwrap();
    (connection, session)
}

async fn sender(session: &mut SessionHandle<()>, name: &str, address: &str) -> Sender {
    let attaching = Sender::attach(session, name, address);
    timeout(PATIENCE, attaching).await.unwrap().unwrap()
}

async fn receiver(session: &mut SessionHandle<()>, name: &str, address: &str) -> Receiver {
    let attaching = Receiver::attach(session, name, address);
    timeout(PATIENCE, attaching).await.unwrap().unwrap()
}

fn message(bytes: Vec<u8>) -> Message<Data> {
    Message::builder().data(bytes).build()
}

async fn send(sender: &mut Sender, bytes: impl Into<Vec<u8>>) -> Outcome {
    let sending = sender.send(message(bytes.into()));
    timeout(PATIENCE, sending).await.unwrap().unwrap()
}

async fn next(receiver: &mut Receiver) -> Vec<u8> {
    let delivery = timeout(PATIENCE, receiver.recv::<Data>()).await;
    let delivery = delivery.expect("no delivery").unwrap();
    receiver.accept(&delivery).await.unwrap();
    delivery.body().0.to_vec()
}

async fn nothing(receiver: &mut Receiver) {
    let delivery = timeout(SILENCE, receiver.recv::<Data>()).await;
    assert!(delivery.is_err(), "{delivery:?}");
}

fn numbered(number: u32) -> Vec<u8> {
    format!("message {number}").into_bytes()
}

#[tokio::test]
async fn a_thousand_messages_each_way_keep_their_order() {
    let (mut connection, mut session) = client(server()).await;
    let mut into = sender(&mut session, "in", "q").await;
    let mut outcomes = Vec::new();
    for number in 0..1_000 {
        let sending = into.send_batchable(message(numbered(number)));
        outcomes.push(timeout(PATIENCE, sending).await.unwrap().unwrap());
    }
    for outcome in outcomes {
        let outcome = timeout(PATIENCE, outcome).await.unwrap().unwrap();
        assert!(matches!(outcome, Outcome::Accepted(_)), "{outcome:?}");
    }
    let mut out = receiver(&mut session, "out", "q").await;
    for number in 0..1_000 {
        assert_eq!(next(&mut out).await, numbered(number));
    }
    nothing(&mut out).await;
    into.close().await.unwrap();
    out.close().await.unwrap();
    session.end().await.unwrap();
    connection.close().await.unwrap();
}

#[tokio::test]
async fn messages_of_many_frames_arrive_whole() {
    let address = server();
    for frame_bytes in [512, 4_096, 65_536] {
        let mut connection = open(address, frame_bytes, None).await.unwrap();
        let mut session = Session::begin(&mut connection).await.unwrap();
        let mut into = sender(&mut session, "in", "q").await;
        let mut out = receiver(&mut session, "out", "q").await;
        for bytes in [0, 1, 400, 300_000, 1_000_000] {
            let body: Vec<u8> = (0..bytes).map(|at: u32| (at % 253) as u8).collect();
            let outcome = send(&mut into, body.clone()).await;
            assert!(matches!(outcome, Outcome::Accepted(_)), "{outcome:?}");
            assert!(next(&mut out).await == body, "{bytes} in {frame_bytes}");
        }
        connection.close().await.unwrap();
    }
}

#[tokio::test]
async fn a_batch_is_several_messages() {
    let (_connection, mut session) = client(server()).await;
    let mut into = sender(&mut session, "in", "q").await;
    let items = (0..3).map(|number| {
        let item = fe2o3_amqp::types::messaging::message::__private::Serializable(message(
            numbered(number),
        ));
        Data::from(serde_amqp::to_vec(&item).unwrap())
    });
    let batch = Sendable::builder()
        .message(Message::builder().data_batch(items).build())
        .message_format(0x8001_3700)
        .build();
    let outcome = timeout(PATIENCE, into.send(batch)).await.unwrap().unwrap();
    assert!(matches!(outcome, Outcome::Accepted(_)), "{outcome:?}");
    let mut out = receiver(&mut session, "out", "q").await;
    for number in 0..3 {
        assert_eq!(next(&mut out).await, numbered(number));
    }
}

#[tokio::test]
async fn every_outcome_reaches_the_sender() {
    let (_connection, mut session) = client(server()).await;
    for (address, wanted) in [
        ("q", "Accepted"),
        ("$reject", "Rejected"),
        ("$release", "Released"),
        ("$modify", "Modified"),
    ] {
        let mut into = sender(&mut session, address, address).await;
        for _ in 0..3 {
            let outcome = send(&mut into, "x").await;
            if let Outcome::Rejected(rejected) = &outcome {
                let error = rejected.error.as_ref().unwrap();
                assert_eq!(error.description.as_deref(), Some("as asked"));
            }
            assert!(format!("{outcome:?}").starts_with(wanted), "{outcome:?}");
        }
    }
}

#[tokio::test]
async fn every_outcome_of_the_receiver_counts() {
    for mode in [ReceiverSettleMode::First, ReceiverSettleMode::Second] {
        let (_connection, mut session) = client(server()).await;
        let mut into = sender(&mut session, "in", "q").await;
        for number in 0..4 {
            send(&mut into, numbered(number)).await;
        }
        let out = Receiver::builder()
            .name("out")
            .source("q")
            .receiver_settle_mode(mode)
            .credit_mode(CreditMode::Manual)
            .attach(&mut session);
        let mut out = timeout(PATIENCE, out).await.unwrap().unwrap();
        let take = async |out: &mut Receiver| {
            out.set_credit(1).await.unwrap();
            let delivery = timeout(PATIENCE, out.recv::<Data>()).await;
            delivery.expect("no delivery").unwrap()
        };
        let first = take(&mut out).await;
        assert_eq!(first.body().0.to_vec(), numbered(0));
        out.release(&first).await.unwrap();
        let again = take(&mut out).await;
        assert_eq!(again.body().0.to_vec(), numbered(0));
        let modified = Modified {
            delivery_failed: Some(true),
            undeliverable_here: None,
            message_annotations: None,
        };
        out.modify(&again, modified).await.unwrap();
        let again = take(&mut out).await;
        assert_eq!(again.body().0.to_vec(), numbered(0));
        out.accept(&again).await.unwrap();
        let bad = take(&mut out).await;
        assert_eq!(bad.body().0.to_vec(), numbered(1));
        out.reject(&bad, None).await.unwrap();
        let good = take(&mut out).await;
        assert_eq!(good.body().0.to_vec(), numbered(2));
        let last = take(&mut out).await;
        out.accept_all(vec![&good, &last]).await.unwrap();
        let mut dead = receiver(&mut session, "dead", "q.dead").await;
        assert_eq!(next(&mut dead).await, numbered(1));
        out.close().await.unwrap();
        let mut rest = receiver(&mut session, "rest", "q").await;
        nothing(&mut rest).await;
    }
}

#[tokio::test]
async fn credit_is_kept_to_and_drained() {
    let (_connection, mut session) = client(server()).await;
    let mut into = sender(&mut session, "in", "q").await;
    for number in 0..6 {
        send(&mut into, numbered(number)).await;
    }
    let out = Receiver::builder()
        .name("out")
        .source("q")
        .credit_mode(CreditMode::Manual)
        .attach(&mut session);
    let mut out = timeout(PATIENCE, out).await.unwrap().unwrap();
    nothing(&mut out).await;
    out.set_credit(2).await.unwrap();
    for number in 0..2 {
        assert_eq!(next(&mut out).await, numbered(number));
    }
    nothing(&mut out).await;
    out.set_credit(3).await.unwrap();
    for number in 2..5 {
        assert_eq!(next(&mut out).await, numbered(number));
    }
    // One is there for ten: the drain takes the other nine.
    out.set_credit(10).await.unwrap();
    assert_eq!(next(&mut out).await, numbered(5));
    out.drain().await.unwrap();
    nothing(&mut out).await;
    send(&mut into, "later").await;
    nothing(&mut out).await;
    out.set_credit(1).await.unwrap();
    assert_eq!(next(&mut out).await, b"later");
}

#[tokio::test]
async fn what_is_unsettled_comes_back_with_the_next_link_of_the_name() {
    let (mut connection, mut session) = client(server()).await;
    let mut into = sender(&mut session, "in", "q").await;
    for number in 0..5 {
        send(&mut into, numbered(number)).await;
    }
    for _ in 0..10 {
        let mut out = receiver(&mut session, "out", "q").await;
        for number in 0..5 {
            let delivery = timeout(PATIENCE, out.recv::<Data>()).await;
            let delivery = delivery.expect("no delivery").unwrap();
            assert_eq!(delivery.body().0.to_vec(), numbered(number));
        }
        out.close().await.unwrap();
    }
    // A session that goes takes its links along.
    let mut other = Session::begin(&mut connection).await.unwrap();
    let mut out = receiver(&mut other, "out", "q").await;
    let delivery = timeout(PATIENCE, out.recv::<Data>()).await;
    assert!(delivery.expect("no delivery").is_ok());
    other.end().await.unwrap();
    let mut out = receiver(&mut session, "out", "q").await;
    for number in 0..5 {
        assert_eq!(next(&mut out).await, numbered(number));
    }
    into.close().await.unwrap();
    let mut into = sender(&mut session, "in", "q").await;
    send(&mut into, "still here").await;
    assert_eq!(next(&mut out).await, b"still here");
}

#[tokio::test]
async fn many_sessions_do_not_disturb_each_other() {
    let mut connection = open(server(), 65_536, None).await.unwrap();
    let mut sessions = Vec::new();
    for number in 0..100 {
        let mut session = Session::begin(&mut connection).await.unwrap();
        let queue = format!("q{number}");
        let into = sender(&mut session, "in", &queue).await;
        let out = receiver(&mut session, "out", &queue).await;
        sessions.push((session, into, out));
    }
    for round in 0..3 {
        for (number, (_, into, _)) in (0..).zip(&mut sessions) {
            send(into, numbered(number * 10 + round)).await;
        }
    }
    for (number, (_, _, out)) in (0..).zip(&mut sessions) {
        for round in 0..3 {
            assert_eq!(next(out).await, numbered(number * 10 + round));
        }
    }
    connection.close().await.unwrap();
}

#[tokio::test]
async fn a_refused_link_says_why_and_the_connection_goes_on() {
    let (mut connection, mut session) = client(server()).await;
    let refused = Sender::attach(&mut session, "no", "$forbidden");
    let error = timeout(PATIENCE, refused).await.unwrap().unwrap_err();
    assert!(
        format!("{error:?}").contains("UnauthorizedAccess"),
        "{error:?}"
    );
    let mut other = Session::begin(&mut connection).await.unwrap();
    let refused = Receiver::attach(&mut other, "no", "$forbidden");
    let error = timeout(PATIENCE, refused).await.unwrap().unwrap_err();
    assert!(
        format!("{error:?}").contains("UnauthorizedAccess"),
        "{error:?}"
    );
    let mut good = Session::begin(&mut connection).await.unwrap();
    let mut into = sender(&mut good, "in", "q").await;
    send(&mut into, "x").await;
}

#[tokio::test]
async fn sasl_lets_in_whom_it_should() {
    let address = server();
    let plain = |password: &str| SaslProfile::Plain {
        username: "somebody".to_owned(),
        password: password.to_owned(),
    };
    for good in [SaslProfile::Anonymous, plain("open-sesame")] {
        let mut connection = open(address, 65_536, Some(good)).await.unwrap();
        let mut session = Session::begin(&mut connection).await.unwrap();
        let mut into = sender(&mut session, "in", "q").await;
        send(&mut into, "x").await;
        connection.close().await.unwrap();
    }
    assert!(open(address, 65_536, Some(plain("guess"))).await.is_err());
}

#[tokio::test]
async fn deliveries_that_come_settled_give_their_credit_back() {
    let (_connection, mut session) = client(server()).await;
    let into = Sender::builder()
        .name("in")
        .target("q")
        .sender_settle_mode(SenderSettleMode::Settled)
        .attach(&mut session);
    let mut into = timeout(PATIENCE, into).await.unwrap().unwrap();
    let out = Receiver::builder()
        .name("out")
        .source("q")
        .sender_settle_mode(SenderSettleMode::Settled)
        .attach(&mut session);
    let mut out = timeout(PATIENCE, out).await.unwrap().unwrap();
    // Several times the credit of the link.
    for number in 0..500 {
        send(&mut into, numbered(number)).await;
        if number % 50 == 49 {
            // That crate gives credit again for what was accepted, settled or not.
            for number in number - 49..=number {
                assert_eq!(next(&mut out).await, numbered(number));
            }
        }
    }
}
