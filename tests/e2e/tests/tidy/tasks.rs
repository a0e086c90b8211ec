//! Tasks are owned and channels bounded, in what is delivered; clippy cannot tell that from tests.

use super::{assert_none, files};

/// Parts of the product.
const PRODUCT: [&str; 5] = ["auth/", "bridge/", "broker/", "proto/", "storage/"];

/// What nobody owns, or nothing bounds, and what to use instead.
const FORBIDDEN: [(&str, &str); 4] = [
    ("tokio::spawn(", "a TaskTracker's spawn"),
    ("task::spawn(", "a TaskTracker's spawn"),
    (
        "mpsc::channel()",
        "sync_channel, or tokio's channel with a limit",
    ),
    ("mpsc::channel::<()>()", "sync_channel"),
];

/// The signal handler lives as long as the process, and nothing waits for it.
const EXCEPTION: (&str, &str) = ("broker/edgehub/src/run.rs", "tokio::spawn(");

#[test]
fn tasks_are_owned_and_channels_bounded() {
    let (mut hits, mut exceptions, mut seen) = (Vec::new(), 0, 0);
    for (path, text) in files(&[".rs"]) {
        // Modules of tests alone have it in their name; the parent is a fake for tests.
        let is_test = ["test", "fake", "session_support", "pump_world", "sync_rig"]
            .iter()
            .any(|word| path.contains(word));
        if is_test || !PRODUCT.iter().any(|folder| path.starts_with(folder)) {
            continue;
        }
        seen += 1;
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for (number, line) in code.lines().enumerate() {
            for (word, instead) in FORBIDDEN {
                if !line.contains(word) {
                    continue;
                }
                if EXCEPTION == (path.as_str(), word) {
                    exceptions += 1;
                } else {
                    hits.push(format!(
                        "{path}:{}: {}; use {instead}",
                        number + 1,
                        line.trim()
                    ));
                }
            }
        }
    }
    assert_none(&hits, "every task is owned, every channel has a limit");
    assert!(seen > 50, "only {seen} files seen");
    assert!(exceptions <= 1, "the exception is for one place");
}
