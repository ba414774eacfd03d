//! `generation completions SHELL`: the command line described to a shell.

use std::io::Write as _;

use clap::CommandFactory as _;
use clap_complete::Shell;

use super::{Cli, Exit, Failure};

/// Options of `generation completions`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation completions bash > ~/.local/share/bash-completion/completions/generation\n  \
    generation completions zsh  > ~/.zfunc/_generation        # with fpath+=~/.zfunc before compinit\n  \
    generation completions fish > ~/.config/fish/completions/generation.fish")]
pub struct Args {
    /// The shell to write for.
    shell: Shell,
}

/// Runs `generation completions`.
pub fn run(args: &Args) -> Result<Exit, Failure> {
    // clap_complete panics when its writer fails, so the script is made in memory first.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "generation", &mut script);
    match std::io::stdout().write_all(&script) {
        // The reader has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(Exit::Ok),
        Err(error) => Err(Failure::new(Exit::Rejected, format!("standard output: {error}"))),
        Ok(()) => Ok(Exit::Ok),
    }
}
