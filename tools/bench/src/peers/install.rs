//! Where the programs of the peers are, and where those that are missing come from.

use std::path::PathBuf;

use super::PeerError;

/// The program of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Program {
    name: &'static str,
    /// The package that has it in every supported Debian, else what to do.
    source: Source,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Package(&'static str),
    Advice(&'static str),
}

impl Program {
    pub(super) const REDIS: Self = Self {
        name: "redis-server",
        source: Source::Package("redis-server"),
    };
    pub(super) const VALKEY: Self = Self {
        name: "valkey-server",
        source: Source::Advice(
            "valkey-server: from Debian 13 on, apt-get install valkey-server; Debian 12 has no such package: build it from its source \
             (make BUILD_TLS=yes, then sudo make install)",
        ),
    };
    pub(super) const MEMCACHED: Self = Self {
        name: "memcached",
        source: Source::Package("memcached"),
    };
    pub(super) const ETCD: Self = Self {
        name: "etcd",
        source: Source::Package("etcd-server"),
    };

    /// The program on the path, `/usr/sbin` and `/usr/local/sbin` included.
    pub(super) fn find(self) -> Option<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from))
            .map(|directory| directory.join(self.name))
            .find(|candidate| candidate.is_file())
    }
}

/// Says of programs that are not there how to get them, in one go.
pub(super) fn missing(programs: &[Program]) -> PeerError {
    let names: Vec<_> = programs.iter().map(|program| program.name).collect();
    let packages: Vec<_> = programs
        .iter()
        .filter_map(|program| match program.source {
            Source::Package(package) => Some(package),
            Source::Advice(_) => None,
        })
        .collect();
    let mut advice = Vec::new();
    if !packages.is_empty() {
        advice.push(format!("On Debian: sudo apt-get install {}", packages.join(" ")));
    }
    advice.extend(programs.iter().filter_map(|program| match program.source {
        Source::Package(_) => None,
        Source::Advice(text) => Some(text.to_owned()),
    }));
    advice.push("or leave it out of --peers".to_owned());
    PeerError::Missing {
        programs: names.join(", "),
        advice: advice.join("; "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_are_named_in_one_command_and_what_is_no_package_apart() {
        let text = missing(&[Program::REDIS, Program::VALKEY, Program::MEMCACHED]).to_string();
        assert!(
            text.starts_with("not installed: redis-server, valkey-server, memcached."),
            "{text}"
        );
        assert!(text.contains("sudo apt-get install redis-server memcached;"), "{text}");
        assert!(text.contains("Debian 12 has no such package"), "{text}");
        let text = missing(&[Program::VALKEY]).to_string();
        assert!(!text.contains("sudo apt-get"), "{text}");
    }
}
