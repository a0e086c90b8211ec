//! Documents and patches for tests.

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::json::{Object, Value};

/// An object of its text.
pub(super) fn json(text: &str) -> Object {
    Object::parse(text.as_bytes(), 32).unwrap()
}

/// Few names, so that patches meet.
fn name() -> impl Strategy<Value = String> {
    proptest::sample::select(vec!["a", "b", "c", "ä\"\\\n", "with space"]).prop_map(str::to_owned)
}

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        any::<bool>().prop_map(Value::Bool),
        any::<i32>().prop_map(|n| Value::Number(n.to_string().into())),
        Just(Value::Number("2.5".into())),
        "[ -~äöü😀\\n\\u0001]{0,6}".prop_map(Value::Text),
    ]
}

fn nested(leaf: BoxedStrategy<Value>) -> BoxedStrategy<Value> {
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            1 => vec(inner.clone(), 0..3).prop_map(Value::Array),
            3 => btree_map(name(), inner, 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
    .boxed()
}

fn object_of(value: BoxedStrategy<Value>) -> impl Strategy<Value = Object> {
    btree_map(name(), value, 0..4).prop_map(|members| members.into_iter().collect())
}

/// Any value.
pub(super) fn value() -> impl Strategy<Value = Value> {
    nested(prop_oneof![scalar(), Just(Value::Null)].boxed())
}

/// Any object.
pub(super) fn object() -> impl Strategy<Value = Object> {
    object_of(value().boxed())
}

/// An object without null members, arrays included: what merging makes.
pub(super) fn document() -> impl Strategy<Value = Object> {
    object_of(nested(scalar().boxed()))
}

/// A patch: with null members, but not in arrays.
pub(super) fn patch() -> impl Strategy<Value = Object> {
    let array = vec(scalar(), 0..3).prop_map(Value::Array);
    let leaf = prop_oneof![3 => scalar(), 2 => Just(Value::Null), 1 => array].boxed();
    let tree = leaf.prop_recursive(3, 24, 4, |inner| {
        btree_map(name(), inner, 0..4)
            .prop_map(|members| Value::Object(members.into_iter().collect()))
    });
    object_of(tree.boxed())
}
