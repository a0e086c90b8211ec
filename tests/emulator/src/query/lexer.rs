//! The words of a query.

use super::QueryError;

/// A word, and the byte where it begins.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) at: usize,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Kind {
    /// `=`, `!=`, `<>`, `*`, `.`, `,` and brackets.
    Mark(&'static str),
    /// A keyword, or a part of a path.
    Name(String),
    Number(serde_json::Number),
    Text(String),
    /// Where the query ends.
    End,
}

/// Longer marks first: `<>` is not two.
const MARKS: [&str; 10] = ["!=", "<>", "=", "*", ".", ",", "(", ")", "[", "]"];

/// Splits a query into words; the last one is [`Kind::End`].
pub(super) fn tokens(text: &str) -> Result<Vec<Token>, QueryError> {
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some((rest, first)) = text
        .get(at..)
        .and_then(|rest| Some((rest, rest.chars().next()?)))
    {
        let (kind, length) = if first.is_ascii_whitespace() {
            at += 1;
            continue;
        } else if first.is_ascii_alphabetic() || matches!(first, '_' | '$') {
            let length = length_of(rest, |c| {
                c.is_ascii_alphanumeric() || matches!(c, '_' | '$')
            });
            (
                Kind::Name(rest.get(..length).unwrap_or_default().to_owned()),
                length,
            )
        } else if first.is_ascii_digit() || first == '-' {
            let length = length_of(rest, |c| {
                c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.')
            });
            let number = rest.get(..length).and_then(|text| text.parse().ok());
            (
                Kind::Number(number.ok_or(QueryError::Number { at })?),
                length,
            )
        } else if matches!(first, '\'' | '"') {
            let (content, length) = quoted(rest, first).ok_or(QueryError::Text { at })?;
            (Kind::Text(content), length)
        } else {
            let mark = MARKS.into_iter().find(|mark| rest.starts_with(mark));
            let mark = mark.ok_or(QueryError::Character {
                character: first,
                at,
            })?;
            (Kind::Mark(mark), mark.len())
        };
        tokens.push(Token { kind, at });
        at += length;
    }
    tokens.push(Token {
        kind: Kind::End,
        at,
    });
    Ok(tokens)
}

fn length_of(text: &str, belongs: impl Fn(char) -> bool) -> usize {
    text.find(|c| !belongs(c)).unwrap_or(text.len())
}

/// A text in quotes, and how many bytes it takes with them. Escapes are a backslash before a
/// quote, a backslash, or `u` with four hexadecimal digits.
fn quoted(text: &str, quote: char) -> Option<(String, usize)> {
    let mut content = String::new();
    let mut characters = text.char_indices();
    characters.next()?;
    loop {
        let (at, character) = characters.next()?;
        match character {
            _ if character == quote => return Some((content, at + quote.len_utf8())),
            '\\' => match characters.next()?.1 {
                escaped @ ('\'' | '"' | '\\') => content.push(escaped),
                'u' => {
                    let digits = [(); 4].map(|()| characters.next());
                    let code = digits
                        .into_iter()
                        .try_fold(0, |code, digit| Some(code * 16 + digit?.1.to_digit(16)?))?;
                    content.push(char::from_u32(code)?);
                }
                _ => return None,
            },
            _ => content.push(character),
        }
    }
}
