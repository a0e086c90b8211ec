//! HTTPS requests to the upstream's scope API, over connections that are kept.
//!
//! hyper speaks HTTP/1.1 on a TLS stream that the [`Dialer`] made, so requests leave from the same
//! local address and trust the same certificates as the device protocol.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::{
    Request, StatusCode,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    header,
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::time::timeout;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::debug;

use crate::{
    dial::{DialError, Dialer},
    limits,
};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// The answer's body is over [`limits::HTTP_BODY_BYTES_MAX`].
    #[error("the answer is larger than {} bytes", limits::HTTP_BODY_BYTES_MAX)]
    BodyTooLarge,
    /// The connection broke, or what came is not HTTP.
    #[error("HTTP: {0}")]
    Connection(String),
    /// No connection.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The request cannot be written as HTTP.
    #[error("invalid request: {0}")]
    Request(String),
    /// The whole exchange took too long.
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
}

/// Sends requests to one host and port.
#[derive(Debug)]
pub(crate) struct HttpClient {
    dialer: Dialer,
    port: u16,
    /// Connections without a request under way; at most [`limits::HTTP_IDLE_MAX`].
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
    tasks: TaskTracker,
    /// Ends kept connections when the process stops.
    cancel: CancellationToken,
}

/// A status and a body.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Bytes,
}

impl HttpClient {
    pub(crate) fn new(
        dialer: Dialer,
        port: u16,
        tasks: TaskTracker,
        cancel: CancellationToken,
    ) -> Self {
        Self {
            dialer,
            port,
            idle: Mutex::new(Vec::new()),
            tasks,
            cancel,
        }
    }

    /// Posts JSON and reads the answer.
    ///
    /// The calls of the scope API change nothing, so a kept connection that turns out to be dead is
    /// replaced and the request sent again, once.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future drops the connection that it used, and all that are kept.
    pub(crate) async fn post(
        &self,
        path: &str,
        authorization: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<Answer, HttpError> {
        let exchange = async {
            while let Some(kept) = self.take_idle() {
                match self.exchange(kept, path, authorization, body.clone()).await {
                    Err(HttpError::Connection(error)) => {
                        debug!(%error, "a kept connection to the scope API was dead");
                    }
                    result => return result,
                }
            }
            let fresh = self.connect().await?;
            self.exchange(fresh, path, authorization, body.clone())
                .await
        };
        let suspicion = Suspicion(Some(&self.idle));
        match timeout(limit, exchange).await {
            Ok(result) => {
                suspicion.dismiss();
                result
            }
            Err(_) => Err(HttpError::TimedOut(limit)),
        }
    }

    fn take_idle(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut idle = self.idle.lock();
        idle.retain(|connection| !connection.is_closed());
        idle.pop()
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, HttpError> {
        let stream = self.dialer.dial(self.port).await?;
        let (sender, connection) = http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| HttpError::Connection(error.to_string()))?;
        // Ends when the sender is dropped, the other side closes, or the bridge ends.
        let cancel = self.cancel.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                ended = connection => {
                    if let Err(error) = ended {
                        debug!(%error, "connection to the scope API ended");
                    }
                }
                () = cancel.cancelled() => {}
            }
        });
        Ok(sender)
    }

    async fn exchange(
        &self,
        mut connection: SendRequest<Full<Bytes>>,
        path: &str,
        authorization: &str,
        body: Bytes,
    ) -> Result<Answer, HttpError> {
        let request = Request::post(path)
            .header(header::HOST, self.host_header())
            .header(header::AUTHORIZATION, authorization)
            .header(header::CONTENT_TYPE, "application/json; charset=utf-8")
            .header(header::ACCEPT, "application/json")
            .body(Full::new(body))
            .map_err(|error| HttpError::Request(error.to_string()))?;
        let broken = |error: hyper::Error| HttpError::Connection(error.to_string());
        connection.ready().await.map_err(broken)?;
        let response = connection.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let body = read_body(response.into_body()).await?;
        self.keep(connection);
        Ok(Answer { status, body })
    }

    fn keep(&self, connection: SendRequest<Full<Bytes>>) {
        let mut idle = self.idle.lock();
        if idle.len() < limits::HTTP_IDLE_MAX {
            idle.push(connection);
        }
    }

    fn host_header(&self) -> String {
        let host = self.dialer.host();
        if self.port == 443 {
            host.to_owned()
        } else {
            format!("{host}:{}", self.port)
        }
    }
}

/// Drops the kept connections unless dismissed: when nothing was heard on one, however long its
/// caller was willing to wait, the upstream may have become a black hole for the others too.
struct Suspicion<'a>(Option<&'a Mutex<Vec<SendRequest<Full<Bytes>>>>>);

impl Suspicion<'_> {
    fn dismiss(mut self) {
        self.0 = None;
    }
}

impl Drop for Suspicion<'_> {
    fn drop(&mut self) {
        if let Some(idle) = self.0 {
            idle.lock().clear();
        }
    }
}

async fn read_body(body: Incoming) -> Result<Bytes, HttpError> {
    let limited = Limited::new(body, limits::HTTP_BODY_BYTES_MAX);
    match limited.collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(HttpError::BodyTooLarge),
        Err(error) => Err(HttpError::Connection(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_parent::FakeParent;

    #[tokio::test]
    async fn kept_connections_into_a_black_hole_cost_one_time_out_together() {
        let parent = FakeParent::new();
        let port = parent.free_port().await;
        let _serving = parent.serve_https(port).await;
        let tls = parent.client_tls.clone();
        let minute = Duration::from_secs(60);
        let dialer = Dialer::new(&parent.address.to_string(), None, tls, minute);
        let client = HttpClient::new(dialer, port, TaskTracker::new(), CancellationToken::new());
        let post = || client.post("/", "token", Bytes::new(), minute);
        let (first, second, third) = tokio::join!(post(), post(), post());
        assert!(first.is_ok() && second.is_ok() && third.is_ok());
        let kept = parent.seen.lock().https_connections;
        assert_eq!((kept, client.idle.lock().len()), (3, 3));

        parent.seen.lock().https_silent = kept;
        // The caller's patience is shorter than the client's.
        let impatient = timeout(Duration::from_millis(50), post()).await;
        assert!(impatient.is_err());
        let answer = timeout(minute / 2, post()).await;
        assert!(
            answer.is_ok_and(|answer| answer.is_ok()),
            "a fresh connection"
        );
    }
}
