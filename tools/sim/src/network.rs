//! The network between hosts: how long a datagram takes, whether it arrives, how often, and who is cut off from whom.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::dice::Dice;

/// A machine on the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Host {
    /// A node, by number.
    Node(usize),
    /// A client, by number.
    Client(usize),
}

/// How the network and the mesh behave everywhere.
#[derive(Debug, Clone)]
pub struct Weather {
    /// Datagrams lost, of 1,000.
    pub loss_per_mille: u64,
    /// Datagrams that arrive twice, of 1,000. The copy takes a time of its own.
    pub duplicate_per_mille: u64,
    /// Shortest time a datagram takes.
    pub delay: Duration,
    /// At most this much longer; a long one reorders.
    pub jitter: Duration,
    /// Datagrams that are held up, of 1,000.
    pub tail_per_mille: u64,
    /// How much longer than the others a datagram that is held up may take.
    pub tail: Duration,
    /// Whether datagrams reach the core their connection id names, as a kernel with steering sees to it. Otherwise the sender's
    /// port decides.
    pub steering: bool,
    /// Messages a core's mesh queue holds.
    pub mesh_capacity: usize,
    /// Datagrams the socket of a core that does not read holds.
    pub socket_capacity: usize,
}

impl Default for Weather {
    fn default() -> Self {
        Self {
            loss_per_mille: 0,
            duplicate_per_mille: 0,
            delay: Duration::from_micros(50),
            jitter: Duration::ZERO,
            tail_per_mille: 0,
            tail: Duration::ZERO,
            steering: true,
            mesh_capacity: 4096,
            socket_capacity: 4096,
        }
    }
}

/// What is wrong with particular links. A link is directed.
#[derive(Debug, Default)]
pub(crate) struct Links {
    cut: BTreeSet<(Host, Host)>,
    slow: BTreeMap<(Host, Host), Duration>,
}

impl Links {
    /// Cuts the way from each of `from` to each of `to`.
    pub(crate) fn cut(&mut self, from: &[Host], to: &[Host]) {
        for (&a, &b) in pairs(from, to) {
            self.cut.insert((a, b));
        }
    }

    /// Opens the way from each of `from` to each of `to` again.
    pub(crate) fn mend(&mut self, from: &[Host], to: &[Host]) {
        for (&a, &b) in pairs(from, to) {
            self.cut.remove(&(a, b));
            self.slow.remove(&(a, b));
        }
    }

    /// Makes every datagram from each of `from` to each of `to` take `extra` longer.
    pub(crate) fn slow(&mut self, from: &[Host], to: &[Host], extra: Duration) {
        for (&a, &b) in pairs(from, to) {
            self.slow.insert((a, b), extra);
        }
    }

    /// Opens every way and slows none.
    pub(crate) fn heal(&mut self) {
        self.cut.clear();
        self.slow.clear();
    }

    /// How long each copy of a datagram takes; none arrives when there is none.
    pub(crate) fn fate(
        &self,
        weather: &Weather,
        dice: &mut Dice,
        from: Host,
        to: Option<Host>,
    ) -> [Option<Duration>; 2] {
        let link = to.map(|to| (from, to));
        if link.is_some_and(|link| self.cut.contains(&link)) || dice.chance(weather.loss_per_mille) {
            return [None, None];
        }
        let slow = link.and_then(|link| self.slow.get(&link).copied()).unwrap_or_default();
        let mut time = || {
            let jitter = dice.below(weather.jitter.as_nanos() as u64);
            let tail = if dice.chance(weather.tail_per_mille) {
                dice.below(weather.tail.as_nanos() as u64)
            } else {
                0
            };
            weather.delay + slow + Duration::from_nanos(jitter + tail)
        };
        let first = time();
        let second = time();
        let twice = dice.chance(weather.duplicate_per_mille);
        [Some(first), twice.then_some(second)]
    }
}

fn pairs<'a>(from: &'a [Host], to: &'a [Host]) -> impl Iterator<Item = (&'a Host, &'a Host)> {
    from.iter()
        .flat_map(move |a| to.iter().map(move |b| (a, b)))
        .filter(|(a, b)| a != b)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Host = Host::Node(0);
    const B: Host = Host::Node(1);
    const C: Host = Host::Client(0);

    fn arrivals(links: &Links, weather: &Weather, from: Host, to: Host) -> usize {
        let mut dice = Dice::new(1);
        (0..1_000)
            .map(|_| links.fate(weather, &mut dice, from, Some(to)).iter().flatten().count())
            .sum()
    }

    #[test]
    fn a_cut_is_one_way_and_mended_by_pair_or_all_at_once() {
        let (mut links, weather) = (Links::default(), Weather::default());
        links.cut(&[A], &[A, B, C]);
        assert_eq!(arrivals(&links, &weather, A, B), 0);
        assert_eq!(arrivals(&links, &weather, A, C), 0);
        assert_eq!(arrivals(&links, &weather, B, A), 1_000);
        // Nobody is cut off from itself.
        assert_eq!(arrivals(&links, &weather, A, A), 1_000);
        links.mend(&[A], &[B]);
        assert_eq!(arrivals(&links, &weather, A, B), 1_000);
        assert_eq!(arrivals(&links, &weather, A, C), 0);
        links.heal();
        assert_eq!(arrivals(&links, &weather, A, C), 1_000);
    }

    #[test]
    fn loss_duplication_and_delay_are_as_often_as_said() {
        let links = Links::default();
        let lossy = Weather {
            loss_per_mille: 300,
            ..Weather::default()
        };
        assert!((600..800).contains(&arrivals(&links, &lossy, A, B)));
        let doubling = Weather {
            duplicate_per_mille: 300,
            ..Weather::default()
        };
        assert!((1_200..1_400).contains(&arrivals(&links, &doubling, A, B)));
        let tailed = Weather {
            jitter: Duration::from_millis(1),
            tail_per_mille: 100,
            tail: Duration::from_secs(1),
            ..Weather::default()
        };
        let mut dice = Dice::new(2);
        let times: Vec<_> = (0..1_000)
            .map(|_| links.fate(&tailed, &mut dice, A, Some(B))[0].unwrap())
            .collect();
        let slow = times.iter().filter(|time| **time > Duration::from_millis(2)).count();
        assert!((50..150).contains(&slow), "{slow}");
        assert!(times.iter().all(|time| *time >= tailed.delay));
    }

    #[test]
    fn a_slow_link_adds_its_time_in_its_direction() {
        let (mut links, weather) = (Links::default(), Weather::default());
        links.slow(&[A], &[B], Duration::from_millis(80));
        let mut dice = Dice::new(3);
        let mut time = |from, to| links.fate(&weather, &mut dice, from, Some(to))[0].unwrap();
        assert_eq!(time(A, B), weather.delay + Duration::from_millis(80));
        assert_eq!(time(B, A), weather.delay);
    }
}
