//! Calls of methods over HTTPS: who may call whom, what is checked, what comes back.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use bytes::Bytes;
use edgehub_auth::authenticator::RefreshOutcome;
use edgehub_auth::scope_cache::{ScopeCache, ScopeChange};
use edgehub_proto::clock::ManualClock;
use edgehub_proto::hub::{BoxFuture, MethodResult};
use edgehub_proto::identity::Identity;
use parking_lot::Mutex;
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Answer, connect, exchange, get, post, read_answers, scope};
use crate::http::limits::{BODY_READ_MAX, FINISH_MAX, METHOD_BODY_BYTES_MAX};
use crate::http::methods_api::MethodsApi;
use crate::hub::{Features, OfferError, Outlet, ToClient};
use crate::methods::{MethodParts, MethodService, OwnMethods};
use crate::test_support::*;

const RESET: &str = r#"{"methodName":"reset"}"#;

/// Clients that answer at once: each with what it was called with.
#[derive(Debug, Default)]
struct Clients {
    service: Mutex<Option<Arc<MethodService>>>,
    /// Who is there, and the status of its answers; none does not answer.
    there: Mutex<Vec<(Identity, Option<i32>)>>,
    /// What answers carry instead of the call's payload.
    payload: Mutex<Option<&'static str>>,
    called: Mutex<Vec<(String, Bytes)>>,
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
        let there = self.there.lock();
        let (client, status) = there
            .iter()
            .find(|(client, _)| client == to)
            .ok_or(OfferError::NotConnected)?;
        self.called
            .lock()
            .push((format!("{client} {name}"), payload.clone()));
        let payload = self.payload.lock().map_or(payload, Bytes::from);
        if let Some(status) = *status {
            // Not now: the service holds its lock while it offers.
            let service = self.service.lock().clone().unwrap();
            let client = client.clone();
            tokio::spawn(async move {
                service.responded(&client, &request_id, Some(status), payload);
            });
        }
        Ok(())
    }

    fn features(&self, _of: &Identity) -> Option<Features> {
        None
    }
}

#[derive(Debug)]
struct Teapot;

impl OwnMethods for Teapot {
    fn call(&self, name: &str, payload: Bytes) -> BoxFuture<MethodResult> {
        let status = if name == "tea" { 418 } else { 404 };
        Box::pin(std::future::ready(MethodResult { status, payload }))
    }
}

struct Api {
    clients: Arc<Clients>,
    router: Router,
}

/// The head of the hub on `edge1`.
fn api() -> Api {
    api_of(&sample_cache())
}

fn api_of(scope: &Arc<ScopeCache>) -> Api {
    let clock = Arc::new(ManualClock::new(NOW_S * 1000));
    let clients = Arc::new(Clients::default());
    let service = MethodService::new(MethodParts {
        own_identity: id("edge1/$edgeHub"),
        own_methods: Arc::new(Teapot),
        outlet: Arc::clone(&clients) as _,
        clock: PausedClock::new(),
        tasks: TaskTracker::new(),
        stop: CancellationToken::new(),
    });
    *clients.service.lock() = Some(Arc::clone(&service));
    let authenticator = authenticator(scope, &clock, None);
    let router = MethodsApi::new("edge1", Arc::clone(scope), authenticator, service).router();
    Api { clients, router }
}

impl Api {
    fn there(&self, client: &str, status: impl Into<Option<i32>>) {
        self.clients.there.lock().push((id(client), status.into()));
    }

    async fn send(&self, request: &[u8]) -> Answer {
        let mut answers = exchange(self.router.clone(), request).await;
        assert_eq!(answers.len(), 1, "{answers:?}");
        let answer = answers.remove(0);
        assert!(answer.has("x-content-type-options: nosniff"), "{answer:?}");
        answer
    }

    /// Calls as `edge1/modA` does.
    async fn call(&self, path: &str, body: &str) -> Answer {
        self.call_as("edge1/modA", &token("edge1/modA"), path, body)
            .await
    }

    async fn call_as(&self, caller: &str, token: &str, path: &str, body: &str) -> Answer {
        let headers = [("x-ms-edge-moduleId", caller), ("Authorization", token)];
        self.send(&post(path, &headers, body)).await
    }
}

fn message(answer: &Answer) -> String {
    let json = answer.json();
    assert_eq!(json.as_object().unwrap().len(), 1);
    json["message"].as_str().unwrap().to_owned()
}

const LEAF: &str = "/twins/leaf0/methods?api-version=2019-10-01";

#[tokio::test]
async fn devices_and_modules_are_called_and_payloads_travel_as_they_were_written() {
    let api = api();
    api.there("leaf0", 200);
    api.there("edge1/modB", -7);
    for (path, body, called, status, payload) in [
        (LEAF, RESET, "leaf0 reset", 200, ""),
        (
            LEAF,
            // Order of keys, digits and spaces are the caller's.
            r#"{"payload": {"b":1, "a":1.0e400,"a":[]}, "methodName":"set level"}"#,
            "leaf0 set level",
            200,
            r#"{"b":1, "a":1.0e400,"a":[]}"#,
        ),
        (
            LEAF,
            r#"{"methodName":"m","payload":null,"responseTimeoutInSeconds":null}"#,
            "leaf0 m",
            200,
            "null",
        ),
        (
            "/twins/edge1/modules/modB/methods",
            r#"{"methodName":"m","payload":"x","responseTimeoutInSeconds":300,"connectTimeoutInSeconds":300,"more":1}"#,
            "edge1/modB m",
            -7,
            r#""x""#,
        ),
        (
            "/twins/edge1/modules/mod%42/methods",
            RESET,
            "edge1/modB reset",
            -7,
            "",
        ),
    ] {
        let answer = api.call(path, body).await;
        assert_eq!(answer.status, 200, "{path} {body}: {answer:?}");
        let expected = if payload.is_empty() { "null" } else { payload };
        assert_eq!(
            answer.body,
            format!(r#"{{"status":{status},"payload":{expected}}}"#)
        );
        assert!(answer.has("content-type: application/json; charset=utf-8"));
        let call = api.clients.called.lock().pop().unwrap();
        assert_eq!(call, (called.to_owned(), Bytes::from(payload)));
    }
}

#[tokio::test]
async fn an_answer_that_is_no_json_stays_inside_of_its_place() {
    let api = api();
    api.there("leaf0", 200);
    for (payload, expected) in [
        (r#"1},"status":404"#, r#""1},\"status\":404""#),
        ("hello", r#""hello""#),
        ("", "null"),
        (" [1] ", " [1] "),
    ] {
        *api.clients.payload.lock() = Some(payload);
        let answer = api.call(LEAF, RESET).await;
        assert_eq!(
            answer.body,
            format!(r#"{{"status":200,"payload":{expected}}}"#)
        );
    }
}

#[tokio::test]
async fn the_hub_itself_can_be_called() {
    let api = api();
    let path = "/twins/edge1/modules/$edgeHub/methods";
    let answer = api.call(path, r#"{"methodName":"tea","payload":[]}"#).await;
    assert_eq!(answer.body, r#"{"status":418,"payload":[]}"#);
    let answer = api
        .call("/twins/edge1/modules/%24edgeHub/methods", RESET)
        .await;
    assert_eq!(answer.body, r#"{"status":404,"payload":null}"#);
}

#[tokio::test(start_paused = true)]
async fn who_is_not_there_is_404_and_who_does_not_answer_is_504() {
    let api = api();
    for (path, client) in [
        (LEAF, "leaf0"),
        ("/twins/edge1/modules/modB/methods", "edge1/modB"),
        ("/twins/a%20b/methods", "a b"),
        ("/twins/%C3%A4/methods", "ä"),
    ] {
        let answer = api.call(path, RESET).await;
        assert_eq!(answer.status, 404, "{path}: {answer:?}");
        assert_eq!(message(&answer), format!("Client {client} not found"));
    }
    api.there("leaf0", None);
    let begun = tokio::time::Instant::now();
    let answer = api
        .call(LEAF, r#"{"methodName":"m","responseTimeoutInSeconds":9}"#)
        .await;
    assert_eq!(answer.status, 504);
    let begins = "Timed out waiting for device to respond to method request ";
    assert!(message(&answer).starts_with(begins), "{answer:?}");
    assert!(begun.elapsed() >= Duration::from_secs(9));
}

#[tokio::test]
async fn only_a_module_of_this_device_with_its_own_token_may_call() {
    let api = api();
    api.there("leaf0", 200);
    let good = token("edge1/modA");
    let unable = "Unable to authenticate device with Id edge1/modA";
    let expired = token_with("edge1/modA", &key("edge1/modA", 0), NOW_S - 301);
    let wrong_key = token_with("edge1/modA", &key("edge1/modA", 1), NOW_S + 60);
    let foreign = "Only modules on the same device can invoke DirectMethods";
    let header = "Invalid header value for x-ms-edge-moduleId";
    for (caller, token_text, status, text) in [
        ("edge1/modA", &expired, 401, unable),
        ("edge1/modA", &wrong_key, 401, unable),
        ("edge1/modA", &token("edge1/$edgeHub"), 401, unable),
        (
            "edge1/nobody",
            &good,
            401,
            "Unable to authenticate device with Id edge1/nobody",
        ),
        (
            "edge1/modA",
            &"Bearer x".to_owned(),
            401,
            "Cannot parse SharedAccessSignature because of the following error - the text is not \
             a SharedAccessSignature",
        ),
        ("leaf1/modB", &token("leaf1/modB"), 401, foreign),
        ("edge2/$edgeHub", &token("edge2/$edgeHub"), 401, foreign),
        ("edge10/$edgeHub", &token("edge10/$edgeHub"), 401, foreign),
        ("edge1", &token("edge1"), 400, header),
        ("", &good, 400, header),
        ("edge1/", &good, 400, header),
        ("edge1/modA/x", &good, 400, header),
        ("edge1/mod A", &good, 400, header),
    ] {
        let answer = api.call_as(caller, token_text, LEAF, RESET).await;
        let got = (answer.status, message(&answer));
        assert_eq!(got, (status, text.to_owned()), "{caller}");
    }
    // Missing and doubled headers.
    let caller = ("x-ms-edge-moduleId", "edge1/modA");
    let authorization = ("Authorization", good.as_str());
    for (headers, status) in [
        (vec![authorization], 400),
        (vec![caller], 401),
        (vec![caller, caller, authorization], 400),
        (vec![caller, authorization, authorization], 401),
    ] {
        let answer = api.send(&post(LEAF, &headers, RESET)).await;
        assert_eq!(answer.status, status, "{answer:?}");
        assert!(!message(&answer).is_empty());
    }
    assert_eq!(*api.clients.called.lock(), []);
    assert_eq!(api.call(LEAF, RESET).await.status, 200);
}

#[tokio::test]
async fn a_caller_that_cannot_be_judged_now_is_told_so() {
    let cache = ScopeCache::new(&id("edge1"));
    let api = api_of(&cache);
    let answer = api.call(LEAF, RESET).await;
    assert_eq!(answer.status, 503);
    assert_eq!(
        message(&answer),
        "Cannot decide about device with Id edge1/modA now"
    );
    cache.apply(ScopeChange::Upsert(sample_scope()));
    assert_eq!(api.call(LEAF, RESET).await.status, 404);
}

#[tokio::test]
async fn what_is_not_as_it_should_be_is_the_callers_fault() {
    let api = api();
    api.there("leaf0", 200);
    let long = format!(r#"{{"methodName":"{}"}}"#, "x".repeat(101));
    let payload = |bytes: usize| {
        let text = "x".repeat(bytes - 2);
        format!(r#"{{"methodName":"m","payload":"{text}"}}"#)
    };
    let large = payload(131_073);
    let form = "The body is not JSON of the expected form";
    let response = "Response timeout is not within 5 and 300 seconds";
    let connecting = "Connect timeout is not within 0 and 300 seconds";
    for (body, text) in [
        ("", form),
        ("{", form),
        ("[]x", form),
        (r#"{"methodName":7}"#, form),
        (r#"{"methodName":"a","methodName":"b"}"#, form),
        (
            r#"{"methodName":"a","responseTimeoutInSeconds":"30"}"#,
            form,
        ),
        (r#"{"methodName":"a","payload":tru}"#, form),
        (r#"{"methodName":"a","payload":1}}"#, form),
        ("{}", "Method name is required"),
        (r#"{"methodName":null}"#, "Method name is required"),
        (r#"{"methodName":"  "}"#, "Method name is required"),
        (&long, "Method name is longer than 100 characters"),
        (
            r#"{"methodName":"a/b"}"#,
            "Method name contains '/' or a control character",
        ),
        (
            &large,
            "Request payload size 131073 is larger than 131072 bytes",
        ),
        (
            r#"{"methodName":"a","responseTimeoutInSeconds":4}"#,
            response,
        ),
        (
            r#"{"methodName":"a","responseTimeoutInSeconds":-1}"#,
            response,
        ),
        (
            r#"{"methodName":"a","responseTimeoutInSeconds":9223372036854775807}"#,
            response,
        ),
        (
            r#"{"methodName":"a","connectTimeoutInSeconds":301}"#,
            connecting,
        ),
        (
            r#"{"methodName":"a","connectTimeoutInSeconds":-1}"#,
            connecting,
        ),
    ] {
        let answer = api.call(LEAF, body).await;
        assert_eq!(answer.status, 400, "{answer:?}");
        assert_eq!(message(&answer), text);
    }
    for path in ["/twins/leaf0%2FmodB/methods", "/twins/%FF/methods"] {
        assert_eq!(api.call(path, RESET).await.status, 400, "{path}");
    }
    assert_eq!(*api.clients.called.lock(), []);
    assert_eq!(api.call(LEAF, &payload(131_072)).await.status, 200);
    // Nesting is only looked over, not descended into.
    let deep = format!(
        r#"{{"methodName":"m","payload":{}{}}}"#,
        "[".repeat(60_000),
        "]".repeat(60_000)
    );
    assert_eq!(api.call(LEAF, &deep).await.status, 200);
}

#[tokio::test(start_paused = true)]
async fn a_body_that_is_too_large_or_too_slow_is_not_waited_for() {
    let api = api();
    let large = format!(
        r#"{{"methodName":"m"{}}}"#,
        " ".repeat(METHOD_BODY_BYTES_MAX)
    );
    assert_eq!(api.call(LEAF, &large).await.status, 413);
    let good = token("edge1/modA");
    let head = format!(
        "POST {LEAF} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nx-ms-edge-moduleId: \
         edge1/modA\r\nAuthorization: {good}\r\nContent-Length: 100\r\n\r\n{{"
    );
    let begun = tokio::time::Instant::now();
    let mut client = connect(api.router.clone(), CancellationToken::new());
    client.write_all(head.as_bytes()).await.unwrap();
    let answers = read_answers(&mut client).await;
    assert_eq!(answers[0].status, 408);
    assert!(begun.elapsed() >= BODY_READ_MAX);
    // Who may not call is not even listened to.
    let head = head.replace("edge1/modA\r\n", "edge2/modA\r\n");
    let mut client = connect(api.router.clone(), CancellationToken::new());
    let begun = tokio::time::Instant::now();
    client.write_all(head.as_bytes()).await.unwrap();
    let answers = read_answers(&mut client).await;
    assert_eq!(answers[0].status, 401);
    assert!(begun.elapsed() < BODY_READ_MAX);
}

#[tokio::test(start_paused = true)]
async fn a_call_may_take_longer_than_a_connection_lives_but_not_than_the_hub() {
    let api = api();
    let body = r#"{"methodName":"m","responseTimeoutInSeconds":300,"connectTimeoutInSeconds":300}"#;
    let headers = [
        ("x-ms-edge-moduleId", "edge1/modA"),
        ("Authorization", &token("edge1/modA")),
    ];
    let request = post(LEAF, &headers, body);
    // Nobody connects for 300 s; without its patience the connection would end a moment later.
    let begun = tokio::time::Instant::now();
    let service = api.clients.service.lock().clone().unwrap();
    let mut client = connect(api.router.clone(), CancellationToken::new());
    client.write_all(&request).await.unwrap();
    tokio::time::sleep(Duration::from_secs(299)).await;
    api.there("leaf0", None);
    service.subscribed(&id("leaf0"));
    let answers = read_answers(&mut client).await;
    assert_eq!(answers[0].status, 504, "{answers:?}");
    assert_eq!(begun.elapsed().as_secs(), 599);

    let stop = CancellationToken::new();
    let mut client = connect(api.router.clone(), stop.clone());
    client.write_all(&request).await.unwrap();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let begun = tokio::time::Instant::now();
    stop.cancel();
    assert!(read_answers(&mut client).await.is_empty());
    assert_eq!(begun.elapsed(), FINISH_MAX);
}

#[tokio::test]
async fn both_apis_live_in_one_router() {
    let scope = scope::head(vec![], RefreshOutcome::NotFound);
    let api = api();
    api.there("leaf0", 200);
    let both = Api {
        router: scope.router.merge(api.router),
        clients: api.clients,
    };
    assert_eq!(both.call(LEAF, RESET).await.status, 200);
    let path = format!("/devices/edge2/modules/$edgeHub/{}", scope::SCOPE);
    let token = token("edge2/$edgeHub");
    let request = post(
        &path,
        &[("Authorization", &token)],
        r#"{"authChain":"edge2"}"#,
    );
    assert_eq!(both.send(&request).await.status, 200);
    assert_eq!(both.send(&get("/twins/leaf0/methods")).await.status, 405);
    assert_eq!(both.send(&get("/twins/leaf0")).await.status, 404);
}
