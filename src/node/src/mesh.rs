//! Messages between the cores of one node.

/// One message from a core to another core of the same node.
#[derive(Debug)]
pub enum MeshMessage {}
