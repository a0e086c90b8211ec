//! What may stand in a twin (spec/upstream.md B6).

use serde_json::Value;

use super::TwinError;
use super::document::Object;
use crate::limits::{TWIN_DEPTH_MAX, TWIN_INTEGERS, TWIN_KEY_BYTES_MAX, TWIN_STRING_BYTES_MAX};

/// Checks keys, values and depth of a patch; its size counts only after the merge.
pub(super) fn patch(patch: &Object) -> Result<(), TwinError> {
    object(patch, 0)
}

/// Checks the size of a whole section.
pub(super) fn size(
    section: &'static str,
    properties: &Object,
    bytes_max: usize,
) -> Result<(), TwinError> {
    let bytes = serde_json::to_string(properties).map_or(usize::MAX, |text| text.len());
    if bytes > bytes_max {
        return Err(TwinError::Size {
            section,
            bytes,
            bytes_max,
        });
    }
    Ok(())
}

fn object(object: &Object, depth: usize) -> Result<(), TwinError> {
    object.iter().try_for_each(|(name, member)| {
        key(name)?;
        value(member, depth)
    })
}

fn key(key: &str) -> Result<(), TwinError> {
    let forbidden = |c: char| c.is_control() || matches!(c, '.' | '$' | ' ');
    if key.is_empty() || key.len() > TWIN_KEY_BYTES_MAX || key.contains(forbidden) {
        return Err(TwinError::Key(key.chars().take(100).collect()));
    }
    Ok(())
}

fn value(value: &Value, depth: usize) -> Result<(), TwinError> {
    match value {
        Value::Array(_) | Value::Object(_) if depth >= TWIN_DEPTH_MAX => Err(TwinError::Depth),
        Value::Array(items) => items.iter().try_for_each(|item| {
            if item.is_null() {
                return Err(TwinError::NullInArray);
            }
            self::value(item, depth + 1)
        }),
        Value::Object(members) => object(members, depth + 1),
        Value::String(text) if text.len() > TWIN_STRING_BYTES_MAX => Err(TwinError::String),
        Value::Number(number) => {
            let fits = match number.as_i64() {
                Some(integer) => TWIN_INTEGERS.contains(&integer),
                None => !number.is_u64(),
            };
            if fits {
                Ok(())
            } else {
                Err(TwinError::Integer)
            }
        }
        Value::Null | Value::Bool(_) | Value::String(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(value: Value) -> Result<(), TwinError> {
        match value {
            Value::Object(object) => patch(&object),
            _ => panic!("no object"),
        }
    }

    fn nested(levels: usize) -> Value {
        (0..levels).fold(json!({"x": 1}), |inner, _| json!({"a": inner}))
    }

    #[test]
    fn what_iot_hub_takes_is_taken() {
        for good in [
            json!({}),
            json!({"a": null, "b": true, "c": 1.5, "d": "x", "e": [1, [2], {"f": "g"}], "h-i_j#": {}}),
            json!({"min": -4_503_599_627_370_496_i64, "max": 4_503_599_627_370_495_i64}),
            json!({"k".repeat(1024): "v".repeat(4096)}),
            nested(10),
        ] {
            assert!(of(good.clone()).is_ok(), "{good}");
        }
    }

    #[test]
    fn everything_else_is_refused() {
        for key in [
            "",
            "$x",
            "a.b",
            "a b",
            "a\nb",
            "a\u{85}b",
            &"k".repeat(1025),
        ] {
            for bad in [json!({key: 1}), json!({"in": [{key: 1}]})] {
                assert!(matches!(of(bad), Err(TwinError::Key(_))), "{key:?}");
            }
        }
        assert!(matches!(of(nested(11)), Err(TwinError::Depth)));
        assert!(matches!(
            of(json!({"a": "v".repeat(4097)})),
            Err(TwinError::String)
        ));
        for bad in [
            json!(-4_503_599_627_370_497_i64),
            json!(4_503_599_627_370_496_i64),
            json!(u64::MAX),
        ] {
            assert!(matches!(of(json!({"a": bad})), Err(TwinError::Integer)));
        }
        assert!(matches!(
            of(json!({"a": [1, null]})),
            Err(TwinError::NullInArray)
        ));
    }
}
