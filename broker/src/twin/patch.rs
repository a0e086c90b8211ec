//! Merging patches, making them, and adding them up.
//!
//! A patch is a JSON merge patch (RFC 7396): objects merge, null deletes, everything else
//! replaces. The algebra behind what follows, with `x * p` for "x merged with p":
//!
//! - `a * diff(a, b) == b`, for documents without null members.
//! - Patches do not add up to one patch: after `{"a":null}` and `{"a":{"b":1}}` whatever `a` held
//!   before is gone, which no single patch can say. [`Unsynced`] is a pair of patches, and pairs
//!   add up exactly: `x * sum(p1 … pn) == x * p1 * … * pn`, whatever `x` is.
//! - Applying a sum again changes nothing, not even when a beginning of it was applied in between.

use bytes::Bytes;

use super::json::{Object, Value};
use super::limits::PATCH_BYTES_MAX;

/// Merges `patch` into `target`.
pub(super) fn merge(target: &mut Object, patch: &Object) {
    for (name, value) in patch.iter() {
        match value {
            Value::Null => drop(target.remove(name)),
            Value::Object(inner) => {
                if let Some(Value::Object(target)) = target.get_mut(name) {
                    merge(target, inner);
                } else {
                    target.insert(name, Value::Object(without_nulls(inner)));
                }
            }
            other => target.insert(name, other.clone()),
        }
    }
}

/// What a patch makes of nothing: its objects without their null members.
pub(super) fn without_nulls(patch: &Object) -> Object {
    let mut made = Object::default();
    merge(&mut made, patch);
    made
}

/// The patch that turns `old` into `new`. Neither may hold null members.
pub(super) fn diff(old: &Object, new: &Object) -> Object {
    let mut patch = Object::default();
    for (name, _) in old.iter() {
        if new.get(name).is_none() {
            patch.insert(name, Value::Null);
        }
    }
    for (name, value) in new.iter() {
        match (old.get(name), value) {
            (Some(Value::Object(old)), Value::Object(new)) => {
                let inner = diff(old, new);
                if !inner.is_empty() {
                    patch.insert(name, Value::Object(inner));
                }
            }
            (Some(old), new) if old == new => {}
            (_, new) => patch.insert(name, new.clone()),
        }
    }
    patch
}

/// The sum of the patches that the upstream does not know: first `erase`, a tree whose leaves are
/// all null, then `set`, which has no nulls.
///
/// Where `erase` has an object, `set` has one too; where it has null, `set` has nothing or an
/// object, which is then all that is left there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Unsynced {
    erase: Object,
    set: Object,
}

impl Unsynced {
    /// The parts as they were stored.
    pub(super) fn from_parts(erase: Object, set: Object) -> Self {
        Self { erase, set }
    }

    pub(super) fn erase(&self) -> &Object {
        &self.erase
    }

    pub(super) fn set(&self) -> &Object {
        &self.set
    }

    pub(super) fn is_empty(&self) -> bool {
        self.erase.is_empty() && self.set.is_empty()
    }

    /// Adds a patch that came after the others.
    pub(super) fn add(&mut self, patch: &Object) {
        add(&mut self.erase, &mut self.set, patch);
    }

    /// Merges all of it into `target`.
    pub(super) fn apply(&self, target: &mut Object) {
        merge(target, &self.erase);
        merge(target, &self.set);
    }

    /// The patches that say all of it, to be sent one after the other: one if possible, and none
    /// larger than an upstream takes.
    pub(super) fn patches(&self) -> Vec<Bytes> {
        if self.is_empty() {
            return Vec::new();
        }
        if let Some(one) = joined(&self.erase, &self.set) {
            let text = one.to_bytes();
            if text.len() <= PATCH_BYTES_MAX {
                return vec![text];
            }
        }
        // What deletes goes first: it makes room for the rest.
        let mut patches = Vec::new();
        for part in [&self.erase, &self.set] {
            if !part.is_empty() {
                patches.extend(split(part, PATCH_BYTES_MAX));
            }
        }
        patches.iter().map(Object::to_bytes).collect()
    }
}

fn add(erase: &mut Object, set: &mut Object, patch: &Object) {
    for (name, value) in patch.iter() {
        match value {
            Value::Null => {
                set.remove(name);
                erase.insert(name, Value::Null);
            }
            Value::Object(inner) => add_object(erase, set, name, inner),
            other => {
                // It replaces what is there anyhow.
                erase.remove(name);
                set.insert(name, other.clone());
            }
        }
    }
}

fn add_object(erase: &mut Object, set: &mut Object, name: &str, patch: &Object) {
    if matches!(erase.get(name), Some(Value::Null)) {
        // What was there before is deleted first: only what came since counts.
        match set.get_mut(name) {
            Some(Value::Object(set)) => merge(set, patch),
            _ => set.insert(name, Value::Object(without_nulls(patch))),
        }
        return;
    }
    match set.get_mut(name) {
        Some(Value::Object(inner_set)) => {
            let mut inner_erase = match erase.remove(name) {
                Some(Value::Object(object)) => object,
                _ => Object::default(),
            };
            add(&mut inner_erase, inner_set, patch);
            if !inner_erase.is_empty() {
                erase.insert(name, Value::Object(inner_erase));
            }
        }
        // A scalar replaced what was there, and an object replaces that.
        Some(scalar) => {
            *scalar = Value::Object(without_nulls(patch));
            erase.insert(name, Value::Null);
        }
        None => {
            let (mut inner_erase, mut inner_set) = (Object::default(), Object::default());
            add(&mut inner_erase, &mut inner_set, patch);
            set.insert(name, Value::Object(inner_set));
            if !inner_erase.is_empty() {
                erase.insert(name, Value::Object(inner_erase));
            }
        }
    }
}

/// Both parts as one patch; none where something is to be deleted and then made anew.
fn joined(erase: &Object, set: &Object) -> Option<Object> {
    let mut patch = set.clone();
    join(erase, &mut patch)?;
    Some(patch)
}

fn join(erase: &Object, patch: &mut Object) -> Option<()> {
    for (name, value) in erase.iter() {
        match (value, patch.get_mut(name)) {
            (Value::Object(erase), Some(Value::Object(patch))) => join(erase, patch)?,
            (Value::Null, None) => patch.insert(name, Value::Null),
            _ => return None,
        }
    }
    Some(())
}

/// A patch as several whose texts are at most `bytes_max` long, unless a single value is longer.
fn split(patch: &Object, bytes_max: usize) -> Vec<Object> {
    if patch.is_empty() || patch.text_length() <= bytes_max {
        return vec![patch.clone()];
    }
    let mut parts = Vec::new();
    let mut part = Object::default();
    let mut part_bytes = EMPTY_BYTES;
    for (name, value) in patch.iter() {
        let mut alone = Object::default();
        alone.insert(name, value.clone());
        let bytes = alone.text_length();
        if let Value::Object(inner) = value
            && bytes > bytes_max
        {
            let around = bytes - inner.text_length();
            for inner in split(inner, bytes_max.saturating_sub(around)) {
                let mut alone = Object::default();
                alone.insert(name, Value::Object(inner));
                parts.push(alone);
            }
            continue;
        }
        // Its own `{` and `}` stand for the comma and one byte too many.
        if part_bytes + bytes > bytes_max && !part.is_empty() {
            parts.push(std::mem::take(&mut part));
            part_bytes = EMPTY_BYTES;
        }
        part.insert(name, value.clone());
        part_bytes += bytes;
    }
    if !part.is_empty() {
        parts.push(part);
    }
    parts
}

/// `{}`.
const EMPTY_BYTES: usize = 2;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::twin::test_support::{document, json, patch};

    fn merged(mut target: Object, patch: &Object) -> Object {
        merge(&mut target, patch);
        target
    }

    fn sum(patches: &[Object]) -> Unsynced {
        let mut sum = Unsynced::default();
        for patch in patches {
            sum.add(patch);
        }
        sum
    }

    fn sent_to(mut upstream: Object, sum: &Unsynced) -> Object {
        for text in sum.patches() {
            assert!(text.len() <= PATCH_BYTES_MAX);
            merge(&mut upstream, &Object::parse(&text, 20).unwrap());
        }
        upstream
    }

    /// RFC 7396, section 2, word for word on another type.
    fn oracle(target: serde_json::Value, patch: &serde_json::Value) -> serde_json::Value {
        let serde_json::Value::Object(patch) = patch else {
            return patch.clone();
        };
        let mut target = match target {
            serde_json::Value::Object(target) => target,
            _ => serde_json::Map::new(),
        };
        for (name, value) in patch {
            if value.is_null() {
                target.remove(name);
            } else {
                let old = target.remove(name).unwrap_or_default();
                target.insert(name.clone(), oracle(old, value));
            }
        }
        serde_json::Value::Object(target)
    }

    fn as_serde(object: &Object) -> serde_json::Value {
        serde_json::from_slice(&object.to_bytes()).unwrap()
    }

    #[test]
    fn the_reference_example_of_a_computed_diff() {
        // spec/core.md 5.4, test UpdateDesiredPropertiesWithIncorrectPatchTest.
        let old = json(r#"{"p0":"vp0","$version":0}"#);
        let new = json(r#"{"p1":"vp1","p2":"vp2","p3":"vp3","$version":2}"#);
        let expected = r#"{"p0":null,"p1":"vp1","p2":"vp2","p3":"vp3","$version":2}"#;
        assert_eq!(diff(&old, &new), json(expected));
    }

    #[test]
    fn objects_merge_nulls_delete_and_all_else_replaces() {
        let target = json(r#"{"a":{"b":1,"c":2},"d":[1,2],"e":5}"#);
        let patch = json(r#"{"a":{"b":null,"x":{"y":null,"z":3}},"d":[9],"e":{"f":null}}"#);
        let expected = json(r#"{"a":{"c":2,"x":{"z":3}},"d":[9],"e":{}}"#);
        assert_eq!(merged(target, &patch), expected);
    }

    #[test]
    fn a_deleted_object_that_is_made_anew_does_not_come_back_whole() {
        let sum = sum(&[json(r#"{"a":null,"b":1}"#), json(r#"{"a":{"y":1}}"#)]);
        let upstream = json(r#"{"a":{"x":1}}"#);
        assert_eq!(
            sum.patches(),
            [r#"{"a":null}"#, r#"{"a":{"y":1},"b":1}"#],
            "one patch cannot say it"
        );
        assert_eq!(sent_to(upstream, &sum), json(r#"{"a":{"y":1},"b":1}"#));
    }

    #[test]
    fn an_object_over_a_scalar_is_no_merge_with_what_was_before_it() {
        let sum = sum(&[json(r#"{"a":5}"#), json(r#"{"a":{"y":1,"z":null}}"#)]);
        let upstream = json(r#"{"a":{"x":1,"z":1}}"#);
        assert_eq!(sent_to(upstream, &sum), json(r#"{"a":{"y":1}}"#));
    }

    #[test]
    fn what_can_be_said_in_one_patch_is() {
        let sum = sum(&[
            json(r#"{"a":{"x":1,"y":2},"b":null}"#),
            json(r#"{"a":{"x":null},"c":{"d":{"e":null}}}"#),
        ]);
        assert_eq!(
            sum.patches(),
            [r#"{"a":{"x":null,"y":2},"b":null,"c":{"d":{"e":null}}}"#]
        );
    }

    #[test]
    fn a_large_sum_is_sent_in_parts_that_an_upstream_takes() {
        let mut all = Unsynced::default();
        let text = "x".repeat(4000);
        for n in 0..20 {
            all.add(&json(&format!(
                r#"{{"big":{{"k{n}":"{text}"}},"n{n}":{n}}}"#
            )));
            all.add(&json(&format!(r#"{{"gone{n}{text}":null}}"#)));
        }
        let patches = all.patches();
        assert!(patches.len() >= 5, "{}", patches.len());
        let mut expected = Object::default();
        all.apply(&mut expected);
        assert_eq!(sent_to(Object::default(), &all), expected);
    }

    proptest! {
        #[test]
        fn merging_is_rfc_7396(target in document(), patch in patch()) {
            let expected = oracle(as_serde(&target), &as_serde(&patch));
            prop_assert_eq!(as_serde(&merged(target, &patch)), expected);
        }

        #[test]
        fn a_diff_leads_from_the_old_to_the_new(old in document(), new in document()) {
            let patch = diff(&old, &new);
            prop_assert_eq!(&merged(old.clone(), &patch), &new);
            prop_assert_eq!(patch.is_empty(), old == new);
            prop_assert_eq!(diff(&new, &new), Object::default());
        }

        #[test]
        fn merging_twice_is_merging_once(target in document(), patch in patch()) {
            let once = merged(target, &patch);
            prop_assert_eq!(merged(once.clone(), &patch), once);
        }

        #[test]
        fn patches_add_up_exactly(
            target in document(), patches in proptest::collection::vec(patch(), 0..6),
        ) {
            let expected = patches.iter().fold(target.clone(), merged);
            let sum = sum(&patches);
            let mut applied = target.clone();
            sum.apply(&mut applied);
            prop_assert_eq!(&applied, &expected);
            prop_assert_eq!(sent_to(target, &sum), expected);
        }

        #[test]
        fn a_sum_heals_whatever_part_of_it_was_applied_before(
            target in document(),
            patches in proptest::collection::vec(patch(), 1..6),
            applied in any::<proptest::sample::Index>(),
        ) {
            let expected = patches.iter().fold(target.clone(), merged);
            let part = sum(patches.get(..applied.index(patches.len() + 1)).unwrap());
            let mut upstream = target.clone();
            part.apply(&mut upstream);
            sum(&patches).apply(&mut upstream);
            prop_assert_eq!(&upstream, &expected);
            // Also when it stopped half-way through the sum.
            let mut upstream = target;
            merge(&mut upstream, part.erase());
            sum(&patches).apply(&mut upstream);
            prop_assert_eq!(upstream, expected);
        }

        #[test]
        fn parts_keep_to_the_limit_and_lose_nothing(
            target in document(), patch in patch(), bytes_max in 20usize..200,
        ) {
            let parts = split(&patch, bytes_max);
            let all = parts.iter().fold(target.clone(), merged);
            prop_assert_eq!(all, merged(target, &patch));
        }
    }
}
