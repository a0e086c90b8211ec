//! The emulator as a child process.

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::token::Token;
use super::{Files, HOST, PATIENCE, http, lines, read};

/// A started process that does not outlive its test.
pub(crate) struct Process {
    pub(crate) child: Child,
    ready: Value,
}

impl Process {
    pub(crate) fn start(files: &Files) -> Self {
        let ready_file = files.path("ready.json");
        let _ = std::fs::remove_file(&ready_file);
        let mut command = Command::new(env!("CARGO_BIN_EXE_iothub-emulator"));
        command.args([
            "--hostname",
            HOST,
            "--address",
            "127.0.0.1",
            "--strict",
            "--exit-with-stdin",
        ]);
        for port in [
            "--amqp-port",
            "--mqtt-port",
            "--https-port",
            "--control-port",
        ] {
            command.args([port, "0"]);
        }
        for (name, file) in [
            ("--cert", "cert.pem"),
            ("--key", "key.pem"),
            ("--seed", "seed.json"),
            ("--ledger", "ledger.jsonl"),
            ("--ready-file", "ready.json"),
        ] {
            command.arg(name).arg(files.path(file));
        }
        let child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut process = Self {
            child,
            ready: Value::Null,
        };
        let started = Instant::now();
        while process.ready.is_null() {
            assert!(started.elapsed() < PATIENCE, "not ready");
            assert!(process.child.try_wait().unwrap().is_none(), "ended");
            std::thread::sleep(Duration::from_millis(5));
            process.ready = serde_json::from_str(&read(&ready_file)).unwrap_or_default();
        }
        assert_eq!(process.ready["pid"], process.child.id());
        process
    }

    pub(crate) fn address(&self, port: &str) -> SocketAddr {
        format!("127.0.0.1:{}", self.ready[port]).parse().unwrap()
    }

    pub(crate) async fn ledger(&self) -> Vec<Value> {
        let answer = http::plain(self.address("control"), "GET", "/ledger", &Value::Null).await;
        lines(&answer.text())
    }

    /// SIGKILL, and its end.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// A call of the control API that is expected to succeed.
    pub(crate) async fn control(&self, method: &str, path: &str, body: Value) -> Value {
        let answer = http::plain(self.address("control"), method, path, &body).await;
        assert_eq!(answer.status, 200, "{method} {path}: {}", answer.text());
        answer.json()
    }

    /// A call of the service side that is expected to succeed.
    pub(crate) async fn served(
        &self,
        files: &Files,
        method: &str,
        path: &str,
        body: Value,
    ) -> Value {
        let path = format!("{path}?api-version=2021-04-12");
        let headers = [("authorization", Token::of_policy("service").text())];
        let address = self.address("https");
        let answer = http::tls(address, &files.tls, method, &path, &headers, &body).await;
        assert_eq!(answer.status, 200, "{method} {path}: {}", answer.text());
        answer.json()
    }

    pub(crate) fn ended(&mut self) -> std::process::ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
