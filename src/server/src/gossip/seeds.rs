//! Where nodes are looked for that are not heard of: addresses and names from the configuration, and addresses the node knows itself.
//!
//! Names are resolved here, again and again, so that a node that moved is found and a name server that is away holds nothing up.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::watch;

/// How long until names are resolved again, and how long where one could not be.
const REFRESH: Duration = Duration::from_secs(30);
const RETRY: Duration = Duration::from_secs(2);

/// Resolves names (with ports) for as long as anybody wants to know.
pub(super) async fn resolve(names: Vec<String>, found: watch::Sender<Vec<SocketAddr>>) {
    let mut said = BTreeSet::new();
    loop {
        let mut addresses = Vec::new();
        let mut wait = REFRESH;
        for name in &names {
            match tokio::net::lookup_host(name).await {
                Ok(of_name) => {
                    addresses.extend(of_name);
                    said.remove(name);
                }
                Err(error) => {
                    wait = RETRY;
                    // Once until it is found again.
                    if said.insert(name.clone()) {
                        tracing::warn!(name, %error, "a seed of the gossip cannot be resolved");
                    }
                }
            }
        }
        if found.send(addresses).is_err() {
            return;
        }
        tokio::time::sleep(wait).await;
    }
}

/// Goes round the seeds that are not heard of.
#[derive(Debug, Default)]
pub(super) struct Rota {
    next: usize,
}

impl Rota {
    /// The next of `seeds` that is not among `heard`.
    pub(super) fn next(&mut self, seeds: &[SocketAddr], heard: &BTreeSet<SocketAddr>) -> Option<SocketAddr> {
        let missing: BTreeSet<&SocketAddr> = seeds.iter().filter(|seed| !heard.contains(seed)).collect();
        let chosen = missing.iter().nth(self.next % missing.len().max(1)).map(|seed| **seed);
        self.next = self.next.wrapping_add(1);
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_seed_that_is_missing_has_its_turn() {
        let seeds: Vec<SocketAddr> = (1..=4).map(|port| ([127, 0, 0, 1], port).into()).collect();
        let heard = BTreeSet::from([seeds[1]]);
        let mut rota = Rota::default();
        let ports: Vec<u16> = (0..6).map(|_| rota.next(&seeds, &heard).unwrap().port()).collect();
        assert_eq!(ports, [1, 3, 4, 1, 3, 4]);
        assert_eq!(rota.next(&seeds, &seeds.iter().copied().collect()), None);
        assert_eq!(rota.next(&[], &BTreeSet::new()), None);
    }
}
