//! The live table: what each layer's `/metrics` say, as a person wants to see it. No I/O.

use std::time::Duration;

use crate::metrics::Metrics;

/// Why a message that was stored left the store without being sent.
const DROPPED_LATER: [&str; 3] = ["corrupt_record", "device_invalid_state", "ttl_expiry"];

/// The numbers of one scrape, from the metrics that every edgeHub has (and one of ours for the age).
/// Counters start again at 0 with the process.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Figures {
    /// Another one after each start of the process.
    instance: Option<String>,
    connected: f64,
    received: f64,
    sent: f64,
    queue: f64,
    /// What left the store in this life, whichever way.
    left: f64,
    oldest_secs: f64,
}

impl Figures {
    pub(super) fn of(metrics: &Metrics) -> Self {
        let sent = metrics.sum("edgehub_messages_sent_total", &[("to", "upstream")]);
        let dropped = DROPPED_LATER
            .map(|reason| metrics.sum("edgehub_messages_dropped_total", &[("reason", reason)]));
        Self {
            instance: metrics
                .samples
                .iter()
                .find_map(|sample| sample.labels.get("instance_number").cloned()),
            connected: metrics.sum("edgehub_connected_clients", &[]),
            received: metrics.sum("edgehub_messages_received_total", &[]),
            sent,
            queue: metrics.sum("edgehub_queue_length", &[]),
            left: sent + dropped.iter().sum::<f64>(),
            oldest_secs: metrics
                .max("edgehub_store_oldest_message_age_seconds", &[])
                .unwrap_or(0.0),
        }
    }
}

/// A rate over less than this says nothing.
const RATE_WINDOW: Duration = Duration::from_millis(500);

/// A count that goes on over restarts of the process that counts, with its rate.
#[derive(Clone, Copy, Debug, Default)]
struct Counter {
    /// What is shown: the highest that `sum` was.
    total: f64,
    /// May fall for a moment: a queue is read an instant after the counters beside it.
    sum: f64,
    per_second: f64,
    /// Where and how long ago the rate's window began.
    window_total: f64,
    window: Duration,
}

impl Counter {
    fn add(&mut self, more: f64, elapsed: Duration) {
        self.sum += more;
        self.total = self.total.max(self.sum);
        self.window += elapsed;
        if self.window >= RATE_WINDOW {
            self.per_second = (self.total - self.window_total) / self.window.as_secs_f64();
            self.window_total = self.total;
            self.window = Duration::ZERO;
        }
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
        let now = figures.unwrap_or_else(|| self.now.clone());
        // A new process counts from 0 and finds the queue that the old one left.
        let before = if now.instance == self.now.instance {
            self.now.clone()
        } else {
            Figures {
                queue: self.now.queue,
                ..Figures::default()
            }
        };
        // What was stored since then is still there or has left.
        let stored = (now.left + now.queue) - (before.left + before.queue);
        self.received.add(now.received - before.received, elapsed);
        self.stored.add(stored, elapsed);
        self.sent.add(now.sent - before.sent, elapsed);
        self.now = now;
    }

    fn line(&self) -> String {
        let totals = [self.received, self.stored, self.sent].map(|counter| counter.total);
        let [received, stored, sent] = totals;
        let now = &self.now;
        let connected = if self.up {
            format!("{:.0}", now.connected)
        } else {
            "down".to_owned()
        };
        let mut line = format!(
            "{:<7} {connected:>9} {received:>9.0} {stored:>9.0} {sent:>9.0}",
            self.name
        );
        if self.up {
            line += &format!(
                " {:>7.0} {:>7} {:>7.0} {:>7.0}",
                now.queue,
                format!("{:.1} s", now.oldest_secs),
                self.received.per_second,
                self.sent.per_second,
            );
        }
        line
    }

    fn words(&self) -> String {
        let Self {
            name,
            up,
            now,
            received,
            stored,
            sent,
        } = self;
        if !up {
            return format!("{name} down");
        }
        format!(
            "{name}: {:.0} connected, {:.0} received ({:.0}/s), {:.0} stored, {:.0} sent ({:.0}/s), \
             {:.0} queued, oldest {:.1} s",
            now.connected,
            received.total,
            received.per_second,
            stored.total,
            sent.total,
            sent.per_second,
            now.queue,
            now.oldest_secs,
        )
    }
}

/// The table for a terminal of 80 columns, heading first, the top layer first.
pub(super) fn table(rows: &[Row]) -> Vec<String> {
    let heading = format!(
        "{:<7} {:>9} {:>9} {:>9} {:>9} {:>7} {:>7} {:>7} {:>7}",
        "layer", "connected", "received", "stored", "sent", "queue", "oldest", "in/s", "out/s"
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
    const WIDTH: usize = 20;
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

    /// What a hub says in its `life`-th life.
    fn scrape(life: u32, received: u32, sent: u32, queue: u32) -> Option<Figures> {
        let text = format!(
            "edgehub_connected_clients{{instance_number=\"life-{life}\"}} 11\n\
             edgehub_messages_received_total{{id=\"leaf1\"}} {received}\n\
             edgehub_messages_sent_total{{to=\"upstream\",from=\"leaf1\"}} {sent}\n\
             edgehub_messages_sent_total{{to=\"edge1/modA\",from=\"leaf1\"}} 1000\n\
             edgehub_messages_dropped_total{{reason=\"no_route\"}} 500\n\
             edgehub_messages_dropped_total{{reason=\"ttl_expiry\"}} 2\n\
             edgehub_queue_length{{endpoint=\"iothub\"}} {queue}\n\
             edgehub_store_oldest_message_age_seconds{{priority=\"1\"}} 0.25\n\
             edgehub_store_oldest_message_age_seconds{{priority=\"2\"}} 1.25\n"
        );
        Some(Figures::of(&Metrics::parse(&text).unwrap()))
    }

    #[test]
    fn a_row_shows_what_the_metrics_say() {
        let mut row = Row::new("edge1");
        row.update(scrape(1, 100, 80, 18), SECOND);
        row.update(scrape(1, 150, 120, 28), SECOND * 2);
        let table = table(&[row.clone()]);
        assert_eq!(
            table,
            [
                "layer   connected  received    stored      sent   queue  oldest    in/s   out/s",
                "edge1          11       150       150       120      28   1.2 s      25      20",
            ]
        );
        assert!(table.iter().all(|line| line.len() < 80));
        let words = words(&[row.clone(), row]);
        let one = "edge1: 11 connected, 150 received (25/s), 150 stored, 120 sent (20/s), \
                   28 queued, oldest 1.2 s";
        assert_eq!(words, format!("{one}; {one}"));
    }

    #[test]
    fn totals_go_on_over_a_restart() {
        let mut row = Row::new("edge1");
        row.update(scrape(1, 100, 80, 18), SECOND);
        row.update(None, SECOND);
        assert_eq!(
            table(&[row.clone()])[1],
            "edge1        down       100       100        80"
        );
        assert_eq!(words(&[row.clone()]), "edge1 down");
        // The new process sent the 18 that it found, and more than its predecessor in all.
        row.update(scrape(2, 130, 140, 6), SECOND);
        let totals = [row.received, row.stored, row.sent].map(|counter| counter.total);
        assert_eq!(totals, [230.0, 230.0, 220.0]);
        assert_eq!(row.received.per_second, 130.0);
    }

    #[test]
    fn a_queue_that_was_read_too_early_or_late_does_not_add_up() {
        let mut row = Row::new("edge1");
        for round in 1..=50 {
            row.update(scrape(1, 10, 10, round % 2), SECOND);
        }
        // 10 sent, 2 expired, and the one that is there every other time.
        assert_eq!(row.stored.total, 13.0);
    }

    #[test]
    fn the_bar_fills_up() {
        let whole = SECOND * 20;
        assert_eq!(
            progress(Duration::ZERO, whole),
            format!("[{}]  0/20 s", "-".repeat(20))
        );
        let half = format!("[{}{}] 10/20 s", "#".repeat(10), "-".repeat(10));
        assert_eq!(progress(SECOND * 10, whole), half);
        assert_eq!(
            progress(SECOND * 21, whole),
            format!("[{}] 20/20 s", "#".repeat(20))
        );
    }
}
