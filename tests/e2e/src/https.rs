//! One HTTPS request per connection, written by hand: every byte of it is the test's.

use std::fmt::Write as _;

use edgehub_lab::{Lab, mqtt_sender};
use rustls_pki_types::ServerName;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::PATIENCE;

/// A request.
#[derive(Clone, Debug)]
pub struct Request {
    /// Method.
    pub method: &'static str,
    /// Path and query.
    pub path: String,
    /// Further headers; `Host`, `Content-Length` and `Connection` are there.
    pub headers: Vec<(&'static str, String)>,
    /// Body.
    pub body: Vec<u8>,
}

/// What came back.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Head and body as text: everything that the caller was told.
    pub text: String,
}

impl Answer {
    /// The body as JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        let (_, body) = self.text.split_once("\r\n\r\n").unwrap_or_default();
        serde_json::from_str(body).unwrap_or_else(|_| panic!("no JSON: {}", self.text))
    }
}

impl Request {
    /// A request with a JSON body.
    #[must_use]
    pub fn json(method: &'static str, path: impl Into<String>, body: &Value) -> Self {
        let body = if body.is_null() {
            Vec::new()
        } else {
            body.to_string().into_bytes()
        };
        let headers = vec![("Content-Type", "application/json".to_owned())];
        Self {
            method,
            path: path.into(),
            headers,
            body,
        }
    }

    /// With one more header.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// Sends it to a host of the lab and returns the whole answer.
    pub async fn send(&self, lab: &Lab, host: &str) -> Answer {
        let exchange = timeout(PATIENCE, self.exchange(lab, host)).await;
        let text = exchange.unwrap_or_else(|_| panic!("{self:?}: no answer for {PATIENCE:?}"));
        let status = text
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok());
        let status = status.unwrap_or_else(|| panic!("no HTTP answer: {text}"));
        Answer { status, text }
    }

    async fn exchange(&self, lab: &Lab, host: &str) -> String {
        let host = lab.host(host).expect("a host of the lab");
        let tls = mqtt_sender::connector(lab.ca_file()).expect("the lab's CA");
        let name = ServerName::try_from(host.hostname.clone()).expect("a host name");
        let tcp = TcpStream::connect((host.hostname.as_str(), host.ports.https));
        let tcp = tcp.await.expect("HTTPS listens");
        let mut stream = tls.connect(name, tcp).await.expect("TLS");
        let mut head = format!("{} {} HTTP/1.1\r\n", self.method, self.path);
        let length = self.body.len();
        let _ = write!(
            head,
            "Host: {}\r\nContent-Length: {length}\r\n",
            host.hostname
        );
        for (name, value) in &self.headers {
            let _ = write!(head, "{name}: {value}\r\n");
        }
        head.push_str("Connection: close\r\n\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(&self.body);
        stream
            .write_all(&bytes)
            .await
            .expect("the request is taken");
        stream.flush().await.expect("the request is taken");
        let mut answer = Vec::new();
        // A server may close without TLS's own farewell.
        let _ = stream.read_to_end(&mut answer).await;
        String::from_utf8(answer).expect("an answer in UTF-8")
    }
}
