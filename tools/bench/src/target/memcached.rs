//! Memcached over its meta text protocol (`mg`, `ms`, `ma`), one reply a command.
//!
//! Meta commands instead of `get`: older servers send one packet for each pipelined `get`, which would
//! measure their packets and not their cache. The protocol is protocol.txt in memcached's source.

use super::stream::{Expected, StreamProtocol, StreamTarget};
use super::tls::{TlsFiles, client_config};
use super::{Connector, Failure, Outcome, Request, Target, TargetError, resolve};

/// The meta text protocol.
#[derive(Debug, Default)]
pub struct Meta;

/// A reply's first line is never longer than this.
const MAX_LINE_BYTES: usize = 2_048;

impl StreamProtocol for Meta {
    fn encode(&mut self, request: &Request<'_>, out: &mut Vec<u8>) -> Result<Expected, &'static str> {
        let set = |out: &mut Vec<u8>, key: &[u8], value: &[u8], flags: &str| {
            out.extend_from_slice(b"ms ");
            out.extend_from_slice(key);
            out.push(b' ');
            out.extend_from_slice(value.len().to_string().as_bytes());
            out.extend_from_slice(flags.as_bytes());
            out.extend_from_slice(b"\r\n");
            out.extend_from_slice(value);
            out.extend_from_slice(b"\r\n");
        };
        match *request {
            Request::Get { key, version } => {
                out.extend_from_slice(b"mg ");
                out.extend_from_slice(key);
                out.extend_from_slice(if version { b" v c\r\n" } else { b" v\r\n" });
            }
            Request::Put { key, value, ttl_ms: 0 } => set(out, key, value, ""),
            Request::Put { key, value, ttl_ms } => set(out, key, value, &format!(" T{}", ttl_ms.div_ceil(1_000))),
            Request::PutIfVersion { key, value, version } => set(out, key, value, &format!(" C{version}")),
            Request::Incr { key } => {
                out.extend_from_slice(b"ma ");
                out.extend_from_slice(key);
                out.extend_from_slice(b" N0 J1\r\n");
            }
            Request::MultiGet { keys, key_len } => {
                for key in keys.chunks_exact(key_len) {
                    out.extend_from_slice(b"mg ");
                    out.extend_from_slice(key);
                    out.extend_from_slice(b" v\r\n");
                }
                let replies = (keys.len() / key_len) as u32;
                return Ok(Expected {
                    replies,
                    multi: true,
                    ..Expected::ONE
                });
            }
        }
        Ok(Expected::ONE)
    }

    fn decode(&mut self, bytes: &[u8]) -> Result<Option<(usize, Outcome)>, String> {
        let head = &bytes[..bytes.len().min(MAX_LINE_BYTES)];
        let Some(end) = head.iter().position(|byte| *byte == b'\n') else {
            return if head.len() == MAX_LINE_BYTES {
                Err("a line without end".to_owned())
            } else {
                Ok(None)
            };
        };
        let line = head[..end].strip_suffix(b"\r").unwrap_or(&head[..end]);
        let mut fields = line.split(|byte| *byte == b' ');
        let outcome = match fields.next().unwrap_or_default() {
            b"VA" => {
                let number = |field: &[u8]| {
                    std::str::from_utf8(field)
                        .ok()
                        .and_then(|text| text.parse::<u64>().ok())
                };
                let length = fields.next().and_then(number).ok_or("VA without a length")?;
                let version = fields
                    .find_map(|field| field.strip_prefix(b"c"))
                    .and_then(number)
                    .unwrap_or(0);
                let length = usize::try_from(length)
                    .ok()
                    .filter(|length| *length <= 1 << 30)
                    .ok_or("VA too long")?;
                let total = end + 1 + length + 2;
                return Ok((bytes.len() >= total).then_some((total, Outcome::Hit { version })));
            }
            b"EN" | b"NF" => Outcome::Miss,
            b"HD" => Outcome::Stored,
            b"EX" => Outcome::Conflict,
            b"NS" | b"CLIENT_ERROR" => Outcome::Failed(Failure::Rejected),
            b"SERVER_ERROR" => {
                let memory = line.windows(6).any(|word| word == b"memory");
                Outcome::Failed(if memory { Failure::OutOfMemory } else { Failure::Busy })
            }
            b"ERROR" => return Err("it knows no meta commands: memcached 1.6 or newer is needed".to_owned()),
            _ => return Err(format!("unexpected reply {:?}", String::from_utf8_lossy(line))),
        };
        Ok(Some((end + 1, outcome)))
    }
}

/// Where a memcached is.
#[derive(Clone, Debug)]
pub struct MemcachedConnector {
    /// `host:port`.
    pub addr: String,
    /// Files for TLS, if it is to be used.
    pub tls: Option<TlsFiles>,
}

impl Connector for MemcachedConnector {
    fn name(&self) -> String {
        format!("memcached{}", if self.tls.is_some() { "-tls" } else { "" })
    }

    fn connect(&self, connections: usize) -> Result<Box<dyn Target>, TargetError> {
        let addrs = vec![resolve(&self.addr)?; connections];
        let tls = match &self.tls {
            Some(files) => Some((client_config(files)?, files.server_name.clone())),
            None => None,
        };
        Ok(Box::new(StreamTarget::connect(
            &self.name(),
            &addrs,
            tls.as_ref(),
            Meta,
        )?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_meta_commands() {
        let encode = |request: &Request<'_>| {
            let mut out = Vec::new();
            let expected = Meta.encode(request, &mut out).unwrap();
            (String::from_utf8(out).unwrap(), expected.replies)
        };
        assert_eq!(
            encode(&Request::Get {
                key: b"k",
                version: true
            }),
            ("mg k v c\r\n".to_owned(), 1)
        );
        assert_eq!(
            encode(&Request::Put {
                key: b"k",
                value: b"abc",
                ttl_ms: 1_001
            }),
            ("ms k 3 T2\r\nabc\r\n".to_owned(), 1)
        );
        assert_eq!(
            encode(&Request::MultiGet {
                keys: b"ab",
                key_len: 1
            }),
            ("mg a v\r\nmg b v\r\n".to_owned(), 2)
        );
    }

    #[test]
    fn replies_are_sorted_and_partial_ones_wait() {
        assert_eq!(Meta.decode(b"VA 3 c77\r\nab").unwrap(), None);
        assert_eq!(
            Meta.decode(b"VA 3 c77\r\nabc\r\nEN\r\n").unwrap(),
            Some((15, Outcome::Hit { version: 77 }))
        );
        assert_eq!(Meta.decode(b"EN\r\n").unwrap(), Some((4, Outcome::Miss)));
        assert_eq!(Meta.decode(b"EX\r\n").unwrap(), Some((4, Outcome::Conflict)));
        let memory = Meta
            .decode(b"SERVER_ERROR out of memory storing object\r\n")
            .unwrap()
            .unwrap();
        assert_eq!(memory.1, Outcome::Failed(Failure::OutOfMemory));
        for garbage in [
            &b"VA 99999999999999999999\r\n"[..],
            b"VA\r\n",
            b"VA 18446744073709551615\r\n",
            b"ERROR\r\n",
            b"x\r\n",
        ] {
            assert!(Meta.decode(garbage).is_err());
        }
        assert!(Meta.decode(&[b'x'; 4_096]).is_err());
    }
}
