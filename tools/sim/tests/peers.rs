//! Nodes that talk to each other: calls and their ends, lanes, bounds, failures, identity.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use generation_node::env::CoreId;
use generation_node::peers::{Call, Handler, Liveness, PeerError, PeerId, PeerLimits, PeerStats, Peers, Request};
use generation_proto::peer::Refusal;
use generation_sim::{Kill, NodeSetup, Sim, Weather};

/// What a handler was told, in order.
#[derive(Debug, Default)]
struct Log {
    requests: Vec<(PeerId, u16, u8, Bytes)>,
    messages: Vec<(PeerId, u16, u8, Bytes)>,
    liveness: Vec<(u64, Liveness)>,
    /// Requests that are not answered yet.
    held: Vec<Request>,
}

/// Answers requests by kind.
#[derive(Debug, Default)]
struct Echo {
    log: RefCell<Log>,
    /// Requests are kept and not answered.
    holds: Cell<bool>,
}

/// The kind a request is answered with its own payload under.
const ECHO: u8 = 1;
/// The kind a request asks under for as many bytes as its payload says.
const FETCH: u8 = 2;
/// The kind nobody answers.
const DROP: u8 = 3;

impl Handler for Echo {
    fn request(&self, request: Request) {
        let mut log = self.log.borrow_mut();
        let payload = request.payload.clone();
        log.requests
            .push((request.from, request.shard, request.kind, payload.clone()));
        if self.holds.get() {
            log.held.push(request);
            return;
        }
        drop(log);
        match request.kind {
            ECHO => request.reply(payload),
            FETCH => {
                let len = u64::from_le_bytes(payload[..].try_into().unwrap());
                request.reply(Bytes::from(vec![7; len as usize]));
            }
            _ => drop(request),
        }
    }

    fn message(&self, from: PeerId, shard: u16, kind: u8, payload: Bytes) {
        self.log.borrow_mut().messages.push((from, shard, kind, payload));
    }

    fn liveness(&self, node: u64, change: Liveness) {
        self.log.borrow_mut().liveness.push((node, change));
    }
}

/// A cluster of which every core of every node echoes.
struct Cluster {
    sim: Sim,
    /// By node, then by core.
    echoes: Vec<Vec<Rc<Echo>>>,
}

fn setup(nodes: usize, cores: CoreId) -> NodeSetup {
    NodeSetup {
        cores,
        nodes,
        ..NodeSetup::default()
    }
}

impl Cluster {
    fn new(seed: u64, nodes: usize, cores: CoreId) -> Self {
        Self::with(seed, &vec![setup(nodes, cores); nodes], Weather::default())
    }

    fn with(seed: u64, setups: &[NodeSetup], weather: Weather) -> Self {
        let mut cluster = Self {
            sim: Sim::new(seed, weather),
            echoes: Vec::new(),
        };
        for setup in setups {
            let node = cluster.sim.node(setup);
            cluster.echoes.push(Vec::new());
            cluster.attend(node);
        }
        cluster
    }

    /// Gives a node that was just started its handlers.
    fn attend(&mut self, node: usize) {
        let cores = self.sim.cores(node);
        self.echoes[node] = (0..cores)
            .map(|core| {
                let echo = Rc::new(Echo::default());
                self.sim.peers(node, core).set_handler(Rc::clone(&echo) as _);
                echo
            })
            .collect();
    }

    fn restart(&mut self, node: usize) {
        self.sim.start(node);
        self.attend(node);
    }

    fn peers(&self, node: usize, core: CoreId) -> Peers {
        self.sim.peers(node, core)
    }

    /// Begins a call with a time limit, from core 0 of a node to core 0 of another.
    fn begin(&self, from: usize, to: usize, kind: u8, payload: impl Into<Bytes>, within: Duration) -> Call {
        let deadline = self.sim.now() + within;
        self.peers(from, 0).call(id(to, 0), 5, kind, payload.into(), deadline)
    }

    /// Waits for a call's end.
    fn end(&mut self, node: usize, call: Call) -> Result<Bytes, PeerError> {
        let outcome = Rc::new(RefCell::new(None));
        let slot = Rc::clone(&outcome);
        self.sim.spawn(node, async move {
            let ended = call.await;
            *slot.borrow_mut() = Some(ended);
        });
        self.sim.until(|_| outcome.borrow_mut().take())
    }

    fn call(&mut self, from: usize, to: usize, kind: u8, payload: impl Into<Bytes>) -> Result<Bytes, PeerError> {
        let call = self.begin(from, to, kind, payload, Duration::from_secs(5));
        self.end(from, call)
    }

    /// Waits until every node knows every other to be alive.
    fn settle(&mut self) {
        let nodes = self.echoes.len();
        self.sim.until(|sim| {
            let mut pairs = (0..nodes).flat_map(|a| (0..nodes).filter(move |&b| a != b).map(move |b| (a, b)));
            pairs.all(|(a, b)| sim.peers(a, 0).is_alive(1 + b as u64)).then_some(())
        });
    }

    fn stats(&self, node: usize, of: usize) -> PeerStats {
        self.peers(node, 0).stats(1 + of as u64).unwrap()
    }
}

fn id(node: usize, core: CoreId) -> PeerId {
    PeerId {
        node: 1 + node as u64,
        core,
    }
}

#[test]
fn a_call_is_answered_in_both_directions() {
    let mut cluster = Cluster::new(1, 2, 1);
    assert_eq!(cluster.call(0, 1, ECHO, "hello"), Ok(Bytes::from("hello")));
    assert_eq!(cluster.call(1, 0, ECHO, "back"), Ok(Bytes::from("back")));
    assert_eq!(cluster.call(0, 1, ECHO, ""), Ok(Bytes::new()));
    let log = cluster.echoes[1][0].log.borrow();
    assert_eq!(
        log.requests[0],
        (id(0, 0), 5, ECHO, Bytes::from("hello")),
        "the handler sees who asks, the shard and the kind"
    );
}

#[test]
fn a_pair_of_cores_shares_one_connection() {
    for seed in 0..10 {
        let mut cluster = Cluster::new(seed, 2, 1);
        // Both dial at the same moment.
        let calls = [
            cluster.begin(0, 1, ECHO, "a", Duration::from_secs(1)),
            cluster.begin(1, 0, ECHO, "b", Duration::from_secs(1)),
        ];
        for (node, call) in calls.into_iter().enumerate() {
            assert!(cluster.end(node, call).is_ok());
        }
        cluster.sim.run_for(Duration::from_secs(5));
        for (node, other) in [(0, 1), (1, 0)] {
            let stats = cluster.stats(node, other);
            assert_eq!((stats.connections, stats.violations), (1, 0), "node {node}: {stats:?}");
        }
        // It is the one the smaller id dialled, and both directions work over it.
        assert!(cluster.call(0, 1, ECHO, "a").is_ok());
        assert!(cluster.call(1, 0, ECHO, "b").is_ok());
        assert_eq!(cluster.stats(0, 1).connections, 1);
    }
}

#[test]
fn every_pair_of_cores_has_its_own_connection_and_handler() {
    let mut cluster = Cluster::new(2, 3, 2);
    let mut calls = Vec::new();
    let deadline = cluster.sim.now() + Duration::from_secs(1);
    for from in 0..3 {
        for to in (0..3).filter(|&to| to != from) {
            for (a, b) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let payload = Bytes::from(format!("{from}.{a} to {to}.{b}"));
                let call = cluster
                    .peers(from, a)
                    .call(id(to, b), 0, ECHO, payload.clone(), deadline);
                calls.push((from, call, payload));
            }
        }
    }
    for (from, call, payload) in calls {
        assert_eq!(cluster.end(from, call), Ok(payload));
    }
    for to in 0..3 {
        for core in 0..2 {
            let log = cluster.echoes[to][core].log.borrow();
            assert_eq!(log.requests.len(), 4);
            for (from, .., payload) in &log.requests {
                let expected = format!("{}.{} to {to}.{core}", from.node - 1, from.core);
                assert_eq!(payload, &expected);
            }
        }
    }
}

#[test]
fn messages_without_an_answer_arrive_in_order() {
    let mut cluster = Cluster::new(3, 2, 1);
    let peers = cluster.peers(0, 0);
    for number in 0..100_u8 {
        peers.send(id(1, 0), 9, number, Bytes::from(vec![number])).unwrap();
    }
    let echo = Rc::clone(&cluster.echoes[1][0]);
    cluster
        .sim
        .until(|_| (echo.log.borrow().messages.len() == 100).then_some(()));
    let expected: Vec<_> = (0..100_u8)
        .map(|number| (id(0, 0), 9, number, Bytes::from(vec![number])))
        .collect();
    assert_eq!(echo.log.borrow().messages, expected);
}

#[test]
fn what_is_in_no_hurry_goes_along_with_the_next_or_goes_soon() {
    let mut cluster = Cluster::new(3, 2, 1);
    cluster.settle();
    let (peers, echo) = (cluster.peers(0, 0), Rc::clone(&cluster.echoes[1][0]));
    let arrived = |cluster: &mut Cluster| {
        let before = cluster.sim.now();
        let echo = Rc::clone(&echo);
        let count = echo.log.borrow().messages.len();
        cluster
            .sim
            .until(move |_| (echo.log.borrow().messages.len() > count).then_some(()));
        cluster.sim.now() - before
    };
    // Alone it leaves with a turn that comes anyhow: of the sweep at the latest.
    peers.send_along(id(1, 0), 9, 1, Bytes::from_static(b"slow")).unwrap();
    assert!(arrived(&mut cluster) < Duration::from_millis(300));
    // In company it leaves with that, in the same datagram.
    let sent = cluster.stats(0, 1).messages_sent;
    peers.send_along(id(1, 0), 9, 2, Bytes::from_static(b"slow")).unwrap();
    assert!(cluster.call(0, 1, ECHO, "now").is_ok());
    assert_eq!(cluster.stats(0, 1).messages_sent - sent, 2);
    let kinds: Vec<u8> = echo.log.borrow().messages.iter().map(|message| message.2).collect();
    assert_eq!(kinds, [1, 2]);
}

#[test]
fn the_calls_of_one_turn_leave_together() {
    let mut cluster = Cluster::new(4, 2, 1);
    cluster.settle();
    cluster.sim.run_for(Duration::from_millis(300));
    let before = cluster.sim.sent();
    let calls: Vec<Call> = (0..500)
        .map(|_| cluster.begin(0, 1, ECHO, vec![1; 16], Duration::from_secs(1)))
        .collect();
    for call in calls {
        assert!(cluster.end(0, call).is_ok());
    }
    let sent = cluster.sim.sent() - before;
    // 500 × 32 bytes each way are 12 datagrams of 1,452; acknowledgements and a ping come on top.
    assert!(sent <= 50, "{sent} datagrams for 500 calls");
}

#[test]
fn large_payloads_travel_and_do_not_hold_up_small_ones() {
    let weather = Weather {
        delay: Duration::from_millis(1),
        ..Weather::default()
    };
    let mut cluster = Cluster::with(5, &vec![setup(2, 1); 2], weather);
    cluster.settle();
    let large = Bytes::from(vec![3; 24 << 20]);
    let bulk = cluster.begin(0, 1, ECHO, large.clone(), Duration::from_mins(1));
    let started = cluster.sim.now();
    cluster.sim.run_for(Duration::from_millis(10));
    let mut slowest = Duration::ZERO;
    for _ in 0..20 {
        let before = cluster.sim.now();
        assert!(cluster.call(0, 1, ECHO, "beat").is_ok());
        slowest = slowest.max(cluster.sim.now() - before);
    }
    assert_eq!(cluster.end(0, bulk), Ok(large));
    let whole = cluster.sim.now() - started;
    assert!(
        slowest * 10 < whole && slowest < Duration::from_millis(20),
        "a beat took {slowest:?} beside a transfer of {whole:?}"
    );
}

#[test]
fn a_small_request_may_have_a_large_answer() {
    let mut cluster = Cluster::new(6, 2, 1);
    let len: u64 = 5 << 20;
    let answer = cluster.call(1, 0, FETCH, len.to_le_bytes().to_vec()).unwrap();
    assert_eq!(answer.len() as u64, len);
}

#[test]
fn a_call_without_an_answer_ends_at_its_deadline() {
    let mut cluster = Cluster::new(7, 2, 1);
    cluster.settle();
    cluster.echoes[1][0].holds.set(true);
    let before = cluster.sim.now();
    let within = Duration::from_millis(250);
    let call = cluster.begin(0, 1, ECHO, "x", within);
    assert_eq!(cluster.end(0, call), Err(PeerError::Timeout { maybe_received: true }));
    let took = cluster.sim.now() - before;
    assert!(took >= within && took < within + Duration::from_millis(5), "{took:?}");
    assert_eq!(cluster.stats(0, 1).calls_timed_out, 1);
    assert_eq!(cluster.stats(0, 1).calls_in_flight, 0);
    // An answer that comes too late finds nobody, and does no harm to the call that has its place now.
    let late = cluster.echoes[1][0].log.borrow_mut().held.pop().unwrap();
    cluster.echoes[1][0].holds.set(false);
    late.reply(Bytes::from("late"));
    assert_eq!(cluster.call(0, 1, ECHO, "y"), Ok(Bytes::from("y")));
    assert_eq!(cluster.stats(0, 1).violations, 0);
}

#[test]
fn a_call_that_is_dropped_is_forgotten() {
    let mut cluster = Cluster::new(8, 2, 1);
    cluster.settle();
    for _ in 0..10_000 {
        drop(cluster.begin(0, 1, ECHO, "x", Duration::from_secs(1)));
        cluster.sim.run_for(Duration::from_micros(20));
    }
    assert_eq!(cluster.stats(0, 1).calls_in_flight, 0);
    assert_eq!(cluster.call(0, 1, ECHO, "y"), Ok(Bytes::from("y")));
}

#[test]
fn a_request_that_is_dropped_is_refused_and_one_without_a_handler_too() {
    let mut cluster = Cluster::new(9, 2, 1);
    let refused = cluster.call(0, 1, DROP, "x").unwrap_err();
    assert_eq!(refused, PeerError::Refused(Refusal::Unanswered));
    assert!(refused.may_have_been_received());
    cluster.sim.kill(1, Kill::Process);
    cluster.sim.start(1);
    let refused = loop {
        match cluster.call(0, 1, ECHO, "x") {
            Err(PeerError::Refused(refusal)) => break PeerError::Refused(refusal),
            Err(PeerError::Lost { .. } | PeerError::Unreachable) => cluster.sim.run_for(Duration::from_millis(50)),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(refused, PeerError::Refused(Refusal::NotServed));
    assert!(!refused.may_have_been_received());
}

#[test]
fn unknown_peers_and_payloads_that_are_too_long_are_refused_at_once() {
    let mut setups = vec![setup(2, 1); 2];
    setups[0].peer_limits.message_bytes = 1000;
    let mut cluster = Cluster::with(10, &setups, Weather::default());
    let deadline = cluster.sim.now() + Duration::from_secs(1);
    for to in [id(2, 0), id(1, 1), id(0, 0)] {
        let call = cluster.peers(0, 0).call(to, 0, ECHO, Bytes::new(), deadline);
        assert_eq!(cluster.end(0, call), Err(PeerError::Unknown), "{to}");
        assert_eq!(
            cluster.peers(0, 0).send(to, 0, ECHO, Bytes::new()),
            Err(PeerError::Unknown)
        );
    }
    assert_eq!(cluster.call(0, 1, ECHO, vec![0; 1001]), Err(PeerError::TooLarge(1001)));
    assert_eq!(cluster.call(0, 1, ECHO, vec![0; 1000]).unwrap().len(), 1000);
}

#[test]
fn a_peer_that_does_not_answer_is_busy_and_slows_no_other() {
    let mut cluster = Cluster::new(11, 3, 1);
    cluster.settle();
    cluster.echoes[1][0].holds.set(true);
    let limit = PeerLimits::default().calls;
    let within = Duration::from_mins(1);
    let held: Vec<Call> = (0..limit).map(|_| cluster.begin(0, 1, ECHO, "x", within)).collect();
    let one_more = cluster.begin(0, 1, ECHO, "x", within);
    assert_eq!(cluster.end(0, one_more), Err(PeerError::Busy));
    assert_eq!(cluster.stats(0, 1).busy, 1);
    let before = cluster.sim.now();
    assert!(cluster.call(0, 2, ECHO, "y").is_ok());
    assert!(cluster.sim.now() - before < Duration::from_millis(1));
    let echo = Rc::clone(&cluster.echoes[1][0]);
    cluster
        .sim
        .until(|_| (echo.log.borrow().held.len() == limit).then_some(()));
    for request in std::mem::take(&mut echo.log.borrow_mut().held) {
        let payload = request.payload.clone();
        request.reply(payload);
    }
    for call in held {
        assert!(cluster.end(0, call).is_ok());
    }
    assert!(cluster.call(0, 1, DROP, "x").is_err());
}

#[test]
fn a_peer_that_reads_nothing_is_busy_by_bytes_and_slows_no_other() {
    let mut setups = vec![setup(3, 1); 3];
    // Suspicion would end the connection, and with it what is tested here.
    for setup in &mut setups {
        setup.peer_limits.suspect_after = Duration::from_hours(1);
        setup.peer_limits.queue_bytes = 8 << 20;
    }
    let mut cluster = Cluster::with(12, &setups, Weather::default());
    cluster.settle();
    cluster.sim.freeze(1, false);
    let payload = Bytes::from(vec![1; 1 << 20]);
    let mut calls = Vec::new();
    let busy = loop {
        let call = cluster.begin(0, 1, ECHO, payload.clone(), Duration::from_secs(20));
        cluster.sim.run_for(Duration::from_millis(1));
        if cluster.stats(0, 1).busy > 0 {
            break call;
        }
        calls.push(call);
        assert!(calls.len() < 20, "megabytes wait without a bound");
    };
    assert_eq!(cluster.end(0, busy), Err(PeerError::Busy));
    assert!(cluster.stats(0, 1).queued_bytes <= 8 << 20);
    // Short messages have room of their own.
    let beat = cluster.begin(0, 1, ECHO, "beat", Duration::from_secs(20));
    let before = cluster.sim.now();
    assert_eq!(cluster.call(0, 2, ECHO, payload.clone()), Ok(payload.clone()));
    assert!(cluster.sim.now() - before < Duration::from_millis(100));
    cluster.sim.thaw(1);
    assert!(cluster.end(0, beat).is_ok());
    for call in calls {
        assert_eq!(cluster.end(0, call), Ok(payload.clone()));
    }
}

/// What the handler of a core was told of a node.
fn told(cluster: &Cluster, node: usize, core: usize, of: usize) -> Vec<Liveness> {
    let log = cluster.echoes[node][core].log.borrow();
    let of = log.liveness.iter().filter(|(id, _)| *id == 1 + of as u64);
    of.map(|&(_, change)| change).collect()
}

#[test]
fn a_killed_peer_is_noticed_by_every_core_and_its_calls_end_at_once() {
    let mut cluster = Cluster::new(20, 3, 2);
    cluster.settle();
    cluster.echoes[1][0].holds.set(true);
    let within = Duration::from_mins(1);
    let call = cluster.begin(0, 1, ECHO, "x", within);
    let deadline = cluster.sim.now() + within;
    let other_core = cluster.peers(0, 1).call(id(1, 1), 0, DROP, Bytes::new(), deadline);
    assert!(cluster.end(0, other_core).is_err());
    cluster.echoes[1][1].holds.set(true);
    let other_core = cluster.peers(0, 1).call(id(1, 1), 0, ECHO, Bytes::new(), deadline);
    let waiting = cluster.echoes[1].clone();
    cluster.sim.until(|_| {
        let held = waiting.iter().all(|echo| !echo.log.borrow().held.is_empty());
        held.then_some(())
    });
    let before = cluster.sim.now();
    cluster.sim.kill(1, Kill::Process);
    let lost = Err(PeerError::Lost { maybe_received: true });
    assert_eq!(cluster.end(0, call), lost);
    assert_eq!(cluster.end(0, other_core), lost);
    let took = cluster.sim.now() - before;
    let limits = PeerLimits::default();
    let latest = limits.suspect_after + limits.ping_interval * 2;
    assert!(took <= latest, "{took:?} until the calls ended");
    assert!(took + limits.ping_interval * 2 >= limits.suspect_after, "{took:?}");
    cluster.sim.run_for(Duration::from_millis(10));
    for core in 0..2 {
        assert!(!cluster.peers(0, core).is_alive(2), "core {core}");
        assert!(cluster.peers(0, core).is_alive(3), "core {core}");
        assert_eq!(told(&cluster, 0, usize::from(core), 1), [Liveness::Up, Liveness::Down]);
        assert_eq!(told(&cluster, 0, usize::from(core), 2), [Liveness::Up]);
    }
    // A call to it does not wait for its deadline: one dial may be under way.
    let before = cluster.sim.now();
    assert_eq!(cluster.call(0, 1, ECHO, "y"), Err(PeerError::Unreachable));
    assert!(cluster.sim.now() - before <= limits.dial_timeout);
}

#[test]
fn a_restarted_peer_is_connected_at_once_whoever_has_the_smaller_id() {
    for (dead, left) in [(0, 1), (1, 0)] {
        for down_ms in [5, 100, 400, 3_000] {
            let mut cluster = Cluster::new(21, 2, 2);
            cluster.settle();
            cluster.sim.kill(dead, Kill::Process);
            cluster.sim.run_for(Duration::from_millis(down_ms));
            cluster.restart(dead);
            let before = cluster.sim.now();
            cluster.settle();
            let took = cluster.sim.now() - before;
            assert!(took <= Duration::from_millis(250), "{took:?} after {down_ms} ms");
            assert!(cluster.call(left, dead, ECHO, "x").is_ok(), "{down_ms} ms");
            assert!(cluster.call(dead, left, ECHO, "x").is_ok(), "{down_ms} ms");
            cluster.sim.run_for(Duration::from_millis(10));
            for core in 0..2 {
                let changes = told(&cluster, left, core, dead);
                let restarts = changes.iter().filter(|&&change| change == Liveness::Restarted).count();
                assert_eq!(restarts, 1, "core {core} after {down_ms} ms: {changes:?}");
                assert_ne!(changes.last(), Some(&Liveness::Down));
            }
        }
    }
}

#[test]
fn a_peer_that_stops_in_good_order_is_gone_at_once() {
    let mut cluster = Cluster::new(22, 2, 2);
    cluster.settle();
    cluster.sim.stop(1);
    cluster.sim.until(|sim| sim.has_stopped(1).then_some(()));
    let stopped = cluster.sim.now();
    cluster.sim.until(|sim| (!sim.peers(0, 1).is_alive(2)).then_some(()));
    assert!(cluster.sim.now() - stopped < Duration::from_millis(5));
    // Its own calls end too.
    assert_eq!(cluster.call(1, 0, ECHO, "x"), Err(PeerError::Stopped));
}

#[test]
fn a_core_that_did_not_run_suspects_nobody() {
    let mut cluster = Cluster::new(23, 3, 1);
    cluster.settle();
    cluster.sim.run_for(Duration::from_millis(333));
    cluster.sim.freeze(0, false);
    cluster.sim.run_for(Duration::from_secs(10));
    for node in [1, 2] {
        assert!(!cluster.peers(node, 0).is_alive(1), "the others saw it fall silent");
    }
    cluster.sim.thaw(0);
    cluster.sim.run_for(Duration::from_secs(1));
    for other in [1, 2] {
        assert_eq!(told(&cluster, 0, 0, other), [Liveness::Up], "it suspected node {other}");
        assert_eq!(
            told(&cluster, other, 0, 0),
            [Liveness::Up, Liveness::Down, Liveness::Up]
        );
    }
    cluster.settle();
}

#[test]
fn an_idle_pair_costs_one_exchange_an_interval() {
    let mut cluster = Cluster::new(24, 2, 4);
    cluster.settle();
    cluster.sim.run_for(Duration::from_secs(5));
    let (sent, messages) = (cluster.sim.sent(), cluster.stats(0, 1).messages_sent);
    cluster.sim.run_for(Duration::from_secs(10));
    let (sent, messages) = (cluster.sim.sent() - sent, cluster.stats(0, 1).messages_sent - messages);
    // Besides, the other one asks for the time now and then.
    assert!(
        (95..=107).contains(&messages),
        "{messages} pings and answers in 100 intervals"
    );
    assert!(sent <= 4 * messages, "{sent} datagrams for {messages} pings");
    assert_eq!(cluster.stats(0, 1).suspicions, 0);
    assert!(cluster.stats(0, 1).round_trip_us >= 100);
    assert_eq!(cluster.peers(0, 0).clock_offset_ms(2), Some(0));
    assert_eq!(cluster.peers(1, 0).directory(1), Some(1 << 64));
}

#[test]
fn bad_weather_raises_no_suspicion_and_loses_no_call() {
    for seed in 0..5 {
        let weather = Weather {
            loss_per_mille: 50,
            delay: Duration::from_millis(2),
            jitter: Duration::from_millis(8),
            steering: seed % 2 == 0,
            ..Weather::default()
        };
        let mut cluster = Cluster::with(seed, &vec![setup(3, 2); 3], weather);
        cluster.settle();
        for round in 0..20_u32 {
            let calls: Vec<(usize, Call)> = (0..3)
                .flat_map(|from| (0..3).filter(move |&to| to != from).map(move |to| (from, to)))
                .map(|(from, to)| {
                    let call = cluster.begin(from, to, ECHO, round.to_le_bytes().to_vec(), Duration::from_secs(10));
                    (from, call)
                })
                .collect();
            for (from, call) in calls {
                assert_eq!(cluster.end(from, call).unwrap(), &round.to_le_bytes()[..]);
            }
        }
        for (node, other) in [(0, 1), (1, 2), (2, 0)] {
            assert_eq!(cluster.stats(node, other).suspicions, 0, "seed {seed}");
        }
    }
}

#[test]
fn a_seed_is_a_run() {
    let run = || {
        let weather = Weather {
            loss_per_mille: 30,
            jitter: Duration::from_millis(1),
            ..Weather::default()
        };
        let mut cluster = Cluster::with(77, &vec![setup(3, 2); 3], weather);
        cluster.settle();
        cluster.sim.kill(2, Kill::Process);
        cluster.sim.run_for(Duration::from_secs(2));
        cluster.restart(2);
        cluster.settle();
        assert!(cluster.call(0, 2, ECHO, "x").is_ok());
        (cluster.sim.trace(), cluster.sim.elapsed())
    };
    assert_eq!(run(), run());
}
