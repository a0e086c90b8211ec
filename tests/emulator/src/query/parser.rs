//! From the words of a query to its meaning.

use serde_json::Value;

use super::condition::{Condition, Path};
use super::lexer::{Kind, Token};
use super::{Column, Query, QueryError, Selection, Source};
use crate::limits::QUERY_DEPTH_MAX;

/// Words that do not begin a path.
const RESERVED: [&str; 15] = [
    "AND", "AS", "BY", "FALSE", "FROM", "GROUP", "IN", "NIN", "NOT", "NULL", "OR", "ORDER",
    "SELECT", "TRUE", "WHERE",
];

/// Reads the words up to their end.
pub(super) fn parse(tokens: &[Token]) -> Result<Query, QueryError> {
    let mut parser = Parser { tokens, depth: 0 };
    parser.word("SELECT", "SELECT")?;
    let selection = parser.selection()?;
    parser.word("FROM", "FROM")?;
    let source = parser.source()?;
    let filter = if parser.takes_word("WHERE") {
        Some(parser.any()?)
    } else {
        None
    };
    match parser.kind() {
        Kind::End => Ok(Query {
            selection,
            source,
            filter,
        }),
        _ => Err(parser.expected("the end of the query")),
    }
}

struct Parser<'a> {
    /// What is not read yet.
    tokens: &'a [Token],
    /// Parentheses and negations around the next word.
    depth: usize,
}

impl Parser<'_> {
    fn kind(&self) -> &Kind {
        self.tokens.first().map_or(&Kind::End, |token| &token.kind)
    }

    fn advance(&mut self) {
        self.tokens = self.tokens.split_first().map_or(&[], |(_, rest)| rest);
    }

    fn expected(&self, wanted: &'static str) -> QueryError {
        let at = self.tokens.first().map_or(0, |token| token.at);
        QueryError::Expected { wanted, at }
    }

    fn is_word(&self, word: &str) -> bool {
        matches!(self.kind(), Kind::Name(name) if name.eq_ignore_ascii_case(word))
    }

    fn takes_word(&mut self, word: &str) -> bool {
        let takes = self.is_word(word);
        if takes {
            self.advance();
        }
        takes
    }

    fn word(&mut self, word: &str, wanted: &'static str) -> Result<(), QueryError> {
        if self.takes_word(word) {
            return Ok(());
        }
        Err(self.expected(wanted))
    }

    fn takes_mark(&mut self, mark: &str) -> bool {
        let takes = matches!(self.kind(), Kind::Mark(found) if *found == mark);
        if takes {
            self.advance();
        }
        takes
    }

    fn mark(&mut self, mark: &'static str) -> Result<(), QueryError> {
        if self.takes_mark(mark) {
            return Ok(());
        }
        Err(self.expected(mark))
    }

    fn selection(&mut self) -> Result<Selection, QueryError> {
        if self.takes_mark("*") {
            return Ok(Selection::All);
        }
        if self.takes_word("COUNT") {
            self.mark("(")?;
            self.mark(")")?;
            self.word("AS", "AS")?;
            return Ok(Selection::Count(self.name("a name for the count")?));
        }
        let mut columns = vec![self.column()?];
        while self.takes_mark(",") {
            columns.push(self.column()?);
        }
        Ok(Selection::Columns(columns))
    }

    fn column(&mut self) -> Result<Column, QueryError> {
        let path = self.path("*, COUNT() or a property")?;
        let name = if self.takes_word("AS") {
            self.name("a name for the column")?
        } else {
            path.0.last().cloned().unwrap_or_default()
        };
        Ok(Column { path, name })
    }

    fn source(&mut self) -> Result<Source, QueryError> {
        const WANTED: &str = "devices or devices.modules";
        self.word("devices", WANTED)?;
        if !self.takes_mark(".") {
            return Ok(Source::Devices);
        }
        self.word("modules", WANTED)?;
        Ok(Source::Modules)
    }

    fn name(&mut self, wanted: &'static str) -> Result<String, QueryError> {
        match self.kind() {
            Kind::Name(name) if !RESERVED.iter().any(|word| name.eq_ignore_ascii_case(word)) => {
                let name = name.clone();
                self.advance();
                Ok(name)
            }
            _ => Err(self.expected(wanted)),
        }
    }

    fn path(&mut self, wanted: &'static str) -> Result<Path, QueryError> {
        let mut names = vec![self.name(wanted)?];
        while self.takes_mark(".") {
            // Behind a dot a word of the language is a name as any other.
            let Kind::Name(name) = self.kind() else {
                return Err(self.expected("the name of a property"));
            };
            names.push(name.clone());
            self.advance();
        }
        Ok(Path(names))
    }

    fn any(&mut self) -> Result<Condition, QueryError> {
        let mut any = vec![self.all()?];
        while self.takes_word("OR") {
            any.push(self.all()?);
        }
        Ok(one_or(any, Condition::Or))
    }

    fn all(&mut self) -> Result<Condition, QueryError> {
        let mut all = vec![self.negated()?];
        while self.takes_word("AND") {
            all.push(self.negated()?);
        }
        Ok(one_or(all, Condition::And))
    }

    fn negated(&mut self) -> Result<Condition, QueryError> {
        if self.takes_word("NOT") {
            let inner = self.deeper(Self::negated)?;
            return Ok(Condition::Not(Box::new(inner)));
        }
        if self.takes_mark("(") {
            let inner = self.deeper(Self::any)?;
            self.mark(")")?;
            return Ok(inner);
        }
        self.term()
    }

    fn deeper(
        &mut self,
        read: fn(&mut Self) -> Result<Condition, QueryError>,
    ) -> Result<Condition, QueryError> {
        if self.depth >= QUERY_DEPTH_MAX {
            return Err(QueryError::Depth);
        }
        self.depth += 1;
        let inner = read(self)?;
        self.depth -= 1;
        Ok(inner)
    }

    fn term(&mut self) -> Result<Condition, QueryError> {
        let path = self.path("a condition")?;
        if self.takes_mark("(") {
            let condition = self.function(&path)?;
            self.mark(")")?;
            return Ok(condition);
        }
        let (listed, negated) = if self.takes_mark("=") {
            (false, false)
        } else if self.takes_mark("!=") || self.takes_mark("<>") {
            (false, true)
        } else if self.takes_word("IN") {
            (true, false)
        } else if self.takes_word("NIN") {
            (true, true)
        } else {
            return Err(self.expected("=, !=, <>, IN or NIN"));
        };
        let condition = if listed {
            let literals = self.list()?;
            Condition::In { path, literals }
        } else {
            let literal = self.literal()?;
            Condition::Equals { path, literal }
        };
        Ok(if negated {
            Condition::Not(Box::new(condition))
        } else {
            condition
        })
    }

    /// The arguments of a function whose name and parenthesis are read.
    fn function(&mut self, name: &Path) -> Result<Condition, QueryError> {
        let name = match name.0.as_slice() {
            [name] => name.to_ascii_uppercase(),
            _ => String::new(),
        };
        match name.as_str() {
            "IS_DEFINED" => Ok(Condition::IsDefined(self.path("a property")?)),
            "STARTSWITH" => {
                let path = self.path("a property")?;
                self.mark(",")?;
                match self.literal()? {
                    Value::String(prefix) => Ok(Condition::StartsWith { path, prefix }),
                    _ => Err(self.expected("a text before this")),
                }
            }
            "ARRAY_CONTAINS" => {
                let path = self.path("a property")?;
                self.mark(",")?;
                let literal = self.literal()?;
                Ok(Condition::ArrayContains { path, literal })
            }
            _ => Err(self.expected("IS_DEFINED, STARTSWITH or ARRAY_CONTAINS before this")),
        }
    }

    fn list(&mut self) -> Result<Vec<Value>, QueryError> {
        self.mark("[")?;
        let mut literals = vec![self.literal()?];
        while self.takes_mark(",") {
            literals.push(self.literal()?);
        }
        self.mark("]")?;
        Ok(literals)
    }

    fn literal(&mut self) -> Result<Value, QueryError> {
        let literal = match self.kind() {
            Kind::Text(text) => Value::String(text.clone()),
            Kind::Number(number) => Value::Number(number.clone()),
            Kind::Name(name) => match name.to_ascii_uppercase().as_str() {
                "TRUE" => Value::Bool(true),
                "FALSE" => Value::Bool(false),
                "NULL" => Value::Null,
                _ => return Err(self.expected("a literal")),
            },
            Kind::Mark(_) | Kind::End => return Err(self.expected("a literal")),
        };
        self.advance();
        Ok(literal)
    }
}

/// The only one, or several as one.
fn one_or(mut several: Vec<Condition>, combine: fn(Vec<Condition>) -> Condition) -> Condition {
    match several.pop() {
        Some(only) if several.is_empty() => only,
        Some(last) => {
            several.push(last);
            combine(several)
        }
        None => combine(several),
    }
}
