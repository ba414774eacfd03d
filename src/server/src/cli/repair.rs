//! `generation repair`: gives up what a node cannot read any more, so that it is sent it by the others.
//!
//! A frame of a journal holds records of any shard of its core, votes among them, so with a damaged file all replicas of that core are
//! given up. They come back under new ids. What was there is moved aside, not removed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::{Exit, Failure, Globals, serve};
use crate::directory::DataDirectory;
use crate::node::NodeError;

/// Options of `generation repair`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  \
    generation repair --data-dir generation-data --discard generation-data/core-0/journal/segment-00000003\n\n\
    Only where the other nodes are a majority and whole: what this core alone had is lost. The node must not run. Start it afterwards;\n\
    its replicas of that core join under new ids and are sent everything.")]
pub struct Args {
    /// The node's data directory.
    #[arg(long, value_name = "DIR")]
    data_dir: PathBuf,
    /// The damaged file, as `generation serve` names it.
    #[arg(long, value_name = "FILE")]
    discard: PathBuf,
}

/// Runs `generation repair`.
pub fn run(args: &Args, globals: &Globals) -> Result<Exit, Failure> {
    // Looked at first: a mistyped path must not make a directory.
    let core = core_of(&args.data_dir, &args.discard)?;
    let directory = DataDirectory::open(&args.data_dir).map_err(NodeError::from)?;
    let now_s = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let aside = directory.path().join(format!("discarded-{core}-{now_s}"));
    let from = directory.path().join(&core);
    let failed = |error: io::Error| Failure::usage(format!("{}: {error}", from.display()));
    fs::rename(&from, &aside).map_err(failed)?;
    File::open(directory.path())
        .and_then(|directory| directory.sync_all())
        .map_err(failed)?;
    serve::print(&if globals.json {
        format!("{}\n", json!({ "discarded": from, "kept_in": aside }))
    } else {
        format!(
            "{} was moved to {}, which may be removed once the node is whole again; start the node now\n",
            from.display(),
            aside.display()
        )
    })
}

/// The name of the core's directory in `data` that `file` lies in.
fn core_of(data: &Path, file: &Path) -> Result<String, Failure> {
    let real = |path: &Path| {
        let real = fs::canonicalize(path);
        real.map_err(|error| Failure::usage(format!("{}: {error}", path.display())))
    };
    let (data_path, file_path) = (real(data)?, real(file)?);
    let inner = file_path.strip_prefix(&data_path).ok();
    let core = inner
        .and_then(|inner| inner.components().next())
        .and_then(|core| core.as_os_str().to_str());
    let is_core = |core: &&str| {
        core.strip_prefix("core-")
            .is_some_and(|number| number.parse::<u16>().is_ok())
    };
    match core.filter(is_core) {
        Some(core) => Ok(core.to_owned()),
        None => Err(Failure::usage(format!(
            "{} does not lie in a core's directory of {}; name a file as `generation serve` does",
            file.display(),
            data.display()
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_is_moved_aside_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path();
        for core in ["core-0", "core-1"] {
            fs::create_dir_all(data.join(core).join("journal")).unwrap();
            fs::write(data.join(core).join("journal/segment-00000000"), core).unwrap();
        }
        let args = |file: &str| Args {
            data_dir: data.to_owned(),
            discard: data.join(file),
        };
        let globals = Globals { json: true };
        for wrong in ["nothing", "core-7/journal/segment-00000000", "."] {
            assert_eq!(run(&args(wrong), &globals).unwrap_err().exit, Exit::Usage);
        }
        let held = DataDirectory::open(data).unwrap();
        let failure = run(&args("core-0/journal/segment-00000000"), &globals).unwrap_err();
        assert!(failure.message.contains("in use by"), "{}", failure.message);
        drop(held);
        run(&args("core-0/journal/segment-00000000"), &globals).unwrap();
        assert!(!data.join("core-0").exists() && data.join("core-1").exists());
        let kept = fs::read_dir(data).unwrap().map(|entry| entry.unwrap().path());
        let kept: Vec<_> = kept
            .filter(|path| path.to_str().unwrap().contains("discarded-core-0-"))
            .collect();
        assert_eq!(fs::read(kept[0].join("journal/segment-00000000")).unwrap(), b"core-0");
    }
}
