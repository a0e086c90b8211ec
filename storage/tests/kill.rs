//! A process that appends is killed at a random moment; what it had reported as committed is
//! there, whole and in order.
//!
//! The child is this test binary again. It appends from several connections, each always with a
//! batch in flight, to three queues, and drains one of them. It prints what it hands over, what
//! is committed and what it is about to settle; the parent kills it, reopens the store and
//! compares. `EDGEHUB_KILL_SEED=<seed>` runs one round again, `EDGEHUB_KILL_ROUNDS=<n>`
//! sets the number of rounds.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use bytes::Bytes;
use edgehub_proto::clock::{Clock, SystemClock};
use edgehub_proto::identity::Identity;
use edgehub_storage::{
    Append, AppendBatch, CommitProgress, CommitTicket, ConnectionStringWrap, Entry, Outcome, Queue,
    QueueId, ReadLimit, Settled, Store, StoreConfig, SyncMode, Target,
};

/// Rounds in an ordinary run.
const ROUNDS: u64 = 50;

/// Connections of the child.
const CONNECTIONS: usize = 6;

/// Messages that a connection hands over before it waits for a report.
const WINDOW: u64 = 96;

/// Time between the first commit and the kill, microseconds.
const KILL_AFTER_MAX_US: u64 = 120_000;

/// `<folder>|<seed>|<first sequences>|<when to report>`; set for the child only.
const CHILD: &str = "EDGEHUB_KILL_CHILD";

/// Queues: every message, every fifth, every third; the last one is drained by the child.
const QUEUES: [(&str, u64); 3] = [
    ("iothub", 1),
    ("edge/mod/fifth", 5),
    ("edge/mod/drained", 3),
];
const DRAINED: usize = 2;

#[test]
fn nothing_committed_is_lost_when_the_process_is_killed() {
    let seeds = match std::env::var("EDGEHUB_KILL_SEED") {
        Ok(seed) => vec![seed.parse().expect("EDGEHUB_KILL_SEED is a number")],
        Err(_) => {
            let rounds = std::env::var("EDGEHUB_KILL_ROUNDS").map(|n| n.parse().expect("a number"));
            let base = SystemClock::new().unix_ms() * 1_000;
            (base..base + rounds.unwrap_or(ROUNDS)).collect()
        }
    };
    let mut kills = 0;
    for seed in seeds {
        println!("round with EDGEHUB_KILL_SEED={seed}");
        match round(seed, Report::Committed) {
            Ok(n) => kills += n,
            Err(loss) => panic!("EDGEHUB_KILL_SEED={seed}: {loss}"),
        }
    }
    println!("{kills} kills");
}

/// The same rounds with a child that reports what is not committed yet: the check must notice.
#[test]
fn a_report_before_the_commit_is_found_out() {
    let losses = (1..=10)
        .filter_map(|seed| round(seed, Report::TooEarly).err())
        .collect::<Vec<_>>();
    println!("{} of 10 rounds: {losses:#?}", losses.len());
    assert!(
        losses
            .iter()
            .any(|loss| loss.contains("reported as committed")),
        "{losses:?}"
    );
}

/// The child's side; does nothing in an ordinary run.
#[test]
fn child_process() {
    if let Ok(order) = std::env::var(CHILD) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(child(Order::parse(&order)));
    }
}

/// What the check says to reports and contents that are wrong in a known way.
#[test]
fn the_check_finds_what_is_wrong() {
    let entry = |offset: u64, sequence: u64| Entry {
        offset,
        sender: sender(0),
        message: body(1, 0, sequence),
        enqueued_ms: 0,
        expires_at_ms: None,
        shared: None,
    };
    let good = || {
        let queues = [
            vec![
                entry(0, 1),
                entry(1, 2),
                entry(2, 3),
                entry(3, 4),
                entry(4, 5),
            ],
            vec![entry(0, 5)],
            vec![entry(0, 3)],
        ];
        let mut reports = Reports {
            committed: [0; CONNECTIONS],
            ..Reports::default()
        };
        reports.committed[0] = 5;
        (queues, reports)
    };
    let (queues, reports) = good();
    assert_eq!(compare(1, &queues, &reports).unwrap()[0], 5);
    let (mut queues, mut reports) = good();
    queues[DRAINED].clear();
    assert!(
        compare(1, &queues, &reports).is_err(),
        "a drained entry is gone without a word"
    );
    reports.settling.insert((0, 3));
    assert!(compare(1, &queues, &reports).is_ok());
    let spoil: [fn(&mut [Vec<Entry>; 3]); 6] = [
        |queues| drop(queues[0].pop()),
        |queues| drop(queues[0].remove(1)),
        |queues| queues[0].swap(1, 2),
        |queues| drop(queues[1].pop()),
        |queues| queues[0][2].message = Bytes::from_static(b"other"),
        |queues| {
            let again = queues[0][4].clone();
            queues[0].push(again);
        },
    ];
    for (n, spoil) in spoil.iter().enumerate() {
        let (mut queues, reports) = good();
        spoil(&mut queues);
        assert!(compare(1, &queues, &reports).is_err(), "case {n}");
    }
}

/// When the child reports a message as committed.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Report {
    Committed,
    /// As soon as it is handed over: what a broken hub would do.
    TooEarly,
}

/// What a child is told.
#[derive(Debug)]
struct Order {
    path: PathBuf,
    seed: u64,
    /// Last sequence of each connection that is stored already.
    from: [u64; CONNECTIONS],
    report: Report,
}

impl Order {
    fn text(&self) -> String {
        let from = self.from.map(|n| n.to_string()).join(",");
        format!(
            "{}|{}|{from}|{:?}",
            self.path.display(),
            self.seed,
            self.report
        )
    }

    fn parse(text: &str) -> Self {
        let parts = text.split('|').collect::<Vec<_>>();
        let from = parts[2]
            .split(',')
            .map(|n| n.parse().unwrap())
            .collect::<Vec<u64>>();
        let report = if parts[3] == "TooEarly" {
            Report::TooEarly
        } else {
            Report::Committed
        };
        Self {
            path: parts[0].into(),
            seed: parts[1].parse().unwrap(),
            from: from.try_into().unwrap(),
            report,
        }
    }
}

/// What the children of one round have printed.
#[derive(Debug, Default)]
struct Reports {
    /// Last sequence handed over, by connection.
    submitted: [u64; CONNECTIONS],
    /// Last sequence reported as committed.
    committed: [u64; CONNECTIONS],
    /// Connection and sequence of what was to be settled in the drained queue.
    settling: BTreeSet<(usize, u64)>,
}

impl Reports {
    fn line(&mut self, line: &str) {
        let mut parts = line.split_ascii_whitespace();
        let what = parts.next();
        let mut number = || parts.next().and_then(|part| part.parse::<u64>().ok());
        let (Some(connection), Some(sequence)) = (number(), number()) else {
            return;
        };
        let connection = usize::try_from(connection).unwrap();
        match what {
            Some("@S") => self.submitted[connection] = sequence,
            Some("@C") => self.committed[connection] = sequence,
            Some("@D") => drop(self.settling.insert((connection, sequence))),
            _ => {}
        }
    }

    fn in_flight(&self) -> u64 {
        let each = self.submitted.iter().zip(&self.committed);
        each.map(|(submitted, committed)| submitted.saturating_sub(*committed))
            .sum()
    }
}

/// One or two kills of processes on the same store. `Ok` with their number, `Err` with what is lost.
fn round(seed: u64, report: Report) -> Result<u64, String> {
    let dir = tempfile::TempDir::new().unwrap();
    let mut random = seed;
    let mut reports = Reports::default();
    let mut order = Order {
        path: dir.path().join("edgeHub"),
        seed,
        from: [0; CONNECTIONS],
        report,
    };
    let kills = 1 + next_random(&mut random) % 2;
    for _ in 0..kills {
        let delay = next_random(&mut random) % KILL_AFTER_MAX_US;
        run_and_kill(&order, &mut reports, Duration::from_micros(delay));
        if report == Report::Committed {
            assert!(
                reports.in_flight() > 0,
                "seed {seed}: nothing was in flight at the kill"
            );
        }
        order.from = check(&order, &reports)?;
        // The next child begins where the store ends.
        reports.submitted = order.from;
    }
    Ok(kills)
}

fn run_and_kill(order: &Order, reports: &mut Reports, delay: Duration) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "child_process",
            "--exact",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(CHILD, order.text())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let (first_commit, seen) = mpsc::sync_channel(1);
    let reader = std::thread::spawn(move || {
        let mut lines = Vec::new();
        let mut line = String::new();
        // A line without its end was cut off by the kill.
        while output.read_line(&mut line).unwrap() > 0 && line.ends_with('\n') {
            if line.starts_with("@C") {
                let _ = first_commit.try_send(());
            }
            lines.push(std::mem::take(&mut line));
        }
        lines
    });
    seen.recv_timeout(Duration::from_secs(60))
        .expect("the child commits something");
    std::thread::sleep(delay);
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert_eq!(
        status.signal(),
        Some(9),
        "the child ended by itself: {status}"
    );
    for line in reader.join().unwrap() {
        reports.line(&line);
    }
}

fn open(order: &Order) -> (Store, Vec<Queue>) {
    let mut config = StoreConfig::new(&order.path);
    config.sync = if order.seed.is_multiple_of(2) {
        SyncMode::Os
    } else {
        SyncMode::Disk
    };
    if order.seed.is_multiple_of(3) {
        // So that kills land in flushes and compactions too.
        config.memtable_bytes = 512 * 1024;
    }
    let clock = Arc::new(SystemClock::new());
    let wrap = Arc::new(ConnectionStringWrap::new(b"key"));
    let opened = Store::open(config, clock, wrap).unwrap();
    assert_eq!(opened.moved_aside, None);
    let queue = |(endpoint, _): (&str, u64)| {
        opened
            .store
            .queue(&QueueId {
                endpoint: endpoint.to_owned(),
                priority: 0,
            })
            .unwrap()
    };
    let queues = QUEUES.map(queue).to_vec();
    (opened.store, queues)
}

/// Reopens the store and compares; returns each connection's last stored sequence.
fn check(order: &Order, reports: &Reports) -> Result<[u64; CONNECTIONS], String> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let (store, queues) = open(order);
        let mut contents = [const { Vec::new() }; 3];
        for (queue, entries) in queues.iter().zip(&mut contents) {
            let mut next = 0;
            while next < queue.next_offset() {
                let limit = ReadLimit {
                    entries: 500,
                    bytes: 1 << 20,
                    scan: 500,
                };
                let batch = queue.read(next, limit, None).await.unwrap();
                next = batch.next;
                entries.extend(batch.entries);
            }
            let found = entries.len() as u64;
            if queue.length() != found {
                return Err(format!(
                    "{}: length {} of {found}",
                    queue.id(),
                    queue.length()
                ));
            }
        }
        store.close().await.unwrap();
        compare(order.seed, &contents, reports)
    })
}

/// Compares what is stored with what was reported; returns each connection's last sequence.
fn compare(
    seed: u64,
    contents: &[Vec<Entry>; 3],
    reports: &Reports,
) -> Result<[u64; CONNECTIONS], String> {
    // Queue -> connection -> sequences, in order of offsets.
    let mut stored = [const { BTreeMap::<usize, Vec<u64>>::new() }; 3];
    for (n, entries) in contents.iter().enumerate() {
        for entry in entries {
            let (connection, sequence) = identify(entry)
                .filter(|(c, s)| entry.message == body(seed, *c, *s))
                .ok_or_else(|| {
                    format!(
                        "{}: offset {} has wrong contents",
                        QUEUES[n].0, entry.offset
                    )
                })?;
            stored[n].entry(connection).or_default().push(sequence);
        }
    }
    let mut last = [0; CONNECTIONS];
    for (connection, last) in last.iter_mut().enumerate() {
        let of = |n: usize| stored[n].get(&connection).cloned().unwrap_or_default();
        let all = of(0);
        let count = all.len() as u64;
        if !all.iter().copied().eq(1..=count) {
            return Err(format!(
                "connection {connection}: gaps, doubles or disorder in {all:?}"
            ));
        }
        let committed = reports.committed[connection];
        if committed > count {
            return Err(format!(
                "connection {connection}: {committed} were reported as committed, {count} are there"
            ));
        }
        for (n, (name, every)) in QUEUES.iter().enumerate().skip(1) {
            let gone = |s: &u64| n == DRAINED && reports.settling.contains(&(connection, *s));
            let expected = (1..=count)
                .filter(|s| s.is_multiple_of(*every))
                .collect::<Vec<_>>();
            let found = of(n);
            let missing = expected.iter().find(|s| !found.contains(s) && !gone(s));
            let in_order = found.is_sorted_by(|a, b| a < b);
            if missing.is_some() || !in_order || found.iter().any(|s| !expected.contains(s)) {
                return Err(format!(
                    "connection {connection}: {name} has {found:?} of {expected:?}"
                ));
            }
        }
        *last = count;
    }
    Ok(last)
}

/// Connection and sequence of a stored message.
fn identify(entry: &Entry) -> Option<(usize, u64)> {
    let connection = entry.sender.as_str().strip_prefix("conn")?.parse().ok()?;
    let sequence = entry.message.first_chunk::<8>()?;
    Some((connection, u64::from_be_bytes(*sequence)))
}

fn sender(connection: usize) -> Identity {
    Identity::parse(&format!("conn{connection}")).unwrap()
}

/// What a message has to be: its sequence, then noise; mostly small, sometimes large.
fn body(seed: u64, connection: usize, sequence: u64) -> Bytes {
    let mut random = seed ^ (connection as u64) << 48 ^ sequence << 8;
    let length = match next_random(&mut random) % 50 {
        0 => 40_000,
        n => 40 * n,
    };
    let mut bytes = sequence.to_be_bytes().to_vec();
    while (bytes.len() as u64) < length {
        bytes.extend_from_slice(&next_random(&mut random).to_be_bytes());
    }
    bytes.into()
}

/// splitmix64.
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// One write for each text, so that a kill cuts at most the last line.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).unwrap();
    out.flush().unwrap();
}

async fn child(order: Order) {
    let (store, queues) = open(&order);
    // Ends the line that the test harness has begun.
    print("\n");
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(drain(queues[DRAINED].clone()));
    for connection in 0..CONNECTIONS {
        let client = Client {
            store: store.clone(),
            queues: queues.clone(),
            connection,
            seed: order.seed,
            first: order.from[connection],
            submitted: order.from[connection],
            progress: CommitProgress::new(),
            random: order.seed ^ connection as u64,
            report: order.report,
        };
        tasks.spawn(client.run());
    }
    // Until the parent kills it.
    while tasks.join_next().await.is_some() {}
}

/// One connection of the child.
struct Client {
    store: Store,
    queues: Vec<Queue>,
    connection: usize,
    seed: u64,
    /// Stored by an earlier process.
    first: u64,
    submitted: u64,
    progress: Arc<CommitProgress>,
    random: u64,
    report: Report,
}

impl Client {
    async fn run(mut self) {
        let mut reported = self.submitted;
        loop {
            while self.submitted - reported < WINDOW {
                self.submit().await;
            }
            self.progress.changed().await;
            let committed = self.first + self.progress.committed();
            // The next batch is in flight before this one is reported.
            self.submit().await;
            if committed > reported {
                reported = committed;
                if self.report == Report::Committed {
                    self.report(committed);
                }
            }
        }
    }

    async fn submit(&mut self) {
        let count = 1 + next_random(&mut self.random) % 16;
        let appends = (self.submitted + 1..=self.submitted + count).map(|sequence| {
            let wanted = QUEUES.iter().zip(&self.queues);
            let wanted = wanted.filter(|((_, every), _)| sequence.is_multiple_of(*every));
            let target = |(_, queue): (_, &Queue)| Target {
                queue: queue.clone(),
                expires_at_ms: None,
            };
            Append {
                sender: sender(self.connection),
                message: body(self.seed, self.connection, sequence),
                enqueued_ms: 1,
                targets: wanted.map(target).collect(),
            }
        });
        let appends = appends.collect();
        self.submitted += count;
        let sequence = self.submitted - self.first;
        let ticket = CommitTicket {
            progress: Arc::clone(&self.progress),
            sequence,
        };
        self.store
            .append(AppendBatch { appends, ticket })
            .await
            .unwrap();
        print(&format!("@S {} {}\n", self.connection, self.submitted));
        if self.report == Report::TooEarly {
            self.report(self.submitted);
        }
    }

    fn report(&self, sequence: u64) {
        print(&format!("@C {} {sequence}\n", self.connection));
    }
}

/// Settles what comes in the drained queue, the second half of each read before the first.
async fn drain(queue: Queue) {
    let mut watch = queue.subscribe();
    let mut next = 0;
    loop {
        let limit = ReadLimit {
            entries: 100,
            bytes: 1 << 20,
            scan: 100,
        };
        let batch = queue.read(next, limit, None).await.unwrap();
        if batch.next == next {
            watch.changed().await.unwrap();
            continue;
        }
        next = batch.next;
        let mut told = String::new();
        for entry in &batch.entries {
            let (connection, sequence) = identify(entry).unwrap();
            told += &format!("@D {connection} {sequence}\n");
        }
        print(&told);
        let settled = |entry: &Entry| Settled {
            offset: entry.offset,
            shared: entry.shared,
            outcome: Outcome::Done,
        };
        let (first, second) = batch.entries.split_at(batch.entries.len() / 2);
        queue
            .settle(second.iter().map(settled).collect())
            .await
            .unwrap();
        queue
            .settle(first.iter().map(settled).collect())
            .await
            .unwrap();
    }
}
