//! Other people's programs as child processes.

use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

/// What a program left behind.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs a program to its end, without standard input. After `patience` it is killed, and the test
/// fails.
pub async fn run(mut command: Command, patience: Duration) -> Outcome {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let shown = format!("{:?}", command.as_std().get_program());
    let child = command.spawn().unwrap_or_else(|error| {
        panic!("cannot start {shown}: {error} (scripts/test.sh installs what tests need)")
    });
    let output = timeout(patience, child.wait_with_output()).await;
    let output = output.unwrap_or_else(|_| panic!("{shown} has not ended after {patience:?}"));
    let output = output.expect("the output can be read");
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
