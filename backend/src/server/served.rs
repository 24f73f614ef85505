use std::fmt;
use std::os::fd::{BorrowedFd, OwnedFd};

use barkeep_protocol::wire::{
    self, BarkeepExtensions, DmaMap, DmaUnmap, DmaUnmapFlags, FaultReport, InfoQuery, IrqAction,
    IrqData, RegionAccess, RegionData, RegionFlags, RegionInfo, RegionStateQuery, SetIrqs,
    WireError,
};

use super::function::HostedFunction;
use super::request_error::RequestError;
use crate::dma::{DmaAccess, Iova};

/// A function of any kind that a server serves.
pub struct ServedFunction(pub(super) Box<dyn Served>);

impl fmt::Debug for ServedFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<HostedFunction> for ServedFunction {
    fn from(function: HostedFunction) -> Self {
        Self(Box::new(function))
    }
}

#[cfg(feature = "passthrough")]
impl From<super::PassthroughFunction> for ServedFunction {
    fn from(function: super::PassthroughFunction) -> Self {
        Self(Box::new(function))
    }
}

/// What a session asks of a function: one method a request.
pub(super) trait Served: Send + fmt::Debug {
    fn device_info(&self) -> Reply;
    /// What a region is, for a client with these extensions.
    fn region_info(
        &self,
        query: InfoQuery,
        extensions: BarkeepExtensions,
    ) -> Result<Reply, RequestError>;
    fn irq_info(&self, query: InfoQuery) -> Result<Reply, RequestError>;
    fn set_irqs(&mut self, set: &SetIrqs<'_>, fds: Vec<OwnedFd>) -> Result<Reply, RequestError>;
    fn region_read(&mut self, access: &RegionAccess) -> Result<Reply, RequestError>;
    fn region_write(&mut self, write: &RegionData<'_>) -> Result<Reply, RequestError>;
    fn device_reset(&mut self) -> Result<Reply, RequestError>;
    fn dma_map(&mut self, map: &DmaMap, file: Option<OwnedFd>) -> Result<Reply, RequestError>;
    fn dma_unmap(&mut self, unmap: &DmaUnmap) -> Result<Reply, RequestError>;

    /// A guest access that the VMM's hypervisor could not complete on a mapped BAR.
    fn memory_fault(&mut self, report: &FaultReport) -> Result<Reply, RequestError>;
    fn region_state(&mut self, query: RegionStateQuery) -> Result<Reply, RequestError>;

    /// The client has gone: its memory and eventfds are given back and the function is as at
    /// power-on for the next one.
    fn client_left(&mut self);
}

/// A successful answer.
#[derive(Debug, Default)]
pub(super) struct Reply {
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

impl Reply {
    pub(super) fn body(body: Vec<u8>) -> Self {
        Self { body, fds: Vec::new() }
    }
}

/// A region that the function does not have.
pub(super) fn absent_region(index: u32) -> RegionInfo {
    let flags = RegionFlags::empty();
    RegionInfo { flags, index, size: 0, file_offset: 0, sparse: Vec::new() }
}

/// A descriptor of ours that a client gets.
pub(super) fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, RequestError> {
    fd.try_clone_to_owned().map_err(|error| {
        RequestError::Descriptor(wire::Errno::from_io_error(&error).unwrap_or(wire::Errno::IO))
    })
}

/// What a window allows, in the words of [`crate::dma`].
pub(super) fn dma_access(wire: wire::DmaAccess) -> DmaAccess {
    let mut access = DmaAccess::empty();
    access.set(DmaAccess::READ, wire.contains(wire::DmaAccess::READ));
    access.set(DmaAccess::WRITE, wire.contains(wire::DmaAccess::WRITE));
    access
}

/// What is to be unmapped: a range, or with `None` everything.
pub(super) fn unmap_range(unmap: &DmaUnmap) -> Result<Option<(Iova, u64)>, WireError> {
    let flags = unmap.flags;
    if flags.contains(DmaUnmapFlags::DIRTY_BITMAP) {
        return Err(WireError::Flags(flags.bits()));
    }
    if !flags.contains(DmaUnmapFlags::ALL) {
        return Ok(Some((Iova(unmap.address), unmap.size)));
    }
    match (unmap.address, unmap.size) {
        (0, 0) => Ok(None),
        _ => Err(WireError::Flags(flags.bits())),
    }
}

/// An access must end in its region.
pub(super) fn checked_end(access: &RegionAccess, size: u64) -> Result<(), RequestError> {
    let RegionAccess { offset, region, count } = *access;
    let count = u64::from(count);
    match offset.checked_add(count) {
        Some(end) if end <= size => Ok(()),
        _ => Err(RequestError::OutOfRegion { region, offset, count }),
    }
}

/// Without descriptors the range's eventfds are taken away; some of them is no request.
pub(super) fn check_descriptors(set: &SetIrqs<'_>, fds: &[OwnedFd]) -> Result<(), RequestError> {
    let expected = if set.data == IrqData::Eventfd { set.count as usize } else { 0 };
    if !fds.is_empty() && fds.len() != expected {
        return Err(RequestError::FdCount(fds.len()));
    }
    Ok(())
}

/// "a count (and start) of 0, with data flags of NONE disables all interrupts of the index"
pub(super) fn disables_all(set: &SetIrqs<'_>) -> bool {
    set.action == IrqAction::Trigger
        && set.data == IrqData::None
        && (set.start, set.count) == (0, 0)
}
