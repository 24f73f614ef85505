use std::os::fd::OwnedFd;

use barkeep_protocol::page::decode::{Counters, DecodeState};
use barkeep_protocol::wire::{
    BarkeepExtensions, DecodeFlags, DeviceFlags, DeviceInfo, DmaMap, DmaUnmap, DmaUnmapFlags,
    Errno, FaultReport, FaultVerdict, InfoQuery, IoFds, IoFdsQuery, IrqAction, IrqData, IrqInfo,
    IrqInfoFlags, PciIrq, PciRegion, RegionAccess, RegionFlags, RegionState, RegionStateQuery,
    SetIrqs, SparseArea, WireError,
};
use tracing::{error, info, warn};

use super::decode_page;
use super::request_error::RequestError;
use super::served::{
    Reply, Served, absent_region, check_descriptors, checked_end, dma_access, duplicate,
};
use crate::devices::passthrough::{
    Completion, IrqRequest, MapBars, VfioFunction, VfioIrq, VfioIrqError, VfioRegion,
};
use crate::dma::{DmaError, Iova};
use crate::irq::{EventFd, IrqError};
use crate::log_limit::RateLimit;

/// A real function, served: [`VfioFunction`] in the words of the wire.
#[derive(Debug)]
pub struct PassthroughFunction {
    name: String,
    function: VfioFunction,
    map: MapBars,
    regions: [RegionState; PciRegion::COUNT as usize],
    log: RateLimit,
    failure_log: RateLimit,
}

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

impl PassthroughFunction {
    /// `name` is what logs call it.
    #[must_use]
    pub fn new(name: impl Into<String>, function: VfioFunction, map: MapBars) -> Self {
        let name = name.into();
        if !function.resettable() {
            warn!(
                function = name,
                "the kernel can't reset this device: a client finds it as the one before left it"
            );
        }
        Self {
            name,
            function,
            map,
            regions: Default::default(),
            log: RateLimit::default(),
            failure_log: RateLimit::default(),
        }
    }
}

impl Served for PassthroughFunction {
    fn device_info(&self, reply: &mut Reply<'_>) {
        let mut flags = DeviceFlags::PCI;
        flags.set(DeviceFlags::RESET, self.function.resettable());
        let info = DeviceInfo { flags, num_regions: PciRegion::COUNT, num_irqs: PciIrq::COUNT };
        reply.bytes(&info.to_bytes());
    }

    fn region_info(
        &self,
        query: InfoQuery,
        extensions: BarkeepExtensions,
        reply: &mut Reply<'_>,
    ) -> Result<(), RequestError> {
        let region =
            PciRegion::from_index(query.index).ok_or(RequestError::NoRegion(query.index))?;
        let mut info = absent_region(query.index);
        if let Some(region) = self.target(region) {
            let description = self.function.region(region);
            info.flags.set(RegionFlags::READ, description.readable);
            info.flags.set(RegionFlags::WRITE, description.writable);
            info.size = description.size;
            let maps = self.map.allows(extensions.memory_fault);
            if maps && !description.mappable.is_empty() {
                reply.fd(duplicate(self.function.descriptor())?);
                info.flags |= RegionFlags::MMAP;
                info.file_offset = description.file_offset;
                if !description.wholly_mappable() {
                    let area = |part: &std::ops::Range<u64>| SparseArea {
                        offset: part.start,
                        size: part.end - part.start,
                    };
                    info.sparse = description.mappable.iter().map(area).collect();
                }
            }
        }
        reply.bytes(&info.to_bytes(query.argsz));
        Ok(())
    }

    /// The kernel offers none (`VFIO_DEVICE_IOEVENTFD` would be the client's to ask for).
    fn region_io_fds(
        &self,
        query: &IoFdsQuery,
        _: usize,
        reply: &mut Reply<'_>,
    ) -> Result<(), RequestError> {
        PciRegion::from_index(query.region).ok_or(RequestError::NoRegion(query.region))?;
        IoFds { region: query.region, entries: Vec::new() }.write_to(query, reply.body);
        Ok(())
    }

    fn irq_info(&self, query: InfoQuery, reply: &mut Reply<'_>) -> Result<(), RequestError> {
        let irq = vfio_irq(query.index)?;
        let description = self.function.irq(irq);
        let mut flags = IrqInfoFlags::empty();
        if description.count > 0 {
            // Vectors can always be added: what the kernel can't is done by enabling them anew.
            flags.set(IrqInfoFlags::EVENTFD, description.eventfd);
            flags.set(IrqInfoFlags::MASKABLE, description.maskable);
            flags.set(IrqInfoFlags::AUTOMASKED, description.automasked);
        }
        let info = IrqInfo { flags, index: query.index, count: description.count };
        reply.bytes(&info.to_bytes());
        Ok(())
    }

    fn set_irqs(&mut self, set: &SetIrqs<'_>, fds: Vec<OwnedFd>) -> Result<(), RequestError> {
        let irq = vfio_irq(set.index)?;
        if self.function.irq(irq).count == 0 {
            return Err(RequestError::NoIrq(set.index));
        }
        check_descriptors(set, &fds)?;
        let eventfds = fds.into_iter().map(EventFd::new).collect::<Result<Vec<_>, _>>()?;
        let range = IrqError::Range { start: set.start, count: set.count };
        let end = set.start.checked_add(set.count);
        if end.is_none_or(|end| end > self.function.irq(irq).count) {
            return Err(range.into());
        }
        if let Some(request) = irq_request(set, eventfds)? {
            self.function.set_irqs(irq, request).map_err(|error| match error {
                VfioIrqError::Absent => RequestError::NoIrq(set.index),
                VfioIrqError::Range { .. } => range.into(),
                VfioIrqError::NotMaskable => RequestError::IrqAction(set.index),
                VfioIrqError::Device(errno) => RequestError::Device(errno),
            })?;
        }
        Ok(())
    }

    fn region_read(&mut self, access: &RegionAccess, data: &mut [u8]) -> Result<(), RequestError> {
        let region = self.checked(access)?;
        // A bus has no access of no bytes.
        if !data.is_empty() {
            let completion = self.function.read(region, access.offset, data);
            self.completed(region, access, completion, Direction::Read);
        }
        Ok(())
    }

    fn region_write(&mut self, access: &RegionAccess, data: &[u8]) -> Result<(), RequestError> {
        let region = self.checked(access)?;
        if !data.is_empty() {
            let completion = self.function.write(region, access.offset, data);
            self.completed(region, access, completion, Direction::Write);
        }
        Ok(())
    }

    fn device_reset(&mut self) -> Result<(), RequestError> {
        self.function.reset().map_err(RequestError::Device)
    }

    fn dma_map(&mut self, map: &DmaMap, file: Option<OwnedFd>) -> Result<(), RequestError> {
        let file = file.map(|file| (file, map.file_offset));
        let access = dma_access(map.access);
        let result = self.function.dma_map(Iova(map.address), map.size, access, file);
        if let Err(error @ DmaError::Iommu(errno)) = &result
            && let Some(suppressed) = self.failure_log.admit()
        {
            let hint = match *errno {
                Errno::NOMEM => "; guest memory is pinned: raise the limit of locked memory",
                _ => "",
            };
            let (address, size) = (map.address, map.size);
            warn!(
                function = self.name,
                suppressed, "window of {size:#x} bytes at {address:#x} refused: {error}{hint}"
            );
        }
        Ok(result?)
    }

    fn dma_unmap(&mut self, unmap: &DmaUnmap, reply: &mut Reply<'_>) -> Result<(), RequestError> {
        self.function.dma_unmap(unmap_range(unmap)?)?;
        reply.bytes(&unmap.to_bytes());
        Ok(())
    }

    fn memory_fault(
        &mut self,
        report: &FaultReport,
        reply: &mut Reply<'_>,
    ) -> Result<(), RequestError> {
        let access = RegionAccess { offset: report.offset, region: report.region, count: 1 };
        let region = self.checked(&access)?;
        let VfioRegion::Bar(_) = region else {
            return Err(RequestError::NoRegion(report.region));
        };
        self.counters(report.region).memory_faults += 1;
        let claimed = self.function.claims(region);
        let epoch = self.function.epoch();
        let verdict = if !claimed {
            FaultVerdict::UnsupportedRequest { epoch }
        } else if self.map.allows(true) && self.function.maps(region, report.offset) {
            FaultVerdict::Map { epoch }
        } else {
            FaultVerdict::Trap { epoch }
        };
        reply.bytes(&verdict.to_bytes());
        Ok(())
    }

    fn region_state(
        &mut self,
        query: RegionStateQuery,
        reply: &mut Reply<'_>,
    ) -> Result<(), RequestError> {
        let region = PciRegion::from_index(query.region).and_then(|region| self.target(region));
        let region = region.ok_or(RequestError::NoRegion(query.region))?;
        let mut decode = DecodeFlags::empty();
        decode.set(DecodeFlags::CLAIMED, self.function.claims(region));
        let epoch = self.function.epoch();
        let counters = *self.counters(query.region);
        let state = RegionState { decode: decode.bits(), epoch, ..counters };
        reply.bytes(&state.to_bytes());
        Ok(())
    }

    /// As of the last request: others can change the device, and nobody tells.
    fn decode_state(&self) -> DecodeState {
        decode_page::state(self.function.epoch(), self.function.bars())
    }

    fn completions(&self) -> Counters {
        decode_page::counters(&self.regions)
    }

    fn client_left(&mut self) {
        if let Err(errno) = self.function.disconnect() {
            // Rarely anything but an unplugged device; a client that comes and goes must not fill
            // the log with it.
            if let Some(suppressed) = self.failure_log.admit() {
                error!(
                    function = self.name,
                    suppressed, "can't take everything back from the client that left: {errno}"
                );
            }
        }
        self.regions = Default::default();
    }
}

impl PassthroughFunction {
    /// The region, if the function has it.
    fn target(&self, region: PciRegion) -> Option<VfioRegion> {
        let region = match region {
            PciRegion::Bar(bar) => VfioRegion::Bar(bar),
            PciRegion::Rom => VfioRegion::Rom,
            PciRegion::Config => VfioRegion::Config,
            // Legacy addresses belong to the host's own display.
            PciRegion::Vga => return None,
        };
        (self.function.region(region).size > 0).then_some(region)
    }

    fn checked(&self, access: &RegionAccess) -> Result<VfioRegion, RequestError> {
        let region = PciRegion::from_index(access.region).and_then(|region| self.target(region));
        let region = region.ok_or(RequestError::NoRegion(access.region))?;
        checked_end(access, self.function.region(region).size)?;
        Ok(region)
    }

    /// Counts an access, and logs one that did not reach the device.
    fn completed(
        &mut self,
        region: VfioRegion,
        access: &RegionAccess,
        completion: Completion,
        direction: Direction,
    ) {
        let RegionAccess { offset, region: index, count } = *access;
        if region != VfioRegion::Config {
            let counters = self.counters(index);
            let counter = match (direction, completion) {
                (Direction::Read, Completion::Done) => &mut counters.reads,
                (Direction::Read, _) => &mut counters.reads_ur,
                (Direction::Write, Completion::Done) => &mut counters.writes,
                (Direction::Write, _) => &mut counters.writes_dropped,
            };
            *counter += 1;
        }
        let what = match direction {
            Direction::Read => "read",
            Direction::Write => "write",
        };
        let function = &self.name;
        match completion {
            Completion::Done => {}
            Completion::Unsupported => {
                if let Some(suppressed) = self.log.admit() {
                    info!(
                        function,
                        suppressed,
                        "Unsupported Request: {what} of {count} bytes at region {index}+{offset:#x}, which does not decode"
                    );
                }
            }
            Completion::Failed(errno) => {
                if let Some(suppressed) = self.failure_log.admit() {
                    error!(
                        function,
                        suppressed,
                        "the device fails: {what} of {count} bytes at region {index}+{offset:#x}: {errno}"
                    );
                }
            }
        }
    }

    fn counters(&mut self, region: u32) -> &mut RegionState {
        &mut self.regions[region as usize]
    }
}

/// What is to be unmapped: a range, or with `None` everything.
fn unmap_range(unmap: &DmaUnmap) -> Result<Option<(Iova, u64)>, WireError> {
    let flags = unmap.flags;
    if unmap.bitmap.is_some() {
        return Err(WireError::Flags(flags.bits()));
    }
    let all = flags.contains(DmaUnmapFlags::ALL);
    Ok((!all).then_some((Iova(unmap.address), unmap.size)))
}

fn vfio_irq(index: u32) -> Result<VfioIrq, RequestError> {
    Ok(match PciIrq::from_index(index).ok_or(RequestError::NoIrq(index))? {
        PciIrq::Intx => VfioIrq::Intx,
        PciIrq::Msi => VfioIrq::Msi,
        PciIrq::Msix => VfioIrq::Msix,
        PciIrq::Error => VfioIrq::Error,
        PciIrq::Request => VfioIrq::Request,
    })
}

/// What a SET_IRQS asks for; `None` when it means no vector.
fn irq_request(
    set: &SetIrqs<'_>,
    eventfds: Vec<EventFd>,
) -> Result<Option<IrqRequest>, RequestError> {
    if set.disables_index() {
        return Ok(Some(IrqRequest::Disable));
    }
    let (start, count) = (set.start, set.count as usize);
    if count == 0 {
        return Ok(None);
    }
    let which = match set.data {
        IrqData::None => vec![true; count],
        IrqData::Bool(bools) => bools.iter().map(|byte| *byte != 0).collect(),
        IrqData::Eventfd => {
            let mut eventfds = eventfds.into_iter();
            return match set.action {
                IrqAction::Trigger => {
                    let eventfds = (0..count).map(|_| eventfds.next()).collect();
                    Ok(Some(IrqRequest::Connect { start, eventfds }))
                }
                IrqAction::Unmask => Ok(Some(IrqRequest::UnmaskBy(eventfds.next()))),
                IrqAction::Mask => Err(RequestError::IrqAction(set.index)),
            };
        }
    };
    let meant = which.contains(&true);
    Ok(match set.action {
        IrqAction::Trigger => Some(IrqRequest::Trigger { start, which }),
        IrqAction::Mask => meant.then_some(IrqRequest::Mask),
        IrqAction::Unmask => meant.then_some(IrqRequest::Unmask),
    })
}

#[cfg(test)]
mod tests;
