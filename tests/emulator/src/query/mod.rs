//! The part of IoT Hub's query language that is here (spec/upstream.md B10, M2): text in, a
//! condition and a projection on the JSON of a twin out.
//!
//! ```text
//! query   = SELECT (* | COUNT() AS name | column {, column}) FROM (devices | devices.modules)
//!           [WHERE or]
//! column  = path [AS name]
//! or      = and {OR and}          and = not {AND not}          not = {NOT} term
//! term    = ( or ) | IS_DEFINED(path) | STARTSWITH(path, text) | ARRAY_CONTAINS(path, literal)
//!         | path (= | != | <>) literal | path (IN | NIN) [literal {, literal}]
//! path    = name {. name}          literal = text | number | true | false | null
//! ```
//!
//! Words are read in any letter case, paths are not. Everything else is an error, so that a test
//! never gets an answer to another question than it asked. A comparison with something that a
//! document does not have is neither true nor false, and stays so under `NOT`; only what is true
//! is found.

mod condition;
mod lexer;
mod parser;

use serde_json::{Map, Value};

use crate::limits::{QUERY_BYTES_MAX, QUERY_DEPTH_MAX};
use condition::{Condition, Path};

/// Why a text is no query of the part that is here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueryError {
    #[error("at byte {at}: {character:?} has no meaning")]
    Character { character: char, at: usize },
    #[error("conditions are nested deeper than {QUERY_DEPTH_MAX}")]
    Depth,
    #[error("at byte {at}: expected {wanted}")]
    Expected { wanted: &'static str, at: usize },
    #[error("at byte {at}: the number is not one that JSON has")]
    Number { at: usize },
    #[error("the query is longer than {QUERY_BYTES_MAX} bytes")]
    Size,
    #[error("at byte {at}: the text has no end, or an escape that is not known")]
    Text { at: usize },
}

/// What a query runs over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Devices,
    Modules,
}

/// What a query answers with.
#[derive(Debug, Clone, PartialEq)]
enum Selection {
    /// The documents themselves.
    All,
    Columns(Vec<Column>),
    /// How many there are, under this name.
    Count(String),
}

#[derive(Debug, Clone, PartialEq)]
struct Column {
    path: Path,
    name: String,
}

/// A query that was understood.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Query {
    selection: Selection,
    source: Source,
    filter: Option<Condition>,
}

impl Query {
    /// Reads a query.
    ///
    /// # Errors
    /// It is outside of the grammar above, or of the limits.
    pub(crate) fn parse(text: &str) -> Result<Self, QueryError> {
        if text.len() > QUERY_BYTES_MAX {
            return Err(QueryError::Size);
        }
        parser::parse(&lexer::tokens(text)?)
    }

    pub(crate) fn source(&self) -> Source {
        self.source
    }

    /// Whether the answer has the documents as they are.
    pub(crate) fn selects_all(&self) -> bool {
        self.selection == Selection::All
    }

    /// The name of the count, if that is all that is asked for.
    pub(crate) fn count_name(&self) -> Option<&str> {
        match &self.selection {
            Selection::Count(name) => Some(name),
            Selection::All | Selection::Columns(_) => None,
        }
    }

    /// Whether the document is one that the query looks for.
    pub(crate) fn finds(&self, document: &Value) -> bool {
        let filter = self.filter.as_ref();
        filter.is_none_or(|filter| filter.truth(document) == Some(true))
    }

    /// What the answer has of a document. Columns that it does not have are left out.
    pub(crate) fn project(&self, document: Value) -> Value {
        let Selection::Columns(columns) = &self.selection else {
            return document;
        };
        let cells = columns.iter().filter_map(|column| {
            let value = column.path.find(&document)?;
            Some((column.name.clone(), value.clone()))
        });
        Value::Object(cells.collect::<Map<_, _>>())
    }
}

#[cfg(test)]
#[path = "query_tests.rs"]
mod tests;
