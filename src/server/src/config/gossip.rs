//! `[gossip]`: what nodes tell each other beside their shards, and where.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::{Config, ConfigError, wrong};
use crate::gossip::Settings;

/// `[gossip]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Gossip {
    /// The cluster's gossip keys; `None` = this node does not gossip.
    pub key_file: Option<PathBuf>,
    /// Where to listen; `None` = where the node listens, at [`gossip_port`].
    pub listen: Option<SocketAddr>,
    /// What other nodes are told instead.
    pub advertise: Option<SocketAddr>,
    /// How often it gossips.
    #[serde(deserialize_with = "super::duration")]
    pub interval: Duration,
    /// Nodes to begin with, beside those of `[cluster]`.
    pub seeds: Vec<String>,
}

impl Default for Gossip {
    fn default() -> Self {
        Self {
            key_file: None,
            listen: None,
            advertise: None,
            interval: Duration::from_millis(200),
            seeds: Vec::new(),
        }
    }
}

/// How far the port of a node's gossip is from the node's own, unless it is set. Nodes on one machine have ports that follow each other, so
/// it is far.
const PORT_DISTANCE: u16 = 10_000;

/// The port that goes with a node's own: [`PORT_DISTANCE`] above it, or below it where there is none above.
pub const fn gossip_port(port: u16) -> u16 {
    match port.checked_add(PORT_DISTANCE) {
        Some(above) => above,
        None => port - PORT_DISTANCE,
    }
}

/// The address that goes with a node's own.
fn beside(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip(), gossip_port(addr.port()))
}

/// Whether it can be looked up: an address or a name, and a port.
fn is_seed(text: &str) -> bool {
    if text.parse::<SocketAddr>().is_ok_and(|addr| addr.port() > 0) {
        return true;
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return false;
    };
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    // What consists of numbers alone is an address that is wrong.
    let numeric = host.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    host.len() <= 253 && !numeric && host.split('.').all(label) && port.parse::<u16>().is_ok_and(|port| port > 0)
}

impl Config {
    /// Checks `[gossip]`.
    pub(super) fn validate_gossip(&self) -> Result<(), ConfigError> {
        let Gossip {
            key_file,
            listen,
            advertise,
            interval,
            seeds,
        } = &self.gossip;
        if key_file.is_none() {
            if listen.is_some() || advertise.is_some() || !seeds.is_empty() {
                return wrong(
                    "gossip.key_file",
                    "must be set where other keys of [gossip] are; `generation certs gossip-key` makes the file, the same for all nodes",
                );
            }
            return Ok(());
        }
        if !(Duration::from_millis(20)..=Duration::from_secs(10)).contains(interval) {
            return wrong("gossip.interval", "must be \"20ms\" to \"10s\"");
        }
        let address = listen.unwrap_or_else(|| beside(self.listen));
        let same_ip =
            address.ip() == self.listen.ip() || address.ip().is_unspecified() || self.listen.ip().is_unspecified();
        if same_ip && address.port() == self.listen.port() && address.port() != 0 {
            return wrong(
                "gossip.listen",
                format!(
                    "{address} is the node's own port; leave it out for {}",
                    beside(self.listen)
                ),
            );
        }
        let told = advertise.or_else(|| listen.filter(|listen| !listen.ip().is_unspecified()));
        let told = told.map_or_else(|| self.advertise.unwrap_or(self.listen).ip(), |told| told.ip());
        if told.is_unspecified() {
            return wrong(
                "gossip.advertise",
                format!("other nodes cannot reach {told}; set the address of this machine they are to use"),
            );
        }
        if advertise.is_some_and(|advertise| advertise.port() == 0) {
            return wrong(
                "gossip.advertise",
                "other nodes cannot reach port 0; set the port they are to use",
            );
        }
        if let Some(seed) = seeds.iter().find(|seed| !is_seed(seed)) {
            return wrong(
                "gossip.seeds",
                format!(
                    "`{seed}` is not an address or a name with a port, such as \"10.0.0.2:17400\" or \"node-2.example:17400\""
                ),
            );
        }
        Ok(())
    }

    /// What gossip is started with, if it is: on a node of this id that listens at `address`, in the cluster of this name.
    pub fn gossip_settings(&self, address: SocketAddr, node: u64, cluster: &str, generation: u64) -> Option<Settings> {
        let Gossip {
            key_file,
            listen,
            advertise,
            interval,
            seeds,
        } = &self.gossip;
        let key_file = key_file.clone()?;
        let listen = listen.unwrap_or_else(|| beside(address));
        let told = |ip: IpAddr| SocketAddr::new(ip, listen.port());
        let advertise = advertise.or_else(|| {
            // Where it listens at every address, the one that the node itself is told at.
            let ip = self.advertise.unwrap_or(self.listen).ip();
            (listen.ip().is_unspecified() || self.gossip.listen.is_none()).then(|| told(ip))
        });
        let others = self.cluster.nodes.iter().filter(|member| member.id != node);
        let others = others.map(|member| beside(member.addr).to_string());
        Some(Settings {
            // Two clusters may have one name, and even one key.
            cluster: match self.cluster.id {
                Some(id) => format!("{cluster}/{id:032x}"),
                None => cluster.to_owned(),
            },
            node,
            generation,
            listen,
            // With port 0 it is known when it listens.
            advertise: advertise.filter(|advertise| advertise.port() != 0),
            interval: *interval,
            key_file,
            seeds: others.chain(seeds.iter().cloned()).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parse(text: &str) -> Config {
        Config::parse(Path::new("node.toml"), text).unwrap()
    }

    #[test]
    fn the_port_is_far_from_the_nodes_own_and_from_its_neighbours() {
        assert_eq!(gossip_port(7400), 17_400);
        assert_eq!(gossip_port(55_535), 65_535);
        assert_eq!(gossip_port(55_536), 45_536);
        assert_eq!(gossip_port(65_535), 55_535);
    }

    #[test]
    fn without_a_key_file_there_is_no_gossip() {
        let config = parse("");
        config.validate().unwrap();
        assert!(config.gossip_settings(config.listen, 1, "prod", 5).is_none());
    }

    #[test]
    fn what_is_left_out_follows_from_the_node_and_the_cluster() {
        let nodes = "nodes = [{ id = 1, addr = \"10.0.0.1:7400\", cores = 1 }, { id = 2, addr = \"10.0.0.2:7400\", cores = 1 }, \
                     { id = 3, addr = \"10.0.0.3:7500\", cores = 1 }]";
        let config = parse(&format!(
            "listen = \"[::]:7400\"\nadvertise = \"10.0.0.1:7400\"\n[cluster]\nid = \"000102030405060708090a0b0c0d0e0f\"\n{nodes}\n\
             [gossip]\nkey_file = \"k\"\nseeds = [\"node-4.example:17400\"]"
        ));
        config.validate().unwrap();
        let settings = config.gossip_settings(config.listen, 1, "prod", 5).unwrap();
        assert_eq!(settings.cluster, "prod/000102030405060708090a0b0c0d0e0f");
        assert_eq!((settings.node, settings.generation), (1, 5));
        assert_eq!(settings.listen, "[::]:17400".parse().unwrap());
        assert_eq!(settings.advertise, Some("10.0.0.1:17400".parse().unwrap()));
        assert_eq!(
            settings.seeds,
            ["10.0.0.2:17400", "10.0.0.3:17500", "node-4.example:17400"]
        );
        // What is set is taken as it is.
        let config = parse(
            "[gossip]\nkey_file = \"k\"\nlisten = \"127.0.0.1:9000\"\nadvertise = \"10.9.9.9:9001\"\ninterval = \"1s\"",
        );
        config.validate().unwrap();
        let settings = config.gossip_settings(config.listen, 1, "prod", 5).unwrap();
        assert_eq!(settings.listen, "127.0.0.1:9000".parse().unwrap());
        assert_eq!(settings.advertise, Some("10.9.9.9:9001".parse().unwrap()));
        assert_eq!(
            (settings.cluster.as_str(), settings.interval),
            ("prod", Duration::from_secs(1))
        );
    }

    #[test]
    fn what_cannot_work_is_refused_with_the_key() {
        for (text, key, wanted) in [
            ("seeds = [\"10.0.0.2:1\"]", "gossip.key_file", "certs gossip-key"),
            ("listen = \"127.0.0.1:1\"", "gossip.key_file", "must be set"),
            ("key_file = \"k\"\ninterval = \"1ms\"", "gossip.interval", "20ms"),
            ("key_file = \"k\"\ninterval = \"1m\"", "gossip.interval", "10s"),
            (
                "key_file = \"k\"\nlisten = \"127.0.0.1:7400\"",
                "gossip.listen",
                "127.0.0.1:17400",
            ),
            (
                "key_file = \"k\"\nlisten = \"0.0.0.0:7400\"",
                "gossip.listen",
                "own port",
            ),
            (
                "key_file = \"k\"\nadvertise = \"0.0.0.0:17400\"",
                "gossip.advertise",
                "cannot reach",
            ),
            (
                "key_file = \"k\"\nadvertise = \"10.0.0.1:0\"",
                "gossip.advertise",
                "port 0",
            ),
            ("key_file = \"k\"\nseeds = [\"10.0.0.2\"]", "gossip.seeds", "10.0.0.2"),
            (
                "key_file = \"k\"\nseeds = [\"10.0.0.256:1\"]",
                "gossip.seeds",
                "with a port",
            ),
            ("key_file = \"k\"\nseeds = [\"a b:1\"]", "gossip.seeds", "with a port"),
            ("key_file = \"k\"\nseeds = [\"node:0\"]", "gossip.seeds", "with a port"),
        ] {
            let error = parse(&format!("[gossip]\n{text}\n")).validate().unwrap_err();
            assert!(
                matches!(&error, ConfigError::Value { key: found, .. } if *found == key),
                "{text}: {error}"
            );
            assert!(error.to_string().contains(wanted), "{text}: {error}");
        }
        for seed in ["[2001:db8::1]:17400", "node_2:17400", "localhost:1"] {
            parse(&format!("[gossip]\nkey_file = \"k\"\nseeds = [\"{seed}\"]"))
                .validate()
                .unwrap();
        }
    }
}
