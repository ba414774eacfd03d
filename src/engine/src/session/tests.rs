use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::shard::Progress;
use crate::version::Version;

#[derive(Debug, Clone, Copy)]
enum Step {
    /// Time passes.
    Wait(u64),
    Open(u8),
    Close(u8),
    Expire(u8),
    /// A write: session, number above the acknowledged one, how much of that is acknowledged by now.
    Write {
        session: u8,
        ahead: u64,
        acknowledge: u64,
    },
    /// One of the writes sent before comes again, as it was.
    Again(proptest::sample::Index),
    SetLimits(SessionLimits),
}

/// What the table is compared with: per life of a session, each executed number and its outcome, for ever.
#[derive(Debug, Default)]
struct Model {
    now_ms: u64,
    lives: BTreeMap<u128, Life>,
}

#[derive(Debug, Default, Clone)]
struct Life {
    active_ms: u64,
    acked: u64,
    executed: BTreeMap<u64, Outcome>,
}

impl Model {
    fn alive(&mut self, id: u128, idle_ms: u64) -> Option<&mut Life> {
        let now_ms = self.now_ms;
        self.lives
            .get_mut(&id)
            .filter(|life| (life.active_ms | (ACTIVITY_STEP_MS - 1)) + idle_ms > now_ms)
    }

    /// Replies that the table keeps.
    fn kept(&self) -> u64 {
        let kept = |life: &Life| life.executed.range(life.acked..).count() as u64;
        self.lives.values().map(kept).sum()
    }
}

fn step() -> impl Strategy<Value = Step> {
    let session = || 0u8..5;
    prop_oneof![
        3 => prop_oneof![0u64..5_000, Just(60_000u64)].prop_map(Step::Wait),
        2 => session().prop_map(Step::Open),
        1 => session().prop_map(Step::Close),
        1 => session().prop_map(Step::Expire),
        12 => (session(), prop_oneof![0u64..12, 1000u64..1030], prop_oneof![Just(0u64), 0u64..12])
            .prop_map(|(session, ahead, acknowledge)| Step::Write { session, ahead, acknowledge }),
        6 => any::<proptest::sample::Index>().prop_map(Step::Again),
        1 => (20_000u64..90_000, 1u32..6, 0u64..3_000)
            .prop_map(|(idle_ms, max_sessions, max_bytes)| Step::SetLimits(SessionLimits { idle_ms, max_sessions, max_bytes })),
    ]
}

/// Outcomes of all kinds, each telling its execution from every other where it can.
fn outcome(execution: u64) -> Outcome {
    let version = Version::from(execution);
    match execution % 9 {
        0 => Outcome::Counter {
            version,
            value: -execution.cast_signed(),
        },
        1 => Outcome::ConditionFailed { current: version },
        2 => Outcome::NotFound,
        3 => Outcome::NotANumber,
        4 => Outcome::Overflow,
        5 => Outcome::OutOfMemory,
        6 => Outcome::InvalidSize,
        _ => Outcome::Applied { version },
    }
}

struct Harness {
    table: SessionTable,
    model: Model,
    sent: Vec<SessionWrite>,
    executions: u64,
}

impl Harness {
    fn new() -> Self {
        let limits = SessionLimits {
            idle_ms: 60_000,
            max_sessions: 4,
            max_bytes: 6_000,
        };
        Self {
            table: SessionTable::new(limits),
            model: Model {
                now_ms: 1_000_000,
                ..Model::default()
            },
            sent: Vec::new(),
            executions: 0,
        }
    }

    fn step(&mut self, step: Step) {
        let now_ms = self.model.now_ms;
        let idle_ms = self.table.limits().idle_ms;
        match step {
            Step::Wait(ms) => self.model.now_ms += ms,
            Step::SetLimits(limits) => self.table.set_limits(limits),
            Step::Open(id) => {
                let id = u128::from(id);
                let opening = self.table.open(now_ms, id);
                if let Some(life) = self.model.alive(id, idle_ms) {
                    life.active_ms = now_ms;
                    assert_eq!(opening, Opening::Open);
                    return;
                }
                self.model.lives.remove(&id);
                let used = self.model.lives.len() as u64 * SESSION_BYTES + self.model.kept() * REPLY_BYTES;
                let limits = self.table.limits();
                let full = self.model.lives.len() >= limits.max_sessions as usize;
                if full || used + SESSION_BYTES > limits.max_bytes {
                    assert_eq!(opening, Opening::Busy);
                } else {
                    assert_eq!(opening, Opening::Open);
                    let life = Life {
                        active_ms: now_ms,
                        acked: 1,
                        ..Life::default()
                    };
                    self.model.lives.insert(id, life);
                }
            }
            Step::Close(id) => {
                let id = u128::from(id);
                assert_eq!(self.table.close(id), self.model.lives.remove(&id).is_some());
            }
            Step::Expire(id) => {
                let id = u128::from(id);
                let dead = self.model.lives.contains_key(&id) && self.model.alive(id, idle_ms).is_none();
                assert_eq!(self.table.expire(now_ms, id), dead);
                if dead {
                    self.model.lives.remove(&id);
                }
            }
            Step::Write {
                session,
                ahead,
                acknowledge,
            } => {
                let session = u128::from(session);
                let acked = self.model.lives.get(&session).map_or(1, |life| life.acked);
                let seq = acked + ahead;
                let write = SessionWrite {
                    session,
                    seq,
                    first_unacked: (acked + acknowledge).min(seq),
                };
                self.sent.push(write);
                self.write(write);
            }
            Step::Again(index) => {
                if !self.sent.is_empty() {
                    self.write(*index.get(&self.sent));
                }
            }
        }
    }

    fn write(&mut self, write: SessionWrite) {
        let now_ms = self.model.now_ms;
        let limits = self.table.limits();
        let mut runs = 0;
        let executions = self.executions;
        let verdict = self.table.execute(now_ms, &write, || {
            runs += 1;
            outcome(executions)
        });
        self.executions += runs;
        let Some(life) = self.model.alive(write.session, limits.idle_ms) else {
            assert_eq!((verdict, runs), (Verdict::Expired, 0));
            return;
        };
        if !write.in_window() {
            assert_eq!((verdict, runs), (Verdict::Busy, 0));
            return;
        }
        life.active_ms = now_ms;
        life.acked = life.acked.max(write.first_unacked);
        let (acked, before) = (life.acked, life.executed.get(&write.seq).copied());
        let used = self.model.lives.len() as u64 * SESSION_BYTES + (self.model.kept() + 1) * REPLY_BYTES;
        match (before, verdict) {
            (_, Verdict::Acknowledged) => assert!(write.seq < acked && runs == 0),
            (Some(before), Verdict::Replayed(outcome)) => assert_eq!((outcome, runs), (before, 0)),
            (None, Verdict::Busy) => assert!(used > limits.max_bytes && runs == 0),
            (None, Verdict::Executed(outcome)) => {
                assert!(write.seq >= acked && used <= limits.max_bytes && runs == 1);
                let life = self.model.lives.get_mut(&write.session).expect("alive");
                life.executed.insert(write.seq, outcome);
            }
            (before, verdict) => panic!("{write:?}: executed before: {before:?}, now {verdict:?}"),
        }
    }

    fn check(&self) {
        self.table.check();
        assert_eq!(self.table.len(), self.model.lives.len());
        assert_eq!(self.table.replies(), self.model.kept());
        let mut expired = Vec::new();
        self.table.propose_expired(self.model.now_ms, usize::MAX, &mut expired);
        let idle_ms = self.table.limits().idle_ms;
        let dead = |life: &&Life| (life.active_ms | (ACTIVITY_STEP_MS - 1)) + idle_ms <= self.model.now_ms;
        assert_eq!(expired.len(), self.model.lives.values().filter(dead).count());
    }
}

proptest! {
    /// Retries, reordering, duplicates, gaps, expiry, a full table: no number executes twice in the life of its session, and a
    /// number that comes again is answered as it was first.
    #[test]
    fn executes_at_most_once(steps in vec(step(), 1..200)) {
        let mut harness = Harness::new();
        for step in steps {
            harness.step(step);
            harness.check();
        }
    }

    /// An image taken in slices while the table changes is the table as it was at the beginning; loaded, it is that table.
    #[test]
    fn an_image_is_a_point_in_time(
        before in vec(step(), 0..150),
        during in vec((step(), any::<bool>()), 0..60),
        max_bytes in 0usize..300,
    ) {
        let mut harness = Harness::new();
        for step in before {
            harness.step(step);
        }
        let (digest, len, replies) = (harness.table.digest(), harness.table.len(), harness.table.replies());
        harness.table.image_begin();
        let mut slices = Vec::new();
        let mut progress = Progress::More;
        let slice = |harness: &mut Harness, slices: &mut Vec<Vec<u8>>| {
            let mut out = Vec::new();
            let progress = harness.table.image_slice(max_bytes, &mut out);
            slices.push(out);
            progress
        };
        for (step, take) in during {
            harness.step(step);
            if take && progress == Progress::More {
                progress = slice(&mut harness, &mut slices);
            }
        }
        while progress == Progress::More {
            progress = slice(&mut harness, &mut slices);
        }
        harness.check();
        prop_assert_eq!(harness.table.image_slice(max_bytes, &mut Vec::new()), Progress::Done);
        let mut loaded = SessionTable::new(SessionLimits::default());
        for slice in &slices {
            loaded.load(slice).expect("an image loads");
        }
        loaded.check();
        prop_assert_eq!((loaded.digest(), loaded.len(), loaded.replies()), (digest, len, replies));
    }

    #[test]
    fn damaged_images_never_panic(steps in vec(step(), 0..80), at: proptest::sample::Index, byte: u8, cut: proptest::sample::Index) {
        let mut harness = Harness::new();
        harness.step(Step::Open(0));
        for step in steps {
            harness.step(step);
        }
        harness.step(Step::Open(1));
        harness.table.image_begin();
        let mut image = Vec::new();
        prop_assert_eq!(harness.table.image_slice(usize::MAX, &mut image), Progress::Done);
        prop_assume!(!image.is_empty());
        let at = at.index(image.len());
        image[at] = byte;
        let mut loaded = SessionTable::new(SessionLimits::default());
        if loaded.load(&image).is_ok() {
            loaded.check();
        }
        let cut = cut.index(image.len());
        let _ = SessionTable::new(SessionLimits::default()).load(&image[..cut]);
    }
}

/// However small the slices, each brings the image on: with no bytes allowed at all it once took nothing for ever.
#[test]
fn a_slice_of_no_bytes_still_takes_a_session() {
    let mut table = SessionTable::new(SessionLimits::default());
    for id in 1..=3 {
        assert_eq!(table.open(1, id), Opening::Open);
    }
    table.image_begin();
    let mut image = Vec::new();
    let slices = (1..=10).find(|_| table.image_slice(0, &mut image) == Progress::Done);
    assert_eq!(slices, Some(3));
}

/// A client's numbers may be anything: the largest must not overflow, nor make a table that cannot be snapshot.
#[test]
fn the_largest_numbers_work() {
    let mut table = SessionTable::new(SessionLimits::default());
    assert_eq!(table.open(1, 1), Opening::Open);
    let write = SessionWrite {
        session: 1,
        seq: u64::MAX,
        first_unacked: u64::MAX,
    };
    let ok = outcome(7);
    assert_eq!(table.execute(1, &write, || ok), Verdict::Executed(ok));
    assert_eq!(
        table.execute(1, &write, || panic!("executed twice")),
        Verdict::Replayed(ok)
    );
    let before = SessionWrite {
        session: 1,
        seq: 5,
        first_unacked: 5,
    };
    assert_eq!(
        table.execute(1, &before, || panic!("acknowledged")),
        Verdict::Acknowledged
    );
    table.check();
    table.image_begin();
    let mut image = Vec::new();
    assert_eq!(table.image_slice(1, &mut image), Progress::Done);
    let mut loaded = SessionTable::new(SessionLimits::default());
    loaded.load(&image).expect("an image loads");
    assert_eq!(loaded.digest(), table.digest());
    loaded.check();
    assert_eq!(loaded.load(&image), Err(SessionImageError::Duplicate { session: 1 }));
}

/// The window is full of replies that were not acknowledged, and acknowledging makes room.
#[test]
fn a_window_holds_1024_replies() {
    let limits = SessionLimits::default();
    let mut table = SessionTable::new(limits);
    assert_eq!(table.open(0, 9), Opening::Open);
    for seq in 1..=SESSION_WINDOW {
        let write = SessionWrite {
            session: 9,
            seq,
            first_unacked: 1,
        };
        assert!(matches!(
            table.execute(0, &write, || outcome(seq)),
            Verdict::Executed(_)
        ));
    }
    let seq = SESSION_WINDOW + 1;
    let beyond = SessionWrite {
        session: 9,
        seq,
        first_unacked: 1,
    };
    assert_eq!(table.execute(0, &beyond, || panic!("beyond the window")), Verdict::Busy);
    assert_eq!(table.used_bytes(), SESSION_BYTES + SESSION_WINDOW * REPLY_BYTES);
    let write = SessionWrite {
        session: 9,
        seq,
        first_unacked: seq,
    };
    assert!(matches!(
        table.execute(0, &write, || outcome(seq)),
        Verdict::Executed(_)
    ));
    assert_eq!(table.used_bytes(), SESSION_BYTES + REPLY_BYTES);
    table.check();
}

#[test]
fn a_session_lives_through_its_idle_time_and_not_much_longer() {
    let limits = SessionLimits {
        idle_ms: 10_000,
        ..SessionLimits::default()
    };
    let mut table = SessionTable::new(limits);
    assert_eq!(table.open(5_000, 3), Opening::Open);
    let write = |seq| SessionWrite {
        session: 3,
        seq,
        first_unacked: 1,
    };
    assert!(matches!(
        table.execute(14_999, &write(1), || outcome(1)),
        Verdict::Executed(_)
    ));
    assert!(!table.expire(24_999, 3));
    assert_eq!(
        table.execute(24_999 + ACTIVITY_STEP_MS, &write(1), || panic!("expired")),
        Verdict::Expired
    );
    assert!(table.expire(24_999 + ACTIVITY_STEP_MS, 3));
    assert!(table.is_empty());
}
