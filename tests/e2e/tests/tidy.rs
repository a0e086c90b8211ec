//! Lints the tree itself: what the compiler and clippy cannot see.
//!
//! No hub runs here. Each rule prints every place that breaks it, and each has a guard against
//! looking at nothing.

#![allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "these are the tests"
)]

#[path = "tidy/limits_page.rs"]
mod limits_page;
#[path = "tidy/scripts.rs"]
mod scripts;
#[path = "tidy/tables.rs"]
mod tables;
#[path = "tidy/tasks.rs"]
mod tasks;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Longest source file; past that it tells more than one story.
const LINES_MAX: usize = 700;

/// Files that may be longer, each with its reason.
const LONG_FILES: [(&str, &str); 0] = [];

/// Folders with nothing that we wrote.
const FOREIGN: [&str; 7] = [
    ".cargo",
    ".git",
    ".tools",
    ".venv",
    ".venv-proton",
    "node_modules",
    "target",
];

/// Which of our crates each crate may name. The picture is in docs/architecture.md.
const OURS: [(&str, &[&str]); 12] = [
    ("edgehub-proto", &[]),
    ("edgehub-amqp", &["edgehub-proto"]),
    ("edgehub-auth", &["edgehub-proto"]),
    ("edgehub-storage", &["edgehub-proto"]),
    // A WebSocket as bytes: what is inside is nothing to it.
    ("edgehub-ws", &[]),
    (
        "edgehub-bridge",
        &[
            "edgehub-amqp",
            "edgehub-auth",
            "edgehub-proto",
            "edgehub-storage",
            "edgehub-ws",
        ],
    ),
    (
        "edgehub-broker",
        &[
            "edgehub-amqp",
            "edgehub-auth",
            "edgehub-proto",
            "edgehub-storage",
            "edgehub-ws",
        ],
    ),
    (
        "edgehub",
        &[
            "edgehub-auth",
            "edgehub-bridge",
            "edgehub-broker",
            "edgehub-proto",
            "edgehub-storage",
        ],
    ),
    ("iothub-emulator", &["edgehub-amqp", "edgehub-ws"]),
    ("edgehub-lab", &[]),
    ("edgehub-perf", &["edgehub-lab"]),
    ("edgehub-tests", &["edgehub-lab"]),
];

/// Foreign crates (a `*` ends a prefix) that only these of our crates may name.
const WALLS: [(&str, &[&str]); 8] = [
    ("axum", &["edgehub-broker", "iothub-emulator"]),
    // As an independent peer in the tests of those that use our own engine.
    (
        "fe2o3-amqp*",
        &[
            "edgehub-amqp",
            "edgehub-bridge",
            "edgehub-broker",
            "iothub-emulator",
        ],
    ),
    ("librocksdb-sys", &["edgehub-storage"]),
    // The codec under test and the codec that tests it are never the same.
    (
        "mqttbytes",
        &[
            "edgehub-lab",
            "edgehub-perf",
            "edgehub-tests",
            "iothub-emulator",
        ],
    ),
    ("ntex*", &["edgehub-bridge", "edgehub-broker"]),
    ("rocksdb", &["edgehub-storage"]),
    (
        "serde_amqp",
        &[
            "edgehub-amqp",
            "edgehub-bridge",
            "edgehub-tests",
            "iothub-emulator",
        ],
    ),
    (
        "tokio*",
        &[
            "edgehub",
            // A server on sockets for the tests of the engine alone.
            "edgehub-amqp",
            "edgehub-auth",
            "edgehub-bridge",
            "edgehub-broker",
            "edgehub-lab",
            "edgehub-perf",
            // Feature `sync` alone, for what the traits between broker and bridge hand over.
            "edgehub-proto",
            "edgehub-storage",
            "edgehub-ws",
            "edgehub-tests",
            "iothub-emulator",
        ],
    ),
];

fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap().to_owned()
}

/// Every file of ours whose name ends so, as (path from the root, text).
fn files(endings: &[&str]) -> Vec<(String, String)> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() && !FOREIGN.contains(&&*name.to_string_lossy()) {
                walk(&entry.path(), found);
            } else if kind.is_file() {
                found.push(entry.path());
            }
        }
    }
    let root = root();
    let mut found = Vec::new();
    walk(&root, &mut found);
    found.sort();
    let wanted = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        endings.iter().any(|ending| name.ends_with(ending))
    };
    let files: Vec<_> = found
        .into_iter()
        .filter(wanted)
        .filter_map(|path| {
            let text = fs::read_to_string(&path).ok()?;
            Some((
                path.strip_prefix(&root)
                    .unwrap()
                    .to_string_lossy()
                    .into_owned(),
                text,
            ))
        })
        .collect();
    assert!(
        !files.is_empty(),
        "no file ends with {endings:?} below {}",
        root.display()
    );
    files
}

/// Lines that hold one of the words, as `file:line: text`. This file names them, so it is not read.
fn lines_with(endings: &[&str], words: &[&str]) -> Vec<String> {
    let mut hits = Vec::new();
    for (path, text) in files(endings) {
        if path.ends_with("tests/tidy.rs") {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            if words.iter().any(|word| line.contains(word)) {
                hits.push(format!("{path}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    hits
}

fn assert_none(hits: &[String], rule: &str) {
    assert!(hits.is_empty(), "{rule}:\n  {}", hits.join("\n  "));
}

/// `(name, dependencies)` of every member of the workspace, as cargo understands the manifests.
fn packages() -> Vec<(String, Vec<Value>)> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    packages
        .iter()
        .map(|package| {
            let dependencies = package["dependencies"].as_array().unwrap().clone();
            (package["name"].as_str().unwrap().to_owned(), dependencies)
        })
        .collect()
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => name == pattern,
    }
}

#[test]
fn source_files_stay_short() {
    let mut hits = Vec::new();
    for (path, text) in files(&[".rs"]) {
        let lines = text.lines().count();
        let reason = LONG_FILES.iter().any(|(file, _)| *file == path);
        if lines > LINES_MAX && !reason {
            hits.push(format!("{path}: {lines} lines"));
        }
        if lines <= LINES_MAX && reason {
            hits.push(format!("{path}: only {lines} lines, take it off the list"));
        }
    }
    assert_none(
        &hits,
        "no source file over 700 lines, or a reason in LONG_FILES",
    );
}

#[test]
fn nothing_is_left_for_later() {
    let words = ["todo!", "unimplemented!", "#[ignore", "dbg!("];
    assert_none(
        &lines_with(&[".rs"], &words),
        "code is finished or not there",
    );
}

#[test]
fn no_path_of_one_machine_is_in_the_tree() {
    let words = ["/work/", "/root/", "/home/", "/tmp/plan"];
    let endings = [
        ".rs", ".sh", ".toml", ".md", ".py", ".js", ".proto", ".yml", "run",
    ];
    assert_none(
        &lines_with(&endings, &words),
        "paths are relative to the checkout",
    );
}

#[test]
fn our_crates_depend_in_one_direction() {
    let packages = packages();
    let mut hits = Vec::new();
    let mut seen = BTreeSet::new();
    for (name, dependencies) in &packages {
        let Some((known, allowed)) = OURS.iter().find(|(crate_, _)| crate_ == name) else {
            hits.push(format!("{name} is not in OURS: say what it may depend on"));
            continue;
        };
        seen.insert(*known);
        for dependency in dependencies.iter().filter(|d| d["path"].is_string()) {
            let on = dependency["name"].as_str().unwrap();
            if !allowed.contains(&on) {
                hits.push(format!("{name} depends on {on}"));
            }
        }
    }
    assert_none(&hits, "the house has one direction (docs/architecture.md)");
    assert_eq!(seen.len(), OURS.len(), "OURS names a crate that is gone");
}

#[test]
fn foreign_crates_stay_behind_their_walls() {
    let mut hits = Vec::new();
    let mut used = BTreeSet::new();
    for (name, dependencies) in packages() {
        for dependency in dependencies.iter().filter(|d| d["path"].is_null()) {
            let on = dependency["name"].as_str().unwrap();
            for (pattern, allowed) in WALLS.iter().filter(|(pattern, _)| matches(pattern, on)) {
                used.insert(*pattern);
                // A crate's own tests speak through the other codec, as all tests do.
                let is_test_codec = *pattern == "mqttbytes" && dependency["kind"] == "dev";
                if !allowed.contains(&name.as_str()) && !is_test_codec {
                    hits.push(format!("{name} depends on {on}"));
                }
            }
        }
    }
    assert_none(
        &hits,
        "these crates belong to others (docs/architecture.md)",
    );
    assert!(used.contains("rocksdb") && used.contains("ntex*") && used.contains("tokio*"));
}

#[test]
fn every_crate_takes_the_lints_of_the_workspace() {
    let manifests = files(&["Cargo.toml"]);
    let (workspace, crates): (Vec<_>, Vec<_>) =
        manifests.iter().partition(|(path, _)| path == "Cargo.toml");
    let without: Vec<String> = crates
        .iter()
        .filter(|(_, text)| !text.contains("[lints]\nworkspace = true"))
        .map(|(path, _)| path.clone())
        .collect();
    assert_none(&without, "[lints] workspace = true");
    // The ban of `faults` in a release build hangs on this being off there.
    let (_, text) = workspace.first().unwrap();
    let release = text.split("[profile.release]").nth(1).unwrap();
    let release = release.split("\n[").next().unwrap();
    assert!(
        !release.contains("debug-assertions"),
        "release builds have no debug assertions"
    );
}

#[test]
fn the_cached_rocksdb_has_the_features_that_storage_asks_for() {
    let packages = packages();
    let (_, dependencies) = packages
        .iter()
        .find(|(name, _)| name == "edgehub-storage")
        .unwrap();
    let rocksdb = dependencies
        .iter()
        .find(|d| d["name"] == "rocksdb")
        .unwrap();
    assert_eq!(rocksdb["uses_default_features"], false);
    let wanted: BTreeSet<&str> = rocksdb["features"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(Value::as_str)
        .collect();
    let script = fs::read_to_string(root().join("scripts/lib/rocksdb.sh")).unwrap();
    let line = script
        .lines()
        .find_map(|line| line.strip_prefix("features="))
        .unwrap();
    let built: BTreeSet<&str> = line.trim_matches('"').split_whitespace().collect();
    assert_eq!(built, wanted, "scripts/lib/rocksdb.sh and Cargo.toml");
}

/// Names of settings that the code asks its environment for: the string right behind the opening
/// bracket of a reader.
fn settings_in(code: &str) -> BTreeSet<String> {
    const READERS: [&str; 9] = [
        "required",
        "text",
        "section",
        "flag",
        "integer",
        "bounded",
        "port",
        "time_span",
        "address",
    ];
    let code = code.split("#[cfg(test)]").next().unwrap();
    let mut names = BTreeSet::new();
    for (at, _) in code.match_indices('"') {
        let Some(before) = code[..at].trim_end().strip_suffix('(') else {
            continue;
        };
        let reader = before
            .rsplit(|c: char| !c.is_alphanumeric() && c != '_')
            .next()
            .unwrap();
        if READERS.contains(&reader) || reader == "choice" {
            names.insert(code[at + 1..].split('"').next().unwrap().to_owned());
        }
    }
    names
}

#[test]
fn every_setting_is_documented() {
    let mut names = BTreeSet::new();
    for (path, text) in files(&[".rs"]) {
        if path.starts_with("broker/src/config") {
            names.extend(settings_in(&text));
        }
    }
    for expected in [
        "ListenAddress",
        "StorageSync",
        "EDGEHUB_FAULTS",
        "routes",
        "UpstreamMqttPort",
    ] {
        assert!(
            names.contains(expected),
            "{expected} was not seen among {names:?}"
        );
    }
    let page = fs::read_to_string(root().join("docs/compatibility.md")).unwrap();
    let missing: Vec<String> = names
        .into_iter()
        .filter(|name| !page.contains(&format!("`{name}")))
        .collect();
    assert_none(&missing, "settings without a row in docs/compatibility.md");
}

#[test]
fn scripts_stop_at_the_first_error() {
    let root = root();
    let mut hits = Vec::new();
    let mut scripts = 0;
    for (path, text) in files(&[".sh", "run"]) {
        if !path.starts_with("scripts/") && path != ".ci/run" {
            continue;
        }
        let mode = fs::metadata(root.join(&path)).unwrap().permissions().mode();
        let is_program = text.starts_with("#!/usr/bin/env bash\n");
        let first = text
            .lines()
            .find(|line| !line.is_empty() && !line.starts_with('#'));
        if is_program {
            scripts += 1;
            if mode & 0o111 == 0 {
                hits.push(format!("{path}: not executable"));
            }
            if first != Some("set -euo pipefail") {
                hits.push(format!("{path}: does not start with set -euo pipefail"));
            }
        } else if mode & 0o111 != 0 || !text.contains("# shellcheck shell=bash") {
            hits.push(format!("{path}: neither a bash program nor a sourced part"));
        }
    }
    assert_none(&hits, "scripts");
    assert!(scripts >= 5, "only {scripts} scripts seen");
}

#[test]
fn links_between_pages_lead_somewhere() {
    let root = root();
    let mut hits = Vec::new();
    let mut links = 0;
    for (path, text) in files(&[".md"]) {
        let folder = root.join(&path).parent().unwrap().to_owned();
        for part in text.split("](").skip(1) {
            let target = part.split([')', '#', ' ']).next().unwrap();
            if target.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            links += 1;
            if !folder.join(target).exists() {
                hits.push(format!("{path}: {target}"));
            }
        }
    }
    assert_none(&hits, "pages that links name");
    assert!(links > 0);
}

#[test]
fn the_reader_of_settings_reads() {
    let code = r#"
        let a = env.flag("A__B", true); env.time_span(
            "C", x); env.choice("D", &[("os", 1)]); required("E"); other("F"); env.text("G")
        #[cfg(test)] env.text("H")"#;
    let names: Vec<_> = settings_in(code).into_iter().collect();
    assert_eq!(names, ["A__B", "C", "D", "E", "G"]);
}
