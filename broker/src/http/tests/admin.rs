//! The metrics port (spec/operations.md A2.1).

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use edgehub_proto::clock::Clock;
use edgehub_proto::message::Message;
use edgehub_proto::stored;
use edgehub_storage::{Append, AppendBatch, CommitProgress, CommitTicket, Queue, Target};
use tokio::sync::watch;

use super::{exchange, get, post};
use crate::http::admin::Admin;
use crate::readiness::Readiness;
use crate::telemetry::metrics::Metrics;
use crate::test_support::*;

/// A process has one recorder.
fn metrics() -> Metrics {
    static METRICS: OnceLock<Metrics> = OnceLock::new();
    METRICS
        .get_or_init(|| Metrics::start(HUB_HOST, "edge1", "0").unwrap())
        .clone()
}

fn router(test: &TestHub, readiness: Readiness) -> (Router, watch::Sender<Readiness>) {
    let (sender, receiver) = watch::channel(readiness);
    (
        Admin::new(Arc::clone(&test.hub), metrics(), receiver).router(),
        sender,
    )
}

async fn store(test: &TestHub, queue: &Queue, messages: usize) {
    let progress = CommitProgress::new();
    for sequence in 1..=messages {
        let append = Append {
            sender: id("leaf0"),
            message: stored::encode_message(&Message::default()),
            enqueued_ms: test.clock.unix_ms(),
            targets: [Target {
                queue: queue.clone(),
                expires_at_ms: None,
            }]
            .into_iter()
            .collect(),
        };
        let sequence = u64::try_from(sequence).unwrap();
        let ticket = CommitTicket {
            progress: Arc::clone(&progress),
            sequence,
        };
        test.hub
            .store()
            .append(AppendBatch {
                appends: vec![append],
                ticket,
            })
            .await
            .unwrap();
    }
    while progress.committed() < u64::try_from(messages).unwrap() {
        progress.changed().await;
    }
}

#[tokio::test]
async fn readiness_says_what_is_missing() {
    let test = TestHub::new();
    let (router, readiness) = router(&test, Readiness::starting("no scope yet"));
    let ask = async |path: &str| exchange(router.clone(), &get(path)).await.remove(0);
    let answer = ask("/healthz").await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "ok"));
    let answer = ask("/readyz").await;
    assert_eq!((answer.status, answer.body.as_str()), (503, "no scope yet"));
    readiness.send_replace(Readiness::Ready);
    let answer = ask("/readyz").await;
    assert_eq!((answer.status, answer.body.as_str()), (200, "ready"));
    drop(readiness);
    assert_eq!(ask("/readyz").await.status, 200);
    test.hub.store().clone().close().await.unwrap();
    let answer = ask("/healthz").await;
    assert_eq!(answer.status, 503, "nothing is stored any more");
    assert!(answer.body.contains("restarted"), "{}", answer.body);
}

#[tokio::test]
async fn samples_show_the_store_as_it_is_now() {
    let test = TestHub::new();
    let queue = test.hub.store().queues().remove(0);
    let (router, _readiness) = router(&test, Readiness::Ready);
    store(&test, &queue, 3).await;
    test.clock.advance(Duration::from_millis(2_500));
    let answer = exchange(router, &get("/metrics")).await.remove(0);
    assert_eq!(answer.status, 200);
    assert!(answer.has("content-type: text/plain; version=0.0.4; charset=utf-8"));
    let common = format!(r#"iothub="{HUB_HOST}",edge_device="edge1",instance_number="0""#);
    let line = |text: &str| answer.body.lines().any(|line| line == text);
    let labels = r#"endpoint="iothub",priority="2000000000""#;
    assert!(
        line(&format!(
            r#"edgehub_queue_length{{{common},{labels},ms_telemetry="True"}} 3"#
        )),
        "{}",
        answer.body
    );
    let age = "edgehub_store_oldest_message_age_seconds";
    assert!(
        line(&format!("{age}{{{common},{labels}}} 2.5")),
        "{}",
        answer.body
    );
    let commits = test.hub.store().stats().commits;
    assert!(commits > 0);
    assert!(line(&format!(
        "edgehub_store_commits_total{{{common}}} {commits}"
    )));
    assert!(
        line(&format!("edgehub_store_wal_syncs_total{{{common}}} 0")),
        "{}",
        answer.body
    );
}

#[tokio::test]
async fn everything_else_is_not_there() {
    let test = TestHub::new();
    let (router, _readiness) = router(&test, Readiness::Ready);
    for request in [
        get("/"),
        get("/metrics/"),
        get("/Metrics"),
        get("/readyz/x"),
        post("/metrics", &[], ""),
        post(
            "/devices/edge2/modules/$edgeHub/devicesAndModulesInTargetDeviceScope",
            &[],
            "{}",
        ),
    ] {
        let answer = exchange(router.clone(), &request).await.remove(0);
        assert_eq!((answer.status, answer.body.as_str()), (404, ""));
    }
    // No look at Host, and no need for one.
    for request in [
        "GET /healthz HTTP/1.0\r\n\r\n",
        "GET /healthz HTTP/1.0\r\nHost: x y\r\n\r\n",
    ] {
        assert_eq!(
            exchange(router.clone(), request.as_bytes()).await[0].status,
            200
        );
    }
}
