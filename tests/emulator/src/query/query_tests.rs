//! The query language, on one document.

use serde_json::json;

use super::*;

fn document() -> Value {
    json!({
        "deviceId": "leaf1", "status": "enabled", "connectionState": "Disconnected",
        "capabilities": {"iotEdge": false},
        "deviceScope": "ms-azure-iot-edge://L5-1",
        "parentScopes": ["ms-azure-iot-edge://L5-1"],
        "tags": {"site": "it's \"A\"", "floor": 3, "nothing": null},
        "properties": {"desired": {"$version": 7, "rate": 1.5}, "reported": {"in": {"x": true}}},
    })
}

fn finds(condition: &str) -> bool {
    let text = format!("SELECT * FROM devices WHERE {condition}");
    let query = Query::parse(&text).unwrap_or_else(|error| panic!("{text}: {error}"));
    query.finds(&document())
}

#[test]
fn conditions_that_are_true() {
    for condition in [
        "deviceId = 'leaf1'",
        "status='enabled' AND capabilities.iotEdge = false",
        "deviceId = 'x' OR deviceId = \"leaf1\"",
        "deviceId = 'leaf1' or nobody = 1 and nobody = 2",
        "NOT deviceId = 'x'",
        "deviceId != 'x' and deviceId <> 'y'",
        "not (deviceId = 'x' or deviceId = 'y')",
        "is_defined(tags.site) AND NOT is_defined(tags.sites)",
        "IS_DEFINED(tags.nothing) and tags.nothing = NULL",
        "tags.site = 'it\\'s \"A\"' and tags.site = \"it's \\\"\\u0041\\\"\"",
        "tags.floor = 3 and tags.floor = 3.0 and tags.floor = 30e-1",
        "tags.floor in [1, 2, 3]",
        "tags.floor NIN [-1, 2]",
        "properties.desired.$version = 7 and properties.desired.rate = 1.5",
        "properties.reported.in.x = true",
        "STARTSWITH(deviceScope, 'ms-azure-iot-edge://L5')",
        "array_contains(parentScopes, 'ms-azure-iot-edge://L5-1')",
    ] {
        assert!(finds(condition), "{condition}");
    }
}

#[test]
fn conditions_that_are_not() {
    for condition in [
        "deviceId = 'LEAF1'",
        "deviceid = 'leaf1'",
        "deviceId = 'leaf1' and status = 'disabled'",
        "tags.floor = '3'",
        "tags.floor in ['3']",
        "STARTSWITH(tags.floor, '3')",
        "startswith(deviceId, 'eaf')",
        "array_contains(deviceId, 'leaf1')",
        "array_contains(parentScopes, 'ms')",
        // Neither true nor false, and no negation makes it so.
        "tags.other = 1",
        "tags.other != 1",
        "not tags.other = 1",
        "not (tags.other = 1 or status = 'disabled')",
        "tags.other nin [1]",
        "tags.site.deeper != 1",
        "tags.other = 1 and status = 'enabled'",
    ] {
        assert!(!finds(condition), "{condition}");
    }
}

#[test]
fn columns_and_counts() {
    let text = "select deviceId, tags.site AS place, tags.other, properties.desired.rate \
        from devices.modules";
    let query = Query::parse(text).unwrap();
    assert_eq!(query.source(), Source::Modules);
    assert!(!query.selects_all() && query.count_name().is_none());
    let wanted = json!({"deviceId": "leaf1", "place": "it's \"A\"", "rate": 1.5});
    assert_eq!(query.project(document()), wanted);
    let query = Query::parse("SELECT COUNT() AS n FROM devices WHERE status = 'enabled'").unwrap();
    assert_eq!(query.count_name(), Some("n"));
    assert!(!query.selects_all());
    let query = Query::parse(" SELECT\n*\tFROM devices ").unwrap();
    assert!(query.selects_all() && query.source() == Source::Devices);
    assert_eq!(query.project(document()), document());
}

#[test]
fn anything_else_is_an_error() {
    let expected = |wanted, at| QueryError::Expected { wanted, at };
    for (text, error) in [
        ("", expected("SELECT", 0)),
        ("UPDATE devices", expected("SELECT", 0)),
        ("SELECT * FROM", expected("devices or devices.modules", 13)),
        (
            "SELECT * FROM devices.jobs",
            expected("devices or devices.modules", 22),
        ),
        (
            "SELECT * FROM devices c",
            expected("the end of the query", 22),
        ),
        (
            "SELECT * FROM devices GROUP BY x",
            expected("the end of the query", 22),
        ),
        ("SELECT *, x FROM devices", expected("FROM", 8)),
        ("SELECT TOP 3 FROM devices", expected("FROM", 11)),
        ("SELECT COUNT() FROM devices", expected("AS", 15)),
        ("SELECT AVG(x) AS y FROM devices", expected("FROM", 10)),
        ("SELECT * FROM devices WHERE", expected("a condition", 27)),
        (
            "SELECT * FROM devices WHERE x",
            expected("=, !=, <>, IN or NIN", 29),
        ),
        (
            "SELECT * FROM devices WHERE x = y",
            expected("a literal", 32),
        ),
        (
            "SELECT * FROM devices WHERE x IN []",
            expected("a literal", 34),
        ),
        ("SELECT * FROM devices WHERE (x = 1", expected(")", 34)),
        (
            "SELECT * FROM devices WHERE endswith(x, 'y')",
            expected("IS_DEFINED, STARTSWITH or ARRAY_CONTAINS before this", 37),
        ),
        (
            "SELECT * FROM devices WHERE startswith(x, 1)",
            expected("a text before this", 43),
        ),
        (
            "SELECT * FROM devices WHERE x = 'y",
            QueryError::Text { at: 32 },
        ),
        (
            "SELECT * FROM devices WHERE x = '\\n'",
            QueryError::Text { at: 32 },
        ),
        (
            "SELECT * FROM devices WHERE x = '\\ud800'",
            QueryError::Text { at: 32 },
        ),
        (
            "SELECT * FROM devices WHERE x = 1.",
            QueryError::Number { at: 32 },
        ),
        (
            "SELECT * FROM devices WHERE x = 1-1",
            QueryError::Number { at: 32 },
        ),
        (
            "SELECT * FROM devices WHERE x > 1",
            QueryError::Character {
                character: '>',
                at: 30,
            },
        ),
        (
            "SELECT * FROM devices; DROP",
            QueryError::Character {
                character: ';',
                at: 21,
            },
        ),
        (
            "SELECT \u{e9} FROM devices",
            QueryError::Character {
                character: '\u{e9}',
                at: 7,
            },
        ),
    ] {
        assert_eq!(Query::parse(text), Err(error), "{text}");
    }
}

#[test]
fn a_query_has_limits() {
    let nested = |open: &str, close: &str, count: usize| {
        let (open, close) = (open.repeat(count), close.repeat(count));
        Query::parse(&format!("SELECT * FROM devices WHERE {open}x = 1{close}"))
    };
    assert!(nested("(", ")", QUERY_DEPTH_MAX).is_ok());
    assert_eq!(
        nested("(", ")", QUERY_DEPTH_MAX + 1),
        Err(QueryError::Depth)
    );
    assert_eq!(
        nested("not ", "", QUERY_DEPTH_MAX + 1),
        Err(QueryError::Depth)
    );
    let long = format!(
        "SELECT * FROM devices WHERE x = '{}'",
        "y".repeat(QUERY_BYTES_MAX)
    );
    assert_eq!(Query::parse(&long), Err(QueryError::Size));
}

/// Whatever a text is, it is understood or refused.
#[test]
fn no_part_of_a_query_and_no_odd_byte_in_it_is_a_panic() {
    let text = "SELECT a.b AS c, d FROM devices.modules WHERE NOT (STARTSWITH(a, '\\u00e9\\'x') \
        OR tags.\u{e9} = \"y\") AND e NIN [1.5e3, null, true, 'z']";
    let characters: Vec<char> = text.chars().collect();
    for at in 0..characters.len() {
        let prefix: String = characters.iter().take(at).collect();
        let _ = Query::parse(&prefix);
        for odd in ['\0', '\'', '\\', '(', '[', '.', '-', '9', '\u{1f600}'] {
            let mut changed = characters.clone();
            changed[at] = odd;
            let _ = Query::parse(&changed.into_iter().collect::<String>());
        }
    }
}
