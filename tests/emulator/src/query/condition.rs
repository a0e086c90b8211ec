//! The condition of a query, and whether it is true of a document.

use serde_json::Value;

/// Names from the root of a document down.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Path(pub(super) Vec<String>);

impl Path {
    pub(super) fn find<'a>(&self, document: &'a Value) -> Option<&'a Value> {
        self.0.iter().try_fold(document, |value, name| {
            value.as_object().and_then(|object| object.get(name))
        })
    }
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Condition {
    And(Vec<Self>),
    ArrayContains { path: Path, literal: Value },
    Equals { path: Path, literal: Value },
    In { path: Path, literals: Vec<Value> },
    IsDefined(Path),
    Not(Box<Self>),
    Or(Vec<Self>),
    StartsWith { path: Path, prefix: String },
}

impl Condition {
    /// None when it can not be said, because the document lacks what it is about.
    pub(super) fn truth(&self, document: &Value) -> Option<bool> {
        match self {
            Self::And(all) => decide(all, document, false),
            Self::Or(any) => decide(any, document, true),
            Self::Not(inner) => inner.truth(document).map(|truth| !truth),
            Self::IsDefined(path) => Some(path.find(document).is_some()),
            Self::Equals { path, literal } => path.find(document).map(|value| same(value, literal)),
            Self::In { path, literals } => path
                .find(document)
                .map(|value| literals.iter().any(|literal| same(value, literal))),
            Self::StartsWith { path, prefix } => path
                .find(document)?
                .as_str()
                .map(|text| text.starts_with(prefix.as_str())),
            Self::ArrayContains { path, literal } => path
                .find(document)?
                .as_array()
                .map(|items| items.iter().any(|item| same(item, literal))),
        }
    }
}

/// The truth of several: `decisive` as soon as one has it, the opposite when all have that.
fn decide(conditions: &[Condition], document: &Value, decisive: bool) -> Option<bool> {
    let mut unknown = false;
    for condition in conditions {
        match condition.truth(document) {
            Some(truth) if truth == decisive => return Some(decisive),
            Some(_) => {}
            None => unknown = true,
        }
    }
    (!unknown).then_some(!decisive)
}

/// Equality as JSON has it, but 1 is 1.0.
fn same(value: &Value, literal: &Value) -> bool {
    match (value, literal) {
        (Value::Number(value), Value::Number(literal)) => {
            value == literal || value.as_f64() == literal.as_f64()
        }
        _ => value == literal,
    }
}
