//! The checks, by the kind of guest they run in.

pub(crate) mod crash;
pub(crate) mod direct;
pub(crate) mod hotplug;
pub(crate) mod many;
pub(crate) mod messages;
pub(crate) mod msix;
pub(crate) mod reboot;
pub(crate) mod vfio;
pub(crate) mod virtio;

mod decode;
mod identity;
mod iommu;
mod shared_memory;
mod uio;
