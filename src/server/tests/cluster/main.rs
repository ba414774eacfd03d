//! Clusters of real processes on the real disk, behind real faults: nodes that are killed, wiped and started again, directories that are
//! somebody else's, and files with a flipped bit.

mod directories;
mod faults;
mod load;
mod processes;
mod snapshots;
