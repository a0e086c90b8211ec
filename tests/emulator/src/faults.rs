//! Failures that a test orders: the next N requests of a kind, or all of them until the order is
//! cleared; of everybody, or of one identity. A throttled device is such an order: a standing 429.

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use crate::identity::Identity;
use crate::limits::{
    CONDITION_CHARS_MAX, FAULT_CONTENT_BYTES_MAX, FAULT_COUNT_MAX, FAULT_ORDERS_MAX,
};

/// What can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FaultKind {
    /// Attach of an AMQP link of a device: the link is detached with an error.
    Attach,
    /// MQTT CONNECT: answered with a CONNACK code from 1 to 5, then closed.
    Connect,
    /// MQTT PUBLISH of telemetry: the connection is closed, the message neither stored nor
    /// acknowledged.
    Publish,
    /// AMQP put-token: answered with a status from 400 to 599.
    PutToken,
    /// Registry call: answered with an HTTP status from 400 to 599.
    Registry,
    /// Scope call: answered with an HTTP status from 400 to 599.
    Scope,
    /// Twin, method or query call of the service side: answered with an HTTP status from 400 to
    /// 599.
    Service,
    /// AMQP transfer of telemetry: rejected with an error, the messages are not stored.
    Transfer,
    /// Twin request of a device: answered with a status from 400 to 599.
    Twin,
}

/// What happens instead of the answer that the kind usually fails with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FaultAnswer {
    /// What the kind says.
    #[default]
    Refuse,
    /// The connection is closed with the error.
    Close,
    /// The link is detached with the error.
    Detach,
    /// The transfer's outcome is `modified`.
    Modify,
    /// The transfer's outcome is `released`.
    Release,
    /// Nothing is answered.
    Silence,
}

/// An order: the next `count` requests of `kind`, or all while it stands, fail with `code`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fault {
    pub(crate) kind: FaultKind,
    /// Whose requests; everybody's when there is none. The order of an identity goes before that
    /// of everybody.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) client_id: Option<String>,
    /// Has to be there unless the order stands. 0 takes the order back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) count: Option<u32>,
    /// Until somebody clears it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) standing: bool,
    /// None takes the kind's default: CONNACK 3 or status 500. A publish has no code.
    pub(crate) code: Option<u16>,
    /// The AMQP error condition, where that of the code is not what a test wants.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) condition: Option<String>,
    /// Only transfers whose bytes contain this text, in whichever message of a batch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) containing: Option<String>,
    /// None is [`FaultAnswer::Refuse`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) answer: Option<FaultAnswer>,
}

/// Why an order can not be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FaultError {
    #[error("the kind can not be answered like that")]
    Answer,
    #[error("client_id is neither `device` nor `device/module`")]
    ClientId,
    #[error("the kind has no such code")]
    Code,
    #[error("only `attach` and `transfer` have a condition, which is an ASCII symbol")]
    Condition,
    #[error("only `transfer` has content, of 1 to {FAULT_CONTENT_BYTES_MAX} bytes")]
    Content,
    #[error("an order has either a count of at most {FAULT_COUNT_MAX}, or it is standing")]
    Count,
    #[error("there are {FAULT_ORDERS_MAX} orders, the limit")]
    TooMany,
}

/// How one request fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: u16,
    condition: Option<String>,
    pub(crate) answer: FaultAnswer,
}

impl Failure {
    /// The AMQP error condition of this failure: the one that was ordered, or the one that IoT Hub
    /// has for the status (spec/upstream.md B9).
    pub(crate) fn condition(&self) -> &str {
        let usual = match self.code {
            400 => "com.microsoft:argument-error",
            401 => "amqp:unauthorized-access",
            403 => "amqp:resource-limit-exceeded",
            404 => "amqp:not-found",
            412 => "com.microsoft:message-lock-lost",
            413 => "amqp:link:message-size-exceeded",
            429 => "com.microsoft:device-container-throttled",
            503 => "amqp:link:detach-forced",
            504 => "com.microsoft:timeout",
            _ => "amqp:internal-error",
        };
        self.condition.as_deref().unwrap_or(usual)
    }
}

impl Fault {
    /// The order of this many failures of everybody, for tests of this crate.
    #[cfg(test)]
    pub(crate) fn of(kind: FaultKind, count: u32, code: Option<u16>) -> Self {
        Self {
            kind,
            client_id: None,
            count: Some(count),
            standing: false,
            code,
            condition: None,
            containing: None,
            answer: None,
        }
    }

    fn identity(&self) -> Result<Option<Identity>, FaultError> {
        let parsed = self.client_id.as_deref().map(Identity::parse).transpose();
        parsed.map_err(|_| FaultError::ClientId)
    }

    /// How a request of this order fails.
    fn failure(&self) -> Result<Failure, FaultError> {
        use FaultAnswer::{Close, Detach, Modify, Refuse, Release, Silence};
        use FaultKind::{
            Attach, Connect, Publish, PutToken, Registry, Scope, Service, Transfer, Twin,
        };
        let (default, allowed) = match self.kind {
            Connect => (3, 1..=5),
            Publish => (0, 0..=0),
            Attach | PutToken | Registry | Scope | Service | Transfer | Twin => (500, 400..=599),
        };
        let code = self.code.unwrap_or(default);
        if !allowed.contains(&code) {
            return Err(FaultError::Code);
        }
        let answer = self.answer.unwrap_or_default();
        let fits = match answer {
            Refuse => true,
            Detach | Modify | Release => self.kind == Transfer,
            Close | Silence => matches!(self.kind, Attach | PutToken | Transfer),
        };
        if !fits {
            return Err(FaultError::Answer);
        }
        let is_symbol = |text: &String| {
            (1..=CONDITION_CHARS_MAX).contains(&text.len())
                && text.bytes().all(|byte| byte.is_ascii_graphic())
        };
        let has_condition = matches!(self.kind, Attach | Transfer);
        if !self
            .condition
            .as_ref()
            .is_none_or(|text| has_condition && is_symbol(text))
        {
            return Err(FaultError::Condition);
        }
        let sizes = 1..=FAULT_CONTENT_BYTES_MAX;
        let is_content = |text: &String| self.kind == Transfer && sizes.contains(&text.len());
        if !self.containing.as_ref().is_none_or(is_content) {
            return Err(FaultError::Content);
        }
        Ok(Failure {
            code,
            condition: self.condition.clone(),
            answer,
        })
    }
}

/// An order that was checked.
#[derive(Debug)]
struct Order {
    fault: Fault,
    identity: Option<Identity>,
    failure: Failure,
}

impl Order {
    fn meets(&self, bytes: &[u8]) -> bool {
        self.fault.containing.as_ref().is_none_or(|text| {
            let mut windows = bytes.windows(text.len());
            windows.any(|window| window == text.as_bytes())
        })
    }
}

/// The orders that are not used up, at most one for a kind and an identity, and one for a kind and
/// everybody.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    orders: Mutex<Vec<Order>>,
}

impl Faults {
    /// Replaces the order of the fault's kind and identity.
    ///
    /// # Errors
    /// It is none that can be carried out; nothing is changed then.
    pub(crate) fn set(&self, fault: Fault) -> Result<(), FaultError> {
        let (identity, failure) = (fault.identity()?, fault.failure()?);
        let counts = fault.count.is_some_and(|count| count <= FAULT_COUNT_MAX);
        if (fault.count.is_some() && !counts) || fault.standing == counts {
            return Err(FaultError::Count);
        }
        let mut orders = self.orders.lock();
        let is_it = |order: &Order| order.fault.kind == fault.kind && order.identity == identity;
        if fault.count == Some(0) {
            orders.retain(|order| !is_it(order));
            return Ok(());
        }
        if orders.iter().filter(|order| !is_it(order)).count() >= FAULT_ORDERS_MAX {
            return Err(FaultError::TooMany);
        }
        orders.retain(|order| !is_it(order));
        orders.push(Order {
            fault,
            identity,
            failure,
        });
        Ok(())
    }

    /// Drops the orders of this kind and this identity; none stands for all of them.
    pub(crate) fn clear(&self, kind: Option<FaultKind>, identity: Option<&Identity>) {
        self.orders.lock().retain(|order| {
            kind.is_some_and(|kind| order.fault.kind != kind)
                || identity.is_some_and(|identity| order.identity.as_ref() != Some(identity))
        });
    }

    pub(crate) fn list(&self) -> Vec<Fault> {
        let orders = self.orders.lock();
        orders.iter().map(|order| order.fault.clone()).collect()
    }

    /// Uses up one failure of this kind, of this identity if the request belongs to one.
    pub(crate) fn take(&self, kind: FaultKind, who: Option<&Identity>) -> Option<Failure> {
        self.take_with(kind, who, &[])
    }

    /// As [`Faults::take`], of a transfer with these bytes.
    pub(crate) fn take_transfer(&self, who: &Identity, bytes: &[u8]) -> Option<Failure> {
        self.take_with(FaultKind::Transfer, Some(who), bytes)
    }

    fn take_with(&self, kind: FaultKind, who: Option<&Identity>, bytes: &[u8]) -> Option<Failure> {
        let mut orders = self.orders.lock();
        let find = |wanted: Option<&Identity>| {
            orders.iter().position(|order| {
                order.fault.kind == kind && order.identity.as_ref() == wanted && order.meets(bytes)
            })
        };
        let own = who.and_then(|who| find(Some(who)));
        let at = own.or_else(|| find(None))?;
        let order = orders.get_mut(at)?;
        let failure = order.failure.clone();
        if let Some(count) = &mut order.fault.count {
            *count -= 1;
            if *count == 0 {
                orders.remove(at);
            }
        }
        Some(failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(faults: &Faults, kind: FaultKind, who: Option<&Identity>) -> Option<u16> {
        faults.take(kind, who).map(|failure| failure.code)
    }

    #[test]
    fn an_order_is_used_up() {
        let faults = Faults::default();
        faults
            .set(Fault::of(FaultKind::Connect, 2, Some(5)))
            .unwrap();
        faults.set(Fault::of(FaultKind::Scope, 1, None)).unwrap();
        assert_eq!(code(&faults, FaultKind::Publish, None), None);
        assert_eq!(code(&faults, FaultKind::Connect, None), Some(5));
        assert_eq!(code(&faults, FaultKind::Scope, None), Some(500));
        assert_eq!(code(&faults, FaultKind::Connect, None), Some(5));
        assert_eq!(code(&faults, FaultKind::Connect, None), None);
        assert_eq!(faults.list(), []);
    }

    #[test]
    fn the_order_of_an_identity_stands_beside_that_of_everybody() {
        let faults = Faults::default();
        let leaf = Identity::parse("leaf1").unwrap();
        let other = Identity::parse("leaf2").unwrap();
        let standing = Fault {
            client_id: Some("leaf1".to_owned()),
            count: None,
            standing: true,
            ..Fault::of(FaultKind::Transfer, 1, Some(429))
        };
        faults.set(standing).unwrap();
        faults.set(Fault::of(FaultKind::Transfer, 1, None)).unwrap();
        for _ in 0..3 {
            let failure = faults.take(FaultKind::Transfer, Some(&leaf)).unwrap();
            assert_eq!(
                failure.condition(),
                "com.microsoft:device-container-throttled"
            );
        }
        assert_eq!(code(&faults, FaultKind::Transfer, Some(&other)), Some(500));
        assert_eq!(code(&faults, FaultKind::Transfer, Some(&other)), None);
        faults.clear(Some(FaultKind::Twin), Some(&leaf));
        faults.clear(None, Some(&other));
        assert_eq!(faults.list().len(), 1);
        faults.clear(None, Some(&leaf));
        assert_eq!(code(&faults, FaultKind::Transfer, Some(&leaf)), None);
    }

    #[test]
    fn an_order_may_be_about_content() {
        let faults = Faults::default();
        let leaf = Identity::parse("leaf1").unwrap();
        let order = |kind, text: &str| Fault {
            containing: Some(text.to_owned()),
            ..Fault::of(kind, 1, Some(400))
        };
        for (kind, text) in [(FaultKind::Twin, "poison"), (FaultKind::Transfer, "")] {
            assert_eq!(faults.set(order(kind, text)), Err(FaultError::Content));
        }
        faults.set(order(FaultKind::Transfer, "poison")).unwrap();
        assert_eq!(faults.take_transfer(&leaf, b"a poiso"), None);
        assert_eq!(faults.list().len(), 1);
        let failure = faults.take_transfer(&leaf, b"a poison.").unwrap();
        assert_eq!(failure.condition(), "com.microsoft:argument-error");
        assert_eq!(faults.take_transfer(&leaf, b"a poison."), None);
    }

    #[test]
    fn orders_are_replaced_taken_back_and_bounded() {
        let faults = Faults::default();
        let order = |n: usize| Fault {
            client_id: Some(format!("leaf{n}")),
            ..Fault::of(FaultKind::Twin, 1, None)
        };
        for n in 0..FAULT_ORDERS_MAX {
            faults.set(order(n)).unwrap();
        }
        assert_eq!(
            faults.set(order(FAULT_ORDERS_MAX)),
            Err(FaultError::TooMany)
        );
        faults.set(order(0)).unwrap();
        let back = Fault {
            count: Some(0),
            ..order(0)
        };
        faults.set(back).unwrap();
        assert_eq!(faults.list().len(), FAULT_ORDERS_MAX - 1);
    }

    #[test]
    fn odd_orders_are_refused() {
        let transfer = || Fault::of(FaultKind::Transfer, 1, None);
        let twin = || Fault::of(FaultKind::Twin, 1, None);
        let odd = [
            (
                Fault {
                    count: None,
                    ..twin()
                },
                FaultError::Count,
            ),
            (
                Fault {
                    standing: true,
                    ..twin()
                },
                FaultError::Count,
            ),
            (
                Fault {
                    count: Some(FAULT_COUNT_MAX + 1),
                    ..twin()
                },
                FaultError::Count,
            ),
            (
                Fault {
                    client_id: Some("a b".to_owned()),
                    ..twin()
                },
                FaultError::ClientId,
            ),
            (
                Fault {
                    code: Some(204),
                    ..twin()
                },
                FaultError::Code,
            ),
            (
                Fault {
                    answer: Some(FaultAnswer::Release),
                    ..twin()
                },
                FaultError::Answer,
            ),
            (
                Fault {
                    condition: Some("amqp:x".to_owned()),
                    ..twin()
                },
                FaultError::Condition,
            ),
            (
                Fault {
                    condition: Some(String::new()),
                    ..transfer()
                },
                FaultError::Condition,
            ),
        ];
        for (fault, error) in odd {
            assert_eq!(Faults::default().set(fault), Err(error));
        }
        let good = Fault {
            condition: Some("amqp:x".to_owned()),
            answer: Some(FaultAnswer::Detach),
            ..transfer()
        };
        let faults = Faults::default();
        faults.set(good).unwrap();
        let failure = faults.take(FaultKind::Transfer, None).unwrap();
        assert_eq!(failure.condition(), "amqp:x");
    }
}
