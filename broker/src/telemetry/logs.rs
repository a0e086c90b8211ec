//! Log lines as edgeAgent and runbooks parse them (spec/operations.md A3.1, A3.2).
//!
//! One event is one line on standard output, without colours:
//! `<6> 2026-08-21 10:00:05.120 +00:00 [INF] - text`. When the level is debug or verbose the
//! source stands in brackets before the text of every line, as in the reference. Control
//! characters inside a text are escaped, because a client chooses some of them (its client id):
//! it must not begin a line of its own, which edgeAgent would file under level 6, nor speak to
//! the operator's terminal.

use std::fmt::{self, Write as _};
use std::sync::Arc;

use edgehub_proto::clock::Clock;
use time::OffsetDateTime;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::Directive;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Bytes of an event's message, and again of its fields. What is longer is cut: container engines
/// break lines of 16 KiB, and the rest of such a line would be one without a level.
pub const TEXT_BYTES_MAX: usize = 6 * 1024;

/// Starts logging for the process, panics included.
///
/// `level` is `RuntimeLogLevel`: the part before the first comma in the reference's words, the
/// rest `crate=level` filters as `tracing` writes them. An unknown word means `info`. Returns the
/// parts that were not understood, for a warning.
pub fn start(level: &str, clock: Arc<dyn Clock>) -> Vec<&str> {
    let LogLevel {
        filter,
        sources,
        ignored,
    } = LogLevel::parse(level);
    // Fails only when logging was started before, which tests of one process do.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        // Where standard output cannot be written nothing can be said about it either.
        .log_internal_errors(false)
        .event_format(Line { clock, sources })
        .try_init();
    std::panic::set_hook(Box::new(|panic| {
        tracing::error!("A task ended in a programming error: {panic}");
    }));
    ignored
}

/// `RuntimeLogLevel`, understood.
struct LogLevel<'a> {
    filter: EnvFilter,
    /// Whether every line names its source.
    sources: bool,
    ignored: Vec<&'a str>,
}

impl<'a> LogLevel<'a> {
    fn parse(text: &'a str) -> Self {
        let mut parts = text.split(',').map(str::trim);
        let word = parts.next().unwrap_or_default();
        let mut ignored = Vec::new();
        let base = match word.to_ascii_lowercase().as_str() {
            "verbose" => "trace",
            "debug" => "debug",
            "info" | "information" => "info",
            "warning" | "warn" => "warn",
            "error" | "fatal" => "error",
            _ => {
                ignored.push(word);
                "info"
            }
        };
        let mut filter = EnvFilter::new(base);
        for part in parts.filter(|part| !part.is_empty()) {
            // Only filters with a target: a bare level would replace the first word's.
            let directive = part.split_once('=').map(|_| part.parse::<Directive>());
            match directive {
                Some(Ok(directive)) => filter = filter.add_directive(directive),
                Some(Err(_)) | None => ignored.push(part),
            }
        }
        Self {
            filter,
            sources: matches!(base, "trace" | "debug"),
            ignored,
        }
    }
}

/// Formats one event as one line.
#[derive(Debug)]
struct Line {
    clock: Arc<dyn Clock>,
    sources: bool,
}

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = *event.metadata().level();
        write_prefix(&mut writer, level, self.clock.unix_ms())?;
        if self.sources || level >= Level::DEBUG {
            write!(writer, "[{}] ", event.metadata().target())?;
        }
        writer.write_str("- ")?;
        let mut text = Text::default();
        event.record(&mut text);
        writer.write_str(&text.message.0)?;
        writer.write_str(&text.fields.0)?;
        writeln!(writer)
    }
}

fn write_prefix(writer: &mut impl fmt::Write, level: Level, unix_ms: u64) -> fmt::Result {
    let (severity, word) = match level {
        Level::ERROR => (3, "ERR"),
        Level::WARN => (4, "WRN"),
        Level::INFO => (6, "INF"),
        Level::DEBUG => (7, "DBG"),
        Level::TRACE => (7, "VRB"),
    };
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_ms) * 1_000_000)
        .unwrap_or(OffsetDateTime::UNIX_EPOCH);
    write!(
        writer,
        "<{severity}> {:04}-{:02}-{:02} {:02}:{:02}:{:02}.{:03} +00:00 [{word}] ",
        at.year(),
        u8::from(at.month()),
        at.day(),
        at.hour(),
        at.minute(),
        at.second(),
        at.millisecond(),
    )
}

/// The words of an event: its message, and its other fields as ` name=value`.
#[derive(Default)]
struct Text {
    message: OneLine,
    fields: OneLine,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // An error means that the limit is reached; then what fits is what is shown.
        let _ = if field.name() == "message" {
            write!(self.message, "{value:?}")
        } else {
            write!(self.fields, " {}={value:?}", field.name())
        };
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

/// A text without anything that could end its line, [`TEXT_BYTES_MAX`] long at most.
#[derive(Default)]
struct OneLine(String);

impl fmt::Write for OneLine {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        const CUT: &str = "…";
        for c in text.chars() {
            if self.0.len() >= TEXT_BYTES_MAX {
                if !self.0.ends_with(CUT) {
                    self.0.push_str(CUT);
                }
                return Err(fmt::Error);
            }
            // Beside control characters: what some viewers take for the end of a line.
            if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') {
                self.0.extend(c.escape_default());
            } else {
                self.0.push(c);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use edgehub_proto::clock::ManualClock;

    use super::*;
    use crate::test_support::LogSink;

    fn lines_of(log: impl FnOnce()) -> String {
        lines_at("info,edgehub_x=debug", log)
    }

    fn lines_at(level: &str, log: impl FnOnce()) -> String {
        let LogLevel {
            filter, sources, ..
        } = LogLevel::parse(level);
        let sink = LogSink::default();
        let writer = sink.clone();
        let clock = Arc::new(ManualClock::new(1_787_306_405_120));
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .event_format(Line { clock, sources })
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        sink.text()
    }

    #[test]
    fn a_line_has_the_form_that_edge_agent_parses() {
        let text = lines_of(|| tracing::info!("Client {} connected", "gw1/sensor"));
        assert_eq!(
            text,
            "<6> 2026-08-21 10:00:05.120 +00:00 [INF] - Client gw1/sensor connected\n"
        );
    }

    #[test]
    fn debug_lines_name_their_source_and_fields_follow_the_text() {
        let text = lines_of(|| tracing::debug!(target: "edgehub_x", size = 3, "read"));
        assert_eq!(
            text,
            "<7> 2026-08-21 10:00:05.120 +00:00 [DBG] [edgehub_x] - read size=3\n"
        );
    }

    #[test]
    fn at_debug_every_line_names_its_source() {
        for level in ["debug", "Verbose"] {
            let text = lines_at(level, || tracing::warn!(target: "edgehub_x", "late"));
            assert_eq!(
                text,
                "<4> 2026-08-21 10:00:05.120 +00:00 [WRN] [edgehub_x] - late\n"
            );
        }
    }

    #[test]
    fn an_event_is_one_line_whatever_it_says() {
        let text = lines_of(|| tracing::error!("first\nsecond\r\nthird"));
        assert_eq!(text.lines().count(), 1);
        assert!(text.ends_with("first\\nsecond\\r\\nthird\n"), "{text}");
        // A client id that would colour the terminal, go back over the line or end it.
        let odd = "\u{1b}[31mred\u{8}\u{7f}\u{85}\u{2028}\0";
        let text = lines_of(|| tracing::info!(client = odd, "Refused {odd}"));
        let shown = "\\u{1b}[31mred\\u{8}\\u{7f}\\u{85}\\u{2028}\\u{0}";
        let expected = format!("[INF] - Refused {shown} client={shown}\n");
        assert!(text.ends_with(&expected), "{text}");
    }

    #[test]
    fn a_line_stays_below_what_container_engines_break() {
        let long = "ä\n".repeat(40_000);
        let text = lines_of(|| tracing::info!(field = %long, other = 1, "{long}"));
        assert_eq!(text.lines().count(), 1);
        assert!(text.len() < 16 * 1024, "{}", text.len());
        assert!(text.contains("… field=ä\\nä"), "both parts are there");
        assert!(text.ends_with("…\n"));
        let whole = "x".repeat(TEXT_BYTES_MAX);
        let text = lines_of(|| tracing::info!("{whole}"));
        assert!(text.ends_with("xx\n"), "what fits is not cut");
    }

    #[test]
    fn level_words_are_those_of_the_reference() {
        for (given, want) in [
            ("verbose", "trace"),
            ("Information", "info"),
            ("WARNING", "warn"),
            ("fatal", "error"),
            ("info,", "info"),
        ] {
            let level = LogLevel::parse(given);
            assert_eq!(level.filter.to_string(), want);
            assert!(level.ignored.is_empty(), "{given}");
        }
    }

    #[test]
    fn filters_follow_the_word_and_cannot_replace_it() {
        let level = LogLevel::parse("info, edgehub_bridge=debug,trace,x=loud,mqtt_broker=info");
        assert_eq!(level.ignored, ["trace", "x=loud"]);
        let text = level.filter.to_string();
        for part in ["edgehub_bridge=debug", "mqtt_broker=info"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(text.split(',').any(|part| part == "info"), "{text}");
        assert!(!text.contains("trace") && !level.sources, "{text}");
        let nonsense = LogLevel::parse("nonsense,edgehub_bridge=debug");
        assert_eq!(nonsense.ignored, ["nonsense"]);
        assert!(nonsense.filter.to_string().contains("edgehub_bridge=debug"));
    }
}
