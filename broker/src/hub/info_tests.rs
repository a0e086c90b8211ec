//! What clients say about themselves on its way: to the upstream, into their messages, and away
//! again.

use edgehub_auth::scope_cache::ScopeChange;
use edgehub_proto::hub::{BoxFuture, Needs, Upstream, UpstreamError};
use edgehub_proto::message::SystemProperty;
use edgehub_proto::stored;
use edgehub_proto::topic::parse_publish;
use tokio::sync::watch;

use super::*;
use crate::methods::NoMethods;
use crate::test_support::*;
use crate::twin::TwinConfig;

const MODEL: &str = "dtmi:test:leaf;1";

/// An upstream that notes what it is told about clients.
#[derive(Debug, Default)]
struct Told {
    told: Mutex<Vec<(Identity, ClientInfo)>>,
}

impl Told {
    fn take(&self) -> Vec<(Identity, ClientInfo)> {
        std::mem::take(&mut *self.told.lock())
    }
}

fn away<T: Send + 'static>() -> BoxFuture<Result<T, UpstreamError>> {
    let error = UpstreamError::Unavailable("away".to_owned());
    Box::pin(std::future::ready(Err(error)))
}

impl Upstream for Told {
    fn describe(&self, identity: &Identity, info: &ClientInfo) {
        self.told.lock().push((identity.clone(), info.clone()));
    }

    fn need(&self, _: &Identity, _: Needs) {}

    fn twin(&self, _: &Identity) -> BoxFuture<Result<Bytes, UpstreamError>> {
        away()
    }

    fn report(&self, _: &Identity, _: Bytes) -> BoxFuture<Result<Option<u64>, UpstreamError>> {
        away()
    }

    fn connectivity(&self) -> watch::Receiver<edgehub_proto::hub::Connectivity> {
        watch::channel(edgehub_proto::hub::Connectivity::Disconnected).1
    }
}

fn info(product: &str, model: Option<&str>) -> ClientInfo {
    ClientInfo {
        product_info: Some(product.into()),
        model_id: model.map(Arc::from),
    }
}

async fn connect(test: &TestHub, identity: &str, info: Option<ClientInfo>) -> Connected {
    let options = ConnectOptions {
        info,
        clean_session: true,
    };
    test.hub.connect(claim(identity), options).await.unwrap()
}

/// Sends an empty message and gives the model that is stored with it.
async fn stored_model(test: &TestHub, identity: &str) -> Option<String> {
    let mut ingest = Ingest::new(Arc::clone(&test.hub), id(identity));
    let topic = format!("devices/{identity}/messages/events/");
    let telemetry = Telemetry {
        sequence: 1,
        duplicate: false,
        retain: false,
        topic: parse_publish(&topic),
        body: Bytes::new(),
    };
    assert_eq!(ingest.take(telemetry, 0), Outcome::Gathered);
    let mut batch = ingest.take_batch().unwrap();
    let message = batch.appends.remove(0).message;
    let message = stored::decode_message(message).unwrap();
    let model = message.system.get(SystemProperty::ModelId);
    model.map(str::to_owned)
}

#[tokio::test]
async fn what_a_client_says_goes_upstream_and_its_model_into_its_messages() {
    let test = TestHub::new();
    let upstream = Arc::new(Told::default());
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let parts = ServiceParts {
        upstream: Arc::clone(&upstream) as _,
        own_methods: Arc::new(NoMethods),
        config: ServiceConfig {
            twins: TwinConfig::default(),
            window: 16,
            own_twin: false,
        },
        tasks: tasks.clone(),
        stop: stop.clone(),
    };
    test.hub.start_services(parts).unwrap();
    let said = info("sensor/3", Some(MODEL));
    connect(&test, "leaf0", Some(said.clone())).await;
    assert_eq!(upstream.take(), [(id("leaf0"), said.clone())]);
    // The same again, or nothing: no news.
    connect(&test, "leaf0", Some(said)).await;
    connect(&test, "leaf0", None).await;
    connect(&test, "leaf1", None).await;
    assert_eq!(upstream.take(), []);
    assert_eq!(stored_model(&test, "leaf0").await.as_deref(), Some(MODEL));
    assert_eq!(stored_model(&test, "leaf1").await, None);

    // Without a model it has none any more.
    let plain = info("sensor/4", None);
    connect(&test, "leaf0", Some(plain.clone())).await;
    assert_eq!(upstream.take(), [(id("leaf0"), plain)]);
    assert_eq!(stored_model(&test, "leaf0").await, None);

    // Who leaves the scope is forgotten upstream too.
    test.scope.apply(ScopeChange::Remove(vec![id("leaf0")]));
    test.hub.forget_strangers().await;
    assert_eq!(upstream.take(), [(id("leaf0"), ClientInfo::default())]);
    stop.cancel();
    tasks.close();
    tasks.wait().await;
}
