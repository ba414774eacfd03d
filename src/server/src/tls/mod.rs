//! Certificates: who a certificate says its holder is, issuing them, and loading them from files.
//!
//! There is no plaintext mode: whatever talks to a node shows a certificate of the cluster's authority, and who it is comes from a
//! URI in that certificate ([`identity`]), never from an address or a common name.

pub mod identity;
pub mod issue;
pub mod load;
