use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use barkeep_protocol::page::decode::{Counters, DecodeState};
use barkeep_protocol::wire::{
    self, BarkeepExtensions, DeviceFeature, DmaMap, DmaUnmap, FaultReport, InfoQuery, IoFdsQuery,
    IrqData, RegionAccess, RegionFlags, RegionInfo, RegionStateQuery, SetIrqs,
};

use super::event_loop::{Epoll, Interest, Source, Token};
use super::function::{Changes, Damaged, HostedFunction, Image, Recorded};
use super::request_error::RequestError;
use crate::devices::{MemoryMessage, Ticket};
use crate::dma::{DmaAccess, DmaError, Iova};
use crate::irq::EventFd;
use crate::state::Scratch;

/// A function of any kind that a server serves.
pub struct ServedFunction(pub(super) Box<dyn Served>);

impl ServedFunction {
    /// Has the event loop report what wakes the function.
    pub(super) fn watch_wakes(&self, epoll: &Epoll, port: usize) -> io::Result<()> {
        for (index, eventfd) in self.0.wakes().into_iter().enumerate() {
            let wake = u16::try_from(index).expect("a device keeps to its limit of wakes");
            epoll.add(eventfd, Token::Port(port, Source::Wake(wake)), Interest::Edge)?;
        }
        Ok(())
    }

    /// Tells the function of an event that is its own, whether there is a client or not.
    pub(super) fn hear(&mut self, source: Source) {
        match source {
            Source::Wake(index) => self.0.woken(usize::from(index)),
            Source::Unmask => self.0.unmask(),
            // Whatever the client does or owes.
            Source::Work => self.0.work(),
            Source::Reload => self.0.reload(),
            Source::Listener | Source::Client | Source::Twin | Source::Look => {}
        }
    }
}

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

/// What a session asks of a function: one method a request, and what the function has to say by
/// itself.
pub(super) trait Served: Send + fmt::Debug {
    fn device_info(&self, reply: &mut Reply<'_>);
    /// What a region is, for a client with these extensions.
    fn region_info(
        &self,
        query: InfoQuery,
        extensions: BarkeepExtensions,
        reply: &mut Reply<'_>,
    ) -> Result<(), RequestError>;
    fn irq_info(&self, query: InfoQuery, reply: &mut Reply<'_>) -> Result<(), RequestError>;
    fn set_irqs(&mut self, set: &SetIrqs<'_>, fds: Vec<OwnedFd>) -> Result<(), RequestError>;
    /// Fills `data`, which holds zeros, with `access.count` bytes.
    fn region_read(&mut self, access: &RegionAccess, data: &mut [u8]) -> Result<(), RequestError>;
    fn region_write(&mut self, access: &RegionAccess, data: &[u8]) -> Result<(), RequestError>;
    fn device_reset(&mut self) -> Result<(), RequestError>;
    fn dma_map(&mut self, map: &DmaMap, file: Option<OwnedFd>) -> Result<(), RequestError>;
    fn dma_unmap(&mut self, unmap: &DmaUnmap, reply: &mut Reply<'_>) -> Result<(), RequestError>;

    /// Writes to a region that the client may turn into signals of eventfds, at most so many.
    fn region_io_fds(
        &self,
        query: &IoFdsQuery,
        most: usize,
        reply: &mut Reply<'_>,
    ) -> Result<(), RequestError>;
    /// Migration and the log of dirty pages. A function without them has no such feature.
    fn device_feature(
        &mut self,
        _request: &DeviceFeature<'_>,
        _reply: &mut Reply<'_>,
    ) -> Result<(), RequestError> {
        Err(RequestError::NoFeature)
    }
    /// Appends the next at most `limit` bytes of the function's state.
    fn migration_read(&mut self, _limit: usize, _out: &mut Vec<u8>) -> Result<(), RequestError> {
        Err(RequestError::NoFeature)
    }
    fn migration_write(&mut self, _data: &[u8]) -> Result<(), RequestError> {
        Err(RequestError::NoFeature)
    }

    /// A guest access that the VMM's hypervisor could not complete on a mapped BAR.
    fn memory_fault(
        &mut self,
        report: &FaultReport,
        reply: &mut Reply<'_>,
    ) -> Result<(), RequestError>;
    fn region_state(
        &mut self,
        query: RegionStateQuery,
        reply: &mut Reply<'_>,
    ) -> Result<(), RequestError>;

    /// What it decodes now.
    fn decode_state(&self) -> DecodeState;
    /// What it has completed for the client otherwise than the client wanted.
    fn completions(&self) -> Counters;

    /// The address that the client is to be asked about next, if there is one.
    fn next_address(&mut self) -> Option<Iova> {
        None
    }
    /// The next thing to ask the client for, about at most `limit` bytes.
    fn next_message(&mut self, _limit: usize) -> Option<MemoryMessage> {
        None
    }
    /// What the client answered to it: the bytes that were read, none for a write.
    fn answered(&mut self, _ticket: Ticket, _answer: Result<&[u8], DmaError>) {}

    /// Whether there is work left that needs no client: others had their turn meanwhile.
    fn has_work(&self) -> bool {
        false
    }
    /// Does a share of that work.
    fn work(&mut self) {}

    /// Eventfds that wake the function, by index. They stay the same.
    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
    fn woken(&mut self, _index: usize) {}
    /// The operator wants it to look at its surroundings anew.
    fn reload(&mut self) {}
    /// The client's eventfd whose signal unmasks INTx, if it set one.
    fn unmask_eventfd(&self) -> Option<&Arc<EventFd>> {
        None
    }
    fn unmask(&mut self) {}

    /// Words of memory that outlive the process, for what changes too often to be recorded.
    fn scratch_words(&mut self) -> usize {
        0
    }
    /// Gives it that memory: zeros, or what a predecessor left, which [`recover`](Self::recover) then
    /// tells more of.
    fn set_scratch(&mut self, _scratch: Scratch) {}
    /// Descriptors of its own that a client may have, for a successor to adopt.
    fn kept(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }
    /// Takes over those of a predecessor, before anything else happens.
    fn adopt(&mut self, _kept: Vec<OwnedFd>) -> io::Result<()> {
        Ok(())
    }
    /// What of its state differs from an image of it, which is brought up to date. A function whose
    /// state can't be saved has none.
    fn record(&mut self, _image: &mut Image) -> Changes {
        Changes::default()
    }
    /// Becomes what was recorded, and does nothing until [`go_on`](Self::go_on): what the client has
    /// set up is set up again meanwhile.
    ///
    /// A function whose state can't be saved is as at power-on, and there is nothing recorded of it.
    fn recover(&mut self, _recorded: Recorded<'_>) -> Result<(), Damaged> {
        Ok(())
    }
    fn go_on(&mut self) {}
    /// Finishes or abandons what is in flight in the client's memory.
    fn quiesce(&mut self) {}
    /// Whether the client is to be asked for something next.
    fn has_message(&self) -> bool {
        false
    }

    /// The client has gone: its memory and eventfds are given back and the function is as at
    /// power-on for the next one.
    fn client_left(&mut self);
}

/// A successful answer in the making.
#[derive(Debug)]
pub(super) struct Reply<'a> {
    /// The payload is appended here.
    pub(super) body: &'a mut Vec<u8>,
    fds: &'a mut Vec<OwnedFd>,
}

impl<'a> Reply<'a> {
    pub(super) fn new(body: &'a mut Vec<u8>, fds: &'a mut Vec<OwnedFd>) -> Self {
        Self { body, fds }
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.body.extend_from_slice(bytes);
    }

    pub(super) fn fd(&mut self, fd: OwnedFd) {
        self.fds.push(fd);
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
