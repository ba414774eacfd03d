//! What a call between two nodes costs in CPU time: both sides, with their QUIC and TLS, and the simulated network between them.
//!
//!     cargo run --release -p generation-sim --example peer_figures
//!
//! For each number of calls begun in one turn: microseconds of CPU per call (a request of 100 bytes and its answer of 16), and
//! datagrams per call. Run it under `valgrind --tool=callgrind` to see where they go.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use generation_node::peers::{Handler, Liveness, PeerId, Request};
use generation_sim::{NodeSetup, Sim, Weather};

struct Answer;

impl Handler for Answer {
    fn request(&self, request: Request) {
        request.reply(Bytes::from_static(&[0; 16]));
    }

    fn message(&self, _from: PeerId, _shard: u16, _kind: u8, _payload: Bytes) {}

    fn liveness(&self, _node: u64, _change: Liveness) {}
}

fn main() {
    let calls: u32 = std::env::args()
        .nth(1)
        .map_or(200_000, |text| text.parse().expect("a number of calls"));
    println!("{:>14} {:>12} {:>16}", "calls a turn", "us a call", "datagrams a call");
    for batch in [1, 4, 16, 64, 256, 1024] {
        let mut sim = Sim::new(1, Weather::default());
        let setup = NodeSetup {
            cores: 1,
            nodes: 2,
            ..NodeSetup::default()
        };
        for node in 0..2 {
            sim.node(&setup);
            sim.peers(node, 0).set_handler(Rc::new(Answer));
        }
        sim.until(|sim| sim.peers(0, 0).is_alive(2).then_some(()));
        let rounds = (calls / batch).clamp(1, 20_000);
        let (before, sent) = (Instant::now(), sim.sent());
        let payload = Bytes::from_static(&[1; 100]);
        for _ in 0..rounds {
            let left = Rc::new(Cell::new(batch));
            let peers = sim.peers(0, 0);
            let deadline = sim.now() + Duration::from_secs(1);
            let (done, payload) = (Rc::clone(&left), payload.clone());
            sim.spawn(0, async move {
                let to = PeerId { node: 2, core: 0 };
                let waits: Vec<_> = (0..batch)
                    .map(|_| peers.call(to, 5, 1, payload.clone(), deadline))
                    .collect();
                for wait in waits {
                    wait.await.expect("an answer");
                    done.set(done.get() - 1);
                }
            });
            sim.until(|_| (left.get() == 0).then_some(()));
        }
        // The simulation is one thread that never waits, so its time is its CPU time.
        let took = before.elapsed().as_secs_f64() * 1e6;
        let count = f64::from(rounds) * f64::from(batch);
        let datagrams = (sim.sent() - sent) as f64 / count;
        println!("{batch:>14} {:>12.3} {datagrams:>16.3}", took / count);
    }
}
