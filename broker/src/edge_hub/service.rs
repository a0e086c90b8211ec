//! Applies the desired properties of `$edgeHub` and reports what became of them, and who is
//! connected.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_storage::{Store, StoreError};
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::clients::Presence;
use super::desired::Desired;
use crate::hub::Hub;
use crate::routing::Router;
use crate::twin::{DesiredDocument, TwinService};

/// Between two reports, so that a storm of reconnects is a few patches.
const REPORT_PAUSE: Duration = Duration::from_secs(1);
/// After a report that was not taken.
const REPORT_RETRY: Duration = Duration::from_secs(10);
/// Length of a reported description: a twin's value holds 4,096 bytes.
const DESCRIPTION_BYTES_MAX: usize = 4_000;

/// Where the routes come from (`configSource`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ConfigSource {
    /// The settings: `routes__*`. The twin's desired properties are not looked at.
    Local,
    /// The desired properties of `$edgeHub`'s twin.
    #[default]
    Twin,
}

/// Whether a usable configuration is in force; until then the heads stay shut (design.md D13).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Configured {
    /// Not yet, and why.
    Waiting(String),
    /// Yes.
    Done,
}

/// Parts an [`EdgeHub`] is made of.
#[derive(Debug)]
pub struct EdgeHubParts {
    /// Whose routes are replaced.
    pub hub: Arc<Hub>,
    /// Where the own twin is.
    pub twins: Arc<TwinService>,
    /// Where the queues of routes are.
    pub store: Store,
    /// Where the routes come from.
    pub source: ConfigSource,
    /// Between two fetches of the own twin, beside those at each connect: a change whose notice was
    /// lost counts then (spec/core.md 8). Only with [`ConfigSource::Twin`].
    pub refresh: Duration,
    /// What is told as `version`.
    pub version: &'static str,
}

/// The hub's own twin at work. One per hub.
#[derive(Debug)]
pub struct EdgeHub {
    parts: EdgeHubParts,
    configured: watch::Sender<Configured>,
}

impl EdgeHub {
    /// Puts the parts together; [`EdgeHub::run`] does the work.
    #[must_use]
    pub fn new(parts: EdgeHubParts) -> Arc<Self> {
        let configured = match parts.source {
            ConfigSource::Local => Configured::Done,
            ConfigSource::Twin => {
                Configured::Waiting("the desired properties of $edgeHub are not known yet".into())
            }
        };
        Arc::new(Self {
            parts,
            configured: watch::Sender::new(configured),
        })
    }

    /// Whether a usable configuration is in force.
    #[must_use]
    pub fn configured(&self) -> watch::Receiver<Configured> {
        self.configured.subscribe()
    }

    /// Applies and reports until `stop`.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.work() => {}
            () = self.refresh() => {}
        }
    }

    async fn refresh(&self) {
        if self.parts.source != ConfigSource::Twin {
            std::future::pending::<()>().await;
        }
        loop {
            tokio::time::sleep(self.parts.refresh).await;
            // What it brings comes as every change; without upstream it is the copy.
            let own = self.parts.hub.own_identity();
            let reply = self.parts.twins.get(own).await;
            tracing::debug!("$edgeHub's twin was fetched: status {}", reply.status);
        }
    }

    fn presence(&self) -> &Presence {
        self.parts.hub.presence()
    }

    async fn work(&self) {
        let mut desired = self.parts.twins.own_desired();
        let mut handled = Handled::default();
        let mut outcome: Option<Value> = None;
        loop {
            let document = desired.borrow_and_update().clone();
            let mut is_again = false;
            if let Some(document) = document
                && self.parts.source == ConfigSource::Twin
                && handled.is_news(&document)
            {
                let (status, is_over) = self.apply(&document).await;
                outcome = Some(status);
                is_again = !is_over;
                handled.note(document, is_over);
            }
            let wait = match self.report(&mut outcome).await {
                Ok(()) if !is_again => REPORT_PAUSE,
                Ok(()) | Err(()) => REPORT_RETRY,
            };
            let is_due = is_again || outcome.is_some() || self.presence().is_due();
            let paused = tokio::time::sleep(wait);
            tokio::select! {
                changed = desired.changed() => {
                    // The service ends with the process.
                    if changed.is_err() {
                        return;
                    }
                }
                () = async {
                    if !is_due {
                        self.presence().changed().await;
                    }
                    paused.await;
                } => {}
            }
        }
    }

    /// Puts a document into force; gives what is to be reported about it, and whether that is the
    /// last word: a store that fails now may take it later.
    async fn apply(&self, document: &DesiredDocument) -> (Value, bool) {
        let mut is_over = true;
        let status = match self.routes_of(document) {
            Ok((desired, problems)) => match self.put_into_force(desired).await {
                Ok(()) => {
                    self.configured.send_replace(Configured::Done);
                    problems
                }
                Err(error) => {
                    tracing::error!("The routes of $edgeHub cannot be applied: {error}");
                    is_over = false;
                    Some(format!("Error while applying desired properties - {error}"))
                }
            },
            Err(text) => {
                tracing::error!("{text}");
                self.configured
                    .send_if_modified(|configured| match configured {
                        Configured::Waiting(reason) => {
                            reason.clone_from(&text);
                            true
                        }
                        Configured::Done => false,
                    });
                Some(text)
            }
        };
        let (code, description) = match status {
            None => (200, String::new()),
            Some(text) => (400, shortened(text)),
        };
        let report = json!({
            "lastDesiredVersion": document.version,
            "lastDesiredStatus": { "code": code, "description": description },
        });
        (report, is_over)
    }

    /// The document's configuration, and what is wrong with single routes of it.
    fn routes_of(&self, document: &DesiredDocument) -> Result<(Desired, Option<String>), String> {
        let failed = |text: String| format!("Error while parsing desired properties - {text}");
        let json: Value =
            serde_json::from_slice(&document.json).map_err(|error| failed(error.to_string()))?;
        let desired = Desired::parse(&json).map_err(|error| failed(error.to_string()))?;
        let problems: Vec<String> = desired.bad_routes.iter().map(ToString::to_string).collect();
        for problem in &problems {
            tracing::error!("{problem}");
        }
        let problems = (!problems.is_empty()).then(|| failed(problems.join("; ")));
        Ok((desired, problems))
    }

    async fn put_into_force(&self, desired: Desired) -> Result<(), StoreError> {
        let count = desired.routes.len();
        let names: Vec<(String, String)> = desired
            .routes
            .iter()
            .map(|route| (route.name.clone(), route.text.clone()))
            .collect();
        let store = self.parts.store.clone();
        let own_device = self.parts.hub.own_identity().device_id().to_owned();
        let time_to_live = desired.store_and_forward.time_to_live;
        // A new queue is a commit that is waited for.
        let router = tokio::task::spawn_blocking(move || {
            let routes = desired.routes.into_iter().map(|route| route.route);
            Router::from_routes(routes, &own_device, time_to_live, &store)
        });
        let router = router.await.map_err(|_| StoreError::Closed)??;
        self.parts.hub.set_router(router);
        tracing::info!("Set the following {count} route(s) in edge hub");
        for (name, text) in names {
            tracing::info!("{name}: {text}");
        }
        Ok(())
    }

    /// Reports an outcome and the clients that changed, in one patch.
    async fn report(&self, outcome: &mut Option<Value>) -> Result<(), ()> {
        let clients = self.presence().take();
        if outcome.is_none() && clients.is_none() {
            return Ok(());
        }
        let mut patch: Map<String, Value> = Map::new();
        patch.insert("schemaVersion".to_owned(), json!("1.0"));
        let version = json!({ "version": self.parts.version, "build": "", "commit": "" });
        patch.insert("version".to_owned(), version);
        if let Some(Value::Object(outcome)) = outcome.as_ref() {
            patch.extend(outcome.clone());
        }
        if let Some(clients) = &clients {
            patch.insert("clients".to_owned(), clients.clone());
        }
        let bytes = Bytes::from(Value::Object(patch).to_string());
        match self.parts.twins.report_own(bytes).await {
            Ok(()) => {
                *outcome = None;
                Ok(())
            }
            Err(error) => {
                tracing::warn!("$edgeHub's reported properties were not taken: {error}");
                if let Some(clients) = clients {
                    self.presence().put_back(clients);
                }
                Err(())
            }
        }
    }
}

/// Which document was dealt with.
#[derive(Debug, Default)]
struct Handled(Option<DesiredDocument>);

impl Handled {
    /// Whether it is to be applied. Of a twin that was made anew the version alone says nothing.
    fn is_news(&self, document: &DesiredDocument) -> bool {
        self.0.as_ref() != Some(document)
    }

    /// It was applied. What is not over stays news.
    fn note(&mut self, document: DesiredDocument, is_over: bool) {
        self.0 = is_over.then_some(document);
    }
}

fn shortened(mut text: String) -> String {
    if text.len() > DESCRIPTION_BYTES_MAX {
        let end = (0..=DESCRIPTION_BYTES_MAX)
            .rev()
            .find(|end| text.is_char_boundary(*end))
            .unwrap_or_default();
        text.truncate(end);
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(version: u64, json: &'static str) -> DesiredDocument {
        DesiredDocument {
            version,
            json: Bytes::from_static(json.as_bytes()),
        }
    }

    #[test]
    fn what_the_store_did_not_take_and_what_differs_is_applied_again() {
        let mut handled = Handled::default();
        assert!(handled.is_news(&document(1, "{}")));
        handled.note(document(1, "{}"), false);
        assert!(handled.is_news(&document(1, "{}")), "the store failed");
        handled.note(document(1, "{}"), true);
        assert!(!handled.is_news(&document(1, "{}")));
        assert!(handled.is_news(&document(1, r#"{"a":1}"#)), "made anew");
        assert!(handled.is_news(&document(2, "{}")));
    }
}
