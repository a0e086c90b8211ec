//! Reads a hub's `/metrics` (spec/operations.md A2.1, A2.2).

use std::collections::BTreeMap;
use std::net::SocketAddr;

use anyhow::{Context as _, Result, ensure};

use crate::http;

/// One line of the text format.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The metric.
    pub name: String,
    /// All labels, also `iothub`, `edge_device` and `instance_number`.
    pub labels: BTreeMap<String, String>,
    /// Its value; NaN is possible.
    pub value: f64,
}

/// All samples of one scrape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    /// In the order of the text.
    pub samples: Vec<Sample>,
}

impl Metrics {
    /// Scrapes a metrics port.
    ///
    /// # Errors
    /// When nobody answers, or with something else than the text format.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn fetch(address: SocketAddr) -> Result<Self> {
        let (status, text) = http::get(address, "/metrics").await?;
        ensure!(status.is_success(), "/metrics answers {status}");
        Self::parse(std::str::from_utf8(&text).context("/metrics is not UTF-8")?)
    }

    /// Parses the text format, as strictly as edgeAgent's scraper does: one sample per line, no
    /// timestamps, no exemplars.
    ///
    /// # Errors
    /// Names the first line that is neither a sample nor a comment.
    pub fn parse(text: &str) -> Result<Self> {
        let lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        let samples = lines.map(|line| {
            parse_sample(line).with_context(|| format!("no sample of the text format: {line}"))
        });
        Ok(Self {
            samples: samples.collect::<Result<_>>()?,
        })
    }

    /// The sum of all samples of `name` that have (at least) these labels; 0 when there is none.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(name, labels).map(|sample| sample.value).sum()
    }

    /// The greatest of those samples; `None` when there is none.
    #[must_use]
    pub fn max(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.matching(name, labels)
            .map(|sample| sample.value)
            .reduce(f64::max)
    }

    fn matching<'a>(
        &'a self,
        name: &'a str,
        labels: &'a [(&'a str, &'a str)],
    ) -> impl Iterator<Item = &'a Sample> {
        self.samples.iter().filter(move |sample| {
            sample.name == name
                && labels
                    .iter()
                    .all(|(key, value)| sample.labels.get(*key).is_some_and(|found| found == value))
        })
    }
}

fn parse_sample(line: &str) -> Option<Sample> {
    let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))?;
    let (name, rest) = line.split_at(end);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => parse_labels(rest)?,
        None => (BTreeMap::new(), rest),
    };
    let value = rest.strip_prefix(' ')?;
    // No blank can follow: a timestamp is carried over to later lines by a bug of the scraper.
    let plain = |c: char| c.is_ascii_digit() || ".eE+-".contains(c);
    if name.is_empty() || !(value == "NaN" || value.chars().all(plain)) {
        return None;
    }
    Some(Sample {
        name: name.to_owned(),
        labels,
        value: value.parse().ok()?,
    })
}

/// Labels up to the closing brace, and what follows it.
fn parse_labels(mut rest: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        if let Some(after) = rest.strip_prefix('}') {
            return Some((labels, after));
        }
        let (key, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => value.push(match chars.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (_, other) => value.push(other),
            }
        };
        labels.insert(key.to_owned(), value);
        rest = after.get(end + 1..)?;
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read_summed_and_compared() {
        let text = "# HELP x y\n# TYPE a counter\n\
            a_total{id=\"leaf1\",ms_telemetry=\"True\"} 3\na_total{id=\"leaf2\"} 4.5\n\
            b{text=\"q\\\"uo\\\\te\\nd, }\"} 1e3\n\nplain 7\nodd NaN\n";
        let metrics = Metrics::parse(text).unwrap();
        assert_eq!(metrics.samples.len(), 5);
        assert_eq!(metrics.sum("a_total", &[]), 7.5);
        assert_eq!(metrics.sum("a_total", &[("id", "leaf1")]), 3.0);
        assert_eq!(metrics.sum("a_total", &[("id", "leaf3")]), 0.0);
        assert_eq!(metrics.max("a_total", &[]), Some(4.5));
        assert_eq!(metrics.max("absent", &[]), None);
        assert_eq!(metrics.samples[2].labels["text"], "q\"uo\\te\nd, }");
        assert_eq!(metrics.sum("plain", &[]), 7.0);
    }

    #[test]
    fn what_edge_agents_scraper_would_drop_is_an_error() {
        for line in [
            "a{le=\"+Inf\"} +Inf",
            "a 1 1700000000",
            "a{x=\"y\"",
            "a",
            "{} 1",
            "a{x=y} 1",
        ] {
            assert!(Metrics::parse(line).is_err(), "{line}");
        }
    }
}
