//! The command line `generation`: which subcommands there are, and how each ends.
//!
//! A subcommand is a module with `Args` (clap) and `run(args, globals) -> Result<Exit, Failure>`. It prints results on standard
//! output and nothing else there; failures go to standard error, once, here.

pub mod certs;
pub mod client_config;
pub mod cluster;
pub mod completions;
pub mod connection;
pub mod dev;
pub mod exit;
pub mod kv;
pub mod repair;
mod running;
pub mod serve;
pub mod snapshot;
pub mod stats;
pub mod status;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

pub use exit::{Exit, Failure, State};

/// A sharded in-memory key-value store and cache: server, operations and data from one command.
#[derive(Debug, Parser)]
#[command(name = "generation", version, propagate_version = true, max_term_width = 100)]
#[command(
    after_help = "Exit codes: 0 ok, 1 rejected, 2 usage or configuration, 3 not found, 4 condition failed,\n\
    5 unavailable (nothing was changed), 6 in doubt (a write may have happened), 7 corruption."
)]
pub struct Cli {
    /// Options of all subcommands.
    #[command(flatten)]
    pub globals: Globals,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options every subcommand takes, before or after its name.
#[derive(Debug, Clone, clap::Args)]
pub struct Globals {
    /// Print results and errors as JSON, one object a line.
    #[arg(long, global = true)]
    pub json: bool,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a node to try things on, with throw-away certificates.
    Dev(dev::Args),
    /// Run a node by a configuration file.
    Serve(serve::Args),
    /// Make a certificate authority and sign certificates for nodes, clients and administrators.
    Certs(certs::Args),
    /// Found a cluster, take nodes in and let them go, and change its configuration.
    Cluster(cluster::Args),
    /// Show the cluster, its nodes and its shards.
    Status(status::Args),
    /// Show the counters of the nodes.
    Stats(stats::Args),
    /// Look at the snapshots in a data directory, and check them.
    Snapshot(snapshot::Args),
    /// Give up what a node's disk has damaged, so that it is sent it by the other nodes.
    Repair(repair::Args),
    /// Read and write entries.
    Kv(kv::Args),
    /// Print a completion script for a shell.
    Completions(completions::Args),
}

/// Parses the arguments of the process, runs the command, reports its failure; the exit code is the command's.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            if error.use_stderr() && std::env::args_os().any(|argument| argument == "--json") {
                let text = error.to_string();
                Failure::usage(text.trim_start_matches("error: ").trim_end()).report(true);
                return Exit::Usage.into();
            }
            // `--help` and `--version` come this way too and are no failures. The pipe may be closed; nobody is left to tell.
            let _ = error.print();
            return if error.use_stderr() {
                Exit::Usage.into()
            } else {
                Exit::Ok.into()
            };
        }
    };
    let globals = cli.globals;
    let result = match cli.command {
        Command::Dev(args) => dev::run(&args, &globals),
        Command::Serve(args) => serve::run(&args, &globals),
        Command::Certs(args) => certs::run(&args, &globals),
        Command::Cluster(args) => cluster::run(&args, &globals),
        Command::Status(args) => status::run(&args, &globals),
        Command::Stats(args) => stats::run(&args, &globals),
        Command::Snapshot(args) => snapshot::run(&args, &globals),
        Command::Repair(args) => repair::run(&args, &globals),
        Command::Kv(args) => kv::run(&args, &globals),
        Command::Completions(args) => completions::run(&args),
    };
    result
        .unwrap_or_else(|failure| {
            failure.report(globals.json);
            failure.exit
        })
        .into()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed() {
        super::Cli::command().debug_assert();
    }
}
