use std::rc::Rc;

use openraft_rt::testing::Suite;

use super::{Runtime, with_driver};
use crate::raft::testing::Bench;

/// openraft's own suite for runtimes.
#[test]
fn the_conformance_suite_passes() {
    with_driver(Rc::new(Bench::new()), Suite::<Runtime>::test_all);
}
