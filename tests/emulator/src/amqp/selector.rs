//! Where a reader of events begins: the selector filter of its source (spec/upstream.md B8.2).

/// The filter's name in a source's filter set.
pub(super) const SELECTOR: &str = "apache.org:selector-filter:string";

/// The first event that a reader gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Start {
    /// The next one that arrives.
    Latest,
    /// That of this number.
    Sequence(u64),
    /// The first one that was enqueued at this time or later, milliseconds since 1970.
    Time(u64),
}

impl Start {
    /// Reads a selector; none for every form that is not supported. Offsets are sequence numbers.
    pub(super) fn parse(selector: &str) -> Option<Self> {
        let rest = selector.trim().strip_prefix("amqp.annotation.x-opt-")?;
        let (name, rest) = rest.split_at(rest.find([' ', '>'])?);
        let rest = rest.trim_start().strip_prefix('>')?;
        let (inclusive, value) = match rest.strip_prefix('=') {
            Some(value) => (true, value),
            None => (false, rest),
        };
        let value = value.trim();
        let quoted = value
            .strip_prefix('\'')
            .and_then(|value| value.strip_suffix('\''));
        let value = quoted.unwrap_or(value);
        if name == "offset" && value == "@latest" {
            return Some(Self::Latest);
        }
        let value: i64 = value.parse().ok()?;
        // The first number or time that fits.
        let first = u64::try_from(value.checked_add(i64::from(!inclusive))?).unwrap_or(0);
        match name {
            "offset" | "sequence-number" => Some(Self::Sequence(first)),
            "enqueued-time" => Some(Self::Time(first)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_forms_are_read() {
        for (text, start) in [
            ("amqp.annotation.x-opt-offset > '@latest'", Start::Latest),
            ("amqp.annotation.x-opt-offset > '-1'", Start::Sequence(0)),
            ("amqp.annotation.x-opt-offset >= '7'", Start::Sequence(7)),
            ("amqp.annotation.x-opt-offset > '7'", Start::Sequence(8)),
            (
                "amqp.annotation.x-opt-sequence-number > '7'",
                Start::Sequence(8),
            ),
            (
                "amqp.annotation.x-opt-sequence-number >=7",
                Start::Sequence(7),
            ),
            ("amqp.annotation.x-opt-enqueued-time > '5'", Start::Time(6)),
            ("amqp.annotation.x-opt-enqueued-time >= 5", Start::Time(5)),
        ] {
            assert_eq!(Start::parse(text), Some(start), "{text}");
        }
        for text in [
            "",
            "x-opt-offset > '1'",
            "amqp.annotation.x-opt-offset < '1'",
            "amqp.annotation.x-opt-offset = '1'",
            "amqp.annotation.x-opt-offset > 'a'",
            "amqp.annotation.x-opt-partition-key > '1'",
            "amqp.annotation.x-opt-offset > '1' OR 1=1",
            "amqp.annotation.x-opt-sequence-number > '9223372036854775807'",
        ] {
            assert_eq!(Start::parse(text), None, "{text}");
        }
    }
}
