//! The route statement: `[SELECT *] FROM <path> [WHERE <condition>] INTO <sink>`.
//!
//! Conditions come with the routing issue: a route that has one is refused with its position,
//! so that nobody believes a filter is active that is not. Text after the sink is an error
//! (design.md D2; the reference drops it in silence). Grammar: spec/core.md 2.1, 2.3.

use std::fmt;

use super::UPSTREAM_ENDPOINT;
use super::source::SourcePattern;

/// Where a route sends to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Sink {
    /// `$upstream`: IoT Hub or the parent.
    Upstream,
    /// `BrokeredEndpoint("/modules/<module>/inputs/<input>")` on this device.
    Input {
        /// The module of this device.
        module: String,
        /// The name of its input.
        input: String,
    },
}

impl Sink {
    /// The id of the endpoint: `iothub`, or `<device>/<module>/<input>` (spec/core.md 2.1).
    #[must_use]
    pub fn endpoint(&self, own_device: &str) -> String {
        match self {
            Self::Upstream => UPSTREAM_ENDPOINT.to_owned(),
            Self::Input { module, input } => format!("{own_device}/{module}/{input}"),
        }
    }
}

/// One route, parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The `FROM`.
    pub source: SourcePattern,
    /// The `INTO`.
    pub sink: Sink,
}

/// Why a route text is refused, with the 1-based column where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteError {
    /// 1-based column of the first character that is wrong, in characters.
    pub column: usize,
    /// What is wrong.
    pub fault: RouteFault,
}

/// The faults of a route text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RouteFault {
    /// A word of the grammar is missing here.
    #[error("Syntax error: expected {0}")]
    Expected(&'static str),
    /// A `WHERE` clause.
    #[error("conditions (WHERE) are not supported yet")]
    Condition,
    /// A comment or a quoted text has no end.
    #[error("Syntax error: unterminated {0}")]
    Unterminated(&'static str),
    /// `$something` that is not `$upstream`.
    #[error("System endpoint type '{0}' not supported")]
    SystemEndpoint(String),
    /// A function that is not `BrokeredEndpoint`.
    #[error("Function endpoint type '{0}' not supported")]
    FunctionEndpoint(String),
    /// The address of a module input does not have four parts.
    #[error("endpoint address '{0}' must be /modules/<module>/inputs/<input>")]
    Address(String),
    /// Something follows the sink.
    #[error("Syntax error: text after the sink")]
    Trailing,
}

impl fmt::Display for RouteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (column {})", self.fault, self.column)
    }
}

impl std::error::Error for RouteError {}

impl Route {
    /// Parses a route's text.
    ///
    /// # Errors
    /// Names the first fault and its column.
    pub fn parse(text: &str) -> Result<Self, RouteError> {
        let mut cursor = Cursor { text, at: 0 };
        cursor.skip_blank()?;
        if cursor.keyword("SELECT") {
            cursor.skip_blank()?;
            if !cursor.take("*") {
                return Err(cursor.fault(RouteFault::Expected("* after SELECT")));
            }
            cursor.skip_blank()?;
        }
        if !cursor.keyword("FROM") {
            return Err(cursor.fault(RouteFault::Expected("FROM")));
        }
        cursor.skip_blank()?;
        let path = cursor.word();
        if !path.starts_with('/') {
            return Err(cursor.back(path, RouteFault::Expected("a path that begins with /")));
        }
        let source = SourcePattern::new(path);
        cursor.skip_blank()?;
        if cursor.keyword("WHERE") {
            return Err(cursor.back("WHERE", RouteFault::Condition));
        }
        if !cursor.keyword("INTO") {
            return Err(cursor.fault(RouteFault::Expected("WHERE or INTO")));
        }
        cursor.skip_blank()?;
        let sink = cursor.sink()?;
        cursor.skip_blank()?;
        if !cursor.rest().is_empty() {
            return Err(cursor.fault(RouteFault::Trailing));
        }
        Ok(Self { source, sink })
    }
}

struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or("")
    }

    fn fault(&self, fault: RouteFault) -> RouteError {
        let column = self.text.get(..self.at).unwrap_or("").chars().count() + 1;
        RouteError { column, fault }
    }

    /// A fault at the beginning of `taken`, which was just consumed.
    fn back(&mut self, taken: &str, fault: RouteFault) -> RouteError {
        self.at = self.at.saturating_sub(taken.len());
        self.fault(fault)
    }

    fn skip_blank(&mut self) -> Result<(), RouteError> {
        loop {
            let trimmed = self.rest().trim_start();
            self.at = self.text.len() - trimmed.len();
            let Some(comment) = trimmed.strip_prefix("/*") else {
                return Ok(());
            };
            // `/*` is also the commonest path: only a closed comment is one.
            let Some(end) = comment.find("*/") else {
                return Ok(());
            };
            self.at += 2 + end + 2;
        }
    }

    fn take(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    /// Consumes `word` in any case when it stands here as a whole word.
    fn keyword(&mut self, word: &str) -> bool {
        let rest = self.rest();
        let found = rest
            .get(..word.len())
            .is_some_and(|head| head.eq_ignore_ascii_case(word))
            && rest.get(word.len()..).is_none_or(|tail| {
                tail.chars()
                    .next()
                    .is_none_or(|c| c.is_whitespace() || matches!(c, '/' | '*'))
            });
        if found {
            self.at += word.len();
        }
        found
    }

    /// The run of characters up to white space.
    fn word(&mut self) -> &'a str {
        let rest = self.rest();
        let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
        self.at += end;
        rest.get(..end).unwrap_or("")
    }

    fn sink(&mut self) -> Result<Sink, RouteError> {
        let rest = self.rest();
        if rest.starts_with('$') {
            let word = self.word();
            if word.eq_ignore_ascii_case("$upstream") {
                return Ok(Sink::Upstream);
            }
            return Err(self.back(word, RouteFault::SystemEndpoint(word.to_owned())));
        }
        let Some(open) = rest.find('(') else {
            return Err(self.fault(RouteFault::Expected("$upstream or BrokeredEndpoint(\"…\")")));
        };
        let name = rest.get(..open).unwrap_or("").trim_end();
        if !name.eq_ignore_ascii_case("BrokeredEndpoint") {
            return Err(self.fault(RouteFault::FunctionEndpoint(name.to_owned())));
        }
        self.at += open + 1;
        self.skip_blank()?;
        let quote = self
            .rest()
            .chars()
            .next()
            .filter(|c| matches!(c, '"' | '\''));
        let Some(quote) = quote else {
            return Err(self.fault(RouteFault::Expected("a quoted endpoint address")));
        };
        let start = self.at + 1;
        let Some(length) = self.text.get(start..).and_then(|t| t.find(quote)) else {
            return Err(self.fault(RouteFault::Unterminated("string")));
        };
        let address = self.text.get(start..start + length).unwrap_or("");
        let sink =
            input(address).ok_or_else(|| self.fault(RouteFault::Address(address.to_owned())))?;
        self.at = start + length + 1;
        self.skip_blank()?;
        if !self.take(")") {
            return Err(self.fault(RouteFault::Expected("a closing )")));
        }
        Ok(sink)
    }
}

/// Parts 1 and 3 are not looked at, as in the reference (spec/core.md 2.1).
fn input(address: &str) -> Option<Sink> {
    let trimmed = address.trim();
    let trimmed = trimmed.strip_prefix('/').unwrap_or(trimmed);
    let trimmed = trimmed.strip_suffix('/').unwrap_or(trimmed);
    let parts: Vec<&str> = trimmed.split('/').collect();
    match parts.as_slice() {
        [first, module, third, input]
            if [first, module, third, input]
                .iter()
                .all(|part| !part.is_empty()) =>
        {
            Some(Sink::Input {
                module: (*module).to_owned(),
                input: (*input).to_owned(),
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fault(text: &str) -> (usize, RouteFault) {
        let error = Route::parse(text).unwrap_err();
        (error.column, error.fault)
    }

    #[test]
    fn upstream_routes_parse_in_every_spelling() {
        for text in [
            "FROM /messages/* INTO $upstream",
            "  select * from /messages/*   into $UPSTREAM  ",
            "FROM /* INTO $upstream",
            "/* all of it */ FROM /messages/* /* up */ INTO $upstream",
        ] {
            assert_eq!(Route::parse(text).unwrap().sink, Sink::Upstream, "{text}");
        }
    }

    #[test]
    fn module_inputs_are_sinks() {
        for text in [
            r#"FROM /messages/* INTO BrokeredEndpoint("/modules/filter/inputs/in1")"#,
            r"FROM /messages/* INTO brokeredendpoint( '/modules/filter/inputs/in1/' ) ",
            r#"FROM /messages/* INTO BrokeredEndpoint("a/filter/b/in1")"#,
        ] {
            let sink = Route::parse(text).unwrap().sink;
            assert_eq!(sink.endpoint("edge1"), "edge1/filter/in1", "{text}");
        }
    }

    #[test]
    fn faults_name_what_and_where() {
        assert_eq!(
            fault("FORM /* INTO $upstream"),
            (1, RouteFault::Expected("FROM"))
        );
        assert_eq!(
            fault("FROM /a WHERE x = '1' INTO $upstream"),
            (9, RouteFault::Condition)
        );
        assert_eq!(
            fault("FROM /a INTO $upstream WHERE x"),
            (24, RouteFault::Trailing)
        );
        assert_eq!(
            fault("FROM /a INTO upstream").1,
            RouteFault::Expected("$upstream or BrokeredEndpoint(\"…\")")
        );
        assert_eq!(
            fault("FROM /a INTO $cloud"),
            (14, RouteFault::SystemEndpoint("$cloud".to_owned()))
        );
        assert_eq!(
            fault("FROM /a INTO Queue('x')").1,
            RouteFault::FunctionEndpoint("Queue".to_owned())
        );
        for address in [
            "/modules/filter",
            "//modules/f/inputs/i",
            "/modules//inputs/i",
        ] {
            let text = format!("FROM /a INTO BrokeredEndpoint('{address}')");
            assert_eq!(fault(&text).1, RouteFault::Address(address.to_owned()));
        }
        assert_eq!(
            fault("FROM /a INTO BrokeredEndpoint(\"/modules/m/inputs/i')").1,
            RouteFault::Unterminated("string")
        );
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "[ -~é/*'\"()$]{0,80}") {
            let _ = Route::parse(&text);
            let _ = Route::parse(&format!("FROM {text} INTO $upstream"));
            let _ = Route::parse(&format!("FROM /* INTO {text}"));
        }
    }
}
