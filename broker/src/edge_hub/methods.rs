//! The methods of `$edgeHub` itself (spec/operations.md: only `RefreshDeviceScopeIdentityCache`).

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use edgehub_auth::authenticator::{IdentityRefresh, RefreshOutcome};
use edgehub_proto::hub::{BoxFuture, MethodResult};
use edgehub_proto::identity::Identity;
use serde::Deserialize;

use crate::methods::{OwnMethods, error_body};

/// Identities that one call may name: more are refused, so that a call ends within its time.
pub const REFRESHED_MAX: usize = 100;

/// Answers calls of the hub's own methods.
pub struct EdgeHubMethods {
    own_device: String,
    refresh: Arc<dyn IdentityRefresh>,
}

impl fmt::Debug for EdgeHubMethods {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EdgeHubMethods")
            .field("own_device", &self.own_device)
            .finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Request {
    #[serde(rename = "deviceIds")]
    device_ids: Vec<String>,
}

impl EdgeHubMethods {
    /// `refresh` fetches identities in the name of `own_device`.
    #[must_use]
    pub fn new(own_device: &str, refresh: Arc<dyn IdentityRefresh>) -> Self {
        Self {
            own_device: own_device.to_owned(),
            refresh,
        }
    }

    fn refresh_identities(&self, payload: &[u8]) -> BoxFuture<MethodResult> {
        let identities = match identities(payload) {
            Ok(identities) => identities,
            Err(text) => return answered(400, error_body(&text)),
        };
        let refresh = Arc::clone(&self.refresh);
        let own_device = self.own_device.clone();
        Box::pin(async move {
            for identity in identities {
                match refresh.refresh(&identity, &own_device).await {
                    // Limited: it was asked about a moment ago.
                    RefreshOutcome::Limited
                    | RefreshOutcome::NotFound
                    | RefreshOutcome::Refreshed => {}
                    outcome => {
                        tracing::warn!("{identity} could not be refreshed: {outcome:?}");
                        let text = format!("{identity} could not be refreshed");
                        return result(500, error_body(&text));
                    }
                }
            }
            result(200, Bytes::from_static(b"null"))
        })
    }
}

impl OwnMethods for EdgeHubMethods {
    fn call(&self, name: &str, payload: Bytes) -> BoxFuture<MethodResult> {
        if name.eq_ignore_ascii_case("RefreshDeviceScopeIdentityCache") {
            self.refresh_identities(&payload)
        } else {
            let text = format!("Method {name} is not supported");
            answered(404, error_body(&text))
        }
    }
}

fn identities(payload: &[u8]) -> Result<Vec<Identity>, String> {
    let request: Request =
        serde_json::from_slice(payload).map_err(|error| format!("Invalid payload: {error}"))?;
    if request.device_ids.len() > REFRESHED_MAX {
        return Err(format!("No more than {REFRESHED_MAX} ids at once"));
    }
    let parse = |id: &String| Identity::parse(id).map_err(|error| error.to_string());
    request.device_ids.iter().map(parse).collect()
}

fn result(status: i32, payload: Bytes) -> MethodResult {
    MethodResult { status, payload }
}

fn answered(status: i32, payload: Bytes) -> BoxFuture<MethodResult> {
    Box::pin(std::future::ready(result(status, payload)))
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use parking_lot::Mutex;

    use super::*;

    #[derive(Default)]
    struct Refreshed(Mutex<Vec<String>>);

    impl IdentityRefresh for Refreshed {
        fn refresh<'a>(
            &'a self,
            target: &'a Identity,
            on_behalf_of: &'a str,
        ) -> Pin<Box<dyn Future<Output = RefreshOutcome> + Send + 'a>> {
            self.0.lock().push(format!("{target} by {on_behalf_of}"));
            let outcome = match target.as_str() {
                "down" => RefreshOutcome::Unavailable,
                "gone" => RefreshOutcome::NotFound,
                _ => RefreshOutcome::Refreshed,
            };
            Box::pin(std::future::ready(outcome))
        }
    }

    async fn call(name: &str, payload: &'static str) -> (i32, Vec<String>) {
        let refreshed = Arc::new(Refreshed::default());
        let methods = EdgeHubMethods::new("edge1", Arc::clone(&refreshed) as _);
        let answer = methods.call(name, payload.into()).await;
        let asked = refreshed.0.lock().clone();
        (answer.status, asked)
    }

    #[tokio::test]
    async fn the_named_identities_are_refreshed() {
        let name = "refreshdevicescopeidentitycache";
        let asked = call(name, r#"{"deviceIds":["leaf1","edge2/modA","gone"]}"#).await;
        let expected = ["leaf1 by edge1", "edge2/modA by edge1", "gone by edge1"];
        assert_eq!(asked, (200, expected.map(str::to_owned).to_vec()));
    }

    #[tokio::test]
    async fn what_cannot_be_done_is_said() {
        let name = "RefreshDeviceScopeIdentityCache";
        for payload in [
            "",
            "[]",
            r#"{"deviceIds":"leaf1"}"#,
            r#"{"deviceIds":["#,
            r#"{"deviceIds":["a/b/c"]}"#,
        ] {
            assert_eq!(call(name, payload).await, (400, Vec::new()), "{payload}");
        }
        assert_eq!(call(name, r#"{"deviceIds":["down"]}"#).await.0, 500);
        assert_eq!(call("Restart", r#"{"deviceIds":[]}"#).await.0, 404);
    }
}
