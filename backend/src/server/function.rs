use std::os::fd::OwnedFd;

use barkeep_protocol::wire::limits::MAX_DMA_MAPS;
use barkeep_protocol::wire::{
    BarkeepExtensions, DecodeFlags, DeviceFlags, DeviceInfo, DmaMap, DmaUnmap, FaultReport,
    FaultVerdict, InfoQuery, PciIrq, PciRegion, RegionAccess, RegionData, RegionFlags, RegionState,
    RegionStateQuery, SetIrqs,
};
use tracing::info;

use super::rate_limit::RateLimit;
use super::request_error::RequestError;
use super::served::{
    Reply, Served, absent_region, checked_end, dma_access, duplicate, unmap_range,
};
use crate::devices::{Context, Device};
use crate::dma::{DmaTable, Iova};
use crate::irq::Interrupts;
use crate::pci::{
    BarIndex, BarKind, Effects, Function, RequestKind, ResetKind, SpecError, UnsupportedRequest,
};

mod interrupts;

/// A function with everything it needs to be served: the model, the device behind it, its windows
/// into guest memory and its interrupts.
///
/// Every access to a BAR passes [`Function::claims`] first. What no decoding function claims
/// completes as an Unsupported Request: reads return all ones, writes are dropped (PCIe 2.3.1).
pub struct HostedFunction {
    name: String,
    function: Function,
    device: Box<dyn Device>,
    interrupts: Interrupts,
    dma: DmaTable,
    regions: [RegionState; PciRegion::COUNT as usize],
    log: RateLimit,
}

impl std::fmt::Debug for HostedFunction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostedFunction").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What an access that nobody claimed wanted.
#[derive(Clone, Copy)]
enum Direction {
    Read,
    /// To memory space.
    Write,
    /// To I/O space: the requester waits for its completion.
    IoWrite,
}

/// A region that exists, by what serves it.
#[derive(Clone, Copy)]
enum Target {
    Bar(BarIndex),
    Config,
}

impl HostedFunction {
    /// Puts a device behind a function. `name` is what logs call it.
    ///
    /// # Errors
    /// [`SpecError`] when the device describes a function that can't exist: a bug of the device.
    pub fn new(name: impl Into<String>, device: Box<dyn Device>) -> Result<Self, SpecError> {
        let function = Function::new(device.spec())?;
        let vectors = function.spec().msi.map_or(0, |msi| msi.vectors.count());
        Ok(Self {
            name: name.into(),
            function,
            device,
            interrupts: Interrupts::new(vectors.into()),
            dma: DmaTable::new(MAX_DMA_MAPS),
            regions: Default::default(),
            log: RateLimit::default(),
        })
    }
}

impl Served for HostedFunction {
    fn client_left(&mut self) {
        // Before the windows go, whatever the reset does.
        self.device.quiesce();
        // Only an IOMMU could refuse.
        let _ = self.dma.unmap_all();
        self.interrupts.disconnect();
        self.reset_function();
        self.regions = Default::default();
    }

    fn device_info(&self) -> Reply {
        let info = DeviceInfo {
            flags: DeviceFlags::RESET | DeviceFlags::PCI,
            num_regions: PciRegion::COUNT,
            num_irqs: PciIrq::COUNT,
        };
        Reply::body(info.to_bytes())
    }

    fn region_info(&self, query: InfoQuery, _: BarkeepExtensions) -> Result<Reply, RequestError> {
        let region =
            PciRegion::from_index(query.index).ok_or(RequestError::NoRegion(query.index))?;
        let mut info = absent_region(query.index);
        let mut fds = Vec::new();
        if let Some((target, size)) = self.target(region) {
            info.flags = RegionFlags::READ | RegionFlags::WRITE;
            info.size = size;
            if let Target::Bar(bar) = target
                && let Some(mapping) = self.device.mapping(bar)
            {
                fds.push(duplicate(mapping.file)?);
                info.flags |= RegionFlags::MMAP;
                info.file_offset = mapping.offset;
            }
        }
        Ok(Reply { body: info.to_bytes(query.argsz), fds })
    }

    fn region_read(&mut self, access: &RegionAccess) -> Result<Reply, RequestError> {
        let target = self.checked(access)?;
        let mut body = access.reply_buffer();
        let data = &mut body[RegionAccess::SIZE..];
        match target {
            Target::Config => {
                self.function.config_read(offset_in_config(access.offset), data);
            }
            // A bus has no access of no bytes.
            Target::Bar(_) if data.is_empty() => {}
            Target::Bar(bar) => {
                data.fill(0xff);
                if self.function.claims(bar) {
                    let (device, mut context) = self.split();
                    device.bar_read(bar, access.offset, data, &mut context);
                    self.counters(access.region).reads += 1;
                } else {
                    self.unsupported(access, Direction::Read);
                }
            }
        }
        Ok(Reply::body(body))
    }

    fn region_write(&mut self, write: &RegionData<'_>) -> Result<Reply, RequestError> {
        let access = &write.access;
        match self.checked(access)? {
            Target::Config => {
                let offset = offset_in_config(access.offset);
                let effects = self.function.config_write(offset, write.data);
                self.apply(&effects);
            }
            Target::Bar(_) if write.data.is_empty() => {}
            Target::Bar(bar) if self.function.claims(bar) => {
                let (device, mut context) = self.split();
                device.bar_write(bar, access.offset, write.data, &mut context);
                self.counters(access.region).writes += 1;
            }
            Target::Bar(bar) => {
                let io = self.function.bar(bar).is_some_and(|bar| bar.kind == BarKind::Io);
                self.unsupported(access, if io { Direction::IoWrite } else { Direction::Write });
            }
        }
        Ok(Reply::body(access.to_bytes()))
    }

    fn irq_info(&self, query: InfoQuery) -> Result<Reply, RequestError> {
        interrupts::info(self, query)
    }

    fn set_irqs(&mut self, set: &SetIrqs<'_>, fds: Vec<OwnedFd>) -> Result<Reply, RequestError> {
        interrupts::set(self, set, fds)
    }

    fn device_reset(&mut self) -> Result<Reply, RequestError> {
        self.reset_function();
        Ok(Reply::default())
    }

    fn dma_map(&mut self, map: &DmaMap, file: Option<OwnedFd>) -> Result<Reply, RequestError> {
        let file = file.map(|file| (file, map.file_offset));
        self.dma.map(Iova(map.address), map.size, dma_access(map.access), file)?;
        Ok(Reply::default())
    }

    fn dma_unmap(&mut self, unmap: &DmaUnmap) -> Result<Reply, RequestError> {
        let range = unmap_range(unmap)?;
        self.device.quiesce();
        match range {
            Some((iova, size)) => self.dma.unmap(iova, size)?,
            None => self.dma.unmap_all()?,
        }
        Ok(Reply::body(unmap.to_bytes()))
    }

    fn memory_fault(&mut self, report: &FaultReport) -> Result<Reply, RequestError> {
        let access = RegionAccess { offset: report.offset, region: report.region, count: 1 };
        let Target::Bar(bar) = self.checked(&access)? else {
            return Err(RequestError::NoRegion(report.region));
        };
        self.counters(report.region).memory_faults += 1;
        let epoch = self.function.epoch();
        let verdict = if !self.function.claims(bar) {
            FaultVerdict::UnsupportedRequest { epoch }
        } else if self.device.mapping(bar).is_some() {
            FaultVerdict::Map { epoch }
        } else {
            FaultVerdict::Trap { epoch }
        };
        Ok(Reply::body(verdict.to_bytes()))
    }

    fn region_state(&mut self, query: RegionStateQuery) -> Result<Reply, RequestError> {
        let region = PciRegion::from_index(query.region)
            .filter(|region| self.target(*region).is_some())
            .ok_or(RequestError::NoRegion(query.region))?;
        let claimed = match region {
            PciRegion::Bar(index) => {
                BarIndex::new(index).is_some_and(|bar| self.function.claims(bar))
            }
            PciRegion::Rom | PciRegion::Config | PciRegion::Vga => true,
        };
        let mut decode = DecodeFlags::empty();
        decode.set(DecodeFlags::CLAIMED, claimed);
        let epoch = self.function.epoch();
        let counters = *self.counters(query.region);
        let state = RegionState { decode: decode.bits(), epoch, ..counters };
        Ok(Reply::body(state.to_bytes()))
    }
}

impl HostedFunction {
    /// Does outside of the function what a configuration write or reset changed in it.
    fn apply(&mut self, effects: &Effects) {
        if effects.is_empty() {
            return;
        }
        if effects.reset.is_some() {
            self.device.quiesce();
            self.device.reset();
        }
        for vector in effects.msi.deliver.iter() {
            self.interrupts.msi.signal(vector.into());
        }
        if let Some(level) = effects.intx {
            self.interrupts.intx.set_level(level);
        }
        if effects.reset.is_none() {
            let (device, mut context) = self.split();
            device.effects_applied(effects, &mut context);
        }
    }

    fn reset_function(&mut self) {
        let effects = self.function.reset(ResetKind::Device);
        self.apply(&effects);
    }

    fn split(&mut self) -> (&mut dyn Device, Context<'_>) {
        let context = Context::new(&mut self.function, &mut self.interrupts, &self.dma);
        (self.device.as_mut(), context)
    }

    /// What serves a region, and its size in bytes; `None` when the function does not have it.
    fn target(&self, region: PciRegion) -> Option<(Target, u64)> {
        match region {
            PciRegion::Bar(index) => {
                let bar = self.function.bar(BarIndex::new(index)?)?;
                Some((Target::Bar(bar.index), bar.size))
            }
            PciRegion::Config => Some((Target::Config, self.function.config_size() as u64)),
            PciRegion::Rom | PciRegion::Vga => None,
        }
    }

    fn checked(&self, access: &RegionAccess) -> Result<Target, RequestError> {
        let region = access.region;
        let (target, size) = PciRegion::from_index(region)
            .and_then(|region| self.target(region))
            .ok_or(RequestError::NoRegion(region))?;
        checked_end(access, size)?;
        Ok(target)
    }

    /// Counts, records and logs an access to a BAR that does not decode.
    fn unsupported(&mut self, access: &RegionAccess, direction: Direction) {
        let bar = u8::try_from(access.region)
            .ok()
            .and_then(BarIndex::new)
            .and_then(|index| self.function.bar(index));
        let io = bar.is_some_and(|bar| bar.kind == BarKind::Io);
        let counters = self.counters(access.region);
        let (counter, kind, what) = match direction {
            Direction::Read if io => (&mut counters.reads_ur, RequestKind::IoRead, "read"),
            Direction::Read => (&mut counters.reads_ur, RequestKind::MemoryRead, "read"),
            Direction::Write => (&mut counters.writes_dropped, RequestKind::MemoryWrite, "write"),
            Direction::IoWrite => (&mut counters.writes_dropped, RequestKind::IoWrite, "write"),
        };
        *counter += 1;
        let _ = self.function.record_unsupported_request(&UnsupportedRequest {
            kind,
            address: bar.map_or(0, |bar| bar.address).saturating_add(access.offset),
            length: access.count as usize,
        });
        if let Some(suppressed) = self.log.admit() {
            let RegionAccess { offset, region, count } = *access;
            info!(
                function = self.name,
                suppressed,
                "Unsupported Request: {what} of {count} bytes at BAR{region}+{offset:#x}, which does not decode"
            );
        }
    }

    fn counters(&mut self, region: u32) -> &mut RegionState {
        &mut self.regions[region as usize]
    }
}

/// Configuration space is at most 4096 bytes, and the access was checked against it.
fn offset_in_config(offset: u64) -> usize {
    usize::try_from(offset).expect("checked against the size of configuration space")
}
