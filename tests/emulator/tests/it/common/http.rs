//! One HTTP request per connection, with and without TLS.

use std::net::SocketAddr;
use std::sync::Arc;

use http_body_util::{BodyExt, Full};
use hyper::{HeaderMap, Request};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::{HOST, PATIENCE};

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.text()))
    }
}

pub(crate) async fn plain(address: SocketAddr, method: &str, path: &str, body: &Value) -> Answer {
    let socket = TcpStream::connect(address).await.unwrap();
    let headers = [("content-type", "application/json".to_owned())];
    timeout(PATIENCE, request(socket, method, path, &headers, body))
        .await
        .unwrap()
}

pub(crate) async fn tls(
    address: SocketAddr,
    tls: &Arc<ClientConfig>,
    method: &str,
    path: &str,
    headers: &[(&str, String)],
    body: &Value,
) -> Answer {
    let socket = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from(HOST).unwrap();
    let stream = TlsConnector::from(tls.clone())
        .connect(name, socket)
        .await
        .unwrap();
    timeout(PATIENCE, request(stream, method, path, headers, body))
        .await
        .unwrap()
}

async fn request(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    method: &str,
    path: &str,
    headers: &[(&str, String)],
    body: &Value,
) -> Answer {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .unwrap();
    let connection = tokio::spawn(connection);
    let body = if body.is_null() {
        String::new()
    } else {
        body.to_string()
    };
    let mut request = Request::builder()
        .method(method)
        .uri(path)
        .header("host", HOST);
    for (name, value) in headers {
        request = request.header(*name, value);
    }
    let request = request.body(Full::<bytes::Bytes>::from(body)).unwrap();
    let response = sender.send_request(request).await.unwrap();
    let (head, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes().to_vec();
    connection.abort();
    Answer {
        status: head.status.as_u16(),
        headers: head.headers,
        body,
    }
}
