use std::collections::BTreeSet;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use barkeep_protocol::page::decode::{Counters, DecodeState};
use barkeep_protocol::wire::limits::MAX_DMA_MAPS;
use barkeep_protocol::wire::{
    BarkeepExtensions, DecodeFlags, DeviceFeature, DeviceFlags, DeviceInfo, DmaMap, DmaUnmap,
    FaultReport, FaultVerdict, InfoQuery, IoFdsQuery, PciIrq, PciRegion, RegionAccess, RegionFlags,
    RegionState, RegionStateQuery, SetIrqs, SparseArea,
};
use tracing::warn;

use super::decode_page;
use super::migration::Migration;
use super::request_error::RequestError;
use super::served::{Reply, Served, absent_region, checked_end, dma_access, duplicate};
use crate::devices::{Context, Device, MAX_WAKES, MemoryMessage, Options, Ticket, Transfers};
use crate::dma::{DmaError, DmaTable, Iova};
use crate::irq::{EventFd, Interrupts};
use crate::log_limit::RateLimit;
use crate::pci::{
    BarIndex, BarKind, Effects, Function, FunctionSpec, ResetKind, RomSpec, SpecError, spec,
};
use crate::state::Scratch;

mod accesses;
mod features;
mod interrupts;
mod io_fds;
mod recording;
mod unmapping;
mod work;

#[cfg(test)]
mod tests;

pub(super) use recording::{Changes, Damaged, Image, Recorded, Rest};

/// A function with everything it needs to be served: the model, the device behind it, its windows
/// into guest memory and its interrupts.
///
/// Every access to a BAR passes [`Function::claims`] first. What no decoding function claims
/// completes as an Unsupported Request: reads return all ones, writes are dropped (PCIe 2.3.1).
pub struct HostedFunction {
    name: String,
    function: Function,
    device: Box<dyn Device>,
    rom: Option<Vec<u8>>,
    interrupts: Interrupts,
    dma: DmaTable,
    transfers: Transfers,
    /// Transfers are left that need nobody but us.
    unfinished: bool,
    migration: Migration,
    /// Wakes that came while the function was stopped, by index.
    missed_wakes: BTreeSet<usize>,
    /// A reload was wanted while the function was stopped.
    missed_reload: bool,
    regions: [RegionState; PciRegion::COUNT as usize],
    log: RateLimit,
}

impl std::fmt::Debug for HostedFunction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HostedFunction").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The most files of windows that are kept for a device to show: more than a peer takes regions of
/// memory.
const MAX_WINDOW_FILES: usize = 512;

/// A region that exists, by what serves it.
#[derive(Clone, Copy)]
enum Target {
    Bar(BarIndex),
    Rom,
    Config,
}

impl HostedFunction {
    /// Puts a device behind a function. `name` is what logs call it.
    ///
    /// # Errors
    /// [`SpecError`] when the device describes a function that can't exist: a bug of the device.
    pub fn new(name: impl Into<String>, device: Box<dyn Device>) -> Result<Self, SpecError> {
        Self::with_options(name, device, Options::default())
    }

    /// As [`new`](Self::new), with what an operator said about the function.
    ///
    /// # Errors
    /// [`SpecError`], also when the function can't have such a ROM.
    pub fn with_options(
        name: impl Into<String>,
        mut device: Box<dyn Device>,
        options: Options,
    ) -> Result<Self, SpecError> {
        let name = name.into();
        device.set_name(&name);
        let Options { decode, rom } = options;
        let size = |rom: &Vec<u8>| {
            let length = u32::try_from(rom.len()).ok().and_then(u32::checked_next_power_of_two);
            length.unwrap_or(u32::MAX).max(spec::rom::SIZE_MIN)
        };
        let function = Function::new(FunctionSpec {
            decode,
            rom: rom.as_ref().map(|rom| RomSpec { size: size(rom) }),
            ..device.spec()
        })?;
        assert!(device.wakes().len() <= MAX_WAKES, "the device keeps to the limit");
        let spec = function.spec();
        let msi = spec.msi.map_or(0, |msi| msi.vectors.count());
        let msix = spec.msix.map_or(0, |msix| msix.vectors.count());
        let mut dma = DmaTable::new(MAX_DMA_MAPS);
        if device.needs_window_files() {
            dma.keep_files(MAX_WINDOW_FILES);
        }
        Ok(Self {
            name,
            interrupts: Interrupts::new(msi.into(), msix.into()),
            function,
            device,
            rom,
            dma,
            transfers: Transfers::default(),
            unfinished: false,
            migration: Migration::default(),
            missed_wakes: BTreeSet::new(),
            missed_reload: false,
            regions: Default::default(),
            log: RateLimit::default(),
        })
    }
}

impl Served for HostedFunction {
    fn client_left(&mut self) {
        // Before the windows go, whatever the reset does.
        self.device.quiesce();
        self.reset_function();
        // Only an IOMMU could refuse.
        let _ = self.dma.unmap_all();
        self.dma.stop_logging();
        self.interrupts.disconnect();
        self.regions = Default::default();
        self.rewired();
    }

    fn device_info(&self, reply: &mut Reply<'_>) {
        let info = DeviceInfo {
            flags: DeviceFlags::RESET | DeviceFlags::PCI,
            num_regions: PciRegion::COUNT,
            num_irqs: PciIrq::COUNT,
        };
        reply.bytes(&info.to_bytes());
    }

    fn region_info(
        &self,
        query: InfoQuery,
        _: BarkeepExtensions,
        reply: &mut Reply<'_>,
    ) -> Result<(), RequestError> {
        let region =
            PciRegion::from_index(query.index).ok_or(RequestError::NoRegion(query.index))?;
        let mut info = absent_region(query.index);
        if let Some((target, size)) = self.target(region) {
            info.flags = match target {
                Target::Rom => RegionFlags::READ,
                Target::Bar(_) | Target::Config => RegionFlags::READ | RegionFlags::WRITE,
            };
            info.size = size;
            if let Target::Bar(bar) = target
                && let Some(mapping) = self.device.mapping(bar)
            {
                let areas = self.function.mappable_areas(bar);
                if !areas.is_empty() {
                    reply.fd(duplicate(mapping.file)?);
                    info.flags |= RegionFlags::MMAP;
                    info.file_offset = mapping.offset;
                    if !matches!(areas[..], [ref area] if *area == (0..size)) {
                        let area = |part: &std::ops::Range<u64>| SparseArea {
                            offset: part.start,
                            size: part.end - part.start,
                        };
                        info.sparse = areas.iter().map(area).collect();
                    }
                }
            }
        }
        reply.bytes(&info.to_bytes(query.argsz));
        Ok(())
    }

    fn region_read(&mut self, access: &RegionAccess, data: &mut [u8]) -> Result<(), RequestError> {
        accesses::read(self, access, data)
    }

    fn region_write(&mut self, access: &RegionAccess, data: &[u8]) -> Result<(), RequestError> {
        accesses::write(self, access, data)
    }

    fn region_io_fds(
        &self,
        query: &IoFdsQuery,
        most: usize,
        reply: &mut Reply<'_>,
    ) -> Result<(), RequestError> {
        io_fds::info(self, query, most, reply)
    }

    fn irq_info(&self, query: InfoQuery, reply: &mut Reply<'_>) -> Result<(), RequestError> {
        interrupts::info(self, query, reply)
    }

    fn set_irqs(&mut self, set: &SetIrqs<'_>, fds: Vec<OwnedFd>) -> Result<(), RequestError> {
        let result = interrupts::set(self, set, fds);
        // Some vectors may be set before one that is refused.
        self.rewired();
        result
    }

    fn unmask_eventfd(&self) -> Option<&Arc<EventFd>> {
        self.interrupts.intx.unmask_eventfd()
    }

    fn unmask(&mut self) {
        self.interrupts.intx.unmask();
    }

    fn device_reset(&mut self) -> Result<(), RequestError> {
        self.reset_function();
        Ok(())
    }

    fn dma_map(&mut self, map: &DmaMap, file: Option<OwnedFd>) -> Result<(), RequestError> {
        let file = file.map(|file| (file, map.file_offset));
        self.dma.map(Iova(map.address), map.size, dma_access(map.access), file)?;
        self.rewired();
        Ok(())
    }

    fn dma_unmap(&mut self, unmap: &DmaUnmap, reply: &mut Reply<'_>) -> Result<(), RequestError> {
        let result = unmapping::unmap(self, unmap, reply);
        // Whatever went away or stayed: the device was quiesced.
        self.rewired();
        result
    }

    fn device_feature(
        &mut self,
        request: &DeviceFeature<'_>,
        reply: &mut Reply<'_>,
    ) -> Result<(), RequestError> {
        features::serve(self, request, reply)
    }

    fn migration_read(&mut self, limit: usize, out: &mut Vec<u8>) -> Result<(), RequestError> {
        features::migration_read(self, limit, out)
    }

    fn migration_write(&mut self, data: &[u8]) -> Result<(), RequestError> {
        features::migration_write(self, data)
    }

    fn memory_fault(
        &mut self,
        report: &FaultReport,
        reply: &mut Reply<'_>,
    ) -> Result<(), RequestError> {
        let access = RegionAccess { offset: report.offset, region: report.region, count: 1 };
        let Target::Bar(bar) = self.checked(&access)? else {
            return Err(RequestError::NoRegion(report.region));
        };
        self.counters(report.region).memory_faults += 1;
        let epoch = self.function.epoch();
        let mappable = || {
            let areas = self.function.mappable_areas(bar);
            self.device.mapping(bar).is_some()
                && areas.iter().any(|area| area.contains(&report.offset))
        };
        let verdict = if !self.claims(bar) {
            FaultVerdict::UnsupportedRequest { epoch }
        } else if mappable() {
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
        let (target, _) = PciRegion::from_index(query.region)
            .and_then(|region| self.target(region))
            .ok_or(RequestError::NoRegion(query.region))?;
        let claimed = match target {
            Target::Bar(bar) => self.claims(bar),
            Target::Rom => self.function.claims_rom(),
            Target::Config => true,
        };
        let mut decode = DecodeFlags::empty();
        decode.set(DecodeFlags::CLAIMED, claimed);
        let epoch = self.function.epoch();
        let counters = *self.counters(query.region);
        let state = RegionState { decode: decode.bits(), epoch, ..counters };
        reply.bytes(&state.to_bytes());
        Ok(())
    }

    fn decode_state(&self) -> DecodeState {
        let running = self.migration.is_running();
        let decode = self.function.decode();
        let bars = self.function.bars().map(|bar| {
            let enabled = if bar.kind == BarKind::Io { decode.io } else { decode.memory };
            (bar, running && enabled)
        });
        decode_page::state(self.function.epoch(), bars)
    }

    fn completions(&self) -> Counters {
        decode_page::counters(&self.regions)
    }

    fn next_address(&mut self) -> Option<Iova> {
        self.do_transfers();
        let asks = self.migration.is_running() && self.transfers.is_stuck();
        self.transfers.address().filter(|_| asks)
    }

    fn next_message(&mut self, limit: usize) -> Option<MemoryMessage> {
        self.message(limit)
    }

    fn has_work(&self) -> bool {
        self.unfinished
    }

    fn work(&mut self) {
        self.do_transfers();
    }

    fn answered(&mut self, ticket: Ticket, answer: Result<&[u8], DmaError>) {
        // Neither the driver nor the new home of a function that moved expects anything any more.
        let answer = match answer {
            Ok(_) if !self.function.bus_master() => Err(DmaError::BusMasterDisabled),
            answer => answer,
        };
        let step = self.transfers.answered(&self.dma, ticket, answer);
        self.step_taken(step);
        self.do_transfers();
    }

    fn wakes(&self) -> Vec<BorrowedFd<'_>> {
        self.device.wakes()
    }

    fn woken(&mut self, index: usize) {
        if !self.migration.is_running() {
            self.missed_wakes.insert(index);
            return;
        }
        let (device, mut context) = self.split();
        device.woken(index, &mut context);
        self.do_transfers();
    }

    fn scratch_words(&mut self) -> usize {
        self.device.saved().map_or(0, |saved| saved.scratch_words())
    }

    fn set_scratch(&mut self, scratch: Scratch) {
        if let Some(saved) = self.device.saved() {
            saved.set_scratch(scratch);
        }
    }

    fn kept(&self) -> Vec<BorrowedFd<'_>> {
        self.device.kept()
    }

    fn adopt(&mut self, kept: Vec<OwnedFd>) -> io::Result<()> {
        self.device.adopt(kept)
    }

    fn record(&mut self, image: &mut Image) -> Changes {
        self.changes_from(image)
    }

    fn recover(&mut self, recorded: Recorded<'_>) -> Result<(), Damaged> {
        self.become_recorded(recorded)
    }

    fn go_on(&mut self) {
        self.end_recovery();
    }

    fn quiesce(&mut self) {
        self.device.quiesce();
    }

    fn has_message(&self) -> bool {
        self.migration.is_running() && self.transfers.is_stuck()
    }

    fn reload(&mut self) {
        if !self.migration.is_running() {
            self.missed_reload = true;
            return;
        }
        let (device, mut context) = self.split();
        if let Err(error) = device.reload(&mut context) {
            warn!(function = self.name, "can't reload: {error}");
        }
        self.do_transfers();
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
            self.transfers.clear(&self.dma);
            self.device.reset();
        }
        for vector in effects.msi.deliver.iter() {
            self.interrupts.msi.signal(vector.into());
        }
        for vector in effects.msix.deliver.iter() {
            self.interrupts.msix.signal(vector.into());
        }
        if let Some(level) = effects.intx {
            self.interrupts.intx.set_level(level);
        }
        if effects.reset.is_none() {
            let (device, mut context) = self.split();
            device.effects_applied(effects, &mut context);
        }
    }

    /// Tells the device about what the client set up.
    fn rewired(&mut self) {
        if self.migration.is_running() {
            let (device, mut context) = self.split();
            device.rewired(&mut context);
        }
    }

    /// Does what could not be done while the function was stopped.
    fn reload_if_missed(&mut self) {
        if std::mem::take(&mut self.missed_reload) {
            self.reload();
        }
    }

    /// As at power-on, and working.
    fn reset_function(&mut self) {
        self.migration = Migration::Running;
        self.missed_wakes.clear();
        self.unfinished = false;
        let effects = self.function.reset(ResetKind::Device);
        self.apply(&effects);
        // A restored state may have had another level than the line, and then nothing changed.
        self.interrupts.intx.set_level(self.function.intx_line());
        self.reload_if_missed();
    }

    /// A stopped function claims nothing but configuration space: what it has was given away.
    fn claims(&self, bar: BarIndex) -> bool {
        self.migration.is_running() && self.function.claims(bar)
    }

    fn split(&mut self) -> (&mut dyn Device, Context<'_>) {
        let context =
            Context::new(&mut self.function, &mut self.interrupts, &self.dma, &mut self.transfers)
                .running(self.migration.is_running());
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
            PciRegion::Rom => self.function.spec().rom.map(|rom| (Target::Rom, rom.size.into())),
            PciRegion::Vga => None,
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

    fn counters(&mut self, region: u32) -> &mut RegionState {
        &mut self.regions[region as usize]
    }
}
