//! The `generation` binary: the allocator, and the command line of `generation_server`.

use std::process::ExitCode;

/// mimalloc, because a core allocates and frees its own blocks only, which is the case its per-thread heaps are made for.
#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    generation_server::cli::main()
}
