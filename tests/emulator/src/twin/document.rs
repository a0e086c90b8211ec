//! A twin: tags, desired and reported properties, with versions and metadata.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::TwinError;
use super::check;
use crate::clock::utc_text;
use crate::limits::{TWIN_SECTION_BYTES_MAX, TWIN_TAGS_BYTES_MAX};

/// What IoT Hub says of properties that were never set.
const NEVER: &str = "0001-01-01T00:00:00Z";

const LAST_UPDATED: &str = "$lastUpdated";
const LAST_UPDATED_VERSION: &str = "$lastUpdatedVersion";

/// A JSON object.
pub(crate) type Object = Map<String, Value>;

/// The twin of one device or module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Twin {
    /// Of the whole document: grows with every accepted change.
    version: u64,
    tags: Object,
    desired: Section,
    reported: Section,
}

/// Desired or reported properties.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Section {
    version: u64,
    properties: Object,
    /// The same tree with times instead of values.
    metadata: Object,
}

/// What the service side wants to change. A missing part stays as it is.
#[derive(Debug, Clone, Default)]
pub(crate) struct ServiceChange {
    pub(crate) tags: Option<Object>,
    pub(crate) desired: Option<Object>,
    /// Whether the parts replace what is there, or are merged into it.
    pub(crate) replaces: bool,
}

impl Default for Twin {
    fn default() -> Self {
        let section = Section {
            version: 1,
            properties: Object::new(),
            metadata: Object::from_iter([(LAST_UPDATED.to_owned(), NEVER.into())]),
        };
        Self {
            version: 1,
            tags: Object::new(),
            desired: section.clone(),
            reported: section,
        }
    }
}

impl Twin {
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// The version in the form that IoT Hub gives it: 1 is `AAAAAAAAAAE=`.
    pub(crate) fn etag(&self) -> String {
        STANDARD.encode(self.version.to_be_bytes())
    }

    pub(crate) fn tags(&self) -> &Object {
        &self.tags
    }

    /// What a device gets: properties and `$version`, no metadata.
    pub(crate) fn for_device(&self) -> Value {
        json!({
            "desired": self.desired.with_version(),
            "reported": self.reported.with_version(),
        })
    }

    /// What the service side gets, metadata included.
    pub(crate) fn properties(&self) -> Value {
        json!({
            "desired": self.desired.with_metadata(),
            "reported": self.reported.with_metadata(),
        })
    }

    /// The twin after a device's patch, and the new version of the reported properties.
    ///
    /// # Errors
    /// `wanted` is not the current version, or the patch breaks a limit.
    pub(super) fn report(
        &self,
        patch: &Object,
        wanted: Option<u64>,
        now_ms: u64,
    ) -> Result<(Self, u64), TwinError> {
        if wanted.is_some_and(|wanted| wanted != self.reported.version) {
            return Err(TwinError::Version {
                wanted: wanted.unwrap_or_default(),
                current: self.reported.version,
            });
        }
        check::patch(patch)?;
        let mut next = self.clone();
        next.reported
            .change(patch, false, &Stamp::of_reported(now_ms));
        check::size(
            "reported",
            &next.reported.properties,
            TWIN_SECTION_BYTES_MAX,
        )?;
        next.version += 1;
        let version = next.reported.version;
        Ok((next, version))
    }

    /// The twin after a change of the service side, and what devices are told of it.
    ///
    /// # Errors
    /// The change breaks a limit.
    pub(super) fn serve(
        &self,
        change: &ServiceChange,
        now_ms: u64,
    ) -> Result<(Self, Option<Notice>), TwinError> {
        let mut next = self.clone();
        if let Some(tags) = &change.tags {
            check::patch(tags)?;
            if change.replaces {
                next.tags.clear();
            }
            merge(&mut next.tags, None, tags);
            check::size("tags", &next.tags, TWIN_TAGS_BYTES_MAX)?;
        }
        let mut notice = None;
        if let Some(desired) = &change.desired {
            // Who reads a twin and sends it back sends these along.
            let mut desired = desired.clone();
            desired.retain(|key, _| key != "$metadata" && key != "$version");
            check::patch(&desired)?;
            let stamp = Stamp::of_desired(now_ms, next.desired.version + 1);
            next.desired.change(&desired, change.replaces, &stamp);
            check::size("desired", &next.desired.properties, TWIN_SECTION_BYTES_MAX)?;
            notice = Some(Notice::new(desired, next.desired.version));
        }
        next.version += 1;
        Ok((next, notice))
    }
}

/// What a subscribed device is told of a change of its desired properties.
#[derive(Debug, PartialEq)]
pub(crate) struct Notice {
    pub(crate) version: u64,
    /// The patch with `$version` in it.
    pub(crate) body: String,
}

impl Notice {
    fn new(mut patch: Object, version: u64) -> Self {
        patch.insert("$version".to_owned(), version.into());
        Self {
            version,
            body: Value::Object(patch).to_string(),
        }
    }
}

impl Section {
    fn with_version(&self) -> Object {
        let mut object = self.properties.clone();
        object.insert("$version".to_owned(), self.version.into());
        object
    }

    fn with_metadata(&self) -> Object {
        let mut object = self.with_version();
        object.insert("$metadata".to_owned(), self.metadata.clone().into());
        object
    }

    fn change(&mut self, patch: &Object, replaces: bool, stamp: &Stamp) {
        self.version += 1;
        if replaces {
            self.properties.clear();
            self.metadata.clear();
        }
        merge(
            &mut self.properties,
            Some((&mut self.metadata, stamp)),
            patch,
        );
    }
}

/// What a change leaves in the metadata of everything that it touches.
struct Stamp(Object);

impl Stamp {
    fn of_reported(now_ms: u64) -> Self {
        let time = utc_text(now_ms);
        Self(Object::from_iter([(LAST_UPDATED.to_owned(), time.into())]))
    }

    fn of_desired(now_ms: u64, version: u64) -> Self {
        let mut stamp = Self::of_reported(now_ms);
        stamp
            .0
            .insert(LAST_UPDATED_VERSION.to_owned(), version.into());
        stamp
    }

    fn put(&self, metadata: &mut Object) {
        metadata.extend(self.0.clone());
    }
}

/// Objects are merged, null removes, everything else replaces (spec/upstream.md B6). The caller
/// has checked the patch's depth.
fn merge(properties: &mut Object, mut metadata: Option<(&mut Object, &Stamp)>, patch: &Object) {
    if let Some((metadata, stamp)) = &mut metadata {
        stamp.put(metadata);
    }
    for (name, value) in patch {
        let old = properties.remove(name);
        let old_metadata = metadata
            .as_mut()
            .and_then(|(metadata, _)| metadata.remove(name));
        let stamp = metadata.as_ref().map(|(_, stamp)| *stamp);
        let mut new_metadata = Object::new();
        match value {
            Value::Null => continue,
            Value::Object(patch) => {
                let mut object = Object::new();
                if let Some(Value::Object(old)) = old {
                    object = old;
                    new_metadata = old_metadata.map(into_object).unwrap_or_default();
                }
                let inner = stamp.map(|stamp| (&mut new_metadata, stamp));
                merge(&mut object, inner, patch);
                properties.insert(name.clone(), object.into());
            }
            value => {
                properties.insert(name.clone(), value.clone());
                if let Some(stamp) = stamp {
                    stamp.put(&mut new_metadata);
                }
            }
        }
        if let Some((metadata, _)) = &mut metadata {
            metadata.insert(name.clone(), new_metadata.into());
        }
    }
}

fn into_object(value: Value) -> Object {
    match value {
        Value::Object(object) => object,
        _ => Object::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: u64 = 1_767_225_600_000;
    const NOW: &str = "2026-01-01T00:00:00.000Z";

    fn object(value: Value) -> Object {
        into_object(value)
    }

    fn desired(value: Value, replaces: bool) -> ServiceChange {
        ServiceChange {
            tags: None,
            desired: Some(object(value)),
            replaces,
        }
    }

    #[test]
    fn a_new_twin_has_version_1_and_no_properties() {
        let twin = Twin::default();
        assert_eq!(twin.etag(), "AAAAAAAAAAE=");
        assert_eq!(
            twin.for_device(),
            json!({"desired": {"$version": 1}, "reported": {"$version": 1}})
        );
        assert_eq!(
            twin.properties()["desired"],
            json!({"$version": 1, "$metadata": {"$lastUpdated": NEVER}})
        );
    }

    /// Rows: what there is, the patch, what comes out.
    #[test]
    fn patches_are_merged() {
        for (before, patch, after) in [
            (json!({}), json!({"a": 1}), json!({"a": 1})),
            (json!({"a": 1, "b": 2}), json!({"a": null}), json!({"b": 2})),
            (json!({"b": 2}), json!({"a": null}), json!({"b": 2})),
            (
                json!({"a": {"x": 1, "y": 2}}),
                json!({"a": {"y": 3, "z": {"q": null, "r": 4}}}),
                json!({"a": {"x": 1, "y": 3, "z": {"r": 4}}}),
            ),
            (json!({"a": {"x": 1}}), json!({"a": 5}), json!({"a": 5})),
            (
                json!({"a": 5}),
                json!({"a": {"x": 1}}),
                json!({"a": {"x": 1}}),
            ),
            (
                json!({"a": [1, {"x": 1}]}),
                json!({"a": [{"y": 2}]}),
                json!({"a": [{"y": 2}]}),
            ),
            (
                json!({"a": {"x": 1}}),
                json!({"a": {"x": null}}),
                json!({"a": {}}),
            ),
            (json!({"a": 1}), json!({}), json!({"a": 1})),
        ] {
            let (twin, version) = Twin::default().report(&object(before), None, 0).unwrap();
            assert_eq!((version, twin.version), (2, 2));
            let (twin, version) = twin.report(&object(patch.clone()), Some(2), 0).unwrap();
            assert_eq!((version, twin.version), (3, 3));
            let mut after = after;
            after["$version"] = json!(3);
            assert_eq!(twin.for_device()["reported"], after, "{patch}");
            assert_eq!(twin.for_device()["desired"], json!({"$version": 1}));
        }
    }

    #[test]
    fn metadata_follows_the_properties() {
        let first = desired(json!({"a": {"x": 1, "y": 2}, "b": 1, "c": {"z": 1}}), false);
        let (twin, _) = Twin::default().serve(&first, 0).unwrap();
        let second = desired(json!({"a": {"y": 3}, "b": null, "c": 2}), false);
        let (twin, _) = twin.serve(&second, NOW_MS).unwrap();
        let old = json!({"$lastUpdated": "1970-01-01T00:00:00.000Z", "$lastUpdatedVersion": 2});
        let new = json!({"$lastUpdated": NOW, "$lastUpdatedVersion": 3});
        let mut metadata = new.clone();
        metadata["a"] = new.clone();
        metadata["a"]["x"] = old;
        metadata["a"]["y"] = new.clone();
        metadata["c"] = new;
        assert_eq!(twin.properties()["desired"]["$metadata"], metadata);
        let (twin, _) = twin.report(&object(json!({"r": 1})), None, NOW_MS).unwrap();
        let stamp = json!({"$lastUpdated": NOW});
        let mut metadata = stamp.clone();
        metadata["r"] = stamp;
        assert_eq!(twin.properties()["reported"]["$metadata"], metadata);
    }

    #[test]
    fn the_device_is_told_the_patch_or_the_whole_new_document() {
        let patch = desired(
            json!({"a": 1, "b": null, "$version": 9, "$metadata": {}}),
            false,
        );
        let (twin, notice) = Twin::default().serve(&patch, 0).unwrap();
        let notice = notice.unwrap();
        assert_eq!(notice.version, 2);
        assert_eq!(
            serde_json::from_str::<Value>(&notice.body).unwrap(),
            json!({"a": 1, "b": null, "$version": 2})
        );
        let (twin, notice) = twin.serve(&desired(json!({"c": 1}), true), 0).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&notice.unwrap().body).unwrap(),
            json!({"c": 1, "$version": 3})
        );
        assert_eq!(twin.for_device()["desired"], json!({"c": 1, "$version": 3}));
        let tags = ServiceChange {
            tags: Some(object(json!({"site": "north"}))),
            ..ServiceChange::default()
        };
        let (twin, notice) = twin.serve(&tags, 0).unwrap();
        assert_eq!((notice, twin.version), (None, 4));
        let empty = ServiceChange {
            tags: Some(Object::new()),
            desired: Some(Object::new()),
            replaces: true,
        };
        let (twin, _) = twin.serve(&empty, 0).unwrap();
        assert_eq!(twin.tags, Object::new());
        assert_eq!(twin.for_device()["desired"], json!({"$version": 4}));
    }

    #[test]
    fn sections_have_limits_and_versions_guard() {
        let big = |bytes: usize| {
            let text = "x".repeat(4_000);
            let mut object = Object::new();
            while Value::Object(object.clone()).to_string().len() < bytes {
                object.insert(format!("k{}", object.len()), text.clone().into());
            }
            object
        };
        let refused = Twin::default().report(&big(33_000), None, 0).unwrap_err();
        assert!(matches!(
            refused,
            TwinError::Size {
                section: "reported",
                ..
            }
        ));
        let (twin, _) = Twin::default().report(&big(20_000), None, 0).unwrap();
        let more: Object = big(20_000)
            .into_iter()
            .map(|(key, value)| (format!("more-{key}"), value))
            .collect();
        assert!(
            matches!(twin.report(&more, None, 0), Err(TwinError::Size { .. })),
            "the merged document counts"
        );
        let tags = ServiceChange {
            tags: Some(big(9_000)),
            ..ServiceChange::default()
        };
        let refused = twin.serve(&tags, 0).unwrap_err();
        assert!(matches!(
            refused,
            TwinError::Size {
                section: "tags",
                ..
            }
        ));
        assert!(matches!(
            twin.report(&Object::new(), Some(1), 0),
            Err(TwinError::Version {
                wanted: 1,
                current: 2
            })
        ));
    }
}
