//! etcd: one member, or a cluster of three.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use super::Certificates;

/// Largest database, in bytes: etcd keeps every version of a key, and refuses writes beyond it.
const QUOTA_BYTES: u64 = 8 << 30;

/// Where one member listens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    /// For clients.
    pub client: SocketAddr,
    /// For the other members.
    pub peer: SocketAddr,
}

/// The arguments of member `index` of `members`; with certificates, both its ports speak TLS.
pub(super) fn arguments(
    command: &mut Command,
    directory: &Path,
    members: &[Member],
    index: usize,
    certificates: Option<&Certificates>,
) {
    let scheme = if certificates.is_some() { "https" } else { "http" };
    let url = |addr: SocketAddr| format!("{scheme}://{addr}");
    let name = |index: usize| format!("n{}", index + 1);
    let cluster: Vec<_> = members
        .iter()
        .enumerate()
        .map(|(index, member)| format!("{}={}", name(index), url(member.peer)))
        .collect();
    let (client, peer) = (url(members[index].client), url(members[index].peer));
    command.args(["--name", &name(index)]);
    command.arg("--data-dir").arg(directory.join(name(index)));
    command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
    command.args([
        "--initial-cluster",
        &cluster.join(","),
        "--initial-cluster-state",
        "new",
    ]);
    command.args(["--quota-backend-bytes", &QUOTA_BYTES.to_string()]);
    command.args(["--logger", "zap", "--log-level", "error"]);
    if let Some(made) = certificates {
        command.arg("--cert-file").arg(&made.certificate);
        command.arg("--key-file").arg(&made.key);
        command.arg("--peer-cert-file").arg(&made.certificate);
        command.arg("--peer-key-file").arg(&made.key);
        command.arg("--peer-trusted-ca-file").arg(&made.ca);
    }
}
