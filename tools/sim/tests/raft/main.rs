//! Replication over the simulator: openraft's suites on its executor and disk, power cuts under the journal, and shards of three
//! replicas whose nodes die, are cut off and come back, judged by the checkers of histories.

mod cluster;
mod group;
mod suites;
