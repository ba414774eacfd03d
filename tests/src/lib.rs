//! What the tests of the whole share. The tests themselves are in `tests/` beside this library: one file for each thing that
//! is proved.
//!
//! [`fences`] checks the dependency graph, [`source`] the text of the pure crates, [`layout`] the tree and the commands that
//! the README promises. Each is a function from plain values to a list of violations, so that its own unit tests can plant a
//! violation and see it found.

pub mod fences;
pub mod layout;
pub mod source;

use std::path::{Path, PathBuf};

/// The root of the workspace.
pub fn workspace_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
