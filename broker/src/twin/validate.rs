//! What clients may report (spec/core.md 5.6): limits and texts of IoT Hub and the reference.

use super::json::{JsonError, Object, Value};
use super::limits::{
    DEPTH_MAX, DOCUMENT_DEPTH_MAX, INTEGER_MAX, INTEGER_MIN, NAME_BYTES_MAX, PATCH_BYTES_MAX,
    PATCH_TEXT_BYTES_MAX, REPORTED_WEIGHT_MAX, VALUE_BYTES_MAX,
};

/// What is wrong with a patch of reported properties.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidPatch {
    /// It cannot be read.
    #[error("The reported properties are no JSON object")]
    NotJson,
    /// The patch, or what it would make of the twin, is too large.
    #[error("Twin properties size {bytes} exceeds maximum {PATCH_BYTES_MAX}")]
    TooLarge {
        /// How large.
        bytes: usize,
    },
    /// Objects and arrays within one another.
    #[error("Nested depth of twin property exceeds {DEPTH_MAX}")]
    TooDeep,
    /// A name.
    #[error("Length of property name {start}.. exceeds maximum length of {NAME_BYTES_MAX}")]
    NameTooLong {
        /// Its first ten characters.
        start: String,
    },
    /// A name.
    #[error("Property name {name} contains invalid character '{character}'")]
    NameCharacter {
        /// The name.
        name: String,
        /// What must not be in it.
        character: char,
    },
    /// A value.
    #[error(
        "Value associated with property name {name} has length {bytes} that exceeds maximum length of {VALUE_BYTES_MAX}"
    )]
    ValueTooLong {
        /// The property's name; empty for an element of an array.
        name: String,
        /// How long the value is.
        bytes: usize,
    },
    /// A value.
    #[error(
        "Property {name} has an out of bound value. Valid values are between {INTEGER_MIN} and {INTEGER_MAX}"
    )]
    IntegerOutOfRange {
        /// The property's name; empty for an element of an array.
        name: String,
    },
    /// An element of an array.
    #[error("Arrays cannot contain 'null' as value")]
    NullInArray,
    /// A member of an object somewhere in an array.
    #[error("Property {name} of an object in an array cannot be 'null'")]
    NullInArrayObject {
        /// The property's name.
        name: String,
    },
}

/// Reads a patch of reported properties and checks it.
pub(super) fn reported_patch(text: &[u8]) -> Result<Object, InvalidPatch> {
    if text.len() > PATCH_TEXT_BYTES_MAX {
        return Err(InvalidPatch::TooLarge { bytes: text.len() });
    }
    let patch = Object::parse(text, DOCUMENT_DEPTH_MAX).map_err(|error| match error {
        JsonError::TooDeep => InvalidPatch::TooDeep,
        JsonError::Syntax | JsonError::NotAnObject => InvalidPatch::NotJson,
    })?;
    let bytes = patch.text_length();
    if bytes > PATCH_BYTES_MAX {
        return Err(InvalidPatch::TooLarge { bytes });
    }
    object(&patch, 0, false)?;
    Ok(patch)
}

/// Checks what all reported properties of a twin weigh after a patch. One that was too heavy
/// before (the upstream is the judge of what it takes) may be changed as long as it does not grow.
pub(super) fn reported_weight(before: &Object, after: &Object) -> Result<(), InvalidPatch> {
    let bytes = weight(after);
    if bytes > REPORTED_WEIGHT_MAX && bytes > weight(before) {
        return Err(InvalidPatch::TooLarge { bytes });
    }
    Ok(())
}

/// The size of properties as IoT Hub counts it: names and texts without control characters, 8
/// bytes for a number, 4 for a bool, nothing for what holds them together. Not the JSON text,
/// which would refuse twins that the cloud takes. `$version` and `$metadata` do not count.
fn weight(properties: &Object) -> usize {
    let counted = properties.iter().filter(|(name, _)| !name.starts_with('$'));
    counted
        .map(|(name, value)| text_weight(name) + value_weight(value))
        .sum()
}

fn value_weight(value: &Value) -> usize {
    match value {
        Value::Null => 0,
        Value::Bool(_) => 4,
        Value::Number(_) => 8,
        Value::Text(text) => text_weight(text),
        Value::Array(items) => items.iter().map(value_weight).sum(),
        Value::Object(object) => object
            .iter()
            .map(|(name, value)| text_weight(name) + value_weight(value))
            .sum(),
    }
}

fn text_weight(text: &str) -> usize {
    text.chars()
        .filter(|c| !c.is_control())
        .map(char::len_utf8)
        .sum()
}

/// `depth` is that of `properties` itself, the root's is 0.
fn object(properties: &Object, depth: usize, in_array: bool) -> Result<(), InvalidPatch> {
    if depth > DEPTH_MAX {
        return Err(InvalidPatch::TooDeep);
    }
    for (name, value) in properties.iter() {
        self::name(name)?;
        self::value(name, value, depth + 1, in_array)?;
    }
    Ok(())
}

fn value(name: &str, value: &Value, depth: usize, in_array: bool) -> Result<(), InvalidPatch> {
    match value {
        Value::Object(inner) => object(inner, depth, in_array),
        Value::Array(items) => array(items, depth),
        Value::Null if in_array => Err(InvalidPatch::NullInArrayObject {
            name: name.to_owned(),
        }),
        Value::Null | Value::Bool(_) => Ok(()),
        Value::Number(text) if is_integer(text) => integer(name, text),
        Value::Number(text) => length(name, text),
        Value::Text(text) => length(name, text),
    }
}

fn array(items: &[Value], depth: usize) -> Result<(), InvalidPatch> {
    if depth > DEPTH_MAX {
        return Err(InvalidPatch::TooDeep);
    }
    for item in items {
        if *item == Value::Null {
            return Err(InvalidPatch::NullInArray);
        }
        // An element has no name.
        value("", item, depth + 1, true)?;
    }
    Ok(())
}

fn name(name: &str) -> Result<(), InvalidPatch> {
    if name.len() > NAME_BYTES_MAX {
        let start = name.chars().take(10).collect();
        return Err(InvalidPatch::NameTooLong { start });
    }
    let invalid = |c: char| c.is_control() || c.is_whitespace() || matches!(c, '.' | '$' | '#');
    match name.chars().find(|c| invalid(*c)) {
        None => Ok(()),
        Some(character) => Err(InvalidPatch::NameCharacter {
            name: name.to_owned(),
            character,
        }),
    }
}

fn length(name: &str, text: &str) -> Result<(), InvalidPatch> {
    if text.len() <= VALUE_BYTES_MAX {
        return Ok(());
    }
    Err(InvalidPatch::ValueTooLong {
        name: name.to_owned(),
        bytes: text.len(),
    })
}

fn is_integer(number: &str) -> bool {
    !number.contains(['.', 'e', 'E'])
}

fn integer(name: &str, text: &str) -> Result<(), InvalidPatch> {
    match text.parse::<i64>() {
        Ok(INTEGER_MIN..=INTEGER_MAX) => Ok(()),
        _ => Err(InvalidPatch::IntegerOutOfRange {
            name: name.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::twin::test_support::json;

    fn refusal(patch: &str) -> Option<String> {
        reported_patch(patch.as_bytes())
            .err()
            .map(|error| error.to_string())
    }

    /// `depth` objects within one another below the root.
    fn nested(depth: usize) -> String {
        format!("{}{{}}{}", r#"{"a":"#.repeat(depth), "}".repeat(depth))
    }

    /// The table of the reference's ReportedPropertiesValidatorTest, and the edges of each limit.
    #[test]
    fn limits_and_texts_are_those_of_the_reference() {
        let text = |n: usize| "*".repeat(n);
        let good = [
            nested(10),
            r#"{"array":[0,1,2],"none":null,"in":{"none":null},"empty":{},"list":[]}"#.to_owned(),
            r#"{"a":[["one"],["two",{"ok":"ok"}]],"pi":3.14,"t":"2021-01-20T00:00:00"}"#.to_owned(),
            format!(r#"{{"a":"{}"}}"#, text(4096)),
            format!(r#"{{"{}":1}}"#, text(1024)),
            r#"{"n":-4503599627370496,"m":4503599627370495,"f":4503599627370496.0,"e":1e300}"#
                .to_owned(),
            r#"{"":1,"-":2,"ä😀":3,"a/b:c%20":4}"#.to_owned(),
            "{}".to_owned(),
        ];
        for patch in good {
            assert_eq!(refusal(&patch), None, "{patch}");
        }
        let range = "has an out of bound value. Valid values are between -4503599627370496 and 4503599627370495";
        let bad = [
            (nested(11), "Nested depth of twin property exceeds 10".to_owned()),
            (nested(40), "Nested depth of twin property exceeds 10".to_owned()),
            (nested(40_000), "Nested depth of twin property exceeds 10".to_owned()),
            (
                format!(r#"{{"level1":{}1{}}}"#, "[".repeat(11), "]".repeat(11)),
                "Nested depth of twin property exceeds 10".to_owned(),
            ),
            (
                format!(r#"{{"level":{{"big":"{}"}}}}"#, text(5000)),
                "Value associated with property name big has length 5000 that exceeds maximum length of 4096".to_owned(),
            ),
            (
                format!(r#"{{"list":["{}"]}}"#, text(4097)),
                "Value associated with property name  has length 4097 that exceeds maximum length of 4096".to_owned(),
            ),
            (r#"{"a":{"n":-4503599627370497}}"#.to_owned(), format!("Property n {range}")),
            (r#"{"n":4503599627370496}"#.to_owned(), format!("Property n {range}")),
            (r#"{"n":99999999999999999999999}"#.to_owned(), format!("Property n {range}")),
            (
                format!(r#"{{"{}":1}}"#, text(1025)),
                "Length of property name **********.. exceeds maximum length of 1024".to_owned(),
            ),
            (
                r#"{"o#k":"good"}"#.to_owned(),
                "Property name o#k contains invalid character '#'".to_owned(),
            ),
            (r#"{"$version":3}"#.to_owned(), "Property name $version contains invalid character '$'".to_owned()),
            (r#"{"a.b":3}"#.to_owned(), "Property name a.b contains invalid character '.'".to_owned()),
            (r#"{"x":[{"a b":3}]}"#.to_owned(), "Property name a b contains invalid character ' '".to_owned()),
            ("{\"a\\u0001\":3}".to_owned(), "Property name a\u{1} contains invalid character '\u{1}'".to_owned()),
            ("{\"a\u{a0}\":3}".to_owned(), "Property name a\u{a0} contains invalid character '\u{a0}'".to_owned()),
            (r#"{"a":["x",null]}"#.to_owned(), "Arrays cannot contain 'null' as value".to_owned()),
            (r#"{"a":[["x"],[null]]}"#.to_owned(), "Arrays cannot contain 'null' as value".to_owned()),
            (
                r#"{"a":[{"field1":null}]}"#.to_owned(),
                "Property field1 of an object in an array cannot be 'null'".to_owned(),
            ),
            (
                r#"{"a":["x",{"b":[{"hello":null}]}]}"#.to_owned(),
                "Property hello of an object in an array cannot be 'null'".to_owned(),
            ),
        ];
        for (patch, expected) in bad {
            assert_eq!(refusal(&patch), Some(expected));
        }
        for no_object in ["", "{", "[]", "null", "{\"a\":1}}", "\"x\""] {
            assert_eq!(
                refusal(no_object).as_deref(),
                Some("The reported properties are no JSON object"),
                "{no_object:?}"
            );
        }
    }

    #[test]
    fn the_size_of_a_patch_is_that_of_its_json_without_spaces() {
        let list = |n: usize| format!(r#"{{"a":[{}1]}}"#, "1,".repeat(n));
        // `{"a":[` and `1]}` around n times two bytes.
        assert_eq!(list(16_379).len(), 32_767);
        assert_eq!(refusal(&list(16_379)), None);
        let spaced = list(16_379).replace(',', ",\n    ");
        assert_eq!(refusal(&spaced), None);
        assert_eq!(
            refusal(&list(16_380)).as_deref(),
            Some("Twin properties size 32769 exceeds maximum 32768")
        );
        let million_names: String = (0..1_000_000).map(|n| format!("\"{n}\":1,")).collect();
        let bytes = million_names.len() + 7;
        assert_eq!(
            reported_patch(format!("{{{million_names}\"a\":1}}").as_bytes()),
            Err(InvalidPatch::TooLarge { bytes })
        );
    }

    #[test]
    fn a_twin_weighs_what_the_cloud_says() {
        let properties =
            json(r#"{"$version":7,"ab":1,"c":"a\u0001b","d":{"e":[true,1.5]},"ä":null}"#);
        assert_eq!(weight(&properties), 2 + 8 + 1 + 2 + 1 + 1 + 4 + 8 + 2);
    }

    #[test]
    fn a_twin_may_not_outgrow_the_limit_but_may_shrink_to_it() {
        let of = |n: usize| -> Object {
            let text = Value::Text("x".repeat(n - 1));
            [("k".to_owned(), text)].into_iter().collect()
        };
        assert_eq!(reported_weight(&of(1), &of(32_768)), Ok(()));
        let bytes = 32_769;
        let refused = Err(InvalidPatch::TooLarge { bytes });
        assert_eq!(reported_weight(&of(32_768), &of(bytes)), refused);
        assert_eq!(reported_weight(&of(40_000), &of(bytes)), Ok(()));
        assert_eq!(reported_weight(&of(bytes), &of(bytes)), Ok(()));
    }
}
