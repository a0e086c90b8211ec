//! `docs/limits.md` is made from the sources: every `limits.rs` of the product, constant by constant.

use std::fmt::Write as _;

use super::{files, root};

/// Where the page is, from the root.
const PAGE: &str = "docs/limits.md";

/// Set to write the page instead of comparing it.
const WRITE: &str = "EDGEHUB_WRITE_DOCS";

/// Folders whose limits are no product's.
const OTHERS: [&str; 2] = ["tests/", "perf/"];

const HEAD: &str = "# Limits

Everything that a client, a peer or time can make grow has a named limit. This page is made from the sources
(`EDGEHUB_WRITE_DOCS=1 cargo nextest run -E 'test(limits_page)'`) and compared with them by `tidy`. What can be set is in
[compatibility.md](compatibility.md).
";

/// One public constant with its documentation.
#[derive(Debug, PartialEq, Eq)]
struct Limit {
    name: String,
    value: String,
    meaning: String,
}

/// The public constants of a source text, in its order.
fn limits_in(code: &str) -> Vec<Limit> {
    let mut limits = Vec::new();
    let mut meaning: Vec<&str> = Vec::new();
    let mut lines = code.lines();
    while let Some(line) = lines.next() {
        if let Some(text) = line.strip_prefix("///") {
            meaning.push(text.trim());
        } else if let Some(rest) = line.strip_prefix("pub const ") {
            // A value that is too long for one line goes on below it.
            let mut text = rest.to_owned();
            while !text.ends_with(';') {
                text = format!("{text} {}", lines.next().unwrap().trim());
            }
            let (name, value) = text.trim_end_matches(';').split_once(" = ").unwrap();
            let (name, _) = name.split_once(':').unwrap();
            limits.push(Limit {
                name: name.to_owned(),
                value: plain(value),
                meaning: meaning.join(" ").replace("[`", "`").replace("`]", "`"),
            });
            meaning.clear();
        } else if !line.starts_with("#[") {
            meaning.clear();
        }
    }
    limits
}

/// A value in the words of the page: `Duration::from_secs(10)` is 10 s, types and paths go.
fn plain(value: &str) -> String {
    for (call, unit) in [("from_secs", "s"), ("from_millis", "ms")] {
        let inner = value.strip_prefix(&format!("Duration::{call}("));
        if let Some(inner) = inner.and_then(|inner| inner.strip_suffix(')')) {
            return format!("{inner} {unit}");
        }
    }
    value.rsplit("::").next().unwrap().to_owned()
}

fn page() -> String {
    let mut page = HEAD.to_owned();
    let mut all = 0;
    for (path, code) in files(&["limits.rs"]) {
        if OTHERS.iter().any(|folder| path.starts_with(folder)) {
            continue;
        }
        let limits = limits_in(&code);
        all += limits.len();
        let _ = write!(
            page,
            "\n## {path}\n\n| Limit | Value | Bounds |\n|---|---|---|\n"
        );
        for limit in limits {
            let Limit {
                name,
                value,
                meaning,
            } = limit;
            let _ = writeln!(page, "| `{name}` | {value} | {meaning} |");
        }
    }
    assert!(all > 50, "only {all} limits seen");
    page
}

#[test]
fn the_limits_page_says_what_the_sources_say() {
    let (path, wanted) = (root().join(PAGE), page());
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, &wanted).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    let differs = wanted
        .lines()
        .find(|line| !found.lines().any(|known| known == *line));
    assert!(
        found == wanted,
        "{PAGE} is out of date (first line that is new: {differs:?}): {WRITE}=1 writes it"
    );
}

#[test]
fn the_reader_of_limits_reads() {
    let code = "//! Module.\n\n/// Longest [`Name`], in\n/// characters.\npub const A_MAX: usize = 4 * 1024;\n\n\
        /// Not for others.\nconst B: u8 = 1;\n\n/// Time.\npub const C: Duration = Duration::from_secs(10);\n\n\
        /// Elsewhere.\npub const D: usize =\n    a::b::E;\n";
    let limits: Vec<_> = limits_in(code)
        .into_iter()
        .map(|limit| [limit.name, limit.value, limit.meaning].join("|"))
        .collect();
    assert_eq!(
        limits,
        [
            "A_MAX|4 * 1024|Longest `Name`, in characters.",
            "C|10 s|Time.",
            "D|E|Elsewhere."
        ]
    );
}
