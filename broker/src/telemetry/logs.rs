//! Log lines as edgeAgent and runbooks parse them (spec/operations.md A3.1, A3.2).
//!
//! One event is one line on standard output, without colours:
//! `<6> 2026-08-21 10:00:05.120 +00:00 [INF] - text`; at debug and below the source stands in
//! brackets before the text. Newlines inside a text are escaped, because a line that does not
//! match the pattern is filed under level 6 by edgeAgent.

use std::fmt::{self, Write as _};
use std::sync::Arc;

use edgehub_proto::clock::Clock;
use time::OffsetDateTime;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Starts logging for the process.
///
/// `level` is `RuntimeLogLevel`: the part before the first comma in the reference's words, the
/// rest per-crate filters as `tracing` writes them. An unknown word means `info`.
pub fn start(level: &str, clock: Arc<dyn Clock>) {
    let filter = filter(level);
    let line = Line { clock };
    // Fails only when logging was started before, which tests of one process do.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .event_format(line)
        .try_init();
}

fn filter(level: &str) -> EnvFilter {
    let (word, rest) = level.split_once(',').unwrap_or((level, ""));
    let base = match word.trim().to_ascii_lowercase().as_str() {
        "verbose" => "trace",
        "debug" => "debug",
        "warning" | "warn" => "warn",
        "error" | "fatal" => "error",
        _ => "info",
    };
    EnvFilter::try_new(format!("{base},{rest}")).unwrap_or_else(|_| EnvFilter::new(base))
}

/// Formats one event as one line.
#[derive(Debug)]
struct Line {
    clock: Arc<dyn Clock>,
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
        if level >= Level::DEBUG {
            write!(writer, "[{}] ", event.metadata().target())?;
        }
        writer.write_str("- ")?;
        let mut text = Text::default();
        event.record(&mut text);
        writer.write_str(&text.message)?;
        writer.write_str(&text.fields)?;
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
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut raw = String::new();
        // Writing to a String cannot fail.
        let _ = write!(raw, "{value:?}");
        let clean = raw.replace('\r', "\\r").replace('\n', "\\n");
        if field.name() == "message" {
            self.message = clean;
        } else {
            let _ = write!(self.fields, " {}={clean}", field.name());
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use edgehub_proto::clock::ManualClock;
    use parking_lot::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(data);
            Ok(data.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn lines_of(log: impl FnOnce()) -> String {
        let sink = Sink::default();
        let writer = sink.clone();
        let clock = Arc::new(ManualClock::new(1_787_306_405_120));
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter("debug"))
            .event_format(Line { clock })
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, log);
        let bytes = sink.0.lock().clone();
        String::from_utf8(bytes).unwrap()
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
    fn an_event_is_one_line_whatever_it_says() {
        let text = lines_of(|| tracing::error!("first\nsecond\r\nthird"));
        assert_eq!(text.lines().count(), 1);
        assert!(text.ends_with("first\\nsecond\\r\\nthird\n"), "{text}");
    }

    #[test]
    fn level_words_are_those_of_the_reference() {
        for (given, want) in [
            ("verbose", "trace"),
            ("Information", "info"),
            ("WARNING", "warn"),
            ("fatal", "error"),
            ("nonsense", "info"),
        ] {
            assert_eq!(filter(given).to_string(), want);
        }
        assert!(
            filter("info,edgehub_bridge=debug")
                .to_string()
                .contains("edgehub_bridge=debug")
        );
    }
}
