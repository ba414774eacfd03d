//! etcd over its gRPC interface: HTTP/2 by h2, messages by prost, on the generator's own readiness loop.
//!
//! The messages are declared in [`calls`], with the few fields that are used and the numbers of etcd's `rpc.proto` (API v3), so
//! that nothing generates code at build time and no `protoc` is needed. A connection is one HTTP/2 connection; requests on
//! it travel as concurrent streams. With several endpoints the connections are dealt out in turn, as etcd's own client
//! balances. Reads are linearizable, etcd's default.

mod calls;
mod wire;

use std::collections::VecDeque;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use h2::client::{Connection, ResponseFuture, SendRequest};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderValue, Method, Uri, header};
use mio::{Events, Interest};
use rustls::ClientConfig;

use calls::{Call, encode, failure, outcome, status_request};
use wire::Wire;

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
        channel.backlog.push_back((0, Call::Status, status_request()));
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
