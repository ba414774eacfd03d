//! One UDP port shared by all cores: binding, buffers, steering, and batched receive and send on one core's socket.
//!
//! All sockets of a port are bound in the order of their cores by one thread, then the steering program is attached, then each is
//! handed to its core. None is ever bound again alone: the kernel would move the last socket into the hole and shift the cores.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use generation_node::env::{Datagram, Transmit};
use quinn_udp::{BATCH_SIZE, EcnCodepoint, RecvMeta, UdpSockRef, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

use super::steering;

/// Largest GRO train the kernel hands over: the largest UDP payload.
const TRAIN_MAX_BYTES: usize = 65_535;
/// Messages a receive call asks for while it finds few; it asks for [`BATCH_SIZE`] as long as calls come back full.
const SMALL_BATCH: usize = 8;
const _: () = assert!(SMALL_BATCH <= BATCH_SIZE);
/// How long a port that is still busy is tried again: a process that just died may hold it for a moment.
const BUSY_RETRY: Duration = Duration::from_millis(500);

/// Why a port could not be opened. Nothing stays bound.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// Something else has the port.
    #[error(
        "UDP {address} is in use by another process; stop it (`ss -lunp 'sport = :{port}'` names it) or choose another port"
    )]
    InUse {
        /// The address asked for.
        address: SocketAddr,
        /// Its port.
        port: u16,
    },
    /// The port is below 1024 or so and the process may not take it.
    #[error("UDP {0} may not be bound by this user; choose a port from 1024 up or grant CAP_NET_BIND_SERVICE")]
    Denied(SocketAddr),
    /// No interface has the address.
    #[error("{0} is not an address of this machine; `ip address` lists those it has")]
    NotLocal(SocketAddr),
    /// The kernel refused for another reason.
    #[error("cannot open UDP {address}: {error}")]
    Os {
        /// The address asked for.
        address: SocketAddr,
        /// What the kernel said.
        error: io::Error,
    },
}

impl PortError {
    pub(crate) fn new(address: SocketAddr, error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::AddrInUse => Self::InUse {
                address,
                port: address.port(),
            },
            io::ErrorKind::PermissionDenied => Self::Denied(address),
            io::ErrorKind::AddrNotAvailable => Self::NotLocal(address),
            _ => Self::Os { address, error },
        }
    }
}

/// The bound sockets of a node, one per core, in order.
#[derive(Debug)]
pub struct Port {
    /// The address they share; its port is the real one where 0 was asked for.
    pub address: SocketAddr,
    /// The sockets, by core.
    pub sockets: Vec<UdpSocket>,
    /// Whether the kernel steers by connection id. Without it datagrams reach some core, which forwards them.
    pub steered: bool,
}

/// Binds `cores` sockets to `address` and steers among them. `buffer_bytes` is asked for each socket's receive and send buffer;
/// the kernel grants at most its own limits (`net.core.rmem_max`, `net.core.wmem_max`).
pub fn open(address: SocketAddr, cores: u16, buffer_bytes: usize) -> Result<Port, PortError> {
    probe(address)?;
    let failure = |error| PortError::new(address, error);
    let mut bound = address;
    let mut sockets = Vec::with_capacity(usize::from(cores));
    for _ in 0..cores {
        let socket = socket(address).map_err(failure)?;
        socket.set_reuse_port(true).map_err(failure)?;
        socket.set_recv_buffer_size(buffer_bytes).map_err(failure)?;
        socket.set_send_buffer_size(buffer_bytes).map_err(failure)?;
        socket.bind(&bound.into()).map_err(failure)?;
        let socket = UdpSocket::from(socket);
        bound = socket.local_addr().map_err(failure)?;
        sockets.push(socket);
    }
    let steered = cores == 1
        || steering::attach(&sockets[0], cores)
            .inspect_err(|error| tracing::warn!(%error, "no steering by connection id: datagrams cross cores"))
            .is_ok();
    Ok(Port {
        address: bound,
        sockets,
        steered,
    })
}

/// Binds one socket that does not block to `address`, for one thread alone.
pub(crate) fn open_one(address: SocketAddr) -> Result<UdpSocket, PortError> {
    let failure = |error| PortError::new(address, error);
    let socket = UdpSocket::from(claim(address)?);
    socket.set_nonblocking(true).map_err(failure)?;
    Ok(socket)
}

/// Fails if anybody else holds the port. A shared port would let a second server of the same user in without a word.
fn probe(address: SocketAddr) -> Result<(), PortError> {
    claim(address).map(drop)
}

/// Binds a socket, and waits a moment for a port that is busy.
fn claim(address: SocketAddr) -> Result<Socket, PortError> {
    let give_up = Instant::now() + BUSY_RETRY;
    loop {
        match socket(address).and_then(|socket| socket.bind(&address.into()).map(|()| socket)) {
            Ok(socket) => return Ok(socket),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < give_up => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(PortError::new(address, error)),
        }
    }
}

fn socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        // `[::]` serves IPv4 as well.
        socket.set_only_v6(false)?;
    }
    Ok(socket)
}

/// The receive side's memory and what was received but not yet taken.
struct Inbox {
    /// [`BATCH_SIZE`] buffers of [`TRAIN_MAX_BYTES`]. The kernel writes here; what arrived is copied out, so that a datagram that
    /// is kept for long (out-of-order data) keeps its own bytes alive and not a whole buffer.
    buffers: Vec<Vec<u8>>,
    ready: VecDeque<Datagram>,
    /// Whether the last call came back full.
    full: bool,
}

/// One core's socket.
pub struct CoreSocket {
    socket: UdpSocket,
    state: UdpSocketState,
    inbox: RefCell<Inbox>,
    blocked: Cell<bool>,
}

impl CoreSocket {
    /// Takes one socket of a [`Port`] into use: non-blocking, GRO on, ECN and local addresses reported.
    pub fn new(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new(UdpSockRef::from(&socket))?;
        let buffers = (0..BATCH_SIZE).map(|_| vec![0; TRAIN_MAX_BYTES]).collect();
        let inbox = Inbox {
            buffers,
            ready: VecDeque::new(),
            full: false,
        };
        Ok(Self {
            socket,
            state,
            inbox: RefCell::new(inbox),
            blocked: Cell::new(false),
        })
    }

    /// The descriptor, for waiting on it.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether the kernel may fragment what is sent, in which case a path's MTU cannot be probed.
    pub fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    /// Whether the last datagram offered found the send buffer full.
    pub fn send_blocked(&self) -> bool {
        self.blocked.get()
    }

    /// Whether datagrams wait in memory (not in the kernel).
    pub fn has_ready(&self) -> bool {
        !self.inbox.borrow().ready.is_empty()
    }

    /// Appends datagrams that have arrived, at most `limit`; returns how many.
    pub fn receive(&self, limit: usize, datagrams: &mut Vec<Datagram>) -> usize {
        let mut inbox = self.inbox.borrow_mut();
        let before = datagrams.len();
        loop {
            let wanted = limit - (datagrams.len() - before);
            let take = wanted.min(inbox.ready.len());
            datagrams.extend(inbox.ready.drain(..take));
            if datagrams.len() - before == limit || !self.fill(&mut inbox) {
                return datagrams.len() - before;
            }
        }
    }

    /// Receives one batch into memory. Returns whether anything came.
    pub fn fill_ready(&self) -> bool {
        self.fill(&mut self.inbox.borrow_mut())
    }

    fn fill(&self, inbox: &mut Inbox) -> bool {
        // What a call asks for has to be laid out first, so an idle core asks for little.
        if inbox.full {
            self.fill_batch::<BATCH_SIZE>(inbox)
        } else {
            self.fill_batch::<SMALL_BATCH>(inbox)
        }
    }

    fn fill_batch<const BATCH: usize>(&self, inbox: &mut Inbox) -> bool {
        let mut meta = [RecvMeta::default(); BATCH];
        let mut buffers = inbox.buffers.iter_mut().map(|buffer| IoSliceMut::new(buffer));
        let mut slices: [IoSliceMut<'_>; BATCH] =
            std::array::from_fn(|_| buffers.next().expect("invariant: the inbox has BATCH_SIZE buffers"));
        let messages = loop {
            match self.state.recv(UdpSockRef::from(&self.socket), &mut slices, &mut meta) {
                Ok(messages) => break messages,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Nothing has arrived; or an ICMP error of an earlier datagram, which is that datagram's loss and no more.
                Err(_) => {
                    inbox.full = false;
                    return false;
                }
            }
        };
        inbox.full = messages == BATCH;
        for (meta, buffer) in meta[..messages].iter().zip(&inbox.buffers) {
            let mut train = BytesMut::from(&buffer[..meta.len]);
            let mut datagram = |payload| {
                inbox.ready.push_back(Datagram {
                    remote: meta.addr,
                    local_ip: meta.dst_ip,
                    ecn: meta.ecn.map_or(0, |ecn| ecn as u8),
                    payload,
                });
            };
            while meta.stride > 0 && train.len() > meta.stride {
                datagram(train.split_to(meta.stride));
            }
            if !train.is_empty() {
                datagram(train);
            }
        }
        messages > 0
    }

    /// Sends a datagram or a train of them; `false` if the send buffer is full and nothing of it was sent.
    pub fn transmit(&self, transmit: &Transmit, payload: &[u8]) -> bool {
        let segments = self.state.max_gso_segments();
        let sent = match transmit.segment_size {
            Some(size) if size > 0 && payload.len() > size * segments => {
                // More than the kernel takes in one call (without GSO that is one). What does not fit any more after a first
                // part was sent counts as lost.
                let mut parts = payload.chunks(size * segments.max(1));
                let first = parts.next().is_none_or(|part| self.send(transmit, part));
                first && {
                    parts.all(|part| self.send(transmit, part));
                    true
                }
            }
            _ => self.send(transmit, payload),
        };
        self.blocked.set(!sent);
        sent
    }

    /// Sends what one call takes; `false` if the send buffer is full.
    fn send(&self, transmit: &Transmit, payload: &[u8]) -> bool {
        let segment_size = transmit.segment_size.filter(|size| *size < payload.len());
        let transmit = quinn_udp::Transmit {
            destination: transmit.remote,
            ecn: EcnCodepoint::from_bits(transmit.ecn),
            contents: payload,
            segment_size,
            src_ip: transmit.local_ip,
        };
        loop {
            match self.state.try_send(UdpSockRef::from(&self.socket), &transmit) {
                Ok(()) => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => {
                    // An unreachable peer or a datagram past the path's MTU: lost, as on any network.
                    tracing::trace!(%error, remote = %transmit.destination, "datagram not sent");
                    return true;
                }
            }
        }
    }
}
