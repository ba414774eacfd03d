//! Whatever was sealed with the cluster's key: the bytes of an opened datagram never make the reader fail, nor decompress without bound,
//! and what is read can be written again.
#![no_main]

use chitchat::Serializable as _;
use libfuzzer_sys::fuzz_target;

// The server as a whole would bring its runtime and its sockets into the sanitizer.
#[path = "../../../../src/server/src/gossip/vetting.rs"]
#[allow(dead_code)]
mod vetting;

fuzz_target!(|data: &[u8]| {
    if let Ok(message) = vetting::read(data) {
        assert!(message.serialized_len() <= data.len());
    }
});
