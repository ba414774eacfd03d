//! The journal on a simulated disk: what was written is what is recovered, whatever tears and rots.

mod damage;
mod disk;
mod random;
mod units;
