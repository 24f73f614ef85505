//! Connections of the VMM's own vfio-user client, and what we say and hear on them besides.

/// All connections of the process.
#[derive(Debug, Default)]
pub(crate) struct Streams {}
