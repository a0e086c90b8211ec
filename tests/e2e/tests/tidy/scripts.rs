//! What the scripts rely on in bash, and what the pages rely on in the code.

use std::collections::BTreeSet;
use std::process::{Command, Output};
use std::time::Duration;

use super::{assert_none, files, root};

/// Runs a bash program that has sourced the scripts' common part.
fn bash(program: &str) -> Output {
    let common = root().join("scripts/lib/common.sh");
    let program = format!("set -euo pipefail\n. '{}'\n{program}", common.display());
    let output = Command::new("bash").args(["-c", &program]).output();
    output.unwrap()
}

/// A check whose command fails in the middle has failed, although what follows it succeeds.
#[test]
fn a_step_ends_at_the_first_error_inside_of_a_function() {
    let output = bash("check() { false; say went on; }\nstep broken check\nsay not reached");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said, "==> broken\n");
    assert!(String::from_utf8_lossy(&output.stderr).contains("broken: FAILED after 0."));
}

#[test]
fn a_step_says_its_seconds_and_passes_on_how_it_ended() {
    let output = bash("good() { say fine; }\nbad() { return 7; }\nstep one good\nstep two bad");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(7), "{said}");
    assert!(
        said.starts_with("==> one\nfine\n==> one: 0.") && said.ends_with(" s\n==> two\n"),
        "{said}"
    );
}

/// Told to end, a script takes everything along that a step has started.
#[test]
fn what_a_step_has_started_ends_with_the_script() {
    // The inner script tells its outer one to end, once its child runs.
    let program = "work() { sleep 1000 & say \"$!\"; kill -TERM $$; wait; }\nstep long work";
    let output = bash(program);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(130), "{said}");
    let child: u32 = said.lines().nth(1).unwrap().parse().unwrap();
    let runs = || {
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        !stat.is_empty() && !stat.contains(") Z ")
    };
    // Ten seconds, in steps.
    for _ in 0..2_000 {
        if !runs() {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("the step's child lives on");
}

#[test]
fn an_older_compiler_is_named() {
    let output = bash("rustc() { echo 'rustc 1.63.0 (x)'; }\ncheck_rust");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("or newer is needed, here is 1.63.0"),
        "{said}"
    );
    assert!(bash("check_rust").status.success());
}

/// Names of our metrics that the code makes.
fn metrics_in(code: &str) -> BTreeSet<String> {
    let code = code.split("#[cfg(test)]").next().unwrap();
    code.split('"')
        .skip(1)
        .step_by(2)
        .filter(|text| text.starts_with("edgehub_") && !text.contains([' ', '{', '=']))
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_metric_is_documented() {
    let mut names = BTreeSet::new();
    for (path, text) in files(&[".rs"]) {
        let is_test = path.contains("test");
        if (path.starts_with("broker/") || path.starts_with("bridge/")) && !is_test {
            names.extend(metrics_in(&text));
        }
    }
    assert!(names.contains("edgehub_queue_length"), "{names:?}");
    let page = std::fs::read_to_string(root().join("docs/compatibility.md")).unwrap();
    let missing: Vec<String> = names
        .into_iter()
        .filter(|name| !page.contains(&format!("`{name}")))
        .collect();
    assert_none(&missing, "metrics without a row in docs/compatibility.md");
}

/// The last column of a page's tables that have a column for tests.
fn tests_in(page: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut has_tests = false;
    for line in page.lines() {
        if !line.starts_with('|') {
            has_tests = false;
        }
        let last = line.trim_end_matches('|').rsplit('|').next();
        let last = last.unwrap_or_default().trim();
        if last == "Test" {
            has_tests = true;
        } else if has_tests {
            let named = last.split('`').skip(1).step_by(2);
            names.extend(named.filter(|name| !name.contains('/')).map(str::to_owned));
        }
    }
    names
}

#[test]
fn the_tests_that_pages_name_exist() {
    let mut names = BTreeSet::new();
    for page in ["docs/compatibility.md", "docs/security.md"] {
        let found = tests_in(&std::fs::read_to_string(root().join(page)).unwrap());
        assert!(found.len() > 20, "{page}: {found:?}");
        names.extend(found);
    }
    let sources = files(&[".rs"]);
    let missing: Vec<String> = names
        .into_iter()
        .filter(|name| {
            let exact = [format!("fn {name}("), format!("fn {name}")];
            let wanted = &exact[usize::from(name.ends_with('_'))];
            !sources.iter().any(|(_, text)| text.contains(wanted))
        })
        .collect();
    assert_none(&missing, "tests that pages name and that are not there");
}

/// The short names of refusals, which the log shows and docs/errors.md explains.
#[test]
fn every_refusal_and_drop_is_explained() {
    let page = std::fs::read_to_string(root().join("docs/errors.md")).unwrap();
    let mut names = BTreeSet::new();
    for (file, function) in [
        ("auth/src/authenticator/error.rs", "pub fn reason("),
        ("broker/src/telemetry/metrics.rs", "pub fn label("),
        ("bridge/src/lanes/message.rs", "pub fn label("),
    ] {
        let code = std::fs::read_to_string(root().join(file)).unwrap();
        let body = code.split(function).nth(1).unwrap();
        let body = body.split("\n    }\n").next().unwrap();
        let found: Vec<_> = body.split("=> \"").skip(1).collect();
        assert!(found.len() > 2, "{file}");
        names.extend(
            found
                .into_iter()
                .map(|text| text.split('"').next().unwrap().to_owned()),
        );
    }
    let missing: Vec<String> = names
        .into_iter()
        .filter(|name| !page.contains(&format!("`{name}`")))
        .collect();
    assert_none(&missing, "names without a row in docs/errors.md");
}
