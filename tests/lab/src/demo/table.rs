//! The live table: what each layer's `/metrics` say, as a person wants to see it. No I/O.

use std::time::Duration;

use crate::metrics::Metrics;

/// The numbers of one scrape. Counters start again at 0 with the process.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Figures {
    connected: f64,
    received: f64,
    stored: f64,
    sent: f64,
    queue: f64,
    oldest_secs: f64,
}

impl Figures {
    pub(super) fn of(metrics: &Metrics) -> Self {
        Self {
            connected: metrics.sum("edgehub_connected_clients", &[]),
            received: metrics.sum("edgehub_messages_received_total", &[]),
            // A publish is acknowledged when it is committed, so these are the stored ones.
            stored: metrics.sum("edgehub_pubacks_total", &[]),
            sent: metrics.sum("edgehub_messages_sent_total", &[("to", "upstream")]),
            queue: metrics.sum("edgehub_queue_length", &[]),
            oldest_secs: metrics
                .max("edgehub_store_oldest_message_age_seconds", &[])
                .unwrap_or(0.0),
        }
    }
}

/// A rate over less than this says nothing.
const RATE_WINDOW: Duration = Duration::from_millis(500);

/// A counter that goes on over restarts of the process that counts, with its rate.
#[derive(Clone, Copy, Debug, Default)]
struct Counter {
    before_restarts: f64,
    last: f64,
    per_second: f64,
    /// Where and how long ago the rate's window began.
    window_total: f64,
    window: Duration,
}

impl Counter {
    fn update(&mut self, value: f64, elapsed: Duration) {
        if value < self.last {
            self.before_restarts += self.last;
        }
        self.last = value;
        self.window += elapsed;
        if self.window >= RATE_WINDOW {
            self.per_second = (self.total() - self.window_total) / self.window.as_secs_f64();
            self.window_total = self.total();
            self.window = Duration::ZERO;
        }
    }

    fn total(&self) -> f64 {
        self.before_restarts + self.last
    }
}

/// One line of the table.
#[derive(Clone, Debug)]
pub(super) struct Row {
    name: String,
    up: bool,
    now: Figures,
    received: Counter,
    stored: Counter,
    sent: Counter,
}

impl Row {
    pub(super) fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            up: false,
            now: Figures::default(),
            received: Counter::default(),
            stored: Counter::default(),
            sent: Counter::default(),
        }
    }

    /// Takes a scrape; `None` when the hub did not answer.
    pub(super) fn update(&mut self, figures: Option<Figures>, elapsed: Duration) {
        self.up = figures.is_some();
        // A hub that is down has lost no messages: its totals stay, its rates are zero.
        let (received, stored, sent) = match figures {
            Some(now) => {
                self.now = now;
                (now.received, now.stored, now.sent)
            }
            None => (self.received.last, self.stored.last, self.sent.last),
        };
        self.received.update(received, elapsed);
        self.stored.update(stored, elapsed);
        self.sent.update(sent, elapsed);
    }

    fn line(&self) -> String {
        let Self {
            name,
            now,
            received,
            stored,
            sent,
            ..
        } = self;
        let (received_total, stored_total, sent_total) =
            (received.total(), stored.total(), sent.total());
        if !self.up {
            return format!(
                "{name:<8} {:>9} {received_total:>9.0} {stored_total:>9.0} {sent_total:>9.0}",
                "down"
            );
        }
        format!(
            "{name:<8} {:>9.0} {received_total:>9.0} {stored_total:>9.0} {sent_total:>9.0} \
             {:>7.0} {:>8} {:>8.0}/s {:>8.0}/s",
            now.connected,
            now.queue,
            format!("{:.1} s", now.oldest_secs),
            received.per_second,
            sent.per_second,
        )
    }

    fn words(&self) -> String {
        if !self.up {
            return format!("{} down", self.name);
        }
        let Self {
            name,
            now,
            received,
            sent,
            ..
        } = self;
        format!(
            "{name} {:.0} connected, {:.0} received ({:.0}/s), {:.0} sent ({:.0}/s), {:.0} queued",
            now.connected,
            received.total(),
            received.per_second,
            sent.total(),
            sent.per_second,
            now.queue
        )
    }
}

/// The table for a terminal, heading first, the top layer first.
pub(super) fn table(rows: &[Row]) -> Vec<String> {
    let heading = format!(
        "{:<8} {:>9} {:>9} {:>9} {:>9} {:>7} {:>8} {:>10} {:>10}",
        "layer", "connected", "received", "stored", "sent", "queue", "oldest", "in", "out"
    );
    std::iter::once(heading)
        .chain(rows.iter().map(Row::line))
        .collect()
}

/// The same in one line, for logs.
pub(super) fn words(rows: &[Row]) -> String {
    rows.iter().map(Row::words).collect::<Vec<_>>().join("; ")
}

/// `[#######-------------]  7/20 s`.
pub(super) fn progress(passed: Duration, whole: Duration) -> String {
    const WIDTH: usize = 30;
    let part = passed.as_secs_f64() / whole.as_secs_f64().max(0.001);
    let done = (1..=WIDTH)
        .take_while(|step| *step as f64 <= part * WIDTH as f64)
        .count();
    let passed = passed.as_secs().min(whole.as_secs());
    let bar = "#".repeat(done) + &"-".repeat(WIDTH - done);
    format!("[{bar}] {passed:>2}/{} s", whole.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn scrape(received: u32, sent: u32) -> Option<Figures> {
        let text = format!(
            "edgehub_connected_clients{{}} 11\n\
             edgehub_messages_received_total{{id=\"leaf1\"}} {received}\n\
             edgehub_pubacks_total 90\n\
             edgehub_messages_sent_total{{to=\"upstream\",from=\"leaf1\"}} {sent}\n\
             edgehub_messages_sent_total{{to=\"edge1/modA\",from=\"leaf1\"}} 1000\n\
             edgehub_queue_length{{endpoint=\"iothub\"}} 7\n\
             edgehub_store_oldest_message_age_seconds{{priority=\"1\"}} 0.25\n\
             edgehub_store_oldest_message_age_seconds{{priority=\"2\"}} 1.25\n"
        );
        Some(Figures::of(&Metrics::parse(&text).unwrap()))
    }

    #[test]
    fn a_row_shows_what_the_metrics_say() {
        let mut row = Row::new("edge1");
        row.update(scrape(100, 80), SECOND);
        row.update(scrape(150, 120), SECOND * 2);
        assert_eq!(
            table(&[row.clone()]),
            [
                "layer    connected  received    stored      sent   queue   oldest         in        out",
                "edge1           11       150        90       120       7    1.2 s       25/s       20/s",
            ]
        );
        assert_eq!(
            words(&[row.clone(), row]),
            "edge1 11 connected, 150 received (25/s), 120 sent (20/s), 7 queued; \
             edge1 11 connected, 150 received (25/s), 120 sent (20/s), 7 queued"
        );
    }

    #[test]
    fn totals_go_on_over_a_restart() {
        let mut row = Row::new("edge1");
        row.update(scrape(100, 80), SECOND);
        row.update(None, SECOND);
        assert_eq!(
            table(&[row.clone()])[1],
            "edge1         down       100        90        80"
        );
        assert_eq!(words(&[row.clone()]), "edge1 down");
        row.update(scrape(30, 10), SECOND);
        assert_eq!((row.received.total(), row.sent.total()), (130.0, 90.0));
        assert_eq!(row.received.per_second, 30.0);
    }

    #[test]
    fn the_bar_fills_up() {
        let whole = SECOND * 20;
        assert_eq!(
            progress(Duration::ZERO, whole),
            format!("[{}]  0/20 s", "-".repeat(30))
        );
        let half = format!("[{}{}] 10/20 s", "#".repeat(15), "-".repeat(15));
        assert_eq!(progress(SECOND * 10, whole), half);
        assert_eq!(
            progress(SECOND * 21, whole),
            format!("[{}] 20/20 s", "#".repeat(30))
        );
    }
}
