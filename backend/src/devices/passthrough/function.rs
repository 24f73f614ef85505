use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;

use super::config_policy::ConfigPolicy;
use super::device::{
    Description, IrqDescription, RegionDescription, VfioDevice, VfioIrq, VfioRegion,
};
use super::interrupts::{Interrupts, IrqRequest, VfioIrqError};
use super::msix_table::MsixTable;
use super::placed;
use crate::dma::{DmaAccess, DmaError, DmaTable, Iova};
use crate::pci::spec::{EXTENDED_CONFIG_SIZE, bar, header, power};
use crate::pci::{Bar, BarIndex, BarKind, Command};

/// A real PCI function that the kernel gave to this process.
///
/// What it decodes is asked of the device each time: others can change it, a reset for instance.
#[derive(Debug)]
pub struct VfioFunction {
    device: Box<dyn VfioDevice>,
    description: Description,
    policy: ConfigPolicy,
    msix_table: Option<MsixTable>,
    interrupts: Interrupts,
    dma: DmaTable,
    io_bars: [bool; bar::COUNT],
    epoch: u64,
    /// As of the last look.
    decode: Decode,
    /// Where the BARs are, and of which epoch that is.
    bars: Vec<Bar>,
    placed_at: Option<u64>,
}

/// How an access ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// The device did it.
    Done,
    /// The function does not decode the region: a read's data is all ones, a write was dropped.
    Unsupported,
    /// The function decodes, and yet the kernel refuses. Data as for [`Unsupported`](Self::Unsupported).
    Failed(Errno),
}

/// What the function claims, as its own registers say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Decode {
    memory: bool,
    io: bool,
    rom: bool,
}

/// An access that the kernel refuses while the function decodes lost a race against somebody who
/// toggles decode. So often in a row, it lost none.
const RACES: usize = 8;

impl VfioFunction {
    /// Takes a device over and brings it to the state of power-on.
    ///
    /// # Errors
    /// What the kernel says when configuration space can't be read.
    pub fn new(
        device: Box<dyn VfioDevice>,
        mut description: Description,
        dma: DmaTable,
    ) -> Result<Self, Errno> {
        let size = description.regions[VfioRegion::Config.index() as usize].size;
        let size = usize::try_from(size).unwrap_or(usize::MAX).min(EXTENDED_CONFIG_SIZE);
        let mut config = vec![0xff; size];
        device.read(VfioRegion::Config, 0, &mut config)?;
        let policy = ConfigPolicy::new(&config);
        let msix_table = policy.layout().msix.map(MsixTable::new);
        if let (Some(table), Some(place)) = (&msix_table, policy.layout().msix)
            && let Some(region) = description.regions.get_mut(usize::from(place.bar))
        {
            region.unmappable(&table.range());
        }
        let io_bars = std::array::from_fn(|index| {
            let register = config.get(header::BAR0 + index * 4).copied().unwrap_or(0);
            u32::from(register) & bar::IO_SPACE != 0
        });
        let interrupts = Interrupts::new(description.irqs);
        let decode = Decode::default();
        let epoch = 0;
        let mut function = Self {
            device,
            description,
            policy,
            msix_table,
            interrupts,
            dma,
            io_bars,
            epoch,
            decode,
            bars: Vec::new(),
            placed_at: None,
        };
        // Whoever had it before: without a way to reset it, at least it stays quiet.
        match function.reset() {
            Err(Errno::NOTSUP) | Ok(()) => Ok(function),
            Err(errno) => Err(errno),
        }
    }

    /// Whether [`reset`](Self::reset) resets the device, and not just silences it.
    #[must_use]
    pub fn resettable(&self) -> bool {
        self.description.resettable
    }

    /// What a region is; of size 0 where the function has none.
    #[must_use]
    pub fn region(&self, region: VfioRegion) -> &RegionDescription {
        &self.description.regions[region.index() as usize]
    }

    /// What an interrupt type is.
    #[must_use]
    pub fn irq(&self, irq: VfioIrq) -> IrqDescription {
        self.interrupts.describe(irq)
    }

    /// The device file, which BARs are mapped from.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.device.descriptor()
    }

    /// Whether the function claims a region at this moment.
    pub fn claims(&mut self, region: VfioRegion) -> bool {
        let decode = self.look();
        match region {
            VfioRegion::Config => true,
            VfioRegion::Rom => decode.rom,
            VfioRegion::Bar(bar) if self.is_io(bar) => decode.io,
            VfioRegion::Bar(_) => decode.memory,
        }
    }

    /// Moves with every change of decode or BAR address that was seen.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Its BARs, and which of them it claims, as of the last access or change.
    pub fn bars(&self) -> impl Iterator<Item = (Bar, bool)> {
        let Decode { memory, io, rom: _ } = self.decode;
        let claimed = move |bar: &Bar| if bar.kind == BarKind::Io { io } else { memory };
        self.bars.iter().map(move |bar| (*bar, claimed(bar)))
    }

    /// Whether a place in a region can be mapped.
    #[must_use]
    pub fn maps(&self, region: VfioRegion, offset: u64) -> bool {
        self.region(region).mappable.iter().any(|part| part.contains(&offset))
    }

    /// Whether a BAR is in I/O space.
    #[must_use]
    pub fn is_io(&self, bar: u8) -> bool {
        self.io_bars.get(usize::from(bar)).is_some_and(|io| *io)
    }

    /// Reads from a region. `data` is all ones where nothing answers.
    pub fn read(&mut self, region: VfioRegion, offset: u64, data: &mut [u8]) -> Completion {
        let outcome = self.attempt(region, |device| {
            data.fill(0xff);
            device.read(region, offset, data)
        });
        if outcome != Completion::Done {
            data.fill(0xff);
        } else if region == VfioRegion::Config {
            self.policy.read(offset_in_config(offset), data);
        } else if let Some(table) = &self.msix_table {
            table.read(region, offset, data);
        }
        outcome
    }

    /// Writes to a region. A configuration write may change decode and interrupts; that the kernel
    /// refuses the latter is [`Completion::Failed`].
    pub fn write(&mut self, region: VfioRegion, offset: u64, data: &[u8]) -> Completion {
        if region == VfioRegion::Config {
            let result = self.config_write(offset_in_config(offset), data);
            return result.map_or_else(Completion::Failed, |()| Completion::Done);
        }
        // Nobody stores what is written to a ROM, and the kernel would call it an error.
        let writable = self.region(region).writable;
        let outcome = self.attempt(region, |device| {
            if writable { device.write(region, offset, data) } else { Ok(()) }
        });
        if let (Completion::Done, Some(table)) = (outcome, &mut self.msix_table) {
            table.write(region, offset, data);
        }
        outcome
    }

    /// Configures interrupts.
    ///
    /// # Errors
    /// [`VfioIrqError`].
    pub fn set_irqs(&mut self, irq: VfioIrq, request: IrqRequest) -> Result<(), VfioIrqError> {
        let enables = self.policy.message_enables();
        self.interrupts.request(self.device.as_ref(), enables, irq, request)
    }

    /// Adds a window that the device can reach.
    ///
    /// # Errors
    /// [`DmaError`]; nothing has changed.
    pub fn dma_map(
        &mut self,
        iova: Iova,
        size: u64,
        access: DmaAccess,
        file: Option<(OwnedFd, u64)>,
    ) -> Result<(), DmaError> {
        self.dma.map(iova, size, access, file)
    }

    /// Removes the windows of a range, or all. The device can't reach them when it returns.
    ///
    /// # Errors
    /// [`DmaError`].
    pub fn dma_unmap(&mut self, range: Option<(Iova, u64)>) -> Result<(), DmaError> {
        match range {
            Some((iova, size)) => self.dma.unmap(iova, size),
            None => self.dma.unmap_all(),
        }
    }

    /// Brings the function to the state of power-on. What the client wired stays wired.
    ///
    /// # Errors
    /// What the kernel says, `NOTSUP` if it knows no way. The function decodes nothing and issues no
    /// requests then either.
    pub fn reset(&mut self) -> Result<(), Errno> {
        self.epoch += 1;
        let zero = self.policy.reset();
        if let Some(table) = &mut self.msix_table {
            table.reset();
        }
        let enables = self.policy.message_enables();
        let mut result = self.interrupts.apply(self.device.as_ref(), enables);
        result = result.and(self.silence());
        if self.description.resettable {
            result = result.and(self.device.reset());
        }
        // The kernel restores what it saved before the reset.
        for range in zero {
            let written =
                self.device.write(VfioRegion::Config, range.start as u64, &vec![0; range.len()]);
            result = result.and(written);
        }
        self.look();
        if self.description.resettable { result } else { result.and(Err(Errno::NOTSUP)) }
    }

    /// Gives everything of the client's back and resets the function. Every step is done, whatever
    /// fails before it.
    ///
    /// # Errors
    /// The first that failed. Memory that the IOMMU does not give back stays a window.
    pub fn disconnect(&mut self) -> Result<(), Errno> {
        let disconnected = self.interrupts.disconnect(self.device.as_ref());
        let reset = match self.reset() {
            Err(Errno::NOTSUP) => Ok(()),
            result => result,
        };
        let unmapped = self.dma.unmap_all().map_err(|error| error.errno());
        disconnected.and(reset).and(unmapped)
    }

    /// Does an access to what the function decodes. The kernel's own check of decode comes later than
    /// ours, so a refusal is looked at again.
    fn attempt(
        &mut self,
        region: VfioRegion,
        mut access: impl FnMut(&dyn VfioDevice) -> Result<(), Errno>,
    ) -> Completion {
        let mut refusal = Errno::IO;
        for _ in 0..RACES {
            if !self.claims(region) {
                return Completion::Unsupported;
            }
            match access(self.device.as_ref()) {
                Ok(()) => return Completion::Done,
                Err(errno) => refusal = errno,
            }
        }
        Completion::Failed(refusal)
    }

    fn config_write(&mut self, offset: usize, data: &[u8]) -> Result<(), Errno> {
        let moves = offset < header::EXPANSION_ROM + 4 && offset + data.len() > header::BAR0;
        if moves || self.policy.resets(offset, data) {
            self.epoch += 1;
        }
        let pieces = self.policy.write(offset, data);
        let mut result = Ok(());
        for (at, piece) in pieces {
            result = result.and(self.device.write(VfioRegion::Config, at as u64, piece));
        }
        let enables = self.policy.message_enables();
        let applied = self.interrupts.apply(self.device.as_ref(), enables);
        self.look();
        result.and(applied)
    }

    /// Stops decode and bus mastering.
    fn silence(&self) -> Result<(), Errno> {
        self.device.write(VfioRegion::Config, header::COMMAND as u64, &[0; 2])
    }

    /// Asks the device what it decodes.
    fn look(&mut self) -> Decode {
        let decode = self.read_decode().unwrap_or_default();
        if decode != self.decode {
            self.decode = decode;
            self.epoch += 1;
        }
        if self.placed_at != Some(self.epoch) {
            self.placed_at = Some(self.epoch);
            self.place();
        }
        decode
    }

    /// Asks the device where its BARs are. One that does not answer has them where they were.
    fn place(&mut self) {
        let mut registers = [0; placed::LENGTH];
        if self.config(header::BAR0, &mut registers).is_some() {
            let regions = &self.description.regions;
            let size = |bar: BarIndex| regions[usize::from(bar)].size;
            if let Some(bars) = placed::bars(&registers, size) {
                self.bars = bars;
            }
        }
    }

    /// `None` when nobody answers: the device was unplugged.
    fn read_decode(&self) -> Option<Decode> {
        let mut registers = [0; 4];
        self.config(header::COMMAND, &mut registers)?;
        if registers == [0xff; 4] {
            return None;
        }
        if let Some(at) = self.policy.layout().power {
            let mut state = [0; 2];
            self.config(at, &mut state)?;
            if u16::from_le_bytes(state) & power::PMCSR_POWER_STATE != 0 {
                return None;
            }
        }
        let command = Command::from_bits_truncate(u16::from_le_bytes([registers[0], registers[1]]));
        let memory = command.contains(Command::MEMORY_SPACE);
        let mut rom = [0];
        if self.region(VfioRegion::Rom).size > 0 {
            self.config(header::EXPANSION_ROM, &mut rom)?;
        }
        Some(Decode {
            memory,
            io: command.contains(Command::IO_SPACE),
            rom: memory && rom[0] & 1 != 0,
        })
    }

    fn config(&self, at: usize, data: &mut [u8]) -> Option<()> {
        self.device.read(VfioRegion::Config, at as u64, data).ok()
    }
}

/// Configuration space is at most 4096 bytes, and the access was checked against it.
fn offset_in_config(offset: u64) -> usize {
    usize::try_from(offset).expect("checked against the size of configuration space")
}
