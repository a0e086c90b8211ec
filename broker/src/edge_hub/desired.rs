//! The desired properties of `$edgeHub`: schema versions 1.0 to 1.3 (spec/core.md 3.3).
//!
//! What makes the whole document unusable is a [`DesiredError`], and the configuration in force
//! stays. A route that is wrong only loses itself (design.md D2): it is listed in
//! [`Desired::bad_routes`], and the others count.

use std::fmt;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::routing::{Route, RouteError};

/// Routes of one configuration; a document of 32 KiB holds fewer.
pub const ROUTES_MAX: usize = 2_048;
/// Priority of a route that names none (spec/core.md 3.2).
pub const DEFAULT_PRIORITY: u32 = crate::routing::DEFAULT_PRIORITY;

/// A schema version that this hub understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SchemaVersion {
    /// Always 1.
    pub major: u32,
    /// 0 to 3.
    pub minor: u32,
}

impl fmt::Display for SchemaVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The configuration that a document asks for.
#[derive(Clone, Debug, PartialEq)]
pub struct Desired {
    /// Its schema.
    pub schema: SchemaVersion,
    /// The routes that can be used, in the order of their names.
    pub routes: Vec<RouteSpec>,
    /// The routes that cannot.
    pub bad_routes: Vec<BadRouteSpec>,
    /// How long messages are kept.
    pub store_and_forward: StoreAndForward,
    /// `mqttBroker`, from 1.2 on: kept for later (design.md D15), not interpreted.
    pub mqtt_broker: Option<Value>,
    /// `integrity`, from 1.3 on: kept, not verified.
    pub integrity: Option<Value>,
}

/// One route of the document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteSpec {
    /// Its name.
    pub name: String,
    /// Its text.
    pub text: String,
    /// Its text, parsed.
    pub route: Route,
    /// 0 to 9, or [`DEFAULT_PRIORITY`].
    pub priority: u32,
    /// Its own time to live; none or 0 in the document: the global one.
    pub time_to_live: Option<Duration>,
}

/// A route that cannot be used, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadRouteSpec {
    /// Its name.
    pub name: String,
    /// What is wrong.
    pub fault: RouteSpecFault,
}

impl fmt::Display for BadRouteSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error parsing route {} - {}", self.name, self.fault)
    }
}

/// What is wrong with a route of the document.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RouteSpecFault {
    /// Its text.
    #[error(transparent)]
    Text(#[from] RouteError),
    /// It is neither a text nor an object with one.
    #[error("Malformed route specification")]
    Malformed,
    /// An object, which schema 1.0 does not know.
    #[error("schema version 1.0 takes a route as a text only")]
    ObjectInOldSchema,
    /// Its name is empty.
    #[error("a route needs a name")]
    Unnamed,
    /// Its priority.
    #[error("priority must be 0 to 9")]
    Priority,
    /// Its time to live.
    #[error("timeToLiveSecs must be a whole number of seconds, not negative")]
    TimeToLive,
}

/// `storeAndForwardConfiguration`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreAndForward {
    /// How long a message is kept; none: for ever (a negative number in the document); zero: it is
    /// dropped when its endpoint does not take it at once (design.md D9).
    pub time_to_live: Option<Duration>,
    /// `storeLimits.maxSizeBytes`.
    pub max_size_bytes: Option<u64>,
}

/// Why a document cannot be used as a whole.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DesiredError {
    /// It is not a JSON object.
    #[error("the desired properties are not a JSON object")]
    NotAnObject,
    /// `schemaVersion` is missing or not a text.
    #[error("schemaVersion is missing")]
    NoSchemaVersion,
    /// `schemaVersion` cannot be read.
    #[error("schemaVersion '{0}' is not a version")]
    BadSchemaVersion(String),
    /// `schemaVersion` is not one of 1.0 to 1.3.
    #[error("schemaVersion {0} is not supported: this hub takes 1.0 to 1.3")]
    UnsupportedSchemaVersion(String),
    /// A section that the schema requires is missing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A section is of the wrong kind.
    #[error("{0} is malformed")]
    Malformed(&'static str),
    /// More than [`ROUTES_MAX`] routes.
    #[error("more than {ROUTES_MAX} routes")]
    TooManyRoutes,
}

impl Desired {
    /// Reads a document, `$version` and `$metadata` included or not.
    ///
    /// # Errors
    /// When the document as a whole cannot be used; a wrong route is no error.
    pub fn parse(document: &Value) -> Result<Self, DesiredError> {
        let document = document.as_object().ok_or(DesiredError::NotAnObject)?;
        let schema = schema(document)?;
        let (routes, bad_routes) = routes(document, schema)?;
        let store_and_forward = store_and_forward(document)?;
        let section = |name, since| {
            let present = document.get(name).filter(|value| !value.is_null());
            present.filter(|_| schema.minor >= since).cloned()
        };
        Ok(Self {
            schema,
            routes,
            bad_routes,
            store_and_forward,
            mqtt_broker: section("mqttBroker", 2),
            integrity: section("integrity", 3),
        })
    }
}

/// `1.0`, `1.1.3`, …: two to four numbers, as .NET's `Version` has it.
fn schema(document: &Map<String, Value>) -> Result<SchemaVersion, DesiredError> {
    let text = document
        .get("schemaVersion")
        .and_then(Value::as_str)
        .filter(|text| !text.trim().is_empty())
        .ok_or(DesiredError::NoSchemaVersion)?;
    let numbers: Option<Vec<u32>> = text
        .trim()
        .split('.')
        .map(|part| part.parse().ok())
        .collect();
    match numbers.as_deref() {
        Some([1, minor @ 0..=3, rest @ ..]) if rest.len() <= 2 => Ok(SchemaVersion {
            major: 1,
            minor: *minor,
        }),
        Some([_, _, rest @ ..]) if rest.len() <= 2 => {
            Err(DesiredError::UnsupportedSchemaVersion(text.to_owned()))
        }
        _ => Err(DesiredError::BadSchemaVersion(text.to_owned())),
    }
}

type Routes = (Vec<RouteSpec>, Vec<BadRouteSpec>);

fn routes(document: &Map<String, Value>, schema: SchemaVersion) -> Result<Routes, DesiredError> {
    let routes = match document.get("routes") {
        None | Some(Value::Null) if schema.minor == 0 => return Ok(Routes::default()),
        None | Some(Value::Null) => return Err(DesiredError::Missing("routes")),
        Some(routes) => routes
            .as_object()
            .ok_or(DesiredError::Malformed("routes"))?,
    };
    if routes.len() > ROUTES_MAX {
        return Err(DesiredError::TooManyRoutes);
    }
    let (mut good, mut bad) = Routes::default();
    for (name, value) in routes {
        // A removed route may still stand there as null, a blank text asks for nothing.
        if value.is_null() || value.as_str().is_some_and(|text| text.trim().is_empty()) {
            continue;
        }
        match route(name, value, schema) {
            Ok(spec) => good.push(spec),
            Err(fault) => bad.push(BadRouteSpec {
                name: name.clone(),
                fault,
            }),
        }
    }
    Ok((good, bad))
}

fn route(name: &str, value: &Value, schema: SchemaVersion) -> Result<RouteSpec, RouteSpecFault> {
    if name.trim().is_empty() {
        return Err(RouteSpecFault::Unnamed);
    }
    let (text, priority, time_to_live) = match value {
        Value::String(text) => (text.as_str(), DEFAULT_PRIORITY, None),
        Value::Object(_) if schema.minor == 0 => return Err(RouteSpecFault::ObjectInOldSchema),
        Value::Object(object) => {
            let text = object
                .get("route")
                .and_then(Value::as_str)
                .filter(|text| !text.trim().is_empty())
                .ok_or(RouteSpecFault::Malformed)?;
            (text, priority(object)?, route_time_to_live(object)?)
        }
        _ => return Err(RouteSpecFault::Malformed),
    };
    Ok(RouteSpec {
        name: name.to_owned(),
        text: text.to_owned(),
        route: Route::parse(text)?,
        priority,
        time_to_live,
    })
}

fn priority(route: &Map<String, Value>) -> Result<u32, RouteSpecFault> {
    match route.get("priority") {
        None | Some(Value::Null) => Ok(DEFAULT_PRIORITY),
        Some(value) => value
            .as_u64()
            .and_then(|number| u32::try_from(number).ok())
            .filter(|number| *number <= 9 || *number == DEFAULT_PRIORITY)
            .ok_or(RouteSpecFault::Priority),
    }
}

fn route_time_to_live(route: &Map<String, Value>) -> Result<Option<Duration>, RouteSpecFault> {
    match route.get("timeToLiveSecs") {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let seconds = value
                .as_u64()
                .and_then(|seconds| u32::try_from(seconds).ok())
                .ok_or(RouteSpecFault::TimeToLive)?;
            Ok((seconds > 0).then(|| Duration::from_secs(seconds.into())))
        }
    }
}

fn store_and_forward(document: &Map<String, Value>) -> Result<StoreAndForward, DesiredError> {
    const SECTION: &str = "storeAndForwardConfiguration";
    const TIME_TO_LIVE: &str = "storeAndForwardConfiguration.timeToLiveSecs";
    const LIMITS: &str = "storeAndForwardConfiguration.storeLimits";
    let section = match document.get(SECTION) {
        None | Some(Value::Null) => return Err(DesiredError::Missing(SECTION)),
        Some(section) => section
            .as_object()
            .ok_or(DesiredError::Malformed(SECTION))?,
    };
    let seconds = section
        .get("timeToLiveSecs")
        .and_then(Value::as_i64)
        .ok_or(DesiredError::Malformed(TIME_TO_LIVE))?;
    let max_size_bytes = match section.get("storeLimits") {
        None | Some(Value::Null) => None,
        Some(limits) => Some(
            limits
                .get("maxSizeBytes")
                .and_then(Value::as_u64)
                .ok_or(DesiredError::Malformed(LIMITS))?,
        ),
    };
    Ok(StoreAndForward {
        // Negative: for ever.
        time_to_live: u64::try_from(seconds).ok().map(Duration::from_secs),
        max_size_bytes,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn document(schema: &str, routes: &Value) -> Value {
        json!({
            "schemaVersion": schema,
            "routes": routes,
            "storeAndForwardConfiguration": { "timeToLiveSecs": 7200 },
            "$version": 4,
        })
    }

    fn fault(schema: &str, route: &Value) -> String {
        let desired = Desired::parse(&document(schema, &json!({ "r": route }))).unwrap();
        assert!(desired.routes.is_empty(), "{route}");
        desired.bad_routes.first().unwrap().to_string()
    }

    #[test]
    fn the_example_of_the_contract_is_read_whole() {
        let desired = Desired::parse(&json!({
            "schemaVersion": "1.1",
            "routes": {
                "simple": "FROM /messages/* INTO $upstream",
                "urgent": {
                    "route": "FROM /messages/modules/a/* INTO BrokeredEndpoint(\"/modules/b/inputs/in1\")",
                    "priority": 0, "timeToLiveSecs": 86400 } },
            "storeAndForwardConfiguration": {
                "timeToLiveSecs": 7200, "storeLimits": { "maxSizeBytes": 50_000_000 } } }))
        .unwrap();
        assert_eq!(desired.schema, SchemaVersion { major: 1, minor: 1 });
        assert_eq!(desired.bad_routes, []);
        let routes: Vec<_> = desired
            .routes
            .iter()
            .map(|route| (route.name.as_str(), route.priority, route.time_to_live))
            .collect();
        let day = Some(Duration::from_secs(86_400));
        assert_eq!(
            routes,
            [("simple", DEFAULT_PRIORITY, None), ("urgent", 0, day)]
        );
        let expected = StoreAndForward {
            time_to_live: Some(Duration::from_secs(7200)),
            max_size_bytes: Some(50_000_000),
        };
        assert_eq!(desired.store_and_forward, expected);
    }

    #[test]
    fn schema_versions_1_0_to_1_3_are_taken_and_no_others() {
        let error = |schema: Value| {
            let mut document = document("1.0", &json!({}));
            *document.get_mut("schemaVersion").unwrap() = schema;
            Desired::parse(&document).err()
        };
        for good in ["1.0", "1.1", "1.2", "1.3", "1.0.0", "1.1.2.3"] {
            assert_eq!(error(json!(good)), None, "{good}");
        }
        for unsupported in ["1.4", "2.0", "0.9"] {
            let expected = DesiredError::UnsupportedSchemaVersion(unsupported.to_owned());
            assert_eq!(error(json!(unsupported)), Some(expected));
        }
        for bad in ["1", "one", "1.x", "1.0.0.0.0", "-1.0"] {
            let expected = DesiredError::BadSchemaVersion(bad.to_owned());
            assert_eq!(error(json!(bad)), Some(expected));
        }
        for none in [json!(""), json!(1.0), Value::Null] {
            assert_eq!(error(none), Some(DesiredError::NoSchemaVersion));
        }
    }

    #[test]
    fn sections_that_a_schema_requires_must_be_there() {
        let without = |schema: &str, section: &str| {
            let mut document = document(schema, &json!({}));
            document.as_object_mut().unwrap().remove(section);
            Desired::parse(&document).err()
        };
        assert_eq!(without("1.0", "routes"), None);
        for schema in ["1.1", "1.2", "1.3"] {
            let expected = Some(DesiredError::Missing("routes"));
            assert_eq!(without(schema, "routes"), expected);
        }
        for schema in ["1.0", "1.3"] {
            let section = "storeAndForwardConfiguration";
            let expected = Some(DesiredError::Missing(section));
            assert_eq!(without(schema, section), expected);
        }
        assert_eq!(
            Desired::parse(&json!([])).err(),
            Some(DesiredError::NotAnObject)
        );
        assert_eq!(
            Desired::parse(&document("1.1", &json!([1]))).err(),
            Some(DesiredError::Malformed("routes"))
        );
    }

    #[test]
    fn one_wrong_route_leaves_the_others() {
        let routes = json!({
            "good": "FROM /* INTO $upstream",
            "gone": null,
            "blank": " ",
            "bad": "FROM /* INTO nowhere",
        });
        let desired = Desired::parse(&document("1.0", &routes)).unwrap();
        let names: Vec<_> = desired.routes.iter().map(|r| r.name.as_str()).collect();
        assert_eq!(names, ["good"]);
        let bad: Vec<_> = desired.bad_routes.iter().map(ToString::to_string).collect();
        assert_eq!(bad.len(), 1, "{bad:?}");
        assert!(
            bad.iter()
                .all(|text| text.starts_with("Error parsing route bad - ")
                    && text.contains("(column ")),
            "{bad:?}"
        );
    }

    #[test]
    fn faults_of_a_route_are_named() {
        let route = "FROM /* INTO $upstream";
        let object = |key: &str, value: Value| json!({ "route": route, key: value });
        assert!(fault("1.0", &json!({ "route": route })).ends_with("as a text only"));
        for malformed in [json!(5), json!([route]), json!({}), json!({ "route": 1 })] {
            assert!(fault("1.1", &malformed).ends_with("Malformed route specification"));
        }
        for priority in [json!(10), json!(-1), json!(1.5), json!("1")] {
            assert!(fault("1.1", &object("priority", priority)).contains("0 to 9"));
        }
        for ttl in [json!(-1), json!(4_294_967_296_u64), json!("1")] {
            assert!(fault("1.1", &object("timeToLiveSecs", ttl)).contains("timeToLiveSecs"));
        }
        let unnamed = json!({ "": route });
        let desired = Desired::parse(&document("1.1", &unnamed)).unwrap();
        assert_eq!(
            desired.bad_routes.first().map(|bad| &bad.fault),
            Some(&RouteSpecFault::Unnamed)
        );
    }

    #[test]
    fn a_negative_time_to_live_is_for_ever_and_zero_is_zero() {
        let ttl = |seconds: i64| {
            let mut document = document("1.0", &json!({}));
            *document
                .pointer_mut("/storeAndForwardConfiguration/timeToLiveSecs")
                .unwrap() = json!(seconds);
            Desired::parse(&document)
                .unwrap()
                .store_and_forward
                .time_to_live
        };
        assert_eq!(ttl(-1), None);
        assert_eq!(ttl(0), Some(Duration::ZERO));
        assert_eq!(ttl(7), Some(Duration::from_secs(7)));
    }

    #[test]
    fn later_sections_are_kept_from_their_schema_on() {
        let with = |schema: &str| {
            let mut document = document(schema, &json!({}));
            let object = document.as_object_mut().unwrap();
            object.insert("mqttBroker".into(), json!({ "bridges": [] }));
            object.insert("integrity".into(), json!({ "header": {} }));
            let desired = Desired::parse(&document).unwrap();
            (desired.mqtt_broker.is_some(), desired.integrity.is_some())
        };
        assert_eq!(with("1.1"), (false, false));
        assert_eq!(with("1.2"), (true, false));
        assert_eq!(with("1.3"), (true, true));
    }
}
