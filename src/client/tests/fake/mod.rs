// A node that is enough of one to test a client against, and that can be told to misbehave. It is included by the tests and,
// as text, by the examples in the documentation, so that those run too; for the latter it begins without inner comments.

use std::collections::BTreeMap;
use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::BytesMut;
use generation_client::{Client, ClientBuilder, Credential};
use generation_proto::limits::FRAME_OVERHEAD;
use generation_proto::map::{Map, Node, NodeState, Replica, Shard};
use generation_proto::options::{Moved, ReplyOptions};
use generation_proto::reply::{self, HelloReply, MultiResult, Page, PageEntry, Reply, ReplyMeta, Stat};
use generation_proto::request::{KeyList, Scan};
use generation_proto::{
    Condition, Consistency, Decoder, Frame, Limits, Opcode, Operation, Request, ShardSession, Side, SlotTable, Status,
};
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;

/// Name of the cluster all of this is about.
pub(crate) const CLUSTER: &str = "test";

/// Shards of every map here.
const SHARDS: u16 = 4;

/// Runs an example against a fresh node.
pub(crate) fn example<F>(example: F)
where
    F: AsyncFnOnce(Client) -> Result<(), Box<dyn Error>>,
{
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let authority = Authority::new();
        let node = FakeNode::start(&authority, 1, 2);
        let client = authority.builder(&[&node]).connect().await.unwrap();
        example(client).await.unwrap();
    });
}

/// A node on a runtime of its own, for programs that are not asynchronous.
pub(crate) fn beside(authority: &Authority) -> (tokio::runtime::Runtime, FakeNode) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let node = runtime.block_on(async { FakeNode::start(authority, 1, 2) });
    (runtime, node)
}

/// Runs an example of such a program against a fresh node.
pub(crate) fn blocking_example<F>(example: F)
where
    F: FnOnce(ClientBuilder) -> Result<(), Box<dyn Error>>,
{
    let authority = Authority::new();
    let (_runtime, node) = beside(&authority);
    example(authority.builder(&[&node])).unwrap();
}

/// A certificate and its key, DER.
pub(crate) struct Issued {
    pub(crate) certificate: Vec<u8>,
    pub(crate) key: Vec<u8>,
}

/// A cluster's certificate authority.
pub(crate) struct Authority {
    pub(crate) certificate: Vec<u8>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let certificate = params.self_signed(&key).unwrap().der().to_vec();
        let issuer = Issuer::new(params, key);
        Self { certificate, issuer }
    }

    /// A certificate for `identity`, such as `node/1`, in `cluster`.
    pub(crate) fn issue(&self, cluster: &str, identity: &str) -> Issued {
        self.issue_with(cluster, identity, |_| {})
    }

    /// The same, with other things changed too.
    pub(crate) fn issue_with(
        &self,
        cluster: &str,
        identity: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Issued {
        let uri = format!("generation://{cluster}/{identity}");
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        Issued {
            certificate: params.signed_by(&key, &self.issuer).unwrap().der().to_vec(),
            key: key.serialize_der(),
        }
    }

    /// A client of the cluster that starts from `nodes`.
    pub(crate) fn builder(&self, nodes: &[&FakeNode]) -> ClientBuilder {
        let issued = self.issue(CLUSTER, "client/test");
        Client::builder()
            .cluster(CLUSTER)
            .seeds(nodes.iter().map(|node| node.addr.to_string()))
            .ca(Credential::der(self.certificate.clone()))
            .certificate(Credential::der(issued.certificate))
            .key(Credential::der(issued.key))
            .timeout(Duration::from_secs(20))
    }
}

/// What a node does with a request.
#[derive(Clone)]
pub(crate) enum Act {
    /// Executes it and answers.
    Serve,
    /// Executes it and answers so much later; others overtake it.
    Delay(Duration),
    /// Executes it and never answers.
    Never,
    /// Refuses it.
    Refuse(Status, ReplyOptions<'static>),
    /// Refuses it with a redirect.
    Move(Moved),
    /// Sends bytes that are no reply.
    Garbage(&'static [u8]),
    /// Answers as if another operation had been asked for.
    WrongOperation,
    /// Answers with a body cut short.
    CutBody,
    /// Closes the connection without executing the request.
    Close,
    /// Executes it and closes the connection.
    ServeAndClose,
    /// Executes it, answers, ends the stream, and takes no more requests on it, with this code.
    ServeAndFinish(u32),
}

/// A request as a script sees it.
pub(crate) struct Seen {
    pub(crate) opcode: Opcode,
    /// The key, or the first of several.
    pub(crate) key: Vec<u8>,
    /// Which core the connection is on.
    pub(crate) core: u16,
    /// How many requests of this operation came before.
    pub(crate) nth: usize,
    /// Its options.
    pub(crate) options: generation_proto::RequestOptions,
    /// Bytes of the whole request.
    pub(crate) len: usize,
    /// Whether it came on the first stream of its connection.
    pub(crate) on_lane: bool,
}

/// The sessions opened, by shard and id, and what was answered to their requests, by number.
type FakeSessions = BTreeMap<(u16, u128), BTreeMap<u64, (ReplyMeta, Vec<u8>)>>;

type Script = Arc<dyn Fn(&Seen) -> Act + Send + Sync>;
type Stored = (Vec<u8>, u64, u64);

/// Value, version and time of expiry by key.
#[derive(Default)]
struct Entries {
    store: Mutex<BTreeMap<Vec<u8>, Stored>>,
    index: AtomicU64,
    sessions: Mutex<FakeSessions>,
}

struct World {
    id: u64,
    cores: u16,
    script: Mutex<Script>,
    map: Mutex<Map>,
    hello: Mutex<Option<Status>>,
    entries: Arc<Entries>,
    counts: Mutex<BTreeMap<u8, usize>>,
    connections: AtomicUsize,
    open: Mutex<Vec<quinn::Connection>>,
    slots: SlotTable,
    /// Keys for which batches say this.
    refused: Mutex<BTreeMap<Vec<u8>, Status>>,
    /// Streams that are never answered on, kept open.
    silent: Mutex<Vec<Sender>>,
    limits: Limits,
}

/// A running node.
pub(crate) struct FakeNode {
    pub(crate) addr: SocketAddr,
    world: Arc<World>,
    endpoint: quinn::Endpoint,
}

impl FakeNode {
    /// Starts node `id` with a map of itself and 4 shards.
    pub(crate) fn start(authority: &Authority, id: u64, cores: u16) -> Self {
        let certificate = authority.issue(CLUSTER, &format!("node/{id}"));
        Self::start_as(authority, id, cores, certificate)
    }

    /// The same, with the entries of `other`, as if they were replicated.
    pub(crate) fn start_beside(authority: &Authority, id: u64, cores: u16, other: &Self) -> Self {
        let certificate = authority.issue(CLUSTER, &format!("node/{id}"));
        Self::start_with(authority, id, cores, certificate, other.world.entries.clone(), 1 << 20)
    }

    /// The same, at an address of one's own choice.
    pub(crate) async fn start_at(authority: &Authority, id: u64, addr: SocketAddr, other: &Self) -> Self {
        let certificate = authority.issue(CLUSTER, &format!("node/{id}"));
        // Whoever had it before may take a moment to let go of it.
        let socket = loop {
            match std::net::UdpSocket::bind(addr) {
                Ok(socket) => break socket,
                Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
            }
        };
        Self::start_on(
            socket,
            authority,
            id,
            1,
            certificate,
            other.world.entries.clone(),
            1 << 20,
        )
    }

    /// The same, accepting values of so many bytes at most, instead of 1 MiB.
    pub(crate) fn start_limited(authority: &Authority, max_value_len: usize) -> Self {
        let certificate = authority.issue(CLUSTER, "node/1");
        Self::start_with(authority, 1, 2, certificate, Arc::default(), max_value_len)
    }

    /// The same with any certificate.
    pub(crate) fn start_as(authority: &Authority, id: u64, cores: u16, certificate: Issued) -> Self {
        Self::start_with(authority, id, cores, certificate, Arc::default(), 1 << 20)
    }

    fn start_with(
        authority: &Authority,
        id: u64,
        cores: u16,
        certificate: Issued,
        entries: Arc<Entries>,
        max_value_len: usize,
    ) -> Self {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        Self::start_on(socket, authority, id, cores, certificate, entries, max_value_len)
    }

    fn start_on(
        socket: std::net::UdpSocket,
        authority: &Authority,
        id: u64,
        cores: u16,
        certificate: Issued,
        entries: Arc<Entries>,
        max_value_len: usize,
    ) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from(authority.certificate.clone())).unwrap();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .unwrap();
        let mut tls = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                vec![CertificateDer::from(certificate.certificate)],
                PrivateKeyDer::try_from(certificate.key).unwrap(),
            )
            .unwrap();
        tls.alpn_protocols = vec![generation_proto::ALPN_CLIENT.to_vec()];
        let tls = quinn::crypto::rustls::QuicServerConfig::try_from(tls).unwrap();
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(tls));
        let mut transport = quinn::TransportConfig::default();
        transport.max_concurrent_bidi_streams(1000u32.into());
        config.transport_config(Arc::new(transport));
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint = quinn::Endpoint::new(quinn::EndpointConfig::default(), Some(config), socket, runtime).unwrap();
        let addr = endpoint.local_addr().unwrap();
        let world = Arc::new(World {
            id,
            cores,
            script: Mutex::new(Arc::new(|_| Act::Serve)),
            map: Mutex::new(map_of(1, &[(id, addr, cores)], id, 1)),
            hello: Mutex::new(None),
            entries,
            counts: Mutex::default(),
            connections: AtomicUsize::new(0),
            open: Mutex::default(),
            slots: SlotTable::new(&Map::even_ranges(SHARDS), usize::from(SHARDS)).unwrap(),
            refused: Mutex::default(),
            silent: Mutex::default(),
            limits: Limits {
                max_value_len,
                ..Limits::default()
            },
        });
        tokio::spawn(accept(endpoint.clone(), world.clone()));
        Self { addr, world, endpoint }
    }

    /// From now on requests (`Hello` and `Map` aside) are dealt with as `script` says.
    pub(crate) fn script(&self, script: impl Fn(&Seen) -> Act + Send + Sync + 'static) {
        *self.world.script.lock().unwrap() = Arc::new(script);
    }

    /// From now on `Map` is answered with this.
    pub(crate) fn set_map(&self, map: Map) {
        *self.world.map.lock().unwrap() = map;
    }

    /// From now on a key in a batch is refused with this; the others are not.
    pub(crate) fn refuse_key(&self, key: Vec<u8>, status: Status) {
        self.world.refused.lock().unwrap().insert(key, status);
    }

    /// From now on `Hello` is refused.
    pub(crate) fn refuse_hello(&self, status: Status) {
        *self.world.hello.lock().unwrap() = Some(status);
    }

    /// Requests of an operation that arrived so far.
    pub(crate) fn count(&self, opcode: Opcode) -> usize {
        self.world
            .counts
            .lock()
            .unwrap()
            .get(&opcode.code())
            .copied()
            .unwrap_or(0)
    }

    /// Connections that were opened so far.
    pub(crate) fn connections(&self) -> usize {
        self.world.connections.load(Ordering::SeqCst)
    }

    /// Connections that are open now.
    pub(crate) fn open_connections(&self) -> usize {
        let open = self.world.open.lock().unwrap();
        open.iter()
            .filter(|connection| connection.close_reason().is_none())
            .count()
    }

    /// What is stored under `key`.
    pub(crate) fn stored(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.world
            .entries
            .store
            .lock()
            .unwrap()
            .get(key)
            .map(|stored| stored.0.clone())
    }

    /// How many sessions are open.
    pub(crate) fn sessions(&self) -> usize {
        self.world.entries.sessions.lock().unwrap().len()
    }

    /// Forgets every session, as if they had expired.
    pub(crate) fn expire_sessions(&self) {
        self.world.entries.sessions.lock().unwrap().clear();
    }

    /// Closes every connection and takes no more.
    pub(crate) fn stop(&self) {
        self.endpoint.close(0u32.into(), b"stopped by the test");
    }

    /// Closes every connection; new ones are taken.
    pub(crate) fn drop_connections(&self) {
        for connection in self.world.open.lock().unwrap().drain(..) {
            connection.close(7u32.into(), b"dropped by the test");
        }
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A map of `nodes` (id, address, cores), 4 shards, all led by `leader` in `term`; shard s is on core s modulo the cores.
pub(crate) fn map_of(epoch: u32, nodes: &[(u64, SocketAddr, u16)], leader: u64, term: u64) -> Map {
    Map {
        epoch,
        cluster: CLUSTER.to_owned(),
        nodes: nodes
            .iter()
            .map(|&(id, addr, cores)| Node {
                id,
                addr,
                cores,
                state: NodeState::Up,
            })
            .collect(),
        ranges: Map::even_ranges(SHARDS),
        shards: (0..SHARDS)
            .map(|shard| Shard {
                epoch: 1,
                term,
                leader,
                replicas: nodes
                    .iter()
                    .map(|&(node, _, cores)| Replica {
                        id: node,
                        node,
                        core: shard % cores,
                    })
                    .collect(),
            })
            .collect(),
    }
}

/// A key of each shard of [`map_of`].
pub(crate) fn key_of_shard(shard: u16) -> Vec<u8> {
    let table = SlotTable::new(&Map::even_ranges(SHARDS), usize::from(SHARDS)).unwrap();
    (0..1000)
        .map(|n| format!("key{n}").into_bytes())
        .find(|key| table.shard_of(key) == shard)
        .unwrap()
}

async fn accept(endpoint: quinn::Endpoint, world: Arc<World>) {
    while let Some(incoming) = endpoint.accept().await {
        let core = u16::from(incoming.orig_dst_cid()[0]) % world.cores;
        let world = world.clone();
        tokio::spawn(async move {
            let Ok(connection) = incoming.await else { return };
            world.connections.fetch_add(1, Ordering::SeqCst);
            world.open.lock().unwrap().push(connection.clone());
            let mut on_lane = true;
            while let Ok((send, recv)) = connection.accept_bi().await {
                let send = Arc::new(tokio::sync::Mutex::new(send));
                tokio::spawn(serve(world.clone(), connection.clone(), core, on_lane, send, recv));
                on_lane = false;
            }
        });
    }
}

type Sender = Arc<tokio::sync::Mutex<quinn::SendStream>>;

async fn serve(
    world: Arc<World>,
    connection: quinn::Connection,
    core: u16,
    on_lane: bool,
    send: Sender,
    mut recv: quinn::RecvStream,
) {
    let mut decoder = Decoder::new(Side::Server, world.limits.max_frame_len());
    while let Ok(Some(chunk)) = recv.read_chunk(usize::MAX, true).await {
        decoder.feed(chunk.bytes);
        while let Some(frame) = decoder.next_frame().expect("the client sends frames") {
            let act = world.act(&frame, core, on_lane);
            let world = world.clone();
            if matches!(act, Act::Close) {
                connection.close(7u32.into(), b"closed by the test");
                return;
            }
            let mut out = BytesMut::new();
            match &act {
                Act::Refuse(status, options) => refuse(&frame, *status, options, &mut out),
                Act::Move(moved) => {
                    let options = ReplyOptions {
                        moved: Some(*moved),
                        ..ReplyOptions::default()
                    };
                    refuse(&frame, Status::Moved, &options, &mut out);
                }
                Act::Garbage(garbage) => out.extend_from_slice(garbage),
                Act::WrongOperation => {
                    reply::refusal(Opcode::Map.code(), frame.request_id, Status::Ok, "").encode(&mut out);
                }
                Act::CutBody => {
                    let meta = ReplyMeta::default();
                    let options = ReplyOptions::default();
                    let (id, opcode) = (frame.request_id, frame.opcode);
                    Reply {
                        id,
                        opcode,
                        meta,
                        options,
                        body: b"cut",
                    }
                    .encode(&mut out);
                }
                _ => world.execute(&frame, core, &mut out),
            }
            match act {
                Act::Never => world.silent.lock().unwrap().push(send.clone()),
                Act::ServeAndClose => {
                    connection.close(7u32.into(), b"closed by the test");
                    return;
                }
                Act::ServeAndFinish(number) => {
                    let mut send = send.lock().await;
                    send.write_chunk(out.freeze()).await.unwrap();
                    send.finish().unwrap();
                    let _ = recv.stop(number.into());
                    return;
                }
                Act::Delay(delay) => {
                    let send = send.clone();
                    tokio::spawn(async move {
                        tokio::time::sleep(delay).await;
                        let _ = send.lock().await.write_chunk(out.freeze()).await;
                    });
                }
                _ => {
                    let _ = send.lock().await.write_chunk(out.freeze()).await;
                }
            }
        }
    }
}

fn refuse(frame: &Frame, status: Status, options: &ReplyOptions<'_>, out: &mut BytesMut) {
    let meta = ReplyMeta {
        status: status.code(),
        version: 77,
        ..ReplyMeta::default()
    };
    Reply {
        id: frame.request_id,
        opcode: frame.opcode,
        meta,
        options: *options,
        body: &[],
    }
    .encode(out);
}

/// The key of a request, or the first of several.
fn first_key<'a>(operation: &Operation<'a>) -> Option<&'a [u8]> {
    match operation {
        Operation::MultiGet(keys) | Operation::MultiDelete(keys) => keys.iter().next(),
        Operation::MultiPut(items) => items.iter().next().map(|item| item.key),
        other => other.key(),
    }
}

/// Where a key is in the order of scans, which is the same on every node: FNV-1a.
fn position_of(key: &[u8]) -> u64 {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
    key.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

impl World {
    fn act(&self, frame: &Frame, core: u16, on_lane: bool) -> Act {
        let nth = {
            let mut counts = self.counts.lock().unwrap();
            let count = counts.entry(frame.opcode).or_default();
            *count += 1;
            *count - 1
        };
        let request = Request::decode(frame, &self.limits).expect("the client sends requests");
        if matches!(request.operation, Operation::Hello(_) | Operation::Map) {
            return Act::Serve;
        }
        let key = first_key(&request.operation);
        let seen = Seen {
            opcode: request.operation.opcode(),
            key: key.unwrap_or_default().to_vec(),
            core,
            nth,
            options: request.options,
            len: frame.payload.len() + 16,
            on_lane,
        };
        let script = self.script.lock().unwrap().clone();
        script(&seen)
    }

    fn execute(&self, frame: &Frame, core: u16, out: &mut BytesMut) {
        let request = Request::decode(frame, &self.limits).unwrap();
        let mut body = BytesMut::new();
        let mut options = ReplyOptions::default();
        let mut meta = ReplyMeta {
            index: self.entries.index.load(Ordering::SeqCst),
            server_time_ms: now_ms(),
            map_epoch: self.map.lock().unwrap().epoch,
            consistency: request.options.consistency.code(),
            ..ReplyMeta::default()
        };
        if let Some(key) = request.operation.key() {
            meta.shard = self.shard_of(key);
        }
        let numbered = request.options.session.map(|session| {
            let shard = self.shard_of(first_key(&request.operation).unwrap());
            ((shard, session.id), session.seq)
        });
        if let Some((meta, body)) = numbered.and_then(|numbered| self.remembered(numbered, &request.operation, meta)) {
            return Reply {
                id: frame.request_id,
                opcode: frame.opcode,
                meta,
                options,
                body: &body,
            }
            .encode(out);
        }
        match request.operation {
            Operation::OpenSession(session) => self.open(session, &mut meta),
            Operation::CloseSession(session) => self.close(session, &mut meta),
            Operation::Hello(_) => {
                if let Some(status) = *self.hello.lock().unwrap() {
                    meta.status = status.code();
                    options = ReplyOptions::message("the test refuses");
                }
                HelloReply {
                    major: generation_proto::MAJOR,
                    minor: generation_proto::MINOR,
                    node: self.id,
                    core,
                    cores: self.cores,
                    max_key_len: self.limits.max_key_len as u32,
                    max_value_len: self.limits.max_value_len as u32,
                    max_frame_len: self.limits.max_frame_len() as u32,
                    cluster: CLUSTER,
                    server: "fake",
                }
                .encode(&mut body);
            }
            Operation::Ping { payload } => body.extend_from_slice(payload),
            Operation::Map => self.map.lock().unwrap().encode(&mut body),
            Operation::Stats => {
                for (name, value) in [("node.cores", u64::from(self.cores)), ("requests.total", 7)] {
                    Stat { name, value }.encode(&mut body);
                }
            }
            Operation::MultiGet(keys) => self.multi_get(keys, &mut body),
            Operation::MultiPut(items) => {
                for item in items.iter() {
                    let (status, version) = if let Some(status) = self.refusal_of(item.key) {
                        (status, 0)
                    } else if item.value == b"refuse" {
                        (Status::OutOfMemory, 0)
                    } else {
                        self.put(item.key, item.value, item.ttl_ms, request.options.condition)
                    };
                    self.result(item.key, status, version, 0, &[]).encode(&mut body);
                }
            }
            Operation::MultiDelete(keys) => {
                for key in keys.iter() {
                    let (status, version) = self.delete(key, Condition::None);
                    self.result(key, status, version, 0, &[]).encode(&mut body);
                }
            }
            Operation::Keys(scan) | Operation::Entries(scan) => {
                meta.shard = scan.shard;
                self.page(&scan, frame.opcode == Opcode::Entries.code(), &mut body);
            }
            operation => self.one(&operation, &request.options, &mut meta, &mut options, &mut body),
        }
        if let Some((session, seq)) = numbered
            && let Some(replies) = self.entries.sessions.lock().unwrap().get_mut(&session)
        {
            replies.insert(seq, (meta, body.to_vec()));
        }
        Reply {
            id: frame.request_id,
            opcode: frame.opcode,
            meta,
            options,
            body: &body,
        }
        .encode(out);
    }

    fn multi_get(&self, keys: KeyList<'_>, body: &mut BytesMut) {
        for key in keys.iter() {
            if let Some(status) = self.refusal_of(key) {
                self.result(key, status, 0, 0, &[]).encode(body);
                continue;
            }
            let found = self.read(key);
            let value = found.as_ref().map(|found| found.0.clone()).unwrap_or_default();
            let (_, version, expires_at_ms) = found.clone().unwrap_or_default();
            let fits = body.len() + value.len() + FRAME_OVERHEAD <= self.limits.max_frame_len();
            let (status, value) = match found {
                _ if !fits => (Status::Busy, Vec::new()),
                Some(_) => (Status::Ok, value),
                None => (Status::NotFound, value),
            };
            self.result(key, status, version, expires_at_ms, &value).encode(body);
        }
    }

    fn open(&self, session: ShardSession, meta: &mut ReplyMeta) {
        let mut sessions = self.entries.sessions.lock().unwrap();
        let old = sessions.insert((session.shard, session.id), BTreeMap::new());
        assert!(old.is_none(), "an id is opened once");
        meta.shard = session.shard;
    }

    fn close(&self, session: ShardSession, meta: &mut ReplyMeta) {
        let mut sessions = self.entries.sessions.lock().unwrap();
        if sessions.remove(&(session.shard, session.id)).is_none() {
            meta.status = Status::SessionExpired.code();
        }
        meta.shard = session.shard;
    }

    /// What a numbered write is answered without executing it.
    fn remembered(
        &self,
        (session, seq): ((u16, u128), u64),
        operation: &Operation<'_>,
        meta: ReplyMeta,
    ) -> Option<(ReplyMeta, Vec<u8>)> {
        let known = self.entries.sessions.lock().unwrap().get(&session).cloned();
        match known {
            Some(replies) => replies.get(&seq).cloned(),
            None => Some(self.expired(operation, meta)),
        }
    }

    /// What a write in a session that is not open is answered.
    fn expired(&self, operation: &Operation<'_>, meta: ReplyMeta) -> (ReplyMeta, Vec<u8>) {
        let status = Status::SessionExpired;
        let mut body = BytesMut::new();
        let mut each = |key: &[u8]| self.result(key, status, 0, 0, &[]).encode(&mut body);
        match operation {
            Operation::MultiDelete(keys) => keys.iter().for_each(each),
            Operation::MultiPut(items) => items.iter().for_each(|item| each(item.key)),
            _ => {
                let status = status.code();
                return (ReplyMeta { status, ..meta }, Vec::new());
            }
        }
        (meta, body.to_vec())
    }

    fn page(&self, scan: &Scan<'_>, values: bool, body: &mut BytesMut) {
        let store = self.entries.store.lock().unwrap();
        let mut matching: Vec<_> = store
            .iter()
            .filter(|(key, _)| self.shard_of(key) == scan.shard && key.starts_with(scan.prefix))
            .map(|(key, stored)| (position_of(key), key, stored))
            .filter(|(position, ..)| *position >= scan.cursor)
            .collect();
        matching.sort_unstable();
        let count = matching.len().min(scan.limit as usize);
        let page = Page {
            next: matching.get(count).map_or(u64::MAX, |(position, ..)| *position),
            count: count as u32,
            done: count == matching.len(),
        };
        body.extend_from_slice(&page.to_bytes());
        for (_, key, (value, version, expires_at_ms)) in &matching[..count] {
            PageEntry {
                key,
                value: if values { value } else { &[] },
                version: *version,
                expires_at_ms: *expires_at_ms,
            }
            .encode(body);
        }
    }

    fn one(
        &self,
        operation: &Operation<'_>,
        asked: &generation_proto::RequestOptions,
        meta: &mut ReplyMeta,
        options: &mut ReplyOptions<'_>,
        body: &mut BytesMut,
    ) {
        let key = operation.key().unwrap();
        let old = self.read(key);
        let (status, version) = match *operation {
            Operation::Get { .. } => match &old {
                Some((value, version, expires_at_ms)) => {
                    body.extend_from_slice(value);
                    options.expires_at_ms = Some(*expires_at_ms).filter(|&expires_at_ms| expires_at_ms != 0);
                    (Status::Ok, *version)
                }
                None => (Status::NotFound, 0),
            },
            Operation::Put { value, .. } => self.put(key, value, asked.ttl_ms, asked.condition),
            Operation::Delete { .. } => self.delete(key, asked.condition),
            Operation::Incr { delta, .. } => {
                let (value, _, expires_at_ms) = old.unwrap_or((b"0".to_vec(), 0, 0));
                match String::from_utf8(value).ok().and_then(|text| text.parse::<i64>().ok()) {
                    None => (Status::NotANumber, 0),
                    Some(number) => match number.checked_add(delta) {
                        None => (Status::Overflow, 0),
                        Some(sum) => {
                            body.extend_from_slice(&sum.to_le_bytes());
                            (Status::Ok, self.write(key, sum.to_string().as_bytes(), expires_at_ms))
                        }
                    },
                }
            }
            Operation::Touch { .. } => match old {
                None => (Status::NotFound, 0),
                Some((value, ..)) => {
                    let expires_at_ms = asked.ttl_ms.map_or(0, |ttl_ms| now_ms() + ttl_ms);
                    (Status::Ok, self.write(key, &value, expires_at_ms))
                }
            },
            _ => unreachable!("dealt with by the caller"),
        };
        meta.status = status.code();
        meta.version = version;
        meta.index = self.entries.index.load(Ordering::SeqCst);
        if !matches!(operation, Operation::Get { .. }) {
            options.expires_at_ms = self
                .read(key)
                .map(|stored| stored.2)
                .filter(|&expires_at_ms| expires_at_ms != 0);
        }
    }

    fn refusal_of(&self, key: &[u8]) -> Option<Status> {
        self.refused.lock().unwrap().get(key).copied()
    }

    fn shard_of(&self, key: &[u8]) -> u16 {
        self.slots.shard_of(key)
    }

    fn result<'v>(
        &self,
        key: &[u8],
        status: Status,
        version: u64,
        expires_at_ms: u64,
        value: &'v [u8],
    ) -> MultiResult<'v> {
        MultiResult {
            status: status.code(),
            consistency: Consistency::Linearizable.code(),
            shard: self.shard_of(key),
            version,
            index: self.entries.index.load(Ordering::SeqCst),
            expires_at_ms,
            value,
        }
    }

    fn read(&self, key: &[u8]) -> Option<Stored> {
        self.entries.store.lock().unwrap().get(key).cloned()
    }

    fn write(&self, key: &[u8], value: &[u8], expires_at_ms: u64) -> u64 {
        let version = (self.entries.index.fetch_add(1, Ordering::SeqCst) + 1) << 16;
        self.entries
            .store
            .lock()
            .unwrap()
            .insert(key.to_vec(), (value.to_vec(), version, expires_at_ms));
        version
    }

    fn put(&self, key: &[u8], value: &[u8], ttl_ms: Option<u64>, condition: Condition) -> (Status, u64) {
        let current = self.read(key).map_or(0, |stored| stored.1);
        let holds = match condition {
            Condition::None => true,
            Condition::IfAbsent => current == 0,
            Condition::IfVersion(version) => current == version,
        };
        if !holds {
            return (Status::ConditionFailed, current);
        }
        (
            Status::Ok,
            self.write(key, value, ttl_ms.map_or(0, |ttl_ms| now_ms() + ttl_ms)),
        )
    }

    fn delete(&self, key: &[u8], condition: Condition) -> (Status, u64) {
        let current = self.read(key).map_or(0, |stored| stored.1);
        match condition {
            _ if current == 0 => return (Status::NotFound, 0),
            Condition::IfVersion(version) if version != current => return (Status::ConditionFailed, current),
            _ => {}
        }
        self.entries.store.lock().unwrap().remove(key);
        (
            Status::Ok,
            (self.entries.index.fetch_add(1, Ordering::SeqCst) + 1) << 16,
        )
    }
}
