//! By which way the upstream is reached: AMQP on its own port, or in a WebSocket on the HTTPS port.
//!
//! With `UpstreamProtocol` unset both are open: the own port first, the WebSocket when nothing came
//! of that. A WebSocket that had to be taken is taken first for a while, then the own port is tried
//! again; connections that live are left where they are (design.md D18).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::time::sleep;
use tracing::info;

use crate::{
    dial::{ByteIo, Carrier, DialError, Dialer},
    limits,
};

/// How long a WebSocket that had to be taken is taken first.
const WEB_SOCKET_FIRST: Duration = Duration::from_secs(600);

/// An attempt that has taken this long has company: what an outage swallowed of it would be sent
/// again only much later, and a firewall that drops packets says nothing.
const HEDGE_AFTER: Duration = Duration::from_secs(4);

/// One way to the upstream.
#[derive(Clone, Debug)]
pub struct Way {
    /// How connections are made.
    pub dialer: Dialer,
    /// The port at the upstream.
    pub port: u16,
    /// What AMQP is spoken on there.
    pub carrier: Carrier,
}

/// The ways that may be taken, the preferred one first.
#[derive(Debug)]
pub(super) struct Ways {
    ways: Vec<Way>,
    /// A later way than the first was the one that led somewhere.
    fallback: Mutex<Option<Fallback>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fallback {
    way: usize,
    until: Instant,
}

type Attempt = std::pin::Pin<Box<dyn Future<Output = (usize, Dialed)> + Send>>;
type Dialed = Result<Box<dyn ByteIo>, DialError>;

impl Ways {
    pub(super) fn new(ways: Vec<Way>) -> Self {
        Self {
            ways,
            fallback: Mutex::new(None),
        }
    }

    /// The order in which the ways are tried now.
    fn order(&self, now: Instant) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.ways.len()).collect();
        let fallback = *self.fallback.lock();
        if let Some(fallback) = fallback.filter(|fallback| now < fallback.until) {
            order.retain(|way| *way != fallback.way);
            order.insert(0, fallback.way);
        }
        order
    }

    /// A way led to the upstream.
    fn led(&self, way: usize, now: Instant) {
        let mut fallback = self.fallback.lock();
        if way == 0 {
            if fallback.take().is_some() {
                info!("the upstream is reached on the AMQP port again");
            }
        } else if fallback.is_none_or(|old| now >= old.until) {
            info!("the upstream is not reached on the AMQP port: a WebSocket is used");
            let until = now + WEB_SOCKET_FIRST;
            *fallback = Some(Fallback { way, until });
        }
    }

    fn attempt(&self, way: usize) -> Option<Attempt> {
        let Way {
            dialer,
            port,
            carrier,
        } = self.ways.get(way)?.clone();
        Some(Box::pin(
            async move { (way, dialer.open(port, carrier).await) },
        ))
    }

    /// Opens what AMQP is spoken on: each way in turn, the next when one has failed or takes long.
    ///
    /// # Errors
    ///
    /// What became of each attempt, when none of them led anywhere.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes whatever was opened.
    pub(super) async fn dial(
        &self,
        now: impl Fn() -> Instant,
    ) -> Result<Box<dyn ByteIo>, Arc<str>> {
        let order = self.order(now());
        let mut next = 0;
        let mut attempts: Vec<Attempt> = Vec::new();
        let mut failures: Vec<String> = Vec::new();
        loop {
            if attempts.is_empty() {
                // Each way once; again only beside an attempt that hangs.
                let Some(way) = order.get(next) else {
                    return Err(failures.join("; ").into());
                };
                attempts.extend(self.attempt(*way));
                next += 1;
            }
            tokio::select! {
                (way, dialed) = first(&mut attempts) => match dialed {
                    Ok(stream) => {
                        self.led(way, now());
                        return Ok(stream);
                    }
                    Err(error) => failures.push(error.to_string()),
                },
                () = sleep(HEDGE_AFTER), if attempts.len() < limits::AMQP_DIALS_MAX => {
                    if let Some(way) = order.get(next % order.len().max(1)) {
                        attempts.extend(self.attempt(*way));
                    }
                    next += 1;
                }
            }
        }
    }
}

/// Waits for whichever ends first, and takes it out.
async fn first(attempts: &mut Vec<Attempt>) -> (usize, Dialed) {
    std::future::poll_fn(|context| {
        for index in 0..attempts.len() {
            let Some(attempt) = attempts.get_mut(index) else {
                break;
            };
            if let std::task::Poll::Ready(done) = attempt.as_mut().poll(context) {
                drop(attempts.swap_remove(index));
                return std::task::Poll::Ready(done);
            }
        }
        std::task::Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ways(count: usize) -> Ways {
        let tls = crate::test_support::no_tls();
        let dialer = Dialer::new("127.0.0.1", None, tls, Duration::from_secs(1));
        let way = Way {
            dialer,
            port: 1,
            carrier: Carrier::Tls,
        };
        Ways::new(vec![way; count])
    }

    #[test]
    fn a_fallback_is_taken_first_for_a_while() {
        let now = tokio::time::Instant::now().into_std();
        let ways = ways(2);
        assert_eq!(ways.order(now), [0, 1]);
        ways.led(1, now);
        assert_eq!(ways.order(now + WEB_SOCKET_FIRST / 2), [1, 0]);
        // Used again meanwhile: the own port is tried at the same time all the same.
        ways.led(1, now + WEB_SOCKET_FIRST / 2);
        assert_eq!(ways.order(now + WEB_SOCKET_FIRST), [0, 1]);
        ways.led(1, now + WEB_SOCKET_FIRST);
        assert_eq!(ways.order(now + WEB_SOCKET_FIRST), [1, 0]);
        ways.led(0, now + WEB_SOCKET_FIRST);
        assert_eq!(ways.order(now + WEB_SOCKET_FIRST), [0, 1]);
    }

    #[tokio::test]
    async fn when_no_way_leads_anywhere_each_is_named() {
        let now = || tokio::time::Instant::now().into_std();
        let Err(error) = ways(2).dial(now).await else {
            panic!("nobody listens on port 1")
        };
        assert_eq!(error.matches("cannot connect").count(), 2, "{error}");
    }
}
