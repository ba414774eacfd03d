//! A cluster whose nodes may die during a run: operations go on to whoever serves their keys now.
//!
//! Every other target ends the run with its first lost connection, which is right where nothing is meant to die. Here a node is
//! a target of its own; what is lost with it, or unanswered for [`TIMEOUT`], fails, and the cluster is asked for its layout until
//! the keys have a server again. What each system needs for that is a [`Cluster`]: how to ask one node for the layout, and how
//! to connect to one node alone. Operations are never sent twice.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use generation_proto::slot::slot_of;
use slab::Slab;

use super::{Completion, Connector, Failure, Outcome, Request, Target, TargetError, Token};

/// An operation unanswered for so long is given up, as an application's client would.
pub const TIMEOUT: Duration = Duration::from_secs(1);
/// How often a node is asked for the layout while something is wrong.
const REFRESH: Duration = Duration::from_millis(20);

/// Slots of a cluster; the same number in Generation and in Redis.
pub const SLOTS: usize = generation_proto::limits::SLOTS as usize;

/// One core of one node (core 0 where a node has one address for all its cores).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The node's address.
    pub addr: SocketAddr,
    /// The core.
    pub core: u16,
}

/// Who serves which slot, as one node sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Grows with every change, where the system has such a number; a layout with a smaller one is out of date.
    pub version: u64,
    /// The places that serve.
    pub places: Vec<Place>,
    /// Index into `places` for each slot; `None` for slots that nobody serves.
    pub owner: Vec<Option<u16>>,
}

impl Layout {
    /// Slots served by the place.
    pub fn slots_of(&self, place: Place) -> usize {
        let index = self.places.iter().position(|known| *known == place);
        self.owner
            .iter()
            .filter(|owner| owner.map(usize::from) == index && index.is_some())
            .count()
    }
}

/// What a system must tell about itself so that a run survives its nodes.
pub trait Cluster: Send + Sync {
    /// Name for reports.
    fn name(&self) -> String;

    /// Addresses of all nodes.
    fn nodes(&self) -> Vec<SocketAddr>;

    /// Asks one node for the layout; may block for some seconds.
    fn layout(&self, node: SocketAddr) -> Result<Layout, TargetError>;

    /// Connects to one place alone; may block for some seconds.
    fn connect_to(&self, place: Place, connections: usize) -> Result<Box<dyn Target>, TargetError>;
}

/// Connects to a cluster in the way this module describes.
pub struct ClusterConnector {
    /// The cluster.
    pub cluster: Arc<dyn Cluster>,
}

impl Connector for ClusterConnector {
    fn name(&self) -> String {
        self.cluster.name()
    }

    fn connect(&self, connections: usize) -> Result<Box<dyn Target>, TargetError> {
        let nodes = self.cluster.nodes();
        let mut last = TargetError::Settings(format!("{} has no nodes", self.name()));
        for node in &nodes {
            let layout = match self.cluster.layout(*node) {
                Ok(layout) => layout,
                Err(error) => {
                    last = error;
                    continue;
                }
            };
            let mut members = Vec::new();
            for place in &layout.places {
                members.push(Member {
                    place: *place,
                    target: Some(self.cluster.connect_to(*place, connections)?),
                });
            }
            let scouts = Scouts::start(&self.cluster, &nodes, connections);
            return Ok(Box::new(ClusterTarget::new(layout, members, connections, scouts)));
        }
        Err(last)
    }
}

struct Member {
    place: Place,
    /// Absent from its loss until a scout has reached it again.
    target: Option<Box<dyn Target>>,
}

/// An operation under way, by the token that its member knows it by.
struct Under {
    /// The engine's token; `None` once it was given up. The entry stays until the member answers or goes, so that no late reply
    /// is taken for that of another operation.
    token: Option<Token>,
    connection: usize,
    member: usize,
    serial: u64,
}

/// What scouts have found.
enum News {
    Layout(Layout),
    Opened(Place, Box<dyn Target>),
}

/// A thread a node that asks it for the layout while something is wrong, and connects to places that have no connection.
struct Scouts {
    wanted: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
    missing: Arc<Mutex<Vec<Place>>>,
    news: Receiver<News>,
}

impl Scouts {
    fn start(cluster: &Arc<dyn Cluster>, nodes: &[SocketAddr], connections: usize) -> Self {
        let (wanted, over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let missing = Arc::new(Mutex::new(Vec::new()));
        let (out, news) = channel();
        for node in nodes.iter().copied() {
            let scout = Scout {
                cluster: Arc::clone(cluster),
                node,
                connections,
                wanted: Arc::clone(&wanted),
                over: Arc::clone(&over),
                missing: Arc::clone(&missing),
                out: out.clone(),
            };
            std::thread::spawn(move || scout.run());
        }
        Self {
            wanted,
            over,
            missing,
            news,
        }
    }
}

impl Drop for Scouts {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

struct Scout {
    cluster: Arc<dyn Cluster>,
    node: SocketAddr,
    connections: usize,
    wanted: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
    missing: Arc<Mutex<Vec<Place>>>,
    out: Sender<News>,
}

impl Scout {
    /// Ends when the target is gone.
    fn run(self) {
        while !self.over.load(Ordering::Relaxed) {
            std::thread::sleep(REFRESH);
            if !self.wanted.load(Ordering::Relaxed) {
                continue;
            }
            // The node may be the dead one; its own scout tells.
            if let Ok(layout) = self.cluster.layout(self.node)
                && self.out.send(News::Layout(layout)).is_err()
            {
                return;
            }
            let place = self
                .missing
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .iter()
                .copied()
                .find(|place| place.addr == self.node);
            if let Some(place) = place
                && let Ok(target) = self.cluster.connect_to(place, self.connections)
                && self.out.send(News::Opened(place, target)).is_err()
            {
                return;
            }
        }
    }
}

struct ClusterTarget {
    layout: Layout,
    members: Vec<Member>,
    connections: usize,
    scouts: Scouts,
    under: Slab<Under>,
    /// Tokens in the order of their sending, for time-outs.
    sent: VecDeque<(usize, u64, Instant)>,
    serial: u64,
    /// Failed before they were sent.
    ended: Vec<Completion>,
    arrived: Vec<Completion>,
    /// Until when the layout is asked for: some time after the last failure.
    trouble_until: Option<Instant>,
}

impl ClusterTarget {
    fn new(layout: Layout, members: Vec<Member>, connections: usize, scouts: Scouts) -> Self {
        Self {
            layout,
            members,
            connections,
            scouts,
            under: Slab::new(),
            sent: VecDeque::new(),
            serial: 0,
            ended: Vec::new(),
            arrived: Vec::new(),
            trouble_until: None,
        }
    }

    /// Asks for the layout from now on until all has been well for as long as an operation may take.
    fn trouble(&mut self) {
        self.trouble_until = Some(Instant::now() + TIMEOUT);
        self.scouts.wanted.store(true, Ordering::Relaxed);
    }

    fn member_of(&self, key: &[u8]) -> Option<usize> {
        let owner = self.layout.owner.get(usize::from(slot_of(key))).copied().flatten()?;
        let place = self.layout.places.get(usize::from(owner))?;
        self.members.iter().position(|member| member.place == *place)
    }

    /// Fails everything that was under way on a member and forgets its connections.
    fn lose(&mut self, lost: usize) {
        self.members[lost].target = None;
        let gone: Vec<usize> = self
            .under
            .iter()
            .filter(|(_, under)| under.member == lost)
            .map(|(inner, _)| inner)
            .collect();
        for inner in gone {
            let under = self.under.remove(inner);
            if let Some(token) = under.token {
                self.ended.push(Completion {
                    token,
                    connection: under.connection,
                    outcome: Outcome::Failed(Failure::ConnectionLost),
                });
            }
        }
        self.publish_missing();
        self.trouble();
    }

    fn publish_missing(&self) {
        let missing = self
            .members
            .iter()
            .filter(|member| member.target.is_none())
            .map(|member| member.place)
            .collect();
        *self.scouts.missing.lock().unwrap_or_else(PoisonError::into_inner) = missing;
    }

    /// Slots whose place has no connection.
    fn unserved(&self, layout: &Layout) -> usize {
        let live = |place: &Place| {
            self.members
                .iter()
                .any(|member| member.place == *place && member.target.is_some())
        };
        let live: Vec<bool> = layout.places.iter().map(live).collect();
        layout
            .owner
            .iter()
            .filter(|owner| !owner.is_some_and(|owner| live.get(usize::from(owner)) == Some(&true)))
            .count()
    }

    /// Takes what the scouts have found.
    fn learn(&mut self) {
        while let Ok(news) = self.scouts.news.try_recv() {
            match news {
                News::Opened(place, target) => {
                    if let Some(member) = self.members.iter_mut().find(|member| member.place == place)
                        && member.target.is_none()
                    {
                        member.target = Some(target);
                        self.publish_missing();
                    }
                }
                News::Layout(layout) => {
                    for place in &layout.places {
                        if !self.members.iter().any(|member| member.place == *place) {
                            self.members.push(Member {
                                place: *place,
                                target: None,
                            });
                            self.publish_missing();
                        }
                    }
                    // Nodes learn of a change one after the other. Where layouts carry no number, one that sends more keys to
                    // the dead than the present one is the older.
                    let newer = layout.version > self.layout.version
                        || layout.version == self.layout.version
                            && self.unserved(&layout) <= self.unserved(&self.layout);
                    if newer {
                        self.layout = layout;
                    }
                }
            }
        }
    }

    /// Gives up what has waited too long.
    fn time_out(&mut self, now: Instant) {
        while let Some((inner, serial, at)) = self.sent.front().copied() {
            if now.saturating_duration_since(at) < TIMEOUT {
                break;
            }
            self.sent.pop_front();
            let Some(under) = self.under.get_mut(inner).filter(|under| under.serial == serial) else {
                continue;
            };
            if let Some(token) = under.token.take() {
                self.ended.push(Completion {
                    token,
                    connection: under.connection,
                    outcome: Outcome::Failed(Failure::Unanswered),
                });
                self.trouble();
            }
        }
    }
}

impl Target for ClusterTarget {
    fn connections(&self) -> usize {
        self.connections
    }

    fn submit(&mut self, connection: usize, token: Token, request: &Request<'_>) -> Result<(), TargetError> {
        let key = match *request {
            Request::Get { key, .. }
            | Request::Put { key, .. }
            | Request::PutIfVersion { key, .. }
            | Request::Incr { key } => key,
            Request::MultiGet { keys, key_len } => &keys[..key_len],
        };
        let Some(member) = self
            .member_of(key)
            .filter(|member| self.members[*member].target.is_some())
        else {
            self.ended.push(Completion {
                token,
                connection,
                outcome: Outcome::Failed(Failure::Unavailable),
            });
            self.trouble();
            return Ok(());
        };
        self.serial += 1;
        let inner = self.under.insert(Under {
            token: Some(token),
            connection,
            member,
            serial: self.serial,
        });
        self.sent.push_back((inner, self.serial, Instant::now()));
        let Some(target) = &mut self.members[member].target else {
            return Ok(());
        };
        match target.submit(connection, inner as Token, request) {
            Err(unsupported @ TargetError::Unsupported { .. }) => Err(unsupported),
            Err(_) => {
                self.lose(member);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn flush(&mut self) -> Result<(), TargetError> {
        for index in 0..self.members.len() {
            if let Some(target) = &mut self.members[index].target
                && target.flush().is_err()
            {
                self.lose(index);
            }
        }
        Ok(())
    }

    fn poll(&mut self, wait: Duration, completions: &mut Vec<Completion>) -> Result<(), TargetError> {
        let now = Instant::now();
        self.learn();
        self.time_out(now);
        if self.trouble_until.is_some_and(|until| now > until) {
            self.trouble_until = None;
            self.scouts.wanted.store(false, Ordering::Relaxed);
        }
        // Each member has a readiness loop of its own, so they share the wait.
        let wait = if self.ended.is_empty() {
            wait / self.members.len().max(1) as u32
        } else {
            Duration::ZERO
        };
        for index in 0..self.members.len() {
            let Some(target) = &mut self.members[index].target else {
                continue;
            };
            let polled = target.poll(wait, &mut self.arrived);
            for completion in std::mem::take(&mut self.arrived) {
                let Some(under) = self.under.try_remove(completion.token as usize) else {
                    continue;
                };
                if matches!(completion.outcome, Outcome::Failed(_)) {
                    self.trouble();
                }
                if let Some(token) = under.token {
                    completions.push(Completion {
                        token,
                        connection: under.connection,
                        outcome: completion.outcome,
                    });
                }
            }
            if polled.is_err() {
                self.lose(index);
            }
        }
        completions.append(&mut self.ended);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two nodes; the first can be killed, and the second takes its slots over when it is told to.
    #[derive(Default)]
    struct Fake {
        dead: AtomicBool,
        taken_over: AtomicBool,
        mute: Arc<AtomicBool>,
    }

    fn place(port: u16) -> Place {
        Place {
            addr: ([127, 0, 0, 1], port).into(),
            core: 0,
        }
    }

    struct FakeNode {
        dead: Option<Arc<Fake>>,
        mute: Arc<AtomicBool>,
        pending: Vec<Completion>,
    }

    impl Target for FakeNode {
        fn connections(&self) -> usize {
            1
        }
        fn submit(&mut self, connection: usize, token: Token, _: &Request<'_>) -> Result<(), TargetError> {
            self.pending.push(Completion {
                token,
                connection,
                outcome: Outcome::Stored,
            });
            Ok(())
        }
        fn flush(&mut self) -> Result<(), TargetError> {
            Ok(())
        }
        fn poll(&mut self, _: Duration, completions: &mut Vec<Completion>) -> Result<(), TargetError> {
            if self.dead.as_ref().is_some_and(|fake| fake.dead.load(Ordering::Relaxed)) {
                return Err(TargetError::Settings("dead".to_owned()));
            }
            if !self.mute.load(Ordering::Relaxed) {
                completions.append(&mut self.pending);
            }
            Ok(())
        }
    }

    struct FakeCluster(Arc<Fake>);

    impl Cluster for FakeCluster {
        fn name(&self) -> String {
            "fake".to_owned()
        }
        fn nodes(&self) -> Vec<SocketAddr> {
            vec![place(1).addr, place(2).addr]
        }
        fn layout(&self, node: SocketAddr) -> Result<Layout, TargetError> {
            if node == place(1).addr && self.0.dead.load(Ordering::Relaxed) {
                return Err(TargetError::Settings("dead".to_owned()));
            }
            let first = u16::from(self.0.taken_over.load(Ordering::Relaxed));
            let owner = (0..SLOTS).map(|slot| Some(if slot < SLOTS / 2 { first } else { 1 }));
            Ok(Layout {
                version: 0,
                places: vec![place(1), place(2)],
                owner: owner.collect(),
            })
        }
        fn connect_to(&self, at: Place, _: usize) -> Result<Box<dyn Target>, TargetError> {
            Ok(Box::new(FakeNode {
                dead: (at == place(1)).then(|| Arc::clone(&self.0)),
                mute: Arc::clone(&self.0.mute),
                pending: Vec::new(),
            }))
        }
    }

    fn ask(target: &mut dyn Target, token: Token, key: &[u8]) -> Outcome {
        let request = Request::Put {
            key,
            value: b"",
            ttl_ms: 0,
        };
        target.submit(0, token, &request).unwrap();
        let mut completions = Vec::new();
        while completions.is_empty() {
            target.flush().unwrap();
            target.poll(Duration::from_millis(1), &mut completions).unwrap();
        }
        assert_eq!((completions.len(), completions[0].token), (1, token));
        completions[0].outcome
    }

    /// A key in the first half of the slots.
    fn key_of_the_first() -> Vec<u8> {
        (0..1_000)
            .map(|i: u32| i.to_string().into_bytes())
            .find(|key| usize::from(slot_of(key)) < SLOTS / 2)
            .unwrap()
    }

    #[test]
    fn operations_fail_while_their_node_is_dead_and_go_on_with_its_heir() {
        let fake = Arc::new(Fake::default());
        let connector = ClusterConnector {
            cluster: Arc::new(FakeCluster(Arc::clone(&fake))),
        };
        let mut target = connector.connect(1).unwrap();
        let key = key_of_the_first();
        assert_eq!(ask(&mut *target, 7, &key), Outcome::Stored);
        fake.dead.store(true, Ordering::Relaxed);
        assert_eq!(ask(&mut *target, 8, &key), Outcome::Failed(Failure::ConnectionLost));
        assert_eq!(ask(&mut *target, 9, &key), Outcome::Failed(Failure::Unavailable));
        fake.taken_over.store(true, Ordering::Relaxed);
        // The scouts bring the news; until then operations fail without being sent.
        let mut token = 10;
        while ask(&mut *target, token, &key) != Outcome::Stored {
            token += 1;
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_late_reply_is_not_that_of_another_operation() {
        let fake = Arc::new(Fake::default());
        let connector = ClusterConnector {
            cluster: Arc::new(FakeCluster(Arc::clone(&fake))),
        };
        let mut target = connector.connect(1).unwrap();
        let key = key_of_the_first();
        fake.mute.store(true, Ordering::Relaxed);
        assert_eq!(ask(&mut *target, 1, &key), Outcome::Failed(Failure::Unanswered));
        fake.mute.store(false, Ordering::Relaxed);
        // The reply to the first comes now as well, and is nobody's.
        assert_eq!(ask(&mut *target, 1, &key), Outcome::Stored);
        let mut late = Vec::new();
        target.poll(Duration::from_millis(1), &mut late).unwrap();
        assert!(late.is_empty(), "{late:?}");
    }

    #[test]
    fn slots_are_counted_by_place() {
        let layout = FakeCluster(Arc::default()).layout(place(2).addr).unwrap();
        assert_eq!(layout.slots_of(place(1)), SLOTS / 2);
        assert_eq!(layout.slots_of(place(3)), 0);
    }
}
