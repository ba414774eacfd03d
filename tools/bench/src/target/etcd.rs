//! etcd over its gRPC interface: HTTP/2 by h2, messages by prost, on the generator's own readiness loop.
//!
//! The messages are declared here, with the few fields that are used and the numbers of etcd's `rpc.proto` (API v3), so
//! that nothing generates code at build time and no `protoc` is needed. A connection is one HTTP/2 connection; requests on
//! it travel as concurrent streams. With several endpoints the connections are dealt out in turn, as etcd's own client
//! balances. Reads are linearizable, etcd's default.

use std::collections::VecDeque;
use std::future::Future;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use h2::client::{Connection, ResponseFuture, SendRequest};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, Uri, header};
use mio::net::TcpStream;
use mio::{Events, Interest};
use prost::Message;
use rustls::{ClientConfig, ClientConnection};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::cluster::{Cluster, Layout, Place, SLOTS};
use super::stream::{Tls, dial};
use super::tls::{TlsFiles, client_config};
use super::{CONNECT_TIMEOUT, Completion, Connector, Failure, Outcome, Request, Target, TargetError, Token, resolve};

/// Name in reports and errors.
const NAME: &str = "etcd";
/// Receive window of a stream and of a connection, in bytes: replies are small, and must never wait for an update.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Streams opened before the server has said how many it allows.
const FIRST_STREAMS: usize = 100;
/// Length of the head of a gRPC message: compressed flag and length.
const HEAD_LEN: usize = 5;

/// Messages of `rpc.proto`, reduced to the fields that are read or written here.
mod messages {
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct RangeRequest {
        #[prost(bytes = "vec", tag = "1")]
        pub key: Vec<u8>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct KeyValue {
        #[prost(int64, tag = "3")]
        pub mod_revision: i64,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct RangeResponse {
        #[prost(message, repeated, tag = "2")]
        pub kvs: Vec<KeyValue>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct PutRequest {
        #[prost(bytes = "vec", tag = "1")]
        pub key: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        pub value: Vec<u8>,
    }

    /// `target` 2 is MOD, `result` 0 is EQUAL.
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Compare {
        #[prost(int32, tag = "1")]
        pub result: i32,
        #[prost(int32, tag = "2")]
        pub target: i32,
        #[prost(bytes = "vec", tag = "3")]
        pub key: Vec<u8>,
        #[prost(int64, optional, tag = "6")]
        pub mod_revision: Option<i64>,
    }

    /// A `oneof` of the original; here exactly one field is set.
    #[derive(Clone, PartialEq, Message)]
    pub(super) struct RequestOp {
        #[prost(message, optional, tag = "1")]
        pub range: Option<RangeRequest>,
        #[prost(message, optional, tag = "2")]
        pub put: Option<PutRequest>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct TxnRequest {
        #[prost(message, repeated, tag = "1")]
        pub compare: Vec<Compare>,
        #[prost(message, repeated, tag = "2")]
        pub success: Vec<RequestOp>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct ResponseOp {
        #[prost(message, optional, tag = "1")]
        pub range: Option<RangeResponse>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct TxnResponse {
        #[prost(bool, tag = "2")]
        pub succeeded: bool,
        #[prost(message, repeated, tag = "3")]
        pub responses: Vec<ResponseOp>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct StatusRequest {}

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct ResponseHeader {
        #[prost(uint64, tag = "2")]
        pub member_id: u64,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct StatusResponse {
        #[prost(message, optional, tag = "1")]
        pub header: Option<ResponseHeader>,
        #[prost(uint64, tag = "4")]
        pub leader: u64,
    }
}

use messages::{
    Compare, PutRequest, RangeRequest, RangeResponse, RequestOp, StatusRequest, StatusResponse, TxnRequest, TxnResponse,
};

/// What a call asks, and so how its reply is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Get,
    Put,
    Swap,
    MultiGet,
    Status,
}

impl Call {
    const ALL: [Self; 5] = [Self::Get, Self::Put, Self::Swap, Self::MultiGet, Self::Status];

    const fn path(self) -> &'static str {
        match self {
            Self::Get => "/etcdserverpb.KV/Range",
            Self::Put => "/etcdserverpb.KV/Put",
            Self::Swap | Self::MultiGet => "/etcdserverpb.KV/Txn",
            Self::Status => "/etcdserverpb.Maintenance/Status",
        }
    }

    const fn writes(self) -> bool {
        matches!(self, Self::Put | Self::Swap)
    }
}

/// Encodes a request as one gRPC message.
///
/// # Errors
/// The name of an operation that etcd does not have.
fn encode(request: &Request<'_>) -> Result<(Call, Bytes), &'static str> {
    let range = |key: &[u8]| RangeRequest { key: key.to_vec() };
    let put = |key: &[u8], value: &[u8]| PutRequest {
        key: key.to_vec(),
        value: value.to_vec(),
    };
    Ok(match *request {
        Request::Get { key, .. } => (Call::Get, frame(&range(key))),
        Request::Put { key, value, ttl_ms: 0 } => (Call::Put, frame(&put(key, value))),
        Request::Put { .. } => return Err("time to live without a lease"),
        Request::PutIfVersion { key, value, version } => {
            let compare = Compare {
                result: 0,
                target: 2,
                key: key.to_vec(),
                mod_revision: Some(version.cast_signed()),
            };
            let success = RequestOp {
                range: None,
                put: Some(put(key, value)),
            };
            let request = TxnRequest {
                compare: vec![compare],
                success: vec![success],
            };
            (Call::Swap, frame(&request))
        }
        Request::Incr { .. } => return Err("counter"),
        Request::MultiGet { keys, key_len } => {
            let success = keys.chunks_exact(key_len).map(|key| RequestOp {
                range: Some(range(key)),
                put: None,
            });
            let request = TxnRequest {
                compare: Vec::new(),
                success: success.collect(),
            };
            (Call::MultiGet, frame(&request))
        }
    })
}

fn frame(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut out = BytesMut::with_capacity(HEAD_LEN + len);
    out.put_u8(0);
    out.put_u32(len as u32);
    message
        .encode(&mut out)
        .expect("invariant: a BytesMut grows to what is written into it");
    out.freeze()
}

/// The message in a gRPC body.
fn unframe(body: &[u8]) -> Result<&[u8], String> {
    let Some((head, message)) = body.split_at_checked(HEAD_LEN) else {
        return Err(format!("a reply of {} bytes", body.len()));
    };
    let announced = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if head[0] != 0 || announced != message.len() {
        return Err("a reply that is compressed or not one message".to_owned());
    }
    Ok(message)
}

/// The outcome of a call that came back with status 0.
fn outcome(call: Call, body: &[u8]) -> Result<Outcome, String> {
    let message = unframe(body)?;
    let wrong = |error: prost::DecodeError| error.to_string();
    Ok(match call {
        Call::Get => match RangeResponse::decode(message).map_err(wrong)?.kvs.first() {
            Some(entry) => Outcome::Hit {
                version: entry.mod_revision.cast_unsigned(),
            },
            None => Outcome::Miss,
        },
        Call::Put => Outcome::Stored,
        Call::Swap => {
            if TxnResponse::decode(message).map_err(wrong)?.succeeded {
                Outcome::Stored
            } else {
                Outcome::Conflict
            }
        }
        Call::MultiGet => {
            let responses = TxnResponse::decode(message).map_err(wrong)?.responses;
            let found = |range: &RangeResponse| !range.kvs.is_empty();
            let hits = responses
                .iter()
                .filter(|op| op.range.as_ref().is_some_and(found))
                .count() as u32;
            Outcome::Multi {
                hits,
                misses: responses.len() as u32 - hits,
            }
        }
        Call::Status => Outcome::Hit {
            version: u64::from(is_leader(&StatusResponse::decode(message).map_err(wrong)?)),
        },
    })
}

fn is_leader(status: &StatusResponse) -> bool {
    let member = status.header.as_ref().map_or(0, |header| header.member_id);
    member != 0 && member == status.leader
}

/// Sorts a gRPC status other than 0 (codes of the gRPC specification, texts of etcd's `rpctypes`).
///
/// # Errors
/// The status itself, when it means that the other end is no etcd.
fn failure(call: Call, code: u32, message: &str) -> Result<Failure, String> {
    Ok(match code {
        // "request timed out" and "leader changed" come after the proposal, "no leader" before it.
        4 | 14 if call.writes() && !message.contains("no leader") => Failure::InDoubt,
        4 | 14 => Failure::Unavailable,
        8 if message.contains("space exceeded") => Failure::OutOfMemory,
        8 => Failure::Busy,
        12 => return Err(format!("gRPC status 12: {message}")),
        _ => Failure::Rejected,
    })
}

/// How a call ended; an error is not a failure of the call but of the protocol.
type Ended = (Token, Result<Outcome, String>);

async fn finish(token: Token, call: Call, response: ResponseFuture) -> Ended {
    (token, reply(call, response).await)
}

fn field<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

async fn reply(call: Call, response: ResponseFuture) -> Result<Outcome, String> {
    // A stream that was reset: of a lost connection the connection itself tells.
    let reset = if call.writes() {
        Failure::InDoubt
    } else {
        Failure::Unavailable
    };
    let Ok(response) = response.await else {
        return Ok(Outcome::Failed(reset));
    };
    let (head, mut body) = response.into_parts();
    let mut message = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let Ok(chunk) = chunk else {
            return Ok(Outcome::Failed(reset));
        };
        // An error means that the stream is gone, which the next read tells.
        let _ = body.flow_control().release_capacity(chunk.len());
        message.extend_from_slice(&chunk);
    }
    let Ok(trailers) = body.trailers().await else {
        return Ok(Outcome::Failed(reset));
    };
    // A refusal without a body carries its status in the head.
    let trailers = trailers.as_ref().unwrap_or(&head.headers);
    let Some(code) = field(trailers, "grpc-status").and_then(|code| code.parse().ok()) else {
        return Err(format!("HTTP status {} without a gRPC status", head.status));
    };
    if code == 0 {
        return outcome(call, &message);
    }
    failure(call, code, field(trailers, "grpc-message").unwrap_or_default()).map(Outcome::Failed)
}

/// The socket, with or without TLS, as h2 wants it. Nobody is woken by it: the readiness loop polls the connection when the
/// socket is ready.
struct Wire {
    stream: TcpStream,
    tls: Option<Box<ClientConnection>>,
}

fn pending<T>(result: io::Result<T>) -> Poll<io::Result<T>> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Poll::Pending,
        other => Poll::Ready(other),
    }
}

/// Calls again what a signal interrupted.
fn again<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

impl Wire {
    fn read(&mut self, free: &mut [u8]) -> io::Result<usize> {
        let Some(tls) = &mut self.tls else {
            return again(|| self.stream.read(free));
        };
        loop {
            match tls.reader().read(free) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            if again(|| tls.read_tls(&mut self.stream))? == 0 {
                return Ok(0);
            }
            tls.process_new_packets()
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }

    /// Sends what TLS holds.
    fn drain(&mut self) -> io::Result<()> {
        if let Some(tls) = &mut self.tls {
            while tls.wants_write() {
                again(|| tls.write_tls(&mut self.stream))?;
            }
        }
        Ok(())
    }
}

impl AsyncRead for Wire {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        pending(self.read(buffer.initialize_unfilled())).map_ok(|read| buffer.advance(read))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.tls.is_none() {
            return pending(again(|| self.stream.write(bytes)));
        }
        // What was taken before goes first, so that the session's buffer stays within one write.
        if let Err(error) = self.drain() {
            return pending(Err(error));
        }
        let Some(tls) = &mut self.tls else {
            return Poll::Pending;
        };
        let written = tls.writer().write(bytes)?;
        match self.drain() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(written)),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        pending(self.drain())
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// One HTTP/2 connection with its calls under way.
struct Channel {
    addr: SocketAddr,
    connection: Connection<Wire, Bytes>,
    sender: SendRequest<Bytes>,
    calls: FuturesUnordered<Pin<Box<dyn Future<Output = Ended> + Send>>>,
    /// Calls beyond the streams the server allows.
    backlog: VecDeque<(Token, Call, Bytes)>,
    /// URI of each call, in the order of [`Call::ALL`].
    uris: Vec<Uri>,
    dirty: bool,
}

impl Channel {
    fn open(poll: &mio::Poll, index: usize, addr: SocketAddr, tls: Option<&Tls>) -> Result<Self, TargetError> {
        let (mut stream, session) = dial(NAME, addr, tls)?;
        poll.registry()
            .register(&mut stream, mio::Token(index), Interest::READABLE | Interest::WRITABLE)
            .map_err(TargetError::Loop)?;
        let wire = Wire { stream, tls: session };
        let unreachable = |message: String| TargetError::Unreachable {
            name: NAME.to_owned(),
            addr,
            message,
        };
        let handshake = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .initial_max_send_streams(FIRST_STREAMS)
            .handshake::<_, Bytes>(wire);
        let mut handshake = std::pin::pin!(handshake);
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let (sender, connection) = loop {
            match handshake.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(Ok(opened)) => break opened,
                Poll::Ready(Err(error)) => return Err(unreachable(error.to_string())),
                Poll::Pending if Instant::now() > deadline => return Err(unreachable("no HTTP/2 preface".to_owned())),
                Poll::Pending => std::thread::sleep(Duration::from_millis(1)),
            }
        };
        let scheme = if tls.is_some() { Scheme::HTTPS } else { Scheme::HTTP };
        let authority = Authority::try_from(addr.to_string()).map_err(|error| unreachable(error.to_string()))?;
        let uri = |call: Call| {
            let mut parts = http::uri::Parts::default();
            parts.scheme = Some(scheme.clone());
            parts.authority = Some(authority.clone());
            parts.path_and_query = Some(PathAndQuery::from_static(call.path()));
            Uri::from_parts(parts).map_err(|error| unreachable(error.to_string()))
        };
        Ok(Self {
            addr,
            connection,
            sender,
            calls: FuturesUnordered::new(),
            backlog: VecDeque::new(),
            uris: Call::ALL.into_iter().map(uri).collect::<Result<_, _>>()?,
            dirty: false,
        })
    }

    fn lost(&self, message: String) -> TargetError {
        TargetError::Lost {
            name: NAME.to_owned(),
            addr: self.addr,
            message,
        }
    }

    /// Opens a stream for each call that waits for one, as far as the server allows.
    fn start(&mut self, context: &mut Context<'_>) -> Result<(), TargetError> {
        while let Some((token, call, body)) = self.backlog.pop_front() {
            match self.sender.poll_ready(context) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Err(self.lost(error.to_string())),
                Poll::Pending => {
                    self.backlog.push_front((token, call, body));
                    return Ok(());
                }
            }
            let mut request = http::Request::new(());
            *request.method_mut() = Method::POST;
            *request.uri_mut() = self.uris[call as usize].clone();
            let headers = request.headers_mut();
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            let sent = self
                .sender
                .send_request(request, false)
                .and_then(|(response, mut body_out)| {
                    body_out.send_data(body, true)?;
                    Ok(response)
                });
            match sent {
                Ok(response) => self.calls.push(Box::pin(finish(token, call, response))),
                Err(error) => return Err(self.lost(error.to_string())),
            }
        }
        Ok(())
    }

    /// Lets the connection read and write what it can, and gathers the calls that ended.
    fn turn(&mut self, index: usize, completions: &mut Vec<Completion>) -> Result<(), TargetError> {
        let mut context = Context::from_waker(Waker::noop());
        loop {
            self.start(&mut context)?;
            match Pin::new(&mut self.connection).poll(&mut context) {
                Poll::Pending => {}
                Poll::Ready(Ok(())) => return Err(self.lost("the server closed the connection".to_owned())),
                Poll::Ready(Err(error)) => return Err(self.lost(error.to_string())),
            }
            let before = completions.len();
            while let Poll::Ready(Some((token, ended))) = self.calls.poll_next_unpin(&mut context) {
                let outcome = ended.map_err(|message| TargetError::Protocol {
                    name: NAME.to_owned(),
                    addr: self.addr,
                    message,
                })?;
                completions.push(Completion {
                    token,
                    connection: index,
                    outcome,
                });
            }
            // A stream that ended may have left a frame to send, and made room for another call.
            if completions.len() == before {
                return Ok(());
            }
        }
    }
}

/// Connections to one etcd or to the members of a cluster.
pub struct EtcdTarget {
    poll: mio::Poll,
    events: Events,
    channels: Vec<Channel>,
    dirty: Vec<usize>,
    /// Ended while requests were sent; reported by the next poll.
    ended: Vec<Completion>,
}

impl EtcdTarget {
    fn connect(addrs: &[SocketAddr], tls: Option<&Tls>, connections: usize) -> Result<Self, TargetError> {
        let poll = mio::Poll::new().map_err(TargetError::Loop)?;
        let channels = (0..connections)
            .map(|index| Channel::open(&poll, index, addrs[index % addrs.len()], tls))
            .collect::<Result<Vec<_>, _>>()?;
        let mut target = Self {
            poll,
            events: Events::with_capacity(1_024),
            channels,
            dirty: Vec::new(),
            ended: Vec::new(),
        };
        // The first answer also shows that it is an etcd, and brings the server's settings.
        for index in 0..connections {
            target.status(index)?;
        }
        Ok(target)
    }

    /// Asks for the status on one connection; whether its member leads the cluster.
    fn status(&mut self, index: usize) -> Result<bool, TargetError> {
        let channel = &mut self.channels[index];
        let addr = channel.addr;
        channel.backlog.push_back((0, Call::Status, frame(&StatusRequest {})));
        self.mark(index);
        let deadline = Instant::now() + CONNECT_TIMEOUT;
        let mut completions = Vec::new();
        while Instant::now() < deadline {
            self.flush()?;
            self.poll(Duration::from_millis(10), &mut completions)?;
            if let Some(completion) = completions.pop() {
                return Ok(matches!(completion.outcome, Outcome::Hit { version: 1 }));
            }
        }
        Err(TargetError::Unreachable {
            name: NAME.to_owned(),
            addr,
            message: "no status within 5 s".to_owned(),
        })
    }

    fn mark(&mut self, index: usize) {
        let channel = &mut self.channels[index];
        if !channel.dirty {
            channel.dirty = true;
            self.dirty.push(index);
        }
    }
}

impl Target for EtcdTarget {
    fn connections(&self) -> usize {
        self.channels.len()
    }

    fn submit(&mut self, connection: usize, token: Token, request: &Request<'_>) -> Result<(), TargetError> {
        let (call, body) = encode(request).map_err(|operation| TargetError::Unsupported {
            name: NAME.to_owned(),
            operation,
        })?;
        self.channels[connection].backlog.push_back((token, call, body));
        self.mark(connection);
        Ok(())
    }

    fn flush(&mut self) -> Result<(), TargetError> {
        while let Some(index) = self.dirty.pop() {
            self.channels[index].dirty = false;
            self.channels[index].turn(index, &mut self.ended)?;
        }
        Ok(())
    }

    fn poll(&mut self, wait: Duration, completions: &mut Vec<Completion>) -> Result<(), TargetError> {
        let wait = if self.ended.is_empty() { wait } else { Duration::ZERO };
        completions.append(&mut self.ended);
        match self.poll.poll(&mut self.events, Some(wait)) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
            Err(error) => return Err(TargetError::Loop(error)),
        }
        for event in &self.events {
            let index = event.token().0;
            self.channels[index].turn(index, completions)?;
        }
        Ok(())
    }
}

/// Where an etcd or its cluster is.
#[derive(Clone, Debug)]
pub struct EtcdConnector {
    /// `host:port` of each member that is to be used.
    pub endpoints: Vec<String>,
    /// Files for TLS, if it is to be used.
    pub tls: Option<TlsFiles>,
}

impl EtcdConnector {
    fn tls(&self) -> Result<Option<Tls>, TargetError> {
        let Some(files) = &self.tls else { return Ok(None) };
        let mut config = ClientConfig::clone(&*client_config(files)?);
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Some((Arc::new(config), files.server_name.clone())))
    }

    /// Whether the member at `addr` leads the cluster.
    pub fn leads(&self, addr: SocketAddr) -> Result<bool, TargetError> {
        EtcdTarget::connect(&[addr], self.tls()?.as_ref(), 1)?.status(0)
    }
}

/// Any member serves any key: slots are dealt out to the members that answer, as etcd's client balances.
impl Cluster for EtcdConnector {
    fn name(&self) -> String {
        Connector::name(self)
    }

    fn nodes(&self) -> Vec<SocketAddr> {
        self.endpoints
            .iter()
            .filter_map(|endpoint| resolve(endpoint).ok())
            .collect()
    }

    fn layout(&self, node: SocketAddr) -> Result<Layout, TargetError> {
        // Which node is asked does not matter, but it must be alive, so that a dead one's scout brings no layout.
        self.leads(node)?;
        let places: Vec<Place> = self
            .nodes()
            .into_iter()
            .filter(|addr| *addr == node || self.leads(*addr).is_ok())
            .map(|addr| Place { addr, core: 0 })
            .collect();
        let owner = (0..SLOTS).map(|slot| Some((slot % places.len()) as u16)).collect();
        Ok(Layout {
            version: 0,
            places,
            owner,
        })
    }

    fn connect_to(&self, place: Place, connections: usize) -> Result<Box<dyn Target>, TargetError> {
        let target = EtcdTarget::connect(&[place.addr], self.tls()?.as_ref(), connections)?;
        Ok(Box::new(target))
    }
}

impl Connector for EtcdConnector {
    fn name(&self) -> String {
        format!("{NAME}{}", if self.tls.is_some() { "-tls" } else { "" })
    }

    fn connect(&self, connections: usize) -> Result<Box<dyn Target>, TargetError> {
        let addrs = self
            .endpoints
            .iter()
            .map(|endpoint| resolve(endpoint))
            .collect::<Result<Vec<_>, _>>()?;
        if addrs.is_empty() {
            return Err(TargetError::Settings(
                "etcd needs at least one address (--addr)".to_owned(),
            ));
        }
        Ok(Box::new(EtcdTarget::connect(
            &addrs,
            self.tls()?.as_ref(),
            connections,
        )?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_bytes_of_the_published_interface() {
        let (call, bytes) = encode(&Request::Get {
            key: b"k",
            version: false,
        })
        .unwrap();
        assert_eq!((call, &bytes[..]), (Call::Get, &b"\0\0\0\0\x03\x0a\x01k"[..]));
        let (call, bytes) = encode(&Request::Put {
            key: b"k",
            value: b"vv",
            ttl_ms: 0,
        })
        .unwrap();
        assert_eq!((call, &bytes[..]), (Call::Put, &b"\0\0\0\0\x07\x0a\x01k\x12\x02vv"[..]));
        let (call, bytes) = encode(&Request::PutIfVersion {
            key: b"k",
            value: b"v",
            version: 7,
        })
        .unwrap();
        // compare { target: MOD, key: "k", mod_revision: 7 }, success { request_put { key, value } }
        let txn = b"\x0a\x07\x10\x02\x1a\x01k\x30\x07\x12\x08\x12\x06\x0a\x01k\x12\x01v";
        assert_eq!((call, &bytes[HEAD_LEN..]), (Call::Swap, &txn[..]));
        assert!(encode(&Request::Incr { key: b"k" }).is_err());
        assert!(
            encode(&Request::Put {
                key: b"k",
                value: b"v",
                ttl_ms: 1
            })
            .is_err()
        );
    }

    #[test]
    fn replies_are_sorted() {
        let body = |message: &[u8]| {
            let mut body = vec![0, 0, 0, 0, message.len() as u8];
            body.extend_from_slice(message);
            body
        };
        // kvs { key: "k", mod_revision: 9, value: "v" }; the fields that nobody reads are passed over.
        let hit = body(b"\x12\x08\x0a\x01k\x18\x09\x2a\x01v");
        assert_eq!(outcome(Call::Get, &hit), Ok(Outcome::Hit { version: 9 }));
        assert_eq!(outcome(Call::Get, &body(b"")), Ok(Outcome::Miss));
        assert_eq!(outcome(Call::Swap, &body(b"\x10\x01")), Ok(Outcome::Stored));
        assert_eq!(outcome(Call::Swap, &body(b"")), Ok(Outcome::Conflict));
        // responses { response_range { kvs { } } }, responses { response_range { } }
        let several = body(b"\x1a\x04\x0a\x02\x12\x00\x1a\x02\x0a\x00");
        assert_eq!(
            outcome(Call::MultiGet, &several),
            Ok(Outcome::Multi { hits: 1, misses: 1 })
        );
        for garbage in [
            &b""[..],
            b"\0\0\0",
            b"\0\0\0\0\x05abc",
            b"\x01\0\0\0\0",
            b"\0\0\0\0\x01\xff",
        ] {
            assert!(outcome(Call::Get, garbage).is_err(), "{garbage:?}");
        }
    }

    #[test]
    fn a_write_that_may_have_been_proposed_is_in_doubt() {
        let timed_out = "etcdserver: request timed out, possibly due to previous leader failure";
        assert_eq!(failure(Call::Put, 14, timed_out), Ok(Failure::InDoubt));
        assert_eq!(failure(Call::Get, 14, timed_out), Ok(Failure::Unavailable));
        assert_eq!(
            failure(Call::Put, 14, "etcdserver: no leader"),
            Ok(Failure::Unavailable)
        );
        assert_eq!(
            failure(Call::Put, 8, "etcdserver: mvcc: database space exceeded"),
            Ok(Failure::OutOfMemory)
        );
        assert_eq!(
            failure(Call::Put, 8, "etcdserver: too many requests"),
            Ok(Failure::Busy)
        );
        assert!(failure(Call::Get, 12, "unknown service").is_err());
    }
}
