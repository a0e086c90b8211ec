//! Acceptance 7 of the walking skeleton: what a person sees first.

#![allow(clippy::expect_used, reason = "these are the tests")]

use std::time::Duration;

use edgehub_tests::{program, root};
use tokio::process::Command;

/// The demo builds in release before it begins, which takes minutes the first time.
const PATIENCE: Duration = Duration::from_secs(1500);

/// Somebody runs `scripts/demo.sh --seconds 20` in the checkout: ten leaves, all of them
/// `azure-iot-device`, send through three layers while each hub is killed and started again, the
/// way to take part is shown, and the last word is PASS.
#[tokio::test]
async fn accept_skeleton_7_the_demo_passes_while_it_kills_every_hub() {
    let mut demo = Command::new(root().join("scripts/demo.sh"));
    demo.args(["--seconds", "20"]).current_dir(root());
    let outcome = program::run(demo, PATIENCE).await;
    let shown = format!("{}\n{}", outcome.stdout, outcome.stderr);
    println!("{shown}");
    assert_eq!(outcome.code, Some(0));

    let verdict = outcome
        .stdout
        .lines()
        .find(|line| line.contains("acknowledged, ") && line.contains("duplicates"));
    let verdict = verdict.expect("a verdict line").trim();
    let numbers: Vec<u64> = verdict
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|word| word.parse().ok())
        .collect();
    assert!(verdict.starts_with("PASS: "), "{verdict}");
    let [acknowledged, at_hub, lost, out_of_order, _duplicates] = numbers[..] else {
        panic!("the verdict has another form: {verdict}")
    };
    assert!(acknowledged >= 100, "ten leaves send for 20 s: {verdict}");
    assert_eq!(
        (at_hub, lost, out_of_order),
        (acknowledged, 0, 0),
        "{verdict}"
    );

    for hub in ["edge1", "edge2", "edge3"] {
        let kills = shown.matches(&format!("killing {hub} (SIGKILL)")).count();
        assert_eq!(kills, 1, "{hub} is killed once");
    }
    assert!(
        shown.contains("10 leaves are azure-iot-device"),
        "the real SDK sends"
    );
    for part in [
        "mosquitto_pub ",
        "--cafile ",
        "SharedAccessKey=",
        "CA file: ",
    ] {
        assert!(
            shown.contains(part),
            "the demo shows how to take part: {part}"
        );
    }
}
