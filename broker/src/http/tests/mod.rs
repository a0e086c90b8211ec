//! The HTTP heads over byte streams, with requests written by hand.

mod admin;
mod listener;
mod methods_api_tests;
mod scope;
mod scope_denied;

use axum::Router;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio_util::sync::CancellationToken;

use super::{guarded, serve};

/// One answer as it came.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u16,
    /// The lines of the head behind the status, in lower case.
    headers: Vec<String>,
    body: String,
}

impl Answer {
    fn has(&self, header: &str) -> bool {
        self.headers.iter().any(|line| line == header)
    }

    fn json(&self) -> serde_json::Value {
        assert!(
            self.has("content-type: application/json; charset=utf-8"),
            "{self:?}"
        );
        serde_json::from_str(&self.body).unwrap()
    }

    fn error(&self) -> String {
        let json = self.json();
        assert_eq!(json.as_object().unwrap().len(), 1);
        json["ErrorMessage"].as_str().unwrap().to_owned()
    }
}

/// A client's end of a connection that is served by `router`.
fn connect(router: Router, stop: CancellationToken) -> DuplexStream {
    let (client, server) = tokio::io::duplex(1 << 20);
    tokio::spawn(serve(server, guarded(router), stop));
    client
}

/// Sends these bytes on a new connection and reads answers until it is closed.
async fn exchange(router: Router, bytes: &[u8]) -> Vec<Answer> {
    let mut client = connect(router, CancellationToken::new());
    client.write_all(bytes).await.unwrap();
    read_answers(&mut client).await
}

async fn read_answers(client: &mut DuplexStream) -> Vec<Answer> {
    let mut bytes = Vec::new();
    // A reset is an end too.
    let _ = client.read_to_end(&mut bytes).await;
    answers(&String::from_utf8(bytes).unwrap())
}

fn answers(mut text: &str) -> Vec<Answer> {
    let mut answers = Vec::new();
    while !text.is_empty() {
        let (head, rest) = text.split_once("\r\n\r\n").expect("a whole head");
        let mut lines = head.split("\r\n");
        let status = lines
            .next()
            .unwrap()
            .split(' ')
            .nth(1)
            .unwrap()
            .parse()
            .unwrap();
        let headers: Vec<String> = lines.map(str::to_ascii_lowercase).collect();
        let length = headers
            .iter()
            .find_map(|line| line.strip_prefix("content-length: "));
        let length = length.map_or(0, |length| length.parse().unwrap());
        let (body, rest) = rest.split_at(length);
        answers.push(Answer {
            status,
            headers,
            body: body.to_owned(),
        });
        text = rest;
    }
    answers
}

/// A request with a body, the last one of its connection.
fn post(path: &str, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let mut text = format!("POST {path} HTTP/1.1\r\nHost: edgehub\r\nConnection: close\r\n");
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.push_str(&format!("Content-Length: {}\r\n\r\n{body}", body.len()));
    text.into_bytes()
}

fn get(path: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: 172.18.0.3:9600\r\nConnection: close\r\n\r\n")
        .into_bytes()
}
