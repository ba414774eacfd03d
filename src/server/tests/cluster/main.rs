//! Clusters of real processes on the real disk, behind real faults: nodes that are killed, wiped and started again, directories that are
//! somebody else's, files with a flipped bit, and disks that are full or fail.

mod clients;
mod directories;
mod disks;
mod faults;
mod load;
mod membership;
mod processes;
mod snapshots;
