//! The fast checker against a search that tries everything, on small histories by chance: true ones, and the same with something
//! changed.

use std::collections::HashSet;

use crate::check::{PROPERTIES, Violation};
use crate::dice::Dice;
use crate::history::{Event, Freshness, Header, History, Op, Operation, Outcome, Reply};

const KEY: &str = "k";

fn fast(operations: &[Operation]) -> Vec<Violation> {
    PROPERTIES[0].violations(&history(operations))
}

fn history(operations: &[Operation]) -> History {
    let mut events = Vec::new();
    for operation in operations {
        let Operation {
            id,
            client,
            op,
            called,
            returned,
        } = operation.clone();
        events.push((
            called,
            0,
            Event::Call {
                at: called,
                id,
                client,
                op,
            },
        ));
        if let Some((at, outcome)) = returned {
            events.push((at, 1, Event::Return { at, id, outcome }));
        }
    }
    events.sort_by_key(|&(at, order, _)| (at, order));
    let mut history = History::new(Header::new("test", 0));
    history.events = events.into_iter().map(|(_, _, event)| event).collect();
    history
}

/// What the register holds, by the search.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Register {
    /// The greatest version that was made.
    last: u64,
    entry: Option<(u64, String)>,
}

/// A version nobody has seen.
const UNSEEN: u64 = u64::MAX;

/// Whether some order explains everything: Wing and Gong's search (J. Parallel Distrib. Comput. 1993) with Lowe's memory of
/// what was tried.
fn search(operations: &[Operation]) -> bool {
    let acknowledged: HashSet<u64> = operations
        .iter()
        .filter(|operation| operation.op.is_write())
        .filter_map(|operation| operation.reply().filter(|reply| reply.status == "ok"))
        .map(|reply| reply.version)
        .collect();
    let mut foreign: Vec<u64> = operations
        .iter()
        .flat_map(|operation| {
            let asked = match &operation.op {
                Op::Put { if_version, .. } | Op::Delete { if_version, .. } => *if_version,
                _ => None,
            };
            asked.into_iter().chain(operation.reply().map(|reply| reply.version))
        })
        .filter(|version| *version != 0 && !acknowledged.contains(version))
        .collect();
    foreign.push(UNSEEN);
    let start = Register { last: 0, entry: None };
    let mut tried = HashSet::new();
    let mut open = vec![(0_u32, start)];
    let must: u32 = (0..operations.len())
        .filter(|&place| operations[place].reply().is_some())
        .fold(0, |mask, place| mask | 1 << place);
    while let Some((done, register)) = open.pop() {
        if done & must == must {
            return true;
        }
        if !tried.insert((done, register.clone())) {
            continue;
        }
        let left = || (0..operations.len()).filter(|place| done >> place & 1 == 0);
        let first_return = left()
            .map(|place| operations[place].answered())
            .min()
            .unwrap_or(u64::MAX);
        for place in left() {
            let operation = &operations[place];
            if operation.called > first_return || matches!(operation.returned, Some((_, Outcome::Refused { .. }))) {
                continue;
            }
            for next in steps(operation, &register, &foreign) {
                open.push((done | 1 << place, next));
            }
        }
    }
    false
}

/// The registers that an operation may leave, if it fits at all.
fn steps(operation: &Operation, register: &Register, foreign: &[u64]) -> Vec<Register> {
    let current = register.entry.as_ref().map_or(0, |(version, _)| *version);
    let Some(reply) = operation.reply() else {
        return match &operation.op {
            Op::Put { value, if_version, .. } if if_version.is_none_or(|version| version == current) => foreign
                .iter()
                .filter(|version| **version > register.last)
                .map(|&version| Register {
                    last: if version == UNSEEN { register.last } else { version },
                    entry: Some((version, value.clone())),
                })
                .collect(),
            Op::Delete { .. } => vec![Register {
                entry: None,
                ..register.clone()
            }],
            _ => vec![register.clone()],
        };
    };
    let same = |holds: bool| holds.then(|| register.clone()).into_iter().collect();
    let makes = |holds: bool, entry: Option<(u64, String)>| {
        let next = Register {
            last: reply.version,
            entry,
        };
        (holds && reply.version > register.last)
            .then_some(next)
            .into_iter()
            .collect()
    };
    match (&operation.op, reply.status.as_str()) {
        (Op::Get { .. }, "ok") => same(register.entry == reply.value.clone().map(|value| (reply.version, value))),
        (_, "not_found") => same(register.entry.is_none()),
        (_, "condition_failed") => same(current == reply.version),
        (Op::Put { value, if_version, .. }, "ok") => {
            let holds = if_version.is_none_or(|version| version == current);
            makes(holds, Some((reply.version, value.clone())))
        }
        (Op::Delete { if_version, .. }, "ok") => {
            let holds = current != 0 && if_version.is_none_or(|version| version == current);
            makes(holds, None)
        }
        _ => unreachable!("not generated"),
    }
}

/// What a history is made with.
#[derive(Clone, Copy)]
struct Mix {
    doubtful_puts: bool,
    doubtful_deletes: bool,
    indexes: bool,
}

/// A history that happened.
fn generate(dice: &mut Dice, mix: Mix) -> Vec<Operation> {
    let count = 2 + dice.below(6);
    let mut moments: Vec<(u64, u64, u64)> = Vec::new();
    for _ in 0..count {
        let moment = dice.below(100);
        let (before, after) = (dice.below(25), dice.below(25));
        moments.push((moment, moment.saturating_sub(before), moment + after));
    }
    moments.sort_unstable();
    let mut register: Option<(u64, String)> = None;
    let mut index = 0;
    let mut versions = vec![];
    moments
        .iter()
        .enumerate()
        .map(|(number, &(_, called, answered))| {
            let id = number as u64;
            let current = register.as_ref().map_or(0, |(version, _)| *version);
            let some_version = if versions.is_empty() || dice.chance(500) {
                current
            } else {
                versions[dice.below(versions.len() as u64) as usize]
            };
            let key = KEY.to_owned();
            let op = match dice.below(10) {
                0..4 => Op::Get {
                    key,
                    freshness: Freshness::Linearizable,
                },
                4..6 => Op::Put {
                    key,
                    value: format!("v{id}"),
                    if_version: None,
                    ttl_ms: None,
                },
                6 => Op::Put {
                    key,
                    value: format!("v{id}"),
                    if_version: Some(some_version),
                    ttl_ms: None,
                },
                7 => Op::Delete {
                    key,
                    if_version: (some_version != 0 && dice.chance(500)).then_some(some_version),
                },
                _ => Op::Delete { key, if_version: None },
            };
            let may_doubt = match op {
                Op::Put { if_version: None, .. } => mix.doubtful_puts,
                Op::Delete { if_version: None, .. } => mix.doubtful_deletes,
                _ => false,
            };
            let in_doubt = may_doubt && dice.chance(400);
            let mut reply = Reply::default();
            if !(in_doubt && dice.chance(400)) {
                if op.is_write() {
                    index += 1;
                }
                execute(&op, &mut register, index << 16, &mut reply);
            }
            if !op.is_write() && mix.indexes {
                reply.index = index;
            }
            if reply.version != 0 && reply.status == "ok" {
                versions.push(reply.version);
            }
            let outcome = if in_doubt {
                Outcome::InDoubt {
                    code: "timeout".to_owned(),
                }
            } else {
                Outcome::Done(reply)
            };
            Operation {
                id,
                client: number as u32,
                op,
                called,
                returned: Some((answered, outcome)),
            }
        })
        .collect()
}

fn execute(op: &Op, register: &mut Option<(u64, String)>, version: u64, reply: &mut Reply) {
    let current = register.as_ref().map_or(0, |(version, _)| *version);
    match op {
        Op::Get { .. } => match register {
            Some((version, value)) => (reply.version, reply.value) = (*version, Some(value.clone())),
            None => reply.status = "not_found".to_owned(),
        },
        Op::Put {
            if_version: Some(asked),
            ..
        }
        | Op::Delete {
            if_version: Some(asked),
            ..
        } if *asked != current => {
            reply.status = "condition_failed".to_owned();
            reply.version = current;
        }
        Op::Delete { .. } if register.is_none() => reply.status = "not_found".to_owned(),
        Op::Put { value, .. } => {
            *register = Some((version, value.clone()));
            reply.version = version;
        }
        Op::Delete { .. } => {
            *register = None;
            reply.version = version;
        }
        _ => unreachable!("not generated"),
    }
}

/// Changes something, so that the history may be one that cannot have happened.
fn spoil(dice: &mut Dice, operations: &mut [Operation]) {
    let count = operations.len() as u64;
    let place = dice.below(count) as usize;
    let other = operations[dice.below(count) as usize].clone();
    let operation = &mut operations[place];
    let is_read = !operation.op.is_write();
    match dice.below(4) {
        // It saw what another saw.
        0 if is_read && !other.op.is_write() => {
            if let (Some((_, outcome)), Some(reply)) = (&mut operation.returned, other.reply()) {
                *outcome = Outcome::Done(reply.clone());
            }
        }
        // It saw what another wrote.
        1 if is_read => {
            if let (Op::Put { value, .. }, Some(reply), Some((_, outcome))) = (
                &other.op,
                other.reply().filter(|reply| reply.status == "ok"),
                &mut operation.returned,
            ) {
                *outcome = Outcome::Done(Reply {
                    value: Some(value.clone()),
                    ..reply.clone()
                });
            }
        }
        // It ran at another time.
        2 => {
            let (called, length) = (dice.below(100), dice.below(30));
            operation.called = called;
            if let Some((at, _)) = &mut operation.returned {
                *at = called + length;
            }
        }
        // It took no time.
        _ => {
            if let Some((at, _)) = &mut operation.returned {
                if dice.chance(500) {
                    *at = operation.called;
                } else {
                    operation.called = *at;
                }
            }
        }
    }
}

#[test]
fn what_happened_is_accepted() {
    let mut dice = Dice::new(1);
    for round in 0..20_000 {
        let mix = Mix {
            doubtful_puts: dice.chance(500),
            doubtful_deletes: dice.chance(500),
            indexes: dice.chance(500),
        };
        let operations = generate(&mut dice, mix);
        assert!(
            search(&operations),
            "round {round}: the search is wrong: {operations:#?}"
        );
        assert_eq!(fast(&operations), [], "round {round}: {operations:#?}");
    }
}

#[test]
fn what_cannot_have_happened_is_rejected_as_by_the_search() {
    let mut dice = Dice::new(2);
    let (mut good, mut bad) = (0, 0);
    for round in 0..40_000 {
        let mix = Mix {
            doubtful_puts: false,
            doubtful_deletes: false,
            indexes: false,
        };
        let mut operations = generate(&mut dice, mix);
        for _ in 0..=dice.below(2) {
            spoil(&mut dice, &mut operations);
        }
        let found = fast(&operations);
        let possible = search(&operations);
        assert_eq!(found.is_empty(), possible, "round {round}: {found:?} {operations:#?}");
        if possible {
            good += 1;
        } else {
            bad += 1;
        }
    }
    assert!(good > 4_000 && bad > 4_000, "{good} {bad}");
}

#[test]
fn with_writes_in_doubt_nothing_possible_is_rejected_and_most_of_the_impossible_is() {
    let mut dice = Dice::new(3);
    let (mut rejected, mut bad) = (0, 0);
    for round in 0..40_000 {
        let mix = Mix {
            doubtful_puts: true,
            doubtful_deletes: dice.chance(500),
            indexes: false,
        };
        let mut operations = generate(&mut dice, mix);
        spoil(&mut dice, &mut operations);
        let found = fast(&operations);
        if search(&operations) {
            assert_eq!(found, [], "round {round}: {operations:#?}");
        } else {
            bad += 1;
            rejected += u64::from(!found.is_empty());
        }
    }
    assert!(bad > 2_000 && rejected * 100 > bad * 90, "{rejected} of {bad}");
}

#[test]
fn an_index_tells_a_stale_read_that_time_does_not() {
    // All at the same time, so that only the index shows that the first read is of a state that was over.
    let text = r#"{"format":"generation-history","version":1}
{"type":"call","at":1,"id":1,"client":1,"op":"put","key":"k","value":"a"}
{"type":"call","at":1,"id":2,"client":2,"op":"put","key":"k","value":"b"}
{"type":"call","at":1,"id":3,"client":3,"op":"get","key":"k"}
{"type":"return","at":2,"id":1,"state":"done","status":"ok","version":"65536"}
{"type":"return","at":2,"id":2,"state":"done","status":"ok","version":"131072"}
{"type":"return","at":2,"id":3,"state":"done","status":"ok","version":"65536","value":"a","index":"INDEX"}"#;
    let found = |index: &str| PROPERTIES[0].violations(&History::parse(&text.replace("INDEX", index)).unwrap());
    assert_eq!(found("1"), []);
    assert!(found("2")[0].what.contains("was applied by then"));
}
