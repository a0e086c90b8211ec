//! Reads named values out of the process environment the way the reference does.
//!
//! Names are case-insensitive and `__` stands for the section separator `:`
//! (spec/operations.md A1.1). A value that cannot be read is reported once and replaced by its
//! default: a typo must not become a crash loop. What makes operation impossible is decided by
//! [`super::Settings`], not here.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

/// Characters of a bad value that a report still shows. A longer one may be a key that was put
/// under a wrong name: IoT Hub's shortest has 24.
const VALUE_SHOWN_MAX: usize = 20;

/// Names that the host runtime sets beside what the user wrote (A1.1, item 3).
const INJECTED: [&str; 2] = ["RuntimeLogLevel", "UpstreamProtocol"];

/// The environment of one process, looked up by case-insensitive name. `Debug` shows names only:
/// one of the values is a key.
///
/// Collects what was wrong with the values that were asked for, so that all problems can be
/// printed together. What nobody asks for is none of our business: that `http_proxy` and
/// `HTTP_PROXY` are both set is usual.
#[derive(Default)]
pub struct Environment {
    variables: BTreeMap<String, Variable>,
    problems: Vec<String>,
    warnings: Vec<String>,
}

struct Variable {
    /// As it is spelled.
    name: String,
    value: String,
    /// Other spellings of the name, which do not count; taken when they were reported.
    others: Vec<String>,
}

impl Environment {
    /// Takes the variables of a process. Of two names that differ only in spelling the last one
    /// counts, but one that the host runtime may have injected never does.
    pub fn new(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut known: BTreeMap<String, Variable> = BTreeMap::new();
        for (name, value) in variables {
            let variable = Variable {
                name,
                value,
                others: Vec::new(),
            };
            let key = canonical(&variable.name);
            let Some(earlier) = known.remove(&key) else {
                known.insert(key, variable);
                continue;
            };
            let injected = INJECTED.contains(&variable.name.as_str());
            let (mut counts, mut other) = if injected {
                (earlier, variable)
            } else {
                (variable, earlier)
            };
            counts.others.append(&mut other.others);
            counts.others.push(other.name);
            known.insert(key, counts);
        }
        Self {
            variables: known,
            ..Self::default()
        }
    }

    /// The variables of this process; names or values that are not UTF-8 are skipped.
    #[must_use]
    pub fn of_process() -> Self {
        Self::new(std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        }))
    }

    /// The text of `name`, when it is set and not blank.
    pub fn text(&mut self, name: &str) -> Option<&str> {
        let variable = self.variables.get_mut(&canonical(name))?;
        variable.report_others(&mut self.warnings);
        Some(variable.value.trim()).filter(|value| !value.is_empty())
    }

    /// Every `(rest, value)` whose name is `section` + `__` + `rest`, `rest` as it is spelled;
    /// ordered by name in any case.
    pub fn section(&mut self, section: &str) -> Vec<(String, String)> {
        let prefix = format!("{}:", canonical(section));
        let mut entries = Vec::new();
        for (key, variable) in &mut self.variables {
            let Some(rest) = key.strip_prefix(&prefix) else {
                continue;
            };
            variable.report_others(&mut self.warnings);
            // Nothing before the rest changes its length but the separators, and a separator
            // within it would be a section of its own: then the canonical name has to do.
            let at = variable.name.len().saturating_sub(rest.len());
            let spelled = variable
                .name
                .get(at..)
                .filter(|spelled| spelled.eq_ignore_ascii_case(rest));
            entries.push((spelled.unwrap_or(rest).to_owned(), variable.value.clone()));
        }
        entries
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

    /// A whole number within `range`.
    pub fn bounded(&mut self, name: &str, default: u64, range: RangeInclusive<u64>) -> u64 {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        self.parsed(name, default, &expected, |text| {
            u64::try_from(parse_integer(text)?)
                .ok()
                .filter(|number| range.contains(number))
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

    /// A .NET `TimeSpan` of more than 0: `[d.]hh:mm[:ss[.fffffff]]`, or a bare number of days.
    pub fn time_span(&mut self, name: &str, default: Duration) -> Duration {
        match self.text(name).map(parse_time_span) {
            None => default,
            Some(Some(value)) if !value.is_zero() => value,
            Some(_) => {
                let expected = "a time [d.]hh:mm[:ss] above 0, or a number of days";
                self.bad(name, expected, &format!("{default:?}"));
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

    /// One of `choices`, in any case; the first one is the default.
    pub fn choice<T: Copy>(&mut self, name: &str, choices: [(&str, T); 2]) -> T {
        let [(default, value), (_, other)] = choices;
        let word = self.text(name).unwrap_or(default);
        match choices.map(|(choice, _)| choice.eq_ignore_ascii_case(word)) {
            [true, _] => value,
            [false, true] => other,
            [false, false] => {
                let expected = choices.map(|(choice, _)| choice).join(" or ");
                self.bad(name, &expected, default);
                value
            }
        }
    }

    /// What was wrong with the values asked for so far, in words for the operator.
    pub fn take_problems(&mut self) -> Vec<String> {
        std::mem::take(&mut self.problems)
    }

    /// What an operator should know about the values asked for so far, though all of them count.
    pub fn take_warnings(&mut self) -> Vec<String> {
        std::mem::take(&mut self.warnings)
    }

    /// Adds to [`Self::take_warnings`].
    pub fn warn(&mut self, warning: String) {
        self.warnings.push(warning);
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

    /// Names variable, value, expected form and default (A1.1).
    pub(super) fn bad(&mut self, name: &str, expected: &str, used: &str) {
        let value = self.text(name).unwrap_or_default();
        let shown = if value.chars().count() <= VALUE_SHOWN_MAX {
            format!("{name} is {value:?}, which is not {expected}; using {used}")
        } else {
            format!("{name} is not {expected}; using {used}")
        };
        self.problems.push(shown);
    }
}

impl Variable {
    fn report_others(&mut self, warnings: &mut Vec<String>) {
        for other in std::mem::take(&mut self.others) {
            let name = &self.name;
            warnings.push(format!(
                "{other} and {name} are the same setting; {name} counts"
            ));
        }
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.variables.values().map(|variable| &variable.name);
        f.debug_set().entries(names).finish()
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
        let mut env = environment(&[
            ("MQTTSETTINGS__Port", "1"),
            ("httpsettings:PORT", " 2 "),
            ("RocksDB_MaxOpenFiles", "3"),
            ("mqttSettings__IotHubClient.Max", "4"),
            ("Blank", "  "),
        ]);
        assert_eq!(env.text("MqttSettings__Port"), Some("1"));
        assert_eq!(env.text("mqttSettings:Port"), Some("1"));
        assert_eq!(env.text("HttpSettings__Port"), Some("2"));
        assert_eq!(env.text("AmqpSettings__Port"), None);
        assert_eq!(env.text("MqttSettings_Port"), None);
        // One underscore and a dot are ordinary characters.
        assert_eq!(env.text("rocksdb_maxopenfiles"), Some("3"));
        assert_eq!(env.text("RocksDB__MaxOpenFiles"), None);
        assert_eq!(env.text("MqttSettings__IotHubClient.Max"), Some("4"));
        assert_eq!(env.text("Blank"), None);
        assert!(env.take_problems().is_empty() && env.take_warnings().is_empty());
    }

    #[test]
    fn the_spelling_of_the_user_beats_the_injected_one() {
        for order in [[0, 1], [1, 0]] {
            let both = [
                ("runtimeloglevel", "debug"),
                ("RuntimeLogLevel", "Information"),
            ];
            let mut env = environment(&[both[order[0]], both[order[1]]]);
            for _ in 0..2 {
                assert_eq!(env.text("RuntimeLogLevel"), Some("debug"));
            }
            assert_eq!(
                env.take_warnings(),
                [
                    "RuntimeLogLevel and runtimeloglevel are the same setting; runtimeloglevel counts"
                ]
            );
        }
    }

    #[test]
    fn only_settings_that_are_asked_for_are_warned_about() {
        let mut env = environment(&[
            ("http_proxy", "a"),
            ("HTTP_PROXY", "b"),
            ("MqttSettings__Port", "1"),
            ("mqttsettings:port", "2"),
            ("MQTTSETTINGS__PORT", "3"),
        ]);
        assert_eq!(env.text("MqttSettings__Port"), Some("3"));
        let warnings = env.take_warnings();
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(
            warnings
                .iter()
                .all(|text| text.contains("MQTTSETTINGS__PORT counts"))
        );
    }

    #[test]
    fn a_bad_value_is_reported_and_the_default_used() {
        let mut env = environment(&[
            ("A", "yes"),
            ("B", "70000"),
            ("C", "x"),
            ("D", "24:00"),
            ("E", "0"),
            ("F", "00:00"),
            ("G", "disc"),
            ("H", "::1%lo"),
            ("I", "12\u{1b}["),
        ]);
        assert!(env.flag("A", true));
        assert_eq!(env.port("B", 8883), 8883);
        assert_eq!(env.integer("C", -1), -1);
        let week = Duration::from_secs(7 * 86_400);
        assert_eq!(env.time_span("D", week), week);
        assert_eq!(env.bounded("E", 100, 1..=9), 100);
        assert_eq!(env.time_span("F", week), week);
        assert_eq!(env.choice("G", [("os", 1), ("disk", 2)]), 1);
        assert_eq!(env.address("H"), None);
        assert_eq!(env.port("I", 1), 1);
        assert_eq!(
            env.take_problems(),
            [
                r#"A is "yes", which is not true or false; using true"#,
                r#"B is "70000", which is not a port from 1 to 65535; using 8883"#,
                r#"C is "x", which is not a whole number; using -1"#,
                r#"D is "24:00", which is not a time [d.]hh:mm[:ss] above 0, or a number of days; using 604800s"#,
                r#"E is "0", which is not a whole number from 1 to 9; using 100"#,
                r#"F is "00:00", which is not a time [d.]hh:mm[:ss] above 0, or a number of days; using 604800s"#,
                r#"G is "disc", which is not os or disk; using os"#,
                r#"H is "::1%lo", which is not an IP address; using all addresses"#,
                r#"I is "12\u{1b}[", which is not a port from 1 to 65535; using 1"#,
            ]
        );
        assert!(env.take_problems().is_empty());
    }

    #[test]
    fn what_may_be_a_secret_is_never_shown() {
        const KEY: &str = "c2hvcnRlc3Qga2V5ISEhIQ==";
        let mut env = environment(&[("MqttSettings__Port", KEY), ("SharedAccessKey", KEY)]);
        assert_eq!(env.port("MqttSettings__Port", 1), 1);
        let problems = env.take_problems();
        assert_eq!(
            problems,
            ["MqttSettings__Port is not a port from 1 to 65535; using 1"]
        );
        let shown = format!("{env:?}");
        assert!(
            shown.contains("SharedAccessKey") && !shown.contains(KEY),
            "{shown}"
        );
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
    fn a_section_lists_its_entries_as_they_are_spelled() {
        let mut env = environment(&[
            ("ROUTES__ToCloud", "FROM /* INTO $upstream"),
            ("routes:b", "B"),
            ("routes__a__Route", "A"),
            ("routes__", "no name"),
            ("routesX", "no"),
            ("Routes__B", "B2"),
        ]);
        let entry = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(
            env.section("routes"),
            [
                entry("", "no name"),
                entry("a:route", "A"),
                entry("B", "B2"),
                entry("ToCloud", "FROM /* INTO $upstream"),
            ]
        );
        assert_eq!(
            env.take_warnings(),
            ["routes:b and Routes__B are the same setting; Routes__B counts"]
        );
    }
}
