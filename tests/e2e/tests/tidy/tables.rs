//! The tables of docs/compatibility.md that name a test for every row of a contract.

use std::collections::BTreeSet;
use std::fs;

use super::{assert_none, files, root};

/// A row of a table: its first cell, and the test names in its last one.
type Row = (String, Vec<String>);

/// The rows of the table under this heading.
fn table_under(heading: &str, page: &str) -> Vec<Row> {
    let section = page.split_once(&format!("\n{heading}\n"));
    let section = section.map_or("", |(_, rest)| rest);
    section
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'))
        // The names of the columns, and the line under them.
        .skip(2)
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let tests = cells[cells.len() - 1].split('`').skip(1).step_by(2);
            (cells[0].to_owned(), tests.map(str::to_owned).collect())
        })
        .collect()
}

/// Names of the functions that are tests: those whose attributes say so.
fn tests_in(code: &str) -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    let mut is_test = false;
    for line in code.lines().map(str::trim) {
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            is_test = true;
        } else if let Some((_, rest)) = line.split_once("fn ") {
            if is_test {
                tests.insert(rest.split('(').next().unwrap().to_owned());
            }
            is_test = false;
        }
    }
    tests
}

/// Rows that name no test, or one that does not exist.
fn without_test(rows: &[Row]) -> Vec<String> {
    let mut tests = BTreeSet::new();
    for (_, code) in files(&[".rs"]) {
        tests.append(&mut tests_in(&code));
    }
    let mut hits = Vec::new();
    for (row, named) in rows {
        if named.is_empty() {
            hits.push(format!("{row}: no test"));
        }
        for name in named.iter().filter(|name| !tests.contains(*name)) {
            hits.push(format!("{row}: there is no test {name}"));
        }
    }
    hits
}

/// Numbers from 1 to `count` that have not exactly one row, with tests whose names hold the number.
fn not_by_number(rows: &[Row], count: u8) -> Vec<String> {
    let mut hits = Vec::new();
    for number in 1..=count {
        let part = format!("_{number:02}_");
        let of_number = rows.iter().filter(|(row, _)| *row == number.to_string());
        match of_number.collect::<Vec<_>>()[..] {
            [(_, named)] if named.iter().all(|name| name.contains(&part)) => {}
            [(_, named)] => hits.push(format!("{number}: {named:?} are not of this number")),
            [] => hits.push(format!("{number} is missing")),
            _ => hits.push(format!("{number} is there twice")),
        }
    }
    hits
}

fn page() -> String {
    fs::read_to_string(root().join("docs/compatibility.md")).unwrap()
}

#[test]
fn the_tables_of_mqtt_name_tests_that_exist() {
    const VECTORS: u8 = 20;
    // The standard's sections with normative statements that the contract lists.
    const SECTIONS: [&str; 26] = [
        "1.5.3", "2.2.2", "2.3.1", "3.1.0", "3.1.2", "3.1.3", "3.1.4", "3.2.2", "3.3.1", "3.3.2",
        "3.3.5", "3.6", "3.8.1", "3.8.3", "3.8.4", "3.9.3", "3.10.1", "3.10.4", "3.12.4", "3.14.4",
        "4.3.1", "4.4.0", "4.5.0", "4.6.0", "4.8.0", "6.0.0",
    ];
    let page = page();
    let statements = table_under("### Normative statements", &page);
    let vectors = table_under("### Acceptance vectors", &page);
    let mut hits = without_test(&statements);
    hits.extend(without_test(&vectors));
    for section in SECTIONS {
        let starts =
            |part: &str| part.trim().starts_with(&format!("{section}-")) || part == section;
        if !statements
            .iter()
            .any(|(row, _)| row.split(", ").any(starts))
        {
            hits.push(format!("no row about MQTT-{section}"));
        }
    }
    hits.extend(not_by_number(&vectors, VECTORS));
    assert_none(&hits, "docs/compatibility.md, MQTT 3.1.1 and its tests");
}

#[test]
fn the_tables_of_amqp_name_tests_that_exist() {
    /// Of spec/amqp.md section 10.
    const CHECKS: u8 = 10;
    let page = page();
    let checks = table_under("### Acceptance checks", &page);
    let peers = table_under("### Client libraries", &page);
    let mut hits = without_test(&checks);
    hits.extend(without_test(&peers));
    hits.extend(not_by_number(&checks, CHECKS));
    if peers.is_empty() {
        hits.push("no row about client libraries".to_owned());
    }
    assert_none(&hits, "docs/compatibility.md, AMQP 1.0 and its tests");
}

#[test]
fn the_readers_of_tables_and_tests_read() {
    let page =
        "# A\n\n## B\ntext\n\n| x | y |\n|---|---|\n| 1 | `a`, `b` |\n| 2 | |\n\n| 3 | `c` |\n";
    let row = |cell: &str, tests: &[&str]| -> Row {
        (
            cell.to_owned(),
            tests.iter().map(|test| (*test).to_owned()).collect(),
        )
    };
    assert_eq!(
        table_under("## B", page),
        [row("1", &["a", "b"]), row("2", &[])]
    );
    assert_eq!(table_under("## C", page), []);
    let code =
        "#[test]\nfn a() {\n    fn inner() {}\n}\n#[tokio::test(x)]\nasync fn b() {}\nfn c() {}";
    assert_eq!(tests_in(code), ["a", "b"].map(str::to_owned).into());
}
