//! `generation certs`: a certificate authority, certificates and gossip keys in files.
//!
//! Private keys and gossip keys are written with mode 0600, through a temporary file in the same directory, so that no moment shows a key to
//! others or half a file to a reader. Nothing that exists is replaced without `--force`.

use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Subcommand;

use super::{Exit, Failure, Globals};
use crate::gossip::keys::{KEY_BYTES, KeyRing};
use crate::tls::identity::Role;
use crate::tls::issue::{Authority, IssueError};

const DAY: Duration = Duration::from_hours(24);

/// Options of `generation certs`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation certs ca --cluster prod            # ./certs/ca.pem and ./certs/ca.key\n  \
    generation certs node 1 --host 10.0.0.1       # ./certs/node-1.pem and ./certs/node-1.key\n  \
    generation certs client web                   # ./certs/client-web.pem and ./certs/client-web.key\n  \
    generation certs admin ops --days 30\n  \
    generation certs gossip-key                   # ./certs/gossip.keys, the same for all nodes\n  \
    generation certs gossip-key --add             # one more key in it, behind those it has\n\n\
    Gossip keys are exchanged while all nodes run: add a key and copy the file to every node, then put the new line in front of\n\
    the others and copy it again, then remove the old line and copy it once more.\n\
    Keep ca.key away from the nodes: whoever has it can make itself any node or administrator.")]
pub struct Args {
    #[command(subcommand)]
    command: CertsCommand,
}

#[derive(Debug, Subcommand)]
enum CertsCommand {
    /// Make the authority of a cluster.
    Ca {
        /// Name of the cluster; every certificate carries it.
        #[arg(long, default_value = "generation")]
        cluster: String,
        /// Days it is valid.
        #[arg(long, default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
        days: u32,
        #[command(flatten)]
        output: Output,
    },
    /// Sign a certificate for a node.
    Node {
        /// Id of the node, from 1; never reused in a cluster.
        id: u64,
        /// A host name or address to add, for TLS tools that verify it (repeatable).
        #[arg(long = "host")]
        hosts: Vec<String>,
        #[command(flatten)]
        signing: Signing,
    },
    /// Sign a certificate for a program that reads and writes data.
    Client {
        /// Name of the client.
        name: String,
        #[command(flatten)]
        signing: Signing,
    },
    /// Sign a certificate for an operator of the cluster.
    Admin {
        /// Name of the administrator.
        name: String,
        #[command(flatten)]
        signing: Signing,
    },
    /// Draw a key for the gossip between nodes.
    GossipKey {
        /// Add it to the file that is there, behind its keys: it opens what others seal with it, and seals nothing yet.
        #[arg(long, conflicts_with = "force")]
        add: bool,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Debug, clap::Args)]
struct Output {
    /// Directory to write into; made if it does not exist.
    #[arg(long, default_value = "certs")]
    out: PathBuf,
    /// Replace files that exist.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, clap::Args)]
struct Signing {
    /// Directory with the authority's ca.pem and ca.key [default: the directory of --out].
    #[arg(long)]
    ca: Option<PathBuf>,
    /// Days it is valid, at most until the authority ends.
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36500))]
    days: u32,
    #[command(flatten)]
    output: Output,
}

/// Runs `generation certs`.
pub fn run(args: &Args, globals: &Globals) -> Result<Exit, Failure> {
    let (identity, written) = match &args.command {
        CertsCommand::GossipKey { add, output } => return gossip_key(*add, output, globals),
        CertsCommand::Ca { cluster, days, output } => {
            let authority = Authority::new(cluster, DAY * *days, SystemTime::now())?;
            let written = write_pair(output, "ca", authority.certificate_pem(), authority.key_pem())?;
            (format!("authority of cluster {cluster}"), written)
        }
        CertsCommand::Node { id, hosts, signing } => sign(signing, Role::Node(*id), hosts, &format!("node-{id}"))?,
        CertsCommand::Client { name, signing } => {
            sign(signing, Role::Client(name.clone()), &[], &format!("client-{name}"))?
        }
        CertsCommand::Admin { name, signing } => {
            sign(signing, Role::Admin(name.clone()), &[], &format!("admin-{name}"))?
        }
    };
    let (certificate, key) = (written.certificate.display(), written.key.display());
    let text = if globals.json {
        serde_json::json!({ "identity": identity, "certificate": written.certificate, "key": written.key }).to_string()
    } else {
        format!("{identity}\n  certificate  {certificate}\n  private key  {key}")
    };
    writeln!(std::io::stdout(), "{text}").map_err(|error| Failure::new(Exit::Rejected, error.to_string()))?;
    Ok(Exit::Ok)
}

/// Draws a gossip key, into a new file or behind the keys of one.
fn gossip_key(add: bool, output: &Output, globals: &Globals) -> Result<Exit, Failure> {
    let path = output.out.join("gossip.keys");
    fs::create_dir_all(&output.out).map_err(|error| Failure::usage(format!("{}: {error}", output.out.display())))?;
    let (mut text, ids) = if add {
        let ring = KeyRing::load(&path).map_err(|error| Failure::usage(error.to_string()))?;
        let text = fs::read_to_string(&path).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
        (text, ring.ids())
    } else {
        let heading =
            "# Gossip keys of the cluster, the same on all nodes. The first seals, all open. Keep the file secret.\n";
        (heading.to_owned(), Vec::new())
    };
    let id = ids.iter().max().map_or(Some(1), |last| last.checked_add(1));
    let id = id.ok_or_else(|| Failure::usage(format!("{}: key 65535 is in use; renumber the keys", path.display())))?;
    let mut key = [0; KEY_BYTES];
    getrandom::fill(&mut key).map_err(|error| Failure::new(Exit::Rejected, error.to_string()))?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    let _ = write!(text, "{id}: ");
    for byte in key {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text.push('\n');
    // What was written is also what is read, one key too many included.
    KeyRing::parse(&path, &text).map_err(|error| Failure::usage(error.to_string()))?;
    write_file(&path, text.as_bytes(), 0o600, add || output.force)?;
    let text = if globals.json {
        serde_json::json!({ "key_file": path, "id": id }).to_string()
    } else {
        format!("gossip key {id}\n  key file     {}", path.display())
    };
    writeln!(std::io::stdout(), "{text}").map_err(|error| Failure::new(Exit::Rejected, error.to_string()))?;
    Ok(Exit::Ok)
}

fn sign(signing: &Signing, role: Role, hosts: &[String], stem: &str) -> Result<(String, Pair), Failure> {
    let directory = signing.ca.as_ref().unwrap_or(&signing.output.out);
    let (certificate, key) = (directory.join("ca.pem"), directory.join("ca.key"));
    let authority = Authority::from_pem(&read(&certificate)?, &read(&key)?)
        .map_err(|error| Failure::usage(format!("{}: {error}", certificate.display())))?;
    let identity = crate::tls::identity::Identity {
        cluster: authority.cluster().to_owned(),
        role: role.clone(),
    };
    let issued = authority.issue(role, hosts, DAY * signing.days, SystemTime::now())?;
    let written = write_pair(&signing.output, stem, &issued.certificate_pem, &issued.key_pem)?;
    Ok((identity.to_string(), written))
}

impl From<IssueError> for Failure {
    fn from(error: IssueError) -> Self {
        match error {
            IssueError::Library(_) => Self::new(Exit::Rejected, error.to_string()),
            _ => Self::usage(error.to_string()),
        }
    }
}

fn read(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path).map_err(|error| {
        let remedy = match error.kind() {
            std::io::ErrorKind::NotFound => {
                "; make the authority with `generation certs ca`, or name its directory with --ca"
            }
            _ => "",
        };
        Failure::usage(format!("{}: {error}{remedy}", path.display()))
    })
}

/// Where a certificate and its key were written.
pub(crate) struct Pair {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

fn write_pair(output: &Output, stem: &str, certificate_pem: &str, key_pem: &str) -> Result<Pair, Failure> {
    let pair = Pair {
        certificate: output.out.join(format!("{stem}.pem")),
        key: output.out.join(format!("{stem}.key")),
    };
    fs::create_dir_all(&output.out).map_err(|error| Failure::usage(format!("{}: {error}", output.out.display())))?;
    if !output.force {
        // Both are looked at before either is written: half a pair would be worse than none.
        for path in [&pair.certificate, &pair.key] {
            if path.symlink_metadata().is_ok() {
                return Err(exists(path));
            }
        }
    }
    write_file(&pair.key, key_pem.as_bytes(), 0o600, output.force)?;
    write_file(&pair.certificate, certificate_pem.as_bytes(), 0o644, output.force)?;
    Ok(pair)
}

fn exists(path: &Path) -> Failure {
    Failure::usage(format!(
        "{} exists; --force replaces it, and what the old one signed or proved is void",
        path.display()
    ))
}

/// Writes `bytes` to `path` with `mode`, all or nothing.
pub(crate) fn write_file(path: &Path, bytes: &[u8], mode: u32, replace: bool) -> Result<(), Failure> {
    let failure = |error: std::io::Error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => exists(path),
        _ => Failure::usage(format!("{}: {error}", path.display())),
    };
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(".generation-")
        .permissions(Permissions::from_mode(0o600))
        .tempfile_in(directory)
        .map_err(failure)?;
    file.write_all(bytes).map_err(failure)?;
    file.as_file()
        .set_permissions(Permissions::from_mode(mode))
        .map_err(failure)?;
    file.as_file().sync_all().map_err(failure)?;
    if replace {
        file.persist(path).map_err(|error| failure(error.error))?;
    } else {
        file.persist_noclobber(path).map_err(|error| failure(error.error))?;
    }
    Ok(())
}
