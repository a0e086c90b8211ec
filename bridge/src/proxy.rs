//! The HTTP CONNECT proxy of WebSocket upstreams and of the scope API (spec/upstream.md A11).
//!
//! `https_proxy` names it, `no_proxy` the hosts that are reached without it. The password is shown
//! nowhere.

use std::fmt;
use std::io;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::{Method, Request, header};
use hyper_util::rt::TokioIo;
use percent_encoding::percent_decode_str;
use tokio::net::TcpStream;

/// A proxy that opens tunnels.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    host: String,
    port: u16,
    /// Value of `Proxy-Authorization`, a secret.
    authorization: Option<String>,
    /// Lower-case host names and, with a leading dot, domains.
    excepted: Vec<String>,
    except_all: bool,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy")
            .field("host", &self.host)
            .field("port", &self.port)
            .field("authorization", &self.authorization.as_ref().map(|_| "***"))
            .finish_non_exhaustive()
    }
}

/// Why the text of `https_proxy` cannot be used. The text itself may hold a password and is not
/// repeated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// Not `http://[user[:password]@]host[:port][/]`.
    #[error("https_proxy must be http://[user[:password]@]host[:port]")]
    Form,
    /// A proxy that is itself reached over TLS.
    #[error("https_proxy: only proxies with http:// are supported")]
    Scheme,
    /// A percent-encoded user or password that is not UTF-8.
    #[error("https_proxy: user or password is not UTF-8")]
    Encoding,
}

impl Proxy {
    /// Reads `https_proxy` and `no_proxy`; none when the first is blank.
    ///
    /// # Errors
    ///
    /// See [`ProxyError`].
    pub fn parse(https_proxy: &str, no_proxy: &str) -> Result<Option<Self>, ProxyError> {
        let text = https_proxy.trim();
        if text.is_empty() {
            return Ok(None);
        }
        let rest = match text.split_once("://") {
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => rest,
            Some(_) => return Err(ProxyError::Scheme),
            None => text,
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if authority.contains('/') {
            return Err(ProxyError::Form);
        }
        let (user, address) = match authority.rsplit_once('@') {
            Some((user, address)) => (Some(user), address),
            None => (None, authority),
        };
        let (host, port) = host_and_port(address)?;
        let authorization = user.map(basic).transpose()?;
        let names: Vec<String> = no_proxy
            .split(',')
            .map(|name| name.trim().trim_start_matches('*').to_ascii_lowercase())
            .filter(|name| !name.is_empty())
            .collect();
        Ok(Some(Self {
            host,
            port,
            authorization,
            except_all: no_proxy.split(',').any(|name| name.trim() == "*"),
            excepted: names,
        }))
    }

    /// Whether `host` is to be reached through the proxy.
    #[must_use]
    pub fn covers(&self, host: &str) -> bool {
        let host = host.to_ascii_lowercase();
        let is_excepted = |name: &String| {
            let domain = name.strip_prefix('.').unwrap_or(name);
            host == domain
                || host
                    .strip_suffix(domain)
                    .is_some_and(|head| head.ends_with('.'))
        };
        !self.except_all && !self.excepted.iter().any(is_excepted)
    }

    /// The proxy's own address.
    pub(crate) fn address(&self) -> (&str, u16) {
        (&self.host, self.port)
    }

    /// Asks the proxy at the other end of `stream` for a tunnel.
    pub(crate) async fn tunnel(
        &self,
        stream: TcpStream,
        host: &str,
        port: u16,
    ) -> io::Result<TcpStream> {
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        let target = if host.contains(':') {
            format!("[{host}]:{port}")
        } else {
            format!("{host}:{port}")
        };
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri(&target)
            .header(header::HOST, &target);
        if let Some(authorization) = &self.authorization {
            request = request.header(header::PROXY_AUTHORIZATION, authorization);
        }
        let request = request
            .body(Empty::<Bytes>::new())
            .map_err(io::Error::other)?;
        let ask = async {
            let response = sender
                .send_request(request)
                .await
                .map_err(io::Error::other)?;
            if !response.status().is_success() {
                let text = format!("the proxy answered {}", response.status());
                return Err(io::Error::new(io::ErrorKind::ConnectionRefused, text));
            }
            hyper::upgrade::on(response).await.map_err(io::Error::other)
        };
        // The connection hands its stream over once the tunnel stands, and then ends.
        let (upgraded, ended) = tokio::join!(ask, connection.with_upgrades());
        let upgraded = upgraded?;
        ended.map_err(io::Error::other)?;
        let parts = upgraded
            .downcast::<TokioIo<TcpStream>>()
            .map_err(|_| io::Error::other("the tunnel is not the connection to the proxy"))?;
        if !parts.read_buf.is_empty() {
            // TLS begins with us: what came before is not from the host.
            return Err(io::Error::other("the proxy sent bytes of its own"));
        }
        Ok(parts.io.into_inner())
    }
}

fn host_and_port(address: &str) -> Result<(String, u16), ProxyError> {
    let (host, port) = match address.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or(ProxyError::Form)?;
            (host, rest.strip_prefix(':'))
        }
        None => match address.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (address, None),
        },
    };
    let port = port.map_or(Ok(80), |port| port.parse().map_err(|_| ProxyError::Form))?;
    if host.is_empty() || host.contains(char::is_whitespace) {
        return Err(ProxyError::Form);
    }
    Ok((host.to_owned(), port))
}

/// `Basic …` of percent-encoded `user[:password]` (RFC 7617).
fn basic(user: &str) -> Result<String, ProxyError> {
    let decode = |text| {
        percent_decode_str(text)
            .decode_utf8()
            .map_err(|_| ProxyError::Encoding)
    };
    let (name, password) = user.split_once(':').unwrap_or((user, ""));
    let pair = format!("{}:{}", decode(name)?, decode(password)?);
    Ok(format!("Basic {}", base64(pair.as_bytes())))
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    fn proxy(https_proxy: &str, no_proxy: &str) -> Proxy {
        Proxy::parse(https_proxy, no_proxy).unwrap().unwrap()
    }

    #[test]
    fn urls_of_proxies_are_read() {
        for (text, host, port, authorization) in [
            ("http://proxy:3128", "proxy", 3128, None),
            ("HTTP://proxy/", "proxy", 80, None),
            ("proxy:8080", "proxy", 8080, None),
            ("http://[::1]:3128", "::1", 3128, None),
            (
                "http://u:p%40ss@proxy:1",
                "proxy",
                1,
                Some("Basic dTpwQHNz"),
            ),
            ("http://u@proxy:1", "proxy", 1, Some("Basic dTo=")),
        ] {
            let got = proxy(text, "");
            assert_eq!(
                (got.address(), got.authorization.as_deref()),
                ((host, port), authorization)
            );
            assert!(!format!("{got:?}").contains("Basic"));
        }
        assert_eq!(Proxy::parse(" ", ""), Ok(None));
        for (text, error) in [
            ("https://proxy", ProxyError::Scheme),
            ("http://", ProxyError::Form),
            ("http://proxy:port", ProxyError::Form),
            ("http://proxy/path", ProxyError::Form),
            ("http://%ff@proxy", ProxyError::Encoding),
        ] {
            assert_eq!(Proxy::parse(text, ""), Err(error), "{text}");
        }
    }

    #[test]
    fn excepted_hosts_are_whole_names_and_domains() {
        let proxy = proxy("http://p", "parent.local, .plant.example,*.lab");
        for (host, covered) in [
            ("parent.local", false),
            ("PARENT.local", false),
            ("a.parent.local", false),
            ("grandparent.local", true),
            ("x.plant.example", false),
            ("plant.example", false),
            ("implant.example", true),
            ("h.lab", false),
            ("h.azure-devices.net", true),
        ] {
            assert_eq!(proxy.covers(host), covered, "{host}");
        }
        assert!(!Proxy::parse("http://p", "*").unwrap().unwrap().covers("h"));
    }

    /// What the proxy was asked, and what became of the tunnel.
    async fn ask(answer: &'static str) -> (String, io::Result<u8>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serve = async {
            let (mut socket, _) = listener.accept().await.unwrap();
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(socket.read_u8().await.unwrap());
            }
            socket.write_all(answer.as_bytes()).await.unwrap();
            // The peer goes away at once when it was refused.
            let _ = socket.write_u8(*b"!".first().unwrap()).await;
            String::from_utf8(head).unwrap()
        };
        let dial = async {
            let stream = TcpStream::connect(address).await?;
            let proxy = proxy("http://u:p@proxy:1", "");
            let mut tunnel = proxy.tunnel(stream, "h.example", 443).await?;
            tunnel.read_u8().await
        };
        tokio::join!(serve, dial)
    }

    #[tokio::test]
    async fn a_tunnel_is_asked_for_and_used() {
        let (head, refused) =
            ask("HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 1\r\n\r\n").await;
        assert!(
            head.starts_with("CONNECT h.example:443 HTTP/1.1\r\n"),
            "{head}"
        );
        assert!(
            head.to_ascii_lowercase()
                .contains("proxy-authorization: basic"),
            "{head}"
        );
        assert!(refused.unwrap_err().to_string().contains("407"));
    }

    #[tokio::test]
    async fn bytes_that_the_proxy_slips_in_are_refused() {
        let (_, answer) = ask("HTTP/1.1 200 Connection established\r\n\r\nx").await;
        assert!(answer.is_err(), "{answer:?}");
    }
}
