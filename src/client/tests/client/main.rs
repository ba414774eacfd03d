//! The client against a node in the same process that can be told to misbehave.

mod basics;
mod blocking;
mod chaos;
mod connecting;
#[allow(dead_code, reason = "the examples in the documentation use another part of it")]
#[path = "../fake/mod.rs"]
mod fake;
mod faults;
mod hedges;
mod once;
mod replicas;
mod routing;
mod scans;
mod seeds;

use std::time::Duration;

/// Waits until `condition` holds; fails the test when it does not come to that.
async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    assert!(
        tokio::time::timeout(Duration::from_secs(20), wait).await.is_ok(),
        "it did not come to this: {what}"
    );
}
