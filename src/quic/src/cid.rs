//! Connection ids: the core in the first byte, then bytes nobody can predict.
//!
//! RFC 9000, section 5.1 asks that ids of one connection cannot be linked; the core is shared by thousands of connections and
//! the rest is drawn from a cryptographic generator.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn_proto::{ConnectionId, ConnectionIdGenerator, InvalidCid};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Unpredictable bytes in every connection id issued here.
pub const RANDOM_BYTES: usize = 8;
/// Length of every connection id issued here.
pub const LEN: usize = 1 + RANDOM_BYTES;
/// Length of the destination connection id a client of ours invents for its first packets (RFC 9000 asks for at least 8).
pub(crate) const INITIAL_LEN: usize = 16;

/// Longest connection id of QUIC version 1 (RFC 9000, section 17.2).
const MAX_LEN: usize = 20;

const _: () = assert!(LEN <= MAX_LEN && INITIAL_LEN <= MAX_LEN);
const _: () = assert!(
    INITIAL_LEN > RANDOM_BYTES,
    "the first byte of an initial id is not random"
);

/// Issues the ids of one core.
pub(crate) struct CoreCids {
    core: u8,
    rng: Arc<Mutex<StdRng>>,
}

impl CoreCids {
    pub(crate) fn new(core: u8, rng: Arc<Mutex<StdRng>>) -> Self {
        Self { core, rng }
    }
}

impl ConnectionIdGenerator for CoreCids {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut bytes = [0; LEN];
        bytes[0] = self.core;
        fill(&self.rng, &mut bytes[1..]);
        ConnectionId::new(&bytes)
    }

    fn validate(&self, cid: &ConnectionId) -> Result<(), InvalidCid> {
        if cid.len() == LEN && cid[0] == self.core {
            Ok(())
        } else {
            Err(InvalidCid)
        }
    }

    fn cid_len(&self) -> usize {
        LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// The first destination id of a connection to `core` of the server, or to whichever core chance picks.
pub(crate) fn initial(core: Option<u8>, rng: &Mutex<StdRng>) -> ConnectionId {
    let mut bytes = [0; INITIAL_LEN];
    fill(rng, &mut bytes);
    if let Some(core) = core {
        bytes[0] = core;
    }
    ConnectionId::new(&bytes)
}

/// The generator of one driver, shared with the ids' issuer, which quinn-proto wants to be `Send + Sync`: the lock is never
/// contended.
pub(crate) fn generator(seed: [u8; 32]) -> Arc<Mutex<StdRng>> {
    Arc::new(Mutex::new(StdRng::from_seed(seed)))
}

fn fill(rng: &Mutex<StdRng>, bytes: &mut [u8]) {
    rng.lock().unwrap_or_else(PoisonError::into_inner).fill_bytes(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_carry_their_core_and_differ() {
        let mut cids = CoreCids::new(3, generator([7; 32]));
        let (a, b) = (cids.generate_cid(), cids.generate_cid());
        assert_eq!((a[0], b[0]), (3, 3));
        assert_ne!(a, b);
        assert!(cids.validate(&a).is_ok());
        let foreign = CoreCids::new(2, generator([7; 32])).generate_cid();
        assert!(cids.validate(&foreign).is_err());
    }

    #[test]
    fn an_initial_id_can_name_a_core() {
        let rng = generator([1; 32]);
        assert_eq!(initial(Some(9), &rng)[0], 9);
        assert_ne!(initial(None, &rng), initial(None, &rng));
    }
}
