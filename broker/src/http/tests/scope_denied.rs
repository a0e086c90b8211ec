//! Whom the scope calls tell nothing, and what is not in any log.

use edgehub_auth::authenticator::RefreshOutcome;
use edgehub_auth::scope_cache::{ScopeCache, ScopeChange};
use tokio::io::AsyncWriteExt;
use tokio_util::sync::CancellationToken;

use super::scope::{Head, IDENTITY, SCOPE, call, head, head_of, one};
use super::{Answer, connect, exchange, post, read_answers};
use crate::http::limits::{BODY_BYTES_MAX, BODY_READ_MAX};
use crate::test_support::*;

async fn call_with(head: &Head, caller: &str, token: Option<&str>, chain: &str) -> Answer {
    let (device, module) = caller.split_once('/').unwrap();
    let body = format!(r#"{{"authChain":"{chain}"}}"#);
    let headers: Vec<_> = token
        .into_iter()
        .map(|token| ("Authorization", token))
        .collect();
    let path = format!("/devices/{device}/modules/{module}/{SCOPE}");
    one(head, &post(&path, &headers, &body)).await
}

#[tokio::test]
async fn only_a_hub_with_its_own_token_is_answered() {
    let head = head(vec![], RefreshOutcome::NotFound);
    let good = token("edge2/$edgeHub");
    let unable = "Unable to authenticate device with Id edge2/$edgeHub";
    let expired = token_with("edge2/$edgeHub", &key("edge2/$edgeHub", 0), NOW_S - 301);
    let other_hub = good.replace("h.azure-devices.net", "i.azure-devices.net");
    for (token, text) in [
        (None, unable),
        (
            Some(token_with(
                "edge2/$edgeHub",
                &key("edge2/$edgeHub", 1),
                NOW_S + 60,
            )),
            unable,
        ),
        // A device's key and token do not act for others.
        (Some(token("edge2")), unable),
        (
            Some(token_with("edge2/$edgeHub", &key("edge2", 0), NOW_S + 60)),
            unable,
        ),
        (Some(token("edge10/$edgeHub")), unable),
        (Some(token("edge1/$edgeHub")), unable),
        (Some(expired), unable),
        (Some(other_hub), unable),
        (
            Some("Bearer x".to_owned()),
            "Cannot parse SharedAccessSignature because of the following error - the text is not \
             a SharedAccessSignature",
        ),
    ] {
        let answer = call_with(&head, "edge2/$edgeHub", token.as_deref(), "edge2").await;
        assert_eq!(
            (answer.status, answer.error().as_str()),
            (401, text),
            "{token:?}"
        );
    }
    assert_eq!(
        call_with(&head, "edge2/$edgeHub", Some(&good), "edge2")
            .await
            .status,
        200
    );
}

#[tokio::test]
async fn two_authorization_headers_are_none() {
    let head = head(vec![], RefreshOutcome::NotFound);
    let good = token("edge2/$edgeHub");
    let path = format!("/devices/edge2/modules/$edgeHub/{SCOPE}");
    let headers = [("Authorization", good.as_str()), ("authorization", "x")];
    let answer = one(&head, &post(&path, &headers, r#"{"authChain":"edge2"}"#)).await;
    assert_eq!(answer.status, 401);
}

#[tokio::test]
async fn a_forwarded_certificate_proves_nothing() {
    // spec/auth-hierarchy-http.md 3.5 and 5, invariant 6: nobody is trusted to forward one yet.
    let head = head(vec![], RefreshOutcome::NotFound);
    let path = format!("/devices/edge2/modules/$edgeHub/{SCOPE}");
    let certificate = ("x-ms-edge-clientcert", "-----BEGIN%20CERTIFICATE-----%0A");
    let proxy = token("edge1/modA");
    for headers in [
        vec![certificate],
        vec![certificate, ("Authorization", &proxy)],
    ] {
        let request = post(&path, &headers, r#"{"authChain":"edge2"}"#);
        assert_eq!(one(&head, &request).await.status, 401);
    }
}

#[tokio::test]
async fn the_path_must_name_an_edge_hub() {
    let head = head(vec![], RefreshOutcome::NotFound);
    for caller in [
        "edge2/modA",
        "edge2/$edgeAgent",
        "edge2/$EDGEHUB",
        "edge2/$edgeHub2",
    ] {
        let answer = call_with(&head, caller, Some(&token(caller)), "edge2").await;
        assert_eq!(answer.status, 401, "{caller}");
    }
}

#[tokio::test]
async fn siblings_ancestors_and_namesakes_are_not_told_about() {
    // edge10 exists; its chains must not profit from names that begin alike.
    let head = head(vec![], RefreshOutcome::NotFound);
    let hub = |device: &str| format!("{device}/$edgeHub");
    for (caller, chain) in [
        ("edge2", "edge10;edge2"),
        ("edge10", "edge2;edge10"),
        ("edge2", "edge1;edge2"),
        ("edge3", "edge2;edge3"),
        ("edge2", "leaf10;edge2"),
        ("edge2", "nobody;edge2"),
        // The chain ends with another than the caller.
        ("edge2", "edge3;edge10"),
        ("edge2", "edge1"),
        ("edge10", "edge1"),
        ("edge2", "edge3"),
        ("edge2", "edge2;edge2/$edgeHub"),
    ] {
        let answer = call_with(&head, &hub(caller), Some(&token(&hub(caller))), chain).await;
        assert_eq!(answer.status, 401, "{caller} {chain}: {answer:?}");
        let body = format!(r#"{{"targetDeviceId":"leaf1","authChain":"{chain}"}}"#);
        head.upstream.asked.lock().clear();
        let answer = call(&head, caller, IDENTITY, &body).await;
        assert_eq!(answer.status, 401, "{caller} {chain}");
        assert_eq!(
            *head.upstream.asked.lock(),
            [""; 0],
            "nothing is asked for it: {chain}"
        );
    }
    for (caller, target) in [("edge3", "leaf1"), ("edge2", "leaf0"), ("edge10", "leaf1")] {
        let body = format!(r#"{{"targetDeviceId":"{target}","authChain":"{caller}"}}"#);
        let answer = call(&head, caller, IDENTITY, &body).await;
        assert_eq!(answer.status, 401, "{caller} {target}");
        assert_eq!(
            answer.error(),
            format!("{target} is not in the scope of the calling device")
        );
    }
}

#[tokio::test]
async fn a_hub_that_does_not_know_yet_says_so() {
    let empty = ScopeCache::new(&id("edge1"));
    let starting = head_of(empty, vec![], RefreshOutcome::Unavailable);
    let good = token("edge2/$edgeHub");
    let answer = call_with(&starting, "edge2/$edgeHub", Some(&good), "edge2").await;
    assert_eq!(answer.status, 503);
    assert_eq!(
        answer.error(),
        "Cannot decide about device with Id edge2/$edgeHub now"
    );
    starting.cache.apply(ScopeChange::Upsert(sample_scope()));
    let answer = call_with(&starting, "edge2/$edgeHub", Some(&good), "edge2").await;
    assert_eq!(answer.status, 200);
}

#[tokio::test]
async fn a_body_that_makes_no_sense_is_the_callers_fault() {
    let head = head(vec![], RefreshOutcome::NotFound);
    let deep = format!(
        r#"{{"authChain":{}1{}}}"#,
        "[".repeat(10_000),
        "]".repeat(10_000)
    );
    let long = format!(r#"{{"authChain":"{}"}}"#, "edge2;".repeat(17));
    for body in [
        "",
        "null",
        "[]",
        "{}",
        "{",
        r#""edge2""#,
        r#"{"authChain":null}"#,
        r#"{"authChain":7}"#,
        r#"{"authChain":""}"#,
        r#"{"authChain":";;"}"#,
        r#"{"authChain":"edge 2"}"#,
        r#"{"authChain":"edge2/$edgeHub;edge2"}"#,
        r#"{"authChain":"edge2"}x"#,
        r#"{"authChain":"edge2","authChain":"edge2"}"#,
        "\u{feff}{}",
        r#"{"authChain":"edge2","continuationLink":"%%"}"#,
        &deep,
        &long,
    ] {
        let answer = call(&head, "edge2", SCOPE, body).await;
        assert_eq!(answer.status, 400, "{body}: {answer:?}");
        assert!(!answer.error().is_empty());
    }
    for body in [
        r#"{"authChain":"edge2"}"#,
        r#"{"targetDeviceId":"leaf1"}"#,
        r#"{"targetDeviceId":"","authChain":"edge2"}"#,
        r#"{"targetDeviceId":"a/b","authChain":"edge2"}"#,
        r#"{"targetDeviceId":"leaf1","targetModuleId":"a/b","authChain":"edge2"}"#,
        r#"{"targetDeviceId":"leaf1","authChain":"leaf1/modB;edge2"}"#,
    ] {
        let answer = call(&head, "edge2", IDENTITY, body).await;
        assert_eq!(answer.status, 400, "{body}: {answer:?}");
    }
}

#[tokio::test]
async fn a_body_is_bounded_in_size_and_time() {
    let head = head(vec![], RefreshOutcome::NotFound);
    let padded = |bytes: usize| {
        let body = r#"{"authChain":"edge2"}"#;
        format!("{}{body}", " ".repeat(bytes - body.len()))
    };
    assert_eq!(
        call(&head, "edge2", SCOPE, &padded(BODY_BYTES_MAX))
            .await
            .status,
        200
    );
    let answer = call(&head, "edge2", SCOPE, &padded(BODY_BYTES_MAX + 1)).await;
    assert_eq!(answer.status, 413);
    assert_eq!(answer.error(), "the body is too large");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_dribbles_is_not_waited_for() {
    let head = head(vec![], RefreshOutcome::NotFound);
    let mut client = connect(head.router.clone(), CancellationToken::new());
    let path = format!("/devices/edge2/modules/$edgeHub/{SCOPE}");
    let headers = [("Authorization", token("edge2/$edgeHub"))];
    let headers = headers
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    let request = post(&path, &headers, r#"{"authChain":"edge2"}"#);
    client
        .write_all(&request[..request.len() - 1])
        .await
        .unwrap();
    let before = tokio::time::Instant::now();
    let answers = read_answers(&mut client).await;
    assert_eq!(answers[0].status, 408);
    assert_eq!(before.elapsed().as_secs(), BODY_READ_MAX.as_secs());
}

#[tokio::test]
async fn a_stranger_is_refused_before_its_body_is_read() {
    let head = head(vec![], RefreshOutcome::NotFound);
    let path = format!("/devices/edge2/modules/$edgeHub/{SCOPE}");
    // The body never comes: were it waited for, so would the answer.
    let request = format!("POST {path} HTTP/1.1\r\nContent-Length: 1000\r\n\r\n");
    let mut client = connect(head.router.clone(), CancellationToken::new());
    client.write_all(request.as_bytes()).await.unwrap();
    let answers = read_answers(&mut client).await;
    assert_eq!(answers[0].status, 401);
}

#[tokio::test]
async fn every_refusal_is_in_the_log_once_with_its_reason() {
    let head = head(vec![], RefreshOutcome::Unavailable);
    let good = token("edge2/$edgeHub");
    let post_to = |caller: &str, call: &str, headers: &[&str], body: &str| {
        let headers: Vec<_> = headers.iter().map(|t| ("Authorization", *t)).collect();
        post(&format!("/devices/{caller}/{call}"), &headers, body)
    };
    let own = "edge2/modules/$edgeHub";
    let leaf10 = r#"{"targetDeviceId":"leaf10","authChain":"edge2"}"#;
    for (request, line) in [
        (
            post_to(own, SCOPE, &[], "{}"),
            "edge2/$edgeHub with 401: no Authorization header",
        ),
        (
            post_to(own, SCOPE, &["a", "b"], "{}"),
            "edge2/$edgeHub with 401: several Authorization headers",
        ),
        (
            post_to("edge2/modules/modA", SCOPE, &[&good], "{}"),
            "edge2/modA with 401: only $edgeHub may ask",
        ),
        (
            post_to(own, SCOPE, &["Basic x"], r#"{"authChain":"edge2"}"#),
            "edge2/$edgeHub with 401: malformed token: the text is not a SharedAccessSignature \
             (malformed_token)",
        ),
        (
            post_to(own, SCOPE, &[&good], "{}"),
            "edge2/$edgeHub with 400: the body is not JSON of the expected form",
        ),
        (
            post_to(own, SCOPE, &[&good], r#"{"authChain":"edge10;edge2"}"#),
            "edge2/$edgeHub with 401: edge10 is not in the scope of the calling device",
        ),
        (
            post_to(own, IDENTITY, &[&good], leaf10),
            "edge2/$edgeHub with 401: leaf10 is not in the scope of the calling device",
        ),
        (
            post_to(own, IDENTITY, &[&good], &leaf10.replace("leaf10", "new")),
            "edge2/$edgeHub with 503: new is not known now",
        ),
    ] {
        let sink = LogSink::default();
        let _guard = sink.start();
        one(&head, &request).await;
        let log = sink.text();
        assert_eq!(log.matches("Refused").count(), 1, "{log}");
        let line = format!("Refused a scope call of {line}");
        assert!(log.contains(&line), "{line}\n{log}");
    }
}

#[tokio::test]
async fn no_token_and_no_key_reaches_the_log() {
    let sink = LogSink::default();
    let _guard = sink.start();
    let head = head(vec![], RefreshOutcome::NotFound);
    let good = token("edge2/$edgeHub");
    let wrong = token_with("edge2/$edgeHub", &key("edge2/$edgeHub", 1), NOW_S + 60);
    let cut = good.replace("&se=", "&xx=");
    for (token, status) in [(&good, 200), (&wrong, 401), (&cut, 401)] {
        let answer = call_with(&head, "edge2/$edgeHub", Some(token), "edge2").await;
        assert_eq!(answer.status, status);
        assert!(!answer.body.contains("sig"), "{answer:?}");
    }
    let not_json = format!(r#"{{"authChain":"edge2",{good}"#);
    assert_eq!(call(&head, "edge2", SCOPE, &not_json).await.status, 400);
    exchange(
        head.router.clone(),
        format!("GET / HTTP/1.1\r\n{good}\r\n\r\n").as_bytes(),
    )
    .await;
    let log = sink.text();
    assert!(
        log.contains(
            "Refused a scope call of edge2/$edgeHub with 401: wrong signature for edge2/$edgeHub \
             (wrong_signature)"
        ),
        "{log}"
    );
    for secret in [
        "sig=",
        "SharedAccessSignature sr",
        &key("edge2/$edgeHub", 0),
        &key("leaf1", 0),
    ] {
        assert!(!log.contains(secret), "{secret} in\n{log}");
    }
}
