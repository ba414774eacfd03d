//! Redis and Valkey over RESP2: one server, or the masters of a cluster.
//!
//! In a cluster each connection stands for one stream to every master; a request goes to the master of
//! its key's slot, as a cluster client does. A `MOVED` reply corrects the slot table.

use std::net::SocketAddr;
use std::time::Duration;

use redis_protocol::resp2::decode::decode_range;
use redis_protocol::resp2::types::RangeFrame;

use super::cluster::{Cluster, Layout, Place, SLOTS};
use super::stream::{Expected, StreamProtocol, StreamTarget};
use super::tls::{TlsFiles, client_config};
use super::{Completion, Connector, Failure, Outcome, Request, Target, TargetError, Token, resolve};

/// RESP2, as redis and valkey speak it by default.
#[derive(Debug, Default)]
pub struct Resp {
    /// The last `MOVED`: slot and new address.
    moved: Option<(u16, String)>,
}

fn push_number(out: &mut Vec<u8>, mut number: u64) {
    let mut digits = [0_u8; 20];
    let mut at = digits.len();
    loop {
        at -= 1;
        digits[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[at..]);
}

fn push_bulk(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(b'$');
    push_number(out, bytes.len() as u64);
    out.extend_from_slice(b"\r\n");
    out.extend_from_slice(bytes);
    out.extend_from_slice(b"\r\n");
}

impl StreamProtocol for Resp {
    fn encode(&mut self, request: &Request<'_>, out: &mut Vec<u8>) -> Result<Expected, &'static str> {
        match *request {
            Request::Get { version: true, .. } | Request::PutIfVersion { .. } => return Err("compare-and-swap"),
            Request::Get { key, version: false } => {
                out.extend_from_slice(b"*2\r\n$3\r\nGET\r\n");
                push_bulk(out, key);
            }
            Request::Put { key, value, ttl_ms } => {
                let head: &[u8] = if ttl_ms == 0 {
                    b"*3\r\n$3\r\nSET\r\n"
                } else {
                    b"*5\r\n$3\r\nSET\r\n"
                };
                out.extend_from_slice(head);
                push_bulk(out, key);
                push_bulk(out, value);
                if ttl_ms > 0 {
                    out.extend_from_slice(b"$2\r\nPX\r\n");
                    push_bulk(out, ttl_ms.to_string().as_bytes());
                }
            }
            Request::Incr { key } => {
                out.extend_from_slice(b"*2\r\n$4\r\nINCR\r\n");
                push_bulk(out, key);
            }
            Request::MultiGet { keys, key_len } => {
                out.push(b'*');
                push_number(out, 1 + (keys.len() / key_len) as u64);
                out.extend_from_slice(b"\r\n$4\r\nMGET\r\n");
                for key in keys.chunks_exact(key_len) {
                    push_bulk(out, key);
                }
            }
        }
        Ok(Expected::ONE)
    }

    fn decode(&mut self, bytes: &[u8]) -> Result<Option<(usize, Outcome)>, String> {
        let Some((frame, length)) = decode_range(bytes).map_err(|error| error.to_string())? else {
            return Ok(None);
        };
        let outcome = match frame {
            RangeFrame::BulkString(_) => Outcome::Hit { version: 0 },
            RangeFrame::Null => Outcome::Miss,
            RangeFrame::SimpleString(_) | RangeFrame::Integer(_) => Outcome::Stored,
            RangeFrame::Array(items) => {
                let misses = items.iter().filter(|item| matches!(item, RangeFrame::Null)).count() as u32;
                Outcome::Multi {
                    hits: items.len() as u32 - misses,
                    misses,
                }
            }
            RangeFrame::Error((from, to)) => {
                let text = String::from_utf8_lossy(&bytes[from..to]).into_owned();
                Outcome::Failed(self.failure(&text)?)
            }
        };
        Ok(Some((length, outcome)))
    }
}

impl Resp {
    /// Sorts an error reply.
    ///
    /// # Errors
    /// The reply itself, when it means that nothing this session sends can work.
    fn failure(&mut self, text: &str) -> Result<Failure, String> {
        let mut words = text.split_ascii_whitespace();
        Ok(match words.next().unwrap_or_default() {
            "MOVED" => {
                if let (Some(slot), Some(addr)) = (words.next().and_then(|slot| slot.parse().ok()), words.next()) {
                    self.moved = Some((slot, addr.to_owned()));
                }
                Failure::Unavailable
            }
            "NOAUTH" | "WRONGPASS" | "NOPERM" => return Err(text.to_owned()),
            "OOM" => Failure::OutOfMemory,
            "BUSY" => Failure::Busy,
            "CLUSTERDOWN" | "TRYAGAIN" | "LOADING" | "MASTERDOWN" | "NOREPLICAS" | "READONLY" | "ASK" => {
                Failure::Unavailable
            }
            _ => Failure::Rejected,
        })
    }
}

/// Where a redis or valkey is, and how to speak to it.
#[derive(Clone, Debug)]
pub struct RespConnector {
    /// `host:port`.
    pub addr: String,
    /// Files for TLS, if it is to be used.
    pub tls: Option<TlsFiles>,
    /// Whether to ask for the slots and speak to every master.
    pub cluster: bool,
}

impl Connector for RespConnector {
    fn name(&self) -> String {
        format!(
            "redis{}{}",
            if self.cluster { "-cluster" } else { "" },
            if self.tls.is_some() { "-tls" } else { "" }
        )
    }

    fn connect(&self, connections: usize) -> Result<Box<dyn Target>, TargetError> {
        let name = self.name();
        let addr = resolve(&self.addr)?;
        let tls = match &self.tls {
            Some(files) => Some((client_config(files)?, files.server_name.clone())),
            None => None,
        };
        if !self.cluster {
            let addrs = vec![addr; connections];
            return Ok(Box::new(StreamTarget::connect(
                &name,
                &addrs,
                tls.as_ref(),
                Resp::default(),
            )?));
        }
        let mut seed = StreamTarget::connect(&name, &[addr], tls.as_ref(), ClusterSlots::default())?;
        let slots = ClusterSlots::fetch(&name, addr, &mut seed)?;
        if slots.owner.contains(&NOBODY) {
            return Err(TargetError::Unreachable {
                name,
                addr,
                message: "some slots have no master: wait until cluster_state is ok".to_owned(),
            });
        }
        let addrs: Vec<_> = (0..connections).flat_map(|_| slots.masters.iter().copied()).collect();
        Ok(Box::new(ClusterTarget {
            streams: StreamTarget::connect(&name, &addrs, tls.as_ref(), Resp::default())?,
            connections,
            masters: slots.masters,
            owner: slots.owner,
        }))
    }
}

/// A cluster whose masters may die.
#[derive(Clone, Debug)]
pub struct RespCluster {
    /// Addresses of all nodes, replicas included.
    pub nodes: Vec<SocketAddr>,
}

impl RespCluster {
    const NAME: &'static str = "redis-cluster";
}

impl Cluster for RespCluster {
    fn name(&self) -> String {
        Self::NAME.to_owned()
    }

    fn nodes(&self) -> Vec<SocketAddr> {
        self.nodes.clone()
    }

    fn layout(&self, node: SocketAddr) -> Result<Layout, TargetError> {
        let mut seed = StreamTarget::connect(Self::NAME, &[node], None, ClusterSlots::default())?;
        let slots = ClusterSlots::fetch(Self::NAME, node, &mut seed)?;
        let place = |addr: &SocketAddr| Place { addr: *addr, core: 0 };
        Ok(Layout {
            version: 0,
            places: slots.masters.iter().map(place).collect(),
            owner: slots
                .owner
                .iter()
                .map(|owner| (*owner != NOBODY).then_some(*owner))
                .collect(),
        })
    }

    fn connect_to(&self, place: Place, connections: usize) -> Result<Box<dyn Target>, TargetError> {
        let addrs = vec![place.addr; connections];
        Ok(Box::new(StreamTarget::connect(
            Self::NAME,
            &addrs,
            None,
            Resp::default(),
        )?))
    }
}

/// One stream to every master for each connection.
struct ClusterTarget {
    streams: StreamTarget<Resp>,
    connections: usize,
    masters: Vec<SocketAddr>,
    /// Master of each slot.
    owner: Vec<u16>,
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
            Request::MultiGet { .. } => {
                return Err(TargetError::Unsupported {
                    name: "redis-cluster".to_owned(),
                    operation: "multi-get across slots",
                });
            }
        };
        let master = self.owner[usize::from(generation_proto::slot::slot_of(key))];
        self.streams.submit_on(
            connection * self.masters.len() + usize::from(master),
            connection,
            token,
            request,
        )
    }

    fn flush(&mut self) -> Result<(), TargetError> {
        self.streams.flush()
    }

    fn poll(&mut self, wait: Duration, completions: &mut Vec<Completion>) -> Result<(), TargetError> {
        self.streams.poll(wait, completions)?;
        if let Some((slot, addr)) = self.streams.protocol_mut().moved.take() {
            let master = addr
                .parse()
                .ok()
                .and_then(|addr| self.masters.iter().position(|master| *master == addr));
            if let (Some(owner), Some(master)) = (self.owner.get_mut(usize::from(slot)), master) {
                *owner = master as u16;
            }
        }
        Ok(())
    }
}

/// Stands for the master of a slot that has none.
const NOBODY: u16 = u16::MAX;

/// Reads `CLUSTER SLOTS`.
#[derive(Debug, Default)]
struct ClusterSlots {
    masters: Vec<SocketAddr>,
    owner: Vec<u16>,
}

impl StreamProtocol for ClusterSlots {
    fn encode(&mut self, _: &Request<'_>, out: &mut Vec<u8>) -> Result<Expected, &'static str> {
        out.extend_from_slice(b"*2\r\n$7\r\nCLUSTER\r\n$5\r\nSLOTS\r\n");
        Ok(Expected::ONE)
    }

    fn decode(&mut self, bytes: &[u8]) -> Result<Option<(usize, Outcome)>, String> {
        let Some((frame, length)) = decode_range(bytes).map_err(|error| error.to_string())? else {
            return Ok(None);
        };
        let RangeFrame::Array(ranges) = frame else {
            return Err("CLUSTER SLOTS was refused: is it running with cluster-enabled yes?".to_owned());
        };
        self.owner = vec![NOBODY; SLOTS];
        for range in ranges {
            let RangeFrame::Array(range) = range else {
                return Err("CLUSTER SLOTS: expected an array".to_owned());
            };
            let (Some(RangeFrame::Integer(from)), Some(RangeFrame::Integer(to)), Some(RangeFrame::Array(node))) =
                (range.first(), range.get(1), range.get(2))
            else {
                return Err("CLUSTER SLOTS: expected first slot, last slot and node".to_owned());
            };
            let (Some(RangeFrame::BulkString((start, end))), Some(RangeFrame::Integer(port))) =
                (node.first(), node.get(1))
            else {
                return Err("CLUSTER SLOTS: expected host and port".to_owned());
            };
            let host = String::from_utf8_lossy(&bytes[*start..*end]);
            let addr = resolve(&format!("{host}:{port}")).map_err(|error| error.to_string())?;
            let master = self
                .masters
                .iter()
                .position(|master| *master == addr)
                .unwrap_or_else(|| {
                    self.masters.push(addr);
                    self.masters.len() - 1
                });
            let (Ok(from), Ok(to)) = (usize::try_from(*from), usize::try_from(*to)) else {
                return Err("CLUSTER SLOTS: a negative slot".to_owned());
            };
            let Some(owners) = self.owner.get_mut(from..=to) else {
                return Err(format!("CLUSTER SLOTS: a range {from} to {to}"));
            };
            owners.fill(master as u16);
        }
        Ok(Some((length, Outcome::Stored)))
    }
}

impl ClusterSlots {
    fn fetch(name: &str, addr: SocketAddr, seed: &mut StreamTarget<Self>) -> Result<Self, TargetError> {
        seed.submit(
            0,
            0,
            &Request::Get {
                key: b"",
                version: false,
            },
        )?;
        seed.flush()?;
        let mut completions = Vec::new();
        for _ in 0..50 {
            seed.poll(Duration::from_millis(100), &mut completions)?;
            if !completions.is_empty() {
                return Ok(std::mem::take(seed.protocol_mut()));
            }
        }
        let message = "no answer to CLUSTER SLOTS within 5 s".to_owned();
        Err(TargetError::Unreachable {
            name: name.to_owned(),
            addr,
            message,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encode(request: &Request<'_>) -> String {
        let mut out = Vec::new();
        Resp::default().encode(request, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn requests_are_resp_arrays() {
        assert_eq!(
            encode(&Request::Get {
                key: b"k1",
                version: false
            }),
            "*2\r\n$3\r\nGET\r\n$2\r\nk1\r\n"
        );
        assert_eq!(
            encode(&Request::Put {
                key: b"k1",
                value: b"0123456789",
                ttl_ms: 1_500
            }),
            "*5\r\n$3\r\nSET\r\n$2\r\nk1\r\n$10\r\n0123456789\r\n$2\r\nPX\r\n$4\r\n1500\r\n"
        );
        assert_eq!(
            encode(&Request::MultiGet {
                keys: b"k1k2",
                key_len: 2
            }),
            "*3\r\n$4\r\nMGET\r\n$2\r\nk1\r\n$2\r\nk2\r\n"
        );
    }

    #[test]
    fn replies_are_sorted_and_partial_ones_wait() {
        let mut resp = Resp::default();
        assert_eq!(resp.decode(b"$3\r\nab").unwrap(), None);
        assert_eq!(
            resp.decode(b"$3\r\nabc\r\n+OK").unwrap(),
            Some((9, Outcome::Hit { version: 0 }))
        );
        assert_eq!(resp.decode(b"$-1\r\n").unwrap(), Some((5, Outcome::Miss)));
        assert_eq!(resp.decode(b"+OK\r\n").unwrap(), Some((5, Outcome::Stored)));
        assert_eq!(
            resp.decode(b"*2\r\n$1\r\na\r\n$-1\r\n").unwrap(),
            Some((16, Outcome::Multi { hits: 1, misses: 1 }))
        );
        assert_eq!(
            resp.decode(b"-OOM no memory\r\n").unwrap().unwrap().1,
            Outcome::Failed(Failure::OutOfMemory)
        );
        assert_eq!(
            resp.decode(b"-MOVED 7 127.0.0.1:7001\r\n").unwrap().unwrap().1,
            Outcome::Failed(Failure::Unavailable)
        );
        assert_eq!(resp.moved, Some((7, "127.0.0.1:7001".to_owned())));
        assert!(resp.decode(b"-NOAUTH Authentication required.\r\n").is_err());
        assert!(resp.decode(b"HTTP/1.1 400\r\n").is_err());
    }
}
