//! Plain HTTP/1.1 requests to metrics ports and the emulator's control API.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// A watcher that gets no answer for this long has found a problem.
const ANSWER_MAX: Duration = Duration::from_secs(20);

/// One request on a connection of its own.
async fn request(
    address: SocketAddr,
    method: Method,
    path: &str,
    body: Option<&serde_json::Value>,
) -> Result<Response<Incoming>> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let bytes = body
        .map(serde_json::to_vec)
        .transpose()?
        .unwrap_or_default();
    let mut request = Request::builder().method(method).uri(path);
    request = request.header("host", address.to_string());
    if body.is_some() {
        request = request.header("content-type", "application/json");
    }
    let request = request.body(Full::new(Bytes::from(bytes)))?;
    Ok(sender.send_request(request).await?)
}

/// GET, the whole answer.
///
/// # Cancel safety
/// Cancel safe: the connection is closed.
pub(crate) async fn get(address: SocketAddr, path: &str) -> Result<(StatusCode, Bytes)> {
    let answer = async {
        let response = request(address, Method::GET, path, None).await?;
        let status = response.status();
        Ok((status, response.into_body().collect().await?.to_bytes()))
    };
    let limited = tokio::time::timeout(ANSWER_MAX, answer).await;
    limited
        .unwrap_or_else(|_| anyhow::bail!("no answer for {ANSWER_MAX:?}"))
        .with_context(|| format!("GET http://{address}{path}"))
}

/// Any method, with a JSON body if there is one; anything but 2xx is an error with the answer as
/// its text.
///
/// # Cancel safety
/// The request may or may not have taken effect.
pub(crate) async fn call(
    address: SocketAddr,
    method: Method,
    path: &str,
    body: Option<&serde_json::Value>,
) -> Result<Bytes> {
    let context = format!("{method} http://{address}{path}");
    let answer = async {
        let response = request(address, method, path, body).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        ensure!(
            status.is_success(),
            "{status}: {}",
            String::from_utf8_lossy(&bytes)
        );
        Ok(bytes)
    };
    let limited = tokio::time::timeout(ANSWER_MAX, answer).await;
    limited
        .unwrap_or_else(|_| anyhow::bail!("no answer for {ANSWER_MAX:?}"))
        .context(context)
}
