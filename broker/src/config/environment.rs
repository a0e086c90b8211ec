//! Reads named values out of the process environment the way the reference does.
//!
//! Names are case-insensitive and `__` stands for the section separator `:`
//! (spec/operations.md A1.1). A value that cannot be read is reported once and replaced by its
//! default: a typo must not become a crash loop. What makes operation impossible is decided by
//! [`super::Settings`], not here.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::IpAddr;
use std::time::Duration;

/// The environment of one process, looked up by case-insensitive name.
///
/// Collects what was wrong with the values that were asked for, so that all problems can be
/// printed together.
#[derive(Debug, Default)]
pub struct Environment {
    values: BTreeMap<String, String>,
    problems: Vec<String>,
}

impl Environment {
    /// Takes the variables of a process. Of two names that differ only in case the one that is
    /// spelled differently from `known` wins, because the host runtime injects the canonical
    /// spelling next to what the user wrote (A1.1, item 3).
    pub fn new(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut values = BTreeMap::new();
        let mut problems = Vec::new();
        for (name, value) in variables {
            let key = canonical(&name);
            if let Some(previous) = values.insert(key.clone(), (name.clone(), value.clone())) {
                let injected = |n: &str| matches!(n, "RuntimeLogLevel" | "UpstreamProtocol");
                problems.push(format!(
                    "{} and {name} are the same setting; set only one of them",
                    previous.0
                ));
                if injected(&name) && !injected(&previous.0) {
                    values.insert(key, previous);
                }
            }
        }
        let values = values
            .into_iter()
            .map(|(key, (_, value))| (key, value))
            .collect();
        Self { values, problems }
    }

    /// The variables of this process; names or values that are not UTF-8 are skipped.
    #[must_use]
    pub fn of_process() -> Self {
        Self::new(std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        }))
    }

    /// The text of `name`, when it is set and not blank.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<&str> {
        self.values
            .get(&canonical(name))
            .map(|value| value.trim())
            .filter(|v| !v.is_empty())
    }

    /// Every `(rest, value)` whose name is `section` + `__` + `rest`, `rest` in the spelling of
    /// its canonical (lower) case.
    pub fn section<'a>(&'a self, section: &str) -> impl Iterator<Item = (&'a str, &'a str)> {
        let prefix = format!("{}:", canonical(section));
        self.values.iter().filter_map(move |(name, value)| {
            name.strip_prefix(prefix.as_str())
                .map(|rest| (rest, value.as_str()))
        })
    }

    /// `true`/`false` in any case, `1`/`0`.
    pub fn flag(&mut self, name: &str, default: bool) -> bool {
        self.parsed(name, default, "true or false", |text| {
            match text.to_ascii_lowercase().as_str() {
                "true" | "1" => Some(true),
                "false" | "0" => Some(false),
                _ => None,
            }
        })
    }

    /// A whole number, decimal or `0x…`, `&h…`, `#…`.
    pub fn integer(&mut self, name: &str, default: i64) -> i64 {
        self.parsed(name, default, "a whole number", parse_integer)
    }

    /// A whole number within `1..=max`.
    pub fn bounded(&mut self, name: &str, default: u64, max: u64) -> u64 {
        self.parsed(name, default, "a whole number in its range", |text| {
            u64::try_from(parse_integer(text)?)
                .ok()
                .filter(|n| (1..=max).contains(n))
        })
    }

    /// A TCP port, 1 to 65535.
    pub fn port(&mut self, name: &str, default: u16) -> u16 {
        self.parsed(name, default, "a port from 1 to 65535", |text| {
            u16::try_from(parse_integer(text)?)
                .ok()
                .filter(|port| *port != 0)
        })
    }

    /// A .NET `TimeSpan`: `[d.]hh:mm[:ss[.fffffff]]`, or a bare number of days.
    pub fn time_span(&mut self, name: &str, default: Duration) -> Duration {
        match self.text(name).map(parse_time_span) {
            None => default,
            Some(Some(value)) => value,
            Some(None) => {
                self.bad(name, "[d.]hh:mm[:ss]", &format!("{default:?}"));
                default
            }
        }
    }

    /// An IP address without port.
    pub fn address(&mut self, name: &str) -> Option<IpAddr> {
        let text = self.text(name)?;
        let parsed = text.parse().ok();
        if parsed.is_none() {
            self.bad(name, "an IP address", "all addresses");
        }
        parsed
    }

    /// One of `choices`, in any case.
    pub fn choice<T: Copy>(&mut self, name: &str, choices: &[(&str, T)], default: T) -> T {
        let Some(text) = self.text(name) else {
            return default;
        };
        let found = choices
            .iter()
            .find(|(word, _)| word.eq_ignore_ascii_case(text));
        if let Some((_, value)) = found {
            return *value;
        }
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        self.bad(name, &words.join(", "), "its default");
        default
    }

    /// What was wrong with the values asked for so far, in words for the operator.
    pub fn take_problems(&mut self) -> Vec<String> {
        std::mem::take(&mut self.problems)
    }

    fn parsed<T: Display + Copy>(
        &mut self,
        name: &str,
        default: T,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> T {
        match self.text(name).map(parse) {
            None => default,
            Some(Some(value)) => value,
            Some(None) => {
                self.bad(name, expected, &default.to_string());
                default
            }
        }
    }

    fn bad(&mut self, name: &str, expected: &str, used: &str) {
        // The value itself stays out of the text: it may be a secret put under a wrong name.
        self.problems
            .push(format!("{name} is not {expected}; using {used}"));
    }
}

fn canonical(name: &str) -> String {
    name.replace("__", ":").to_ascii_lowercase()
}

fn parse_integer(text: &str) -> Option<i64> {
    let lower = text.to_ascii_lowercase();
    let hex = ["0x", "&h", "#"]
        .iter()
        .find_map(|prefix| lower.strip_prefix(prefix));
    match hex {
        Some(digits) => i64::from_str_radix(digits, 16).ok(),
        None => lower.parse().ok(),
    }
}

fn parse_time_span(text: &str) -> Option<Duration> {
    if let Ok(days) = text.parse::<u32>() {
        return Some(Duration::from_secs(u64::from(days) * 86_400));
    }
    let (days, clock) = match text.split_once(':')?.0.split_once('.') {
        Some((days, _)) => (days.parse::<u32>().ok()?, text.split_once('.')?.1),
        None => (0, text),
    };
    let mut parts = clock.split(':');
    let hours: u32 = parts.next()?.parse().ok().filter(|h| *h < 24)?;
    let minutes: u32 = parts.next()?.parse().ok().filter(|m| *m < 60)?;
    let seconds: f64 = match parts.next() {
        Some(text) => text.parse().ok().filter(|s| (0.0..60.0).contains(s))?,
        None => 0.0,
    };
    if parts.next().is_some() {
        return None;
    }
    let whole = u64::from(days) * 86_400 + u64::from(hours) * 3600 + u64::from(minutes) * 60;
    Some(Duration::from_secs(whole) + Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(pairs: &[(&str, &str)]) -> Environment {
        Environment::new(
            pairs
                .iter()
                .map(|(n, v)| ((*n).to_owned(), (*v).to_owned())),
        )
    }

    #[test]
    fn names_ignore_case_and_the_separator_spelling() {
        let env = environment(&[("MQTTSETTINGS__Port", "1"), ("httpsettings:PORT", "2")]);
        assert_eq!(env.text("MqttSettings__Port"), Some("1"));
        assert_eq!(env.text("HttpSettings__Port"), Some("2"));
        assert_eq!(env.text("AmqpSettings__Port"), None);
    }

    #[test]
    fn the_spelling_of_the_user_beats_the_injected_one() {
        for order in [[0, 1], [1, 0]] {
            let both = [
                ("runtimeloglevel", "debug"),
                ("RuntimeLogLevel", "Information"),
            ];
            let mut env = environment(&[both[order[0]], both[order[1]]]);
            assert_eq!(env.text("RuntimeLogLevel"), Some("debug"));
            assert_eq!(env.take_problems().len(), 1);
        }
    }

    #[test]
    fn a_bad_value_is_reported_without_the_value_and_the_default_used() {
        let mut env = environment(&[("A", "yes"), ("B", "70000"), ("C", "x"), ("D", "24:00")]);
        assert!(env.flag("A", true));
        assert_eq!(env.port("B", 8883), 8883);
        assert_eq!(env.integer("C", -1), -1);
        assert_eq!(
            env.time_span("D", Duration::from_secs(7)),
            Duration::from_secs(7)
        );
        let problems = env.take_problems();
        assert_eq!(problems.len(), 4);
        assert!(problems.iter().all(|p| !p.contains("70000")));
    }

    #[test]
    fn numbers_and_time_spans_follow_dotnet() {
        assert_eq!(parse_integer("0x1F"), Some(31));
        assert_eq!(parse_integer("&h1f"), Some(31));
        assert_eq!(parse_integer("-5"), Some(-5));
        assert_eq!(
            parse_time_span("60"),
            Some(Duration::from_secs(60 * 86_400))
        );
        assert_eq!(parse_time_span("01:00:00"), Some(Duration::from_secs(3600)));
        assert_eq!(
            parse_time_span("1.00:00:00"),
            Some(Duration::from_secs(86_400))
        );
        assert_eq!(
            parse_time_span("00:00:30.5"),
            Some(Duration::from_millis(30_500))
        );
        assert_eq!(parse_time_span("00:29"), Some(Duration::from_secs(29 * 60)));
        assert_eq!(parse_time_span("soon"), None);
    }

    #[test]
    fn a_section_lists_its_entries() {
        let env = environment(&[("routes__r1", "FROM /* INTO $upstream"), ("routesX", "no")]);
        let routes: Vec<_> = env.section("routes").collect();
        assert_eq!(routes, [("r1", "FROM /* INTO $upstream")]);
    }
}
