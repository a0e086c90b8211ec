//! The store against an in-memory oracle: append to one or several queues, read, settle in any
//! order, expire, close, crash and reopen.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

const QUEUES: usize = 3;

#[derive(Clone, Debug)]
enum Op {
    /// Messages, each for a set of queues (bits), perhaps with an expiry this far from now.
    Append(Vec<(u8, Option<u8>)>),
    /// A queue and positions among its unsettled entries; committed or only handed over.
    Settle {
        queue: usize,
        picks: Vec<u16>,
        wait: bool,
    },
    /// The first entries of a queue.
    SettleHead {
        queue: usize,
        count: u8,
    },
    Read {
        queue: usize,
        from: u16,
        entries: u8,
        scan: u8,
    },
    Expire {
        queue: usize,
        after: u8,
    },
    Reopen {
        crash: bool,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let queue = || 0..QUEUES;
    let appended = (1u8..1 << QUEUES, proptest::option::weighted(0.3, 0u8..40));
    prop_oneof![
        6 => proptest::collection::vec(appended, 1..40).prop_map(Op::Append),
        4 => (queue(), proptest::collection::vec(any::<u16>(), 1..20), any::<bool>())
            .prop_map(|(queue, picks, wait)| Op::Settle { queue, picks, wait }),
        3 => (queue(), 1u8..60).prop_map(|(queue, count)| Op::SettleHead { queue, count }),
        4 => (queue(), any::<u16>(), 1u8..20, 1u8..40)
            .prop_map(|(queue, from, entries, scan)| Op::Read { queue, from, entries, scan }),
        1 => (queue(), 0u8..50).prop_map(|(queue, after)| Op::Expire { queue, after }),
        2 => any::<bool>().prop_map(|crash| Op::Reopen { crash }),
    ]
}

#[derive(Clone, Debug, PartialEq)]
struct Expected {
    body: String,
    expires_at_ms: Option<u64>,
    is_shared: bool,
}

/// One queue as it should be.
#[derive(Default)]
struct Oracle {
    next: u64,
    unsettled: BTreeMap<u64, Expected>,
    /// Handed over for settling without waiting: after a crash they may be there or not.
    maybe: BTreeMap<u64, Expected>,
}

impl Oracle {
    fn picked(&self, picks: &[u16]) -> Vec<u64> {
        let offsets = self.unsettled.keys().copied().collect::<Vec<_>>();
        let index = |pick: &u16| usize::from(*pick) * offsets.len() / 65_536;
        picks
            .iter()
            .filter_map(|pick| offsets.get(index(pick)).copied())
            .collect()
    }
}

struct World {
    dir: TempDir,
    generation: u32,
    store: Store,
    oracles: Vec<Oracle>,
    written: u64,
}

impl World {
    fn open(path: &Path) -> Store {
        let mut config = StoreConfig::new(path);
        // Small enough that tails are evicted and files are made.
        config.tail_bytes = 8_000;
        config.memtable_bytes = 256 * 1024;
        let opened = try_open(config).unwrap();
        assert_eq!(opened.moved_aside, None);
        opened.store
    }

    fn new() -> Self {
        // Hundreds of stores are opened here; what a crash leaves is the same in memory.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() {
            TempDir::new_in(memory)
        } else {
            TempDir::new()
        };
        let dir = dir.unwrap();
        let store = Self::open(&dir.path().join("0"));
        for n in 0..QUEUES {
            queue(&store, &format!("q{n}"));
        }
        let oracles = (0..QUEUES).map(|_| Oracle::default()).collect();
        Self {
            dir,
            generation: 0,
            store,
            oracles,
            written: 0,
        }
    }

    fn queue(&self, n: usize) -> Queue {
        self.store.queues().remove(n)
    }

    async fn run(&mut self, op: Op) {
        match op {
            Op::Append(messages) => self.append(&messages).await,
            Op::Settle { queue, picks, wait } => {
                let offsets = self.oracles[queue].picked(&picks);
                self.settle(queue, &offsets, wait).await;
            }
            Op::SettleHead { queue, count } => {
                let heads = self.oracles[queue].unsettled.keys().take(count.into());
                let offsets = heads.copied().collect::<Vec<_>>();
                self.settle(queue, &offsets, true).await;
            }
            Op::Read {
                queue,
                from,
                entries,
                scan,
            } => {
                self.read(queue, from, entries.into(), scan.into()).await;
            }
            Op::Expire { queue, after } => self.expire(queue, NOW_MS + u64::from(after)).await,
            Op::Reopen { crash } => self.reopen(crash).await,
        }
    }

    async fn append(&mut self, messages: &[(u8, Option<u8>)]) {
        let queues = self.store.queues();
        let mut appends = Vec::new();
        for (bits, expires) in messages {
            self.written += 1;
            let body = format!(
                "{:x>width$}",
                self.written,
                width = (self.written % 400) as usize
            );
            let expires_at_ms = expires.map(|after| NOW_MS + u64::from(after));
            let targets = (0..QUEUES).filter(|n| bits & (1 << n) != 0);
            let targets = targets.map(|n| (n, &queues[n])).collect::<Vec<_>>();
            for (n, _) in &targets {
                let oracle = &mut self.oracles[*n];
                let expected = Expected {
                    body: body.clone(),
                    expires_at_ms,
                    is_shared: targets.len() > 1,
                };
                oracle.unsettled.insert(oracle.next, expected);
                oracle.next += 1;
            }
            let targets = targets.iter().map(|(_, queue)| (*queue, expires_at_ms));
            appends.push(message("dev", &body, &targets.collect::<Vec<_>>()));
        }
        append(&self.store, appends).await;
    }

    async fn settle(&mut self, queue: usize, offsets: &[u64], wait: bool) {
        let handle = self.queue(queue);
        let mut items = Vec::new();
        for offset in offsets {
            let read = handle
                .read(
                    *offset,
                    ReadLimit {
                        entries: 1,
                        ..EVERYTHING
                    },
                    None,
                )
                .await;
            let read = read.unwrap().entries;
            // A pick that comes twice may be settled by now.
            let shared = read
                .first()
                .filter(|e| e.offset == *offset)
                .and_then(|e| e.shared);
            items.push(Settled {
                offset: *offset,
                shared,
                outcome: Outcome::Done,
            });
            if let Some(expected) = self.oracles[queue].unsettled.remove(offset)
                && !wait
            {
                self.oracles[queue].maybe.insert(*offset, expected);
            }
        }
        if wait {
            handle.settle_committed(items).await.unwrap();
        } else {
            handle.settle(items).await.unwrap();
        }
    }

    async fn read(&self, queue: usize, from: u16, entries: usize, scan: usize) {
        let (handle, oracle) = (self.queue(queue), &self.oracles[queue]);
        self.store.flush().await.unwrap();
        let from = u64::from(from) * (oracle.next + 1) / 65_536;
        let limit = ReadLimit {
            entries,
            bytes: usize::MAX,
            scan,
        };
        let read = handle.read(from, limit, None).await.unwrap();
        assert!(read.next >= from.min(oracle.next) && read.next <= oracle.next);
        assert!(read.entries.len() <= entries);
        let expected = oracle.unsettled.range(from..read.next.max(from));
        let expected = expected
            .map(|(offset, e)| (*offset, e.clone()))
            .collect::<Vec<_>>();
        assert_eq!(self.seen(read.entries), expected);
        assert!(
            read.next > from || from >= oracle.next,
            "no progress at {from}"
        );
    }

    fn seen(&self, entries: Vec<Entry>) -> Vec<(u64, Expected)> {
        let seen = entries.into_iter().map(|entry| {
            let body = String::from_utf8(entry.message.to_vec()).unwrap();
            let (expires_at_ms, is_shared) = (entry.expires_at_ms, entry.shared.is_some());
            (
                entry.offset,
                Expected {
                    body,
                    expires_at_ms,
                    is_shared,
                },
            )
        });
        seen.collect()
    }

    async fn expire(&mut self, queue: usize, now_ms: u64) {
        self.store.flush().await.unwrap();
        let handle = self.queue(queue);
        let oracle = &mut self.oracles[queue];
        let before = oracle.unsettled.len();
        oracle
            .unsettled
            .retain(|_, e| e.expires_at_ms.is_none_or(|at| at > now_ms));
        let expired = handle.expire(now_ms, 1_000_000).await.unwrap();
        assert_eq!(expired, (before - oracle.unsettled.len()) as u64);
    }

    async fn reopen(&mut self, crash: bool) {
        self.generation += 1;
        let next = self.dir.path().join(self.generation.to_string());
        let previous = self.dir.path().join((self.generation - 1).to_string());
        if crash {
            std::fs::create_dir(&next).unwrap();
            crate::store::copy_crash_image(&self.store, &next);
            self.store.clone().close().await.unwrap();
            std::fs::remove_dir_all(&previous).unwrap();
        } else {
            self.store.clone().close().await.unwrap();
            std::fs::rename(&previous, &next).unwrap();
        }
        self.store = Self::open(&next);
        for n in 0..QUEUES {
            let present = offsets(&read_all(&self.queue(n), 0).await);
            let oracle = &mut self.oracles[n];
            for (offset, expected) in std::mem::take(&mut oracle.maybe) {
                if present.contains(&offset) {
                    assert!(crash, "a settle was lost without a crash");
                    oracle.unsettled.insert(offset, expected);
                }
            }
        }
        self.check().await;
    }

    /// Everything equals the oracle: contents, counts, and what lies in the database.
    async fn check(&self) {
        self.store.flush().await.unwrap();
        let mut shared = 0;
        for (n, oracle) in self.oracles.iter().enumerate() {
            let queue = self.queue(n);
            let first = oracle
                .unsettled
                .keys()
                .next()
                .copied()
                .unwrap_or(oracle.next);
            assert_eq!(queue.next_offset(), oracle.next);
            assert_eq!(queue.length(), oracle.unsettled.len() as u64);
            assert_eq!(queue.mark(), first);
            let oldest = queue.oldest_enqueued_ms().await.unwrap();
            assert_eq!(oldest.is_some(), !oracle.unsettled.is_empty());
            let expected = oracle.unsettled.clone().into_iter().collect::<Vec<_>>();
            assert_eq!(self.seen(read_all(&queue, 0).await), expected);
            shared += oracle.unsettled.values().filter(|e| e.is_shared).count() as u64;
        }
        let refs = self
            .store
            .core
            .db
            .with(|open| open.scan(crate::layout::Cf::Refs, &[]));
        let refs = refs.unwrap();
        let counted = refs
            .iter()
            .map(|(_, v)| u64::from(u32::from_be_bytes((**v).try_into().unwrap())));
        assert_eq!(counted.sum::<u64>(), shared, "references");
        let bodies = self
            .store
            .core
            .db
            .with(|open| open.scan(crate::layout::Cf::Messages, &[]));
        assert_eq!(bodies.unwrap().len(), refs.len(), "shared messages");
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        // An eighth of PROPTEST_CASES, because a case opens many stores.
        cases: ProptestConfig::default().cases / 8,
        max_shrink_iters: 200,
        ..ProptestConfig::default()
    })]
    #[test]
    fn the_store_agrees_with_the_oracle(ops in proptest::collection::vec(op(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut world = World::new();
            for op in ops {
                world.run(op).await;
            }
            world.check().await;
            world.reopen(true).await;
            world.store.close().await.unwrap();
        });
    }
}
