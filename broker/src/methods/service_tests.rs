//! The service with real timers on a paused clock and clients that are lists of events.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_proto::hub::{BoxFuture, MethodCall, MethodResult};
use edgehub_proto::identity::Identity;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::limits::CALLS_PER_CLIENT_MAX;
use super::{MethodOutcome, MethodParts, MethodRequest, MethodService, OwnMethods};
use crate::hub::{Features, OfferError, Outlet, ToClient};
use crate::test_support::{PausedClock, id};

/// Clients that are subscribed, and the calls that each one got.
#[derive(Debug)]
struct Clients {
    subscribed: Mutex<HashMap<Identity, Vec<Call>>>,
    /// Calls delivered so far.
    delivered: watch::Sender<usize>,
}

#[derive(Clone, Debug)]
struct Call {
    request_id: Arc<str>,
    name: Arc<str>,
    payload: Bytes,
}

impl Clients {
    fn subscribe(&self, client: &str) {
        self.subscribed.lock().entry(id(client)).or_default();
    }

    fn calls(&self, client: &str) -> Vec<Call> {
        let clients = self.subscribed.lock();
        clients.get(&id(client)).cloned().unwrap_or_default()
    }

    async fn delivered(&self, count: usize) {
        let mut delivered = self.delivered.subscribe();
        delivered.wait_for(|now| *now >= count).await.unwrap();
    }
}

impl Outlet for Clients {
    fn offer(&self, to: &Identity, event: ToClient) -> Result<(), OfferError> {
        let ToClient::Method {
            request_id,
            name,
            payload,
        } = event
        else {
            panic!("{event:?}");
        };
        let mut clients = self.subscribed.lock();
        let calls = clients.get_mut(to).ok_or(OfferError::NotConnected)?;
        calls.push(Call {
            request_id,
            name,
            payload,
        });
        self.delivered.send_modify(|count| *count += 1);
        Ok(())
    }

    fn features(&self, _of: &Identity) -> Option<Features> {
        None
    }
}

/// Answers with what it was asked, but never `hang`.
#[derive(Debug)]
struct Echo;

impl OwnMethods for Echo {
    fn call(&self, name: &str, payload: Bytes) -> BoxFuture<MethodResult> {
        if name == "hang" {
            return Box::pin(std::future::pending());
        }
        Box::pin(std::future::ready(MethodResult {
            status: 200,
            payload,
        }))
    }
}

struct World {
    clients: Arc<Clients>,
    service: Arc<MethodService>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl World {
    fn new() -> Self {
        let clients = Arc::new(Clients {
            subscribed: Mutex::default(),
            delivered: watch::Sender::new(0),
        });
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let service = MethodService::new(MethodParts {
            own_identity: id("edge1/$edgeHub"),
            own_methods: Arc::new(Echo),
            outlet: Arc::clone(&clients) as _,
            clock: PausedClock::new(),
            tasks: tasks.clone(),
            stop: stop.clone(),
        });
        Self {
            clients,
            service,
            tasks,
            stop,
        }
    }

    /// Begins a call of a module; the payload is the method's name.
    fn invoke(
        &self,
        target: &str,
        name: &str,
        connect_s: u64,
        response_s: u64,
    ) -> tokio::task::JoinHandle<MethodOutcome> {
        let request = MethodRequest::local(
            name,
            Bytes::copy_from_slice(name.as_bytes()),
            Duration::from_secs(response_s),
            Duration::from_secs(connect_s),
        );
        let (service, target) = (Arc::clone(&self.service), id(target));
        tokio::spawn(async move { service.invoke(&target, request.unwrap()).await })
    }

    fn upstream(&self, target: &str, name: &str) -> oneshot::Receiver<MethodResult> {
        let (reply, answer) = oneshot::channel();
        let call = MethodCall {
            name: name.to_owned(),
            payload: Bytes::from_static(b"1"),
            reply,
        };
        self.service.upstream_call(&id(target), call);
        answer
    }

    fn answer(&self, client: &str, call: &Call, status: Option<i32>, payload: &'static str) {
        let payload = Bytes::from_static(payload.as_bytes());
        self.service
            .responded(&id(client), &call.request_id, status, payload);
    }
}

fn answered(status: i32, payload: &'static str) -> MethodOutcome {
    MethodOutcome::Answered {
        status,
        payload: Bytes::from_static(payload.as_bytes()),
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_is_called_and_its_answer_comes_back() {
    let world = World::new();
    world.clients.subscribe("leaf1");
    let outcome = world.invoke("leaf1", "reset", 0, 30);
    world.clients.delivered(1).await;
    let call = world.clients.calls("leaf1").remove(0);
    assert_eq!((&*call.name, &*call.payload), ("reset", &b"reset"[..]));
    assert_eq!(call.request_id.len(), 36);
    assert_eq!(*call.request_id, call.request_id.to_lowercase());
    // Somebody else's answer, and one to another call, are nobody's.
    world.answer("leaf10", &call, Some(1), "1");
    let other = Call {
        request_id: "00000000-0000-4000-8000-000000000000".into(),
        ..call.clone()
    };
    world.answer("leaf1", &other, Some(2), "2");
    let upper = Call {
        request_id: call.request_id.to_uppercase().into(),
        ..call.clone()
    };
    world.answer("leaf1", &upper, Some(201), "{}");
    assert_eq!(outcome.await.unwrap(), answered(201, "{}"));
    // Late ones too.
    world.answer("leaf1", &call, Some(3), "3");
    assert_eq!(world.service.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_answer_without_a_status_is_400000_and_empty() {
    let world = World::new();
    world.clients.subscribe("leaf1");
    let outcome = world.invoke("leaf1", "m", 0, 30);
    world.clients.delivered(1).await;
    let call = world.clients.calls("leaf1").remove(0);
    world.answer("leaf1", &call, None, "not taken");
    assert_eq!(outcome.await.unwrap(), answered(400_000, ""));
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_not_there_is_404_at_once_or_after_the_connect_timeout() {
    let world = World::new();
    let begun = tokio::time::Instant::now();
    let outcome = world.invoke("leaf1", "m", 0, 30).await.unwrap();
    assert_eq!(outcome, MethodOutcome::NotFound(id("leaf1")));
    assert_eq!(begun.elapsed(), Duration::ZERO);
    let outcome = world.invoke("leaf1", "m", 20, 30).await.unwrap();
    assert_eq!(outcome, MethodOutcome::NotFound(id("leaf1")));
    assert!(begun.elapsed() >= Duration::from_secs(20));
    assert!(begun.elapsed() < Duration::from_secs(21));
}

#[tokio::test(start_paused = true)]
async fn waiting_calls_leave_at_once_and_in_order_when_the_client_subscribes() {
    let world = World::new();
    let begun = tokio::time::Instant::now();
    let mut outcomes = Vec::new();
    for (number, name) in ["a", "b", "c"].into_iter().enumerate() {
        // A long wait for the client and a short one for the answer: the latter counts in the end.
        outcomes.push(world.invoke("leaf1", name, 300, 5));
        while world.service.waiting() < number + 1 {
            tokio::task::yield_now().await;
        }
    }
    world.service.subscribed(&id("leaf1"));
    assert_eq!(world.service.waiting(), 3, "it has not subscribed");
    world.clients.subscribe("leaf1");
    world.service.subscribed(&id("leaf1"));
    assert_eq!(begun.elapsed(), Duration::ZERO);
    let calls = world.clients.calls("leaf1");
    let names: Vec<_> = calls.iter().map(|call| &*call.name).collect();
    assert_eq!(names, ["a", "b", "c"]);
    // Answers may come in any order.
    world.answer("leaf1", &calls[1], Some(200), "2");
    let third = outcomes.pop().unwrap();
    assert_eq!(outcomes.pop().unwrap().await.unwrap(), answered(200, "2"));
    let timed_out = third.await.unwrap();
    assert!(
        matches!(timed_out, MethodOutcome::TimedOut(id) if id.to_string() == *calls[2].request_id)
    );
    assert!(begun.elapsed() >= Duration::from_secs(5));
    assert!(
        begun.elapsed() < Duration::from_secs(6),
        "the connect time-out is over"
    );
}

#[tokio::test(start_paused = true)]
async fn the_end_of_the_connection_is_504_for_what_was_sent_and_nothing_for_what_waits() {
    let world = World::new();
    world.clients.subscribe("leaf1");
    let sent = world.invoke("leaf1", "sent", 0, 300);
    world.clients.delivered(1).await;
    world.clients.subscribed.lock().clear();
    let waits = world.invoke("leaf1", "waits", 300, 30);
    while world.service.waiting() < 2 {
        tokio::task::yield_now().await;
    }
    let begun = tokio::time::Instant::now();
    world.service.disconnected(&id("leaf1"));
    assert!(matches!(sent.await.unwrap(), MethodOutcome::TimedOut(_)));
    assert_eq!(begun.elapsed(), Duration::ZERO);
    world.clients.subscribe("leaf1");
    world.service.subscribed(&id("leaf1"));
    let call = world.clients.calls("leaf1").remove(0);
    assert_eq!(&*call.name, "waits");
    world.answer("leaf1", &call, Some(200), "");
    assert_eq!(waits.await.unwrap(), answered(200, ""));
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_leaves_nothing_behind() {
    let world = World::new();
    let outcome = world.invoke("leaf1", "m", 300, 30);
    while world.service.waiting() < 1 {
        tokio::task::yield_now().await;
    }
    outcome.abort();
    assert!(outcome.await.unwrap_err().is_cancelled());
    assert_eq!(world.service.waiting(), 0);

    world.clients.subscribe("leaf1");
    let answer = world.upstream("leaf1", "m");
    assert_eq!(world.service.waiting(), 1);
    drop(answer);
    world.tasks.close();
    world.tasks.wait().await;
    assert_eq!(world.service.waiting(), 0);
}

#[tokio::test(start_paused = true)]
async fn upstream_hears_the_answer_or_404_or_504_as_json() {
    let world = World::new();
    let missing = world.upstream("leaf1", "m").await.unwrap();
    let body = r#"{"message":"Client leaf1 not found"}"#;
    assert_eq!((missing.status, &*missing.payload), (404, body.as_bytes()));
    let bad = world.upstream("leaf1", "a/b").await.unwrap();
    assert_eq!(bad.status, 400);

    world.clients.subscribe("leaf1");
    let answer = world.upstream("leaf1", "m");
    let call = world.clients.calls("leaf1").remove(0);
    world.answer("leaf1", &call, Some(-3), "[]");
    let answer = answer.await.unwrap();
    assert_eq!((answer.status, &*answer.payload), (-3, &b"[]"[..]));

    // Nobody answers: IoT Hub's 300 s are awaited first.
    let begun = tokio::time::Instant::now();
    let late = world.upstream("leaf1", "m").await.unwrap();
    assert_eq!(late.status, 504);
    assert!(begun.elapsed() >= Duration::from_secs(330));
    let text = String::from_utf8(late.payload.to_vec()).unwrap();
    let begins = r#"{"message":"Timed out waiting for device to respond to method request "#;
    assert!(text.starts_with(begins), "{text}");

    // A hub that stops says nothing: the caller's time runs out.
    let unanswered = world.upstream("leaf1", "m");
    world.stop.cancel();
    assert!(unanswered.await.is_err());
}

#[tokio::test(start_paused = true)]
async fn the_hub_itself_is_called_through_its_own_methods() {
    let world = World::new();
    let outcome = world.invoke("edge1/$edgeHub", "ping", 0, 30).await.unwrap();
    assert_eq!(outcome, answered(200, "ping"));
    let begun = tokio::time::Instant::now();
    let outcome = world.invoke("edge1/$edgeHub", "hang", 0, 7).await.unwrap();
    assert!(matches!(outcome, MethodOutcome::TimedOut(_)));
    assert!(begun.elapsed() >= Duration::from_secs(7));
    let answer = world.upstream("edge1/$edgeHub", "ping").await.unwrap();
    assert_eq!((answer.status, &*answer.payload), (200, &b"1"[..]));

    let hanging: Vec<_> = (0..CALLS_PER_CLIENT_MAX)
        .map(|_| world.upstream("edge1/$edgeHub", "hang"))
        .collect();
    tokio::task::yield_now().await;
    let refused = world.invoke("edge1/$edgeHub", "ping", 0, 30).await.unwrap();
    assert_eq!(refused, MethodOutcome::TooManyCalls(id("edge1/$edgeHub")));
    drop(hanging);
}
