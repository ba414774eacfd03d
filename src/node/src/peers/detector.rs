//! Who is alive: a failure detector over whatever is heard from other nodes.
//!
//! A node is alive once something was heard of it, and suspected after a time of silence. The silence is measured in time this
//! core was *listening*: a core that did not run for a while (a stopped process, a machine that froze, a neighbour that took the
//! processor) has not heard anybody and must not conclude from it that everybody else is gone. So each step counts at most
//! [`MOST_COUNTED`] intervals, however much time has passed since the one before.
//!
//! Of two nodes the one with the smaller id pings, once an interval, unless the two have heard from each other anyway; the other
//! answers. So an idle pair costs one exchange an interval.
//!
//! Pure: time is an argument, and what is to be done is the result.

use std::time::{Duration, Instant};

/// Intervals one step may count for, at most: one step is late by less than that on a core that runs.
const MOST_COUNTED: u32 = 2;

/// What is known of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing was heard since this core began, or since the node went.
    Unknown,
    Alive,
}

#[derive(Debug)]
struct Watched {
    state: State,
    /// When it was last heard of, in time listened.
    heard: Duration,
    /// Whether it was heard of, and spoken to, since the last step.
    heard_lately: bool,
    spoken_lately: bool,
    /// Whether this node is the one that pings.
    pings: bool,
}

/// What a step asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finding {
    /// The node was silent for too long.
    Suspected(usize),
    /// The node is to be pinged.
    Ping(usize),
}

#[derive(Debug)]
pub(super) struct Detector {
    interval: Duration,
    suspect_after: Duration,
    /// Time listened since the beginning.
    listened: Duration,
    last: Instant,
    nodes: Vec<Watched>,
}

impl Detector {
    /// Watches nobody yet.
    pub(super) const fn new(now: Instant, interval: Duration, suspect_after: Duration) -> Self {
        Self {
            interval,
            suspect_after,
            listened: Duration::ZERO,
            last: now,
            nodes: Vec::new(),
        }
    }

    /// Watches one node more; nodes are numbered from 0. `pings`: whether this node is the one of the two that pings.
    pub(super) fn watch(&mut self, pings: bool) {
        self.nodes.push(Watched {
            state: State::Unknown,
            heard: Duration::ZERO,
            heard_lately: false,
            spoken_lately: false,
            pings,
        });
    }

    /// Watches a node no more; its number is not given again.
    pub(super) fn dismiss(&mut self, node: usize) {
        let watched = &mut self.nodes[node];
        watched.state = State::Unknown;
        watched.pings = false;
    }

    /// Something arrived from a node; `talk` says that it was no sign of life asked for here. `true`: it was not known to be alive.
    pub(super) fn heard(&mut self, node: usize, talk: bool) -> bool {
        let watched = &mut self.nodes[node];
        watched.heard = self.listened;
        watched.heard_lately |= talk;
        std::mem::replace(&mut watched.state, State::Alive) != State::Alive
    }

    /// Something other than a sign of life was sent to a node.
    pub(super) fn spoken(&mut self, node: usize) {
        self.nodes[node].spoken_lately = true;
    }

    /// The node said that it goes. `true`: it was known to be alive.
    pub(super) fn gone(&mut self, node: usize) -> bool {
        std::mem::replace(&mut self.nodes[node].state, State::Unknown) == State::Alive
    }

    /// When the next step is due.
    pub(super) fn next(&self) -> Instant {
        self.last + self.interval
    }

    /// A step, if one is due. To be taken after everything that has arrived was heard.
    pub(super) fn step(&mut self, now: Instant, mut found: impl FnMut(Finding)) {
        if now < self.next() {
            return;
        }
        let passed = now.saturating_duration_since(self.last);
        self.last = now;
        self.listened += passed.min(self.interval * MOST_COUNTED);
        for (node, watched) in self.nodes.iter_mut().enumerate() {
            if watched.state == State::Alive && self.listened.saturating_sub(watched.heard) > self.suspect_after {
                watched.state = State::Unknown;
                found(Finding::Suspected(node));
            }
            let talked = std::mem::take(&mut watched.heard_lately) & std::mem::take(&mut watched.spoken_lately);
            if watched.pings && !talked {
                found(Finding::Ping(node));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_millis(100);
    const LIMIT: Duration = Duration::from_millis(500);

    fn detector(start: Instant) -> Detector {
        let mut detector = Detector::new(start, INTERVAL, LIMIT);
        detector.watch(true);
        detector.watch(false);
        detector
    }

    fn step(detector: &mut Detector, now: Instant) -> Vec<Finding> {
        let mut found = Vec::new();
        detector.step(now, |finding| found.push(finding));
        found
    }

    /// Any instant: all others are counted from it.
    #[allow(clippy::disallowed_methods, reason = "an Instant can be had in no other way")]
    fn origin() -> Instant {
        Instant::now()
    }

    #[test]
    fn a_silent_node_is_suspected_after_the_time_and_not_before() {
        let start = origin();
        let mut detector = detector(start);
        assert!(detector.heard(0, false), "it was unknown");
        assert!(!detector.heard(0, false), "it is known");
        for tick in 1..=5 {
            let found = step(&mut detector, start + INTERVAL * tick);
            assert!(!found.contains(&Finding::Suspected(0)), "tick {tick}");
        }
        let found = step(&mut detector, start + INTERVAL * 6);
        assert_eq!(found, [Finding::Suspected(0), Finding::Ping(0)]);
        assert!(!step(&mut detector, start + INTERVAL * 7).contains(&Finding::Suspected(0)));
        assert!(detector.heard(0, false), "it is back");
    }

    #[test]
    fn a_node_never_heard_of_is_not_suspected() {
        let start = origin();
        let mut detector = detector(start);
        for tick in 1..50 {
            assert_eq!(step(&mut detector, start + INTERVAL * tick), [Finding::Ping(0)]);
        }
    }

    #[test]
    fn a_stall_of_our_own_counts_little() {
        let start = origin();
        let mut detector = detector(start);
        detector.heard(0, false);
        detector.heard(1, false);
        step(&mut detector, start + INTERVAL);
        // Ten seconds in which nothing ran here: as if two intervals had passed.
        let late = start + Duration::from_secs(10);
        assert_eq!(step(&mut detector, late), [Finding::Ping(0)]);
        detector.heard(1, false);
        let mut suspected = Vec::new();
        for tick in 1..=3 {
            suspected.extend(step(&mut detector, late + INTERVAL * tick));
        }
        assert!(
            suspected.contains(&Finding::Suspected(0)),
            "it was silent for six intervals listened"
        );
        assert!(!suspected.contains(&Finding::Suspected(1)));
    }

    #[test]
    fn the_smaller_id_pings_unless_the_two_talk() {
        let start = origin();
        let mut detector = detector(start);
        assert_eq!(step(&mut detector, start + INTERVAL / 2), [], "nothing is due");
        assert_eq!(step(&mut detector, start + INTERVAL), [Finding::Ping(0)]);
        detector.heard(0, true);
        assert_eq!(
            step(&mut detector, start + INTERVAL * 2),
            [Finding::Ping(0)],
            "it hears nothing"
        );
        detector.heard(0, true);
        detector.spoken(0);
        assert_eq!(step(&mut detector, start + INTERVAL * 3), []);
        // Pings and pongs do not make each other superfluous.
        detector.heard(0, false);
        detector.spoken(0);
        assert_eq!(step(&mut detector, start + INTERVAL * 4), [Finding::Ping(0)]);
    }

    #[test]
    fn a_node_that_is_dismissed_is_neither_suspected_nor_pinged() {
        let start = origin();
        let mut detector = detector(start);
        detector.heard(0, false);
        detector.dismiss(0);
        detector.watch(true);
        for tick in 1..20 {
            assert_eq!(step(&mut detector, start + INTERVAL * tick), [Finding::Ping(2)]);
        }
    }

    #[test]
    fn a_node_that_says_it_goes_is_gone_at_once() {
        let mut detector = detector(origin());
        assert!(!detector.gone(0));
        detector.heard(0, false);
        assert!(detector.gone(0));
        assert!(detector.heard(0, false));
    }
}
