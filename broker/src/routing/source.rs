//! Source paths of messages, and the `FROM` of a route that is matched against them.

use edgehub_proto::identity::Identity;

/// The path a message comes from (spec/core.md 2.2), always with a trailing slash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourcePath(String);

impl SourcePath {
    /// The path of telemetry. The sender's device is not part of it: a module on a downstream
    /// device matches like one of our own.
    #[must_use]
    pub fn telemetry(sender: &Identity, output: Option<&str>) -> Self {
        Self(match (sender.module_id(), output) {
            (None, _) => "/messages/".to_owned(),
            (Some(module), None) => format!("/messages/modules/{module}/"),
            (Some(module), Some(output)) => {
                format!("/messages/modules/{module}/outputs/{output}/")
            }
        })
    }

    /// The path of the message that tells of a twin's change.
    #[must_use]
    pub fn twin_change() -> Self {
        Self("/twinChangeNotifications/".to_owned())
    }
}

/// A route's `FROM`, reduced to the prefix that is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourcePattern(String);

impl SourcePattern {
    /// Strips trailing `*`s, then trailing `/`s, then appends one `/` (spec/core.md 2.2).
    #[must_use]
    pub(super) fn new(text: &str) -> Self {
        let bare = text.trim().trim_end_matches('*').trim_end_matches('/');
        Self(format!("{bare}/").to_ascii_lowercase())
    }

    /// Whether a message from `path` matches: prefix, ordinal, any case.
    #[must_use]
    pub fn matches(&self, path: &SourcePath) -> bool {
        path.0
            .as_bytes()
            .get(..self.0.len())
            .is_some_and(|head| head.eq_ignore_ascii_case(self.0.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_match_whole_segments_only() {
        let leaf = SourcePath::telemetry(&Identity::parse("leaf1").unwrap(), None);
        let a = SourcePath::telemetry(&Identity::parse("e/A").unwrap(), None);
        let ab = SourcePath::telemetry(&Identity::parse("e/AB").unwrap(), None);
        let a_out = SourcePath::telemetry(&Identity::parse("e/A").unwrap(), Some("out1"));
        for (pattern, expected) in [
            ("/*", [true, true, true, true]),
            ("/", [true, true, true, true]),
            ("/messages/*", [true, true, true, true]),
            ("/MESSAGES", [true, true, true, true]),
            ("/messages/modules", [false, true, true, true]),
            ("/messages/modules/A", [false, true, false, true]),
            ("/messages/modules/a/*", [false, true, false, true]),
            (
                "/messages/modules/A/outputs/out1",
                [false, false, false, true],
            ),
            (
                "/messages/modules/A/outputs/out",
                [false, false, false, false],
            ),
            (
                "/messages/modules/*/outputs/out1",
                [false, false, false, false],
            ),
            ("/twinChangeNotifications", [false, false, false, false]),
        ] {
            let pattern = SourcePattern::new(pattern);
            let got = [&leaf, &a, &ab, &a_out].map(|path| pattern.matches(path));
            assert_eq!(got, expected, "{pattern:?}");
        }
    }

    #[test]
    fn twin_changes_are_matched_by_their_own_path_and_by_everything() {
        let path = SourcePath::twin_change();
        for (pattern, expected) in [
            ("/*", true),
            ("/", true),
            ("/twinChangeNotifications", true),
            ("/TWINCHANGENOTIFICATIONS/*", true),
            ("/messages/*", false),
        ] {
            let matches = SourcePattern::new(pattern).matches(&path);
            assert_eq!(matches, expected, "{pattern}");
        }
    }
}
