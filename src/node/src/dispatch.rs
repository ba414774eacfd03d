//! From requests to shards and back: the only translator between the protocol and the engine.
//!
//! A turn's requests are decoded and sorted by shard first. Then each shard executes its writes as one log entry, its reads as
//! one batched lookup, and its pages. Writes go first, so a read sees every write that arrived with it; all of them were under
//! way at the same time, so any order is linearizable.
//!
//! Nothing here waits: a request is answered, forwarded to the core that owns its shard, or put off, and then forgotten.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use generation_engine::session::{self, SessionWrite};
use generation_engine::{Command, Condition, Progress, Shard, Version, batch};
use generation_proto::cluster::Verb;
use generation_proto::limits::SESSION_WINDOW;
use generation_proto::map::{Map, Node, NodeState, Replica as MapReplica, Shard as MapShard};
use generation_proto::reply::HelloReply;
use generation_proto::request::{Hello, Scan, ShardSession, put_parts};
use generation_proto::{
    Condition as WireCondition, Consistency, Frame, Limits, MAJOR, MINOR, Opcode, Operation, ReplyOptions, Request,
    Session, SlotTable, Status, close_code,
};
use generation_quic::ConnectionKey;

use crate::config::{CoreConfig, NodeLimits};
use crate::controller::report::Led;
use crate::controller::{Answer, Controller};
use crate::env::CoreId;
use crate::env::disk::Disk;
use crate::group::{Common, Group, Hints, News, Read, What};
use crate::mesh::ShardView;
use crate::peers::Peers;
use crate::replica::Replica;
use crate::replies::{Origin, Replies};
use crate::stats::{self, NodeStats};
use crate::streams::{HEAVY, StreamRef, Streams, is_heavy};
use crate::view::View;

const _: () = assert!(
    SESSION_WINDOW == session::SESSION_WINDOW,
    "clients fill the window that the table keeps"
);

/// Where a request came from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Source {
    Stream(StreamRef),
    Mesh { core: CoreId, ticket: u32 },
}

/// A request that has been read and not decoded.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) source: Source,
    /// When it arrived, or earlier: deadlines run from here.
    pub(crate) arrival: Instant,
    /// The deadline, where another core has worked it out already.
    pub(crate) deadline: Option<Instant>,
    pub(crate) frame: Frame,
}

/// When a turn takes place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    pub(crate) now: Instant,
    /// The wall clock.
    pub(crate) now_ms: u64,
    /// Whether new requests are refused because the node is stopping.
    pub(crate) stopping: bool,
}

/// A connection to be closed once its last reply is out.
#[derive(Debug)]
pub(crate) struct Closing {
    pub(crate) connection: ConnectionKey,
    pub(crate) code: u32,
    pub(crate) reason: String,
}

impl Closing {
    /// The same when requests are left unanswered or replies unacknowledged: it must not promise that all is done.
    pub(crate) fn unfinished(mut self) -> Self {
        if self.code == close_code::SHUTTING_DOWN {
            self.code = close_code::STOPPED;
            "the node has stopped before all was answered".clone_into(&mut self.reason);
        }
        self
    }
}

/// What one turn's requests ask of one shard.
#[derive(Debug, Default)]
pub(crate) struct Batch<'t> {
    pub(crate) keys: Vec<&'t [u8]>,
    /// The hash of each key.
    pub(crate) hashes: Vec<u64>,
    pub(crate) readers: Vec<Reader>,
    pub(crate) writes: Vec<(Origin, Command<'t>)>,
    /// The hash of each of them, of a shard that is alone: one with a group writes when it is applied.
    pub(crate) write_hashes: Vec<u64>,
    /// Writes in sessions, and what opens and ends sessions, in the order they came in.
    pub(crate) in_sessions: Vec<(Origin, batch::Operation<'t>)>,
    pub(crate) pages: Vec<(Reader, bool, Scan<'t>)>,
    /// Of a shard with a group, reads that are content with less than the newest, or have a deadline.
    pub(crate) lax: Vec<Read>,
}

/// Who reads, and by which request of the turn.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reader {
    pub(crate) origin: Origin,
    pub(crate) incoming: u32,
    /// Code of the consistency asked for.
    pub(crate) consistency: u8,
}

impl Batch<'_> {
    /// The same memory, for another turn.
    fn recycle<'b>(self) -> Batch<'b> {
        Batch {
            keys: recycle(self.keys, |_| -> &'b [u8] { &[] }),
            hashes: self.hashes,
            readers: self.readers,
            writes: recycle(self.writes, |(origin, _)| {
                (
                    origin,
                    Command::Delete {
                        key: &[],
                        condition: Condition::None,
                    },
                )
            }),
            write_hashes: self.write_hashes,
            in_sessions: recycle(self.in_sessions, |(origin, _)| {
                (origin, batch::Operation::CloseSession { session: 0 })
            }),
            pages: recycle(self.pages, |(reader, values, scan)| {
                (reader, values, Scan { prefix: &[], ..scan })
            }),
            lax: self.lax,
        }
    }
}

/// Empties a vector and gives its memory another element type: collecting in place does not allocate when the sizes agree.
fn recycle<A, B>(mut vec: Vec<A>, never: impl FnMut(A) -> B) -> Vec<B> {
    vec.clear();
    vec.into_iter().map(never).collect()
}

/// A shard as this core knows it.
#[derive(Debug)]
pub(crate) enum Member<D: Disk> {
    /// It belongs to another core.
    Elsewhere,
    /// It is here alone: the node is not replicated and keeps nothing.
    Alone(Box<Replica<Origin>>),
    /// It has a replica of a group here.
    Group(Box<Group<D>>),
}

impl<D: Disk> Member<D> {
    pub(crate) fn group(&self) -> Option<&Group<D>> {
        match self {
            Self::Group(group) => Some(group),
            Self::Alone(_) | Self::Elsewhere => None,
        }
    }

    /// Works with the state, where there is one.
    fn with<T>(&mut self, work: impl FnOnce(&mut Shard) -> T) -> Option<T> {
        match self {
            Self::Elsewhere => None,
            Self::Alone(replica) => Some(work(replica.shard_mut())),
            Self::Group(group) => {
                let replica = group.replica()?;
                Some(replica.machine().with(|machine| work(machine.shard_mut())))
            }
        }
    }
}

pub(crate) struct Dispatch<D: Disk> {
    pub(crate) core: CoreId,
    cores: CoreId,
    cluster: String,
    software: String,
    node: u64,
    epoch: u32,
    pub(crate) limits: Limits,
    pub(crate) node_limits: NodeLimits,
    table: SlotTable,
    /// By shard.
    pub(crate) members: Vec<Member<D>>,
    /// Which groups have news; `None` without groups.
    pub(crate) news: Option<Rc<News>>,
    pub(crate) newsworthy: Vec<u16>,
    /// The map, with what the other cores have said of their shards.
    map: Map,
    /// By shard: what is to be known of it where this node leads it.
    led: Vec<Option<Led>>,
    hints: Option<Hints>,
    controller: Option<Rc<Controller<D>>>,
    /// Whether the nodes are as the controller's records say.
    is_managed: bool,
    /// What was said to administrators, and how many wait.
    said: Rc<RefCell<Vec<(Origin, Answer)>>>,
    asking: usize,
    /// What the turn asks of each shard, and which shards it asks at all.
    batches: Vec<Batch<'static>>,
    busy_shards: Vec<u16>,
    pub(crate) page: BytesMut,
    /// Reads that met an entry past its time: place in the batch, version.
    pub(crate) late: Vec<(usize, Version)>,
    pub(crate) put_off: Vec<u32>,
    /// Requests that had arrived at the last sweep.
    requests_swept: u64,
    pub(crate) stats: NodeStats,
    peers: Peers,
}

impl<D: Disk> Dispatch<D> {
    /// `groups`: what this core's groups have in common, if the node is replicated.
    pub(crate) fn new(
        config: &CoreConfig,
        core: CoreId,
        cores: CoreId,
        peers: Peers,
        groups: Option<&Common<D>>,
    ) -> Self {
        let map = first_map(config, cores);
        let table = SlotTable::new(&map.ranges, map.shards.len()).expect("invariant: even ranges cover every slot");
        let member = |shard| match groups {
            _ if owner(shard, cores) != core => Member::Elsewhere,
            None => Member::Alone(Box::new(Replica::new(config.shard, config.node_limits.sessions()))),
            Some(common) => Member::Group(Box::new(Group::new(shard, common))),
        };
        Self {
            core,
            cores,
            cluster: config.cluster.clone(),
            software: config.software.clone(),
            node: config.node,
            epoch: config.epoch,
            limits: config.limits,
            node_limits: config.node_limits.clone(),
            table,
            members: (0..config.shards).map(member).collect(),
            news: groups.map(|common| Rc::clone(&common.news)),
            newsworthy: Vec::new(),
            map,
            led: vec![None; usize::from(config.shards)],
            hints: groups.map(|common| Rc::clone(&common.hints)),
            controller: groups.and_then(|common| common.controller.clone()),
            is_managed: groups.is_some_and(|common| common.views.with(|view| view.managed)),
            said: Rc::default(),
            asking: 0,
            batches: (0..config.shards).map(|_| Batch::default()).collect(),
            busy_shards: Vec::new(),
            page: BytesMut::new(),
            late: Vec::new(),
            put_off: Vec::new(),
            requests_swept: 0,
            stats: NodeStats::default(),
            peers,
        }
    }

    /// Executes one turn's requests, and answers those of earlier turns of which there is news.
    pub(crate) fn turn(
        &mut self,
        moment: Moment,
        incoming: &[Incoming],
        streams: &mut Streams,
        replies: &mut Replies,
        closing: &mut Vec<Closing>,
    ) {
        replies.server_time_ms = moment.now_ms;
        let mut turn = Turn {
            dispatch: self,
            moment,
            incoming,
            batches: Vec::new(),
            admitted: None,
            streams,
            replies,
            closing,
        };
        let batches = std::mem::take(&mut turn.dispatch.batches);
        turn.batches = batches;
        turn.news();
        turn.say_to_administrators();
        for (place, request) in incoming.iter().enumerate() {
            turn.route(place as u32, request);
        }
        let mut shards = std::mem::take(&mut turn.dispatch.busy_shards);
        turn.fetch_ahead(&shards);
        for shard in shards.drain(..) {
            turn.execute(shard);
        }
        let Turn {
            batches,
            dispatch,
            streams,
            ..
        } = turn;
        dispatch.busy_shards = shards;
        dispatch.batches = batches.into_iter().map(Batch::recycle).collect();
        // What is put off comes before what has been waiting behind it.
        for place in dispatch.put_off.drain(..).rev() {
            let request = &incoming[place as usize];
            let Source::Stream(stream) = request.source else {
                continue;
            };
            if let Some(stream) = streams.get(stream) {
                stream.deferred.push_front((request.frame.clone(), request.arrival));
            }
        }
    }

    /// Whether requests of earlier turns may be answered now.
    pub(crate) fn has_news(&self) -> bool {
        let news = self.news.as_ref();
        news.is_some_and(|news| !news.is_empty() || self.groups().any(|group| !group.unserved.is_empty()))
            || !self.said.borrow().is_empty()
    }

    fn groups(&self) -> impl Iterator<Item = &Group<D>> {
        self.members.iter().filter_map(Member::group)
    }

    /// Whether nothing waits for a group.
    pub(crate) fn is_idle(&self) -> bool {
        self.asking == 0 && self.groups().all(Group::is_idle)
    }

    /// When something that waits for a group is to be given up, at the latest.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.groups().filter_map(Group::next_deadline).min()
    }

    /// Looks at every group that waits for something that may be over by now.
    pub(crate) fn expire(&self, now: Instant) {
        for group in self.groups() {
            if group.next_deadline().is_some_and(|deadline| deadline <= now) {
                group.come_back();
            }
        }
    }

    /// Hands leaderships over that other nodes should have.
    pub(crate) fn tend_leaderships(&mut self, now: Instant) {
        for member in &mut self.members {
            if let Member::Group(group) = member {
                group.tend_leadership(now);
            }
        }
    }

    /// What has changed about this core's shards, for the other cores and for the map.
    pub(crate) fn look(&mut self) -> Vec<ShardView> {
        let mut changed = Vec::new();
        for (number, member) in self.members.iter().enumerate() {
            let Member::Group(group) = member else { continue };
            let Some(shard) = group.view() else { continue };
            let led = if self.is_managed { group.led() } else { None };
            if self.map.shards[number] != shard || self.led[number] != led {
                self.map.shards[number].clone_from(&shard);
                self.led[number].clone_from(&led);
                let number = number as u16;
                changed.push(ShardView { number, shard, led });
            }
        }
        changed
    }

    /// The shards that this node leads.
    pub(crate) fn led(&self) -> Vec<Led> {
        self.led.iter().flatten().cloned().collect()
    }

    /// Takes in who leads shards on other nodes, as these say.
    pub(crate) fn set_hints(&self, hints: &[(u16, u64, u64)]) {
        let Some(known) = &self.hints else { return };
        let mut known = known.borrow_mut();
        known.clear();
        for (shard, term, node) in hints {
            let newest = known.entry(*shard).or_default();
            *newest = (*newest).max((*term, *node));
        }
    }

    /// Takes in which nodes there are.
    pub(crate) fn set_view(&mut self, view: &View) {
        let nodes = view.members.iter().map(|(id, member)| Node {
            id: *id,
            addr: member.addr,
            cores: member.cores,
            state: if member.may_lead {
                NodeState::Up
            } else {
                NodeState::Draining
            },
        });
        if !view.members.is_empty() {
            // Until it belongs to a cluster, a node knows itself.
            self.map.nodes = nodes.collect();
        }
        self.map.epoch = view.epoch;
    }

    /// The map, with what is known now.
    fn newest_map(&mut self) -> Map {
        // What this core sees it sees at once.
        self.look();
        let mut map = self.map.clone();
        for node in &mut map.nodes {
            if node.id != self.node && self.is_managed && !self.peers.is_alive(node.id) {
                node.state = NodeState::Down;
            }
        }
        map
    }

    /// Takes in what another core says of its shards.
    pub(crate) fn told(&mut self, views: Vec<ShardView>) {
        for ShardView { number, shard, led } in views {
            let place = usize::from(number);
            self.map.shards[place] = shard;
            self.led[place] = led;
        }
    }

    /// A bounded step of the expiry sweep over this core's shards, and of what the engine does when it is idle.
    pub(crate) fn sweep(&mut self, now: Instant, now_ms: u64) {
        const LEAST: u64 = 256;
        const MOST: u64 = 16_384;
        let steps = self.node_limits.sweep_steps.max(1);
        for member in &mut self.members {
            let Some(records) = member.with(|shard| shard.stats().records) else {
                continue;
            };
            let step = (records / steps).clamp(LEAST, MOST) as usize;
            match member {
                Member::Elsewhere => {}
                Member::Alone(replica) => replica.sweep(now_ms, step),
                Member::Group(group) => {
                    let wake = group.wake();
                    if let Some(replica) = group.replica() {
                        group.proposer.sweep(&replica, now, now_ms, step, &wake);
                    }
                }
            }
        }
        if std::mem::replace(&mut self.requests_swept, self.stats.requests) == self.stats.requests {
            // Nobody has asked for anything since the last sweep: a step that nobody waits for, on the first shard that has one.
            for member in &mut self.members {
                if member.with(Shard::tidy) == Some(Progress::More) {
                    break;
                }
            }
        }
    }

    /// Appends this core's counters.
    fn encode_stats(&mut self, out: &mut BytesMut) {
        self.stats.log_entries = self
            .members
            .iter()
            .map(|member| match member {
                Member::Elsewhere => 0,
                Member::Alone(replica) => replica.entries(),
                Member::Group(group) => group.replica().map_or(0, |replica| replica.machine().entries()),
            })
            .sum();
        stats::encode_core(self.core, &self.stats, out);
        if let Some(flags) = self.groups().next().map(Group::flags) {
            stats::encode_flags(self.core, flags, out);
        }
        for (number, member) in self.members.iter_mut().enumerate() {
            let number = number as u16;
            if let Member::Group(group) = member {
                group.encode_stats(out);
            }
            let hash = match member {
                Member::Group(group) => group.replica().map(|replica| replica.status().state_hash),
                Member::Alone(_) | Member::Elsewhere => None,
            };
            let core = self.core;
            member.with(|shard| {
                let hash = hash.unwrap_or_else(|| shard.state_hash());
                stats::encode_shard(number, shard, core, hash, out);
            });
        }
        self.peers.encode_stats(self.core, out);
    }
}

/// The core that owns a shard.
pub(crate) fn owner(shard: u16, cores: CoreId) -> CoreId {
    shard % cores
}

/// The map before anything is known of leaders.
fn first_map(config: &CoreConfig, cores: CoreId) -> Map {
    let own = Node {
        id: config.node,
        addr: config.addr,
        cores,
        state: NodeState::Up,
    };
    let others = config.peers.nodes.iter().map(|node| Node {
        id: node.id,
        addr: node.addr,
        cores: node.cores,
        state: NodeState::Up,
    });
    let alone = config.replication.is_none();
    let mut nodes: Vec<Node> = if alone {
        vec![own]
    } else {
        others.chain([own]).collect()
    };
    nodes.sort_by_key(|node| node.id);
    let shard = |shard| MapShard {
        epoch: config.epoch,
        term: u64::from(alone),
        leader: if alone { config.node } else { 0 },
        replicas: if alone {
            vec![MapReplica {
                id: 1,
                node: config.node,
                core: owner(shard, cores),
            }]
        } else {
            Vec::new()
        },
    };
    Map {
        epoch: config.epoch,
        cluster: config.cluster.clone(),
        ranges: Map::even_ranges(config.shards),
        shards: (0..config.shards).map(shard).collect(),
        nodes,
    }
}

/// A request with all that its execution needs.
#[derive(Debug, Clone, Copy)]
struct Asked<'t> {
    /// Its place among the turn's requests.
    place: u32,
    incoming: &'t Incoming,
    request: Request<'t>,
    origin: Origin,
    /// From when on it is too late.
    deadline: Option<Instant>,
}

/// One turn: the batches borrow from the turn's requests.
pub(crate) struct Turn<'d, 't, D: Disk> {
    pub(crate) dispatch: &'d mut Dispatch<D>,
    pub(crate) moment: Moment,
    pub(crate) incoming: &'t [Incoming],
    pub(crate) batches: Vec<Batch<'t>>,
    /// The stream whose plain reads were last found fit for execution in this turn.
    admitted: Option<StreamRef>,
    pub(crate) streams: &'d mut Streams,
    pub(crate) replies: &'d mut Replies,
    closing: &'d mut Vec<Closing>,
}

impl<'t, D: Disk> Turn<'_, 't, D> {
    /// Decodes a request and gives it to whoever executes it.
    fn route(&mut self, place: u32, incoming: &'t Incoming) {
        let frame = &incoming.frame;
        let (id, opcode) = (frame.request_id, frame.opcode);
        let origin = match incoming.source {
            Source::Stream(stream) => Origin::Stream { stream, id, opcode },
            Source::Mesh { core, ticket } => Origin::Mesh {
                core,
                ticket,
                id,
                opcode,
            },
        };
        if frame.options_len == 0 && self.plain(place, incoming, origin) {
            return;
        }
        let request = match Request::decode(frame, &self.dispatch.limits) {
            Ok(request) => request,
            Err(error) => {
                self.dispatch.stats.requests_rejected += 1;
                if let (Source::Stream(stream), true) = (incoming.source, is_heavy(opcode))
                    && let Some(stream) = self.streams.get(stream)
                {
                    stream.heavy += 1;
                }
                return self
                    .replies
                    .refuse(self.streams, origin, error.status(), &error.to_string());
            }
        };
        let allowed = match incoming.source {
            Source::Stream(stream) => self.admit(place, stream, origin, &request),
            Source::Mesh { .. } => true,
        };
        if !allowed {
            return;
        }
        let own = request.options.deadline_ms;
        let own = own.map(|ms| incoming.arrival + Duration::from_millis(u64::from(ms)));
        let deadline = incoming.deadline.or(own);
        let asked = Asked {
            place,
            incoming,
            request,
            origin,
            deadline,
        };
        if let Some(key) = request.operation.key() {
            return self.single(&asked, key);
        }
        match request.operation {
            Operation::Ping { payload } => self.answer(origin, payload),
            Operation::Map => {
                let mut map = BytesMut::new();
                self.dispatch.newest_map().encode(&mut map);
                self.answer(origin, &map);
            }
            Operation::Cluster { verb, body } => self.cluster(&asked, verb, body),
            Operation::Stats => self.stats(incoming, origin),
            Operation::MultiGet(keys) => self.multi(&asked, keys.len(), keys.iter(), |_, _| None),
            Operation::MultiDelete(keys) => self.multi(&asked, keys.len(), keys.iter(), |_, key| {
                Some(Command::Delete {
                    key,
                    condition: Condition::None,
                })
            }),
            Operation::MultiPut(items) => {
                let condition = condition(request.options.condition);
                let mut rest = items.iter();
                let keys = items.iter().map(|item| item.key);
                self.multi(&asked, items.len(), keys, |now_ms, key| {
                    let item = rest.next()?;
                    let expires_at_ms = expires_at(now_ms, item.ttl_ms);
                    Some(Command::Put {
                        key,
                        value: item.value,
                        expires_at_ms,
                        condition,
                    })
                });
            }
            Operation::OpenSession(ShardSession { id: session, shard }) => {
                self.in_shard(&asked, shard, batch::Operation::OpenSession { session });
            }
            Operation::CloseSession(ShardSession { id: session, shard }) => {
                self.in_shard(&asked, shard, batch::Operation::CloseSession { session });
            }
            Operation::TakeSnapshot { shard } => self.at_owner(&asked, shard, |turn| turn.take_snapshot(shard, origin)),
            Operation::Keys(scan) => self.page(&asked, scan, false),
            Operation::Entries(scan) => self.page(&asked, scan, true),
            // Hello never leaves the core it arrived at, and operations with one key are above.
            _ => self.replies.refuse(
                self.streams,
                origin,
                Status::Internal,
                "an operation in the wrong place",
            ),
        }
    }

    /// The commonest requests by far, a `Get` or a `Put` without options of a shard of this core, without the detour over a
    /// [`Request`]. `false`: it is not that, or not for execution now, and nothing was done.
    #[inline]
    fn plain(&mut self, place: u32, incoming: &'t Incoming, origin: Origin) -> bool {
        const GET: u8 = Opcode::Get.code();
        const PUT: u8 = Opcode::Put.code();
        let payload = &incoming.frame.payload[..];
        let (key, value) = match incoming.frame.opcode {
            GET => (payload, None),
            PUT => match put_parts(payload) {
                Some((key, value)) => (key, Some(value)),
                None => return false,
            },
            _ => return false,
        };
        let limits = &self.dispatch.limits;
        if key.is_empty()
            || key.len() > limits.max_key_len
            || value.is_some_and(|value| value.len() > limits.max_value_len)
            || incoming.deadline.is_some()
        {
            return false;
        }
        if let Source::Stream(stream) = incoming.source
            && self.admitted != Some(stream)
        {
            // Requests of one stream come in runs; nothing that decides changes while they are routed.
            let Some(found) = self.streams.get(stream) else {
                return false;
            };
            let connection = found.connection;
            if found.output.len() > self.dispatch.node_limits.stream_reply_bytes
                || !self.streams.has_said_hello(connection)
                || self.moment.stopping
            {
                return false;
            }
            self.admitted = Some(stream);
        }
        let shard = self.dispatch.table.shard_of(key);
        if owner(shard, self.dispatch.cores) != self.dispatch.core {
            return false;
        }
        match value {
            None => {
                let reader = Reader {
                    origin,
                    incoming: place,
                    consistency: 0,
                };
                self.read_later(shard, key, reader);
            }
            Some(value) => {
                let command = Command::Put {
                    key,
                    value,
                    expires_at_ms: 0,
                    condition: Condition::None,
                };
                self.write_later(shard, origin, command);
            }
        }
        true
    }

    /// Decides whether a stream's request is executed now. If not, it has been answered, or put off.
    fn admit(&mut self, place: u32, stream: StreamRef, origin: Origin, request: &Request<'_>) -> bool {
        let Some(found) = self.streams.get(stream) else {
            return false;
        };
        let connection = found.connection;
        let is_heavy = is_heavy(request.operation.opcode().code());
        if found.output.len() > self.dispatch.node_limits.stream_reply_bytes || (is_heavy && found.heavy >= HEAVY) {
            self.dispatch.put_off.push(place);
            return false;
        }
        found.heavy += u32::from(is_heavy);
        if let Operation::Hello(hello) = &request.operation {
            self.hello(connection, origin, hello);
            return false;
        }
        let (status, message) = if !self.streams.has_said_hello(connection) {
            self.dispatch.stats.requests_rejected += 1;
            (Status::HelloRequired, "the first request on a connection is Hello")
        } else if self.moment.stopping {
            self.dispatch.stats.requests_shutting_down += 1;
            (Status::ShuttingDown, "the node is stopping")
        } else if request.operation.opcode().is_administrative() && !self.streams.is_admin(connection) {
            self.dispatch.stats.requests_rejected += 1;
            let message = "it takes the certificate of an administrator, which `generation certs admin` makes";
            (Status::PermissionDenied, message)
        } else {
            return true;
        };
        self.replies.refuse(self.streams, origin, status, message);
        false
    }

    /// A request with one key.
    fn single(&mut self, asked: &Asked<'t>, key: &'t [u8]) {
        let &Asked {
            place,
            incoming,
            request,
            origin,
            deadline,
        } = asked;
        let shard = self.dispatch.table.shard_of(key);
        let core = owner(shard, self.dispatch.cores);
        if self.is_late(deadline) {
            return self.late(origin);
        }
        if core != self.dispatch.core {
            return self.forward(core, incoming, origin, deadline);
        }
        let options = &request.options;
        let command = match request.operation {
            Operation::Put { key, value } => {
                let expires_at_ms = self.expires_at(shard, options.ttl_ms);
                Command::Put {
                    key,
                    value,
                    expires_at_ms,
                    condition: condition(options.condition),
                }
            }
            Operation::Delete { key } => Command::Delete {
                key,
                condition: condition(options.condition),
            },
            Operation::Incr { key, delta } => Command::Incr { key, delta },
            Operation::Touch { key } => Command::Touch {
                key,
                expires_at_ms: self.expires_at(shard, options.ttl_ms),
            },
            _ => {
                return self.read_of(shard, place, origin, key, options.consistency, deadline);
            }
        };
        self.write(shard, origin, command, options.session, 0);
    }

    /// A write of a shard of this core's; `position` is its key's among the request's.
    fn write(&mut self, shard: u16, origin: Origin, command: Command<'t>, session: Option<Session>, position: u32) {
        let Some(session) = session else {
            return self.write_later(shard, origin, command);
        };
        let session = SessionWrite {
            session: session.id,
            // The numbers of a request's keys are checked when it is decoded.
            seq: session.seq.saturating_add(u64::from(position)),
            first_unacked: session.first_unacked,
        };
        let window = self.dispatch.node_limits.session_window;
        if session.in_window() && session.seq - session.first_unacked < window {
            let session = Some(session);
            let operation = batch::Operation::Command { command, session };
            return self.batch(shard).in_sessions.push((origin, operation));
        }
        self.dispatch.stats.requests_busy += 1;
        let message = format!("{window} writes of the session are without a reply");
        self.replies.refuse(self.streams, origin, Status::Busy, &message);
    }

    /// A read of one key of a shard of this core's.
    fn read_of(
        &mut self,
        shard: u16,
        place: u32,
        origin: Origin,
        key: &'t [u8],
        consistency: Consistency,
        deadline: Option<Instant>,
    ) {
        let grouped = matches!(self.dispatch.members[usize::from(shard)], Member::Group(_));
        // What waits for a group has to know how long it may.
        if grouped && (consistency != Consistency::Linearizable || deadline.is_some()) {
            let key = self.incoming[place as usize].frame.payload.slice_ref(key);
            return self.batch(shard).lax.push(Read {
                origin,
                what: What::Entry(key),
                consistency,
                deadline,
            });
        }
        if self.is_ahead(shard, consistency) {
            return self.too_stale(shard, origin, None);
        }
        let reader = Reader {
            origin,
            incoming: place,
            consistency: consistency.code(),
        };
        self.read_later(shard, key, reader);
    }

    /// A request with several keys: what this core owns is executed here; of a request of this core's the rest is forwarded.
    /// `command` makes a write of each key in turn, or `None` of a read.
    fn multi(
        &mut self,
        asked: &Asked<'t>,
        count: usize,
        keys: impl Iterator<Item = &'t [u8]>,
        mut command: impl FnMut(u64, &'t [u8]) -> Option<Command<'t>>,
    ) {
        let &Asked {
            place,
            incoming,
            request,
            deadline,
            ..
        } = asked;
        let gather = match incoming.source {
            Source::Stream(stream) => Some(self.replies.gather(stream, request.id, incoming.frame.opcode, count)),
            Source::Mesh { .. } => None,
        };
        let late = self.is_late(deadline);
        let consistency = request.options.consistency;
        let mut elsewhere: Vec<Vec<u32>> = Vec::new();
        for (position, key) in keys.enumerate() {
            let position = position as u32;
            let shard = self.dispatch.table.shard_of(key);
            let core = owner(shard, self.dispatch.cores);
            let command = command(self.shard_clock(shard), key);
            let origin = match (gather, incoming.source) {
                (Some(gather), _) => Origin::Gather { gather, position },
                (None, Source::Mesh { core: from, ticket }) if core == self.dispatch.core => Origin::MeshGather {
                    core: from,
                    ticket,
                    position,
                },
                (None, _) => continue,
            };
            if late {
                self.late(origin);
            } else if core != self.dispatch.core {
                elsewhere.resize_with(usize::from(self.dispatch.cores), Vec::new);
                elsewhere[usize::from(core)].push(position);
            } else if let Some(command) = command {
                self.write(shard, origin, command, request.options.session, position);
            } else {
                self.read_of(shard, place, origin, key, consistency, deadline);
            }
        }
        let Some(gather) = gather else { return };
        for (core, positions) in elsewhere.into_iter().enumerate() {
            let core = core as CoreId;
            if positions.is_empty() {
                continue;
            }
            if self.replies.may_forward(core, self.dispatch.node_limits.forwarded) {
                self.replies
                    .forward_parts(core, gather, positions, &incoming.frame, deadline);
            } else {
                for position in positions {
                    self.busy(Origin::Gather { gather, position });
                }
            }
        }
    }

    /// A page of keys or entries.
    fn page(&mut self, asked: &Asked<'t>, scan: Scan<'t>, values: bool) {
        let reader = Reader {
            origin: asked.origin,
            incoming: asked.place,
            consistency: 0,
        };
        self.at_owner(asked, scan.shard, |turn| {
            turn.batch(scan.shard).pages.push((reader, values, scan));
        });
    }

    /// What an administrator asks about the cluster: core 0 answers.
    fn cluster(&mut self, asked: &Asked<'t>, verb: Verb, body: &'t [u8]) {
        const MOST: usize = 64;
        let &Asked {
            place,
            incoming,
            origin,
            deadline,
            ..
        } = asked;
        if self.dispatch.core != 0 {
            return self.forward(0, incoming, origin, deadline);
        }
        let Some(controller) = self.dispatch.controller.clone() else {
            let message = "this node belongs to no cluster that can be changed: its nodes are a list in its configuration, or it is alone. Set \
                           `cluster.id` without `cluster.nodes` for one that can";
            return self
                .replies
                .refuse(self.streams, origin, Status::InvalidArgument, message);
        };
        if self.dispatch.asking >= MOST {
            return self.busy(origin);
        }
        self.dispatch.asking += 1;
        let body = self.incoming[place as usize].frame.payload.slice_ref(body);
        let (said, asked) = (Rc::clone(&self.dispatch.said), Rc::clone(&controller));
        controller.shards.spawn(async move {
            let answer = asked.ask(verb, body).await;
            said.borrow_mut().push((origin, answer));
            asked.wake();
        });
    }

    /// Says to administrators what came of what they have asked.
    fn say_to_administrators(&mut self) {
        for (origin, answer) in self.dispatch.said.take() {
            self.dispatch.asking -= 1;
            match answer {
                Ok(body) => self.answer(origin, &body),
                Err((status, message)) => self.replies.refuse(self.streams, origin, status, &message),
            }
        }
    }

    /// Does what is asked of a whole shard, `here` where it belongs to this core; or says why not.
    fn at_owner(&mut self, asked: &Asked<'t>, shard: u16, here: impl FnOnce(&mut Self)) {
        let &Asked {
            incoming,
            origin,
            deadline,
            ..
        } = asked;
        if !self.is_shard(shard, origin) {
            return;
        }
        let core = owner(shard, self.dispatch.cores);
        if self.is_late(deadline) {
            self.late(origin);
        } else if core == self.dispatch.core {
            here(self);
        } else {
            self.forward(core, incoming, origin, deadline);
        }
    }

    /// What opens or ends a session in a shard.
    fn in_shard(&mut self, asked: &Asked<'t>, shard: u16, operation: batch::Operation<'t>) {
        let origin = asked.origin;
        self.at_owner(asked, shard, |turn| {
            turn.batch(shard).in_sessions.push((origin, operation));
        });
    }

    /// Whether a request names a shard there is; else it has been refused.
    fn is_shard(&mut self, shard: u16, origin: Origin) -> bool {
        let shards = self.dispatch.members.len();
        let is = usize::from(shard) < shards;
        if !is {
            self.dispatch.stats.requests_rejected += 1;
            let message = format!("there is no shard {shard}; shards are 0 to {}", shards - 1);
            self.replies
                .refuse(self.streams, origin, Status::InvalidArgument, &message);
        }
        is
    }

    fn hello(&mut self, connection: ConnectionKey, origin: Origin, hello: &Hello<'_>) {
        let supported = hello.major == MAJOR;
        let reply = HelloReply {
            major: MAJOR,
            minor: MINOR,
            node: self.dispatch.node,
            core: self.dispatch.core,
            cores: self.dispatch.cores,
            max_key_len: self.dispatch.limits.max_key_len as u32,
            max_value_len: self.dispatch.limits.max_value_len as u32,
            max_frame_len: self.dispatch.limits.max_frame_len() as u32,
            cluster: &self.dispatch.cluster,
            server: &self.dispatch.software,
        };
        let mut body = BytesMut::new();
        reply.encode(&mut body);
        if supported {
            tracing::debug!(client = hello.name, minor = hello.minor, "hello");
            self.streams.said_hello(connection);
            self.answer(origin, &body);
        } else {
            self.dispatch.stats.requests_rejected += 1;
            let reason = format!(
                "this node speaks version {MAJOR}.{MINOR} of the protocol, not {}.{}",
                hello.major, hello.minor
            );
            let meta = self.replies.meta(Status::UnsupportedVersion);
            self.replies
                .reply(self.streams, origin, &meta, &ReplyOptions::message(&reason), &body);
            self.closing.push(Closing {
                connection,
                code: close_code::VERSION,
                reason,
            });
        }
    }

    /// Counters of all cores; each core answers for itself.
    fn stats(&mut self, incoming: &Incoming, origin: Origin) {
        let mut own = BytesMut::new();
        self.dispatch.encode_stats(&mut own);
        match incoming.source {
            Source::Mesh { core, ticket } => {
                let position = u32::from(self.dispatch.core);
                self.replies
                    .reply_part(self.streams, Origin::MeshGather { core, ticket, position }, &own);
            }
            Source::Stream(stream) => {
                let cores = self.dispatch.cores;
                let others = (0..cores).filter(|&core| core != self.dispatch.core);
                if !others
                    .clone()
                    .all(|core| self.replies.may_forward(core, self.dispatch.node_limits.forwarded))
                {
                    return self.busy(origin);
                }
                let frame = &incoming.frame;
                let gather = self
                    .replies
                    .gather(stream, frame.request_id, frame.opcode, usize::from(cores));
                for core in others {
                    self.replies
                        .forward_parts(core, gather, vec![u32::from(core)], frame, None);
                }
                let position = u32::from(self.dispatch.core);
                self.replies
                    .reply_part(self.streams, Origin::Gather { gather, position }, &own);
            }
        }
    }

    fn forward(&mut self, core: CoreId, incoming: &Incoming, origin: Origin, deadline: Option<Instant>) {
        match incoming.source {
            Source::Stream(stream) if self.replies.may_forward(core, self.dispatch.node_limits.forwarded) => {
                self.replies.forward(core, stream, &incoming.frame, deadline);
            }
            Source::Stream(_) => self.busy(origin),
            // The asking core has the same map, so this is a bug; forwarding further could go round for ever.
            Source::Mesh { .. } => {
                self.replies
                    .refuse(self.streams, origin, Status::Internal, "a shard of neither core");
            }
        }
    }

    /// Adds a lookup to the turn.
    #[inline]
    fn read_later(&mut self, shard: u16, key: &'t [u8], reader: Reader) {
        let hash = match &self.dispatch.members[usize::from(shard)] {
            Member::Alone(replica) => replica.shard().hash(key),
            // Read when a majority has said that it may be, and looked for then.
            Member::Group(_) | Member::Elsewhere => 0,
        };
        let batch = self.batch(shard);
        batch.keys.push(key);
        batch.hashes.push(hash);
        batch.readers.push(reader);
    }

    fn write_later(&mut self, shard: u16, origin: Origin, command: Command<'t>) {
        let hash = match &self.dispatch.members[usize::from(shard)] {
            Member::Alone(replica) => Some(replica.shard().command_hash(&command)),
            Member::Group(_) | Member::Elsewhere => None,
        };
        let batch = self.batch(shard);
        batch.writes.push((origin, command));
        batch.write_hashes.extend(hash);
    }

    /// Has memory begin with what the lookups and writes of all these shards need first, so that none waits for it alone.
    fn fetch_ahead(&self, shards: &[u16]) {
        let alone = |&shard: &u16| {
            let Member::Alone(replica) = &self.dispatch.members[usize::from(shard)] else {
                return None;
            };
            let batch = &self.batches[usize::from(shard)];
            Some((replica.shard(), [&batch.write_hashes[..], &batch.hashes[..]]))
        };
        for (shard, hashes) in shards.iter().filter_map(alone) {
            for hashes in hashes {
                shard.prefetch_index(hashes);
            }
        }
        for (shard, hashes) in shards.iter().filter_map(alone) {
            for hashes in hashes {
                shard.prefetch_entries(hashes);
            }
        }
    }

    #[inline]
    fn batch(&mut self, shard: u16) -> &mut Batch<'t> {
        let batch = &mut self.batches[usize::from(shard)];
        let is_new = batch.keys.is_empty()
            && batch.writes.is_empty()
            && batch.in_sessions.is_empty()
            && batch.pages.is_empty()
            && batch.lax.is_empty();
        if is_new {
            self.dispatch.busy_shards.push(shard);
        }
        batch
    }

    /// The time a write of this turn is stamped with: the clock, or shard time where that is ahead. For a shard of another core
    /// the clock; that core stamps anew.
    fn shard_clock(&mut self, shard: u16) -> u64 {
        let shard_time = self.dispatch.members[usize::from(shard)].with(|shard| shard.shard_time_ms());
        self.moment.now_ms.max(shard_time.unwrap_or(0))
    }

    fn expires_at(&mut self, shard: u16, ttl_ms: Option<u64>) -> u64 {
        expires_at(self.shard_clock(shard), ttl_ms)
    }

    pub(crate) fn is_late(&self, deadline: Option<Instant>) -> bool {
        deadline.is_some_and(|deadline| deadline <= self.moment.now)
    }

    pub(crate) fn late(&mut self, origin: Origin) {
        self.dispatch.stats.requests_late += 1;
        self.replies.refuse(
            self.streams,
            origin,
            Status::DeadlineExceeded,
            "the deadline passed before it was executed",
        );
    }

    pub(crate) fn busy(&mut self, origin: Origin) {
        self.dispatch.stats.requests_busy += 1;
        self.replies.refuse(
            self.streams,
            origin,
            Status::Busy,
            "too many requests wait for the core that owns the shard",
        );
    }

    /// Whether a session has seen more of a shard than there is here, which only a lost state can explain.
    fn is_ahead(&mut self, shard: u16, consistency: Consistency) -> bool {
        let Consistency::Session {
            shard: of,
            epoch,
            index,
        } = consistency
        else {
            return false;
        };
        let applied = self.dispatch.members[usize::from(shard)].with(|shard| shard.applied_index());
        of == shard && (epoch, index) > (self.dispatch.epoch, applied.unwrap_or(0))
    }

    /// `age`: how old what is here may be.
    pub(crate) fn too_stale(&mut self, shard: u16, origin: Origin, age: Option<Duration>) {
        let mut meta = self.replies.meta(Status::TooStale);
        meta.shard = shard;
        let message = "this node has not seen as late a state of the shard as was asked for";
        let options = ReplyOptions {
            age_ms: age.map(|age| u32::try_from(age.as_millis()).unwrap_or(u32::MAX)),
            ..ReplyOptions::message(message)
        };
        self.replies.reply(self.streams, origin, &meta, &options, &[]);
    }

    fn answer(&mut self, origin: Origin, body: &[u8]) {
        let meta = self.replies.meta(Status::Ok);
        self.replies
            .reply(self.streams, origin, &meta, &ReplyOptions::default(), body);
    }
}

fn condition(condition: WireCondition) -> Condition {
    match condition {
        WireCondition::None => Condition::None,
        WireCondition::IfAbsent => Condition::IfAbsent,
        WireCondition::IfVersion(version) => Condition::IfVersion(Version::from(version)),
    }
}

/// When an entry with this time to live expires; 0: never.
fn expires_at(now_ms: u64, ttl_ms: Option<u64>) -> u64 {
    ttl_ms.map_or(0, |ttl_ms| now_ms.saturating_add(ttl_ms))
}
