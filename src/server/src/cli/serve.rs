//! `generation serve`: one node, by a configuration file.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytesize::ByteSize;

use super::{Exit, Failure, Globals, running};
use crate::config::{self, Config};
use crate::directory::{DataDirectory, DirectoryError};
use crate::logging;
use crate::node::{NodeError, Prepared};

/// Options of `generation serve`. Those that are also keys of the configuration file win over it.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation serve --print-default-config > node.toml     # a documented file to begin with\n  \
    generation serve --config node.toml --check-config      # says what is wrong with it, and what the machine lacks\n  \
    generation serve --config node.toml\n\n\
    SIGTERM and SIGINT stop the node gracefully. SIGHUP makes it read its certificates again.")]
pub struct Args {
    /// Configuration file (TOML).
    #[arg(long, value_name = "FILE", required_unless_present = "print_default_config")]
    config: Option<PathBuf>,
    /// Print the documented default configuration and exit.
    #[arg(long)]
    print_default_config: bool,
    /// Check the configuration, the certificates and the machine, and exit.
    #[arg(long)]
    check_config: bool,
    /// Address and UDP port to listen on.
    #[arg(long, value_name = "ADDR:PORT")]
    listen: Option<SocketAddr>,
    /// Address and port clients are told.
    #[arg(long, value_name = "ADDR:PORT")]
    advertise: Option<SocketAddr>,
    /// Directory for what outlives the process.
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Cores to serve with.
    #[arg(long)]
    cores: Option<u16>,
    /// Number of shards.
    #[arg(long)]
    shards: Option<u16>,
    /// Bytes of entries the node holds, such as 256MiB.
    #[arg(long, value_name = "SIZE")]
    memory: Option<ByteSize>,
    /// Entries the node holds at most.
    #[arg(long, value_name = "N")]
    max_records: Option<u64>,
    /// What is logged, such as `info` or `info,generation_node=debug`.
    #[arg(long, value_name = "FILTER", env = "GENERATION_LOG")]
    log: Option<String>,
    /// Die with the process of this id, which must be the parent.
    #[arg(long, value_name = "PID", hide = true)]
    exit_with_parent: Option<u32>,
}

/// Runs `generation serve`.
pub fn run(args: &Args, globals: &Globals) -> Result<Exit, Failure> {
    if args.print_default_config {
        return print(config::DEFAULT);
    }
    let path = args
        .config
        .clone()
        .ok_or_else(|| Failure::usage("--config is missing"))?;
    let mut config = Config::load(&path).map_err(|error| Failure::from(NodeError::from(error)))?;
    override_with(&mut config, args);
    if args.check_config {
        let identity = Prepared::new(&config)?.certificates.identity();
        return print(&if globals.json {
            format!(
                "{}\n",
                serde_json::json!({ "ok": true, "identity": identity.to_string() })
            )
        } else {
            format!("{}: good, for {}\n", path.display(), identity)
        });
    }
    let directory = args.exit_with_parent.map(|parent| {
        exit_with_parent(parent)?;
        directory_of_a_dead_node(&config)
    });
    let directory = directory.transpose()?;
    logging::start(&config.log).map_err(Failure::usage)?;
    let json = globals.json;
    running::run(&config, directory, |node| {
        if json {
            let (id, address) = (node.id(), node.address.to_string());
            let nodes = [serde_json::json!({ "id": id, "addr": address, "pid": std::process::id() })];
            print(&format!("{}\n", serde_json::json!({ "ready": true, "nodes": nodes })))?;
        }
        Ok(())
    })
}

/// Has the kernel kill this process when its parent ends.
fn exit_with_parent(parent: u32) -> Result<(), Failure> {
    let failed = |error: &dyn std::fmt::Display| Failure::new(Exit::Rejected, format!("--exit-with-parent: {error}"));
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(|error| failed(&error))?;
    // It may have ended before it was watched; then somebody else is the parent by now.
    if std::os::unix::process::parent_id() != parent {
        return Err(failed(&format!("the process {parent} is not the parent of this one")));
    }
    Ok(())
}

/// Takes the data directory, from a node that has been killed with its parent if need be: its end can take a moment.
fn directory_of_a_dead_node(config: &Config) -> Result<DataDirectory, Failure> {
    const PATIENCE: Duration = Duration::from_secs(2);
    const STEP: Duration = Duration::from_millis(10);
    let start = Instant::now();
    loop {
        match DataDirectory::open(&config.data_dir) {
            Err(DirectoryError::Held { .. }) if start.elapsed() < PATIENCE => std::thread::sleep(STEP),
            result => return result.map_err(|error| NodeError::from(error).into()),
        }
    }
}

fn override_with(config: &mut Config, args: &Args) {
    if let Some(listen) = args.listen {
        config.listen = listen;
    }
    if let Some(data_dir) = &args.data_dir {
        config.data_dir.clone_from(data_dir);
    }
    config.advertise = args.advertise.or(config.advertise);
    config.cores = args.cores.or(config.cores);
    config.shards = args.shards.unwrap_or(config.shards);
    config.memory.budget = args.memory.unwrap_or(config.memory.budget);
    config.memory.max_records = args.max_records.or(config.memory.max_records);
    if let Some(filter) = &args.log {
        config.log.filter.clone_from(filter);
    }
}

/// Prints to standard output, at once.
pub(super) fn print(text: &str) -> Result<Exit, Failure> {
    let mut output = std::io::stdout();
    output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush())
        .map_err(|error| Failure::new(Exit::Rejected, format!("cannot write to standard output: {error}")))?;
    Ok(Exit::Ok)
}
