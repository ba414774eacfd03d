//! Redis and Valkey: one server without persistence, or a cluster of three masters with a replica each.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use redis_protocol::resp2::decode::decode_range;
use redis_protocol::resp2::types::RangeFrame;

use super::{Certificates, PeerError, START_TIMEOUT};

/// Masters of a cluster; each has one replica.
pub(super) const MASTERS: usize = 3;
/// Time in which a node must answer before its cluster holds it for dead, in milliseconds. The default of 15 s would make every
/// failover look worse than operators who care configure it.
const NODE_TIMEOUT_MS: u32 = 5_000;
/// Slots of a cluster.
const SLOTS: usize = 16_384;
/// What has become of a write when a lone server acknowledges it.
pub(super) const DURABILITY: &str = "memory (no RDB, no AOF)";
/// What has become of a write when a master acknowledges it.
pub(super) const CLUSTER_DURABILITY: &str = "memory of one node, replicated after the reply (no RDB, no AOF)";
/// How long a command of ours may take.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) fn arguments(command: &mut Command, directory: &Path, port: u16, certificates: Option<&Certificates>) {
    let port = port.to_string();
    command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]);
    command.args(["--daemonize", "no"]).arg("--dir").arg(directory);
    if let Some(certificates) = certificates {
        command.args(["--port", "0", "--tls-port", &port, "--tls-auth-clients", "no"]);
        command.arg("--tls-cert-file").arg(&certificates.certificate);
        command.arg("--tls-key-file").arg(&certificates.key);
        command.arg("--tls-ca-cert-file").arg(&certificates.ca);
    } else {
        command.args(["--port", &port]);
    }
}

/// What makes a server a member of a cluster; its bus has a port of its own.
pub(super) fn cluster_arguments(command: &mut Command, bus_port: u16) {
    command.args(["--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"]);
    command.args(["--cluster-node-timeout", &NODE_TIMEOUT_MS.to_string()]);
    command.args(["--cluster-port", &bus_port.to_string()]);
}

/// Makes one cluster of running members: the first [`MASTERS`] get the slots, each of the others replicates one of them.
pub(super) fn form_cluster(name: &str, nodes: &[(SocketAddr, u16)]) -> Result<(), PeerError> {
    let failed = |message: String| PeerError::NotStarted {
        name: name.to_owned(),
        message,
    };
    let ask = |node: SocketAddr, words: &[&str]| command(node, words).map_err(failed);
    let deadline = Instant::now() + START_TIMEOUT;
    let wait = |what: &str, done: &dyn Fn() -> bool| {
        while !done() {
            if Instant::now() > deadline {
                return Err(failed(format!("{what} took more than {START_TIMEOUT:?}")));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    };
    wait("listening", &|| {
        nodes.iter().all(|(node, _)| command(*node, &["PING"]).is_ok())
    })?;
    let first = nodes[0].0;
    for (index, (node, _)) in nodes.iter().enumerate() {
        ask(*node, &["CLUSTER", "SET-CONFIG-EPOCH", &(index + 1).to_string()])?;
        if index < MASTERS {
            let (from, to) = (SLOTS * index / MASTERS, SLOTS * (index + 1) / MASTERS - 1);
            ask(*node, &["CLUSTER", "ADDSLOTSRANGE", &from.to_string(), &to.to_string()])?;
        }
    }
    for (node, bus) in &nodes[1..] {
        let (port, bus) = (node.port().to_string(), bus.to_string());
        ask(first, &["CLUSTER", "MEET", "127.0.0.1", &port, &bus])?;
    }
    let knows_all = |node: SocketAddr| {
        command(node, &["CLUSTER", "NODES"]).is_ok_and(|text| {
            text.lines().count() == nodes.len() && !text.contains("handshake") && !text.contains("noaddr")
        })
    };
    wait("meeting", &|| nodes.iter().all(|(node, _)| knows_all(*node)))?;
    for (index, (node, _)) in nodes.iter().enumerate().skip(MASTERS) {
        let master = ask(nodes[index % MASTERS].0, &["CLUSTER", "MYID"])?;
        ask(*node, &["CLUSTER", "REPLICATE", &master])?;
    }
    wait("replicating", &|| {
        let synchronised = |node: SocketAddr| {
            command(node, &["INFO", "replication"]).is_ok_and(|text| text.contains("master_link_status:up"))
        };
        let ready =
            |node: SocketAddr| command(node, &["CLUSTER", "INFO"]).is_ok_and(|text| text.contains("cluster_state:ok"));
        nodes[MASTERS..].iter().all(|(node, _)| synchronised(*node)) && nodes.iter().all(|(node, _)| ready(*node))
    })
}

/// Sends one command over a connection of its own and returns its reply as text.
///
/// # Errors
/// The error reply, or why there was none.
pub(super) fn command(node: SocketAddr, words: &[&str]) -> Result<String, String> {
    let failed = |error: std::io::Error| format!("{} to {node}: {error}", words.join(" "));
    let mut stream = TcpStream::connect_timeout(&node, COMMAND_TIMEOUT).map_err(failed)?;
    stream.set_read_timeout(Some(COMMAND_TIMEOUT)).map_err(failed)?;
    let mut request = format!("*{}\r\n", words.len());
    for word in words {
        let _ = write!(request, "${}\r\n{word}\r\n", word.len());
    }
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let (mut reply, mut piece) = (Vec::new(), [0; 4_096]);
    loop {
        let read = stream.read(&mut piece).map_err(failed)?;
        if read == 0 {
            return Err(failed(std::io::ErrorKind::UnexpectedEof.into()));
        }
        reply.extend_from_slice(&piece[..read]);
        let decoded = decode_range(&reply).map_err(|error| format!("{} to {node}: {error}", words.join(" ")))?;
        let text = |(from, to): (usize, usize)| String::from_utf8_lossy(&reply[from..to]).into_owned();
        match decoded {
            None => {}
            Some((RangeFrame::SimpleString(range) | RangeFrame::BulkString(range), _)) => return Ok(text(range)),
            Some((RangeFrame::Integer(number), _)) => return Ok(number.to_string()),
            Some((RangeFrame::Error(range), _)) => {
                return Err(format!("{} to {node}: {}", words.join(" "), text(range)));
            }
            Some((RangeFrame::Null | RangeFrame::Array(_), _)) => return Ok(String::new()),
        }
    }
}

/// One field of an `INFO` reply.
pub(super) fn field<'a>(info: &'a str, name: &str) -> Option<&'a str> {
    info.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_info_are_found_by_their_whole_name() {
        let info = "# Persistence\r\nrdb_bgsave_in_progress:1\r\nrdb_bgsave:7\r\n";
        assert_eq!(field(info, "rdb_bgsave"), Some("7"));
        assert_eq!(field(info, "rdb_bgsave_in_progress"), Some("1"));
        assert_eq!(field(info, "rdb"), None);
    }
}
