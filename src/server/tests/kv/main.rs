//! `generation kv` against a real node: every command, every exit code, files in and out. All through processes and pipes, as a
//! shell would.

mod commands;
mod configuration;
mod files;
mod node;
