//! The own twin is fetched again without anybody's notice.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use edgehub_proto::hub::{BoxFuture, ClientInfo, Connectivity, Needs, Upstream, UpstreamError};
use edgehub_proto::identity::Identity;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::service::{ConfigSource, EdgeHub, EdgeHubParts};
use crate::hub::{ServiceConfig, ServiceParts};
use crate::methods::NoMethods;
use crate::test_support::TestHub;
use crate::twin::TwinConfig;

/// An upstream whose twins have another version at each fetch, and which gives no notice of it.
#[derive(Debug)]
struct Silent {
    connectivity: watch::Sender<Connectivity>,
    fetched: AtomicU64,
}

impl Upstream for Silent {
    fn describe(&self, _: &Identity, _: &ClientInfo) {}

    fn need(&self, _: &Identity, _: Needs) {}

    fn twin(&self, _: &Identity) -> BoxFuture<Result<Bytes, UpstreamError>> {
        let version = 1 + self.fetched.fetch_add(1, Ordering::Relaxed);
        let twin = format!(r#"{{"desired":{{"$version":{version}}},"reported":{{"$version":1}}}}"#);
        Box::pin(std::future::ready(Ok(twin.into())))
    }

    fn report(&self, _: &Identity, _: Bytes) -> BoxFuture<Result<Option<u64>, UpstreamError>> {
        Box::pin(std::future::ready(Ok(Some(2))))
    }

    fn connectivity(&self) -> watch::Receiver<Connectivity> {
        self.connectivity.subscribe()
    }
}

#[tokio::test]
async fn the_own_twin_is_fetched_now_and_then() {
    let test = TestHub::new();
    let upstream = Arc::new(Silent {
        connectivity: watch::Sender::new(Connectivity::Connected),
        fetched: AtomicU64::new(0),
    });
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let services = test
        .hub
        .start_services(ServiceParts {
            upstream: Arc::clone(&upstream) as _,
            own_methods: Arc::new(NoMethods),
            config: ServiceConfig {
                twins: TwinConfig::default(),
                window: 16,
                own_twin: true,
            },
            tasks: tasks.clone(),
            stop: stop.clone(),
        })
        .unwrap();
    let edge_hub = EdgeHub::new(EdgeHubParts {
        hub: Arc::clone(&test.hub),
        twins: Arc::clone(&services.twins),
        store: test.hub.store().clone(),
        source: ConfigSource::Twin,
        refresh: Duration::from_millis(5),
        version: "1",
    });
    tasks.spawn(edge_hub.run(stop.clone()));
    let mut desired = services.twins.own_desired();
    let fetched_thrice = async {
        while desired
            .borrow_and_update()
            .as_ref()
            .map_or(0, |d| d.version)
            < 3
        {
            desired.changed().await.unwrap();
        }
    };
    let outcome = tokio::time::timeout(Duration::from_secs(30), fetched_thrice).await;
    assert!(outcome.is_ok(), "three fetches without a notice");
    stop.cancel();
    tasks.close();
    tasks.wait().await;
}
