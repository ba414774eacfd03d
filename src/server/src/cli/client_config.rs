//! Where the client configuration, `client.toml`, is looked for.
//!
//! `generation dev` writes one into its data directory; `generation kv` and `generation status` read it. What the file holds is
//! `generation_client`'s to say; nothing here reads it.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::Failure;

/// Environment variable that names the file.
pub const VARIABLE: &str = "GENERATION_CONFIG";
/// Where `generation dev` leaves it, below the current directory.
pub const IN_DIRECTORY: &str = ".generation/client.toml";
/// Where it is looked for last, below the home directory.
pub const IN_HOME: &str = ".config/generation/client.toml";

/// Options that say which cluster to talk to.
#[derive(Debug, Clone, clap::Args)]
pub struct Selection {
    /// The client configuration.
    #[arg(
        long,
        value_name = "FILE",
        global = true,
        help = "Client configuration [default: $GENERATION_CONFIG, ./.generation/client.toml, ~/.config/generation/client.toml]"
    )]
    pub config: Option<PathBuf>,
}

impl Selection {
    /// The file that the options and the environment of this process lead to.
    pub fn find(&self) -> Result<PathBuf, Failure> {
        let home = std::env::home_dir();
        locate(
            self.config.as_deref(),
            std::env::var_os(VARIABLE),
            home.as_deref(),
            Path::new(""),
        )
    }
}

/// The file to read. A file that was named is taken whether it exists or not, so that a typing error never selects another
/// cluster.
fn locate(
    named: Option<&Path>,
    variable: Option<OsString>,
    home: Option<&Path>,
    current: &Path,
) -> Result<PathBuf, Failure> {
    if let Some(path) = named {
        return Ok(path.to_owned());
    }
    if let Some(path) = variable.filter(|value| !value.is_empty()) {
        return Ok(path.into());
    }
    let mut candidates = vec![current.join(IN_DIRECTORY)];
    candidates.extend(home.map(|home| home.join(IN_HOME)));
    if let Some(found) = candidates.iter().find(|path| path.symlink_metadata().is_ok()) {
        return Ok(found.clone());
    }
    let mut message = format!("no client configuration; looked for --config, ${VARIABLE}");
    for path in &candidates {
        // Writing to a string cannot fail.
        let _ = write!(message, ", {}", path.display());
    }
    message.push_str("\nStart a node in this directory with `generation dev`, or name a file with --config");
    Err(Failure::usage(message).with_code("no_configuration"))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn it_is_looked_for_in_the_documented_order() {
        let root = tempfile::tempdir().unwrap();
        let (current, home) = (root.path().join("current"), root.path().join("home"));
        let look = |named: Option<&str>, variable: Option<&str>| {
            locate(
                named.map(Path::new),
                variable.map(OsString::from),
                Some(&home),
                &current,
            )
        };
        let message = look(None, None).unwrap_err().message;
        for place in [
            "--config",
            VARIABLE,
            "current/.generation/client.toml",
            "home/.config/generation/client.toml",
        ] {
            assert!(message.contains(place), "{place}: {message}");
        }
        for path in [home.join(IN_HOME), current.join(IN_DIRECTORY)] {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            assert_eq!(look(None, None).unwrap(), path);
        }
        assert_eq!(look(None, Some("")).unwrap(), current.join(IN_DIRECTORY));
        assert_eq!(look(None, Some("by-variable")).unwrap(), Path::new("by-variable"));
        assert_eq!(
            look(Some("by-option"), Some("by-variable")).unwrap(),
            Path::new("by-option")
        );
    }
}
