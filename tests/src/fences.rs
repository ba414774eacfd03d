//! The dependency fences: which crate of the workspace may know which, and what none of the pure ones may reach.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// The edges between crates of the workspace that are allowed, development dependencies included. Whatever is not here is
/// refused; a crate that is not here may depend on none.
const ALLOWED_EDGES: &[(&str, &[&str])] = &[
    ("generation-proto", &[]),
    ("generation-engine", &[]),
    ("generation-quic", &[]),
    (
        "generation-node",
        &["generation-engine", "generation-proto", "generation-quic"],
    ),
    (
        "generation-server",
        &[
            "generation-client",
            "generation-node",
            "generation-proto",
            "generation-quic",
        ],
    ),
    ("generation-client", &["generation-proto"]),
    (
        "generation-sim",
        &[
            "generation-client",
            "generation-engine",
            "generation-node",
            "generation-proto",
            "generation-quic",
        ],
    ),
    (
        "generation-bench",
        &["generation-client", "generation-proto", "generation-quic"],
    ),
    ("generation-cluster-load", &["generation-bench", "generation-client"]),
    (
        "generation-benches",
        &["generation-engine", "generation-proto", "generation-quic"],
    ),
    // The tests of the whole stand outside: real processes through the client, and the wire by hand.
    (
        "generation-tests",
        &["generation-client", "generation-proto", "generation-quic"],
    ),
];

/// Runtimes, sockets and kernel interfaces: out of reach of everything that runs in the simulator.
const WORLD: &[&str] = &[
    "async-std",
    "glommio",
    "glommio-ng",
    "io-uring",
    "mio",
    "monoio",
    "quinn",
    "quinn-udp",
    "smol",
    "socket2",
    "tokio",
    "tokio-uring",
];

/// What the state machine and the protocol must not reach beside the world: replication, the transport, randomness.
const BEYOND_PURE: &[&str] = &[
    "getrandom",
    "openraft",
    "quinn-proto",
    "rand",
    "ring",
    "rustls",
    "tracing",
];

/// For each pure crate the lists of packages it must not reach.
const UNREACHABLE: &[(&str, &[&[&str]])] = &[
    ("generation-engine", &[WORLD, BEYOND_PURE]),
    ("generation-proto", &[WORLD, BEYOND_PURE]),
    ("generation-quic", &[WORLD, &["openraft"]]),
    ("generation-node", &[WORLD]),
];

/// The feature that plants bugs, for the simulator to find. Only a command line may ask for it.
const MUTANTS: &str = "mutants";

/// The part of `cargo metadata` that the fences are about.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Graph {
    /// For each crate of the workspace the other crates of the workspace it depends on in any way.
    pub edges: BTreeMap<String, BTreeSet<String>>,
    /// For each package the packages it links or builds with, development dependencies left out.
    pub links: BTreeMap<String, BTreeSet<String>>,
    /// Crates of the workspace that have bugs planted in them where nobody asks for any.
    pub planted: BTreeSet<String>,
}

/// A broken fence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// A crate of the workspace depends on one it must not know.
    Edge {
        /// The crate.
        from: String,
        /// What it depends on.
        to: String,
    },
    /// A pure crate reaches a package that acts on the world.
    Reach {
        /// From the crate to the package, each depending on the next.
        path: Vec<String>,
    },
    /// A crate has planted bugs though nobody has asked for them.
    Planted {
        /// The crate.
        name: String,
    },
    /// A crate that the fences are about is not in the workspace: they would prove nothing of it.
    Missing {
        /// The crate.
        name: String,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Edge { from, to } => write!(f, "{from} must not depend on {to}"),
            Self::Reach { path } => write!(f, "a pure crate reaches the world: {}", path.join(" -> ")),
            Self::Planted { name } => write!(
                f,
                "{name} has bugs planted in it: nothing may ask for the feature {MUTANTS}"
            ),
            Self::Missing { name } => write!(f, "{name} is not a crate of the workspace"),
        }
    }
}

impl Graph {
    /// Asks cargo for the graph of the workspace at `root`, for the platform the tests run on.
    ///
    /// # Panics
    /// When cargo cannot tell it: a test that uses the graph has then failed.
    pub fn of_workspace(root: &Path) -> Self {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let output = Command::new(cargo)
            .args(["metadata", "--format-version", "1", "--filter-platform", &platform])
            .current_dir(root)
            .output()
            .expect("cargo metadata can be started");
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "cargo metadata failed: {complaint}");
        let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
        Self::from_metadata(&metadata).expect("cargo metadata has packages, members and a resolution")
    }

    /// Reads the graph out of the JSON of `cargo metadata`. `None` when a part of it is not there.
    pub fn from_metadata(metadata: &Value) -> Option<Self> {
        let mut names = BTreeMap::new();
        for package in metadata["packages"].as_array()? {
            names.insert(package["id"].as_str()?, package["name"].as_str()?);
        }
        let mut members = BTreeSet::new();
        for member in metadata["workspace_members"].as_array()? {
            members.insert(*names.get(member.as_str()?)?);
        }
        let mut graph = Self::default();
        for node in metadata["resolve"]["nodes"].as_array()? {
            let from = *names.get(node["id"].as_str()?)?;
            let links = graph.links.entry(from.to_owned()).or_default();
            for dependency in node["deps"].as_array()? {
                let to = *names.get(dependency["pkg"].as_str()?)?;
                if members.contains(from) && members.contains(to) {
                    graph.edges.entry(from.to_owned()).or_default().insert(to.to_owned());
                }
                let only_dev = dependency["dep_kinds"]
                    .as_array()?
                    .iter()
                    .all(|kind| kind["kind"] == "dev");
                if !only_dev && !is_dormant(metadata, node, to) {
                    links.insert(to.to_owned());
                }
            }
            if members.contains(from) {
                graph.edges.entry(from.to_owned()).or_default();
                let mut features = node["features"].as_array().into_iter().flatten();
                if features.any(|feature| feature == MUTANTS) {
                    graph.planted.insert(from.to_owned());
                }
            }
        }
        Some(graph)
    }

    /// Every fence that the graph breaks.
    pub fn violations(&self) -> Vec<Violation> {
        let planted = self.planted.iter().cloned();
        let mut violations: Vec<_> = planted.map(|name| Violation::Planted { name }).collect();
        for (from, targets) in &self.edges {
            let allowed = ALLOWED_EDGES
                .iter()
                .find_map(|&(name, allowed)| (name == from).then_some(allowed))
                .unwrap_or_default();
            for to in targets.iter().filter(|to| !allowed.contains(&to.as_str())) {
                violations.push(Violation::Edge {
                    from: from.clone(),
                    to: to.clone(),
                });
            }
        }
        for &(name, lists) in UNREACHABLE {
            if !self.edges.contains_key(name) {
                violations.push(Violation::Missing { name: name.to_owned() });
                continue;
            }
            let banned: BTreeSet<&str> = lists.concat().into_iter().collect();
            violations.extend(self.paths(name, &banned).map(|path| Violation::Reach { path }));
        }
        violations
    }

    /// A shortest path from `start` to each of the `banned` packages that it reaches.
    fn paths(&self, start: &str, banned: &BTreeSet<&str>) -> impl Iterator<Item = Vec<String>> {
        let mut found = Vec::new();
        let mut seen = BTreeSet::from([start]);
        let mut queue = std::collections::VecDeque::from([vec![start]]);
        while let Some(path) = queue.pop_front() {
            let last = path[path.len() - 1];
            for next in self.links.get(last).into_iter().flatten() {
                if !seen.insert(next) {
                    continue;
                }
                let mut path = path.clone();
                path.push(next);
                if banned.contains(next.as_str()) {
                    found.push(path.iter().map(|&name| name.to_owned()).collect());
                } else {
                    queue.push_back(path);
                }
            }
        }
        found.into_iter()
    }
}

/// Whether a dependency is optional and no feature in force asks for it: `cargo metadata` lists one that is only named weakly
/// (`name?/feature`), and it is not linked.
fn is_dormant(metadata: &Value, node: &Value, to: &str) -> bool {
    let package = metadata["packages"].as_array().into_iter().flatten();
    let Some(package) = package.into_iter().find(|package| package["id"] == node["id"]) else {
        return false;
    };
    let declared = package["dependencies"].as_array().into_iter().flatten();
    let mut declared = declared
        .filter(|declared| declared["name"] == to && declared["kind"] != "dev")
        .peekable();
    if declared.peek().is_none() || !declared.all(|declared| declared["optional"] == true) {
        return false;
    }
    let asked = |feature: &Value| {
        let parts = package["features"][feature.as_str().unwrap_or_default()].as_array();
        let mut parts = parts.into_iter().flatten().filter_map(Value::as_str);
        parts.any(|part| part.trim_start_matches("dep:") == to || part.starts_with(&format!("{to}/")))
    };
    let in_force = node["features"].as_array().into_iter().flatten();
    !in_force.into_iter().any(asked)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A graph of every crate the fences are about, with the links given.
    fn graph(links: &[(&str, &str)]) -> Graph {
        let mut graph = Graph::default();
        for &(name, _) in ALLOWED_EDGES {
            graph.edges.insert(name.to_owned(), BTreeSet::new());
        }
        for &(from, to) in links {
            graph.links.entry(from.to_owned()).or_default().insert(to.to_owned());
            if from.starts_with("generation-") && to.starts_with("generation-") {
                graph.edges.entry(from.to_owned()).or_default().insert(to.to_owned());
            }
        }
        graph
    }

    #[test]
    fn the_edges_of_the_design_are_allowed() {
        let graph = graph(&[
            ("generation-node", "generation-engine"),
            ("generation-node", "generation-quic"),
            ("generation-server", "generation-node"),
            ("generation-server", "glommio-ng"),
            ("generation-client", "tokio"),
        ]);
        assert_eq!(graph.violations(), []);
    }

    #[test]
    fn a_planted_edge_is_found() {
        for (from, to) in [
            ("generation-engine", "generation-proto"),
            ("generation-proto", "generation-engine"),
            ("generation-node", "generation-client"),
            ("generation-sim", "generation-server"),
            ("generation-bench", "generation-engine"),
            ("generation-unheard-of", "generation-proto"),
        ] {
            let expected = Violation::Edge {
                from: from.to_owned(),
                to: to.to_owned(),
            };
            assert_eq!(graph(&[(from, to)]).violations(), [expected]);
        }
    }

    #[test]
    fn a_planted_runtime_is_found_however_deep() {
        let graph = graph(&[
            ("generation-node", "some-crate"),
            ("some-crate", "another"),
            ("another", "tokio"),
            ("another", "some-crate"),
        ]);
        let path = ["generation-node", "some-crate", "another", "tokio"]
            .map(str::to_owned)
            .to_vec();
        assert_eq!(graph.violations(), [Violation::Reach { path }]);
    }

    #[test]
    fn bugs_that_nobody_has_asked_for_are_found() {
        let metadata = |features| {
            json!({
                "packages": [{ "id": "0", "name": "generation-node" }],
                "workspace_members": ["0"],
                "resolve": { "nodes": [{ "id": "0", "deps": [], "features": features }] },
            })
        };
        let planted = |features| Graph::from_metadata(&metadata(features)).unwrap().planted;
        assert!(planted(json!(["default"])).is_empty());
        let name = "generation-node".to_owned();
        let mut graph = graph(&[]);
        graph.planted = planted(json!(["default", "mutants"]));
        assert_eq!(graph.violations(), [Violation::Planted { name }]);
    }

    #[test]
    fn a_pure_crate_that_is_gone_is_reported() {
        let mut graph = graph(&[]);
        graph.edges.remove("generation-engine");
        let name = "generation-engine".to_owned();
        assert_eq!(graph.violations(), [Violation::Missing { name }]);
    }

    #[test]
    fn what_is_only_named_weakly_is_not_linked() {
        let graph = |features: &[&str]| {
            let metadata = json!({
                "packages": [
                    {"id": "a#1", "name": "a", "dependencies": [{"name": "tokio", "optional": true}],
                     "features": {"weak": ["tokio?/x"], "strong": ["dep:tokio"]}},
                    {"id": "t#1", "name": "tokio"},
                ],
                "workspace_members": [],
                "resolve": {"nodes": [
                    {"id": "a#1", "features": features, "deps": [{"pkg": "t#1", "dep_kinds": [{"kind": null}]}]},
                ]},
            });
            Graph::from_metadata(&metadata).unwrap().links["a"].len()
        };
        assert_eq!((graph(&["weak"]), graph(&["weak", "strong"])), (0, 1));
    }

    #[test]
    fn development_dependencies_are_edges_but_not_links() {
        let metadata = json!({
            "packages": [
                {"id": "a#1", "name": "generation-engine"},
                {"id": "b#1", "name": "generation-proto"},
                {"id": "t#1", "name": "tokio"},
            ],
            "workspace_members": ["a#1", "b#1"],
            "resolve": {"nodes": [
                {"id": "a#1", "deps": [
                    {"pkg": "b#1", "dep_kinds": [{"kind": "dev"}]},
                    {"pkg": "t#1", "dep_kinds": [{"kind": "dev"}]},
                ]},
                {"id": "b#1", "deps": [{"pkg": "t#1", "dep_kinds": [{"kind": "dev"}, {"kind": null}]}]},
                {"id": "t#1", "deps": []},
            ]},
        });
        let graph = Graph::from_metadata(&metadata).unwrap();
        assert_eq!(
            graph.edges["generation-engine"],
            BTreeSet::from(["generation-proto".to_owned()])
        );
        assert_eq!(graph.links["generation-engine"], BTreeSet::new());
        assert_eq!(graph.links["generation-proto"], BTreeSet::from(["tokio".to_owned()]));
        assert_eq!(Graph::from_metadata(&json!({})), None);
    }
}
