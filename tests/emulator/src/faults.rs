//! Failures that a test orders: the next N requests of a kind.

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// What can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FaultKind {
    /// MQTT CONNECT: answered with a CONNACK code from 1 to 5, then closed.
    Connect,
    /// MQTT PUBLISH of telemetry: the connection is closed, the message neither stored nor
    /// acknowledged.
    Publish,
    /// Registry call: answered with an HTTP status from 400 to 599.
    Registry,
    /// Scope call: answered with an HTTP status from 400 to 599.
    Scope,
    /// Twin or method call of the service side: answered with an HTTP status from 400 to 599.
    Service,
    /// Twin request of a device: answered with a status from 400 to 599.
    Twin,
}

/// An order: the next `count` requests of `kind` fail with `code`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fault {
    pub(crate) kind: FaultKind,
    pub(crate) count: u32,
    /// None takes the kind's default: CONNACK 3 or HTTP 500. A publish has no code.
    pub(crate) code: Option<u16>,
}

impl Fault {
    /// The code to fail with, if the order is one that can be carried out.
    pub(crate) fn checked_code(&self) -> Option<u16> {
        let (default, allowed) = match self.kind {
            FaultKind::Connect => (3, 1..=5),
            FaultKind::Publish => (0, 0..=0),
            FaultKind::Registry | FaultKind::Scope | FaultKind::Service | FaultKind::Twin => {
                (500, 400..=599)
            }
        };
        Some(self.code.unwrap_or(default)).filter(|code| allowed.contains(code))
    }
}

/// The orders that are not used up, at most one per kind.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    orders: Mutex<Vec<Fault>>,
}

impl Faults {
    /// Replaces the order of the fault's kind.
    pub(crate) fn set(&self, fault: Fault) {
        let mut orders = self.orders.lock();
        orders.retain(|order| order.kind != fault.kind);
        if fault.count > 0 {
            orders.push(fault);
        }
    }

    pub(crate) fn clear(&self) {
        self.orders.lock().clear();
    }

    pub(crate) fn list(&self) -> Vec<Fault> {
        self.orders.lock().clone()
    }

    /// Uses up one failure of this kind; returns its code.
    pub(crate) fn take(&self, kind: FaultKind) -> Option<u16> {
        let mut orders = self.orders.lock();
        let order = orders.iter_mut().find(|order| order.kind == kind)?;
        order.count -= 1;
        let code = order.checked_code();
        orders.retain(|order| order.count > 0);
        code
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_used_up() {
        let faults = Faults::default();
        faults.set(Fault {
            kind: FaultKind::Connect,
            count: 2,
            code: Some(5),
        });
        faults.set(Fault {
            kind: FaultKind::Scope,
            count: 1,
            code: None,
        });
        assert_eq!(faults.take(FaultKind::Publish), None);
        assert_eq!(faults.take(FaultKind::Connect), Some(5));
        assert_eq!(faults.take(FaultKind::Scope), Some(500));
        assert_eq!(faults.take(FaultKind::Connect), Some(5));
        assert_eq!(faults.take(FaultKind::Connect), None);
        assert_eq!(faults.list(), []);
    }
}
